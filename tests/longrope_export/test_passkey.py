"""Passkey prompts of exactly the asked length, and scores that follow the key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from longrope_export import RopeScaling, load
from longrope_export.errors import NumericalError, TextTooShortError
from longrope_export.evaluation.documents import encode
from longrope_export.evaluation.passkey import (
    FILLER,
    INTRODUCTION,
    KEY_SENTENCE,
    QUESTION,
    PasskeyPrompt,
    PasskeyResult,
    PasskeyTrial,
    build_prompt,
    evaluate_passkey,
    first_number,
    forced_correct,
    generated_text,
    passkey_prompts,
    score,
)

LENGTH = 480


def trained(kind: str) -> Any:
    """A small tokenizer of each kind that changes how the answer splits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "sentencepiece"))
    special = ["<unk>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if kind == "sentencepiece":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
        special, alphabet = [*special, *(f"<0x{byte:02X}>" for byte in range(256))], list("0123456789")
    else:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = [pre_tokenizers.Digits(individual_digits=True)] if kind == "single digits" else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    numbers = " ".join(str(number) for number in range(1000, 3000))
    tokenizer.train_from_iterator([INTRODUCTION, FILLER, QUESTION, KEY_SENTENCE, numbers] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=["single digits", "merged digits", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return trained(request.param)


def test_prompt_and_answer_have_exactly_the_asked_length(tokenizer: Any) -> None:
    shortest = build_prompt(tokenizer, 2_000, 50_000, 0.5)
    for length in (200, 201, 256, 333, 512, 1_000, 2_000):
        for depth in (0.0, 0.05, 0.5, 0.95, 1.0):
            for key in (1, 77, 2_500, 50_000):
                prompt = build_prompt(tokenizer, length, key, depth)
                assert prompt.length == len(prompt.prompt_ids) + len(prompt.answer_ids) == length
                assert prompt.prompt_ids[0] == tokenizer.bos_token_id
    assert shortest.length == 2_000


def test_the_prompt_is_the_template_in_its_order(tokenizer: Any) -> None:
    text = tokenizer.decode(build_prompt(tokenizer, 400, 31_415, 0.4).prompt_ids[1:])
    flat = " ".join(text.split())
    parts = [INTRODUCTION, FILLER, KEY_SENTENCE.format(key=31_415), FILLER, QUESTION]
    places = []
    for part in parts:
        places.append(flat.index(part, places[-1] + 1 if places else 0))
    assert places[0] == 0
    assert flat.endswith(QUESTION)
    assert text.count("\n") == 4
    assert "<" not in text


def test_the_answer_is_the_key_as_it_splits_after_the_question(tokenizer: Any) -> None:
    for key in (7, 1_234, 50_000):
        prompt = build_prompt(tokenizer, 300, key, 0.5)
        assert tokenizer.decode(prompt.answer_ids).strip() == str(key)
        whole = encode(tokenizer, f"\n{QUESTION} {key}")
        assert list(prompt.prompt_ids + prompt.answer_ids)[-len(whole) :] == whole


def test_depth_is_the_share_of_filler_before_the_key(tokenizer: Any) -> None:
    def place(depth: float) -> float:
        text = tokenizer.decode(build_prompt(tokenizer, 2_000, 4_242, depth).prompt_ids)
        return (text.index("The pass key is 4242") - len(INTRODUCTION)) / (len(text) - len(INTRODUCTION))

    assert place(0.0) < 0.02
    assert abs(place(0.25) - 0.25) < 0.04
    assert abs(place(0.75) - 0.75) < 0.05
    assert place(1.0) > 0.93


def test_a_length_without_room_for_the_template_is_refused_with_what_it_needs(tokenizer: Any) -> None:
    with pytest.raises(TextTooShortError, match=r"needs (\d+) tokens with this tokenizer; 20 is too short") as caught:
        build_prompt(tokenizer, 20, 50_000, 0.5)
    needed = int(str(caught.value).split("needs ")[1].split()[0])
    assert build_prompt(tokenizer, needed, 50_000, 0.5).length == needed
    with pytest.raises(TextTooShortError):
        build_prompt(tokenizer, needed - 1, 50_000, 0.5)


def test_trials_are_stratified_in_depth_and_fixed_by_the_seed(tokenizer: Any) -> None:
    prompts = passkey_prompts(tokenizer, 300, 10, seed=3)
    assert [prompt.depth for prompt in prompts] == pytest.approx([0.05 + 0.1 * i for i in range(10)])
    assert prompts == passkey_prompts(tokenizer, 300, 10, seed=3)
    keys = [prompt.key for prompt in prompts]
    assert keys != [prompt.key for prompt in passkey_prompts(tokenizer, 300, 10, seed=4)]
    assert len(set(keys)) > 8
    assert all(1 <= key <= 50_000 for key in keys)


def test_the_key_stands_twice_in_the_prompt_and_the_answer_not_at_all(tokenizer: Any) -> None:
    for prompt in passkey_prompts(tokenizer, 400, 8, seed=0):
        text = tokenizer.decode(prompt.prompt_ids, skip_special_tokens=True)
        assert re.findall(r"\d+", text) == [str(prompt.key)] * 2


@pytest.mark.parametrize(
    ("text", "number"), [(" 123.", "123"), (": 0045 6", "0045"), ("none", None), ("12345", "12345"), ("", None)]
)
def test_the_first_number_of_an_answer(text: str, number: str | None) -> None:
    assert first_number(text) == number


@pytest.fixture
def model(tiny_llama: Path, tiny_tokenizer: Any) -> Any:
    """A random model that says nothing but digits."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    digits = [tiny_tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"]
    with torch.no_grad():
        model.lm_head.weight[[token for token in range(97) if token not in digits]] = 0.0
    return model


def own_answer(model: Any, tokenizer: Any, digits: int) -> PasskeyPrompt:
    """A prompt with what the model says to it (by full forward passes) as the right answer."""
    prompt = build_prompt(tokenizer, LENGTH, 12_345, 0.5)
    ids = torch.tensor([prompt.prompt_ids])
    with torch.no_grad():
        for _ in range(digits):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    answer = ids[0, len(prompt.prompt_ids) :].tolist()
    key = tokenizer.decode(answer)
    assert key.isdigit()
    return PasskeyPrompt(prompt.prompt_ids, tuple(answer), key, 0.5)


def test_what_the_model_says_is_right_in_the_forced_way_and_one_changed_digit_is_wrong(
    model: Any, tiny_tokenizer: Any
) -> None:
    prompt = own_answer(model, tiny_tokenizer, 5)
    assert forced_correct(model, tiny_tokenizer, prompt)
    for place in range(5):
        answer = list(prompt.answer_ids)
        answer[place] = tiny_tokenizer.convert_tokens_to_ids("7" if str(prompt.key)[place] != "7" else "3")
        changed = PasskeyPrompt(prompt.prompt_ids, tuple(answer), 0, 0.5)
        assert not forced_correct(model, tiny_tokenizer, changed)


def test_a_space_before_the_digits_is_not_scored(model: Any, tiny_tokenizer: Any) -> None:
    prompt = build_prompt(tiny_tokenizer, LENGTH, 12_345, 0.5)
    spaced = own_answer(model, tiny_tokenizer, 1)
    assert tiny_tokenizer.decode(prompt.answer_ids) == " 12345"
    space = PasskeyPrompt(spaced.prompt_ids, prompt.answer_ids[:1], 0, 0.5)
    assert forced_correct(model, tiny_tokenizer, space), "the model says a digit here, which may not matter"


def test_generation_is_the_greedy_continuation_one_token_beyond_the_answer(model: Any, tiny_tokenizer: Any) -> None:
    prompt = own_answer(model, tiny_tokenizer, 6)
    shorter = PasskeyPrompt(prompt.prompt_ids, prompt.answer_ids[:5], 0, 0.5)
    assert generated_text(model, tiny_tokenizer, shorter) == str(prompt.key)


def test_a_longer_number_that_begins_like_the_key_is_wrong(model: Any, tiny_tokenizer: Any) -> None:
    """Forced, the digits are right; generated, the model goes on with digits, so it said another number."""
    prompt = own_answer(model, tiny_tokenizer, 3)
    trial = score(model, tiny_tokenizer, prompt, "both")
    assert (trial.forced, trial.generated) == (True, False)
    assert trial.text is not None
    assert trial.text.startswith(str(prompt.key))
    said = PasskeyPrompt(prompt.prompt_ids, prompt.answer_ids, trial.text, 0.5)  # type: ignore[arg-type]
    assert score(model, tiny_tokenizer, said, "generate").generated is True


def test_lm_head_runs_on_the_answer_rows_only(model: Any, tiny_tokenizer: Any) -> None:
    prompt = build_prompt(tiny_tokenizer, LENGTH, 12_345, 0.5)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[-2]))
    forced_correct(model, tiny_tokenizer, prompt)
    assert seen == [len(prompt.answer_ids)]


def test_a_model_that_switches_never_passes_the_asked_length(tiny_llama: Path, tiny_tokenizer: Any) -> None:
    """At exactly L only the short set may be used: one token more would rebuild the cache with the long one."""
    record = RopeScaling(
        rope_theta=10000.0, rotary_dim=32, original_max_position_embeddings=LENGTH,
        max_position_embeddings=2 * LENGTH, long_factor=(float("1e30"),) * 16,
    )  # fmt: skip
    prompt = build_prompt(tiny_tokenizer, LENGTH, 12_345, 0.5)
    switching, short = load(tiny_llama, record), load(tiny_llama, record, switch="short")
    assert generated_text(switching, tiny_tokenizer, prompt) == generated_text(short, tiny_tokenizer, prompt)


def test_modes_run_only_what_was_asked_for(model: Any, tiny_tokenizer: Any) -> None:
    forced = evaluate_passkey(model, tiny_tokenizer, [LENGTH], trials=2, mode="forced")
    generated = evaluate_passkey(model, tiny_tokenizer, [LENGTH], trials=2, mode="generate")
    assert (forced.accuracy(LENGTH, "generate"), forced.trials[0].text) == (None, None)
    assert generated.accuracy(LENGTH, "forced") is None
    assert generated.trials[0].text is not None


def test_nan_is_an_error_and_not_a_wrong_key(model: Any, tiny_tokenizer: Any) -> None:
    prompt = build_prompt(tiny_tokenizer, LENGTH, 12_345, 0.5)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(NumericalError, match="480 tokens"):
        forced_correct(model, tiny_tokenizer, prompt)


def test_a_length_without_room_is_refused_before_the_model_runs(tiny_tokenizer: Any) -> None:
    with pytest.raises(TextTooShortError, match="too short"):
        evaluate_passkey(torch.nn.Identity(), tiny_tokenizer, [LENGTH, 50])


def test_accuracy_counts_each_length_and_way_by_itself() -> None:
    def trial(length: int, forced: bool, generated: bool | None) -> PasskeyTrial:
        return PasskeyTrial(length, 1, 0.5, forced, generated, None)

    trials = (trial(8, True, False), trial(8, False, False), trial(16, True, None), trial(8, True, True))
    result = PasskeyResult(trials, 0, 1.0)
    assert result.accuracy(8) == pytest.approx(2 / 3)
    assert result.accuracy(8, "generate") == pytest.approx(1 / 3)
    assert (result.accuracy(16), result.accuracy(16, "generate"), result.accuracy(32)) == (1.0, None, None)
    assert result.to_dict()["lengths"] == [
        {"length": 8, "trials": 3, "forced": pytest.approx(2 / 3), "generated": pytest.approx(1 / 3)},
        {"length": 16, "trials": 1, "forced": 1.0, "generated": None},
    ]
