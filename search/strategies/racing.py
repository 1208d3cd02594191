"""One generation of candidates on the same documents in the same order; clear losers are dropped on the way.

Source: blocked racing (Moore and Lee, Efficient Algorithms for Minimizing Cross Validation Error, ICML 1994): paired
differences on the documents seen so far, and an interval around their mean. Here one variance is pooled over the
candidates, because two documents give none a variance of its own, and the rival is the last one that would be kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from longrope_export.search.protocol import Outcome, Trial
from longrope_export.search.space import Candidate

# A candidate goes when its paired loss is this many standard errors above the last one that would be kept.
STANDARD_ERRORS = 2.0
# Two documents are the fewest whose differences have a spread.
_FIRST_DOCUMENTS = 2


class Race:
    """Measures `candidates` on the first `documents` documents of `part`, all at once or with elimination.

    With `eliminate`, two documents come first and then one at a time. After each, a candidate is dropped when it is
    clearly worse than the `keep`-th best of all candidates and `incumbents` (losses by document of earlier ones): its
    paired difference is above `STANDARD_ERRORS` standard errors, with the variance of the differences pooled over the
    candidates. A loss that is not finite drops its candidate at once.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        part: str,
        documents: int,
        *,
        eliminate: bool = False,
        keep: int = 1,
        incumbents: Sequence[Sequence[float]] = (),
    ) -> None:
        self._candidates, self._part, self._documents = list(candidates), part, documents
        self._eliminate, self._keep = eliminate, keep
        self._incumbents = [list(losses) for losses in incumbents]
        self.losses: list[list[float]] = [[] for _ in candidates]
        self._alive = list(range(len(candidates)))
        self._gaps: dict[int, float] = {}

    @property
    def done(self) -> bool:
        """Whether nothing is left to measure."""
        return not self._alive or self._measured >= self._documents

    def ask(self) -> list[Trial]:
        """The next documents for all that are left, in (candidate, document) order; empty when done."""
        return [
            Trial(self._candidates[index], self._part, document) for index in self._alive for document in self._next()
        ]

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Take the losses of the trials asked last, and drop who lost."""
        width = len(self._next())
        for place, index in enumerate(self._alive):
            self.losses[index] += [outcome.loss for outcome in outcomes[place * width : (place + 1) * width]]
        if self._eliminate and not self.done:
            self._drop()

    def survivors(self) -> list[tuple[int, list[float]]]:
        """Index and losses of every candidate that was measured on all documents, in the order of the candidates."""
        return [(index, losses) for index, losses in enumerate(self.losses) if len(losses) == self._documents]

    def ranking(self) -> list[float]:
        """A number per candidate to rank by: its mean loss; dropped ones stand behind, by their gap when dropped."""
        means = {index: mean_loss(losses) for index, losses in self.survivors()}
        last = max((mean for mean in means.values() if math.isfinite(mean)), default=0.0)
        return [means[index] if index in means else last + self._gaps[index] for index in range(len(self.losses))]

    @property
    def _measured(self) -> int:
        return max((len(losses) for losses in self.losses), default=self._documents)

    def _next(self) -> range:
        first = self._measured
        last = max(first + 1, _FIRST_DOCUMENTS) if self._eliminate else self._documents
        return range(first, min(last, self._documents))

    def _drop(self) -> None:
        count = self._measured
        table = np.array([self.losses[index] for index in self._alive])
        everybody = np.concatenate([table, np.array([each[:count] for each in self._incumbents]).reshape(-1, count)])
        if len(everybody) <= self._keep:
            return
        reference = everybody[np.argsort(everybody.mean(axis=1), kind="stable")[self._keep - 1]]
        if not np.isfinite(reference).all():
            return
        gaps, error = paired_gaps(table, reference)
        lost = gaps > STANDARD_ERRORS * error
        self._gaps |= {index: float(gap) for index, gap, out in zip(self._alive, gaps, lost) if out}
        self._alive = [index for index, out in zip(self._alive, lost) if not out]


def paired_gaps(
    table: npt.NDArray[np.float64], reference: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], float]:
    """Mean differences [n] of losses [n, documents] from a reference's [documents], and their pooled standard error."""
    differences = table - reference
    finite = differences[np.isfinite(differences).all(axis=1)]
    # The reference itself has no spread: it says nothing about how much the others' differences scatter.
    others = finite[np.any(finite != 0.0, axis=1)]
    variance = float(others.var(axis=1, ddof=1).mean()) if len(others) else 0.0
    return differences.mean(axis=1), math.sqrt(variance / table.shape[1])


def mean_loss(losses: Sequence[float]) -> float:
    """The mean; inf where one is not finite."""
    return math.fsum(losses) / len(losses) if losses else math.inf
