"""Every pattern against the attention that its paper describes, written down as a mask over true positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longrope_export.errors import LongRopeError, UnsupportedModelError
from longrope_export.training.attention import NAMES, Pattern, register, sparse, window

DOCUMENTS = ((37, 2, 9, 8), (10, 46), (56,), (1, 3, 52))
HEADS = [(6, 3), (4, 4), (9, 3), (8, 1), (1, 1)]

Sees = Callable[[Tensor, Tensor, int, int], Tensor]
"""`sees(i, j, head, length)`: whether a document's tokens i [n, 1] see its tokens j [1, n], later ones aside."""


def full(i: Tensor, j: Tensor, head: int, length: int) -> Tensor:
    return i == i


def windows(size: int) -> Sees:
    return lambda i, j, head, length: j > i - size


def s2(group: int, heads: int) -> Sees:
    def sees(i: Tensor, j: Tensor, head: int, length: int) -> Tensor:
        shift = group // 2 if head >= heads // 2 else 0
        return ((i - shift) // group == (j - shift) // group) | (length <= group)

    return sees


def scca(group: int, heads: int, shifts: str, tokens: int) -> Sees:
    def sees(i: Tensor, j: Tensor, head: int, length: int) -> Tensor:
        chunks = head % (tokens // group)
        back = torch.where(chunks <= i // group, chunks * group, 0)
        half = group // 2 if head >= heads // 2 else 0
        shift = back if shifts == "flow" else half
        return (i // group == (j + shift) // group) | (length <= group)

    return sees


def brute_force(query: Tensor, key: Tensor, value: Tensor, rows: tuple[tuple[int, ...], ...], sees: Sees) -> Tensor:
    batch, heads, tokens, size = query.shape
    key, value = (states.repeat_interleave(heads // states.shape[1], 1) for states in (key, value))
    mask = torch.zeros(batch, heads, tokens, tokens, dtype=torch.bool)
    for row, lengths in enumerate(rows):
        for start, length in zip(np.cumsum([0, *lengths]).tolist(), lengths):
            i, own = torch.arange(length), slice(start, start + length)
            for head in range(heads):
                mask[row, head, own, own] = sees(i[:, None], i[None], head, length) & (i[None] <= i[:, None])
    scores = (query @ key.transpose(-1, -2) / size**0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def states(heads: int, key_heads: int, rows: int = 4, tokens: int = 56, size: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, tokens, count, size) for count in (heads, key_heads, key_heads)]
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) * 2 for shape in shapes]
    return [value.transpose(1, 2).requires_grad_() for value in values]


def attention(name: str, pattern: Pattern, inputs: list[Tensor], **more: Any) -> Tensor:
    output, weights = register._function(name)(None, *inputs, None, longrope_pattern=pattern, **more)
    assert weights is None
    return output


def difference(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> float:
    """Largest difference of the outputs, and of the gradients of a sum with changing weights."""
    weights = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view_as(ours)
    pairs = zip(
        *(torch.autograd.grad((output * weights).sum(), inputs, retain_graph=True) for output in (ours, theirs))
    )
    return max(float((a - b).detach().abs().max()) for a, b in [(ours, theirs), *pairs])


@pytest.mark.parametrize(("heads", "key_heads"), HEADS)
def test_full_attention_within_documents(heads: int, key_heads: int) -> None:
    inputs = states(heads, key_heads)
    ours = attention("longrope_full", Pattern(DOCUMENTS, 8), inputs)
    assert difference(ours, brute_force(*inputs, DOCUMENTS, full), inputs) < 1e-12


@pytest.mark.parametrize("size", [1, 2, 9, 37, 46, 55, 56])
@pytest.mark.parametrize("block", [8, 512])
def test_a_sliding_window_sees_the_last_tokens_of_its_document(
    size: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window, "BLOCK", block)
    inputs = states(4, 2)
    for name in NAMES if size == 9 else ["longrope_full"]:
        ours = attention(name, Pattern(DOCUMENTS, 8), inputs, sliding_window=size)
        assert difference(ours, brute_force(*inputs, DOCUMENTS, windows(size)), inputs) < 1e-12
    with torch.no_grad():
        assert torch.equal(attention("longrope_full", Pattern(DOCUMENTS, 8), inputs, sliding_window=size), ours)


@pytest.mark.parametrize(("heads", "key_heads"), HEADS)
@pytest.mark.parametrize("group", [14, 8, 9])
def test_s2_groups_half_of_the_heads_with_a_shift(heads: int, key_heads: int, group: int) -> None:
    inputs = states(heads, key_heads)
    ours = attention("longrope_s2", Pattern(DOCUMENTS, group), inputs)
    assert difference(ours, brute_force(*inputs, DOCUMENTS, s2(group, heads)), inputs) < 1e-12


@pytest.mark.parametrize(("heads", "key_heads"), HEADS)
@pytest.mark.parametrize("group", [14, 9])
@pytest.mark.parametrize("shifts", ["fixed", "flow"])
def test_scca_shifts_keys_and_values_only(heads: int, key_heads: int, group: int, shifts: Any) -> None:
    inputs = states(heads, key_heads)
    ours = attention("longrope_scca", Pattern(DOCUMENTS, group, shifts), inputs)
    expected = brute_force(*inputs, DOCUMENTS, scca(group, heads, shifts, 56))
    assert difference(ours, expected, inputs) < 1e-12


def rolled(states: Tensor, shifts: list[int], group: int) -> Tensor:
    """[B, H, groups, group, …] of [B, H, T, …], each head rolled to later tokens by its own shift."""
    heads = [torch.roll(states[:, head], shift, 1) for head, shift in enumerate(shifts)]
    return torch.stack(heads, 1).unflatten(2, (-1, group))


@pytest.mark.parametrize("name", ["longrope_s2", "longrope_scca"])
def test_rolling_as_in_the_released_code_gives_the_same_when_the_true_order_is_kept(name: str) -> None:
    """LongLoRA rolls queries, keys and values of half of the heads back by G/2, groups, attends, rolls again."""
    group, inputs = 14, states(4, 4)
    by = [0, 0, -7, -7] if name == "longrope_s2" else [0, 0, 7, 7]
    query_by = by if name == "longrope_s2" else [0] * 4
    query, key, value = (rolled(x, shifts, group) for x, shifts in zip(inputs, (query_by, by, by)))
    places = torch.arange(56).expand(1, 4, -1)
    later = rolled(places, query_by, group)[..., None] < rolled(places, by, group)[..., None, :]
    if name == "longrope_s2":  # causal in the rolled order first
        after = torch.ones(group, group, dtype=torch.bool).triu(1)
        assert bool((later & ~after).any()), "there, the first tokens see the last ones"
        later = later | after
    scores = (query @ key.transpose(-1, -2) / 2).masked_fill(later, -torch.inf)
    output = (scores.softmax(-1) @ value).flatten(2, 3)
    output = rolled(output, [-shift for shift in query_by], 56).squeeze(2).transpose(1, 2)
    whole = Pattern(((56,),) * 4, group)
    assert difference(attention(name, whole, inputs), output, inputs) < 1e-12


MUTANTS: dict[str, tuple[str, Any, str, Any, Any]] = {
    "S2 heads are not shifted": ("longrope_s2", sparse, "_shifted_groups", sparse._groups, s2(14, 6)),
    "S2 shifts by one too few": (
        "longrope_s2", sparse, "_shifted_groups",
        lambda start, length, group: [
            sparse.triangle(start, 6), *sparse._groups(start + 6, length - 6, group)
        ], s2(14, 6),
    ),
    "SCCA heads are not shifted": (
        "longrope_scca", sparse, "_half_chunk_back", sparse._groups, scca(14, 6, "fixed", 56)
    ),
    "SCCA shifts queries too": (
        "longrope_scca", sparse, "_half_chunk_back", sparse._shifted_groups, scca(14, 6, "fixed", 56)
    ),
    "documents are not separated": (
        "longrope_full", register, "NAMES", NAMES | {
            "longrope_full": lambda pattern, heads: NAMES["longrope_full"](replace(pattern, rows=((56,),) * 4), heads)
        }, full,
    ),
    "every head is treated like the first": (
        "longrope_s2", register, "heads_of", lambda states, chosen, heads: states[:, : len(chosen)], s2(14, 6)
    ),
    "heads return in another order": (
        "longrope_scca", register, "inverse_order", lambda order, device: None, scca(14, 6, "flow", 56)
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, module, attribute, replacement, sees = MUTANTS[mutant]
    inputs = states(6, 3)
    pattern = Pattern(DOCUMENTS, 14, "flow" if "order" in mutant else "fixed")
    expected = brute_force(*inputs, DOCUMENTS, sees)
    register._plans.cache_clear()
    assert difference(attention(name, pattern, inputs), expected, inputs) < 1e-12
    register._plans.cache_clear()
    monkeypatch.setattr(module, attribute, replacement)
    assert difference(attention(name, pattern, inputs), expected, inputs) > 1e-3
    register._plans.cache_clear()


def test_a_window_that_is_off_by_one_is_caught() -> None:
    inputs = states(4, 2)
    ours = attention("longrope_full", Pattern(DOCUMENTS, 14), inputs, sliding_window=9)
    assert difference(ours, brute_force(*inputs, DOCUMENTS, windows(10)), inputs) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_scale_of_the_scores_is_the_caller_s(name: str) -> None:
    inputs = states(4, 2)
    pattern = Pattern(DOCUMENTS, 14)
    doubled = [inputs[0] * 2, *inputs[1:]]
    assert torch.allclose(attention(name, pattern, inputs, scaling=1.0), attention(name, pattern, doubled))


@pytest.mark.parametrize("sliding_window", [None, 9])
@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_applied_and_drops_the_same_again_when_recomputed(name: str, sliding_window: int | None) -> None:
    inputs, pattern = states(4, 2), Pattern(DOCUMENTS, 14)
    more = {"dropout": 0.5, "sliding_window": sliding_window}
    torch.manual_seed(0)
    dropped = attention(name, pattern, inputs, **more)
    (slope,) = torch.autograd.grad(dropped.sum(), inputs[2], retain_graph=True)
    assert not torch.allclose(dropped, attention(name, pattern, inputs, sliding_window=sliding_window))
    # Outputs are linear in the values; a recomputation with other drops would break this.
    torch.testing.assert_close((slope * inputs[2]).sum(), dropped.sum())


class Recorder(TorchDispatchMode):
    """The largest tensor that any operation makes, and how often the attention kernel is called."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.calls = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        self.largest = max(self.largest, *(value.numel() for value in made if isinstance(value, Tensor)), 0)
        self.calls += "dot_product" in str(function) and "backward" not in str(function)
        return result


@pytest.mark.parametrize("shifts", ["fixed", "flow"])
@pytest.mark.parametrize("sliding_window", [None, 100])
@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_grows_faster_than_the_length(name: str, sliding_window: int | None, shifts: Any) -> None:
    largest = {}
    for tokens in (1024, 2048):
        inputs = [part.float() for part in states(4, 2, rows=1, tokens=tokens, size=8)]
        with Recorder() as recorder:
            pattern = Pattern(((tokens - 300, 290, 10),), tokens // 4, shifts)
            attention(name, pattern, inputs, sliding_window=sliding_window).sum().backward()
        largest[tokens] = recorder.largest
    assert largest[1024] < 3 * 1024 * 4 * 8
    assert largest[2048] <= 2.2 * largest[1024]


def test_many_short_documents_cost_few_calls() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 300).tolist()
    inputs = [part.float() for part in states(4, 2, rows=1, tokens=sum(lengths))]
    with Recorder() as recorder:
        attention("longrope_full", Pattern((tuple(lengths),), 8), inputs).sum()
    assert recorder.calls < 50


def test_the_pattern_of_documents() -> None:
    numbered = [[0, 0, 0, 1, 1, 2, 2, 2, 2, 2], [0] * 10]
    for documents in (numbered, torch.tensor(numbered), np.array(numbered)):
        assert Pattern.of(documents) == Pattern(((3, 2, 5), (10,)), 2)
    assert Pattern.of(numbered, group_share=0.5, shifts="flow") == Pattern(((3, 2, 5), (10,)), 5, "flow")
    assert Pattern.of([[0, 0]]).group == 2
    assert Pattern.of(numbered).tokens == 10


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Pattern.of([[0, 0]], group_share=0), "share of the length is 0"),
        (lambda: Pattern.of([[0, 0]], group_share=1.5), "share of the length is 1.5"),
        (lambda: Pattern(((2,),), 1), "a group of 1 tokens"),
        (lambda: Pattern(((2,),), 2, "diagonal"), "fixed or flow"),  # type: ignore[arg-type]
        (lambda: Pattern(((2,), (3,)), 2), "rows of \\[2, 3\\] tokens"),
        (lambda: Pattern(((2, 0),), 2), "documents of 1 or more"),
        (lambda: Pattern((), 2), "same number"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(make: Callable[[], Pattern], words: str) -> None:
    with pytest.raises((LongRopeError, ValueError), match=words):
        make()


@pytest.mark.parametrize("keyword", ["softcap", "s_aux", "position_bias"])
def test_keywords_that_change_the_scores_are_refused(keyword: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"longrope_s2 does not support attention with {keyword}"):
        attention("longrope_s2", Pattern(DOCUMENTS, 14), states(4, 4), **{keyword: torch.ones(1)})
    attention("longrope_s2", Pattern(DOCUMENTS, 14), states(4, 4), **{keyword: None})
