"""Chat templates are rendered as transformers does it, and hostile ones end with one clear line."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from retrieval_runs import demo_request, demo_tokenizer, run_task

from longrope_export.errors import InputFileError
from longrope_export.evaluation import chat
from longrope_export.evaluation.chat import MARK, chat_style, render_chat
from longrope_export.evaluation.chat_worker import LARGEST_TEXT, _render
from longrope_export.evaluation.passkey import build_prompt
from longrope_export.evaluation.prompts import prompt_style
from longrope_export.evaluation.registry import load_task

CHAT = (
    "{{ bos_token }}{%- set ns = namespace(turns=0) %}{% for message in messages %}{% set ns.turns = ns.turns + 1 %}\n"
    "{{ message.role }} {{ ns.turns }}:\n{{ message.content | trim }}\n{% generation %}{% endgeneration %}"
    "{% if loop.first %}{% continue %}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)


def with_template(template: Any) -> Any:
    tokenizer = copy.deepcopy(demo_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return with_template(CHAT)


def test_the_style_is_what_transformers_renders_around_the_text(tokenizer: Any) -> None:
    style = chat_style(tokenizer)
    messages = [{"role": "user", "content": MARK}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, after = rendered.split(MARK)
    assert style.opening == tuple(tokenizer(before, add_special_tokens=False)["input_ids"])
    assert style.closing == tuple(tokenizer(after, add_special_tokens=False)["input_ids"])
    assert style.opening.count(tokenizer.bos_token_id) == 1, "the template's BOS is a control token, and the only one"
    assert after == "\nassistant:\n"
    assert style.tokens == len(style.opening) + len(style.closing or ())


def test_a_passkey_in_a_chat_has_exactly_the_asked_length_and_the_answer_in_the_models_turn(tokenizer: Any) -> None:
    style = prompt_style(tokenizer, "chat")
    prompt = build_prompt(tokenizer, 256, 31_415, 0.5, style)
    assert prompt.length == 256
    text = tokenizer.decode(prompt.prompt_ids)
    assert text.endswith("What is the pass key?\nassistant:\nThe pass key is")
    assert "user 1:\n" in text
    assert tokenizer.decode(prompt.answer_ids) == " 31415"
    assert build_prompt(tokenizer, 256, 31_415, 0.5, prompt_style(tokenizer, "base")).prompt_ids != prompt.prompt_ids


def test_a_text_that_looks_like_a_control_token_stays_text(tokenizer: Any) -> None:
    """A user's text goes through `encode`, whatever the template writes around it."""
    bos = tokenizer.bos_token
    prompt = build_prompt(tokenizer, 256, 1, 0.5, prompt_style(tokenizer, "chat"))
    assert list(prompt.prompt_ids).count(tokenizer.bos_token_id) == 1
    from longrope_export.evaluation.documents import encode

    assert tokenizer.bos_token_id not in encode(tokenizer, f"{bos} {bos}")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("  ", "no chat template"),
        ({"tool_use": "x"}, "no chat template"),
        ("x" * ((1 << 20) + 1), "1,048,577 characters"),
    ],
    ids=["none", "blank", "no default", "huge"],
)
def test_a_model_without_a_usable_template_is_refused(template: Any, message: str) -> None:
    with pytest.raises(InputFileError, match=message):
        chat_style(with_template(template))


@pytest.mark.parametrize("text", ["no user's text", f"{MARK} twice {MARK}"])
def test_a_template_that_does_not_repeat_the_text_once_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_rendered", lambda template, special: text)
    with pytest.raises(InputFileError, match=r"0 times|2 times"):
        chat_style(with_template("anything"))


HOSTILE = {
    "class escape": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError", "unsafe"),
    "change of its input": ("{{ messages.append(1) }}", "SecurityError", r"unsafe|not safely callable"),
    "range bomb": ("{% for i in range(10**9) %}{% endfor %}", "OverflowError", "too big"),
    "long text": (f"{{{{ 'a' * {LARGEST_TEXT + 1} }}}}", "ValueError", "it writes 1,048,577 characters"),
    "its own refusal": ("{{ raise_exception('only tools') }}", "TemplateError", "only tools"),
    "syntax": ("{% for %}", "TemplateSyntaxError", "Expected"),
    "include": ("{% include '/etc/passwd' %}", "TypeError", "no loader"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_fail_in_the_sandbox(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template, kind, reason = HOSTILE[name]
    request = {"messages": [{"role": "user", "content": "x"}], "template": template, "special_tokens": {}}
    with pytest.raises(Exception, match=reason) as caught:
        _render(render_jinja_template, request)
    assert type(caught.value).__name__ == kind


def test_a_template_that_runs_on_is_ended_and_refused_in_one_line() -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InputFileError, match="more than 1 s or more memory") as caught:
        render_chat(endless, [], {}, seconds=1)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_template_that_fills_the_memory_is_refused() -> None:
    with pytest.raises(InputFileError, match=r"out of memory|MemoryError|more memory"):
        render_chat("{% set a = 'a' * 10**10 %}", [], {})


@pytest.mark.slow
def test_a_templates_own_message_reaches_the_user() -> None:
    with pytest.raises(InputFileError, match=r"template fails \(TemplateError: no users here\).*-prompt: base"):
        render_chat("{{ raise_exception('no users here') }}", [], {})


def test_the_demo_model_finds_a_passkey_in_a_chat(tokenizer: Any) -> None:
    request = replace(demo_request(256, trials=2, passkey_prompt="chat"), tokenizer=tokenizer)
    result = run_task(load_task("passkey"), request)
    assert result["prompt"] == "chat"
    grid = result["rows"]["unchanged"]["forced"]
    assert (grid["correct"], grid["total"]) == ([[1, 1]], [[1, 1]])
