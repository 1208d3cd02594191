"""What fixes the answers of an evaluation, for its journal's first line: a run that differs in one of these is refused."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from longrope_export.evaluation.documents import data_hash
from longrope_export.fingerprint import fingerprint
from longrope_export.versions import versions

if TYPE_CHECKING:
    from longrope_export.evaluation.run import Plan

_NUMERICAL = ("longrope-export", "torch", "transformers", "xllamacpp")


def evaluation_header(plan: Plan) -> dict[str, Any]:
    """Models, rows, data, options and versions of a run, JSON-ready, under the names of the options.

    What follows from the options (records of methods, the texts' tokens) stands after them: the option is named first.
    """
    options, request = plan.options, plan.request
    return {
        "models": [fingerprint(path) for path in options.models],
        "tasks": [task.name for task in plan.tasks],
        "lengths": list(request.lengths),
        **{name: request.options[name] for name in sorted(request.options)},
        "seed": request.seed,
        "switch": options.switch,
        "context": options.context,
        "to": options.target,
        "position-offset": options.position_offset,
        "prefill-chunk": options.prefill_chunk,
        "runtime": options.runtime,
        "dtype": options.dtype,
        "threads": options.threads,
        "rows": {row.name: _record_hash(row.scaling) for row in plan.rows},
        "data": [f"{path.name}, {path.stat().st_size} bytes" for path in request.data],
        "documents": data_hash(request.documents) if request.documents else None,
        "versions": {name: value for name, value in versions().items() if name in _NUMERICAL},
    }


def _record_hash(scaling: Any) -> str | None:
    if scaling is None:
        return None
    # Where a record came from does not change a number.
    numbers = {key: value for key, value in scaling.to_dict().items() if key != "provenance"}
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()
