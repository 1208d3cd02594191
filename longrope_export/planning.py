"""Will a longer window fit? Cache bytes from the model's shape, time and memory from a measured probe."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longrope_export.description import ModelDescription
from longrope_export.errors import ScalingError
from longrope_export.families import SLIDING
from longrope_export.formats.hf_description import weight_files

# Bytes of one block and the values in it (ggml: f16 is 2 bytes a value, q8_0 is 32 int8 and one f16 scale).
CACHE_TYPES: Mapping[str, tuple[int, int]] = {"f16": (2, 1), "q8_0": (34, 32)}
LOGITS_CHUNK = 512


@dataclass(frozen=True)
class Measurement:
    """One forward pass with losses over `length` tokens.

    `seconds` on the clock, `cpu_seconds` of processor time on all threads together (more than seconds ·
    threads is impossible, less means that other programs took their share), `peak_bytes` of the process
    (None: unknown).
    """

    length: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Attention:
    """Time of one layer's causal attention alone over `length` tokens; it grows with the length squared."""

    length: int
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Estimate:
    """Cost of one evaluation (a forward pass over L' tokens), fitted to `measurements` in `dtype`.

    `seconds` is what it takes beside the programs that run now, `quiet_seconds` on a machine without them.
    """

    seconds: float
    quiet_seconds: float
    peak_bytes: int | None
    measurements: tuple[Measurement, ...]
    attention: Attention | None
    dtype: str
    threads: int

    @property
    def longest(self) -> int:
        """The longest length that was measured."""
        return max(entry.length for entry in self.measurements)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `longrope plan` says; sizes in bytes, `available` is the memory free now (None: unknown)."""

    path: str
    architecture: str
    window: int
    target: int
    kv_cache: dict[str, int]
    weights: int
    available: int | None
    estimate: Estimate | None
    not_measured: tuple[str, ...]
    runtimes: dict[str, str]
    warnings: tuple[str, ...]

    @property
    def needed(self) -> dict[str, int]:
        """Cache type → weights plus cache at L', without the runtime's own buffers."""
        return {name: self.weights + size for name, size in self.kv_cache.items()}

    @property
    def fits(self) -> dict[str, bool | None]:
        """Whether each cache type, and one evaluation, fit the memory available (None: unknown)."""
        peak = None if self.estimate is None else self.estimate.peak_bytes
        needed: dict[str, int | None] = {**self.needed, "evaluation": peak}
        return {
            name: None if size is None or self.available is None else size <= self.available
            for name, size in needed.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**asdict(self), "needed": self.needed, "fits": self.fits}


def make_plan(
    description: ModelDescription,
    target: int,
    *,
    probe: Callable[[], tuple[Estimate | None, tuple[str, ...]]] | None = None,
) -> Plan:
    """The plan for `target` tokens; `probe` measures, None skips it. Raises `ScalingError` without growth."""
    if target <= description.original_window:
        raise ScalingError(
            f"{description.path} has a window of {description.original_window} tokens; {target} is no extension"
        )
    estimate, missing = (None, ("time and memory of an evaluation: --no-probe",)) if probe is None else probe()
    return Plan(
        path=description.path,
        architecture=description.architecture,
        window=description.original_window,
        target=target,
        kv_cache={name: kv_cache_bytes(description, target, name) for name in CACHE_TYPES},
        weights=weight_bytes(description),
        available=available_memory(),
        estimate=estimate,
        not_measured=missing,
        runtimes=description.honours,
        warnings=description.warnings,
    )


def kv_cache_bytes(description: ModelDescription, tokens: int, cache_type: str = "f16") -> int:
    """Bytes of K and V of all layers for `tokens` positions; sliding-window layers keep their window only.

    A row of K or V of one layer and position is kv_heads · head_dim values in whole blocks of `cache_type`
    (a key of `CACHE_TYPES`). Runtimes round the number of positions up (llama.cpp to 256).
    """
    block_bytes, block_values = CACHE_TYPES[cache_type]
    row = -(-description.kv_heads * description.head_dim // block_values) * block_bytes
    return 2 * row * sum(_positions(description, tokens))


def _positions(description: ModelDescription, tokens: int) -> list[int]:
    window = description.sliding_window or tokens
    kinds = description.layer_types or ("full_attention",) * description.layers
    return [min(tokens, window) if kind == SLIDING else tokens for kind in kinds]


def weight_bytes(description: ModelDescription) -> int:
    """Bytes of the weights as stored: the GGUF file, or the folder's safetensors files."""
    path = Path(description.path)
    if path.is_dir():
        return sum(file.stat().st_size for file in weight_files(path))
    return path.stat().st_size


def available_memory() -> int | None:
    """Bytes of memory that programs may still take now (Linux's MemAvailable); None where it is not known."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = (line.split() for line in lines if line.startswith("MemAvailable:"))
    return next((int(parts[1]) * 1024 for parts in found), None)


def estimate_at(
    target: int,
    measurements: Sequence[Measurement],
    *,
    dtype: str,
    threads: int,
    layers: int = 0,
    attention: Attention | None = None,
) -> Estimate:
    """Extrapolate seconds as a + b·T + c·T² and peak bytes as a + b·T to `target` tokens (a, b, c ≥ 0).

    c comes from `attention` times `layers` where that was measured: at short lengths it hides in the noise, and at
    long ones it is nearly all. The fit uses the four longest lengths: below them a forward costs reading the weights.
    """
    ordered = sorted(measurements, key=lambda entry: entry.length)
    lengths = sorted({entry.length for entry in ordered})[-4:]
    wall = [(size, min(entry.seconds for entry in ordered if entry.length == size)) for size in lengths]
    busy = [(size, min(entry.cpu_seconds for entry in ordered if entry.length == size)) for size in lengths]
    square, busy_square = None, None
    if attention is not None:
        square = layers * attention.seconds / attention.length**2
        busy_square = layers * attention.cpu_seconds / attention.length**2
    # What was measured needs no fit.
    seconds = dict(wall).get(target) or _with_square(target, wall, square)
    processor = dict(busy).get(target) or _with_square(target, busy, busy_square)
    quiet = min(processor / max(threads, 1), seconds)
    return Estimate(seconds, quiet, _peak_at(target, ordered), tuple(ordered), attention, dtype, threads)


def _with_square(target: int, points: Sequence[tuple[int, float]], square: float | None) -> float:
    if square is None:
        return predict(target, points, degree=2)
    # Attention on its own may be slower than inside the model; what is left for the rest stays positive.
    rest = [(length, max(value - square * length**2, 0.1 * value)) for length, value in points]
    return predict(target, rest, degree=1) + square * target**2


def _peak_at(target: int, ordered: Sequence[Measurement]) -> int | None:
    sized = [(entry.length, float(entry.peak_bytes)) for entry in ordered if entry.peak_bytes is not None]
    # Up to one chunk of lm_head rows the logits grow with the length, beyond it they do not.
    beyond = [point for point in sized if point[0] >= LOGITS_CHUNK]
    points = beyond if len({length for length, _ in beyond}) >= 2 else sized
    if len({length for length, _ in points}) < 2 and target not in dict(points):
        return None
    return round(predict(target, points, degree=1))


def predict(target: int, points: Sequence[tuple[int, float]], *, degree: int) -> float:
    """Value at `target` of the polynomial with non-negative coefficients that fits `points` best.

    Least squares of the *relative* errors, over every subset of the powers 0…degree (a coefficient that would be
    negative is left out): short, cheap lengths then count as much as long ones. A single point is taken for
    proportional to the length.
    """
    if len(points) == 1:
        return points[0][1] * target / points[0][0]
    lengths = np.array([length for length, _ in points], dtype=np.float64)
    values = np.array([max(value, 1e-9) for _, value in points], dtype=np.float64)
    best, result = np.inf, 0.0
    for count in range(1, min(degree + 1, len(points)) + 1):
        for powers in itertools.combinations(range(degree + 1), count):
            basis = (lengths[:, None] / lengths[-1]) ** np.array(powers)
            weights, *_ = np.linalg.lstsq(basis / values[:, None], np.ones_like(values), rcond=None)
            error = float(np.square(basis @ weights / values - 1.0).sum())
            if (weights >= 0.0).all() and error < best - 1e-12:
                best, result = error, float((target / lengths[-1]) ** np.array(powers) @ weights)
    return result
