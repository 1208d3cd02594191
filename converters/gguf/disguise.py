"""A GGUF file under another architecture that computes the same and has a place for factors; no weight changes.

llama.cpp's `qwen2` has no factor tensors, its `llama` has, and takes biases too; the rows of q and k stand in another
order there. A row of a quantised tensor is a run of whole blocks, so rows move as the bytes they are.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from longrope_export.converters.gguf.rewrite import GgufChanges
from longrope_export.converters.lossy import gguf_notes
from longrope_export.errors import InputFileError, UnsupportedModelError
from longrope_export.formats.gguf_header import GgufHeader, TensorInfo
from longrope_export.gguf_architectures import GGUF_ARCHITECTURES
from longrope_export.scaling import RopeScaling

# architecture → those it can be rewritten as; the first is taken unless another is named
DISGUISES = MappingProxyType({"qwen2": ("llama", "granite"), "llama": ("granite",)})
_ARCHITECTURE = "general.architecture"
# granite's own multipliers, where a llama has none (attention.scale comes with the factors)
_NEUTRAL = {"embedding_scale": 1.0, "residual_scale": 1.0, "logit_scale": 1.0}


def disguised(header: GgufHeader, architecture: str) -> tuple[GgufHeader, GgufChanges]:
    """The header as that of an `architecture`, with keys renamed, and the changes that make the file one.

    Raises `UnsupportedModelError` where `architecture` computes something else, `InputFileError` for a damaged file.
    """
    own = str(header.get(_ARCHITECTURE))
    check_disguise(str(header.path), own, architecture)
    entries: dict[str, str | int | float] = {_ARCHITECTURE: architecture}
    if architecture == "granite":
        entries |= {f"{architecture}.{key}": value for key, value in _NEUTRAL.items()}
    rows: dict[str, tuple[int, ...]] = {}
    if GGUF_ARCHITECTURES[own].pair_layout != GGUF_ARCHITECTURES[architecture].pair_layout:
        rows = _norm_rows(header, own)
    return _renamed(header, own, architecture), GgufChanges(entries=entries, rows=rows)


def check_disguise(name: str, own: str, architecture: str | None) -> None:
    """Raise `UnsupportedModelError` where a file of the `own` architecture cannot become one of `architecture`."""
    if architecture not in DISGUISES.get(own, ()):
        known = "; ".join(f"{one} as {' or '.join(others)}" for one, others in DISGUISES.items())
        raise UnsupportedModelError(
            f"{name}: a GGUF of architecture {own} cannot be written as {architecture}; what can be: {known} (a folder "
            "has more choice, without --with)"
        )


# what a model costs, or gains, under another architecture than its own
_COSTS = {
    "granite": ["the attention factor is in granite's softmax scale: a context shift stays exact"],
    "step35": [
        "llama.cpp cannot shift the context of a step35, and logs a wrong model size",
        "a tied embedding stands in the file twice, the second time as the output",
    ],
}
# the first builds that load factors, where they are others than llama's
_SINCE = {
    "phi3": "2024-05 (pull request 7225); with biases of q, k and v since 2026-04 (21245)",
    "step35": "2026-02 (pull request 19283)",
}
_STATIC_SINCE = "2024-07 (pull request 8676)"


def disguise_notes(own: str, architecture: str) -> list[str]:
    """What to know of a model of `own` architecture that stands in a file as another."""
    if own == architecture:
        return []
    name = f"the file is a {architecture} for programs, not a {own}: LoRA adapters made for {own} do not fit it"
    return [name, *_COSTS.get(architecture, [])]


def file_notes(scaling: RopeScaling, own: str, architecture: str, *, static: bool) -> list[str]:
    """What to know of a file of `architecture` with `scaling`, whose model is of the `own` one."""
    folded = architecture == "granite" != own
    since = _STATIC_SINCE if static else _SINCE.get(architecture, "")
    return [*disguise_notes(own, architecture), *gguf_notes(scaling, static=static, folded=folded, since=since)]


def combined(disguise: GgufChanges, scaling: GgufChanges) -> GgufChanges:
    """Both in one rewrite."""
    return replace(scaling, entries={**disguise.entries, **scaling.entries}, rows=disguise.rows)


def _renamed(header: GgufHeader, own: str, architecture: str) -> GgufHeader:
    metadata = {}
    for key, entry in header.metadata.items():
        name = f"{architecture}.{key[len(own) + 1 :]}" if key.startswith(f"{own}.") else key
        if name in metadata:
            raise InputFileError(f"{header.path} has keys of {own} and of {architecture}; download it again")
        value = architecture if key == _ARCHITECTURE else entry.value
        metadata[name] = replace(entry, key=name, value=value)
    return replace(header, metadata=MappingProxyType(metadata))


def _norm_rows(header: GgufHeader, own: str) -> dict[str, tuple[int, ...]]:
    """Tensor → its rows from the order of pairs (i, i + d/2) into that of pairs (2i, 2i + 1), of q and k."""
    heads = header.get(f"{own}.attention.head_count")
    numbers = {"attn_q": heads, "attn_k": header.get(f"{own}.attention.head_count_kv", heads)}
    found = {}
    for info in header.all_tensors:
        kind = info.name.split(".")[-2] if info.name.startswith("blk.") else ""
        if kind == "attn_qkv":
            raise UnsupportedModelError(f"{header.path} holds q, k and v in one tensor; convert it without --fuse-qkv")
        if kind in numbers:
            found[info.name] = _norm_order(header, info, numbers[kind])
    return found


def _norm_order(header: GgufHeader, info: TensorInfo, heads: object) -> tuple[int, ...]:
    rows = info.shape[-1] if info.shape else 0
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or not rows or rows % (2 * heads):
        raise InputFileError(f"{header.path}: the tensor {info.name} has {rows} rows, which are no {heads} heads")
    size = rows // heads
    order = [pair + half * (size // 2) for pair in range(size // 2) for half in range(2)]
    return tuple(start + row for start in range(0, rows, size) for row in order)
