"""The main job: factors (closed-form or searched) → written files → proof; where the other rooms meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from longrope_export import __version__
from longrope_export.description import ModelDescription
from longrope_export.errors import OutputError, ScalingError, UnsupportedModelError
from longrope_export.files import atomic_folder, atomic_output, write_text
from longrope_export.formats.gguf_shards import extended_name
from longrope_export.formats.records import RECORD_FILE
from longrope_export.lengths import resolve_length
from longrope_export.rope.methods import Factors, method_scaling
from longrope_export.scaling import RopeScaling

if TYPE_CHECKING:
    from longrope_export.converters.card import CardContents

# Families that `converters.gguf.convert` turns into a GGUF.
CONVERTIBLE = ("llama", "mistral", "qwen2", "phi3", "granite")
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class OutputPlan:
    """Where an extended model goes: one GGUF file, or a folder with a GGUF, an HF model, or both."""

    target: Path
    gguf_name: str | None
    hf: bool

    @property
    def is_folder(self) -> bool:
        """Whether `target` is a folder (with record and card) and not a single GGUF file."""
        return self.hf or self.target.suffix.lower() != ".gguf"

    def check_free(self, *, overwrite: bool) -> None:
        """Raise `OutputError` before any work when the output is in the way."""
        if self.is_folder and self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            raise OutputError(f"{self.target} exists already and is not an empty folder; name another output")
        if not self.is_folder and self.target.exists() and not overwrite:
            raise OutputError(f"{self.target} exists already; name another output or pass --overwrite")


@dataclass(frozen=True, kw_only=True)
class Written:
    """What `write_extended` left: the files, and what they do not carry."""

    target: Path
    gguf: Path | None
    folder: Path | None
    lossy: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def length_name(length: int) -> str:
    """Short name of a length for file names: 32768 → `32k`, 2000 → `2000`."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def target_length(description: ModelDescription, to: str) -> int:
    """Tokens meant by `to` (`4x`, `32k`, `16384`); raises `ScalingError` when the window would not grow.

    The window is the declared one, also of a model that was extended before: a new scaling goes on top of that.
    """
    length = resolve_length(to, description.window)
    if length <= description.window:
        raise ScalingError(
            f"{to} is {length:,} tokens and {description.path} has {description.window:,} already; ask for more"
        )
    return length


def closed_form_scaling(
    description: ModelDescription,
    target: int,
    method: str,
    *,
    short: str | None = None,
    attention_factor: float | None = None,
    gguf: bool = False,
    **options: Any,
) -> RopeScaling:
    """Record of a closed-form extension of the described model to `target` tokens, on top of its present scaling.

    With `gguf`, an attention factor that llama.cpp would also apply to the original short factors is left at 1.0
    unless it was asked for. Raises `ScalingError` or `UnsupportedModelError` (a scaling that cannot be composed with).
    """
    if gguf and short == "original" and attention_factor is None:
        attention_factor = 1.0
    extra = options if attention_factor is None else {**options, "attention_factor": attention_factor}
    scaling = method_scaling(
        method,
        rope_theta=description.rope_theta,
        rotary_dim=description.rotary_dim,
        original_max_position_embeddings=description.window,
        max_position_embeddings=target,
        existing=existing_set(description),
        short=short,  # type: ignore[arg-type]
        **extra,
    )
    return scaling.with_provenance(model=Path(description.path).name, longrope_export=__version__)


def existing_set(description: ModelDescription) -> Factors | None:
    """The one set of divisors that the model applies now, or None where it is plain RoPE.

    Raises `UnsupportedModelError` when there is no single set to compose with: the model switches between a short and
    a long one, or its rope type has no list of factors.
    """
    import numpy as np

    from longrope_export.rope.methods import existing_from_scaling

    if description.scaling is not None:
        return existing_from_scaling(description.scaling)
    if description.rope_type == "default" and description.existing_factors is None:
        return None
    if description.existing_factors is None:
        raise UnsupportedModelError(
            f"{description.path} has rope type {description.rope_type!r}, which is not one list of factors; "
            "it cannot be extended on top"
        )
    present = Factors(np.array(description.existing_factors), description.existing_attention_factor)
    return None if present.is_identity else present


def plan_output(description: ModelDescription, target: int, out: Path | None, *, hf: bool, gguf: bool) -> OutputPlan:
    """Decide names and forms of the output. Raises `UnsupportedModelError` for a GGUF that cannot be written."""
    source = Path(description.path)
    if description.kind == "gguf":
        file = Path(extended_name(source, length_name(target)))
        return OutputPlan(target=out or Path(file.stem if hf else file), gguf_name=file.name, hf=hf)
    name = f"{source.resolve().name}-{length_name(target)}"
    family = description.family.name if description.family else "?"
    if gguf and family not in CONVERTIBLE:
        raise UnsupportedModelError(
            f"{source}: a GGUF is written for {', '.join(CONVERTIBLE)} models, not for {family}; pass --no-gguf"
        )
    if not hf:
        return OutputPlan(target=out or Path(f"{name}.gguf"), gguf_name=f"{name}.gguf", hf=False)
    return OutputPlan(target=out or Path(name), gguf_name=f"{name}.gguf" if gguf else None, hf=True)


def as_folder(plan: OutputPlan) -> OutputPlan:
    """The same output inside a folder, with record and card beside the GGUF."""
    return replace(plan, target=plan.target.with_suffix("")) if plan.target.suffix == ".gguf" else plan


def write_extended(
    description: ModelDescription,
    scaling: RopeScaling,
    plan: OutputPlan,
    *,
    card: CardContents | None = None,
    dtype: str = "f16",
    allow_lossy: bool = False,
    overwrite: bool = False,
    extra_files: Sequence[Path] = (),
    extra_texts: Mapping[str, str] = MappingProxyType({}),
) -> Written:
    """Write everything that `plan` names, from one record; a folder gets record, card, extras and manifest.

    Raises `LossyTargetError` for what a target cannot express (unless `allow_lossy`), `OutputError`, and whatever the
    source's readers raise. Nothing is left behind on an error.
    """
    from longrope_export.converters.lossy import gguf_notes

    notes = gguf_notes(scaling) if plan.gguf_name else []
    write_gguf = _gguf_writer(description, scaling, dtype, allow_lossy)
    if not plan.is_folder:
        lossy = write_gguf(plan.target, overwrite)
        return Written(target=plan.target, gguf=plan.target, folder=None, lossy=lossy, notes=notes)
    lossy = []

    def add(folder: Path) -> None:
        if plan.gguf_name:
            lossy.extend(write_gguf(folder / plan.gguf_name, False))
        for file in extra_files:
            write_text(folder / file.name, file.read_text())
        for name, text in extra_texts.items():
            write_text(folder / name, text)
        if card is not None:
            contents = replace(card, gguf=plan.gguf_name, folder=plan.hf, lossy=lossy, notes=notes)
            _write_card(folder, contents)

    lossy.extend(_write_folder(description, scaling, plan, add, allow_lossy))
    gguf = plan.target / plan.gguf_name if plan.gguf_name else None
    return Written(
        target=plan.target,
        gguf=gguf,
        folder=plan.target if plan.hf else None,
        lossy=list(dict.fromkeys(lossy)),
        notes=notes,
    )


def _gguf_writer(
    description: ModelDescription, scaling: RopeScaling, dtype: str, allow_lossy: bool
) -> Callable[[Path, bool], list[str]]:
    def write(path: Path, overwrite: bool) -> list[str]:
        if description.kind == "gguf":
            from longrope_export.converters.gguf.patch import patch_gguf

            return patch_gguf(description.path, path, scaling, allow_lossy=allow_lossy, overwrite=overwrite)
        from longrope_export.converters.gguf.convert import convert_to_gguf

        return convert_to_gguf(
            description.path, path, scaling, dtype=dtype, allow_lossy=allow_lossy, overwrite=overwrite
        )

    return write


def _write_folder(
    description: ModelDescription,
    scaling: RopeScaling,
    plan: OutputPlan,
    add: Callable[[Path], None],
    allow_lossy: bool,
) -> list[str]:
    from longrope_export.converters import hf_folder

    if plan.hf and description.kind == "gguf":
        return hf_folder.gguf_to_hf_folder(description.path, plan.target, scaling, allow_lossy=allow_lossy, add=add)
    if plan.hf:
        return hf_folder.write_hf_folder(description.path, plan.target, scaling, allow_lossy=allow_lossy, add=add)
    with atomic_folder(plan.target) as folder:
        write_text(folder / RECORD_FILE, scaling.to_json())
        add(folder)
    return []


def _write_card(folder: Path, contents: CardContents) -> None:
    """The card becomes README.md, its figures lie beside it; a card that the source had stays under its own name."""
    from longrope_export.converters.card import figure_file, model_card

    readme = folder / "README.md"
    if readme.exists():
        readme.replace(folder / "README.original.md")
    for picture in filter(None, (contents.figure, contents.factors)):
        with atomic_output(folder / figure_file(picture), overwrite=True) as file:
            file.write(picture.wide)
    write_text(readme, model_card(contents))
