"""Texts into rows: the BOS rule, the cut, the order of documents, and errors that name the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope_export.errors import InputFileError, TextTooShortError
from longrope_export.evaluation import documents
from longrope_export.evaluation.documents import (
    correct_pre_tokenizer,
    data_hash,
    encode,
    evaluation_rows,
    find_text_files,
    load_tokenizer,
    read_text,
    rows_from_texts,
)


def without_bos(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", unk_token="<unk>")


def test_a_row_is_bos_and_the_first_tokens_of_the_text(tiny_tokenizer: Any) -> None:
    (row,) = rows_from_texts([("a", "hello world, again")], tiny_tokenizer, 8)
    assert row.token_ids.tolist() == [1, *encode(tiny_tokenizer, "hello w")]
    assert row.token_ids.dtype == np.int64


def test_a_tokenizer_without_bos_gives_rows_of_text_alone(tiny_tokenizer: Any) -> None:
    (row,) = rows_from_texts([("a", "hello world, again")], without_bos(tiny_tokenizer), 8)
    assert row.token_ids.tolist() == encode(tiny_tokenizer, "hello wo")


def test_a_tokenizer_that_adds_bos_itself_does_not_add_a_second_one(smollm2: Path, tiny_tokenizer: Any) -> None:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    adding = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, bos_token="<s>")
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert adding("ab")["input_ids"] == [1, *encode(tiny_tokenizer, "ab"), 2]
    (row,) = rows_from_texts([("a", "abcdef")], adding, 5)
    assert row.token_ids.tolist() == [1, *encode(tiny_tokenizer, "abcd")]


def test_control_tokens_spelled_in_the_text_are_plain_text(tiny_tokenizer: Any) -> None:
    assert tiny_tokenizer("</s>", add_special_tokens=False)["input_ids"] == [2]
    assert encode(tiny_tokenizer, "</s>") == [tiny_tokenizer.convert_tokens_to_ids(c) for c in "</s>"]


def test_first_pieces_of_all_texts_come_before_second_pieces(tiny_tokenizer: Any) -> None:
    texts = [("a", "a" * 9 + "f" * 16), ("short", "b" * 5), ("c", "c" * 9), ("d", "d" * 9 + "g" * 9 + "e" * 9)]
    rows = rows_from_texts(texts, tiny_tokenizer, 10, 6)
    assert [row.name for row in rows] == ["a", "c", "d", "a#2", "d#2", "d#3"]
    assert rows[-1].token_ids[1:].tolist() == encode(tiny_tokenizer, "e" * 9)
    assert all(len(row.token_ids) == 10 and row.token_ids[0] == 1 for row in rows)


def test_pieces_of_one_text_are_consecutive_and_disjoint(tiny_tokenizer: Any) -> None:
    text = "".join(chr(ord("a") + index % 26) for index in range(100))
    rows = rows_from_texts([("a", text)], tiny_tokenizer, 11, 9)
    joined = np.concatenate([row.token_ids[1:] for row in rows])
    assert joined.tolist() == encode(tiny_tokenizer, text[:90])


def test_without_a_number_every_long_text_gives_one_row(tiny_tokenizer: Any) -> None:
    texts = [("a", "a" * 50), ("b", "b" * 5), ("c", "c" * 20)]
    assert [row.name for row in rows_from_texts(texts, tiny_tokenizer, 10)] == ["a", "c"]
    assert [row.name for row in rows_from_texts(texts, tiny_tokenizer, 10, at_most=1)] == ["a"]


def test_texts_after_the_last_needed_one_are_not_read(tiny_tokenizer: Any) -> None:
    def texts() -> Any:
        yield "a", "a" * 50
        raise AssertionError("read too much")

    assert len(rows_from_texts(texts(), tiny_tokenizer, 10, 1)) == 1


def test_a_text_that_is_too_short_is_named_with_its_tokens(tiny_tokenizer: Any) -> None:
    with pytest.raises(TextTooShortError, match=r"long\.txt has 8 tokens.*10 are needed"):
        rows_from_texts([("short.txt", "abc"), ("long.txt", "abcdefg")], tiny_tokenizer, 10)


def test_exactly_enough_tokens_are_enough(tiny_tokenizer: Any) -> None:
    assert len(rows_from_texts([("a", "a" * 9)], tiny_tokenizer, 10)) == 1
    with pytest.raises(TextTooShortError, match="9 tokens"):
        rows_from_texts([("a", "a" * 8)], tiny_tokenizer, 10)


def test_too_few_rows_for_the_asked_documents(tiny_tokenizer: Any) -> None:
    with pytest.raises(TextTooShortError, match=r"2 rows of 10 tokens and 3 documents.*b\.txt, has 19 tokens"):
        rows_from_texts([("a.txt", "a"), ("b.txt", "b" * 9 + "c" * 9)], tiny_tokenizer, 10, 3)


def test_no_text_at_all(tiny_tokenizer: Any) -> None:
    with pytest.raises(TextTooShortError, match="the data has 0 tokens"):
        rows_from_texts([], tiny_tokenizer, 10)


def test_folders_are_read_recursively_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/c/x.md", ".hidden.txt", ".git/config", "__pycache__/m.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    found = [path.relative_to(tmp_path).as_posix() for path in find_text_files([tmp_path])]
    assert found == ["a/c/x.md", "a/z.txt", "b.txt"]
    assert find_text_files([tmp_path / "b.txt", tmp_path / "a"])[0] == tmp_path / "b.txt"


def test_a_missing_path_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"no\.txt does not exist"):
        find_text_files([tmp_path / "no.txt"])
    with pytest.raises(InputFileError, match="holds no text files"):
        find_text_files([tmp_path])


def test_a_file_that_is_not_utf8_is_named_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("one\ncaf\xe9".encode("latin-1"))
    with pytest.raises(InputFileError, match=r"latin\.txt is not UTF-8 text \(line 2, byte 7\)"):
        read_text(path)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"GGUF\0\0\0\0")
    with pytest.raises(InputFileError, match="binary"):
        read_text(path)


def test_line_ends_and_the_byte_order_mark_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_text(path) == "one\ntwo"


def test_a_huge_file_is_read_up_to_a_line_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "huge.txt"
    path.write_text("12345\nä2345\n12345\n")
    monkeypatch.setattr(documents, "MAX_BYTES", 15)
    assert read_text(path) == "12345\nä2345\n"


def test_files_become_rows(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    (row,) = evaluation_rows([tmp_path], tiny_tokenizer, 6)
    assert row.name == str(tmp_path / "a.txt")
    assert row.token_ids.tolist() == [1, *encode(tiny_tokenizer, "hello")]


def _named(rows: list[Any], folder: Path) -> list[str]:
    return [Path(row.name).relative_to(folder).as_posix() for row in rows]


def test_a_file_that_is_named_twice_is_read_once_where_it_stands_first(
    tmp_path: Path, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    for name, text in (("in/a.txt", "a" * 9 + "b" * 9), ("in/b.txt", "c" * 9), ("z.txt", "d" * 9)):
        (tmp_path / name).write_text(text)
    (tmp_path / "in" / "link.txt").symlink_to(tmp_path / "z.txt")
    again = [tmp_path / "in" / "b.txt", tmp_path / "in", tmp_path / "in" / ".." / "in" / "a.txt", tmp_path / "z.txt"]
    rows = evaluation_rows(again, tiny_tokenizer, 10, 9, least=1)
    assert _named(rows, tmp_path) == ["in/b.txt", "in/a.txt", "in/link.txt", "in/a.txt#2"]
    assert caplog.messages == []


def test_a_row_that_repeats_another_one_is_left_out_and_the_next_text_takes_its_place(
    tmp_path: Path, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    texts = {"a": "a" * 9 + "b" * 9, "copy": "a" * 9 + "b" * 9, "d": "d" * 9, "e": "e" * 9}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert _named(evaluation_rows([tmp_path], tiny_tokenizer, 10, 4), tmp_path) == ["a", "d", "e", "a#2"]
    (line,) = caplog.messages
    assert line == (
        f"rows that repeat others are left out: {tmp_path / 'copy'} is the same as {tmp_path / 'a'} (2 in all)"
    )
    assert _named(evaluation_rows([tmp_path], tiny_tokenizer, 10, at_most=2), tmp_path) == ["a", "d"]
    with pytest.raises(TextTooShortError, match="4 rows of 10 tokens and 5 documents"):
        evaluation_rows([tmp_path], tiny_tokenizer, 10, 5)


def test_rows_that_differ_are_dealt_as_ever(
    tmp_path: Path, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    letters = np.random.default_rng(0).choice(list("abcdef"), (3, 40))
    texts = [(str(tmp_path / name), "".join(row)) for name, row in zip("pqr", letters)]
    for name, text in texts:
        Path(name).write_text(text)
    rows = evaluation_rows([tmp_path], tiny_tokenizer, 10, 8)
    expected = rows_from_texts(texts, tiny_tokenizer, 10, 8)
    assert [row.name for row in rows] == [row.name for row in expected]
    assert data_hash(rows) == data_hash(expected)
    assert caplog.messages == []


def test_equal_rows_are_left_out(tiny_tokenizer: Any) -> None:
    texts = [("a", "a" * 9), ("b", "a" * 9), ("c", "c" * 9)]
    assert [row.name for row in rows_from_texts(texts, tiny_tokenizer, 10)] == ["a", "c"]


def test_the_hash_depends_on_tokens_and_on_where_rows_end(tiny_tokenizer: Any) -> None:
    def of(length: int, *texts: str) -> str:
        return data_hash(rows_from_texts([(text, text) for text in texts], tiny_tokenizer, length))

    assert of(5, "abcd", "efgh") == of(5, "abcdX", "efgh")
    assert len({of(5, "abcd", "efgh"), of(5, "efgh", "abcd"), of(5, "abcd"), of(3, "ab", "cd", "ef")}) == 4


def test_the_tokenizer_of_a_folder(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    assert encode(load_tokenizer(tmp_path), "hello\n") == encode(tiny_tokenizer, "hello\n")


def test_a_path_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="does not exist"):
        load_tokenizer(tmp_path / "no")
    with pytest.raises(InputFileError, match=f"{tmp_path.name} has no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_gguf_tokenizer_splits_digits_as_llama_cpp_does(smollm2: Path) -> None:
    from longrope_export.runtimes.llamacpp import tokenize

    texts = ["born in 1987,   1234567 times", "x =    31.5  # 10:45\n\treturn   2**16"]
    tokenizer, expected = load_tokenizer(smollm2), tokenize(smollm2, texts)
    assert [encode(tokenizer, text) for text in texts] == expected
    correct_pre_tokenizer(tokenizer, "gpt-2")
    assert [encode(tokenizer, text) for text in texts] != expected
