"""Where gin files lie, and which macros they set: read as text, without gin and without the program."""

import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from elm_jax.errors import InputError, describe, nearest_names

REQUIRED = re.compile(r"%(?:gin\.)?REQUIRED")
_INCLUDE = re.compile(r"""^include\s+['"]([^'"]+)['"]""")
_TOKEN = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|#.*|[()\[\]{}]""")
_MACRO_LINE = re.compile(r"^([A-Za-z_]\w*)\s*=\s*(.*)$")


class MacroLine(NamedTuple):
    """A macro as a gin file sets it.

    Attributes:
        value: its text in the file, on one line.
        comment: what stands beside it, or "".
    """

    value: str
    comment: str


def search_paths(extra: Sequence[str] = ()) -> list[str]:
    """Folders that are searched for gin files: the user's, the current one, the checkout's, the package's."""
    package = pathlib.Path(__file__).resolve().parents[1]
    return [*extra, "", str(package.parent / "gin"), str(package / "gin")]


def gin_folder() -> pathlib.Path:
    """Path of the gin files that come with the program."""
    for folder in search_paths()[-2:]:
        if (pathlib.Path(folder) / "runs").is_dir():
            return pathlib.Path(folder)
    raise InputError(describe("The gin files that come with elm_jax are missing",
                              expected=search_paths()[-2:], cure="install the package again"))


def shipped_files(under: str = ".") -> list[str]:
    """Names of the gin files that come with the program (``experts/prompt.gin``), but for partial ones."""
    folder = gin_folder()
    return [path.relative_to(folder).as_posix() for path in sorted((folder / under).rglob("[!_]*.gin"))]


def strip_root(file: str) -> str:
    """Turns ``gin/runs/x.gin`` into ``runs/x.gin``, so that the path also works outside of a checkout."""
    if not pathlib.Path(file).exists() and file.startswith("gin/"):
        return file.removeprefix("gin/")
    return file


def nearest_files(files: Sequence[str]) -> list[str]:
    """Names of the gin files of the program that are most like those of `files` that are not found."""
    missing = [file for file in files if find(file) is None]
    return nearest_names(strip_root((missing or files)[0]), shipped_files())


def find(file: str, paths: Sequence[str] = ()) -> pathlib.Path | None:
    """Path of a gin file, looked up as gin does; None if it is nowhere."""
    found = (pathlib.Path(path, strip_root(file)) for path in search_paths(paths))
    return next((path for path in found if os.path.isfile(path)), None)


def title_of(file: str) -> str:
    """The first line of the comment that a gin file begins with, or ""."""
    path = find(file)
    first = "" if path is None else _lines(path)[:1]
    return first[0].lstrip("# ").strip() if first and first[0].startswith("#") else ""


def macros_of(files: Sequence[str], paths: Sequence[str] = ()) -> dict[str, MacroLine]:
    """Macros that gin files and the files that they include set; of several lines of one macro the last.

    A line without a comment keeps that of an earlier one. Files that are not found are passed over: reading
    the config is what refuses them.
    """
    found: dict[str, MacroLine] = {}
    for name, line in (each for file in files for each in _macro_lines(file, paths, ())):
        earlier = found.get(name)
        found[name] = line if line.comment or earlier is None else line._replace(comment=earlier.comment)
    return found


def _macro_lines(file: str, paths: Sequence[str], inside: tuple[str, ...]
                 ) -> Iterator[tuple[str, MacroLine]]:
    path = find(file, paths)
    if path is None or str(path) in inside:
        return
    lines = iter(_lines(path))
    for line in lines:
        if included := _INCLUDE.match(line):
            yield from _macro_lines(included[1], paths, (*inside, str(path)))
        elif macro := _MACRO_LINE.match(line):
            value, comment, depth = _parts(macro[2])
            while depth > 0 and (line := next(lines, None)) is not None:
                more, _, change = _parts(line.strip())
                value, depth = f"{value} {more}".strip(), depth + change
            yield macro[1], MacroLine(value, comment)


def _lines(path: pathlib.Path) -> list[str]:
    return path.read_text(encoding="utf-8-sig", errors="replace").splitlines()


def _parts(text: str) -> tuple[str, str, int]:
    """Splits a line into value and comment; also how many brackets more it opens than it closes."""
    value, comment, depth = text, "", 0
    for token in _TOKEN.finditer(text):
        depth += token[0] in "([{"
        depth -= token[0] in ")]}"
        if token[0].startswith("#"):
            value, comment = text[:token.start()], token[0]
    return value.strip(), comment.lstrip("# "), depth
