"""The finished folder: the model with its record in the config, longrope.json, what was done, and the manifest last."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longrope_export.errors import OutputError
from longrope_export.files import MANIFEST, check_manifest, output_errors, sync_folder, write_manifest, write_text
from longrope_export.formats.hf_scaling import RECORD_KEY
from longrope_export.rotary import core_of
from longrope_export.scaling import RopeScaling
from longrope_export.training.checkpoints import check_identity, is_full
from longrope_export.training.reporting import LOG

RECORD, SUMMARY, WORK = "longrope.json", "finetune.json", "training"
CHECKPOINTS = "checkpoints"
_PARTIAL = "output.partial"


def check_folder(out: Path, known: Mapping[str, Any]) -> None:
    """Raise `OutputError` when `out` holds something else than a run, `StaleStateError` when that is another one.

    `known` is what can be known of the identity without reading texts.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; name a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if (out / MANIFEST).exists():
        check_identity(_read_summary(out)["identity"], known, out)
    elif not (out / WORK).is_dir():
        raise OutputError(f"{out} is not empty and holds no run to continue; name another --out")


def finished(out: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The summary of the run that is finished in `out`, None when there is none; raises as `check_folder`.

    Raises `InputFileError` when its files are damaged.
    """
    if not (out / MANIFEST).exists():
        return None
    check_manifest(out)
    summary = _read_summary(out)
    check_identity(summary["identity"], identity, out)
    return summary


def _read_summary(out: Path) -> dict[str, Any]:
    try:
        summary = json.loads((out / SUMMARY).read_text("utf-8"))
        if isinstance(summary, dict) and isinstance(summary["identity"], dict):
            return summary
    except (OSError, ValueError, KeyError):
        pass
    raise OutputError(f"{out} is not empty and holds no run to continue; name another --out")


@contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """Yield a folder inside `out` to write into; its files then move to `out`, the manifest last of all.

    The run's own files (checkpoints, tokens) are removed after that. Raises `OutputError` when the disk is full.
    """
    partial = out / WORK / _PARTIAL
    try:
        with output_errors(out):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            if (out / LOG).is_file():
                shutil.copyfile(out / LOG, partial / LOG)
            _share(partial)
            write_manifest(partial)
            names = sorted(path.name for path in partial.iterdir() if path.name != MANIFEST)
            for name in [*names, MANIFEST]:
                _move(partial / name, out / name)
            sync_folder(out)
    except Exception as error:
        if isinstance(error, OutputError) or not is_full(error):
            raise
        raise OutputError(
            f"the disk is full: {out} was not written; free some room and run the same command"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    remove_work(out)


def _share(folder: Path) -> None:
    """Give every file the mode of new ones: safetensors are written for their owner only."""
    probe = folder / SUMMARY
    mode = probe.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _move(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)


def remove_work(out: Path) -> None:
    """Remove what only an unfinished run needs."""
    shutil.rmtree(out / WORK, ignore_errors=True)


def write_model(folder: Path, model: Any, tokenizer: Any, scaling: RopeScaling, summary: Mapping[str, Any]) -> None:
    """Write `model` (in memory, merged) with its tokenizer, record and summary."""
    core = core_of(model)
    setattr(core.config, RECORD_KEY, scaling.to_dict())
    core.save_pretrained(folder)
    if 0 < tokenizer.model_max_length < scaling.max_position_embeddings:
        tokenizer.model_max_length = scaling.max_position_embeddings
    tokenizer.save_pretrained(folder)
    write_text(folder / RECORD, scaling.to_json())
    write_text(folder / SUMMARY, json.dumps(dict(summary), indent=2) + "\n")
