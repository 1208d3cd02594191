"""Training attention inside real models: equal to transformers' own, document by document, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, tiny_family
from torch import Tensor

from longrope_export.errors import LongRopeError, UnsupportedModelError
from longrope_export.families import FAMILIES as ALL_FAMILIES
from longrope_export.training.attention import NAMES, Pattern, training_attention, use_attention

LENGTHS = ((23, 5, 12), (1, 39))  # of the documents of two rows
PATTERN = Pattern(LENGTHS, group=10)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_family(request.param)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_family("llama")


def token_ids(seed: int = 0) -> Tensor:
    return torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(seed))


def restarting(lengths: tuple[tuple[int, ...], ...]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])


def logits(model: Any, ids: Tensor, positions: Tensor | None = None, **more: Any) -> Tensor:
    output: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False, **more).logits
    return output


def separately(model: Any, ids: Tensor, positions: Tensor) -> Tensor:
    """Stock attention, one forward for each document."""
    rows = []
    for number, lengths in enumerate(LENGTHS):
        pieces = zip(*(part[number : number + 1].split(lengths, 1) for part in (ids, positions)))
        rows.append(torch.cat([logits(model, *piece) for piece in pieces], dim=1))
    return torch.cat(rows)


def gradients(model: Any, output: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return list(torch.autograd.grad((output * weights).sum(), list(model.parameters())))


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, wanted in zip(ours, theirs, strict=True):
        # Norms compute in float32, whatever the model's dtype.
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6 * float(wanted.detach().abs().max()))


def test_one_document_is_transformers_own_attention(model: Any) -> None:
    ids = token_ids()
    stock = logits(model, ids)
    with training_attention(model, "longrope_full"):
        ours = logits(model, ids, longrope_pattern=Pattern(((40,), (40,)), 10))
    assert_same([ours, *gradients(model, ours)], [stock, *gradients(model, stock)])


def test_packed_documents_are_separate_forwards(model: Any) -> None:
    ids, positions = token_ids(), restarting(LENGTHS)
    stock = separately(model, ids, positions)
    with training_attention(model, "longrope_full"):
        ours = logits(model, ids, positions, longrope_pattern=PATTERN)
    assert_same([ours, *gradients(model, ours)], [stock, *gradients(model, stock)])


def test_positions_that_jump_do_not_split_a_document(llama: Any) -> None:
    ids = token_ids()
    positions = (torch.arange(40) + 300 * (torch.arange(40) >= 17)).expand(2, -1)
    mask = torch.ones(40, 40, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    stock = logits(llama, ids, positions, attention_mask=mask)
    with training_attention(llama, "longrope_full"):
        ours = logits(llama, ids, positions, longrope_pattern=Pattern(((40,), (40,)), 10))
    assert_same([ours], [stock])
    with pytest.raises(AssertionError):
        assert_same([logits(llama, ids, positions)], [stock])  # transformers alone does split it


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_pattern_survives_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model, ids, positions = tiny_family("mistral"), token_ids(), restarting(LENGTHS)
    with training_attention(model, name):
        plain = logits(model, ids, positions, longrope_pattern=PATTERN)
        wanted = gradients(model, plain)
        model.train()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        output = logits(model, ids, positions, longrope_pattern=PATTERN)
        if reentrant:  # which knows backward() only
            weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
            (output * weights).sum().backward()
            found = [parameter.grad for parameter in model.parameters()]
        else:
            found = gradients(model, output)
    assert_same([output, *found], [plain, *wanted])


@pytest.mark.parametrize("name", NAMES)
def test_no_document_and_no_later_token_is_seen(name: str) -> None:
    model, ids, positions = tiny_family("llama"), token_ids(), restarting(LENGTHS)
    with training_attention(model, name), torch.no_grad():
        before = logits(model, ids, positions, longrope_pattern=PATTERN)
        for changed in (30, 25, 10):
            other = ids.clone()
            other[0, changed] = (other[0, changed] + 1) % 97
            differs = (logits(model, other, positions, longrope_pattern=PATTERN) != before).any(-1)
            end = 23 if changed < 23 else 28 if changed < 28 else 40
            assert not differs[1].any(), "another row"
            assert not differs[0, :changed].any(), "an earlier token"
            assert differs[0, changed]
            assert not differs[0, end:].any(), "another document"
            if name == "longrope_full":
                assert differs[0, changed:end].all()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_sliding_window_layers_keep_their_window_under_the_cheap_patterns(model_type: str) -> None:
    changes = {"layer_types": ["sliding_attention"] * 2} if model_type == "gemma3_text" else {}
    changes |= {"max_window_layers": 0} if model_type.startswith("qwen") else {}
    model, ids, positions = tiny_family(model_type, **changes), token_ids(), restarting(LENGTHS)
    outputs = []
    for name in ("longrope_full", "longrope_s2", "longrope_scca"):
        with training_attention(model, name), torch.no_grad():
            outputs.append(logits(model, ids, positions, longrope_pattern=PATTERN))
    windows = model_type not in ("llama", "granite")
    assert [torch.equal(outputs[0], output) for output in outputs] == [True, windows, windows]


def test_the_implementation_is_put_back_and_not_saved(llama: Any, tmp_path: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        with training_attention(llama, "longrope_s2"):
            assert llama.config._attn_implementation == "longrope_s2"
            llama.config.save_pretrained(tmp_path)
            raise KeyboardInterrupt
    assert llama.config._attn_implementation == "sdpa"
    assert "longrope" not in (tmp_path / "config.json").read_text()


# peft 0.21 still asks transformers for the name that it deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_models_are_served_through_their_wrapper() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_family("llama"), LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert use_attention(model, "longrope_full") == "sdpa"
    output = logits(model, token_ids(), longrope_pattern=PATTERN)
    assert use_attention(model, "sdpa") == "longrope_full"
    assert not torch.equal(output, logits(model, token_ids()))


def test_inference_mode_before_training_does_no_harm(llama: Any) -> None:
    pattern = Pattern(((8, 32), (8, 32)), 9)
    with training_attention(llama, "longrope_s2"):
        with torch.inference_mode():
            logits(llama, token_ids(), longrope_pattern=pattern)
        logits(llama, token_ids(), longrope_pattern=pattern).sum().backward()
    llama.zero_grad()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({}, "needs longrope_pattern"),
        ({"longrope_pattern": Pattern(((39,), (39,)), 10)}, "2 rows of 39 tokens; attention has 2 of 40"),
        ({"longrope_pattern": Pattern(((40,),), 10)}, "1 rows of 40 tokens; attention has 2 of 40"),
        ({"longrope_pattern": PATTERN, "attention_mask": torch.ones(2, 40)}, "takes no attention_mask"),
        ({"longrope_pattern": PATTERN, "attention_mask": torch.ones(2, 1, 40, 40)}, "no attention_mask"),
    ],
    ids=["none", "length", "rows", "padding mask", "full mask"],
)
def test_a_call_that_the_pattern_does_not_describe_is_refused(llama: Any, call: dict[str, Any], words: str) -> None:
    with training_attention(llama, "longrope_full"), pytest.raises(LongRopeError, match=words):
        logits(llama, token_ids(), **call)


def test_generating_with_a_cache_is_refused(llama: Any) -> None:
    with training_attention(llama, "longrope_full"), pytest.raises(LongRopeError, match="use_cache=False"):
        cache = llama(input_ids=token_ids(), use_cache=True, longrope_pattern=PATTERN).past_key_values
        llama(input_ids=token_ids(), past_key_values=cache, longrope_pattern=PATTERN)


REFUSED = {
    "gemma2": ({}, "gemma2 here: its attention scores have a soft cap"),
    "gemma3_text": ({"use_bidirectional_attention": True}, "gemma3 here: its attention is not causal"),
    "gpt_oss": ({"num_local_experts": 2, "num_experts_per_tok": 1}, "'gpt_oss' is not known here"),
    "gpt2": ({"n_embd": 32, "n_layer": 1, "n_head": 2}, "'gpt2' is not known here"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_attention_with_more_than_queries_keys_and_values_is_refused_by_name(model_type: str) -> None:
    changes, words = REFUSED[model_type]
    model = tiny_family(model_type, **changes)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=words):
        use_attention(model, "longrope_full")
    assert model.config._attn_implementation == before


def test_a_capped_variant_of_a_served_family_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="gemma3 here: its attention scores have a soft cap"):
        use_attention(tiny_family("gemma3_text", attn_logit_softcapping=50.0), "longrope_full")


def test_a_family_with_images_is_refused() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration
    from transformers.initialization import no_init_weights

    vision: Any = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
                   "image_size": 28, "patch_size": 14}  # fmt: skip
    config: Any = Gemma3Config(
        text_config=tiny_family("gemma3_text").config.to_dict(), vision_config=vision, mm_tokens_per_image=4
    )
    with no_init_weights():
        model = Gemma3ForConditionalGeneration(config)
    with pytest.raises(UnsupportedModelError, match="reads images; train its text model"):
        use_attention(model, "longrope_full")


def test_every_known_family_is_served_or_refused_here() -> None:
    known = {model_type for family in ALL_FAMILIES.values() for model_type in family.model_types}
    assert known == {*FAMILIES, "gemma2", "gemma3"}
