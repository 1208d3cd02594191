"""What is trained: all weights, a LoRA, or a LoRA with the embeddings and norms (LongLoRA); and the plain model at the end."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from longrope_export.errors import LongRopeError, MissingDependencyError
from longrope_export.rotary import core_of, decoder_of, family_of

Train = Literal["full", "lora", "lora-plus"]

# LongLoRA (arXiv 2309.12307) adapts the attention's projections; families that fuse them name them otherwise.
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FUSED_PROJECTIONS = {"phi3": ("qkv_proj", "o_proj")}
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraOptions:
    """A LoRA's shape (LongLoRA's by default); no `targets` are the family's attention projections.

    A target is the last part of a linear layer's name inside the decoder (`q_proj`), or `all-linear` for every one.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()


def make_trainable(model: nn.Module, train: Train, lora: LoraOptions | None = None) -> Any:
    """`model` with what `train` names trainable and all else frozen; a PEFT model around it for both LoRA kinds.

    A tied lm_head stays tied. Raises `LongRopeError` for targets that do not exist, `MissingDependencyError` without peft.
    """
    if train == "full":
        return model.requires_grad_(True)
    lora = lora or LoraOptions()
    saved = embedding_and_norms(model) if train == "lora-plus" else []
    return add_lora(model, lora, target_names(model, lora.targets), saved)


def add_lora(model: Any, lora: LoraOptions, targets: Sequence[str], saved: Sequence[str]) -> Any:
    """A PEFT model that adapts the linear layers `targets` and trains copies of the modules `saved`, all by name."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MissingDependencyError('LoRA needs peft: pip install "longrope-export[train]"') from None
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha  # some readers want a whole number
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        modules_to_save=list(saved) or None,
        ensure_weight_tying=is_tied(model) and _embedding_name(model).endswith(tuple(saved)),
    )
    with _quiet():
        return get_peft_model(model, config)


def target_names(model: nn.Module, targets: Sequence[str] = ()) -> list[str]:
    """Names that PEFT takes for `targets` (the family's default where there are none).

    Raises `LongRopeError` that lists the linear layers of the model when some do not exist.
    """
    layers = linear_layers(model)
    chosen = targets or FUSED_PROJECTIONS.get(family_of(model).name, ATTENTION_PROJECTIONS)
    if ALL_LINEAR in chosen:
        chosen = tuple(layers)
    if missing := [name for name in chosen if name not in layers]:
        raise LongRopeError(
            f"{type(core_of(model)).__name__} has no linear layer {', '.join(missing)} to adapt; "
            f"it has {', '.join(layers)}"
        )
    return _short(model, list(chosen), [name for kind in chosen for name in layers[kind]])


def linear_layers(model: nn.Module) -> dict[str, list[str]]:
    """Full names of the decoder's linear layers by the last part of their names, in the model's order."""
    found: dict[str, list[str]] = {}
    for name, module in _in_decoder(model):
        if isinstance(module, nn.Linear):
            found.setdefault(name.rpartition(".")[2], []).append(name)
    return found


def embedding_and_norms(model: nn.Module) -> list[str]:
    """Names that PEFT takes for the input embedding and every norm of the decoder."""
    embedding = core_of(model).get_input_embeddings()
    full = [
        name for name, module in _in_decoder(model) if module is embedding or "norm" in type(module).__name__.lower()
    ]
    return _short(model, list(dict.fromkeys(name.rpartition(".")[2] for name in full)), full)


def _embedding_name(model: nn.Module) -> str:
    core = core_of(model)
    embedding = core.get_input_embeddings()
    return str(next(name for name, module in core.named_modules() if module is embedding))


def _in_decoder(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # Not in an image tower beside it, whose layers may have the same names.
    core = core_of(model)
    decoder = decoder_of(core)
    prefix = next(name for name, module in core.named_modules() if module is decoder)
    yield from decoder.named_modules(prefix=prefix)


def _short(model: nn.Module, kinds: list[str], full: list[str]) -> list[str]:
    """`kinds` where they name the modules `full` and no others, else `full`."""
    ends = tuple(f".{kind}" for kind in kinds)
    matched = [name for name, module in core_of(model).named_modules() if name.endswith(ends)]
    return kinds if sorted(matched) == sorted(full) else full


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are trained, by name; a tied one once."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def is_tied(model: Any) -> bool:
    """Whether lm_head's matrix is the input embedding's."""
    core = core_of(model)
    head, embedding = core.get_output_embeddings(), core.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def merge(model: Any, *, use_cache: bool | None = None) -> Any:
    """The plain transformers model: an adapter's weights added to the base's (in place), tied weights still tied.

    `use_cache` is put into its config (training turns it off). Raises `LongRopeError` when the merge gives weights that
    are not finite.
    """
    tied = is_tied(model)
    if hasattr(model, "merge_and_unload"):
        try:
            model = model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise LongRopeError(f"the adapter cannot be merged: {error}") from error
    if tied and not is_tied(model):
        raise LongRopeError("merging untied lm_head from the embedding; report this with the version of peft")
    if use_cache is not None:
        model.config.use_cache = use_cache
    return model.requires_grad_(True)


@contextmanager
def _quiet() -> Iterator[None]:
    # peft asks transformers for a name that it has deprecated.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield
