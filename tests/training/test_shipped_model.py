"""The shipped demo model is what its card says: shape, size, perplexity and retrieval."""

from __future__ import annotations

import platform
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from longrope_export.demo import demo_model_path
from longrope_export.evaluation.documents import encode, load_tokenizer
from longrope_export.evaluation.passkey import first_number, forced_correct, generated_text, passkey_prompts
from longrope_export.evaluation.stdlib_corpus import Split, documents, file_hashes
from longrope_export.training.demo_card import PASSKEY_SEED, card_numbers, measure, perplexity_tolerance


@pytest.fixture(scope="module")
def numbers() -> dict[str, Any]:
    return card_numbers(demo_model_path())


def test_shape_and_size_are_as_promised() -> None:
    path = demo_model_path() / "model.safetensors"
    assert path.stat().st_size <= 8_000_000
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert sum(tensor.numel() for tensor in tensors.values()) <= 3_900_000
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.shape[-1] % 256 == 0 for tensor in tensors.values()), "K-quants need rows of 256"
    assert "lm_head.weight" not in tensors


def test_config_is_read_alike_by_old_and_new_transformers() -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(demo_model_path())
    assert (config.model_type, config.max_position_embeddings, config.hidden_size) == ("llama", 256, 256)
    assert (config.bos_token_id, config.eos_token_id, config.tie_word_embeddings) == (0, 0, True)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert '"rope_theta": 10000.0' in (demo_model_path() / "config.json").read_text()


def test_the_card_holds_what_the_record_holds(numbers: dict[str, Any]) -> None:
    text = (demo_model_path() / "README.md").read_text(encoding="utf-8")
    assert f"| {numbers['report_perplexity']:.3f} |" in text
    assert f"| {numbers['passkey_forced']:.1%} |" in text
    assert f"| {numbers['passkey_generated']:.1%} |" in text
    assert numbers["python"] in text
    assert numbers["passkey_trials"] >= 200


def test_perplexity_is_that_of_the_card(numbers: dict[str, Any]) -> None:
    tolerance = perplexity_tolerance(numbers)
    if platform.python_version() == numbers["python"]:
        assert tolerance == 0.005, "this Python's library was changed by somebody"
    measured = measure(demo_model_path(), trials=1, generated=False)
    assert measured.perplexity == pytest.approx(numbers["report_perplexity"], rel=tolerance)


@pytest.mark.slow
def test_another_library_is_near_the_card_but_not_equal(numbers: dict[str, Any], tmp_path: Path) -> None:
    """A copy of the report split without its blank lines stands for another Python's; docs/demo-model.md has real ones."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in file_hashes("report"):
        lines = (library / name).read_bytes().splitlines(keepends=True)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"".join(line for line in lines if line.strip()))
    assert perplexity_tolerance(numbers, tmp_path) == 0.15
    measured = measure(demo_model_path(), trials=1, generated=False, library=tmp_path)
    assert 0.005 < abs(measured.perplexity / numbers["report_perplexity"] - 1) <= 0.15


def test_it_retrieves_passkeys_inside_its_window(numbers: dict[str, Any]) -> None:
    """All 200 prompts of the card teacher-forced, every eighth one generated: at least 95 % right at every depth."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()
    tokenizer = load_tokenizer(demo_model_path())
    prompts = passkey_prompts(tokenizer, 256, numbers["passkey_trials"], PASSKEY_SEED)
    right = [forced_correct(model, tokenizer, prompt) for prompt in prompts]
    assert np.mean(right) >= 0.95
    assert np.mean(right) == pytest.approx(numbers["passkey_forced"], abs=0.011)
    assert min(np.mean(part) for part in np.array_split(np.array(right), 5)) >= 0.85
    generated = [first_number(generated_text(model, tokenizer, prompt)) == str(prompt.key) for prompt in prompts[::8]]
    assert sum(generated) >= len(generated) - 2


@pytest.mark.parametrize(("split", "count"), [("search", 8), ("validation", 4), ("report", 16)])
def test_held_out_splits_reach_eight_windows(split: Split, count: int) -> None:
    tokenizer = load_tokenizer(demo_model_path())
    lengths = sorted((1 + len(encode(tokenizer, d.text)) for d in documents(split)), reverse=True)
    assert lengths[count - 1] >= 8 * 256
    assert lengths[1] >= 16_384


def test_the_path_is_inside_the_package() -> None:
    import longrope_export

    assert demo_model_path().parent == Path(longrope_export.__file__).parent
