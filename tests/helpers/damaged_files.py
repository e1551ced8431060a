"""Damages files of every kind by a seed, reads them, and says where that is not an error of the input.

One damage again, with what it raised:

    PYTHONPATH=. python tests/helpers/damaged_files.py results 17

and a count of faults by place, of so many seeds from the first one on:

    PYTHONPATH=. python tests/helpers/damaged_files.py --count 100 --first 0 results library
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import damaged_kinds
from damaged_kinds import KINDS, Kind

from elm_jax.errors import InputError

SECONDS = 20
"""A reader that takes longer hangs."""
LONGEST_MESSAGE = 6000
ODD = (None, [], {}, "x", "", "../x", "a/b", "/etc/x", "a\0b", -1, 0, 1, 3, 0.5, -2.5, True, False, 10**6,
       2**63, 10**30, 1e308, [None], [[]], ["x"], [1, "x"], {"a": 1}, {"a": {"b": []}}, "2020-01-01",
       "[/bold]",
       "\x1b[31mred\x1b[0m", "[bold]x", "é" * 300, "\u202e", "x" * 70_000)
"""Values that no field expects, or that are out of range."""
BYTES = {
    "no UTF-8": b"\xff\xfe{\x00}\x00", "nested": b'{"a": ' + b"[" * 1_000_000, "long number": b'{"a": '
    + b"9" * 100_000 + b"}", "NaN": b'{"a": NaN}', "Infinity": b'{"schema_version": Infinity}',
    "list": b"[1, 2]", "text": b'"text"', "number": b"7", "null": b"null", "empty": b"", "blank": b"\n\n \n",
    "surrogate": b'{"schema_version": 1, "a": "\\ud800"}', "object": b"{}",
}
"""Contents in place of a file's own."""
YAML = ("2020-01-01", "2001-12-14t21:59:43.10-05:00", "12", "1.5", "true", "null", "[1, 2]", "{a: 1}",
        "!!set {a}", "!!python/object:os.system x", "&a [*a]", "'[/bold]'", "\"\\e[31m\"", "0x1F",
        "!!binary aGk=", "<<", "- ", "2020-99-99")
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefghi", "bcdefghij",
                                                                                strict=True))
GIN = ("include '{name}'\n", "include 'missing.gin'\n", "include '../x.gin'\n", "include '/etc'\n",
       "A = %B\nB = %A\n",
       "import missing_module\n", "study.x = @train()\n", "study = \n", "A = " + "[" * 5000 + "\n",
       "A = '\n", "study.prompt_tasks = 7\n", "study.top_k = 'x'\n", "T5Config.emb_dim = -1\n",
       "study.network = @study()\n", "A = " + "9" * 100_000 + "\n", "include 7\n",
       "A = 1e999\nstudy.top_k = %A\n")


@dataclasses.dataclass
class Fault:
    """A damage that was not met by one clear error.

    Attributes:
        kind: of the input.
        seed: of the damage.
        file: that was damaged, in its folder.
        damage: what was done to it.
        what: what happened.
        place: the innermost line of the program, for a traceback.
        trace: the traceback.
    """

    kind: str
    seed: int
    file: str
    damage: str
    what: str
    place: str
    trace: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.seed} ({self.file}: {self.damage}): {self.what} [{self.place}]"


class Hang(BaseException):
    """The reader took too long."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises Hang in the main thread after a time."""
    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Case:
    """A whole instance of a kind, whose files are damaged one after another and put right again."""

    def __init__(self, kind: Kind, where: pathlib.Path) -> None:
        self.kind, self.outside = kind, where / kind.name
        self.folder = self.outside / "within"
        self.folder.mkdir(parents=True)
        kind.make(self.folder)
        self.files = sorted(
            path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()
            and not any(part in f"/{path.relative_to(self.folder).as_posix()}" for part in kind.left_out))
        kind.read(self.folder)  # whole, it is read without an error

    def attempt(self, seed: int) -> Fault | None:
        """Damages a file by a seed, reads, and puts the file right again."""
        draw = random.Random(f"{self.kind.name} {seed}")
        file = draw.choices(self.files, [1 if "weights" in name or "state" in name else 3
                                         for name in self.files])[0]
        path = self.folder / file
        contents, times = path.read_bytes(), path.stat()
        damage, field = "", None
        try:
            damage, field = _damage(draw, path, contents)
            return self._read(seed, file, damage, field)
        finally:
            if path.is_symlink() or path.is_file():
                path.unlink()
            elif path.is_dir():
                shutil.rmtree(path)
            path.write_bytes(contents)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def _read(self, seed: int, file: str, damage: str, field: str | None) -> Fault | None:
        before = listing(self.outside)

        def fault(what: str, place: str = "", trace: str = "") -> Fault:
            return Fault(self.kind.name, seed, file, damage, what, place or what, trace)

        try:
            with within(SECONDS), open(os.devnull, "w") as silent, contextlib.redirect_stderr(silent):
                self.kind.read(self.folder)
        except InputError as error:
            found = self._message(file, field, str(error))
            if found:
                return fault(f"{found}: {str(error)[:1500]}", f"{found} {_place(error)}")
        except Hang as error:
            return fault("a hang", f"Hang {_place(error)}", "".join(traceback.format_exception(error)))
        except Exception as error:
            text = f"{type(error).__name__}: {str(error)[:200]}"
            return fault(text, f"{type(error).__name__} {_place(error)}",
                         "".join(traceback.format_exception(error)))
        changed = sorted(before.items() ^ listing(self.outside).items())
        changed = [name for name, _ in changed if not name.endswith("stages.json") and "/.clock" not in name]
        return fault(f"writes {changed[0]}") if changed else None

    def _message(self, file: str, field: str | None, text: str) -> str | None:
        """What an error's message lacks."""
        parts = pathlib.PurePosixPath(file).parts
        names = [parts[-1], *("/".join(parts[:count]) for count in range(2, len(parts)))]
        if parts[-1].isdecimal() or (len(parts) > 2 and ("weights" in parts or "state" in parts
                                                          or "checkpoint_0" in parts)):
            names.append(str(self.folder / parts[0]))
        if " leaf " in text:
            names.append(str(self.folder / parts[0]))  # leaves may lie in any file
        names += self.kind.told
        if not any(name in text for name in names):
            return "the message does not name the file"
        # The library that reads a tokenizer.json says line and column; a digest or size is of the whole file.
        whole = parts[-1] == "tokenizer.json" or any(
            words in text for words in ("is not the one that was written", "is shorter than it was written",
                                        "does not list the experts that its keys are of"))
        if field is not None and field not in text and not whole:
            return f"the message does not name the field {field[:80]!r}"
        if len(text) > LONGEST_MESSAGE:
            return "the message is too long"
        if any(ord(letter) < 32 and letter not in "\n\t" for letter in text):
            return "the message holds signs that a terminal obeys"
        return None


def _place(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/elm_jax/" in frame.filename]
    frames = [frame for frame in frames if not frame.filename.endswith("errors.py")]
    if not frames:
        return "outside"
    last = frames[-1]
    return f"{last.filename.rpartition('/elm_jax/')[2]}:{last.lineno} {last.name}"


def listing(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, with its size and time of change."""
    found = {}
    stack = [str(folder)]
    while stack:
        with os.scandir(stack.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    stack.append(entry.path)
                    found[entry.path] = (0, 0)
                elif not entry.path.endswith(".pyc"):
                    facts = entry.stat(follow_symlinks=False)
                    found[entry.path] = (facts.st_size, facts.st_mtime_ns)
    return found


def _damage(draw: random.Random, path: pathlib.Path, contents: bytes) -> tuple[str, str | None]:
    """Damages a file; returns what was done, and the field if it was done to a field."""
    own = {".json": _json, ".jsonl": _lines, ".npy": _npy, ".npz": _npz, ".safetensors": _safetensors,
           ".yaml": _yaml, ".gin": _gin, ".csv": _csv}.get(path.suffix, _binary)
    chosen = draw.choices((own, _binary, _whole, _place_of), (12, 4, 4, 2))[0]
    made = chosen(draw, path, contents)
    if made is None:
        made = _binary(draw, path, contents)
    return made


def _write(path: pathlib.Path, contents: bytes | str) -> None:
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode("utf-8", "surrogatepass"))


def _place_of(draw: random.Random, path: pathlib.Path, contents: bytes) -> tuple[str, None]:
    """Something else in the file's place."""
    path.unlink()
    what = draw.choice(("nothing", "a folder", "a dangling link", "a link to itself", "a filled folder"))
    if what.endswith("folder"):
        path.mkdir()
    if what == "a filled folder":
        (path / "x").write_text("x")
    if what.startswith(("a dangling", "a link")):
        path.symlink_to(path if "itself" in what else path.parent / "there is no such file")
    return what, None


def _whole(draw: random.Random, path: pathlib.Path, contents: bytes) -> tuple[str, None]:
    """Other contents."""
    name = draw.choice([*BYTES, "twice", "byte order mark", "random"])
    made = {"twice": contents + contents, "byte order mark": b"\xef\xbb\xbf" + contents,
            "random": draw.randbytes(200)}.get(name, BYTES.get(name))
    _write(path, made)
    return name, None


def _binary(draw: random.Random, path: pathlib.Path, contents: bytes) -> tuple[str, None]:
    """Bytes cut off, changed, put in or taken out."""
    made, head = bytearray(contents or b"x"), min(len(contents) or 1, draw.choice((16, 200, 10**9)))
    place = draw.randrange(head)
    what = draw.choice(("cut", "flip", "flips", "zeros", "put in", "take out", "large", "no UTF-8"))
    if what == "cut":
        del made[place:]
    elif what == "flip":
        made[place] ^= 1 << draw.randrange(8)
    elif what == "flips":
        for _ in range(draw.choice((3, 30))):
            made[draw.randrange(len(made))] = draw.randrange(256)
    elif what == "zeros":
        made[place:place + 8] = bytes(8)
    elif what == "put in":
        made[place:place] = draw.randbytes(draw.choice((1, 8, 100)))
    elif what == "take out":
        del made[place:place + draw.choice((1, 4, 100))]
    elif what == "large":
        made[place:place + 8] = struct.pack("<Q", draw.choice((2**63 - 1, 2**64 - 1, 10**12, 2**32)))
    else:
        made[place:place] = b"\xff\xfe"
    _write(path, bytes(made))
    return f"{what} at {place}", None


def _places(value: Any, depth: int = 6) -> Iterator[tuple[Any, ...]]:
    """Where values lie in a JSON value; of long lists the first three entries."""
    items = list(value.items()) if isinstance(value, dict) else \
        list(enumerate(value))[:3] if isinstance(value, list) else []
    for key, inner in items if depth else ():
        yield (key,)
        yield from ((key, *rest) for rest in _places(inner, depth - 1))


def _change(draw: random.Random, value: Any) -> tuple[str, str | None]:
    """Changes one field of a JSON value in place; fields that lie higher are changed more often."""
    places = list(_places(value))
    if not places:
        return "no field", None
    place = draw.choices(places, [4.0 ** -len(each) for each in places])[0]
    inside = value
    for key in place[:-1]:
        inside = inside[key]
    names = [str(key) for key in place if isinstance(key, str)]
    what = draw.choice(("remove", "add", "rename", *["replace"] * 9))
    where = "/".join(map(str, place))
    if what == "remove":
        del inside[place[-1]]
        return f"remove {where}", None
    if what == "add" and isinstance(inside, dict):
        inside[draw.choice(("extra", "[/bold]", "\x1b[31m", "../x"))] = draw.choice(ODD)
        return f"add beside {where}", None
    if what == "rename" and isinstance(inside, dict):
        inside[draw.choice(("../x", "a/b", "", "\x1b[31m"))] = inside.pop(place[-1])
        return f"rename {where}", None
    new = draw.choice(ODD) if draw.random() < 0.8 else [inside[place[-1]]]
    inside[place[-1]] = new
    return f"{where} = {repr(new)[:60]}", names[-1] if names else None


def _dump(draw: random.Random, value: Any) -> str:
    text = json.dumps(value)
    if draw.random() < 0.03 and isinstance(value, dict) and value:
        text = f"{{{json.dumps(next(iter(value)))}: null, {text[1:]}"  # a key twice, of which the last counts
    return text


def _json(draw: random.Random, path: pathlib.Path, contents: bytes) -> tuple[str, str | None] | None:
    value = json.loads(contents)
    made = _change(draw, value)
    _write(path, _dump(draw, value))
    return made


def _lines(draw: random.Random, path: pathlib.Path, contents: bytes) -> tuple[str, str | None] | None:
    lines = contents.decode().splitlines()
    if not lines:
        return None
    number = draw.randrange(len(lines))
    if draw.random() < 0.3:
        what = draw.choice([*BYTES, "half", "half last"])
        if what.startswith("half"):
            number = len(lines) - 1 if what == "half last" else number
            lines[number] = lines[number][:len(lines[number]) // 2]
            end = "" if what == "half last" else "\n"
            _write(path, "\n".join(lines) + end)
            return what, None
        parts = [line.encode() for line in lines]
        parts[number] = BYTES[what]
        _write(path, b"\n".join(parts) + b"\n")
        return f"{what} in line {number + 1}", None
    value = json.loads(lines[number])
    what, field = _change(draw, value)
    lines[number] = _dump(draw, value)
    _write(path, "\n".join(lines) + "\n")
    return f"line {number + 1}: {what}", field


def _npy(draw: random.Random, path: pathlib.Path, contents: bytes) -> tuple[str, None]:
    """Another head: a large or negative shape, another type, objects, no head."""
    size = struct.unpack("<H", contents[8:10])[0]
    head = contents[10:10 + size].decode("latin1")
    old, new = draw.choice((
        ("(", "(99999999999, "), ("(", "(-1, "), ("(", "('x', "), ("<i", "<f"), ("<i4", "|O"), ("<i8", "|O"),
        ("|u1", "|O"), ("<i8", "<i4"), ("<i4", "<i8"), ("False", "True"), ("False", "7"), ("descr", "other"),
        ("{", "[" * 500), ("(", "(" + "9" * 5000 + ","), ("'", "\0")))
    head = head.replace(old, new, 1).encode("latin1")
    size, head = 10 + size, head[:65535]
    _write(path, contents[:8] + struct.pack("<H", len(head)) + head + contents[size:])
    return f"head: {old} -> {new[:30]}", None


def _npz(draw: random.Random, path: pathlib.Path, contents: bytes) -> tuple[str, None]:
    import io

    with zipfile.ZipFile(io.BytesIO(contents)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    what = draw.choice(("empty", "one less", "damaged", "damaged", "damaged"))
    name = draw.choice(list(parts))
    if what == "empty":
        parts = {}
    elif what == "one less":
        del parts[name]
    else:
        (draw.choice((_npy, _npy, _binary, _whole)))(draw, path, parts[name])
        parts[name] = path.read_bytes()
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for each, part in parts.items():
            archive.writestr(each, part)
    _write(path, made.getvalue())
    return f"{what}: {name}", None


def _safetensors(draw: random.Random, path: pathlib.Path, contents: bytes) -> tuple[str, None]:
    size = struct.unpack("<Q", contents[:8])[0]
    head = json.loads(contents[8:8 + size])
    what, _ = _change(draw, head)
    text = json.dumps(head).encode()
    length = draw.choice((len(text), len(text), len(text), 0, 2**63, size + 10**9))
    _write(path, struct.pack("<Q", length) + text + contents[8 + size:])
    return f"head of {length}: {what}", None


def _yaml(draw: random.Random, path: pathlib.Path, contents: bytes) -> tuple[str, None]:
    """Another value behind a key, or a document that grows as it is read."""
    if draw.random() < 0.05:
        _write(path, BOMB)
        return "a bomb", None
    lines = contents.decode().splitlines()
    number = draw.choice([number for number, line in enumerate(lines) if ":" in line])
    key = lines[number].partition(":")[0]
    what = draw.choice((*YAML, "remove", "twice"))
    if what == "remove":
        del lines[number]
    else:
        lines[number] = f"{lines[number]}\n{lines[number]}" if what == "twice" else f"{key}: {what}"
    _write(path, "\n".join(lines) + "\n")
    return f"{key.strip()} = {what[:30]}", None


def _gin(draw: random.Random, path: pathlib.Path, contents: bytes) -> tuple[str, None]:
    line = draw.choice(GIN).replace("{name}", str(path))
    _write(path, line.encode() + contents if draw.random() < 0.5 else contents + b"\n" + line.encode())
    return repr(line)[:60], None


def _csv(draw: random.Random, path: pathlib.Path, contents: bytes) -> tuple[str, None]:
    new = draw.choice(('"', "a,b,c,d", "\0", "1e999", "nan", "../x", "x" * 200_000, "[" * 5000, "-1",
                       "\x1b[31m", "9" * 100_000, "(" * 200 + ")" * 200, "{1: {2: 3}}"))
    cells = contents.decode().split(",")
    cells[draw.randrange(len(cells))] = new
    _write(path, ",".join(cells))
    return f"a cell is {new[:30]!r}", None


def faults(kinds: Iterable[Kind], seeds: Callable[[Kind], Sequence[int]], where: pathlib.Path) -> list[Fault]:
    """Damages each kind by seeds; returns what was not met by an error of the input."""
    found = []
    for kind in kinds:
        case = Case(kind, where)
        found += [fault for seed in seeds(kind) if (fault := case.attempt(seed)) is not None]
    return found


def main() -> None:
    """Counts faults by place, or shows one."""
    parser = argparse.ArgumentParser(description=__doc__)
    logging.disable()
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.count:
            kinds = [KINDS[name] for name in arguments.kinds or KINDS]
            seeds = range(arguments.first, arguments.first + arguments.count)
            found = []
            for kind in kinds:
                start, before = time.process_time(), len(found)
                found += faults([kind], lambda kind: seeds, pathlib.Path(folder))
                seconds = time.process_time() - start
                print(f"{kind.name}: {len(found) - before} faults, {seconds:.1f} s", flush=True)
            by_place = collections.defaultdict(list)
            for fault in found:
                by_place[fault.place].append(fault)
            for place, those in sorted(by_place.items(), key=lambda pair: -len(pair[1])):
                print(f"{len(those):4} {place}\n       {str(those[0])[:300]}")
            print(f"{len(found)} of {len(kinds) * arguments.count}, {len(by_place)} places")
        else:
            name, seed = arguments.kinds
            fault = Case(KINDS[name], pathlib.Path(folder)).attempt(int(seed))
            print(fault, fault and fault.trace)
    damaged_kinds.forget()


if __name__ == "__main__":
    sys.setrecursionlimit(1000)
    main()
