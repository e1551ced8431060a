"""What the help of a run adds: the macros of the gin files given, or the defaults and the files there are."""

import itertools
import pathlib
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from elm_jax.cli import gin_files
from elm_jax.cli.gin_files import MacroLine
from elm_jax.cli.run_flags import LENGTHS, PRETRAIN, STUDY, TRAIN, RunFlag
from elm_jax.workflows.choices import TRAIN_KINDS

WIDTH = 80
FILES_HEAD = "gin files, for --gin_file (with --help: the macros of one):"
_DASH = "–"


def of_train(words: Sequence[str]) -> str:
    """Text for `elm train`: by default what each kind has where no flag says otherwise."""
    kinds = _values_of(words, "--kind")
    files = _values_of(words, "--gin_file") or []
    if files or kinds:
        return _listing([*(f"experts/{kind}.gin" for kind in kinds), *files], words, TRAIN)
    kinds = [kind for kind in TRAIN_KINDS if gin_files.find(f"experts/{kind}.gin") and kind != "prompt_stack"]
    macros = {kind: gin_files.macros_of([f"experts/{kind}.gin"]) for kind in kinds}
    settings = [flag for flag in TRAIN if any(_own(macros[kind], flag) for kind in kinds)]
    rows = [["", *kinds], *([flag.spelled, *(_own(macros[kind], flag) or _DASH for kind in kinds)]
                            for flag in settings)]
    return "\n".join([
        "where a flag is not given, by --kind:", *_columns(rows), "",
        "  Without a gin file, a run takes the lengths that its rows need, at most these.", "",
        FILES_HEAD,
        *_files(("experts", "scale", "models", "sharding")), ""])


def of_pretrain(words: Sequence[str]) -> str:
    """Text for `elm pretrain`: by default the macros of its own file."""
    files = _values_of(words, "--gin_file")
    listing = _listing(["runs/pretrain.gin", *files], words, PRETRAIN)
    return "\n".join([listing, "gin files of networks, for --gin_file:", *_files(("models",)), ""])


def of_study(words: Sequence[str]) -> str:
    """Text for `elm study`: the studies there are, or the macros of those given."""
    files = _values_of(words, "--gin_file")
    if files:
        return _listing(files, words, STUDY)
    return "\n".join([FILES_HEAD, *_files(("studies",)), ""])


def _listing(files: Sequence[str], words: Sequence[str], flags: Sequence[RunFlag]) -> str:
    """The macros of gin files, each with its value, its flag and the comment beside it."""
    paths = [path for value in _values_of(words, "--gin_search_paths") for path in value.split(",") if path]
    missing = [file for file in files if gin_files.find(file, paths) is None]
    if missing:
        near = "".join(f"\n  {file}" for file in gin_files.nearest_files(missing))
        return f"{missing[0]} is not found; the nearest:{near}\n"
    macros = gin_files.macros_of(files, paths)
    names = " and ".join(pathlib.Path(file).name for file in files)
    lines = [f"macros of {names} (a flag, or --gin.NAME=VALUE):"]
    spelled: dict[str, str] = {}
    for flag in flags:
        spelled[flag.macro] = " ".join(filter(None, (spelled.get(flag.macro), flag.spelled)))
    width = max(map(len, macros), default=0)
    for name, line in macros.items():
        value = "required" if gin_files.REQUIRED.fullmatch(line.value) else line.value
        beside = [part for part in (spelled.get(name), line.comment) if part]
        lines += _wrapped(f"  {name:<{width}}  ", value, "; ".join(beside))
    return "\n".join([*lines, ""]) if macros else f"{names}: no macros\n"


def _wrapped(head: str, value: str, note: str) -> list[str]:
    """A macro's lines: its value, and its note behind it or, if there is no room, below."""
    room, indent = WIDTH - len(head), " " * len(head)
    short = value if len(value) <= 3 * room else f"{value[:2 * room]} ..."
    lines = textwrap.wrap(short, room, break_on_hyphens=False) or [""]
    aligned = f"{lines[0]:<12}  {note}"
    beside = aligned if len(aligned) <= room else f"{lines[0]}  {note}"
    if note and len(lines) == 1 and len(beside) <= room:
        lines, note = [beside], ""
    if note:
        lines += [f"  {line}" for line in textwrap.wrap(note, room - 2, break_on_hyphens=False)]
    return [head + lines[0], *(indent + line for line in lines[1:])]


def _own(macros: Mapping[str, MacroLine], flag: RunFlag) -> str:
    """What a flag's macro is in a gin file; "" where it has none, or one that must be given."""
    line = macros.get(flag.macro)
    if line is None or gin_files.REQUIRED.fullmatch(line.value) or line.value == "None" or flag.several:
        return ""
    if flag.macro == LENGTHS:
        _, _, rest = line.value.partition(f"'{flag.part}': ")
        return rest.split(",")[0].strip("} ")
    return line.value.strip("'")


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows]


def _files(folders: Iterable[str]) -> list[str]:
    """The gin files of some folders: experts and studies with their titles, the others by name."""
    lines = []
    for folder in folders:
        files = gin_files.shipped_files(folder)
        if folder in ("experts", "studies"):
            width = max(map(len, files), default=0) + len("gin/")
            for file in files:
                lines += textwrap.wrap(
                    gin_files.title_of(file), WIDTH, initial_indent=f"  {f'gin/{file}':<{width}}  ",
                    subsequent_indent=" " * (width + 4))
        else:
            lines += textwrap.wrap(" ".join(pathlib.Path(file).name for file in files), WIDTH,
                                   initial_indent=f"  gin/{folder}/: ", subsequent_indent="    ",
                                   break_on_hyphens=False)
    return lines


def _values_of(words: Sequence[str], flag: str) -> list[str]:
    """The values that a command line gives to a flag."""
    follows = [word for before, word in itertools.pairwise(words) if before == flag]
    return follows + [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
