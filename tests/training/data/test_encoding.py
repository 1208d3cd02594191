"""Where documents begin and end, what identifies a tokenizer, and long texts part by part."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from longrope_export.errors import InputFileError
from longrope_export.evaluation.documents import encode
from longrope_export.training.data import encoding
from longrope_export.training.data.encoding import (
    Ends,
    document_ends,
    encode_all,
    tokenizer_fingerprint,
    vocabulary_size,
)


def tokenizer_with(backend: Any, *, adds_bos: bool = False, **tokens: str) -> Any:
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(backend.to_str())
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **tokens)


@pytest.mark.parametrize(
    ("adds_bos", "bos", "eos", "expected"),
    [
        (True, "auto", "auto", Ends((1,), (2,))),
        (False, "auto", "auto", Ends((), (2,))),
        (False, "always", "never", Ends((1,), ())),
        (True, "never", "always", Ends((), (2,))),
    ],
)
def test_the_ends_of_a_document(tiny_tokenizer: Any, adds_bos: bool, bos: str, eos: str, expected: Ends) -> None:
    backend = tiny_tokenizer.backend_tokenizer
    tokenizer = tokenizer_with(backend, adds_bos=adds_bos, bos_token="<s>", eos_token="</s>")
    assert document_ends(tokenizer, bos, eos) == expected


def test_a_tokenizer_without_bos_and_eos(tiny_tokenizer: Any) -> None:
    tokenizer = tokenizer_with(tiny_tokenizer.backend_tokenizer)
    assert document_ends(tokenizer) == document_ends(tokenizer, "never", "never") == Ends((), ())
    with pytest.raises(InputFileError, match="no BOS token"):
        document_ends(tokenizer, "always")
    with pytest.raises(InputFileError, match="no EOS token"):
        document_ends(tokenizer, eos="always")
    with pytest.raises(InputFileError, match="EOS 'sometimes' is not known; take one of auto, always, never"):
        document_ends(tokenizer, eos="sometimes")


def test_the_fingerprint_is_of_all_that_decides_the_tokens(tiny_tokenizer: Any) -> None:
    from tokenizers import normalizers

    backend = tiny_tokenizer.backend_tokenizer
    tokenizer = tokenizer_with(backend, bos_token="<s>", eos_token="</s>")
    before = tokenizer_fingerprint(tokenizer)
    assert before == tokenizer_fingerprint(tokenizer_with(backend, bos_token="<s>", eos_token="</s>"))
    encode(tokenizer, "some text")
    tokenizer("some text", truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before, "using it does not change it"
    others = [
        tokenizer_with(backend, bos_token="<s>"),
        tokenizer_with(backend, bos_token="<s>", eos_token="a"),
        tokenizer_with(backend, adds_bos=True, bos_token="<s>", eos_token="</s>"),
    ]
    backend = type(backend).from_str(backend.to_str())
    backend.normalizer = normalizers.Lowercase()
    others.append(tokenizer_with(backend, bos_token="<s>", eos_token="</s>"))
    assert len({before, *map(tokenizer_fingerprint, others)}) == 5


def test_a_tokenizer_in_python_is_read_too() -> None:
    from transformers import ByT5Tokenizer

    tokenizer: Any = ByT5Tokenizer()
    assert [ids.tolist() for ids in encode_all(tokenizer, ["ab", "c"])] == [[100, 101], [102]]
    assert vocabulary_size(tokenizer) == max(tokenizer.get_vocab().values()) + 1
    assert document_ends(tokenizer) == Ends((), (1,))
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(ByT5Tokenizer(extra_ids=3))


def sentencepiece_like() -> Any:
    """Merges across the whole text, and a `▁` in front of it that no later part may have."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = ["<unk>", *"▁abcdefgh\n"]
    merges = [("▁", letter) for letter in "abc"] + [("a", "b"), ("ab", "c"), ("▁a", "b"), ("d", "d"), ("dd", "dd")]
    vocabulary = {token: number for number, token in enumerate([*letters, *(left + right for left, right in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer_with(backend)


def demo_tokenizer() -> Any:
    from tokenizers import Tokenizer

    from longrope_export.demo import demo_model_path

    return tokenizer_with(Tokenizer.from_file(str(demo_model_path() / "tokenizer.json")))


def long_texts() -> dict[str, str]:
    rng = random.Random(0)
    words = "".join(rng.choices(["abc", "d", "cab", "hhh", " ", " ", "\n", "  "], k=5000))
    return {
        "words": words,
        "unicode": (words[:200] + "é 日本語のテキスト、🙂🏽 12345\r\n\n") * 20,
        "no spaces": words.replace(" ", "").replace("\n", ""),
        "runs": "d" * 3001 + words[:1000] + " " * 2000 + "d" * 2000,
    }


@pytest.mark.parametrize("make", [demo_tokenizer, sentencepiece_like])
def test_a_long_text_in_parts_has_the_tokens_of_the_whole(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make()
    sizes = []

    def seen(text: str, **options: Any) -> Any:
        sizes.append(len(text))
        return tokenizer(text, **options)

    monkeypatch.setattr(encoding, "LONG_TEXT", 701)
    monkeypatch.setattr(encoding, "SEAM", 24)
    for name, text in long_texts().items():
        (ids,) = encode_all(tokenizer, [text])
        assert ids.tolist() == encode(tokenizer, text), name
        assert ids.dtype == np.int64
    seen.is_fast = True  # type: ignore[attr-defined]
    assert encoding.encode_long(seen, long_texts()["words"]).tolist() == encode(tokenizer, long_texts()["words"])
    assert max(sizes) <= 701, "never the whole text at once"


def test_where_no_seam_fits_the_text_is_encoded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of one letter: whether its pairs begin at even or odd places depends on where it began."""
    tokenizer = sentencepiece_like()
    monkeypatch.setattr(encoding, "LONG_TEXT", 701)
    monkeypatch.setattr(encoding, "SEAM", 10)
    text = "\n" + "d" * 4000 + "a"
    (ids,) = encode_all(tokenizer, [text])
    assert ids.tolist() == encode(tokenizer, text)
    assert encoding._joined(tokenizer, text, 10) is None, "the seam would have been wrong"


def test_short_and_long_texts_together_keep_their_order(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "LONG_TEXT", 50)
    monkeypatch.setattr(encoding, "SEAM", 4)
    texts = ["abc", "x" * 70 + "y", "", "d" * 50, "e" * 51, "</s>"]
    assert [ids.tolist() for ids in encode_all(tiny_tokenizer, texts)] == [encode(tiny_tokenizer, t) for t in texts]
    assert encode_all(tiny_tokenizer, []) == []
