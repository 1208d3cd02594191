"""Running GGUF files in a real llama.cpp: probabilities against transformers, and every way to fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longrope_export.converters.gguf.patch import patch_gguf
from longrope_export.errors import InputFileError, RuntimeFailure
from longrope_export.runtimes import llamacpp
from longrope_export.scaling import RopeScaling

Writer = Callable[..., Path]
PROMPT = [int(token) for token in np.random.default_rng(0).integers(0, 320, 255)]


@pytest.fixture(scope="module")
def plain(write_random_gguf: Writer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("runtime") / "plain.gguf")


def damaged(source: Path, target: Path, old: bytes, new: bytes) -> Path:
    assert len(old) == len(new)
    assert old in source.read_bytes()
    target.write_bytes(source.read_bytes().replace(old, new))
    return target


def scaling(pairs: int = 16, **changes: Any) -> RopeScaling:
    values: dict[str, Any] = {
        "rope_theta": 10000.0, "rotary_dim": 2 * pairs, "original_max_position_embeddings": 256,
        "max_position_embeddings": 512, "long_factor": [2.0] * pairs,
    }  # fmt: skip
    return RopeScaling(**{**values, **changes})


def test_probabilities_equal_transformers(plain: Path, random_llama: Any) -> None:
    # Greedy tokens of a random byte model often split a character or end the text, where the server is silent.
    lengths = [1, 2, 3, 17, 64, 100, 128, 200, 254, 255]
    found = llamacpp.next_token_probabilities(plain, [PROMPT[:length] for length in lengths], context=256)
    with torch.inference_mode():
        logits = random_llama(torch.tensor([PROMPT])).logits[0, [length - 1 for length in lengths]]
    expected = torch.log_softmax(logits.double(), dim=-1).numpy()
    assert found.shape == (10, 320)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.exp(found.astype(np.float64)).sum(axis=1), 1.0, atol=1e-6)
    assert np.abs(found - expected)[expected > -40].max() < 1e-3


def test_a_reused_prefix_changes_nothing(plain: Path) -> None:
    prompts = [PROMPT[:length] for length in (5, 60, 61, 200)]
    fresh = llamacpp.next_token_probabilities(plain, prompts, context=256)
    reused = llamacpp.next_token_probabilities(plain, prompts, context=256, reuse_prefix=True)
    assert np.abs(fresh - reused).max() < 1e-4


def test_a_reused_prefix_is_not_computed_again(plain: Path) -> None:
    def evaluated(reuse: bool) -> list[str]:
        request = {"job": "probabilities", "prompts": [PROMPT[:100], PROMPT[:103]], "reuse_prefix": reuse}
        log = llamacpp.run(plain, request, context=256).log
        return [line.split("/")[1].split()[0] for line in log.splitlines() if "prompt eval time" in line]

    assert evaluated(False) == ["100", "103"]
    assert evaluated(True) == ["100", "3"]


def test_the_context_is_padded_and_asserted(plain: Path) -> None:
    assert llamacpp.padded_context(257) == 512
    log = llamacpp.logs(plain, context=257)
    assert "n_ctx_seq             = 512" in log
    llamacpp.check_settings(log, 512)
    with pytest.raises(RuntimeFailure, match="n_ctx_seq = 256 and allocated 512"):
        llamacpp.check_settings(log, 256)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("flash_attn            = disabled", "flash_attn            = enabled", "flash_attn"),
        ("n_seq_max             = 1", "n_seq_max             = 4", "n_seq_max"),
        ("K (f32)", "K (f16)", "K/V cache"),
        ("V (f32)", "V (f16)", "K/V cache"),
    ],
)
def test_other_settings_are_noticed(plain: Path, old: str, new: str, message: str) -> None:
    log = llamacpp.logs(plain)
    assert old in log
    with pytest.raises(RuntimeFailure, match=message):
        llamacpp.check_settings(log.replace(old, new), 256)


def test_threads(plain: Path) -> None:
    for threads in (1, 2):
        log = llamacpp.run(plain, {"job": "load"}, context=256, threads=threads).log
        assert f"n_threads = {threads} (n_threads_batch = {threads})" in log


def test_default_threads_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert llamacpp.default_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert llamacpp.default_threads() >= 1


def test_a_failed_assertion_leaves_us_alive(plain: Path, tmp_path: Path) -> None:
    patched = tmp_path / "patched.gguf"
    patch_gguf(plain, patched, scaling())
    source = tmp_path / "abort.gguf"
    # In our own record the word stays: the key's value is what llama.cpp reads.
    key = b"llama.rope.scaling.type\x08\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00\x00"
    damaged(patched, source, key + b"longrope", key + b"longrop_")
    with pytest.raises(RuntimeFailure, match=r"SIGABRT on .*abort.gguf: .*GGML_ASSERT\(hparams"):
        llamacpp.logs(source)


def test_a_load_error_gives_llamacpps_reason(plain: Path, tmp_path: Path) -> None:
    patched = tmp_path / "patched.gguf"
    patch_gguf(plain, patched, scaling())
    wrong = damaged(patched, tmp_path / "wrong.gguf", b"rope_factors_long", b"rope_factors_lang")
    with pytest.raises(RuntimeFailure, match="wrong number of tensors; expected 32, got 31"):
        llamacpp.logs(wrong)


def test_no_gguf_at_all(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"nothing of the kind" * 10)
    with pytest.raises(RuntimeFailure, match="invalid magic characters"):
        llamacpp.logs(tmp_path / "x.gguf")
    with pytest.raises(InputFileError, match="does not exist"):
        llamacpp.logs(tmp_path / "y.gguf")


def test_nan_is_refused(plain: Path, tmp_path: Path) -> None:
    patched = tmp_path / "patched.gguf"
    patch_gguf(plain, patched, scaling(short_factor=[7.25] * 16))
    seven, zero = np.float32(7.25).tobytes() * 16, np.float32(0.0).tobytes() * 16
    zeroed = damaged(patched, tmp_path / "zero.gguf", seven, zero)
    with pytest.raises(RuntimeFailure, match="NaN"):
        llamacpp.next_token_probabilities(zeroed, [PROMPT[:20]], context=256)


def test_a_timeout(plain: Path) -> None:
    with pytest.raises(RuntimeFailure, match=r"did not finish .* in 0.01 s"):
        llamacpp.logs(plain, timeout=0.01)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one prompt"),
        ([[1], []], "at least one token"),
        ([[1] * 256], "leaves no room in a context of 256"),
        ([[320]], "invalid tokens"),
    ],
)
def test_prompts_that_cannot_be(plain: Path, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(RuntimeFailure, match=message):
        llamacpp.next_token_probabilities(plain, prompts, context=256)


def test_tokenize(plain: Path) -> None:
    a, b = ord("a") - 33, ord("b") - 33
    assert llamacpp.tokenize(plain, ["ab", "b"]) == [[a, b], [b]]
    assert llamacpp.tokenize(plain, ["a<s45>"], parse_special=True) == [[a, 301]]
    assert len(llamacpp.tokenize(plain, ["a<s45>"])[0]) == 6
    assert llamacpp.tokenize(plain, ["a"], add_special=True) == [[300, a]]


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_generate_is_greedy(plain: Path, random_llama: Any) -> None:
    assert llamacpp.generate(plain, PROMPT[:30], 24, context=256) == greedy(random_llama, PROMPT[:30], 24)


def test_generate_stops_at_the_end_of_text(write_random_gguf: Writer, random_llama: Any, tmp_path: Path) -> None:
    expected = greedy(random_llama, PROMPT[:30], 12)
    eos = expected[5]
    first = expected.index(eos)
    ending = write_random_gguf(tmp_path / "ending.gguf", eos=eos)
    assert llamacpp.generate(ending, PROMPT[:30], 12, context=256)[:first] == expected[:first]
    assert len(llamacpp.generate(ending, PROMPT[:30], 12, context=256)) <= first + 1
    assert len(llamacpp.generate(ending, PROMPT[:30], 12, context=256, ignore_eos=True)) == 12


def test_without_xllamacpp_the_error_names_the_extra(plain: Path) -> None:
    code = (
        "import sys; sys.modules['xllamacpp'] = None\n"
        "from longrope_export.runtimes import llamacpp\n"
        "from longrope_export.errors import MissingDependencyError\n"
        "try: llamacpp.logs(sys.argv[1])\n"
        "except MissingDependencyError as error: print(error)"
    )
    shown = subprocess.run([sys.executable, "-c", code, str(plain)], capture_output=True, text=True, check=True)
    assert "pip install 'longrope-export[runtime]'" in shown.stdout


def test_importing_the_module_needs_neither_torch_nor_llamacpp() -> None:
    code = "import sys, longrope_export.runtimes.llamacpp as m; print({'torch', 'xllamacpp'} & set(sys.modules))"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert shown.stdout.strip() == "set()"
