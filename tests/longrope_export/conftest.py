"""Fixtures of the core's tests: models under `switch="sequence"` beside transformers' own, and small files to describe."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from describe_inputs import File, Folder
    from switch_checks import Pair


@pytest.fixture(scope="session", params=["llama", "qwen2", "qwen3", "phi3"])
def pair(request: pytest.FixtureRequest) -> Pair:
    """Ours and stock longrope, of each family."""
    from switch_checks import make_pair

    return make_pair(request.param)


@pytest.fixture(scope="session")
def llama_pair() -> Pair:
    """The same for Llama alone."""
    from switch_checks import make_pair

    return make_pair("llama")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """`write(config=None, **changes)`: a model folder with nothing but a config.json."""
    from describe_inputs import write_folder

    return lambda config=None, **changes: write_folder(tmp_path, config, **changes)


@pytest.fixture
def file(tmp_path: Path) -> File:
    """`write(keys, tensors, architecture, **more)`: a GGUF file with one weight."""
    from describe_inputs import write_gguf

    def write(*arguments: Any, **more: Any) -> Path:
        return write_gguf(tmp_path / "model.gguf", *arguments, **more)

    return write


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with its tokenizer, as a user's folder."""
    folder = tmp_path_factory.mktemp("eval") / "model"
    shutil.copytree(tiny_llama, folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One text of 1,600 characters."""
    path = tmp_path_factory.mktemp("data") / "book.txt"
    path.write_text("It was the best of times, it was the worst of times; " * 30)
    return path


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long and short factors for the tiny Llama, 32 to 128 tokens."""
    import numpy as np

    from longrope_export.scaling import RopeScaling

    scaling = RopeScaling(
        rope_theta=10000.0, rotary_dim=32, original_max_position_embeddings=32, max_position_embeddings=128,
        long_factor=tuple(np.linspace(1, 4, 16)), short_factor=tuple(np.linspace(1, 2, 16)),
        long_attention_factor=1.1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("record") / "searched.json"
    path.write_text(scaling.to_json())
    return path
