"""What the doctor's checks ask of one GGUF file: keys, rope tensors and our record, none of them trusted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope_export.converters.doctor.findings import Finding
from longrope_export.converters.doctor.gguf_rules import GGUF_RULES
from longrope_export.converters.gguf.rewrite import GgufChanges
from longrope_export.converters.gguf.scaling_keys import scaling_changes
from longrope_export.errors import ScalingError, UnsupportedModelError
from longrope_export.formats.ggml_types import type_name
from longrope_export.formats.gguf_header import STRING, GgufHeader, TensorInfo
from longrope_export.formats.gguf_scaling import LONG_TENSOR, RECORD_KEY, SHORT_TENSOR, STATIC_TENSOR
from longrope_export.formats.gguf_tensors import read_tensor
from longrope_export.gguf_architectures import GGUF_ARCHITECTURES, GgufArchitecture
from longrope_export.scaling import MAX_ROTARY_DIM, RopeScaling, to_float32

_F32 = "F32"


@dataclass(frozen=True)
class FactorTensor:
    """A factor tensor as it stands in the file; `values` float32 [n], None when it is no readable vector."""

    info: TensorInfo
    values: npt.NDArray[np.float32] | None

    @property
    def is_float32(self) -> bool:
        """Whether its type is the one that llama.cpp takes."""
        return type_name(self.info.ggml_type) == _F32

    @property
    def is_valid(self) -> bool:
        """Whether all values are finite and above 0."""
        return self.values is not None and bool((np.isfinite(self.values) & (self.values > 0)).all())

    def as_factors(self) -> tuple[float, ...]:
        """The values as Python floats; () when they could not be read."""
        return () if self.values is None else tuple(float(value) for value in self.values)


class GgufFacts:
    """One GGUF model file, read once for all checks."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        name = header.get("general.architecture")
        self.architecture = name if isinstance(name, str) else ""
        self.row: GgufArchitecture | None = GGUF_ARCHITECTURES.get(self.architecture)
        self.long = self._factor_tensor(LONG_TENSOR)
        self.short = self._factor_tensor(SHORT_TENSOR)
        self.static = self._factor_tensor(STATIC_TENSOR)

    def _factor_tensor(self, name: str) -> FactorTensor | None:
        info = self.header.tensor(name)
        if info is None:
            return None
        vector = len(info.shape) >= 1 and set(info.shape[1:]) <= {1} and 1 <= info.shape[0] <= MAX_ROTARY_DIM
        try:
            return FactorTensor(info, read_tensor(self.header, name).reshape(-1) if vector else None)
        except UnsupportedModelError:
            return FactorTensor(info, None)

    @property
    def factor_tensors(self) -> list[FactorTensor]:
        """Those of the long and the short factor tensor that are there."""
        return [tensor for tensor in (self.long, self.short) if tensor is not None]

    @property
    def applies_factors(self) -> bool:
        """Whether factor tensors are there and llama.cpp's architecture has a place for them."""
        return bool(self.factor_tensors) and self.row is not None and self.row.honours_factors

    @property
    def is_static(self) -> bool:
        """Whether long and short factors are the same, so that no switch is seen."""
        return bool(self.long and self.short and self.long.values is not None and self.short.values is not None
                    and np.array_equal(self.long.values, self.short.values))  # fmt: skip

    def key(self, name: str) -> str:
        """Full name of one of the architecture's keys."""
        return f"{self.architecture}.{name}"

    def value(self, name: str) -> Any:
        """Value of one of the architecture's keys; None when absent or an array."""
        return self.header.get(self.key(name))

    def count(self, name: str) -> int | None:
        """A whole number above 0 of the architecture's keys, or None."""
        value = self.value(name)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    def has(self, name: str) -> bool:
        """Whether the architecture's key is there."""
        return self.key(name) in self.header.metadata

    @property
    def scaling_type(self) -> str | None:
        """`rope.scaling.type`, "" when it is no string, None when absent."""
        entry = self.header.metadata.get(self.key("rope.scaling.type"))
        return None if entry is None else entry.value if entry.value_type == STRING else ""

    @property
    def head_dim(self) -> int | None:
        """Values per head: the key, or width over heads."""
        width, heads = self.count("embedding_length"), self.count("attention.head_count")
        return self.count("attention.key_length") or (width // heads if width and heads else None)

    @property
    def pairs(self) -> int | None:
        """Factors that llama.cpp expects, or None when the file does not say."""
        count = self.count("rope.dimension_count")
        scale = 2 * (1 if self.row is None else self.row.dimension_count_scale)
        if count is not None:
            return count // scale
        return None if self.head_dim is None else self.head_dim // 2

    @cached_property
    def embedded(self) -> RopeScaling | str | None:
        """Our own record in the file; the reason when it is not valid; None without one."""
        if RECORD_KEY not in self.header.metadata:
            return None
        text = self.header.get(RECORD_KEY)
        try:
            return RopeScaling.from_json(text) if isinstance(text, str) else "it is not a string"
        except ScalingError as error:
            return str(error)

    @cached_property
    def record(self) -> RopeScaling | None:
        """Our own record, when the factor tensors that are there and sound hold its bits."""
        record = self.embedded
        if not isinstance(record, RopeScaling) or (self.pairs and record.rotary_dim != 2 * self.pairs):
            return None
        for tensor, factors in ((self.long, record.long_factor), (self.short, record.short_factor)):
            if tensor is not None and tensor.is_float32 and tensor.is_valid and tensor.as_factors() != factors:
                return None
        return record

    def real(self, name: str) -> float | None:
        """A float of the architecture's keys, or None."""
        value = self.value(name)
        return to_float32(value) if isinstance(value, float) and abs(value) < 1e38 else None

    def finding(
        self, name: str, detail: str, advice: str, changes: GgufChanges | None = None, severity: str = ""
    ) -> Finding:
        """A finding that `changes` mends, or that nothing here mends."""
        return Finding(GGUF_RULES[name], str(self.header.path), detail, advice, changes, severity=severity)

    def record_finding(self, name: str, detail: str, severity: str = "") -> Finding:
        """A finding that embedding a record mends: the file's own, or the one of `--scaling`."""
        possible = self.row is not None and self.row.honours_factors
        rule, path = GGUF_RULES[name], str(self.header.path)
        if not possible:
            advice = "the source checkpoint: `longrope export` writes an architecture that applies factors"
            return Finding(rule, path, detail, advice, severity=severity)
        if self.record is not None:
            changes = scaling_changes(self.header, self.record)
            return Finding(rule, path, detail, "write the file's own record again", changes, True, severity)
        advice = "embed a record: the source model's longrope.json or config.json"
        return Finding(rule, path, detail, advice, None, True, severity)
