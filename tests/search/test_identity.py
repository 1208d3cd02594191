"""What a search is: another library, processor or number type makes another one of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from longrope_export.search.config import SearchConfig
from longrope_export.search.identity import search_header, torch_engine
from longrope_export.search.space import RopeNumbers

NUMBERS = RopeNumbers(rope_theta=10000.0, rotary_dim=8, window=64, target=128)


def _header(strategy: str = "cmaes", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    config = SearchConfig(documents=1, strategy=strategy)
    return search_header(torch_engine(nn.Linear(2, 2, dtype=dtype)), NUMBERS, config, {}, None, "a model")


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("longrope-export", "longrope_export.search.identity.__version__"),
        ("torch", "torch.__version__"),
        ("transformers", "transformers.__version__"),
        ("cmaes", "cmaes.__version__"),
    ],
)
def test_another_version_is_another_search(name: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _header()
    monkeypatch.setattr(version, "0.0.1")
    assert _header() == {**before, "versions": {**before["versions"], name: "0.0.1"}}


def test_cmaes_counts_only_where_it_searches() -> None:
    assert "cmaes" not in _header("gradient")["versions"]


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("threads", lambda patch: patch.setattr(torch, "get_num_threads", lambda: 77)),
        ("device", lambda patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER")),
    ],
)
def test_what_rounds_otherwise_is_another_search(
    field: str, change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _header()
    change(monkeypatch)
    assert [name for name, value in _header().items() if value != before[name]] == [field]


def test_the_dtype_is_that_of_the_weights() -> None:
    assert (_header()["dtype"], _header(dtype=torch.bfloat16)["dtype"]) == ("float32", "bfloat16")
