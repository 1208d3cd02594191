"""Printing aligned tables of text that may come from a stranger's file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def printable(text: object) -> str:
    """`text` with control characters, terminal escapes and lone surrogates made visible."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text))


def print_table(rows: Iterable[tuple[object, object]], title: str | None = None) -> None:
    """Print rows of a name and a text on stdout, wrapped to the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(markup=False, highlight=False, emoji=False)
    if title is not None:
        console.print(Text(f"\n{title}", style="bold"))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(Text(printable(name), style="cyan"), Text(printable(text)))
    console.print(table)


def print_cells(cells: Sequence[Sequence[str]]) -> None:
    """Print rows of texts on stdout, the first row as the header; numbers stand on the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(cells[0]):
        number = any(row[index][:1].isdigit() for row in cells[1:])
        table.add_column(Text(printable(name)), justify="right" if number else "left")
    for row in cells[1:]:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(markup=False, highlight=False, emoji=False).print(table)


def span(values: Sequence[float]) -> str:
    """First, last, least and greatest of a list of factors, in one line."""
    if len(set(values)) == 1:
        return f"{len(values)} × {values[0]:.6g}"
    return (
        f"{len(values)} values, {values[0]:.6g} … {values[-1]:.6g} (least {min(values):.6g}, "
        f"greatest {max(values):.6g})"
    )
