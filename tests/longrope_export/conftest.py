"""Fixtures of the core's tests: models under `switch="sequence"` beside transformers' own, and small files to describe."""

from __future__ import annotations

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
