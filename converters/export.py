"""One model and one record as a finished folder: transformers' files, a GGUF, or both."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from longrope_export.converters.gguf.checks import check_patchable
from longrope_export.converters.gguf.conversion import plan_conversion
from longrope_export.converters.gguf.convert import write_conversion
from longrope_export.converters.gguf.patch import patch_gguf
from longrope_export.converters.hf_folder import gguf_to_hf_folder, write_hf_folder
from longrope_export.converters.hf_profiles import DEFAULT
from longrope_export.files import atomic_folder, write_text
from longrope_export.formats.gguf_shards import read_gguf
from longrope_export.formats.records import RECORD_FILE
from longrope_export.scaling import RopeScaling


@dataclass(frozen=True)
class ExportResult:
    """What was written: the folder, the GGUF inside it (or None), and what its runtimes will not apply."""

    folder: Path
    gguf: Path | None
    lossy: list[str]


def export_model(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    scaling: RopeScaling,
    *,
    dtype: str | None = None,
    gguf: bool = True,
    hf: bool = True,
    profile: str = DEFAULT,
    allow_lossy: bool = False,
) -> ExportResult:
    """Write the folder `target` from an HF folder or a GGUF file and one record.

    It holds transformers' files (unless `hf` is False) and `<model>.gguf` (unless `gguf` is False): a GGUF
    source is patched, its weights untouched, and dequantised to `dtype` (default f32) for transformers; an HF
    source keeps its tensors and is converted to `dtype` (default f16) for the GGUF. `profile`: for whom config.json is
    written (`hf_profiles`). Everything is checked
    before anything is written. Raises as `patch_gguf`, `convert_to_gguf` and `write_hf_folder`.
    """
    path, folder = Path(source), Path(target)
    name = f"{path.resolve().name}.gguf" if path.is_dir() else path.name
    write, losses = (_from_folder if path.is_dir() else _from_gguf)(path, name, scaling, dtype, gguf, allow_lossy)
    if not hf:
        with atomic_folder(folder) as partial:
            write(partial)
            write_text(partial / RECORD_FILE, scaling.to_json())
    elif path.is_dir():
        losses += write_hf_folder(path, folder, scaling, profile=profile, allow_lossy=allow_lossy, add=write)
    else:
        losses += gguf_to_hf_folder(
            path, folder, scaling, dtype=dtype or "f32", profile=profile, allow_lossy=allow_lossy, add=write
        )
    return ExportResult(folder, folder / name if gguf else None, list(dict.fromkeys(losses)))


Writer = Callable[[Path], None]


def _from_folder(
    path: Path, name: str, scaling: RopeScaling, dtype: str | None, gguf: bool, allow_lossy: bool
) -> tuple[Writer, list[str]]:
    if not gguf:
        return _nothing, []
    plan = plan_conversion(path, scaling, dtype=dtype or "f16", allow_lossy=allow_lossy)
    return lambda partial: write_conversion(plan, partial / name), list(plan.losses)


def _from_gguf(
    path: Path, name: str, scaling: RopeScaling, dtype: str | None, gguf: bool, allow_lossy: bool
) -> tuple[Writer, list[str]]:
    if not gguf:
        return _nothing, []
    losses = check_patchable(read_gguf(path), scaling, allow_lossy=allow_lossy)

    def write(partial: Path) -> None:
        patch_gguf(path, partial / name, scaling, allow_lossy=allow_lossy)

    return write, losses


def _nothing(partial: Path) -> None:
    pass
