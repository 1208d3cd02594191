"""What the doctor's checks ask of one config.json: its longrope parameters, wherever they stand, none trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longrope_export.converters.doctor.findings import ConfigChanges, Finding
from longrope_export.converters.doctor.hf_rules import HF_RULES
from longrope_export.errors import LongRopeError, ScalingError, UnsupportedModelError
from longrope_export.families import FULL, Family, family_for_config, head_dim, rotary_dim
from longrope_export.formats.hf_config import LONGROPE_TYPES
from longrope_export.formats.hf_scaling import own_record
from longrope_export.rope.formulas import longrope_attention_factor
from longrope_export.scaling import RopeScaling

ORIGINAL = "original_max_position_embeddings"
WINDOW = "max_position_embeddings"
_PLACES = ("rope_scaling", "rope_parameters")


class ConfigFacts:
    """One parsed config.json, read once for all checks."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path, self.config = path, config
        inner = config.get("text_config")
        self.prefix = "text_config/" if isinstance(inner, Mapping) else ""
        text = {"model_type": config.get("model_type"), **inner} if isinstance(inner, Mapping) else config
        self.family = _family(text.get("model_type"))
        defaults = {} if self.family is None else self.family.defaults
        self.values = {**defaults, **{key: value for key, value in text.items() if value is not None}}
        self.places = self._places()
        self.rope: Mapping[str, Any] = next(iter(self.places.values()), {})
        self.is_longrope = self.rope_type in LONGROPE_TYPES or "long_factor" in self.rope

    def _places(self) -> dict[str, Mapping[str, Any]]:
        """Path in config.json → the parameters of full attention there; transformers' choice comes first."""
        found: dict[str, Mapping[str, Any]] = {}
        for name in _PLACES:
            value = self.values.get(name)
            if isinstance(value, Mapping) and isinstance(value.get(FULL), Mapping):
                found[f"{self.prefix}{name}/{FULL}"] = value[FULL]
            elif isinstance(value, Mapping) and value:
                found[f"{self.prefix}{name}"] = value
        return found

    @property
    def rope_type(self) -> str | None:
        """`rope_type` or its old name `type`, when it is a string."""
        value = self.rope.get("rope_type", self.rope.get("type"))
        return value if isinstance(value, str) else None

    def count(self, values: Mapping[str, Any], key: str) -> int | None:
        """A whole number above 0, or None."""
        value = values.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    def real(self, key: str) -> float | None:
        """A finite number above 0 among the rope parameters, or None."""
        value = self.rope.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            return None
        return float(value)

    @property
    def original(self) -> int | None:
        """L: the top-level value, which overrides the one beside the factors."""
        return self.count(self.values, ORIGINAL) or self.count(self.rope, ORIGINAL)

    @property
    def window(self) -> int | None:
        """L'."""
        return self.count(self.values, WINDOW)

    @property
    def ratio(self) -> float | None:
        """L'/L, or None."""
        return self.window / self.original if self.window and self.original else None

    @property
    def formula(self) -> float | None:
        """√(1 + ln s/ln L) with s the windows' ratio, which vLLM and the converters use."""
        if self.ratio is None or self.original is None or self.original < 2:
            return None
        return longrope_attention_factor(self.ratio, self.original)

    @property
    def attention_factor(self) -> float | None:
        """What transformers multiplies cos and sin by, or None."""
        factor = self.real("factor") or self.ratio
        if self.real("attention_factor") is not None:
            return self.real("attention_factor")
        if factor is None or self.original is None or self.original < 2:
            return None
        return longrope_attention_factor(factor, self.original)

    def factors(self, name: str) -> list[float] | None:
        """One list of factors as it stands, or None when it is no list of numbers."""
        value = self.rope.get(name)
        if not isinstance(value, list) or not value:
            return None
        numbers = [item for item in value if isinstance(item, (int, float)) and not isinstance(item, bool)]
        return (
            [float(item) for item in numbers] if len(numbers) == len(value) and max(map(abs, numbers)) < 1e30 else None
        )

    @property
    def pairs(self) -> int | None:
        """Factors that the model needs, or None when the config does not say."""
        if self.family is None or not (
            self.count(self.values, "hidden_size") and self.count(self.values, "num_attention_heads")
        ):
            return None
        part = self.rope.get("partial_rotary_factor", self.values.get("partial_rotary_factor") or 1.0)
        if not isinstance(part, (int, float)) or not math.isfinite(part):
            return None
        try:
            return rotary_dim(self.family, head_dim(self.family, self.values), part) // 2
        except (UnsupportedModelError, TypeError, ValueError):
            return None

    @property
    def record(self) -> RopeScaling | str | None:
        """Our own record in the config; the reason when it is not valid; None without one."""
        try:
            return own_record(self.config)
        except (ScalingError, LongRopeError) as error:
            return str(error)

    def everywhere(self, **entries: Any) -> ConfigChanges:
        """Set `entries` in every place that holds rope parameters."""
        return ConfigChanges({f"{place}/{key}": value for place in self.places for key, value in entries.items()})

    def nowhere(self, *keys: str) -> ConfigChanges:
        """Remove `keys` from every place that holds rope parameters."""
        return ConfigChanges(removed=frozenset(f"{place}/{key}" for place in self.places for key in keys))

    def finding(
        self, name: str, detail: str, advice: str, changes: ConfigChanges | None = None, severity: str = ""
    ) -> Finding:
        """A finding that `changes` mends, or that nothing here mends."""
        return Finding(HF_RULES[name], str(self.path), detail, advice, changes, severity=severity)

    def record_finding(self, name: str, detail: str, severity: str = "") -> Finding:
        """A finding that embedding a record mends."""
        advice = "embed a record: longrope.json, or the config.json of the model as it was published"
        return Finding(HF_RULES[name], str(self.path), detail, advice, None, True, severity)


def _family(model_type: Any) -> Family | None:
    try:
        return family_for_config(model_type)
    except UnsupportedModelError:
        return None
