"""Denormal floats are zero while a search or a training runs, and what they are otherwise."""

from __future__ import annotations

import subprocess
import sys

import pytest
from flushing import flushes

from longrope_export.denormals import flushed_denormals


def test_they_are_flushed_inside_and_as_before_outside() -> None:
    assert not flushes()
    with flushed_denormals():
        assert flushes()
        with flushed_denormals():
            pass
        assert flushes()
    assert not flushes()
    with pytest.raises(ZeroDivisionError), flushed_denormals():
        raise ZeroDivisionError
    assert not flushes()


def test_threads_that_begin_meanwhile_flush_too() -> None:
    code = (
        "import torch; from longrope_export.denormals import flushed_denormals; torch.set_num_threads(4)\n"
        "with flushed_denormals(): print(bool((torch.full((1 << 24,), 2e-38) * 0.25 == 0).all()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "True"
