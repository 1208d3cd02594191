"""The search on the trained demo model: better than YaRN on texts that it did not see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import longrope_export
from longrope_export.description import describe
from longrope_export.evaluation.documents import load_tokenizer, rows_from_texts
from longrope_export.evaluation.stdlib_corpus import Split, documents
from longrope_export.search.evaluator import Evaluator
from longrope_export.search.run import SearchConfig, numbers_of, search_factors
from longrope_export.search.space import Candidate, closed_form

DEMO = Path(longrope_export.__file__).parent / "demo_model"


def _rows(split: Split, tokenizer: Any, length: int, count: int) -> list[Any]:
    texts = ((document.name, document.text) for document in documents(split))
    return [row.token_ids for row in rows_from_texts(texts, tokenizer, length, count)]


def test_fifteen_evaluations_of_gradient_beat_yarn_on_unseen_text_at_2x() -> None:
    import torch

    from longrope_export.loader import load
    from longrope_export.search.executors import InProcess
    from longrope_export.search.objective import ModelObjective

    torch.set_num_threads(1)
    numbers = numbers_of(describe(DEMO), "2x")
    tokenizer, model = load_tokenizer(DEMO), load(DEMO, dtype=torch.float32)
    rows = _rows("search", tokenizer, numbers.target, 12) + _rows("validation", tokenizer, numbers.target, 2)
    config = SearchConfig(
        budget="15", documents=12, validation_documents=2, short="original", baselines=("yarn", "ntk")
    )
    found = search_factors(model, numbers, rows, config).scaling
    assert found.provenance["chosen"] == "searched"

    unseen = {"report": _rows("report", tokenizer, numbers.target, 4)}
    objective = ModelObjective(model, numbers, unseen)
    evaluator = Evaluator(InProcess(objective), {"report": 4})
    searched = Candidate(found.long_factor, found.long_attention_factor, found.long_start_tokens)
    losses = evaluator.mean_losses([searched, closed_form("yarn", numbers), numbers.unchanged()], "report")
    assert losses[0] < losses[1] < losses[2]
    assert np.isfinite(losses).all()
