"""Reads and writes files, local or in a bucket by URI prefix; all file access goes through it.

Buckets have no atomic rename, so nothing relies on one: a folder is whole when, and only when, its
commit marker, written last, is there. `begin` removes the marker before anything else is touched.

With several processes only the first one writes; in the others, calls that write text, markers and whole
folders return at once. `staging` renames finished folders; `tree_files` writes trees of arrays.
"""

import datetime
import errno
import io
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from etils import epath

from elm_jax.errors import ElmError, InputError, RunError, describe, in_short, nearest_names
from elm_jax.runtime import hosts, leftovers

MARKER, MARKER_VERSION = "COMMITTED.json", 1
_AGAIN = "then start again: what was committed before is kept"
_CURES = {
    errno.ENOSPC: f"free space or choose another folder, {_AGAIN}",
    errno.EDQUOT: f"free space within the quota, or choose another folder, {_AGAIN}",
    errno.EFBIG: f"choose a disk that holds larger files, or raise the limit on them (`ulimit -f`), {_AGAIN}",
    errno.EROFS: f"choose a folder on a disk that is not mounted read-only, {_AGAIN}",
    errno.EACCES: f"choose a folder that you may write, or have its permissions changed, {_AGAIN}",
    errno.EPERM: f"choose a folder that you may write, or have its permissions changed, {_AGAIN}",
    errno.EMFILE: f"raise the limit on open files (`ulimit -n`), {_AGAIN}",
    errno.ENFILE: f"close other programs, which hold too many files open, {_AGAIN}",
    errno.EISDIR: "a folder has the name of a file that is written: choose another name, or move the folder",
    errno.ENOTDIR: "a file has the name of a folder that is written: choose another name, or move the file",
    errno.EEXIST: "a file, or a link that leads nowhere, has the name of a folder that is written: choose "
    "another name, or move it",
    errno.ELOOP: "links of the path lead in a circle: choose another path, or mend the links",
    errno.ENAMETOOLONG: "give a shorter name: most disks take at most 255 bytes of one name, 4,095 of a path",
}
"""What to do about a write that the system refused, by its reason."""
_REFUSED_WORDS = (*(os.strerror(reason).lower() for reason in (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG)),
    "resource_exhausted")
PathLike = str | os.PathLike


def as_path(path: PathLike) -> epath.Path:
    """Makes a path of the store that the URI's prefix names (none: the local disk)."""
    return epath.Path(path).expanduser() if "://" not in str(path) else epath.Path(path)


def is_local(path: PathLike) -> bool:
    """Whether the path is on the local disk rather than in a bucket."""
    return "://" not in str(path)


@contextmanager
def guard_writes(path: PathLike) -> Iterator[None]:
    """Turns errors of a full, read-only or unusable disk into one clear RunError that names the path.

    Orbax and TensorStore report such a disk as a ValueError or RuntimeError with the system's words in it.
    A name that is too long is wrong input, and an InputError.
    """
    try:
        yield
    except Exception as error:
        if not _is_refused_write(error):
            raise
        reason = _reason_of(error)
        raise (InputError if reason == errno.ENAMETOOLONG else RunError)(describe(
            "Cannot write", where=path, got=str(error)[:300], cure=cure_of(error))) from error


def cure_of(error: Exception) -> str:
    """What to do about a write that the system refused, as an OSError or in a library's words."""
    return _CURES.get(_reason_of(error), f"choose another folder, {_AGAIN}")


def _reason_of(error: Exception) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    words = str(error).lower()
    return next((reason for reason in _CURES if os.strerror(reason).lower() in words),
                errno.ENOSPC if "resource_exhausted" in words else None)


def _is_refused_write(error: Exception) -> bool:
    if isinstance(error, ElmError):
        return False
    return isinstance(error, OSError) or any(words in str(error).lower() for words in _REFUSED_WORDS)


def require_file(path: PathLike) -> epath.Path:
    """Returns the path if it is a file; else raises InputError."""
    path = as_path(path)
    if not path.exists():
        link = f"a link to {os.readlink(path)}, and that is not there" if os.path.islink(path) else None
        raise InputError(describe("File does not exist", where=path, got=link or what_is_there(path)))
    if path.is_dir():
        raise InputError(describe("A file is expected here", where=path, got="a folder"))
    return path


def what_is_there(path: PathLike) -> str:
    """Says what there is in place of a missing path: the nearest names in its folder, or no folder."""
    path = as_path(path)
    folder = path.parent
    if folder == path or not folder.exists():
        return f"no folder {folder}"
    if not folder.is_dir():
        return f"{folder}, which is a file"
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError as error:
        return f"{folder}, which cannot be listed: {error.strerror}"
    return f"{folder} with {len(names)} entries" + (
        f", nearest: {', '.join(nearest_names(path.name, names))}" if names else "")


def read_bytes(path: PathLike, start: int = 0, end: int | None = None) -> bytes:
    """Reads a file from a byte on, to its end or to another byte.

    Raises:
        InputError: a missing or unreadable file, or a folder, or one that ends before `end`.
    """
    path = require_file(path)
    try:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read() if end is None else file.read(end - start)
    except OSError as error:
        raise InputError(describe("The file cannot be read", where=path, got=error.strerror or error,
                                  cure="look at its permissions and at the disk")) from error
    if end is not None and len(content) < end - start:
        raise InputError(describe("The file is shorter than it was written", where=path,
                                  got=f"{start + len(content)} bytes", expected=f"{end} bytes",
                                  cure="the file is damaged: fetch or write it again"))
    return content


def read_text(path: PathLike) -> str:
    """Reads a UTF-8 file, without a byte order mark; a missing one, or other bytes, is an InputError."""
    return _decode(read_bytes(path), path)


def _decode(content: bytes, path: PathLike, start: int = 0) -> str:
    """The text of a file's bytes, from the byte `start` on."""
    try:  # etils' own reader of texts leaves the mark in
        return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise InputError(describe("The file is no text", where=path,
                                  got=f"byte {start + error.start} is {error.object[error.start]:#04x}",
                                  expected="UTF-8", cure="save the file as UTF-8")) from error


def require_name(name: Any, where: Any, what: str) -> str:
    """Returns a file's name if it is a plain name; InputError for one that leads out of its folder."""
    if (not isinstance(name, str) or name in ("", ".", "..") or "\0" in name
            or "/" in name or os.path.basename(name) != name):
        raise InputError(describe(f"The {what} must be the name of a file in the same folder", where=where,
                                  got=repr(name)[:200], expected="a plain name, without / or .."))
    return name


def write_text(path: PathLike, text: str, *, own: bool = False) -> None:
    """Writes a text as `write_bytes` does, in UTF-8."""
    write_bytes(path, text.encode(), own=own)


def write_bytes(path: PathLike, content: bytes, *, own: bool = False) -> None:
    """Writes a file whole: on a local disk through a temporary file beside it.

    Temporary files that killed processes left in its folder are removed.

    Args:
        path: of the file.
        content: its bytes.
        own: whether each process of a run writes; otherwise the first one alone does.
    """
    if not own and not hosts.is_first():
        return
    path = as_path(path)
    with guard_writes(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not is_local(path):
            path.write_bytes(content)
            return
        leftovers.clear(str(path.parent))
        with leftovers.new_file(str(path)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)


def write_json(path: PathLike, value: Any, *, own: bool = False) -> None:
    """Writes one JSON value as `write_bytes` does, indented, keys in the given order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", own=own)


def read_json(path: PathLike, *, kind: str, schema_version: int | None) -> dict[str, Any]:
    """Reads a JSON object and checks its ``schema_version`` (None: another program's, which has none).

    Raises:
        InputError: the file is missing, is not a JSON object, or has another schema version.
    """
    value = parse_json(read_text(path), kind, path)
    if not isinstance(value, dict):
        raise InputError(
            describe(f"The {kind} is not a JSON object", where=path, got=in_short(value))
        )
    found = value.get("schema_version")
    if schema_version is not None and found != schema_version:
        raise InputError(
            describe(
                f"The {kind} has a schema version that this program does not read",
                where=f"{path}: schema_version", got=in_short(found), expected=schema_version,
                cure="write it again with this version of elm_jax",
            )
        )
    return value


def parse_json(text: str, kind: str, where: Any, *, constants: bool = False) -> Any:
    """Parses JSON from anyone.

    Args:
        text: to parse.
        kind: what it is, for errors.
        where: file, or file and line, for errors.
        constants: whether NaN and Infinity, which are no JSON but which Python writes, are read.

    Raises:
        InputError: it is no JSON, or holds what cannot be handled: numbers of thousands of digits, very deep
            nesting, half of a surrogate pair.
    """
    try:
        value = json.loads(text, parse_constant=None if constants else _no_number)
        if "\\ud" in text.lower():  # an unpaired surrogate is no character: it cannot be written
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        inside = where if ", line " in str(where) else f"{where}, line {error.lineno}"
        raise InputError(describe(f"The {kind} is not valid JSON", where=inside,
                                  got=f"{error.msg}, at {text[error.pos:error.pos + 40]!r}")) from error
    except (ValueError, RecursionError) as error:
        raise InputError(describe(f"The {kind} cannot be read as JSON", where=where,
                                  got=str(error)[:200])) from error
    return value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")


def append_jsonl(path: PathLike, rows: list[dict[str, Any]]) -> None:
    """Appends rows to a JSON-lines file; a half-written last line is cut off first."""
    if not hosts.is_first():
        return
    path = as_path(path)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with guard_writes(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not is_local(path):
            before = path.read_text(encoding="utf-8") if path.exists() else ""
            path.write_text(before[: before.rfind("\n") + 1] + text, encoding="utf-8")
            return
        with open(path, "ab+") as file:
            _cut_half_line(file)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


def append_bytes(path: PathLike, start: int, pieces: Iterable[Any]) -> int:
    """Writes a file on from a byte, and cuts off what a killed process left behind it; returns its length.

    What is before that byte stays as it is, also for those who read it meanwhile.

    Args:
        path: of the file; it is made if `start` is 0.
        start: bytes of it that count.
        pieces: to write, each a buffer of bytes.
    """
    path = as_path(path)
    if not hosts.is_first():
        return start + sum(memoryview(piece).nbytes for piece in pieces)
    with guard_writes(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not is_local(path):
            before = read_bytes(path, end=start) if start else b""
            content = b"".join((before, *pieces))
            path.write_bytes(content)
            return len(content)
        with open(path, "rb+" if start else "wb") as file:
            if file.seek(0, os.SEEK_END) < start:
                read_bytes(path, end=start)  # says how much is missing
            file.truncate(start)
            file.seek(start)
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            return file.tell()


def _cut_half_line(file: Any) -> None:
    """Truncates an open local file after its last line end."""
    end = file.seek(0, os.SEEK_END)
    position = end
    while position > 0:
        step = min(65536, position)
        file.seek(position - step)
        found = file.read(step).rfind(b"\n")
        if found >= 0:
            position = position - step + found + 1
            break
        position -= step
    if position != end:
        file.truncate(position)
    file.seek(0, os.SEEK_END)


def read_jsonl(path: PathLike, size: int | None = None) -> list[dict[str, Any]]:
    """Reads JSON lines that this program appended; a half-written last line is dropped.

    Empty lines, which an editor may have left at the end before more was appended, say nothing. If `size` is
    given, so many bytes of the file are read.

    Raises:
        InputError: a line other than the last is not a JSON object, or the file is not UTF-8.
    """
    return read_jsonl_behind(path, 0, 0, size)[0]


def read_jsonl_behind(path: PathLike, start: int, lines: int, end: int | None = None
                      ) -> tuple[list[dict[str, Any]], int, int]:
    """Reads JSON lines as `read_jsonl` does, but for what is known of the file: its first `start` bytes.

    Args:
        path: of the file; one that does not exist is empty.
        start: where a line begins.
        lines: that are before it.
        end: the byte up to which it is read; None for the file's end.

    Returns:
        (rows behind it, where the next line begins, lines before that).
    """
    path = as_path(path)
    if not path.exists() and not os.path.islink(path):
        return [], 0, 0
    content, name, rows = read_bytes(path, start, end), str(path), []
    content = content[:content.rfind(b"\n") + 1]  # of a half-written line not even the letters are whole
    found = _decode(content, path, start).split("\n")[:-1]
    for number, line in enumerate(found, start=lines + 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        row = parse_json(line, "line", where, constants=True)
        if not isinstance(row, dict):
            raise InputError(describe("The line is not a JSON object", where=where, got=in_short(row)))
        rows.append(row)
    return rows, start + len(content), lines + len(found)


def begin(folder: PathLike) -> epath.Path:
    """Starts to write a folder: removes the commit marker first, then all other contents.

    A local folder itself stays, with the lock that a process may have on it.
    """
    folder = as_path(folder)
    if not hosts.is_first():
        return folder
    with guard_writes(folder):
        (folder / MARKER).unlink(missing_ok=True)
        if is_local(folder) and folder.is_dir():
            remove_contents(folder)
        elif folder.exists():
            folder.rmtree()
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def remove_contents(folder: PathLike, keep: Collection[str] = ()) -> None:
    """Removes what is in a local folder except some names; keeps the folder."""
    for path in [path for path in as_path(folder).iterdir() if path.name not in keep]:
        if path.is_dir() and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.remove(path)


def commit(folder: PathLike, info: dict[str, Any] | None = None) -> None:
    """Marks a folder as whole: writes the commit marker, last of all.

    Args:
        folder: whose other contents are written.
        info: JSON values for the marker, which `read_marker` returns.
    """
    write_json(as_path(folder) / MARKER, {"schema_version": MARKER_VERSION, **(info or {})})


def is_committed(folder: PathLike) -> bool:
    """Whether the folder has its commit marker.

    Raises:
        InputError: the marker is damaged.
    """
    path = as_path(folder) / MARKER
    if not path.exists():
        return False
    try:
        read_marker(folder, "folder")
    except InputError:
        if path.exists():  # else another process has just begun to write here
            raise
        return False
    return True


def read_marker(folder: PathLike, what: str) -> dict[str, Any]:
    """Reads what a folder's commit marker holds.

    Raises:
        InputError: it is missing, damaged, or of another schema version.
    """
    path = as_path(folder) / MARKER
    try:
        return read_json(path, kind="commit marker", schema_version=MARKER_VERSION)
    except InputError as error:
        raise InputError(describe(f"The commit marker of this {what} is damaged", where=path,
                                  got=str(error).replace("\n ", ";"),
                                  cure=f"remove the {what}, and make it or copy it again")) from error


def require_committed(folder: PathLike, what: str) -> epath.Path:
    """Returns the folder's path if the folder is whole.

    Raises:
        InputError: the folder is missing, was left half written, or its marker is damaged.
    """
    folder = as_path(folder)
    if not folder.exists():
        raise InputError(describe(f"There is no {what} here", where=folder, got=what_is_there(folder),
                                  cure=f"check the path, or make the {what} first"))
    if not (folder / MARKER).exists():
        raise InputError(
            describe(
                f"The {what} is not whole: its writing was interrupted, or this is another kind of folder",
                where=folder, expected=f"a file {MARKER}, which is written last",
                cure=f"write the {what} again",
            )
        )
    read_marker(folder, what)
    return folder


def remove(folder: PathLike) -> None:
    """Removes a folder, marker first, so that a half-removed one never looks whole."""
    folder = as_path(folder)
    if not hosts.is_first():
        return
    (folder / MARKER).unlink(missing_ok=True)
    if folder.exists():
        folder.rmtree()


def absolute(folder: PathLike) -> epath.Path:
    """Path in the form that Orbax and TensorStore need."""
    folder = as_path(folder)
    return folder.resolve() if is_local(folder) else folder


@contextmanager
def guard_reads(path: PathLike) -> Iterator[None]:
    """Turns Orbax's and TensorStore's errors for missing or damaged files into one InputError."""
    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(describe(
            "The weights cannot be read", where=path, got=str(error)[:300],
            cure="files are missing or damaged: fetch or write them again")) from error


def utc_now() -> str:
    """The current time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
