"""Texts tokenised once: what is in the store, when it is used again, and when it is made anew."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope_export.errors import InputFileError, TextTooShortError
from longrope_export.evaluation.documents import encode
from longrope_export.files import check_manifest
from longrope_export.training.data import building
from longrope_export.training.data.building import prepare
from longrope_export.training.data.shards import ENTRY, INDEX, RECORD, TokenStore

Write = Callable[..., Path]

TEXTS = ["hello world", "", "a", "some more text\nof two lines", "0123456789" * 5]


def test_every_document_is_stored_between_its_ends(tmp_path: Path, write_jsonl: Write, tiny_tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("a file")
    store = prepare([write_jsonl(TEXTS), tmp_path / "a.txt"], tiny_tokenizer, tmp_path / "cache")
    texts = [text for text in [*TEXTS, "a file"] if text]
    assert [store.read(document).tolist() for document in range(len(store))] == [
        [*encode(tiny_tokenizer, text), 2] for text in texts
    ]
    assert store.lengths.tolist() == [len(text) + 1 for text in texts]
    assert store.tokens == sum(map(len, texts)) + len(texts) == store.record["tokens"]
    assert [store.name(document) for document in (0, 1, 4)] == [
        f"{tmp_path}/data.jsonl:1",
        f"{tmp_path}/data.jsonl:3",
        f"{tmp_path}/a.txt",
    ]
    assert set(check_manifest(store.folder)) == {RECORD, INDEX, "tokens-00000.bin"}


def test_a_part_of_a_document_is_read(tmp_path: Path, write_jsonl: Write, tiny_tokenizer: Any) -> None:
    store = prepare([write_jsonl(TEXTS)], tiny_tokenizer, tmp_path / "cache")
    whole = store.read(2)
    assert store.read(2, 3).tolist() == whole[3:].tolist()
    part = store.read(2, 3, 5)
    assert (part.tolist(), part.dtype) == (whole[3:8].tolist(), np.int64)
    for start, length in ((0, len(whole) + 1), (-1, 2), (len(whole), 1)):
        with pytest.raises(IndexError, match=f"of document 2, which has {len(whole)}"):
            store.read(2, start, length)


@pytest.mark.parametrize(("words", "kind", "size"), [(65_533, "uint16", 2), (65_534, "uint32", 4)])
def test_the_vocabulary_decides_the_width(tmp_path: Path, words: int, kind: str, size: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {name: number for number, name in enumerate(["<unk>", "<s>", "</s>", *map(str, range(words))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    (tmp_path / "a.txt").write_text(f"0 {words - 1} 7")
    store = prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "cache")
    assert store.read(0).tolist() == [3, words + 2, 10]
    assert store.record["dtype"] == kind
    assert (store.folder / "tokens-00000.bin").stat().st_size == 3 * size


def test_shards_and_batches_change_no_token(
    tmp_path: Path, write_jsonl: Write, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(TEXTS * 3)
    expected = prepare([path], tiny_tokenizer, tmp_path / "one")
    monkeypatch.setattr(building, "SHARD_TOKENS", 40)
    monkeypatch.setattr(building, "BATCH_CHARACTERS", 20)
    store = prepare([path], tiny_tokenizer, tmp_path / "many")
    assert store.record["shards"] == len(list(store.folder.glob("tokens-*.bin"))) > 2
    for document in range(len(expected)):
        assert store.read(document).tolist() == expected.read(document).tolist()
        assert store.read(document, 1, 1).tolist() == expected.read(document, 1, 1).tolist()


def test_bos_and_eos_are_those_asked_for(tmp_path: Path, write_jsonl: Write, tiny_tokenizer: Any) -> None:
    path = write_jsonl(["ab"])
    ids = encode(tiny_tokenizer, "ab")
    for bos, eos, expected in (
        ("always", "always", [1, *ids, 2]),
        ("never", "never", ids),
        ("always", "never", [1, *ids]),
    ):
        store = prepare([path], tiny_tokenizer, tmp_path / "cache", bos=bos, eos=eos)
        assert store.read(0).tolist() == expected


def test_a_second_run_reads_nothing_again(tmp_path: Path, write_jsonl: Write, tiny_tokenizer: Any) -> None:
    path = write_jsonl(TEXTS)
    calls: list[tuple[int, int]] = []

    def run() -> TokenStore:
        return prepare(
            [path], tiny_tokenizer, tmp_path / "cache", report=lambda done, everything: calls.append((done, 0))
        )

    first = run()
    reported = len(calls)
    assert reported
    second = run()
    assert (second.folder, second.data_hash, len(calls)) == (first.folder, first.data_hash, reported)
    path.rename(tmp_path / "moved.jsonl")
    path = tmp_path / "moved.jsonl"
    assert run().folder == first.folder, "the same texts elsewhere"


def test_whatever_decides_the_tokens_makes_a_new_store(tmp_path: Path, write_jsonl: Write, tiny_tokenizer: Any) -> None:
    from tokenizers import Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Lowercase()
    lower = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "Hello", "other": "World"}\n')
    more = write_jsonl(["more"], "more.jsonl")

    def of(paths: list[Path], tokenizer: Any = tiny_tokenizer, **options: Any) -> TokenStore:
        return prepare(paths, tokenizer, tmp_path / "cache", **options)

    stores = [
        of([path]), of([path], lower), of([path], field="other"), of([path], bos="always"), of([path], eos="never"),
        of([path, more]), of([more]),
    ]  # fmt: skip
    stores.append(of([more, path]))
    path.write_text('{"text": "Hallo", "other": "World"}\n')
    stores.append(of([path]))
    assert len({store.folder for store in stores}) == len({store.data_hash for store in stores}) == len(stores)
    assert stores[0].identity["sources"] != stores[-1].identity["sources"]
    assert stores[0].read(0).tolist() == [*encode(tiny_tokenizer, "Hello"), 2], "the old one is still there"


def test_the_data_hash_is_of_tokens_and_of_where_documents_end(
    tmp_path: Path, write_jsonl: Write, tiny_tokenizer: Any
) -> None:
    def of(*files: list[str]) -> str:
        paths = [write_jsonl(texts, f"{number}.jsonl") for number, texts in enumerate(files)]
        return prepare(paths, tiny_tokenizer, tmp_path / "cache", eos="never").data_hash

    assert of(["ab", "cd"]) == of(["ab"], ["", "cd"])
    assert len({of(["ab", "cd"]), of(["abc", "d"]), of(["abcd"]), of(["cd", "ab"])}) == 4


def test_the_field_does_not_matter_where_there_is_none(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("text")
    stores = [prepare([tmp_path / "a.txt"], tiny_tokenizer, tmp_path / "cache", field=field) for field in ("a", "b")]
    assert stores[0].folder == stores[1].folder


def test_progress_goes_from_byte_to_byte(
    tmp_path: Path, write_jsonl: Write, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "BATCH_CHARACTERS", 10)
    paths = [write_jsonl(TEXTS), write_jsonl(TEXTS, "more.jsonl")]
    calls: list[tuple[int, int]] = []
    prepare(paths, tiny_tokenizer, tmp_path / "cache", report=lambda *each: calls.append(each))
    size = sum(path.stat().st_size for path in paths)
    assert {everything for _, everything in calls} == {size}
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert len({done for done, _ in calls}) >= 6
    assert calls[-1] == (size, size)


def test_a_source_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, write_jsonl: Write, tiny_tokenizer: Any
) -> None:
    path = write_jsonl(TEXTS)

    def append(done: int, everything: int) -> None:
        with path.open("a") as file:
            file.write('{"text": "late"}\n')

    with pytest.raises(InputFileError, match=r"data\.jsonl changed while it was read"):
        prepare([path], tiny_tokenizer, tmp_path / "cache", report=append)
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(prepare([path], tiny_tokenizer, tmp_path / "cache")) == 6


def test_no_text_is_refused_and_leaves_nothing(tmp_path: Path, write_jsonl: Write, tiny_tokenizer: Any) -> None:
    with pytest.raises(TextTooShortError, match=r"data\.jsonl holds no text"):
        prepare([write_jsonl(["", ""])], tiny_tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_text_that_is_refused_leaves_nothing(tmp_path: Path, write_jsonl: Write, tiny_tokenizer: Any) -> None:
    path = write_jsonl(TEXTS)
    with path.open("a") as file:
        file.write("no JSON\n")
    with pytest.raises(InputFileError, match=r"data\.jsonl, line 6 is not JSON"):
        prepare([path], tiny_tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_that_prepare_the_same_share_it(tmp_path: Path, write_jsonl: Write, tiny_tokenizer: Any) -> None:
    path = write_jsonl(TEXTS)
    others: list[TokenStore] = []

    def meanwhile(done: int, everything: int) -> None:
        if not others:
            others.append(prepare([path], tiny_tokenizer, tmp_path / "cache"))

    store = prepare([path], tiny_tokenizer, tmp_path / "cache", report=meanwhile)
    assert store.folder == others[0].folder
    assert [each.name for each in (tmp_path / "cache").iterdir()] == [store.folder.name]


@pytest.mark.parametrize("damage", ["shard", "index", "manifest", "record", "missing", "outside", "overflow", "source"])
def test_a_damaged_store_is_refused_and_made_anew(
    tmp_path: Path, write_jsonl: Write, tiny_tokenizer: Any, damage: str
) -> None:
    path = write_jsonl(TEXTS)
    store = prepare([path], tiny_tokenizer, tmp_path / "cache")
    folder, expected = store.folder, store.data_hash
    shard, index = folder / "tokens-00000.bin", folder / INDEX
    if damage in ("shard", "index"):
        file = {"shard": shard, "index": index}[damage]
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing":
        shard.unlink()
    elif damage in ("manifest", "record"):
        (folder / {"manifest": "manifest.json", "record": RECORD}[damage]).write_text("{")
    else:
        entries = np.fromfile(index, ENTRY)
        name, value = {"outside": ("length", 10**6), "overflow": ("start", 2**64 - 1), "source": ("source", 1)}[damage]
        entries[name][1] = value
        entries.tofile(index)
    with pytest.raises(InputFileError, match=folder.name) as error:
        TokenStore(folder)
    assert "\n" not in str(error.value)
    again = prepare([path], tiny_tokenizer, tmp_path / "cache")
    assert (again.folder, again.data_hash, again.tokens) == (folder, expected, store.tokens)


def test_a_store_travels_to_workers_as_its_folder(tmp_path: Path, write_jsonl: Write, tiny_tokenizer: Any) -> None:
    store = prepare([write_jsonl(["x" * 10_000])], tiny_tokenizer, tmp_path / "cache")
    store.read(0)
    carried = pickle.dumps(store)
    assert len(carried) < 1000
    assert pickle.loads(carried).read(0).tolist() == store.read(0).tolist()


def test_memory_does_not_grow_with_the_texts(
    tmp_path: Path, write_jsonl: Write, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "BATCH_CHARACTERS", 4_000)

    def peak(documents: int) -> int:
        path = write_jsonl(["x" * 1000] * documents, f"{documents}.jsonl")
        tracemalloc.start()
        prepare([path], tiny_tokenizer, tmp_path / "cache")
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high

    peak(10)
    assert peak(160) < 1.3 * peak(20)


def test_what_a_killed_build_left_is_removed_when_it_is_old(
    tmp_path: Path, write_jsonl: Write, tiny_tokenizer: Any
) -> None:
    cache = tmp_path / "cache"
    for name in ("old", "new"):
        (cache / f".{name}.partial").mkdir(parents=True)
        (cache / f".{name}.partial" / "tokens-00000.bin").write_bytes(b"\0" * 8)
    for path in (cache / ".old.partial" / "tokens-00000.bin", cache / ".old.partial"):
        os.utime(path, (1e9, 1e9))
    store = prepare([write_jsonl(TEXTS)], tiny_tokenizer, cache)
    assert {path.name for path in cache.iterdir()} == {".new.partial", store.folder.name}, "another may be at work"


def test_the_record_says_what_the_tokens_were_made_from(
    tmp_path: Path, write_jsonl: Write, tiny_tokenizer: Any
) -> None:
    import hashlib

    path = write_jsonl(TEXTS)
    store = prepare([path], tiny_tokenizer, tmp_path / "cache")
    record = json.loads((store.folder / RECORD).read_text())
    assert record["identity"]["sources"] == [{"kind": "jsonl", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}]
    assert record["identity"]["tokenizer"] == building.tokenizer_fingerprint(tiny_tokenizer)
    assert (record["identity"]["front"], record["identity"]["back"]) == ([], [2])
    assert (record["documents"], record["tokens"], record["vocabulary"]) == (4, store.tokens, 97)
    assert record["sources"] == [{"path": str(path), "kind": "jsonl", "size": path.stat().st_size}]
