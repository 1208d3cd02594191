"""The model card of an extended model: what was done, what it is worth, how to run it, how to do it again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from longrope_export.converters import recipes
from longrope_export.report.style import Picture
from longrope_export.scaling import RopeScaling

_MARKUP = re.compile(r"[\\`*_\[\]|]")


@dataclass(frozen=True)
class CardContents:
    """Everything that a card shows; `table` is a header row and rows of cells, all text.

    `figure` shows what was measured, `factors` the factors; their PNGs lie beside the card as `figure_file(…)`.
    """

    name: str
    scaling: RopeScaling
    command: str
    gguf: str | None = None
    folder: bool = False
    table: Sequence[Sequence[str]] = ()
    table_caption: str = ""
    figure: Picture | None = None
    factors: Picture | None = None
    checks: Sequence[str] = ()
    lossy: Sequence[str] = ()
    notes: Sequence[str] = ()
    versions: dict[str, str] = field(default_factory=dict)


def model_card(contents: CardContents) -> str:
    """The card as Markdown with Hugging Face front matter."""
    sections = [
        _front_matter(contents),
        _headline(contents),
        _table(contents),
        _factors(contents),
        _list("Checks", contents.checks),
        _list("What these files do not carry", contents.lossy),
        _list("Good to know", contents.notes),
        _running(contents),
        _again(contents),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of text cells; the first row is the header, numbers stand right."""
    header, *body = [[markdown_text(cell) for cell in row] for row in rows]
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *body))


def markdown_text(text: str) -> str:
    """`text` on one line of Markdown in which nothing of it is markup: a row may bear any name."""
    escaped = _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def figure_file(figure: Picture) -> str:
    """Name of a figure's file beside the card."""
    return f"{figure.name}.png"


def _front_matter(contents: CardContents) -> str:
    return "---\ntags:\n- longrope\n- long-context\n---"


def _headline(contents: CardContents) -> str:
    scaling = contents.scaling
    return (
        f"# {contents.name}\n\n"
        f"A window of {scaling.original_max_position_embeddings:,} tokens, extended to "
        f"{scaling.max_position_embeddings:,} ({scaling.factor:g}×) by rescaling the RoPE frequencies; no weight was "
        "changed. The factors are in the files; `longrope read` shows them."
    )


def _table(contents: CardContents) -> str:
    parts = ["## Before and after"]
    if contents.table:
        parts += [contents.table_caption, markdown_table(contents.table)]
    if contents.figure:
        parts.append(_image(contents.figure))
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _factors(contents: CardContents) -> str:
    return f"## The factors\n\n{_image(contents.factors)}" if contents.factors else ""


def _image(picture: Picture) -> str:
    return f"![{markdown_text(picture.alt)}]({figure_file(picture)})\n\n{markdown_text(picture.caption)}"


def _list(title: str, lines: Sequence[str]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""


def _running(contents: CardContents) -> str:
    blocks = []
    if contents.folder:
        blocks.append(("transformers", "python", recipes.transformers_recipe(".", contents.scaling)))
        blocks.append(("vLLM", "sh", recipes.vllm_recipe(".", contents.scaling)))
        blocks.append(("mlx-lm", "sh", recipes.mlx_recipe(".", contents.scaling)))
    if contents.gguf:
        if not contents.folder:
            blocks.append(("transformers", "python", recipes.gguf_loader_recipe(contents.gguf)))
        blocks.append(("llama.cpp", "sh", recipes.llama_cpp_recipe(contents.gguf, contents.scaling)))
        blocks.append(("Ollama", "sh", recipes.ollama_recipe(contents.gguf, contents.scaling)))
    body = "\n\n".join(f"{title}:\n\n```{language}\n{code}\n```" for title, language, code in blocks)
    return f"## Running it\n\n{body}"


def _again(contents: CardContents) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(contents.versions.items()))
    provenance = "\n".join(f"- {key}: {_short(value)}" for key, value in contents.scaling.provenance.items())
    return f"## Making it again\n\n```sh\n{contents.command}\n```\n\n{provenance}\n- versions: {versions}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 300 else text[:297] + "..."
