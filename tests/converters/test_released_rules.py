"""Our config.json by the released code of vLLM, SGLang and ExLlamaV2: which set applies, and with which attention factor.

Downloads their wheels (RELEASED_WHEELS names a folder that has them).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.usefixtures("quiet"), pytest.mark.timeout(3000)]
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("RELEASED_WHEELS")
    return Path(given) if given else tmp_path_factory.mktemp("wheels")


def test_each_runtime_applies_what_the_documentation_says(wheels: Path, tmp_path: Path) -> None:
    from released_rules import FORMULA, RUNTIMES, rows

    found = {tuple(row[:3]): row[3:] for row in rows(wheels, tmp_path, tuple(RUNTIMES))}
    assert len(found) == 18
    for (runtime, model, served), (name, attention, difference) in found.items():
        assert name == ("short" if served == "256" else "long")
        wanted = FORMULA if "formula" in model else 1.1
        if runtime.startswith("exllamav2"):
            wanted = 1.0 if served == "256" else FORMULA
        assert float(attention) == pytest.approx(wanted, abs=1e-4)
        assert float(difference) < 1e-4


def test_wrong_factors_are_seen(wheels: Path, tmp_path: Path) -> None:
    from released_rules import RUNTIMES, folders, wheel_of, which_set

    _, folder, scaling = next(iter(folders(tmp_path, "exllamav2")))
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_scaling", "rope_parameters"):
        config[key]["long_factor"] = config[key]["long_factor"][::-1]
    (folder / "config.json").write_text(json.dumps(config))
    for runtime, run in RUNTIMES.items():
        assert which_set(run(wheel_of(runtime, wheels), folder, 1024), scaling)[1] > 0.1


def test_vllm_serves_the_long_window_by_itself_where_the_window_is_not_at_the_top(wheels: Path, tmp_path: Path) -> None:
    from released_rules import folders, in_vllm, wheel_of

    wheel = wheel_of("vllm", wheels)
    served: dict[str, int] = {}
    for profile in ("default", "exllamav2"):
        for name, folder, _ in folders(tmp_path / profile, profile):
            served[f"{name}, {profile}"] = in_vllm(wheel, folder, None)[1]
    assert served == {
        "llama, default": 1024, "llama, formula, default": 1024, "phi3, default": 256,
        "llama, exllamav2": 256, "llama, formula, exllamav2": 256, "phi3, exllamav2": 256,
    }  # fmt: skip


def test_exllama_refuses_the_default_profile_of_a_llama(wheels: Path, tmp_path: Path) -> None:
    from released_rules import folders, in_exllamav2, wheel_of

    wheel = wheel_of("exllamav2", wheels)
    found: dict[str, Any] = {name: folder for name, folder, _ in folders(tmp_path)}
    with pytest.raises(AssertionError, match="required for 'su' scaling"):
        in_exllamav2(wheel, found["llama"], 1024)
    in_exllamav2(wheel, found["phi3"], 1024)


def test_a_source_that_changed_is_named(wheels: Path) -> None:
    from released_rules import taken, wheel_of

    with pytest.raises(SystemExit, match="no longer has all of get_rope_params_none"):
        taken(wheel_of("exllamav2", wheels), "exllamav2/rope.py", ("get_rope_params_none",), {})


def test_vllm_has_the_option_of_the_recipe(wheels: Path) -> None:
    import zipfile

    from released_rules import wheel_of

    source = zipfile.ZipFile(wheel_of("vllm", wheels)).read("vllm/engine/arg_utils.py").decode()
    assert '"--max-model-len"' in source
