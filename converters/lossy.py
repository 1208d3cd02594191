"""What a target cannot express of a `RopeScaling`: refused unless the user allows it, never dropped
silently.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from longrope_export.errors import LossyTargetError
from longrope_export.scaling import RopeScaling

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def gguf_losses(scaling: RopeScaling, *, static: bool = False) -> list[str]:
    """What no GGUF runtime will apply of `scaling`, one sentence each; `static`: with one set for every length."""
    one_set = static and scaling.long_factor != scaling.short_factor
    return (
        (["llama.cpp will use the long factors in short contexts as well: one set for every length"] if one_set else [])
        + _start_token_losses(scaling, "llama.cpp")
        + _attention_losses(scaling, "llama.cpp")
        + _set_losses(scaling)
    )


def hf_losses(scaling: RopeScaling) -> list[str]:
    """What stock transformers will not apply of `scaling`; `longrope_export.load` applies all of it."""
    return (
        _start_token_losses(scaling, "transformers") + _attention_losses(scaling, "transformers") + _set_losses(scaling)
    )


def gguf_notes(scaling: RopeScaling, *, static: bool = False, folded: bool = False, since: str = "") -> list[str]:
    """How llama.cpp applies `scaling` differently from transformers although nothing is lost.

    `static`, `folded`: as in `scaling_entries`; `since`: the first builds that load such a file (default: of a llama).
    """
    window = scaling.original_max_position_embeddings
    switches = not scaling.is_static and not static
    notes = []
    if switches:
        notes.append(
            f"llama.cpp chooses by the allocated context, not by the prompt: any -c above {window} uses "
            "the long factors for short prompts too"
        )
    if window % 256 and switches:
        notes.append(f"llama.cpp pads -c to a multiple of 256, so -c {window} already uses the long factors")
    if scaling.max_position_embeddings == window and not static:
        notes.append(f"the window does not grow beyond {window}, so servers never reach the long factors")
    if scaling.long_attention_factor != 1.0 and not folded:
        notes.append(
            "keep context shift off (llama.cpp --no-context-shift; it is on in Ollama): a shift multiplies "
            "cached keys by the attention factor again"
        )
    usual = "2026-03-29 (pull request 21150), Ollama since 2026-05-29"
    notes.append(f"llama.cpp applies these factors since {since or usual}")
    return notes


def one_set_record(scaling: RopeScaling) -> RopeScaling:
    """The record of a target that holds the long set only: a file says what it does."""
    return replace(
        scaling, short_factor=scaling.long_factor, short_attention_factor=scaling.long_attention_factor,
        short_start_tokens=scaling.long_start_tokens, sets={},
    )  # fmt: skip


def undone_losses(existing: npt.NDArray[np.float64], scaling: RopeScaling, source: str) -> list[str]:
    """One sentence when the record undoes half of `existing`, the divisors that the model applies at every
    length.

    A record holds total divisors, so this is one that was made without looking at the model's own scaling.
    """
    import numpy as np

    strength = float(np.log(existing).sum())
    if strength <= 0 or float(np.log(np.asarray(scaling.short_factor)).sum()) >= 0.5 * strength:
        return []
    return [
        f"the model's own factors ({source}, up to {existing.max():g}) are not in the record's short factors; "
        "compose them with `longrope extend`"
    ]


def refuse_losses(target: str, losses: list[str], *, allow_lossy: bool) -> list[str]:
    """Return `losses` when they are allowed or there are none; raises `LossyTargetError` naming them
    otherwise.
    """
    if losses and not allow_lossy:
        raise LossyTargetError(
            f"{target} cannot hold this record: {'; '.join(losses)} (--allow-lossy writes it anyway)"
        )
    return losses


def _start_token_losses(scaling: RopeScaling, runtime: str) -> list[str]:
    count = max(scaling.long_start_tokens, scaling.short_start_tokens)
    return [f"{runtime} will rescale the first {count} positions too (n̂ = {count})"] if count else []


def _attention_losses(scaling: RopeScaling, runtime: str) -> list[str]:
    long, short = scaling.long_attention_factor, scaling.short_attention_factor
    if long == short:
        return []
    return [f"{runtime} will use the long attention factor {long:.6g} in short contexts as well, not {short:.6g}"]


def _set_losses(scaling: RopeScaling) -> list[str]:
    if not scaling.sets:
        return []
    lengths = ", ".join(map(str, scaling.sets))
    return [f"the further short sets for lengths {lengths} apply in longrope_export.load only"]
