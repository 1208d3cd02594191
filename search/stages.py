"""The stages of one search in order, and its result: complete, or the best so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from longrope_export.search.config import SearchConfig
from longrope_export.search.documents import REPORT
from longrope_export.search.evaluator import Evaluator
from longrope_export.search.initial import with_kept_long
from longrope_export.search.long import SEARCHED, LongResult, LongSearch, choose_start_tokens, perplexity
from longrope_export.search.plan import GRADIENT_UNITS, Plan
from longrope_export.search.protocol import SEARCH, VALIDATION
from longrope_export.search.result import SearchResult, finite_values
from longrope_export.search.short import ORIGINAL, SetResult, ShortResult, retention, search_set, search_short
from longrope_export.search.space import Candidate, RopeNumbers


class Stages:
    """One search that is ready to run; what is found so far stands in its attributes.

    `header` goes into the record's provenance; `units` is what a forward pass on each part counts.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        numbers: RopeNumbers,
        config: SearchConfig,
        plan: Plan,
        header: Mapping[str, Any],
        units: Mapping[str, float],
        init: Candidate | None = None,
    ) -> None:
        self._evaluator, self._numbers, self._config, self._plan = evaluator, numbers, config, plan
        self._header, self._units = header, units
        self._long_search = LongSearch(evaluator, numbers, config, plan, init)
        self._long: LongResult | None = None
        self._tried: Mapping[int, float] = {}
        self._short: ShortResult | None = None
        self._sets: dict[int, SetResult] = {}

    def run(self) -> SearchResult:
        """All stages in order."""
        evaluator, numbers, config, plan = self._evaluator, self._numbers, self._config, self._plan
        self._long = self._long_search.run()
        if config.method != "evolution" and not config.keep_long:
            self._long, self._tried = choose_start_tokens(evaluator, self._long, config, plan)
        self._short = search_short(evaluator, numbers, config, plan, self._shared_attention(self._long.candidate))
        long, short = self._long.candidate, self._short.candidate
        if plan.set_steps or plan.set_evaluations:
            for part in [part for part in self._units if part.startswith(f"{SEARCH}@")]:
                length = int(part.partition("@")[2])
                self._sets[length] = search_set(evaluator, numbers, config, plan, length, short, long)
        kept = retention(evaluator, numbers, short, long)
        return self._result(self._long, self._short, kept, self._report(long), complete=True)

    def best_so_far(self) -> SearchResult | None:
        """The best of what is measured, without measuring more; None when nothing was compared yet."""
        long = self._long or self._best_long()
        if long is None:
            return None
        short = self._short or ShortResult(self._numbers.short_original(self._shared_attention(long.candidate)))
        return self._result(long, short, {}, {}, complete=False)

    def _best_long(self) -> LongResult | None:
        # Descents measure their iterates on the validation documents, populations theirs on the search documents.
        order = (VALIDATION, SEARCH) if self._config.method == "gradient" else (SEARCH, VALIDATION)
        for part in order:
            if (found := self._evaluator.best_known(part)) is None:
                continue
            candidate, loss = found
            names = {each: name for name, each in reversed(self._long_search.named.items())}
            name = names.get(candidate, SEARCHED)
            scores: dict[str, dict[str, float]] = {SEARCH: {}, VALIDATION: {}, part: {name: perplexity(loss)}}
            strategy = self._long_search.strategy
            history = tuple(strategy.history) if strategy else ()
            return LongResult(candidate, name, scores[SEARCH], scores[VALIDATION], history, {})
        return None

    def _shared_attention(self, long: Candidate) -> float:
        # A GGUF holds one attention factor, which short sequences get as well.
        gguf = self._config.runtime == "gguf"
        return long.attention_factor if gguf else self._numbers.short_original().attention_factor

    def _report(self, long: Candidate) -> dict[str, float]:
        if not self._config.report_documents:
            return {}
        named = {"unchanged": self._numbers.unchanged(), **self._long_search.closed_forms, "result": long}
        losses = self._evaluator.mean_losses(list(named.values()), REPORT)
        return {name: perplexity(loss) for name, loss in zip(named, losses)}

    def _result(
        self,
        long: LongResult,
        short: ShortResult,
        kept: Mapping[str, float],
        report: Mapping[str, float],
        *,
        complete: bool,
    ) -> SearchResult:
        searched, other = self._spent(search=True), self._spent(search=False)
        original = self._numbers.short_original(self._shared_attention(long.candidate))
        now = (short.candidate.factors, short.candidate.attention_factor)
        short_chosen = ORIGINAL if now == (original.factors, original.attention_factor) else SEARCHED
        provenance = {
            "method": "search",
            "strategy": self._config.strategy,
            "seed": self._config.seed,
            "complete": complete,
            "chosen": long.chosen,
            "evaluations": searched,
            "validation_evaluations": other,
            "search_perplexity": finite_values(long.search),
            "validation_perplexity": finite_values(long.validation),
            "report_perplexity": finite_values(report),
            "retention": finite_values(kept),
            "start_tokens_perplexity": finite_values({str(value): ppl for value, ppl in self._tried.items()}),
            "critical_index_perplexity": finite_values(long.critical),
            "short": short_chosen,
            "short_perplexity": {"original": short.original_perplexity, "searched": short.searched_perplexity},
            "sets": {str(length): finite_values(found.validation) for length, found in self._sets.items()},
            **{name: value for name, value in self._header.items() if name not in ("strategy", "seed")},
        }
        record = self._numbers.record(long.candidate, short.candidate, provenance)
        if self._config.keep_long:
            record = with_kept_long(record, self._config)
        sets = {length: self._numbers.total_factors(found.candidate) for length, found in self._sets.items()}
        return SearchResult(
            replace(record, sets=sets), long.chosen, short_chosen, dict(long.search), dict(long.validation), searched,
            other, long.history, self._notes(long, complete), self._config.objective, dict(report), dict(kept), complete,
            self._config.documents,
        )  # fmt: skip

    def _spent(self, *, search: bool) -> float:
        total = sum(
            count * self._units[part] * (GRADIENT_UNITS if gradient else 1.0)
            for (part, gradient), count in sorted(self._evaluator.asked.items())
            if _is_search(part) == search
        )
        return round(total / self._config.documents, 4)

    def _notes(self, long: LongResult, complete: bool) -> tuple[str, ...]:
        config, plan, notes = self._config, self._plan, []
        full = config.evolution.evaluations
        if not complete:
            notes.append("the search was stopped: this is the best so far")
        if config.method == "evolution" and plan.evaluations < full and not config.keep_long:
            notes.append(f"the budget stopped Algorithm 1 after {plan.evaluations:,} of its {full:,} evaluations")
        if long.chosen != SEARCHED and complete and not config.keep_long:
            notes.append(f"on the validation documents {long.chosen} was not beaten; the record holds it")
        if config.short == "search" and not (plan.short_steps or plan.short_evaluations):
            notes.append("the budget is too small to search the short set; it is the original one")
        if config.sets and not (plan.set_steps or plan.set_evaluations):
            notes.append("the budget is too small to search the sets in between; there are none")
        notes += self._long_search.strategy.notes if self._long_search.strategy else ()
        notes += self._short.notes if self._short else ()
        notes += [note for found in self._sets.values() for note in found.notes]
        if not config.mixture.is_perplexity:
            notes.append(f"perplexities on search and validation documents are exp of the objective {config.objective}")
        return tuple(notes)


def _is_search(part: str) -> bool:
    return SEARCH in part.partition("@")[0].split("-")
