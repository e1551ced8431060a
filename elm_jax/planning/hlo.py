"""Collectives of a compiled program, read from its text: their number, and the bytes that a chip sends.

XLA's own cost analysis counts the body of a loop once and ignores the interconnect. Here a collective in a
loop counts as often as the loop runs, and bytes are those that a ring sends: of a result of R bytes over n
chips an all-gather sends R (n-1)/n, a reduce-scatter of an operand of R bytes the same, an all-reduce both of
them, an all-to-all R (n-1)/n, a permutation R. Source of the formulas: Chan et al. 2007, "Collective
communication: theory, practice, and experience", https://doi.org/10.1002/cpe.1206, section 4.

Source of the syntax: https://openxla.org/xla/operation_semantics, and the programs themselves.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

from elm_jax.errors import RunError, describe

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2,
    "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}
_HEAD = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[\w\-]+)\("
)
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLS = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_COMMENT = re.compile(r"/\*.*?\*/")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_GROUPS_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=")
_GROUPS_MESH = re.compile(r"replica_groups=@?mesh\w*\[([^\]]*)\][^{]*\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
        kind: one of `KINDS`.
        payload: bytes of the whole array on one chip: of the result of a gather, else of the operand.
        group: number of chips that take part together.
        count: how often a step runs it.
        where: the operation of the network that it serves, as the program names it.
    """

    kind: str
    payload: int
    group: int
    count: int
    where: str

    @property
    def sent(self) -> float:
        """Bytes that one chip sends in a step, by the ring's formula."""
        return self.count * ring_bytes(self.kind, self.payload, self.group)


def ring_bytes(kind: str, payload: float, group: int) -> float:
    """Bytes that one chip of `group` sends for one collective over `payload` bytes."""
    if kind == "collective-permute":
        return payload
    share = (group - 1) / group
    return payload * share * (2 if kind == "all-reduce" else 1)


def by_kind(collectives: Iterable[Collective]) -> dict[str, dict[str, float]]:
    """Sums collectives by kind: ``{kind: {'count', 'bytes'}}``, bytes that a chip sends in a step."""
    found: dict[str, dict[str, float]] = {}
    for one in collectives:
        entry = found.setdefault(one.kind, {"count": 0, "bytes": 0.0})
        entry["count"] += one.count
        entry["bytes"] += one.sent
    return {kind: found[kind] for kind in KINDS if kind in found}


@dataclasses.dataclass
class _Instruction:
    name: str
    shape: str
    op: str
    line: str


_Program = dict[str, list[_Instruction]]


def collectives_of(text: str, num_devices: int) -> list[Collective]:
    """Reads the collectives of a compiled program; those over a single chip are left out.

    A collective that a backend cuts into the steps of a chain (asynchronous fusions on a TPU, some of
    them in loops of other work) appears in several places under one chain, and counts as often as the
    rarest of them.

    Args:
        text: ``compiled.as_text()``.
        num_devices: of the program; the group of a collective that names none.

    Raises:
        RunError: the text is no program, or a group is written in a way that is not known here.
    """
    program, entry = _parse(text)
    runs = _runs(program, entry)
    found: dict[object, Collective] = {}
    for computation, instructions in program.items():
        shapes = {one.name: one.shape for one in instructions}
        for one in instructions:
            kind = one.op.removesuffix("-start")
            if kind not in KINDS or not runs[computation]:
                continue
            group = _group(one.line, num_devices)
            if group == 1:
                continue
            payload = _payload(one, kind, shapes, group)
            # A TPU's fused all-reduce-scatter is an all-reduce and a slice of its result.
            if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            chain = re.search(r'channel_id=(\d+).*chain_id="(\d+)"', one.line)
            key = (kind, *chain.groups()) if chain else (computation, one.name)
            where = re.search(r'op_name="([^"]*)"', one.line)
            new = Collective(kind, payload, group, runs[computation], where.group(1) if where else "")
            if key not in found or new.count < found[key].count:
                found[key] = new
    return list(found.values())


def _parse(text: str) -> tuple[_Program, str]:
    program: _Program = {}
    entry, current = "", None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            current = program.setdefault(head["name"], [])
            entry = head["name"] if head["entry"] else entry
            continue
        found = _INSTRUCTION.match(line)
        if found and current is not None:
            current.append(_Instruction(found["name"], found["shape"], found["op"], line))
    if not entry:
        raise RunError(describe("This is no text of a compiled program", got=text[:80],
                                expected="an ENTRY computation, as `compiled.as_text()` has it"))
    return program, entry


def _runs(program: _Program, entry: str) -> dict[str, int]:
    """Number of runs of each computation in one run of the program; 0 for one that is never called."""
    calls: dict[str, list[tuple[str, int]]] = {
        name: [call for one in instructions for call in _calls(one, program)]
        for name, instructions in program.items()
    }
    runs: dict[str, int] = collections.defaultdict(int)
    runs[entry] = 1
    for name in _callers_first(calls, entry):
        for callee, times in calls[name]:
            runs[callee] += runs[name] * times
    return runs


def _callers_first(calls: dict[str, list[tuple[str, int]]], entry: str) -> list[str]:
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name in seen or name not in calls:
            return
        seen.add(name)
        for callee, _ in calls[name]:
            visit(callee)
        order.append(name)

    visit(entry)
    return order[::-1]


def _calls(one: _Instruction, program: _Program) -> Iterator[tuple[str, int]]:
    times = _trip_count(one, program) if one.op == "while" else 1
    for name in _CALLS.findall(one.line):
        yield name, times
    for names in _BRANCHES.findall(one.line):
        for name in names.split(","):
            yield name.strip().lstrip("%"), 1


def _trip_count(loop: _Instruction, program: _Program) -> int:
    """Iterations of a loop: as XLA notes them, else the bound that its counter is compared with.

    A loop without a bound (for example: until all rows have ended) counts once; no training step has one.
    """
    noted = _TRIPS.search(loop.line)
    if noted:
        return int(noted.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", loop.line)
    instructions = program.get(condition.group(1), []) if condition else []
    bounds = [
        int(found.group(1)) for one in instructions
        if one.op == "constant" and (found := re.search(r"constant\((\d+)\)", one.line))
    ]
    below = any("direction=LT" in one.line for one in instructions) or any(
        "direction=LT" in inner.line
        for one in instructions for name in _CALLS.findall(one.line) for inner in program.get(name, []))
    return bounds[0] if below and len(bounds) == 1 else 1


def _group(line: str, num_devices: int) -> int:
    if "source_target_pairs=" in line:
        pairs = re.search(r"source_target_pairs=\{([^}]*(?:\},\{[^}]*)*)\}", line)
        return 2 if pairs and pairs.group(1) else 1
    listed, iota, mesh = (pattern.search(line)
                          for pattern in (_GROUPS_LISTED, _GROUPS_IOTA, _GROUPS_MESH))
    if listed:
        return len(listed.group(1).split(","))
    if iota:
        return int(iota.group(2))
    if mesh:
        sizes = dict(re.findall(r"'?([\w.]+)'?=(\d+)", mesh.group(1)))
        axes = re.findall(r"'?([\w.]+)'?(:\(\d+\)(\d+))?", mesh.group(2))
        return math.prod(int(part or sizes[name]) for name, _, part in axes)
    if "replica_groups={}" in line or "replica_groups=" not in line:
        return num_devices
    raise RunError(describe("The groups of a collective are written in an unknown way",
                            got=line.strip()[:300]))


def _payload(one: _Instruction, kind: str, shapes: dict[str, str], group: int) -> int:
    """Bytes of the whole array on one chip: the larger of operand and result, for each array of it."""
    inside = _COMMENT.sub("", one.line).split(f" {one.op}(", 1)[1].split(")", 1)[0]
    operands = [word.strip().lstrip("%") for word in inside.split(",") if word.strip()]
    told = [size for size in map(_bytes, _ARRAY.findall(inside)) if size]
    known = told or [_bytes_of(shapes[name]) for name in operands if name in shapes]
    operand = int(sum(known))
    if kind == "all-gather":
        return operand * group if operand else int(_bytes_of(one.shape))
    if operand:
        return operand
    result = int(_bytes_of(one.shape))
    return result * group if kind == "reduce-scatter" else result


def _bytes_of(shape: str) -> float:
    return sum(map(_bytes, _ARRAY.findall(shape)))


def _bytes(array: tuple[str, str]) -> float:
    dtype, dims = array
    sizes = [int(size) for size in dims.split(",") if size]
    return _BYTES.get(dtype, 0) * math.prod(sizes)
