"""`RopeScaling`: the one record that search, training, loaders and file formats pass around."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from longrope_export.errors import ScalingError

FORMAT = "longrope-export/1"
MAX_LENGTH = 2**31 - 1
MAX_ROTARY_DIM = 4096
# Parsed JSON can take sixty times its text, and a record may come from a stranger.
MAX_JSON_CHARACTERS = 1 << 18

Factors = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How one model's RoPE frequencies are rescaled for long and for short sequences.

    `long_factor` and `short_factor` hold `rotary_dim // 2` **total** divisors λ of the unscaled inverse frequencies
    θ^(−2i/d) (LongRoPE, arXiv 2402.13753, eq. 2), also for a model that already carried another scaling. The set for
    long sequences applies where the length exceeds `original_max_position_embeddings` (L); both attention factors
    multiply cos and sin at every position. Positions below `*_start_tokens` (n̂) keep the original frequencies.
    `sets` holds further short sets `{length: factors}` that only the reference loader uses. All reals are rounded to
    float32 so that every file format holds the same bits.

    Raises `ScalingError` when a length, a factor or a number of factors is not valid.
    """

    rope_theta: float
    rotary_dim: int
    original_max_position_embeddings: int
    max_position_embeddings: int
    long_factor: Factors
    short_factor: Factors = ()
    long_attention_factor: float = 1.0
    short_attention_factor: float = 1.0
    long_start_tokens: int = 0
    short_start_tokens: int = 0
    sets: Mapping[int, Factors] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_integer("rotary_dim", self.rotary_dim, 2, MAX_ROTARY_DIM)
        if self.rotary_dim % 2:
            raise ScalingError(f"rotary_dim is {self.rotary_dim}; it must be even")
        _check_integer("original_max_position_embeddings", self.original_max_position_embeddings, 2, MAX_LENGTH)
        _check_integer(
            "max_position_embeddings", self.max_position_embeddings, self.original_max_position_embeddings, MAX_LENGTH
        )
        pairs = self.rotary_dim // 2
        short = self.short_factor if len(self.short_factor) else (1.0,) * pairs
        self._set("rope_theta", _positive("rope_theta", self.rope_theta))
        self._set("long_factor", _factors("long_factor", self.long_factor, pairs))
        self._set("short_factor", _factors("short_factor", short, pairs))
        for name in ("long_attention_factor", "short_attention_factor"):
            self._set(name, _positive(name, getattr(self, name)))
        for name in ("long_start_tokens", "short_start_tokens"):
            _check_integer(name, getattr(self, name), 0, MAX_LENGTH)
        self._set("sets", MappingProxyType(_sets(self.sets, pairs)))
        self._set("provenance", MappingProxyType(_json_object("provenance", self.provenance)))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __reduce__(self) -> tuple[Any, ...]:
        return RopeScaling.from_json, (self.to_json(),)

    @property
    def factor(self) -> float:
        """Extension ratio s = L'/L."""
        return self.max_position_embeddings / self.original_max_position_embeddings

    @property
    def is_static(self) -> bool:
        """Whether the same rotation applies at every length (short set and long set are equal)."""
        return (
            self.long_factor == self.short_factor
            and self.long_attention_factor == self.short_attention_factor
            and self.long_start_tokens == self.short_start_tokens
            and not self.sets
        )

    def check_model(self, rotary_dim: int, rope_theta: float) -> None:
        """Raise `ScalingError` when the record is for another rotary_dim or RoPE base than a model's."""
        if self.rotary_dim != rotary_dim:
            raise ScalingError(
                f"the scaling has {self.rotary_dim // 2} factors (rotary_dim {self.rotary_dim}), but the model rotates "
                f"{rotary_dim} values a head; it was made for another model"
            )
        if self.rope_theta != to_float32(rope_theta):
            raise ScalingError(
                f"the scaling is for rope_theta {self.rope_theta:g}, but the model has {rope_theta:g}; "
                "it was made for another model"
            )

    def with_provenance(self, **entries: Any) -> RopeScaling:
        """Copy with `entries` added to the provenance."""
        return replace(self, provenance={**self.provenance, **entries})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form of the record, with its format version first."""
        values: dict[str, Any] = {"format": FORMAT}
        for entry in fields(self):
            value = getattr(self, entry.name)
            values[entry.name] = list(value) if isinstance(value, tuple) else value
        values["sets"] = {str(length): list(factors) for length, factors in sorted(self.sets.items())}
        values["provenance"] = dict(self.provenance)
        return values

    def to_json(self) -> str:
        """The record as one JSON document; `from_json` gives an equal record back."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        if len(text) > MAX_JSON_CHARACTERS:
            raise ScalingError(f"the scaling record would have {len(text):,} characters; shorten its provenance")
        return text

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RopeScaling:
        """Build the record from `to_dict`'s form.

        Raises `ScalingError` for another format version, unknown or missing keys, or invalid values.
        """
        if not isinstance(values, Mapping):
            raise ScalingError("a scaling record must be a JSON object")
        if values.get("format") != FORMAT:
            raise ScalingError(f"the scaling record has format {values.get('format')!r}; this version reads {FORMAT!r}")
        known = {entry.name for entry in fields(cls)}
        given = {key: value for key, value in values.items() if key != "format"}
        if unknown := sorted(set(given) - known):
            raise ScalingError(f"the scaling record has unknown keys: {', '.join(map(str, unknown))[:200]}")
        try:
            return cls(**given)
        except TypeError as error:
            raise ScalingError(f"the scaling record is incomplete: {error}") from None

    @classmethod
    def from_json(cls, text: str) -> RopeScaling:
        """Build the record from `to_json`'s text.

        Raises `ScalingError` when the text is not JSON, has duplicate keys, or is not a valid record.
        """
        if len(text) > MAX_JSON_CHARACTERS:
            raise ScalingError(f"the scaling record has {len(text):,} characters; that is none")
        try:
            values = json.loads(text, object_pairs_hook=_no_duplicates)
        except ScalingError:
            raise
        except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
            raise ScalingError(f"the scaling record is not valid JSON: {error}") from None
        return cls.from_dict(values)


def to_float32(value: float) -> float:
    """Round to the nearest float32, returned as a Python float; raises `OverflowError` beyond its range."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _positive(name: str, value: Any) -> float:
    try:
        rounded = to_float32(float(value))
    except (TypeError, ValueError, OverflowError):
        raise ScalingError(f"{name} is {short_repr(value)}; it must be a finite float32 number") from None
    if not math.isfinite(rounded) or rounded <= 0.0 or isinstance(value, (bool, str, bytes)):
        raise ScalingError(f"{name} is {short_repr(value)}; it must be a number, finite and greater than 0")
    return rounded


def _factors(name: str, values: Sequence[float], pairs: int) -> Factors:
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        raise ScalingError(f"{name} must be a list of {pairs} numbers")
    if len(values) != pairs:
        raise ScalingError(f"{name} has {len(values)} values; the model's rotary_dim needs {pairs}")
    return tuple(_positive(f"{name}[{index}]", value) for index, value in enumerate(values))


def _sets(values: Any, pairs: int) -> dict[int, Factors]:
    if not isinstance(values, Mapping):
        raise ScalingError("sets must map a length to a list of factors")
    result: dict[int, Factors] = {}
    for key, factors in values.items():
        try:
            length = int(key)
        except (TypeError, ValueError):
            raise ScalingError(f"sets has the key {key!r}; it must be a length") from None
        _check_integer("a length in sets", length, 1, MAX_LENGTH)
        result[length] = _factors(f"sets[{length}]", factors, pairs)
    return dict(sorted(result.items()))


def _check_integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ScalingError(f"{name} is {short_repr(value)}; it must be a whole number")
    if not low <= value <= high:
        raise ScalingError(f"{name} is {short_repr(value)}; it must be from {low} to {high}")


def short_repr(value: Any) -> str:
    """`repr` of a stranger's value, cut for a message of one line."""
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number of over 30 digits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _json_object(name: str, value: Any) -> dict[str, Any]:
    try:
        text = json.dumps(dict(value), allow_nan=False, ensure_ascii=False)
        text.encode()  # a lone surrogate could be read, but never written
        copied = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ScalingError(f"{name} must be a JSON object: {error}") from None
    return dict(copied)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ScalingError("the scaling record has a duplicate key")
    return result
