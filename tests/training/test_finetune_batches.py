"""What reaches the model: token ids, positions, cos and sin of each token, labels, attention's pattern, trained weights."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_case import LONG_FACTOR, SHORT_FACTOR, TARGET, WINDOW, Case, Seen, session, write_texts
from flushing import flushes, noting

from longrope_export.errors import NumericalError
from longrope_export.training.finetune import run as run_finetune
from longrope_export.training.model import TrainedModel
from longrope_export.training.preview import preview


def trained(case: Case, out: Path, **changes: Any) -> Seen:
    with session(case.config(out, eval_documents=0, **changes)) as run:
        run.trainer.train()
        return run.seen


def rows(seen: Seen, name: str) -> list[list[int]]:
    return [row for inputs in seen.inputs for row in inputs[name].tolist()]


def documents(seen: Seen) -> list[tuple[int, ...]]:
    return [row for inputs in seen.inputs for row in inputs["longrope_pattern"].rows]


def jumps(positions: list[int]) -> int:
    return sum(after != before + 1 for before, after in pairwise(positions))


def check_rotation(seen: Seen, is_long: Any) -> None:
    """Every element of cos and sin, restated: m·cos(p / (λ_i θ^(2i/d))), the set by the document's length."""
    for inputs, cos, sin in zip(seen.inputs, seen.cos, seen.sin, strict=True):
        for row, lengths in enumerate(inputs["longrope_pattern"].rows):
            long = [is_long(length) for length in lengths for _ in range(length)]
            for token, position in enumerate(inputs["position_ids"][row].tolist()):
                factors, scale = (LONG_FACTOR, 1.25) if long[token] else (SHORT_FACTOR, 1.0)
                angles = [position / (factor * 10000.0 ** (2 * pair / 32)) for pair, factor in enumerate(factors)] * 2
                expected = torch.tensor(
                    [[scale * math.cos(angle) for angle in angles], [scale * math.sin(angle) for angle in angles]]
                )
                found = torch.stack([cos[row, token], sin[row, token]])
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def check_labels(seen: Seen) -> None:
    """Inside a stretch of text the next token is the label; nothing is scored at a document's end."""
    for ids, labels, lengths in zip(rows(seen, "input_ids"), rows(seen, "labels"), documents(seen), strict=True):
        ends = set((np.cumsum(lengths) - 1).tolist())
        for token, label in enumerate(labels):
            assert label == -100 if token in ends else label == ids[token + 1]


def test_full_rows_have_their_true_positions_and_the_long_factors(case: Case, tmp_path: Path) -> None:
    seen = trained(case, tmp_path, steps=1)
    assert [inputs["use_cache"] for inputs in seen.inputs] == [False] * 2
    assert rows(seen, "position_ids") == [list(range(TARGET))] * 4
    assert documents(seen) == [(TARGET,)] * 4
    assert seen.attention == {"longrope_full"}
    check_rotation(seen, lambda length: True)
    check_labels(seen)


def test_mixed_rows_choose_their_factors_document_by_document(case: Case, tmp_path: Path) -> None:
    seen = trained(case, tmp_path, steps=2, positions="mixed")
    lengths = documents(seen)
    assert {len(row) > 1 for row in lengths} == {True, False}
    expected = [[position for length in row for position in range(length)] for row in lengths]
    assert rows(seen, "position_ids") == expected
    check_rotation(seen, lambda length: length > WINDOW)
    check_labels(seen)


@pytest.mark.parametrize(
    ("changes", "most"),
    [({"positions": "pose"}, 1), ({"positions": "pose", "chunks": 3}, 2), ({"positions": "segments"}, 3),
     ({"positions": "segments", "alpha": 0.5}, 1), ({"positions": "random"}, WINDOW - 1)],
)  # fmt: skip
def test_schemes_reach_the_target_from_rows_of_the_window(
    case: Case, tmp_path: Path, changes: dict[str, Any], most: int
) -> None:
    seen = trained(case, tmp_path, steps=4, **changes)
    positions = rows(seen, "position_ids")
    assert {len(row) for row in positions} == {WINDOW}
    assert max(map(jumps, positions)) <= most
    assert max(map(jumps, positions)) > most // 2
    assert all(after > before for row in positions for before, after in pairwise(row))
    assert TARGET // 2 < max(row[-1] for row in positions) < TARGET
    check_rotation(seen, lambda length: True)


def test_text_offsets_take_the_chunks_from_different_places(case: Case, tmp_path: Path) -> None:
    together = rows(trained(case, tmp_path, steps=2, positions="pose"), "labels")
    apart = rows(trained(case, tmp_path, steps=2, positions="pose", text_offsets=True, length="20"), "labels")
    assert {row.count(-100) for row in together} == {1}
    assert max(row.count(-100) for row in apart) == 2


def test_length_is_the_rows(case: Case, tmp_path: Path) -> None:
    seen = trained(case, tmp_path, steps=1, length="2x")
    assert rows(seen, "position_ids") == [list(range(2 * WINDOW))] * 4


def test_batch_and_micro_batch(case: Case, tmp_path: Path) -> None:
    seen = trained(case, tmp_path, steps=2, batch=6, micro_batch=3)
    assert [inputs["input_ids"].shape[0] for inputs in seen.inputs] == [3] * 4


def test_the_order_of_rows_is_that_of_the_plan_and_the_seed(case: Case, tmp_path: Path) -> None:
    with session(case.config(tmp_path, steps=2)) as run:
        run.trainer.train()
        expected = [np.concatenate(run.corpus.plan.tokens(index)).tolist() for index in range(8)]
        assert rows(run.seen, "input_ids") == expected
    assert rows(trained(case, tmp_path, steps=2, seed=1), "input_ids") != expected


@pytest.mark.parametrize(("share", "kinds"), [(1.0, {True}), (0.0, {False}), (0.5, {True, False})])
def test_long_share(case: Case, tmp_path: Path, share: float, kinds: set[bool]) -> None:
    lengths = documents(trained(case, tmp_path, steps=2, positions="mixed", long_share=share))
    long = [row == (TARGET,) for row in lengths]
    assert set(long) == kinds
    assert sum(long) == share * 8


def test_packing_and_cut_longer_decide_the_short_rows(case: Case, tmp_path: Path) -> None:
    changes = {"steps": 2, "positions": "mixed", "long_share": 0.0}
    found = [
        documents(trained(case, tmp_path, **changes, **more))
        for more in ({}, {"packing": "first-fit"}, {"cut_longer": True})
    ]
    assert found[0] != found[1]
    assert WINDOW not in {length for row in found[0] for length in row}
    assert WINDOW in {length for row in found[2] for length in row}


@pytest.mark.parametrize(("changes", "ends"), [({}, (1, 2)), ({"bos": "never"}, (None, 2)), ({"eos": "never"}, (1, None)),
                                               ({"bos": "always", "eos": "always"}, (1, 2))])  # fmt: skip
def test_bos_and_eos(case: Case, tmp_path: Path, changes: dict[str, Any], ends: tuple[int | None, int | None]) -> None:
    changes = {"bos": "always", **changes}
    with session(case.config(tmp_path, steps=1, positions="mixed", long_share=0.0, **changes)) as run:
        store = run.corpus.plan.store
        first, last = store.read(0)[0], store.read(0)[-1]
        assert (first if first == 1 else None, last if last == 2 else None) == ends


def test_field_names_where_the_text_stands(case: Case, tmp_path: Path) -> None:
    text = "once upon a time " * 20
    lines = "".join(f'{{"story": "{number} {text}", "text": ""}}\n' for number in range(8))
    (tmp_path / "stories.jsonl").write_text(lines)
    changes = {"data": (tmp_path / "stories.jsonl",), "field": "story", "cache": None}
    with session(case.config(tmp_path / "out", **changes)) as run:
        assert len(run.corpus.plan.store) == 8


@pytest.mark.parametrize(
    ("changes", "group", "shifts"),
    [({"attention": "s2"}, 32, "fixed"), ({"attention": "s2", "group_share": 0.5}, 64, "fixed"),
     ({"attention": "scca", "shifts": "flow"}, 32, "flow")],
)  # fmt: skip
def test_attention_its_group_and_shifts(
    case: Case, tmp_path: Path, changes: dict[str, Any], group: int, shifts: str
) -> None:
    seen = trained(case, tmp_path, steps=1, **changes)
    assert seen.attention == {f"longrope_{changes['attention']}"}
    assert {(each["longrope_pattern"].group, each["longrope_pattern"].shifts) for each in seen.inputs} == {
        (group, shifts)
    }


def test_context_parallelism_leaves_attention_to_pytorch(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with session(case.config(tmp_path)) as run:
        documents = torch.zeros(1, TARGET, dtype=torch.long)
        assert run.trained.pattern(documents).rows == ((TARGET,),)
        monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "4")
        assert run.trained.pattern(documents) is None
        before = run.trained.model.config._attn_implementation
        monkeypatch.setattr(run.trained.model.config, "_attn_implementation", "sdpa")
        with run.trained.training():
            assert run.trained.model.config._attn_implementation == "sdpa" != before


@pytest.mark.parametrize(
    ("changes", "kinds", "rank"),
    [({"train": "lora"}, {"q_proj", "k_proj", "v_proj", "o_proj"}, 8),
     ({"train": "lora", "lora_rank": 2, "lora_targets": ("q_proj",)}, {"q_proj"}, 2),
     ({"train": "lora-plus"}, {"q_proj", "k_proj", "v_proj", "o_proj", "embed_tokens", "norm", "input_layernorm",
                               "post_attention_layernorm"}, 8)],
)  # fmt: skip
def test_what_is_trained(case: Case, tmp_path: Path, changes: dict[str, Any], kinds: set[str], rank: int) -> None:
    with session(case.config(tmp_path, steps=2, warmup=0, lora_alpha=32.0, lora_dropout=0.25, **changes)) as run:
        model = run.trained.model
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        run.trainer.train()
        changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
        assert {kind for name in changed for kind in name.split(".") if kind in kinds | {"lm_head", "mlp"}} == kinds
        assert all("lora_" in name or "modules_to_save" in name for name in changed)
        layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        assert (layer.lora_A["default"].weight.shape[0], layer.scaling["default"]) == (rank, 32.0 / rank)
        assert layer.lora_dropout["default"].p == 0.25


@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradient_checkpointing_computes_layers_twice(case: Case, tmp_path: Path, checkpointing: bool) -> None:
    seen = trained(case, tmp_path, steps=1, gradient_checkpointing=checkpointing)
    assert seen.layer_calls == (4 if checkpointing else 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_is_what_layers_compute_in(case: Case, tmp_path: Path, dtype: str) -> None:
    with session(case.config(tmp_path, steps=1, dtype=dtype)) as run:
        run.trainer.train()
        assert run.seen.layer_dtypes == {getattr(torch, dtype)}
        assert {weight.dtype for weight in run.trained.model.parameters()} == {torch.float32}


SCHEDULES = {
    "constant": lambda step: 1.0,
    "linear": lambda step: (8 - step) / 6,
    "cosine": lambda step: 0.5 * (1 + math.cos(math.pi * (step - 2) / 6)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rate_schedule_and_warmup(case: Case, tmp_path: Path, schedule: str) -> None:
    seen = trained(case, tmp_path, steps=8, batch=1, micro_batch=1, schedule=schedule, learning_rate=0.004)
    expected = [0.004 * (step / 2 if step < 2 else SCHEDULES[schedule](step)) for step in range(8)]
    assert seen.rates == pytest.approx(expected)


def test_clip_bounds_the_gradient(case: Case, tmp_path: Path) -> None:
    free = trained(case, tmp_path, steps=1, clip=0.0)
    clipped = trained(case, tmp_path, steps=1, clip=0.01)
    assert free.norms[0] > 0.1
    assert clipped.norms == pytest.approx([0.01], rel=1e-3)


def test_optimizer_its_betas_and_weight_decay(case: Case, tmp_path: Path) -> None:
    with session(case.config(tmp_path, steps=1, weight_decay=0.25)) as run:
        run.trainer.train()
        decayed, plain = run.trainer.optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"], decayed["betas"]) == (0.25, 0.0, (0.9, 0.95))
    assert {weight.ndim for weight in plain["params"]} == {1}
    with session(case.config(tmp_path, steps=1, optimizer="sgd")) as run:
        run.trainer.train()
        assert isinstance(run.trainer.optimizer.optimizer, torch.optim.SGD)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_the_gradient_is_that_of_the_mean_over_all_labels(case: Case, tmp_path: Path, micro_batch: int) -> None:
    """Rows with different numbers of labels: a mean of means would weigh them differently."""
    changes = {"positions": "mixed", "steps": 1, "clip": 0.0, "optimizer": "sgd", "warmup": 0, "learning_rate": 1.0}
    with session(case.config(tmp_path, micro_batch=micro_batch, **changes)) as run:
        model = run.trained.model
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        examples = [run.trainer.train_dataset[index] for index in range(4)]
        total, count = torch.zeros(()), 0
        for example in examples:
            batch = {name: torch.from_numpy(getattr(example, name))[None] for name in ("input_ids", "labels",
                     "position_ids", "documents", "long")}  # fmt: skip
            run.trained.rotation.choose(batch["long"])
            output = model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], labels=batch["labels"],
                longrope_pattern=run.trained.pattern(batch["documents"]), use_cache=False,
            )  # fmt: skip
            total, count = total + output.total, count + int(output.count)
        assert len({int((example.labels >= 0).sum()) for example in examples}) > 1
        gradients = torch.autograd.grad(total / count, list(model.parameters()))
        run.trainer.train()
        for (name, weight), gradient in zip(model.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(weight, before[name] - gradient, atol=2e-6, rtol=1e-4)


def test_held_out_documents_are_measured_as_evaluation_does(case: Case, tmp_path: Path) -> None:
    """Perplexity at L with the short set and at L' with the long one, restated with the model's own loss."""
    from longrope_export.evaluation.losses import token_losses

    with session(case.config(tmp_path, eval_documents=3)) as run:
        measured = run.trainer.evaluate()
        assert len(run.corpus.held) == 3
        expected = {}
        for name, length, long in (("32_short", WINDOW, False), ("128_long", TARGET, True)):
            run.trained.rotation.choose_all(long=long)
            with torch.no_grad(), run.trained._full_attention(run.trained.model):
                losses = [token_losses(run.trained.model, torch.from_numpy(row[:length])[None])
                          for row in run.corpus.held]  # fmt: skip
            expected[f"eval_perplexity_{name}"] = float(torch.cat(losses).mean().exp())
        assert measured == pytest.approx(expected, rel=1e-5)
        training = {run.corpus.plan.store.hashes[piece.document] for row in run.corpus.plan for piece in row.pieces}
    held = write_texts(tmp_path / "held", 9, long=2, short=0)
    with session(case.config(tmp_path, eval_data=(held,), eval_documents=None)) as run:
        texts = ["".join(chr(29 + token) for token in row if token > 2) for row in run.corpus.held]
        assert [text[:3] for text in texts] == ["000", "001"]
        assert training


def test_the_trainer_refuses_a_loss_that_is_not_finite(case: Case, tmp_path: Path) -> None:
    with session(case.config(tmp_path, steps=2)) as run:
        with torch.no_grad():
            run.trained.model.lm_head.weight[5] = math.nan
        with pytest.raises(NumericalError, match="the loss of step 1 is not finite"):
            run.trainer.train()


def test_weights_that_are_not_finite_are_not_saved(case: Case, tmp_path: Path) -> None:
    with session(case.config(tmp_path)) as run:
        with torch.no_grad():
            run.trained.model.lm_head.weight[5] = math.inf
        with pytest.raises(NumericalError, match=r"lm_head\.weight is not finite after step 0"):
            run.trainer._save_checkpoint(None, None)
    assert not (tmp_path / "checkpoints").exists()


def test_denormals_are_flushed_from_the_loading_of_the_weights_on(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = noting(monkeypatch, TrainedModel, "load")
    run_finetune(case.config(tmp_path / "out", steps=1, batch=1, micro_batch=1, eval_documents=0))
    preview(case.config(tmp_path / "other", steps=1, batch=1, micro_batch=1, eval_documents=0))
    assert seen == [True, True]
    assert not flushes()
