"""The arms by name: yardsticks, the default, and one change at a time."""

from __future__ import annotations

from typing import Any

from search_arms import RELEASED, REPORT, VALIDATION, Arm

from longrope_export.search.strategies.cmaes import CmaOptions
from longrope_export.search.strategies.gradient import GradientOptions

YARDSTICK = "evolution"
# Ablations change one thing of a descent of 128 forward passes, a quarter of the default.
_BASE: dict[str, Any] = {"short": "original", "budget": "2"}


def _change(name: str, about: str, documents: int = 64, retrieve: bool = False, **options: Any) -> Arm:
    return Arm(name, f"as descent-128, but {about}", {**_BASE, **options}, documents, retrieve=retrieve)


def _descend(name: str, about: str, **options: Any) -> Arm:
    return _change(name, about, gradient=GradientOptions(**options))


_DEFAULT: dict[str, Any] = {"budget": "7.5"}


def _default(name: str, about: str, **options: Any) -> Arm:
    return Arm(name, f"the default, but {about}", {**_DEFAULT, **options}, 64, retrieve=True)


_FEW: dict[str, Any] = {
    "budget": "1.15", "short": "original", "objective": "perplexity", "baselines": ("yarn",), "start_tokens": (0,),
}  # fmt: skip
_FASTER = GradientOptions(learning_rate=0.3, trust_region=0.4)
_FASTEST = GradientOptions(learning_rate=0.4, trust_region=0.5)
_ALGORITHM_1 = {"strategy": "evolution", "budget": "1344", "short": "original", "validation_documents": VALIDATION}
_ARMS = (
    Arm(YARDSTICK, "Algorithm 1 in full, 1,344 evaluations of 5 documents", _ALGORITHM_1, counts_search_alone=True,
        retrieve=True),
    Arm(RELEASED, "the released code's operators, 1,344 evaluations of 5 documents", counts_search_alone=True,
        retrieve=True),
    Arm("default", "`longrope search` as it comes: 480 forward passes on 64 documents (`--budget 7.5`)",
        _DEFAULT, 64, retrieve=True),
    Arm("default-dimensions", "the default without n̂", {**_DEFAULT, "start_tokens": (0,)}, 64),
    _default("default-perplexity", "`--objective perplexity`", objective="perplexity"),
    _default("default-needle-0.1", "`--objective perplexity=0.9,needle=0.1`", objective="perplexity=0.9,needle=0.1"),
    _default("default-free", "`--constraint none`", gradient=GradientOptions(constraint="none")),
    _default("default-free-needle-0.1", "`--constraint none --objective perplexity=0.9,needle=0.1`",
             gradient=GradientOptions(constraint="none"), objective="perplexity=0.9,needle=0.1"),
    _default("default-four-a-step", "four documents a step", gradient=GradientOptions(documents_per_step=4)),
    Arm("eightieth", "1/80 of Algorithm 1, the choice included: perplexity alone, YaRN the one closed form, no n̂", _FEW,
        64, retrieve=True),
    Arm("eightieth-free", "the same with `--constraint none`", {**_FEW, "gradient": GradientOptions(constraint="none")},
        64, retrieve=True),
    Arm("eightieth-rate-0.3", "eightieth with `--learning-rate 0.3 --trust-region 0.4`", {**_FEW, "gradient": _FASTER}, 64,
        retrieve=True),
    Arm("eightieth-rate-0.4", "eightieth with `--learning-rate 0.4 --trust-region 0.5`", {**_FEW, "gradient": _FASTEST}, 64,
        retrieve=True),
    Arm("eightieth-rate-0.6", "eightieth with `--learning-rate 0.6 --trust-region 0.75`",
        {**_FEW, "gradient": GradientOptions(learning_rate=0.6, trust_region=0.75)}, 64, retrieve=True),
    Arm("gguf", "the default for a GGUF: attention factor 1, no n̂", {**_DEFAULT, "runtime": "gguf"}, 64, retrieve=True),
    Arm("gguf-attention", "for a GGUF with `--attention method --learn-attention`",
        {**_DEFAULT, "runtime": "gguf", "attention": "method", "learn_attention": True}, 64, retrieve=True),
    Arm("descent-128", "the default with 128 forward passes and no short set", _BASE, 64, retrieve=True),
    _descend("free", "`--constraint none`", constraint="none"),
    _descend("paper", "`--constraint paper`", constraint="paper"),
    _change("attention-fixed", "YaRN's attention factor is kept", learn_attention=False),
    _change("attention-one", "the attention factor is 1", attention="1.0", learn_attention=False),
    _change("few-documents", "4 documents are searched on", 4, budget="32"),
    _change("sixteen-documents", "16 documents are searched on", 16, budget="8"),
    _descend("four-a-step", "four documents a step", documents_per_step=4),
    _descend("last-iterate", "no averaging", average=0.0),
    _descend("average-all", "all iterates are averaged", average=1.0),
    _descend("rate-0.12", "`--learning-rate 0.12 --trust-region 0.15`", learning_rate=0.12, trust_region=0.15),
    _change("rate-0.3", "`--learning-rate 0.3 --trust-region 0.4`", gradient=_FASTER),
    _descend("turns-2", "`--full-rate-turns 2`: fast pairs are slowed less", full_rate_turns=2.0),
    _descend("turns-4", "`--full-rate-turns 4`", full_rate_turns=4.0),
    _descend("turns-8", "`--full-rate-turns 8`: fast pairs are hardly slowed", full_rate_turns=8.0),
    _change("from-ntk", "the descent begins at NTK", baselines=("ntk",)),
    _change("from-pi", "the descent begins at PI", baselines=("pi",)),
    _change("early-4x", "three quarters of the steps on pieces of half the length", early_length="4x"),
    _change("critical-dim", "`--strategy critical-dim`", strategy="critical-dim"),
    _change("perplexity-alone", "`--objective perplexity`", objective="perplexity", retrieve=True),
    _change("needle-0.1", "`--objective perplexity=0.9,needle=0.1`", objective="perplexity=0.9,needle=0.1", retrieve=True),
    _change("needle-0.3", "`--objective perplexity=0.7,needle=0.3`", objective="perplexity=0.7,needle=0.3", retrieve=True),
    _change("last", "`--objective last`", objective="last"),
    Arm("oracle", "not a search: a descent of 1,040 passes on the report documents themselves, to see what factors can reach",
        {"short": "original", "budget": "40"}, REPORT, seeds=(0,), sees_report=True),
    Arm("oracle-free-one-a-step", "the same with `--constraint none`",
        {"short": "original", "budget": "40", "gradient": GradientOptions(constraint="none")}, REPORT, seeds=(0,),
        sees_report=True),
    Arm("oracle-three-a-step", "the oracle with three documents a step",
        {"short": "original", "budget": "40", "gradient": GradientOptions(documents_per_step=3)}, REPORT, seeds=(0,),
        sees_report=True),
    Arm("oracle-free", "that with `--constraint none`",
        {"short": "original", "budget": "40", "gradient": GradientOptions(constraint="none", documents_per_step=3)},
        REPORT, seeds=(0,), sees_report=True),
    _change("cmaes", "`--strategy cmaes`", 5, strategy="cmaes", budget="25.6"),
    Arm("cmaes-1600", "`--strategy cmaes` with its default of 1,600 forward passes",
        {"strategy": "cmaes", "short": "original"}, 5),
    _change("cmaes-knots", "`--strategy cmaes --knots 8`", 5, strategy="cmaes", budget="25.6", cmaes=CmaOptions(knots=8)),
)  # fmt: skip
ARMS = {arm.name: arm for arm in _ARMS}
