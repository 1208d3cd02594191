"""How far two runtimes may be apart: the one place for such numbers, each with its measured value and its command.

Every distance is in nats (see `converters.discrimination.distance`): the centred root mean square of log-probability
differences. The measured values are printed by `python benchmarks/runtime_noise.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# A runtime has to be this many times nearer to the reference with the factors than to any other hypothesis.
DISCRIMINATION = 5.0


@dataclass(frozen=True)
class Tolerance:
    """`bound` in nats for a file whose products are computed this way; `exact` when its noise is only rounding."""

    name: str
    bound: float
    exact: bool = False


FLOAT32 = Tolerance("F32", 1e-3, exact=True)
# llama.cpp rounds the activations to the format below before it multiplies them with weights of these types, which
# the reference does not; that, not the weights, is the distance that remains.
FLOAT16 = Tolerance("F16 activations", 1e-2)
BFLOAT16 = Tolerance("BF16 activations", 5e-2)
EIGHT_BITS = Tolerance("8-bit activations", 0.08)
EIGHT_BITS_K = Tolerance("8-bit activations in blocks of 256", 0.08)

_BY_TYPE = {
    "F32": FLOAT32, "F64": FLOAT32, "I8": FLOAT32, "I16": FLOAT32, "I32": FLOAT32, "I64": FLOAT32,
    "F16": FLOAT16, "BF16": BFLOAT16,
    "Q4_0": EIGHT_BITS, "Q4_1": EIGHT_BITS, "Q5_0": EIGHT_BITS, "Q5_1": EIGHT_BITS, "Q8_0": EIGHT_BITS,
    "IQ4_NL": EIGHT_BITS, "MXFP4": EIGHT_BITS,
}  # fmt: skip


def for_ggml_type(name: str) -> Tolerance:
    """The tolerance for matrices of one ggml type (`Q4_K`, …): K- and I-quants share one."""
    return _BY_TYPE.get(name, EIGHT_BITS_K)


def for_ggml_types(names: Iterable[str]) -> Tolerance:
    """The widest tolerance among the types of a file's matrices."""
    return max((for_ggml_type(name) for name in names), key=lambda entry: entry.bound, default=FLOAT32)
