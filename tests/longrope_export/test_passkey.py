"""Passkey prompts of exactly the asked length, and scores that follow the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
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
)

LENGTH = 480


def trained(kind: str) -> Any:
    """A small tokenizer of each kind that changes how the answer splits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "sentencepiece"))
    special = ["<unk>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if kind == "sentencepiece":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Metaspace()
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
    text = tokenizer.decode(build_prompt(tokenizer, 400, 31_415, 0.4).prompt_ids, skip_special_tokens=True)
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


def test_smollm2_splits_digits_singly_and_finds_keys(smollm2: Path) -> None:
    from longrope_export.evaluation.documents import load_tokenizer

    tokenizer = load_tokenizer(smollm2)
    prompt = build_prompt(tokenizer, 256, 40_321, 0.5)
    assert prompt.length == 256
    assert [tokenizer.decode([token]) for token in prompt.answer_ids] == [" ", "4", "0", "3", "2", "1"]


class Copier(torch.nn.Module):
    """Not a language model: it answers with the token after the last earlier occurrence of the last `width` tokens."""

    def __init__(self, vocabulary: int, width: int, shift: int = 0) -> None:
        super().__init__()
        from types import SimpleNamespace

        self.config = SimpleNamespace()
        self.width, self.shift = width, shift
        self.lm_head = torch.nn.Linear(vocabulary, vocabulary, bias=False)
        torch.nn.init.eye_(self.lm_head.weight)
        self.base_model = CopierBody(vocabulary, width, shift)
        self.longest = 0

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, **ignored: Any) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.lm_head(self.base_model(input_ids).last_hidden_state))

    def generate(self, ids: Tensor, attention_mask: Tensor, generation_config: Any) -> Tensor:
        for _ in range(generation_config.max_new_tokens):
            self.longest = max(self.longest, ids.shape[1])
            ids = torch.cat([ids, self(ids).logits[:, -1:].argmax(-1)], dim=1)
        return ids


class CopierBody(torch.nn.Module):
    def __init__(self, vocabulary: int, width: int, shift: int) -> None:
        super().__init__()
        self.vocabulary, self.width, self.shift = vocabulary, width, shift

    def forward(self, input_ids: Tensor, **ignored: Any) -> Any:
        from types import SimpleNamespace

        tokens = input_ids[0].tolist()
        states = torch.zeros(1, len(tokens), self.vocabulary)
        for end in range(1, len(tokens) + 1):
            states[0, end - 1, self._next(tokens[:end])] = 1.0
        return SimpleNamespace(last_hidden_state=states)

    def _next(self, tokens: list[int]) -> int:
        for width in range(min(self.width, len(tokens) - 1), 0, -1):
            for start in range(len(tokens) - width - 1, -1, -1):
                if tokens[start : start + width] == tokens[-width:]:
                    return (tokens[start + width] + self.shift) % self.vocabulary
        return 0


def test_a_program_that_copies_scores_full_marks_in_both_ways(tiny_tokenizer: Any) -> None:
    copier = Copier(97, width=len("The pass key is "))
    result = evaluate_passkey(copier, tiny_tokenizer, [LENGTH], trials=4, seed=1, mode="both")
    assert result.accuracy(LENGTH, "forced") == result.accuracy(LENGTH, "generate") == 1.0
    assert copier.longest == LENGTH, "the model may see prompt and answer, not more"
    assert [trial.text.strip()[: len(str(trial.key))] for trial in result.trials if trial.text] == [
        str(trial.key) for trial in result.trials
    ]


def test_a_program_that_answers_another_number_scores_nothing(tiny_tokenizer: Any) -> None:
    result = evaluate_passkey(Copier(97, 16, shift=1), tiny_tokenizer, [LENGTH], trials=4, seed=1, mode="both")
    assert result.accuracy(LENGTH, "forced") == result.accuracy(LENGTH, "generate") == 0.0


def wrong_key(prompt: PasskeyPrompt, tokenizer: Any) -> PasskeyPrompt:
    other = build_prompt(tokenizer, prompt.length, (prompt.key + 11_111) % 50_000, prompt.depth)
    return PasskeyPrompt(prompt.prompt_ids, other.answer_ids, other.key, prompt.depth)


def test_a_wrong_key_is_scored_wrong(tiny_tokenizer: Any) -> None:
    copier = Copier(97, width=16)
    prompt = build_prompt(tiny_tokenizer, LENGTH, 12_345, 0.5)
    assert forced_correct(copier, tiny_tokenizer, prompt)
    assert not forced_correct(copier, tiny_tokenizer, wrong_key(prompt, tiny_tokenizer))


def test_one_wrong_digit_is_wrong(tiny_tokenizer: Any) -> None:
    copier = Copier(97, width=16)
    prompt = build_prompt(tiny_tokenizer, LENGTH, 12_345, 0.5)
    for place in range(1, 6):
        answer = list(prompt.answer_ids)
        answer[place] = tiny_tokenizer.convert_tokens_to_ids("9")
        assert not forced_correct(copier, tiny_tokenizer, PasskeyPrompt(prompt.prompt_ids, tuple(answer), 0, 0.5))


@pytest.mark.parametrize(
    ("text", "number"), [(" 123.", "123"), (": 0045 6", "0045"), ("none", None), ("12345", "12345"), ("", None)]
)
def test_the_first_number_of_an_answer(text: str, number: str | None) -> None:
    assert first_number(text) == number


def test_a_longer_number_that_begins_like_the_key_is_wrong(tiny_tokenizer: Any) -> None:
    prompt = build_prompt(tiny_tokenizer, LENGTH, 123, 0.5)
    ids = list(prompt.prompt_ids)
    text = tiny_tokenizer.decode(ids)
    longer = encode(tiny_tokenizer, text.replace("<s>", "").replace("123", "1234"))
    assert generated_text(Copier(97, 16), tiny_tokenizer, PasskeyPrompt((1, *longer), prompt.answer_ids, 123, 0.5)) == " 1234"


def test_forced_and_generated_agree_on_a_real_architecture(tiny_llama: Path, tiny_tokenizer: Any) -> None:
    """A random model's own greedy continuation, taken as the answer, is right in both ways; any other is wrong."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    prompt = build_prompt(tiny_tokenizer, LENGTH, 12_345, 0.5)
    ids = torch.tensor([prompt.prompt_ids])
    digits = [tiny_tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"]
    with torch.no_grad():
        model.lm_head.weight[[index for index in range(97) if index not in digits]] -= 100 * model.lm_head.weight.abs().max()
        for _ in range(4):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    own = tuple(ids[0, len(prompt.prompt_ids) :].tolist())
    text = generated_text(model, tiny_tokenizer, PasskeyPrompt(prompt.prompt_ids, own, 0, 0.5))
    assert text.startswith(tiny_tokenizer.decode(own))
    if all(token in digits for token in own):
        assert forced_correct(model, tiny_tokenizer, PasskeyPrompt(prompt.prompt_ids, own, 0, 0.5))
        other = (digits[(digits.index(own[0]) + 1) % 10], *own[1:])
        assert not forced_correct(model, tiny_tokenizer, PasskeyPrompt(prompt.prompt_ids, other, 0, 0.5))


def test_lm_head_runs_on_the_answer_rows_only(tiny_llama: Path, tiny_tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
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


def test_modes_run_only_what_was_asked_for(tiny_llama: Path, tiny_tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    forced = evaluate_passkey(model, tiny_tokenizer, [LENGTH], trials=2, mode="forced")
    generated = evaluate_passkey(model, tiny_tokenizer, [LENGTH], trials=2, mode="generate")
    assert (forced.accuracy(LENGTH, "generate"), forced.trials[0].text) == (None, None)
    assert generated.accuracy(LENGTH, "forced") is None
    assert generated.trials[0].text is not None


def test_nan_is_an_error_and_not_a_wrong_key(tiny_llama: Path, tiny_tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
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
