"""The options of `longrope search`: each reaches the configuration, and one that would be ignored is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from longrope_export.cli.search import _FITS, search, search_config
from longrope_export.search.run import SearchConfig

OPTIONS: list[tuple[list[str], str, Any]] = [
    (["--strategy", "evolution"], "strategy", "evolution"),
    (["--strategy", "critical-dim", "--optimiser", "cmaes"], "optimiser", "cmaes"),
    (["--strategy", "critical-dim", "--optimiser", "evolution"], "optimiser", "evolution"),
    (["--strategy", "critical-dim", "--optimiser", "evolution", "--population", "5"], "evolution.population", 5),
    (["--strategy", "critical-dim", "--critical-index", "3,5"], "critical_indices", (3, 5)),
    (["--strategy", "critical-dim", "--learning-rate", "0.3"], "gradient.learning_rate", 0.3),
    (["--strategy", "cmaes", "--sigma", "0.5"], "cmaes.sigma", 0.5),
    (["--strategy", "cmaes", "--knots", "6"], "cmaes.knots", 6),
    (["--strategy", "cmaes", "--population", "9"], "cmaes.population", 9),
    (["--strategy", "cmaes", "--patience", "9"], "cmaes.patience", 9),
    (["--strategy", "cmaes", "--constraint", "monotone"], "cmaes.constraint", "monotone"),
    (["--strategy", "cmaes", "--no-race"], "race", False),
    (["--constraint", "none"], "gradient.constraint", "none"),
    (["--init", "longrope.json", "--keep-long"], "keep_long", True),
    (["--strategy", "evolution", "--race"], "race", True),
    (["--strategy", "evolution", "--paper-large"], "evolution.population", 32),
    (["--strategy", "evolution", "--paper-large"], "documents", 3),
    (["--objective", "needle"], "objective", "needle"),
    (["--objective", "last", "--last-share", "0.5"], "last_share", 0.5),
    (["--report-documents", "2"], "report_documents", 2),
    (["--strategy", "evolution", "--short-bound", "1.5"], "short_bound", 1.5),
    (["--constraint", "paper", "--short-bound", "1.5"], "short_bound", 1.5),
    (["--sets", "2x,3x"], "sets", ("2x", "3x")),
    (["--sets", "2x", "--sets-share", "0.2"], "sets_share", 0.2),
    (["--budget", "45m"], "budget", "45m"),
    (["--documents", "7"], "documents", 7),
    (["--validation-documents", "5"], "validation_documents", 5),
    (["--seed", "3"], "seed", 3),
    (["--for", "gguf"], "runtime", "gguf"),
    (["--attention", "su"], "attention", "su"),
    (["--short", "original"], "short", "original"),
    (["--short-share", "0.3"], "short_share", 0.3),
    (["--short-margin", "0.1"], "short_margin", 0.1),
    (["--start-tokens", "0,4,8"], "start_tokens", (0, 4, 8)),
    (["--baselines", "yarn, ntk"], "baselines", ("yarn", "ntk")),
    (["--dtype", "bfloat16"], "dtype", "bfloat16"),
    (["--threads", "2"], "threads", 2),
    (["--executor", "processes"], "executor", "processes"),
    (["--executor", "ray", "--workers", "3"], "workers", 3),
    (["--device-map", "auto"], "device_map", "auto"),
    (["--max-memory", "cpu=1GB"], "max_memory", "cpu=1GB"),
    (["--init", "x.json"], "init", Path("x.json")),
    (["--learn-attention"], "learn_attention", True),
    (["--no-learn-attention"], "learn_attention", False),
    (["--learn-short-attention"], "learn_short_attention", True),
    (["--strategy", "evolution", "--init", "x.json", "--keep-long"], "init", Path("x.json")),
    (["--strategy", "evolution", "--bound", "2"], "bound", 2.0),
    (["--strategy", "cmaes", "--constraint", "paper", "--bound", "2"], "bound", 2.0),
    (["--strategy", "evolution", "--step", "0.1"], "step", 0.1),
    (["--constraint", "paper"], "gradient.constraint", "paper"),
    (["--learning-rate", "0.3"], "gradient.learning_rate", 0.3),
    (["--early-length", "2x"], "early_length", "2x"),
    (["--early-length", "2x", "--early-share", "0.5"], "early_share", 0.5),
    (["--attention-rate", "0.5"], "gradient.attention_rate", 0.5),
    (["--full-rate-turns", "4"], "gradient.full_rate_turns", 4.0),
    (["--warm-up", "0.3"], "gradient.warm_up", 0.3),
    (["--trust-region", "0.01"], "gradient.trust_region", 0.01),
    (["--average", "0.5"], "gradient.average", 0.5),
    (["--patience", "2"], "gradient.patience", 2),
    (["--documents-per-step", "2"], "gradient.documents_per_step", 2),
    (["--strategy", "evolution", "--population", "5"], "evolution.population", 5),
    (["--strategy", "evolution", "--iterations", "5"], "evolution.iterations", 5),
    (["--strategy", "evolution", "--mutations", "5"], "evolution.mutations", 5),
    (["--strategy", "evolution", "--crossovers", "5"], "evolution.crossovers", 5),
    (["--strategy", "evolution", "--parents", "5"], "evolution.parents", 5),
    (["--strategy", "evolution", "--mutation-probability", "0.5"], "evolution.mutation_probability", 0.5),
]
PLAIN = ["model", "--to", "4x", "--data", "a.txt", "--data", "b", "--out", "out"]


def _parsed(arguments: list[str]) -> SearchConfig:
    context = search.make_context("search", list(arguments))
    options = dict(context.params)
    assert options.pop("as_json") is False
    assert options.pop("dry_run") is False
    return search_config(options)


def test_without_options_the_configuration_is_the_default_one() -> None:
    expected = SearchConfig(model=Path("model"), target="4x", data=(Path("a.txt"), Path("b")), out=Path("out"))
    assert _parsed(PLAIN) == expected


@pytest.mark.parametrize(
    ("arguments", "name", "value"), OPTIONS, ids=[" ".join(arguments) for arguments, _, _ in OPTIONS]
)
def test_every_option_reaches_the_configuration(arguments: list[str], name: str, value: Any) -> None:
    found: Any = _parsed([*PLAIN, *arguments])
    default: Any = _parsed(PLAIN)
    for part in name.split("."):
        found, default = getattr(found, part), getattr(default, part)
    assert found == value != default


def test_the_table_above_holds_every_option() -> None:
    always = {"--to", "--data", "--out", "--json", "--dry-run"}
    options = {text for parameter in search.params if isinstance(parameter, click.Option)
               for text in (*parameter.opts, *parameter.secondary_opts)}  # fmt: skip
    assert options == always | {text for arguments, _, _ in OPTIONS for text in arguments if text.startswith("--")}


@pytest.mark.parametrize(
    "arguments",
    [["--population", "8"], ["--strategy", "evolution", "--learning-rate", "1"], ["--start-tokens", "a"],
     ["--sigma", "0.1"], ["--optimiser", "cmaes"], ["--critical-index", "3"], ["--race"], ["--paper-large"],
     ["--strategy", "cmaes", "--learning-rate", "1"], ["--strategy", "cmaes", "--iterations", "3"]],
)  # fmt: skip
def test_options_that_do_not_fit_are_usage_errors(arguments: list[str]) -> None:
    assert CliRunner().invoke(search, [*PLAIN, *arguments]).exit_code == 2


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("optimiser", ["--optimiser", "gradient"]),
        ("critical-index", ["--strategy", "cmaes", "--critical-index", "3"]),
        ("early-length", ["--strategy", "cmaes", "--early-length", "2x"]),
        ("early-share", ["--early-share", "0.5"]),
        ("race", ["--strategy", "critical-dim", "--race"]),
        ("learn-attention", ["--strategy", "evolution", "--learn-attention"]),
        ("learn-attention", ["--init", "x.json", "--keep-long", "--learn-attention"]),
        ("learn-short-attention", ["--strategy", "evolution", "--learn-short-attention"]),
        ("learn-short-attention", ["--short", "original", "--learn-short-attention"]),
        ("init", ["--strategy", "evolution", "--init", "x.json"]),
        ("step", ["--step", "0.01"]),
        ("step", ["--strategy", "cmaes", "--constraint", "paper", "--step", "0.1"]),
        ("bound", ["--bound", "1.25"]),
        ("bound", ["--strategy", "cmaes", "--bound", "2"]),
        ("short-bound", ["--short-bound", "1.5"]),
        ("short-bound", ["--strategy", "evolution", "--short", "original", "--short-bound", "1.5"]),
        ("short-share", ["--short", "original", "--short-share", "0.1"]),
        ("short-share", ["--init", "x.json", "--keep-long", "--short-share", "0.2"]),
        ("short-margin", ["--short", "original", "--short-margin", "0"]),
        ("sets-share", ["--sets-share", "0.1"]),
        ("sets-share", ["--init", "x.json", "--keep-long", "--sets", "2x", "--sets-share", "0.2"]),
        ("last-share", ["--objective", "perplexity,needle", "--last-share", "0.25"]),
        ("workers", ["--workers", "2"]),
        ("dtype", ["--strategy", "cmaes", "--objective", "llamacpp,last", "--dtype", "auto"]),
    ],
)
def test_an_option_that_would_be_ignored_is_a_usage_error_that_names_it(name: str, arguments: list[str]) -> None:
    """Also where its value is the default: it was given, so it was meant."""
    result = CliRunner().invoke(search, [*PLAIN, *arguments])
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert line.startswith(f"Error: --{name} belongs to ")


@pytest.mark.parametrize(
    "arguments",
    [["--strategy", "evolution", "--no-learn-attention"], ["--no-race"], ["--short", "search", "--short-share", "0"],
     ["--executor", "local"], ["--dtype", "auto"], ["--objective", "needle,last=2", "--last-share", "0.25"]],
)  # fmt: skip
def test_what_a_search_does_anyway_may_be_said(arguments: list[str]) -> None:
    assert _parsed([*PLAIN, *arguments]).target == "4x"


def test_no_option_that_can_be_ignored_is_without_a_case_above() -> None:
    cases = test_an_option_that_would_be_ignored_is_a_usage_error_that_names_it.pytestmark[0].args[1]  # type: ignore[attr-defined]
    named = {name.replace("critical-index", "critical-indices").replace("-", "_") for name, _ in cases}
    assert named == set(_FITS)


def test_the_help_states_the_defaults_that_the_code_has() -> None:
    default: Any = _parsed(PLAIN)
    records = {"gradient": default.gradient, "cmaes": default.cmaes, "evolution": default.evolution}
    checked = set()
    for parameter in search.params:
        stated = re.search(r"\[default: ([^\]]+)\]", getattr(parameter, "help", None) or "")
        for kind, record in {"": default, **records}.items():
            help_text = getattr(parameter, "help", "") or ""
            if not stated or not hasattr(record, parameter.name or ""):
                continue
            if kind and kind not in help_text.partition(":")[0]:
                continue
            value = getattr(record, parameter.name or "")
            if isinstance(value, int | float | str) and not isinstance(value, bool):
                parts = stated[1].split(";")[0].split(":")[0].split(", ")
                own = [part.removeprefix(f"{kind} ") for part in parts if kind and part.startswith(f"{kind} ")]
                wanted = own[0] if own else parts[0].split(",")[0]
                assert wanted == str(value), parameter.name
                checked.add(parameter.name)
    assert {"learning_rate", "documents", "population", "sigma", "short_bound", "objective", "strategy"} <= checked
    assert len(checked) > 25
