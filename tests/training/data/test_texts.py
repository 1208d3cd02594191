"""Documents from files, folders, JSONL and datasets on disk, and what is refused with its place."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longrope_export.errors import InputFileError, MissingDependencyError
from longrope_export.training.data import texts
from longrope_export.training.data.texts import documents, find_sources

Write = Callable[..., Path]


def test_files_folders_and_jsonl_give_their_documents_in_order(tmp_path: Path, write_jsonl: Write) -> None:
    for name in ("b.txt", "a/z.md", ".hidden"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(f"text of {name}")
    write_jsonl(["one", "two"], "in/c.jsonl")
    write_jsonl(["three"], "in/d.NDJSON")
    inside = tmp_path / "in"
    assert list(documents([inside / "b.txt", inside])) == [
        (f"{inside}/b.txt", "text of b.txt"),
        (f"{inside}/a/z.md", "text of a/z.md"),
        (f"{inside}/b.txt", "text of b.txt"),
        (f"{inside}/c.jsonl:1", "one"),
        (f"{inside}/c.jsonl:2", "two"),
        (f"{inside}/d.NDJSON:1", "three"),
    ]


def test_the_field_is_the_one_that_was_named(write_jsonl: Write) -> None:
    path = write_jsonl(["one"], field="body")
    assert [text for _, text in documents([path], "body")] == ["one"]
    with pytest.raises(InputFileError, match=r"data\.jsonl, line 1 has no field 'text'.*it has body"):
        list(documents([path]))


def test_empty_lines_and_empty_texts_are_passed_over_and_counted(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\n{"text": ""}\n  \n{"text": "a\\r\\nb"}')
    (tmp_path / "empty.txt").write_text("")
    assert list(documents([tmp_path])) == [(f"{tmp_path}/data.jsonl:1", "one"), (f"{tmp_path}/data.jsonl:5", "a\nb")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"text", "line 2 is not JSON"),
        (b'{"text": "cut', "line 2 is not JSON"),
        (b"[" * 200_000, "line 2 is not JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "line 2 is not JSON"),
        (b'["text"]', "line 2 is not an object"),
        (b'{"other": "x"}', "line 2 has no field 'text'.*it has other"),
        (b'{"text": 5}', "line 2: the text is not a string"),
        (b'{"text": null}', "line 2: the text is not a string"),
        (b'{"text": "caf\xe9"}', r"line 2 is not UTF-8 text \(byte 13\)"),
        (b'{"text": "\\ud800"}', "line 2: the text has half a surrogate pair"),
        (b'{"text": "a\\u0000b"}', "line 2: the text has NUL"),
        (json.dumps({"text": "x" * 300}).encode(), "line 2 is longer than"),
    ],
)
def test_a_line_that_is_no_document_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, message: str
) -> None:
    if b"xxx" in line:
        monkeypatch.setattr(texts, "MAX_BYTES", 300)
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    found = documents([path])
    assert next(found)[1] == "fine", "what stands before it has been read: one line at a time"
    with pytest.raises(InputFileError, match=rf"data\.jsonl, {message}") as error:
        next(found)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300 + len(str(path))


def test_a_huge_text_is_several_documents_cut_at_the_ends_of_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "huge.txt"
    path.write_text("12345\nä2345\n1234567890\n12")
    monkeypatch.setattr(texts, "MAX_BYTES", 15)
    found = list(documents([path]))
    assert found == [(str(path), "12345\nä2345\n"), (f"{path}#2", "1234567890\n12")]


@pytest.mark.parametrize("most", [7, 8, 9, 10])
def test_a_huge_line_is_cut_between_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    path = tmp_path / "huge.txt"
    path.write_text("aä日🙂" * 5, encoding="utf-8")
    monkeypatch.setattr(texts, "MAX_BYTES", most)
    pieces = [text for _, text in documents([path])]
    assert "".join(pieces) == "aä日🙂" * 5
    assert all(most - 3 <= len(piece.encode()) <= most for piece in pieces[:-1])


def test_a_text_of_just_the_limit_is_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("1234\n1234")
    monkeypatch.setattr(texts, "MAX_BYTES", 9)
    assert len(list(documents([tmp_path]))) == 1


def test_bytes_that_are_no_text_are_named_with_line_and_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"1\n2\n3\n4\n5\xff\n")
    with pytest.raises(InputFileError, match=r"a\.txt is not UTF-8 text \(line 5, byte 9\)"):
        list(documents([tmp_path]))
    monkeypatch.setattr(texts, "MAX_BYTES", 5)
    with pytest.raises(InputFileError, match=r"a\.txt is not UTF-8 text \(line 5, byte 9\)"):
        list(documents([tmp_path]))
    (tmp_path / "a.txt").write_bytes(b"\x80" * 50)
    with pytest.raises(InputFileError, match=r"a\.txt is not UTF-8 text \(line 1, byte 0\)"):
        list(documents([tmp_path]))


def test_a_link_to_a_folder_above_has_an_end(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    assert len(find_sources([tmp_path])) == 1


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (source,) = find_sources([tmp_path])
    source.path.unlink()
    for action in (lambda: list(source.items("text")), source.sha256):
        with pytest.raises(InputFileError, match=r"a\.jsonl cannot be read: No such file"):
            action()


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset on disk with the columns `text` and `id`."""
    import datasets

    folder = tmp_path / "in" / "saved"
    rows = {"text": ["one", "", "two"], "id": [1, 2, 3]}
    datasets.Dataset.from_dict(rows).with_format("pandas").save_to_disk(str(folder))
    return folder


def test_a_dataset_on_disk_gives_its_rows(dataset: Path) -> None:
    expected = [(f"{dataset}[0]", "one"), (f"{dataset}[2]", "two")]
    assert list(documents([dataset])) == expected
    (dataset.parent / "a.txt").write_text("beside it")
    assert list(documents([dataset.parent])) == [(f"{dataset.parent}/a.txt", "beside it"), *expected]


def test_the_column_of_a_dataset_is_the_one_that_was_named(dataset: Path) -> None:
    with pytest.raises(InputFileError, match=r"saved has no column 'body'.*it has id, text"):
        list(documents([dataset], "body"))
    with pytest.raises(InputFileError, match=r"saved\[0\]: the text is not a string"):
        list(documents([dataset], "id"))


def test_of_several_splits_it_is_train(tmp_path: Path) -> None:
    import datasets

    def split(text: str) -> Any:
        return datasets.Dataset.from_dict({"text": [text]})

    datasets.DatasetDict({"test": split("held"), "train": split("trained on")}).save_to_disk(str(tmp_path / "both"))
    assert [text for _, text in documents([tmp_path / "both"])] == ["trained on"]
    assert [text for _, text in documents([tmp_path / "both" / "test"])] == ["held"]
    datasets.DatasetDict({"a": split("x"), "b": split("y")}).save_to_disk(str(tmp_path / "neither"))
    with pytest.raises(InputFileError, match=r"neither has no split called train.*\(a, b\)"):
        find_sources([tmp_path / "neither"])


def test_datasets_is_asked_for_only_when_it_is_needed(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (dataset.parent / "a.txt").write_text("text")
    assert len(list(documents([dataset.parent / "a.txt"]))) == 1
    with pytest.raises(MissingDependencyError, match="saved is a dataset on disk: pip install datasets"):
        list(documents([dataset]))


def test_a_broken_dataset_is_refused(dataset: Path) -> None:
    (arrow,) = dataset.glob("*.arrow")
    content = arrow.read_bytes()
    for broken in (content[: len(content) // 3], b"", b"\xff" * 100):
        arrow.write_bytes(broken)
        with pytest.raises(InputFileError, match="saved is not a dataset that can be read"):
            list(documents([dataset]))
    (dataset / "state.json").write_text("{")
    with pytest.raises(InputFileError, match="saved is not a dataset that can be read"):
        list(documents([dataset]))


def test_a_dataset_that_names_files_outside_of_itself_is_refused(dataset: Path) -> None:
    (arrow,) = dataset.glob("*.arrow")
    arrow.rename(dataset.parent / "elsewhere.arrow")
    state = json.loads((dataset / "state.json").read_text())
    state["_data_files"] = [{"filename": "../elsewhere.arrow"}]
    (dataset / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputFileError, match="saved names files outside of itself"):
        list(documents([dataset]))


def test_the_sum_of_a_dataset_covers_every_file_and_its_name(dataset: Path) -> None:
    (source,) = find_sources([dataset])
    before = source.sha256()
    (arrow,) = dataset.glob("*.arrow")
    arrow.rename(dataset / "other.arrow")
    assert source.sha256() != before
    (dataset / "other.arrow").rename(arrow)
    assert source.sha256() == before
    arrow.write_bytes(arrow.read_bytes() + b" ")
    assert source.sha256() != before
