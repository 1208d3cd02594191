"""Whether the rows of q and k stand in the pair order that the architecture rotates, told from trained weights.

Two rows that are rotated together belong to one frequency, and training gives them like lengths. Neighbouring
frequencies get like lengths too, distant ones do not. So in transformers' order (pairs i, i + d/2) both the
neighbours and the half-way partners are alike; in llama.cpp's NORM order (pairs 2i, 2i + 1) the neighbours are,
and the half-way partners are as different as any two rows. Weights without this structure give no verdict.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from longrope_export.converters.doctor.findings import Finding
from longrope_export.converters.doctor.gguf_facts import GgufFacts
from longrope_export.converters.gguf.rewrite import GgufChanges
from longrope_export.errors import UnsupportedModelError
from longrope_export.formats.gguf_tensors import read_tensor

_LAYERS = 6
# Mean distance of log row lengths, relative to any two rows of a head. SmolLM2-135M: neighbours 0.24–0.5; half-way
# partners 0.24–0.5 in transformers' order, 0.9–1.2 in NORM order. Random weights: 1.0 for both.
_ALIKE, _UNLIKE = 0.75, 0.85


def row_order(facts: GgufFacts) -> Iterator[Finding]:
    """G21: rows of q and k in the order of the other layout."""
    row, size = facts.row, facts.head_dim
    if row is None or row.pair_layout not in ("NORM", "NEOX") or size is None or size < 4 or facts.pairs != size // 2:
        return
    found = stored_order(facts, size)
    if found is not None and found != row.pair_layout:
        detail = f"the rows stand in {found} order, {row.name} rotates {row.pair_layout} pairs"
        changes = GgufChanges(rows=_reordered(facts, size, row.pair_layout))
        yield facts.finding("G21", detail, "put the rows in order; quantised rows move as the bytes they are", changes)


def stored_order(facts: GgufFacts, size: int) -> str | None:
    """NORM or NEOX, as the row lengths of some layers say; None when they do not say it clearly."""
    layers = facts.count("block_count") or 0
    sampled = sorted({round(index) for index in np.linspace(0, layers - 1, min(_LAYERS, layers))} if layers else set())
    names = [f"blk.{layer}.attn_{kind}.weight" for layer in sampled for kind in "qk"]
    ratios = [ratio for name in names if (ratio := _likeness(facts, name, size)) is not None]
    if not ratios:
        return None
    neighbours, partners = np.mean(ratios, axis=0)
    if neighbours > _ALIKE or _ALIKE < partners < _UNLIKE:
        return None
    return "NEOX" if partners <= _ALIKE else "NORM"


def _likeness(facts: GgufFacts, name: str, size: int) -> tuple[float, float] | None:
    """Distance of neighbours and of half-way partners, relative to any two rows of a head."""
    info = facts.header.tensor(name)
    if info is None or len(info.shape) != 2 or not info.shape[1] or info.shape[1] % size or not info.shape[0]:
        return None
    try:
        weight = read_tensor(facts.header, name)
    except UnsupportedModelError:
        return None
    lengths = np.sqrt(np.einsum("ij,ij->i", weight, weight, dtype=np.float64))
    if not np.isfinite(lengths).all() or not (lengths > 0).all():
        return None
    heads = np.log(lengths).reshape(-1, size)
    usual = _pair_distance(heads)
    if usual <= 0:
        return None
    half = size // 2
    neighbours, partners = _distance(heads[:, ::2], heads[:, 1::2]), _distance(heads[:, :half], heads[:, half:])
    return neighbours / usual, partners / usual


def _pair_distance(heads: npt.NDArray[np.float64]) -> float:
    """Mean distance of two different values of one row, by their ranks."""
    size = int(heads.shape[1])
    weights = 2 * np.arange(size) - size + 1
    total = float((np.sort(heads) * weights).sum(axis=1).mean())
    return total * 2.0 / (size * (size - 1))


def _distance(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> float:
    return float(np.abs(left - right).mean())


def _reordered(facts: GgufFacts, size: int, layout: str) -> dict[str, tuple[int, ...]]:
    """Tensor → its rows in the order that `layout` wants, of every q and k weight and bias."""
    head = np.arange(size).reshape((2, size // 2) if layout == "NORM" else (size // 2, 2)).T.reshape(-1)
    kinds = tuple(f"attn_{kind}.{what}" for kind in "qk" for what in ("weight", "bias"))
    orders = {}
    for info in facts.header.tensors:
        rows = info.shape[-1] if info.shape else 0
        if info.name.startswith("blk.") and info.name.endswith(kinds) and rows and rows % size == 0:
            starts = np.arange(0, rows, size)
            orders[info.name] = tuple(int(row) for row in (starts[:, None] + head).reshape(-1))
    return orders
