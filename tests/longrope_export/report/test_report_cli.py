"""`longrope report` as it is given on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from report_inputs import record

from longrope_export.cli.main import main
from longrope_export.cli.report import report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one record: the cheapest report there is."""
    (tmp_path / "longrope.json").write_text(record().to_json())
    (tmp_path / "bad.json").write_text("{\x1b")
    return tmp_path


def test_the_report_lies_in_the_folder_and_is_renewed(folder: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(report, [str(folder)])
    assert result.exit_code == 0, result.output
    assert "found: 1 record" in result.output
    assert "not shown: bad.json" in result.output
    assert {path.name for path in (folder / "report").iterdir()} == {"report.html", "factors.png"}
    (folder / "longrope.json").write_text(record(long_attention_factor=1.25).to_json())
    assert runner.invoke(report, [str(folder)]).exit_code == 0
    assert "1.25" in (folder / "report" / "report.html").read_text()


def test_json_names_what_was_found_and_written(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(report, [str(folder), "--out", str(tmp_path / "page"), "--json"])
    values = json.loads(result.stdout)
    assert values["page"] == str(tmp_path / "page" / "report.html")
    assert values["figures"] == [str(tmp_path / "page" / "factors.png")]
    assert values["records"] == [folder.name]
    assert len(values["left_out"]) == 1
    assert not (folder / "report").exists()


@pytest.mark.parametrize("kind", ["someone else's page", "a file"])
def test_what_is_not_ours_is_not_replaced(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "page"
    if kind == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "report.html").write_text("<html>mine</html>")
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(folder), "--out", str(out)])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert "mine" in (out if kind == "a file" else out / "report.html").read_text()


def test_a_folder_that_is_missing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(tmp_path / "missing")])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("longrope: ")


def test_without_matplotlib_the_extra_is_named(folder: Path) -> None:
    script = (
        "import sys\nsys.modules['matplotlib'] = None\nfrom longrope_export.cli.main import main\nmain(sys.argv[1:])"
    )
    result = subprocess.run([sys.executable, "-c", script, "report", str(folder)], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "longrope: this command needs matplotlib: pip install 'longrope-export[plot]'\n"
    assert not (folder / "report").exists()


def test_a_report_needs_neither_torch_nor_the_search(folder: Path) -> None:
    script = (
        "import sys\nfrom longrope_export.report.write import write_report\nfrom pathlib import Path\n"
        "write_report(Path(sys.argv[1]))\n"
        "heavy = {'torch', 'transformers', 'longrope_export.search', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
