"""The demo model's loop: same bits whatever the threads and the interruptions, and it learns."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longrope_export.errors import StaleStateError
from longrope_export.training.demo_loop import DECAY_SHARE, Progress, Settings, learning_rate, train
from longrope_export.training.demo_model import Shape, new_model

TINY = Shape(vocabulary=64, window=16, hidden=32, intermediate=32, layers=1, heads=2, kv_heads=1)
SETTINGS = Settings(steps=12, rows=8, micro_rows=2, warm_up=2)


def rows(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random half, repeated: what a model can learn is the second half's loss."""
    half = np.random.default_rng(step).integers(1, 8, (8, 8))
    ids = np.concatenate([np.zeros((8, 1), int), half, half], axis=1)
    return torch.from_numpy(ids), torch.ones(8, 17)


def weights(model: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def trained(folder: Path, settings: Settings = SETTINGS, **options: Any) -> torch.Tensor:
    model = new_model(TINY, 64, seed=0)
    train(model, rows, settings, folder / "checkpoint.pt", **options)
    return weights(model)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return trained(tmp_path_factory.mktemp("whole"))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 5, 9, 11])
def test_a_resumed_run_gives_the_same_bits(tmp_path: Path, uninterrupted: torch.Tensor, stop: int) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.step == stop + 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        trained(tmp_path, checkpoint_every=0.0, report=interrupt)
    seen: list[int] = []
    assert torch.equal(trained(tmp_path, report=lambda progress: seen.append(progress.step)), uninterrupted)
    assert seen[0] == stop + 1


def test_a_finished_run_is_not_trained_again(tmp_path: Path, uninterrupted: torch.Tensor) -> None:
    trained(tmp_path)
    seen: list[int] = []
    assert torch.equal(trained(tmp_path, report=lambda progress: seen.append(progress.step)), uninterrupted)
    assert seen == []


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_decide_the_weights(tmp_path: Path, uninterrupted: torch.Tensor, threads: int) -> None:
    assert torch.equal(trained(tmp_path, threads=threads), uninterrupted)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"rows": 4}, {"learning_rate": 1e-3}, {"clip": 0.5}, {"data": "other"}]
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    trained(tmp_path, replace(SETTINGS, steps=1))
    with pytest.raises(StaleStateError, match="other settings"):
        trained(tmp_path, replace(SETTINGS, **change))


def test_more_steps_may_be_asked_for_before_the_rate_falls(tmp_path: Path, uninterrupted: torch.Tensor) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.step == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        trained(tmp_path, replace(SETTINGS, steps=40), checkpoint_every=0.0, report=interrupt)
    assert torch.equal(trained(tmp_path), uninterrupted)


def test_minutes_shorten_the_run(tmp_path: Path) -> None:
    model = new_model(TINY, 64, seed=0)
    progress = train(model, rows, replace(SETTINGS, steps=10**6), tmp_path / "c.pt", minutes=1e-5)
    assert progress.decay_start is not None
    assert 1 <= progress.step == progress.total(10**6) < 1000


def test_the_rate_rises_stays_and_falls_to_nothing() -> None:
    settings = Settings(steps=100, warm_up=10, learning_rate=1.0)
    start = round(100 * (1 - DECAY_SHARE))
    rates = [learning_rate(settings, Progress(step, 0.0, start if step >= start else None)) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10 : start + 1] == [1.0] * (start - 9)
    assert np.diff(rates[start:]) == pytest.approx(-1 / (100 - start))
    assert rates[-1] == pytest.approx(1 / (100 - start))


@pytest.mark.slow
def test_it_learns_what_the_weights_ask_for(tmp_path: Path) -> None:
    """Random halves are unpredictable (ln 7 = 1.95) and their repeats are not; only the weighted ones count."""

    def only_repeats(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, _ = rows(step)
        weight = torch.zeros(8, 17)
        weight[:, 9:] = 1.0
        return ids, weight

    losses: list[float] = []
    model = new_model(replace(TINY, layers=2), 64, seed=0)
    settings = Settings(steps=300, rows=8, micro_rows=8, warm_up=10, learning_rate=2e-2)
    train(model, only_repeats, settings, tmp_path / "c.pt", report=lambda p: losses.append(p.loss))
    assert losses[0] > 3.5
    assert np.mean(losses[-10:]) < 1.0


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_demo_loop import trained, SETTINGS
def report(progress):
    print(progress.step, flush=True)
trained(Path({folder!r}), checkpoint_every=0.0, report=report)
"""


def test_kill_and_continue(tmp_path: Path, uninterrupted: torch.Tensor) -> None:
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) == 6:
                child.kill()
    assert child.returncode != 0
    left = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]["step"]
    assert 5 <= left < SETTINGS.steps
    assert torch.equal(trained(tmp_path), uninterrupted)
    assert [file.name for file in tmp_path.iterdir() if not file.name.endswith(".partial")] == ["checkpoint.pt"]
