"""The demo model's tokenizer gives the same tokens in transformers and in llama.cpp (pre-tokenizer `smollm`)."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from longrope_export.converters.gguf.convert import convert_to_gguf
from longrope_export.demo import demo_model_path
from longrope_export.evaluation.documents import load_tokenizer
from longrope_export.evaluation.stdlib_corpus import documents
from longrope_export.runtimes.llamacpp import tokenize

AWKWARD = (
    "",
    " ",
    "   ",
    "\n\n\n   \n",
    "a\tb\t\t c \r\n d",
    "  leading and trailing  ",
    "12345 67 8,900.01 0x1F 1e-9 v2.13",
    "x1y22z333 ½ ² Ⅷ ٣٤ १२ 九",
    "it's we're I'll they'd I'm you've can't 'S 'LL ''s",
    "naïve café Ünïcödé ß ﬁ İı",
    "日本語のテキスト、中文字符。한국어 العربية עברית हिन्दी",
    "🙂👩‍👩‍👧‍👦🇫🇷 e\u0301 \u200b\u00a0\u3000\ufeff",
    "def f(self, *args, **kwargs):\n    return {'a': [1, 2, 3]}  # done\n",
    "!!!???...---===<<<>>>@@@###$$$%%%^^^&&&***((()))",
    "http://example.org/a_b-c?d=e&f=%20#g",
    "\x00\x01\x7f\x80\xff",
    "word" * 40 + " " * 33 + "\n" * 17,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(demo_model_path())


@pytest.fixture(scope="module")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "demo.gguf"
    convert_to_gguf(demo_model_path(), path)
    return path


def random_texts() -> list[str]:
    source = random.Random(0)
    letters = "aZé世🙂 \n\t'0９½_.,()\u0301\u00a0ßИ"
    return ["".join(source.choice(letters) for _ in range(source.randint(1, 40))) for _ in range(300)]


def differing(gguf_file: Path, tokenizer: Any, texts: list[str]) -> list[str]:
    """Texts that llama.cpp and transformers tokenise differently, both with BOS where they add it by themselves."""
    theirs = tokenize(gguf_file, texts, add_special=True, parse_special=False)
    return [
        text
        for text, ids in zip(texts, theirs, strict=True)
        if ids != tokenizer(text, split_special_tokens=True, verbose=False).input_ids
    ]


def test_awkward_and_random_texts_tokenise_equally(tokenizer: Any, demo_gguf: Path) -> None:
    assert differing(demo_gguf, tokenizer, [*AWKWARD, *random_texts()]) == []


def test_held_out_documents_tokenise_equally(tokenizer: Any, demo_gguf: Path) -> None:
    texts = {document.text: document.name for document in documents("validation")}
    assert [texts[text] for text in differing(demo_gguf, tokenizer, list(texts))] == []


def test_another_pre_tokenizer_would_be_noticed(tokenizer: Any, demo_gguf: Path, tmp_path: Path) -> None:
    """The name is patched in place to one of the same length: `falcon` splits punctuation and keeps digits together."""
    data = demo_gguf.read_bytes()
    place = data.index(b"smollm", data.index(b"tokenizer.ggml.pre"))
    other = tmp_path / "other.gguf"
    other.write_bytes(data[:place] + b"falcon" + data[place + len(b"smollm") :])
    assert len(differing(other, tokenizer, [*AWKWARD, *random_texts()])) >= 3


def test_bos_opens_every_text_and_comes_from_the_files(tokenizer: Any) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 0)
    assert tokenizer("x").input_ids[0] == 0
    assert tokenizer("x", add_special_tokens=False).input_ids[0] != 0
    assert json.loads((demo_model_path() / "tokenizer_config.json").read_text())["add_bos_token"] is True


def test_every_digit_is_a_token_of_its_own(tokenizer: Any) -> None:
    assert tokenizer.tokenize("4821307") == list("4821307")
    longer = [token for token in tokenizer.get_vocab() if sum(c.isdigit() for c in token) and len(token) > 1]
    assert longer == []


def test_decoding_gives_the_text_back(tokenizer: Any) -> None:
    for text in AWKWARD:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
