"""Tables as plain text: columns fitted to a width with every name whole, or tab-separated lines."""

import dataclasses
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from rich.cells import cell_len, set_cell_size

GAP = "  "
TEXT_WIDTH = 16
"""A column of sentences is not made narrower than this."""
BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
HIDDEN = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode's categories of control codes, halves of characters, and ends of lines and of paragraphs."""


def visible(text: str, keep: str = "") -> str:
    r"""The text with everything that would act on a terminal, or end a line, written as an escape.

    Args:
        text: a name or a sentence from a file, say ``"a\x1b[31m"``.
        keep: characters that stay as they are, such as the newlines of a message of several lines.

    Returns:
        Control codes, tabs, newlines, lone surrogates and changes of the direction of writing as ``\x1b``,
        ``\t``, ``\n``, ``\udc80``, ``\u202e``; all other characters as they are.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char in keep or not (char in BIDIRECTIONAL or unicodedata.category(char) in HIDDEN)
        else char.encode("unicode_escape").decode("ascii") for char in text)


def plain(value: Any) -> str:
    """A value as a script reads it: numbers in full, nothing for None, several values with commas."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    return str(value)


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: its heading.
        rank: 0 for a column that is always there; of the others the highest leaves a narrow terminal first.
        kind: ``name`` is never broken, ``number`` neither and stands at the right, ``text`` may go on in the
            next line between two words, ``excerpt`` is cut where the width ends.
        show: formats a value for people (not None, which is empty); None for `plain`, which scripts get.
        where: whether people and scripts both get the column, or only one of them.
    """

    name: str
    rank: int = 0
    kind: Literal["name", "number", "text", "excerpt"] = "name"
    show: Callable[[Any], str] | None = None
    where: Literal["both", "people", "scripts"] = "both"

    def cell(self, value: Any) -> str:
        """The value as people see it, on one line."""
        return visible(plain(value) if value is None or self.show is None else self.show(value))


def separated(columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> list[str]:
    r"""The table for scripts: one line of headings, one line a row, cells separated by tabs.

    A cell that begins with a quotation mark gets a backslash before it: readers of CSV would look for its
    other end in later cells.
    """
    kept = [number for number, column in enumerate(columns) if column.where != "people"]
    lines = [[columns[number].name for number in kept]]
    lines += [[visible(plain(row[number])) for number in kept] for row in rows]
    return ["\t".join(f"\\{cell}" if cell.startswith('"') else cell for cell in line) for line in lines]


def fitted(columns: Sequence[Column], rows: Sequence[Sequence[Any]], width: int | None
           ) -> tuple[list[str], list[str]]:
    """The table for people, in lines of at most `width` where names allow it.

    Args:
        columns: of each value of a row.
        rows: values.
        width: of the terminal, in characters; None for every column, and every row on one line.

    Returns:
        The lines, headings first, and the names of the columns that did not fit. Where the columns of rank 0
        alone are too wide, every row is a block of lines, a cell each, and no column is missing.
    """
    shown = [number for number, column in enumerate(columns) if column.where != "scripts"]
    cells = {number: [columns[number].cell(row[number]) for row in rows] for number in shown}
    natural = {number: max(_longest_word(columns[number].name), *map(cell_len, cells[number]), 0)
               for number in shown}
    least = {number: _least(columns[number], cells[number], natural[number]) for number in shown}
    kept, left = [], width
    for number in sorted(shown, key=lambda number: (columns[number].rank, number)):
        needed = least[number] + (len(GAP) if kept else 0)
        if width is None or columns[number].rank == 0 or needed <= left:
            kept.append(number)
            left = None if width is None else left - needed
    if left is not None and left < 0:
        return _blocks(columns, cells, width), []
    kept.sort()
    widths = natural if width is None else {number: least[number] for number in kept}
    for _ in range(left or 0):  # what is left goes to the sentences that lack most
        lacking = max(kept, key=lambda number: natural[number] - widths[number])
        widths[lacking] += widths[lacking] < natural[lacking]
    lines = _lines([columns[number] for number in kept], [cells[number] for number in kept],
                   [widths[number] for number in kept])
    return lines, [columns[number].name for number in shown if number not in kept]


def wrapped(text: str, width: int | None) -> list[str]:
    """Breaks a text between words into lines of at most `width`, indented as its first line.

    A word that is longer has a line for itself; None breaks nothing.
    """
    if width is None or cell_len(text) <= width:
        return [text]
    indent = text[:len(text) - len(text.lstrip())]
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}" if line else indent + word
        if line and cell_len(longer) > width:
            lines.append(line)
            longer = indent + word
        line = longer
    return [*lines, line]


def shortened(text: str, width: int | None) -> str:
    """The text on one line of at most `width` cells, which ends in an ellipsis if it was longer."""
    text = visible(" ".join(text.split()))
    if width is None or cell_len(text) <= width:
        return text
    return set_cell_size(text, max(width - 1, 0)).rstrip() + "…"


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)


def _least(column: Column, cells: Sequence[str], natural: int) -> int:
    """The least width of a column: of its longest name, or of the longest word of its sentences."""
    if column.kind == "excerpt":
        return max(_longest_word(column.name), min(natural, TEXT_WIDTH))
    if column.kind != "text":
        return natural
    words = max((_longest_word(cell) for cell in (column.name, *cells)), default=0)
    return max(words, min(natural, TEXT_WIDTH))


def _lines(columns: Sequence[Column], cells: Sequence[Sequence[str]], widths: Sequence[int]) -> list[str]:
    headings = [wrapped(column.name, width) for column, width in zip(columns, widths, strict=True)]
    height = max(map(len, headings), default=0)
    heading = [[""] * (height - len(lines)) + lines for lines in headings]
    lines = [*_block(columns, heading, widths), GAP.join("─" * width for width in widths)]
    for row in zip(*cells, strict=True):
        broken = [_broken(*one) for one in zip(columns, row, widths, strict=True)]
        lines += _block(columns, broken, widths)
    return lines


def _broken(column: Column, cell: str, width: int) -> list[str]:
    if column.kind == "excerpt":
        return [shortened(cell, width)]
    return wrapped(cell, width) if column.kind == "text" else [cell]


def _blocks(columns: Sequence[Column], cells: Mapping[int, Sequence[str]], width: int) -> list[str]:
    """Every row as a block of lines: a heading and a cell each, longer sentences over several lines."""
    lines = []
    for row in zip(*cells.values(), strict=True):
        for number, cell in zip(cells, row, strict=True):
            column = columns[number]
            text = f"{column.name}: {cell}".removeprefix(": ")
            first, *others = [shortened(text, width)] if column.kind == "excerpt" else wrapped(text, width)
            lines += [first, *wrapped(GAP + " ".join(others), width)] if others else [first]
        lines.append("")
    return lines[:-1]


def document(columns: Sequence[Column], rows: Sequence[Sequence[Any]], width: int | None, *,
             title: str = "", cure: str = "--wide shows all") -> list[str]:
    """The lines of a table for people, with a title and a note on what did not fit.

    Args:
        columns: of each value of a row.
        rows: values.
        width: of the terminal; None for a file or a pipe, which get all columns.
        title: stands above.
        cure: where the columns are that did not fit.
    """
    lines, left_out = fitted(columns, rows, width)
    note = f"not shown in {width} columns: {', '.join(left_out)}; {cure}"
    return [*(wrapped(visible(title), width) if title else []), *lines,
            *(wrapped(note, width) if left_out else [])]


def _block(columns: Sequence[Column], cells: Sequence[Sequence[str]], widths: Sequence[int]) -> list[str]:
    """The lines of one row, whose cells have one line or more."""
    lines = []
    for number in range(max(map(len, cells), default=0)):
        parts = []
        for column, own, width in zip(columns, cells, widths, strict=True):
            text = own[number] if number < len(own) else ""
            blank = " " * (width - cell_len(text))
            parts.append(blank + text if column.kind == "number" else text + blank)
        lines.append(GAP.join(parts).rstrip())
    return lines
