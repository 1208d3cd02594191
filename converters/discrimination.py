"""Which hypothesis about the applied RoPE scaling explains a runtime's probabilities: distances and verdicts.

The distance ignores a constant per prefix (log-probabilities fix logits up to one), which carries most of the noise
of quantised runtimes, and unlikely tokens, whose probabilities runtimes round.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from longrope_export.tolerances import DISCRIMINATION, Tolerance

Array = npt.NDArray[np.float32]
Verdict = Literal["pass", "fail", "cannot tell"]

# Tokens per prefix that are compared, and how far below the likeliest (float32 probabilities vanish at 87 nats).
TOP_TOKENS = 512
REACH = 40.0


@dataclass(frozen=True)
class Hypothesis:
    """One other explanation: the runtime's distance to it, its distance to the truth, both in nats.

    `share` is where the runtime stands on the line between the two references: 0 with the factors, 1 with the other
    hypothesis. Noise averages out of it.
    """

    name: str
    distance: float
    separation: float
    share: float


@dataclass(frozen=True)
class Judgement:
    """Verdict on one regime of one file, with the numbers behind it; `top1` is the share of prefixes with the same token
    first.
    """

    verdict: Verdict
    reason: str
    distance: float
    largest: float
    bound: float
    hypotheses: tuple[Hypothesis, ...]
    top1: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**asdict(self), "hypotheses": [asdict(entry) for entry in self.hypotheses]}


def judge(runtime: Array, truth: Array, others: dict[str, Array], tolerance: Tolerance) -> Judgement:
    """Compare log-probabilities [prefixes, vocabulary] of a runtime with the reference's, under every hypothesis.

    Passes only if the distance to the truth is at most the bound and at most a fifth of the distance to each other
    hypothesis, and with unquantised weights every prefix has the same token first. For quantised weights that ratio may
    also be taken along the line between the two references.
    """
    weights = compared(truth)
    near = distance(runtime, truth, weights)
    largest = float(np.abs(_centred(runtime, truth, weights)).max())
    hypotheses = tuple(
        Hypothesis(
            name,
            distance(runtime, other, weights),
            distance(other, truth, weights),
            share(runtime, truth, other, weights),
        )
        for name, other in others.items()
    )
    same = top1(runtime, truth, tolerance.bound)
    verdict, reason = _decide(near, same, hypotheses, tolerance)
    return Judgement(verdict, reason, near, largest, tolerance.bound, hypotheses, same)


def compared(truth: Array) -> npt.NDArray[np.bool_]:
    """Mask [prefixes, vocabulary] of the tokens that are likely under the truth."""
    count = min(TOP_TOKENS, truth.shape[1])
    floor = np.partition(truth, -count, axis=1)[:, -count, None]
    peak = truth.max(axis=1, keepdims=True)
    return np.asarray((truth >= floor) & (truth >= peak - REACH))


def top1(runtime: Array, truth: Array, tie: float) -> float:
    """Share of prefixes whose likeliest token is the truth's; in the truth it may be `tie` nats behind another."""
    chosen = np.take_along_axis(truth, runtime.argmax(axis=1)[:, None], axis=1)[:, 0]
    return float(np.mean(chosen >= truth.max(axis=1) - tie))


def distance(left: Array, right: Array, mask: npt.NDArray[np.bool_]) -> float:
    """Root mean square in nats of the centred differences over all prefixes and masked tokens; NaN becomes infinite."""
    difference = _centred(left, right, mask)
    value = float(np.sqrt(np.mean(difference[mask] ** 2)))
    return value if np.isfinite(value) else float("inf")


def share(runtime: Array, truth: Array, other: Array, mask: npt.NDArray[np.bool_]) -> float:
    """Projection of the runtime's displacement from the truth on the way to the other reference, in its lengths."""
    way = _centred(other, truth, mask)[mask]
    length = float(way @ way)
    return float(_centred(runtime, truth, mask)[mask] @ way) / length if length else 0.0


def _centred(left: Array, right: Array, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    difference = np.where(mask, left.astype(np.float64) - right.astype(np.float64), 0.0)
    mean = difference.sum(axis=1, keepdims=True) / mask.sum(axis=1, keepdims=True)
    return np.asarray(np.where(mask, difference - mean, 0.0))


def _decide(near: float, same: float, hypotheses: tuple[Hypothesis, ...], tolerance: Tolerance) -> tuple[Verdict, str]:
    if not near <= tolerance.bound:
        return "fail", f"{near:.2g} nats from the reference with the factors; at most {tolerance.bound:g} are allowed"
    if tolerance.exact and same < 1.0:
        return "fail", f"another token is the likeliest at {1 - same:.0%} of the prefixes"
    if not hypotheses:
        return "cannot tell", "the factors change nothing here: there is no other hypothesis to compare with"
    for other in hypotheses:
        if min(other.separation, other.distance) <= tolerance.bound:
            return "cannot tell", (
                f"{other.name} would differ by {other.separation:.2g} nats only, within the noise of "
                f"{tolerance.bound:g}; longer prefixes tell more"
            )
        if not _nearer(near, other, tolerance):
            return (
                "fail",
                f"{near:.2g} nats from the reference with the factors, {other.distance:.2g} from {other.name}",
            )
    return "pass", "nearest to the reference with the factors"


def _nearer(near: float, other: Hypothesis, tolerance: Tolerance) -> bool:
    if near * DISCRIMINATION <= other.distance:
        return True
    # The noise of quantised activations adds to both distances; along the line between the references it averages out.
    return not tolerance.exact and abs(other.share) * DISCRIMINATION <= abs(1.0 - other.share)
