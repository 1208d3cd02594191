"""Python's standard library as text files to search on: one file per document of at least N tokens.

    python benchmarks/stdlib_texts.py MODEL --tokens 16384 --out texts [--validation 2]

A package's modules are one document, and modules that are too short are joined with the next ones. Files of the
corpus' split `search` come first by name, then `--validation` files of its split `validation`, so that `longrope search
--data texts --documents (files - 2) --validation-documents 2` searches on the former and chooses on the latter.
Nothing of the split `report`, which `longrope eval` measures on, is among them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from longrope_export.evaluation.documents import encode, load_tokenizer
from longrope_export.evaluation.stdlib_corpus import Split, documents


def long_texts(split: Split, tokens: int, count: Callable[[str], int]) -> Iterator[tuple[str, str]]:
    """(name, text) pairs of at least `tokens` tokens each, in the order of their names."""
    names: list[str] = []
    text = ""
    for document in documents(split):
        names, text = [*names, document.name], text + document.text
        if count(text) >= tokens:
            yield "+".join(names), text
            names, text = [], ""


def main() -> None:
    """Write the files and print the options that use them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--validation", type=int, default=2)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model)
    options.out.mkdir(parents=True)
    counts: dict[str, int] = {}
    wanted: tuple[tuple[Split, int | None], ...] = (("search", None), ("validation", options.validation))
    for split, most in wanted:
        texts = long_texts(split, options.tokens, lambda text: len(encode(tokenizer, text)) + 1)
        for name, text in islice(texts, most):
            (options.out / f"{split}-{name}.txt").write_text(text, encoding="utf-8")
            counts[split] = counts.get(split, 0) + 1
    print(f"--data {options.out} --documents {counts['search']} --validation-documents {counts['validation']}")


if __name__ == "__main__":
    main()
