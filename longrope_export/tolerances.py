"""How far two runtimes may be apart: the one place for such numbers, each with its measured value and its command.

Every distance is in nats (see `converters.discrimination.distance`): the centred root mean square of log-probability
differences. Measured with `python benchmarks/runtime_noise.py --model GGUF` (all types) and `longrope verify`, on a loud
random 2-layer Llama ("random") and on the first two blocks of SmolLM2-135M-Instruct Q4_1 ("SmolLM2"); llama.cpp of
xllamacpp 2026.10.11549 on the CPU. Both regimes, the larger value.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

# A runtime has to be this many times nearer to the reference with the factors than to any other hypothesis.
DISCRIMINATION = 5.0

# Mean losses in nats of one document under one set may be this far apart, because rows of different passes are rounded
# differently. Measured: 9.9e-7 (`python benchmarks/batched_candidates.py --lengths 7 --threads 2`, 146 rows).
SAME_LOSS = 1e-5


@dataclass(frozen=True)
class Tolerance:
    """`bound` in nats for a file whose products are computed this way; `exact` when its noise is only rounding."""

    name: str
    bound: float
    exact: bool = False


# Measured: random 1.0e-5.
FLOAT32 = Tolerance("F32", 1e-3, exact=True)
# llama.cpp rounds the activations to the format below before it multiplies them with weights of these types, which
# the reference does not; that, not the weights, is the distance that remains.
# Measured: random 2.9e-3.
FLOAT16 = Tolerance("F16 activations", 1e-2)
# Measured: random 2.2e-2.
BFLOAT16 = Tolerance("BF16 activations", 5e-2)
# Measured: random Q8_0 0.042, Q4_0 0.062, Q4_1 0.059, Q5_0 0.074; SmolLM2 Q4_1 0.053–0.064 under eight scalings.
EIGHT_BITS = Tolerance("8-bit activations", 0.1)
# The same noise from every block adds up. Measured: SmolLM2 Q4_1 whole, 30 blocks, 0.120 short and 0.114 long (20 prefixes
# up to 10,240 tokens, `longrope verify`). 6 blocks (the demo model) stay within the bounds above.
DEEP_BLOCKS, DEEP_FACTOR = 8, 1.5
# Not measured: llama.cpp rounds these activations to 8 bits too, in blocks of 256 instead of 32.
EIGHT_BITS_K = Tolerance("8-bit activations in blocks of 256", 0.1)

_BY_TYPE = {
    "F32": FLOAT32, "F64": FLOAT32, "I8": FLOAT32, "I16": FLOAT32, "I32": FLOAT32, "I64": FLOAT32,
    "F16": FLOAT16, "BF16": BFLOAT16,
    "Q4_0": EIGHT_BITS, "Q4_1": EIGHT_BITS, "Q5_0": EIGHT_BITS, "Q5_1": EIGHT_BITS, "Q8_0": EIGHT_BITS,
    "IQ4_NL": EIGHT_BITS, "MXFP4": EIGHT_BITS,
}  # fmt: skip


def for_ggml_type(name: str) -> Tolerance:
    """The tolerance for matrices of one ggml type (`Q4_K`, …): K- and I-quants share one."""
    return _BY_TYPE.get(name, EIGHT_BITS_K)


def for_ggml_types(names: Iterable[str], blocks: int) -> Tolerance:
    """The widest tolerance among the types of a file's matrices, for a model of that many blocks."""
    widest = max((for_ggml_type(name) for name in names), key=lambda entry: entry.bound, default=FLOAT32)
    if blocks <= DEEP_BLOCKS or widest.exact:
        return widest
    return replace(widest, name=f"{widest.name}, {blocks} blocks", bound=widest.bound * DEEP_FACTOR)
