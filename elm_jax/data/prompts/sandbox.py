"""Jinja2's sandbox for untrusted templates: promptsource's filters, and limits on time and memory.

Jinja's own sandbox keeps a template from Python's internals, but not from running for ever or filling the
memory. Here every pass of a loop or of a filter that goes through items, every call, comparison and test, and
every text, list or dictionary that is made is charged to the row's `Budget`; what could become a giant at one
blow is refused before it is made, and what Python does at one blow is charged before by what it costs at
worst. What a template that stays within its budget renders is what it renders without one.
"""

import collections
import contextlib
import contextvars
import functools
import random
import re
import string
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jinja2
import jinja2.sandbox
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

MAX_WORK = 20_000_000
"""Most units of work for one row: loop iterations, calls, characters and items made."""
MAX_SECONDS = 5.0
"""Most seconds of processor time for one row; a busy machine refuses no row."""
MAX_OUTPUT = 2_000_000
"""Characters of one rendered text."""
MAX_SOURCE, MAX_PLACEHOLDERS = 100_000, 2_000
"""Characters of a template, and parts of it in braces: what compiles in about a second. The largest of
promptsource has 2,849 and 70, those of chat templates some 20,000 and 400."""
MAX_NUMBER = 100_000
"""Largest number that may set a width or a count."""
_MAX_BITS = 100_000
_WALK_STEP = 500
_PERCENT = re.compile(r"%(?:\([^()]*\))?[-#0 +]*(\*|\d+)?(?:\.(\*|\d+))?")
"""One conversion of the operator ``%``: its width and its precision."""

_budget: contextvars.ContextVar["Budget | None"] = contextvars.ContextVar("elm_jax_budget", default=None)
_random: contextvars.ContextVar[random.Random] = contextvars.ContextVar("elm_jax_template_random")


class TemplateLimit(Exception):
    """Raised when a template needs more time or memory than its budget allows."""


class Budget:
    """The time and work that rendering one row may still take."""

    def __init__(self) -> None:
        self.work = MAX_WORK
        self.end = time.thread_time() + MAX_SECONDS

    def charge(self, work: int) -> None:
        """Subtracts `work` from the budget.

        Raises:
            TemplateLimit: there is not so much left, or the time is over.
        """
        self.work -= work
        if self.work < 0:
            raise TemplateLimit(f"it makes more than {MAX_WORK:,} steps, characters and items")
        if time.thread_time() > self.end:
            raise TemplateLimit(f"it takes longer than {MAX_SECONDS:g} seconds")


def check_source(source: str) -> None:
    """Raises TemplateLimit if a template's source is too large to be compiled."""
    placeholders = source.count("{{") + source.count("{%")
    if len(source) > MAX_SOURCE or placeholders > MAX_PLACEHOLDERS:
        raise TemplateLimit(f"its source has {len(source):,} characters and {placeholders:,} parts in "
                            f"braces, of at most {MAX_SOURCE:,} and {MAX_PLACEHOLDERS:,}")


@contextlib.contextmanager
def one_row(seed: int) -> Iterator[None]:
    """Gives templates the budget of one row within a block, and seeds their random draws by `seed`."""
    tokens = _random.set(random.Random(seed)), _budget.set(Budget())
    try:
        yield
    finally:
        _random.reset(tokens[0])
        _budget.reset(tokens[1])


def render(template: jinja2.Template, fields: dict[str, Any]) -> str:
    """Renders a template, up to `MAX_OUTPUT` characters."""
    pieces, length = [], 0
    for piece in template.generate(fields):
        length += len(piece)
        charge(len(piece))
        if length > MAX_OUTPUT:
            raise TemplateLimit(f"it renders more than {MAX_OUTPUT:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def charge(work: int) -> None:
    """Subtracts `work` from the row's budget, if a row is being rendered."""
    budget = _budget.get()
    if budget is not None:
        budget.charge(work)


def _charged(value: Any) -> Any:
    """Charges a value with the size of all that it contains, and returns it.

    So no list holds more than the budget, however often one thing is in it: whatever is written out,
    compared or sorted is of a bounded size.
    """
    waiting, work = [value], 0
    while waiting:
        found = waiting.pop()
        work += 1
        if isinstance(found, str | bytes):
            work += len(found)
        elif isinstance(found, dict):
            waiting.extend(found)
            waiting.extend(found.values())
        elif isinstance(found, list | tuple | set):
            waiting.extend(found)
        elif isinstance(found, jinja2.utils.Namespace):
            raise TemplateLimit("it puts a namespace into a list or a text")
        if work > _WALK_STEP:  # reading the clock costs more than one step of this loop
            charge(work)
            work = 0
    charge(work)
    return value


def _compared(value: Any) -> Any:
    """Charges the right side of a comparison, or the argument of a test, with its length."""
    charge(1 + (len(value) if isinstance(value, str | list | tuple | dict | set | range) else 0))
    return value


def _each(items: Iterable[Any]) -> Iterator[Any]:
    """Yields the items and charges each iteration."""
    for item in items:
        charge(1)
        yield item


def _charge_nested(value: Any, cost: int, indent: int) -> None:
    """Charges nested values before they are written with one indented line for each."""
    waiting = [(value, 0)]
    while waiting:
        found, depth = waiting.pop()
        if isinstance(found, str):
            charge(len(found))
        charge(cost + indent * depth)
        if isinstance(found, dict):
            waiting.extend((part, depth + 1) for pair in found.items() for part in pair)
        elif isinstance(found, list | tuple | set):
            waiting.extend((part, depth + 1) for part in found)


def _length(value: Any) -> int:
    """Length of a text or a collection; for an iterable without length, the most it may have."""
    return len(value) if hasattr(value, "__len__") else MAX_NUMBER if hasattr(value, "__iter__") else 1


def _refuse_giant(size: int) -> None:
    budget = _budget.get()
    left = MAX_WORK if budget is None else budget.work
    if size > left:
        raise TemplateLimit(f"it makes a text or a list of {size:,}, with {left:,} characters and items left")


def _check_product(value: Any, others: Iterable[Any]) -> None:
    """Checks the size of a result that repeats a text of length `others` for each item of `value`."""
    longest = max((len(other) for other in others if isinstance(other, str)), default=0)
    _refuse_giant(_length(value) * max(longest, 1))


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise TemplateLimit(f"it asks for a width or a count of more than {MAX_NUMBER:,}")


def _check_format(text: Any, percent: bool) -> None:
    """Checks ``%`` or ``format`` before it runs: limits the sum of widths, refuses widths from values."""
    if not isinstance(text, str):
        return
    charge(len(text))
    widths = _percent_widths(text) if percent else _brace_widths(text)
    if any(width is None for width in widths) or sum(filter(None, widths)) > MAX_NUMBER:
        raise TemplateLimit("it formats to a width that is too large, or that a value gives")


def _percent_widths(text: str) -> list[int | None]:
    found = [width for match in _PERCENT.finditer(text) for width in match.groups() if width]
    return [None if width == "*" else _number(width) for width in found]


def _brace_widths(text: str) -> list[int | None]:
    found: list[int | None] = []
    with contextlib.suppress(ValueError):  # no format at all: Python will say so
        for _, _, spec, _ in string.Formatter().parse(text):
            spec = spec or ""
            found += [None] if "{" in spec else [_number(part) for part in re.findall(r"\d+", spec)]
    return found


def _number(digits: str) -> int:
    return int(digits) if len(digits) < 10 else 10**9


# Filters

def _choice(items: Sequence[Any]) -> Any:
    """promptsource's filter ``choice``: picks one item at random, by the row's own seed."""
    return _random.get().choice(items)


def _most_frequent(items: Sequence[Any]) -> list[Any] | None:
    """promptsource's filter ``most_frequent``: the most frequent items, in order."""
    if not items:
        return None
    counts = collections.Counter(items)
    most = max(counts.values())
    return [item for item, count in counts.items() if count == most]


def _highlight(text: str) -> str:
    """promptsource's filter ``highlight``: wraps the text in a coloured HTML span."""
    return f"<span style='color: #F08080'>{text}</span>"


def _join_filter(join: Callable[..., Any]) -> Callable[..., Any]:
    """The filter ``join``, charged before it builds the text."""
    @functools.wraps(join)
    def bounded(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        return join(context, _charged(list(value)), *args, **kwargs)

    return bounded


def _sum(environment: jinja2.Environment, values: Iterable[Any], attribute: str | int | None = None,
         start: Any = 0) -> Any:
    """The filter ``sum``, charged for each intermediate sum where it joins lists."""
    if isinstance(start, int | float | str):  # Python itself refuses texts
        return jinja2.filters.sync_do_sum(environment, values, attribute, start)
    if attribute is not None:
        values = map(jinja2.filters.make_attrgetter(environment, attribute), values)
    for value in values:
        start = environment.call_binop(None, "+", start, value)
    return start


_SIZED_FILTERS = ("batch", "center", "indent", "slice", "tojson", "wordwrap")
"""Filters whose numbers are widths and counts."""
_ITEM_FILTERS = ("batch", "groupby", "map", "max", "min", "reject", "rejectattr", "select", "selectattr",
                 "sort", "sum", "unique")
"""Filters that go through the items of their value once."""
_COSTS = {"dictsort": 20, "groupby": 20, "max": 10, "min": 10, "sort": 20}
"""Steps that filters take for each item, where these are more than one or two."""
_COPIED = 5_000
"""Characters that are copied in the time of a step."""
_NESTED_FILTERS = {"pprint": 100, "tojson": 20}
"""Filters that write out what is in lists of lists, each on a line of its own, and their steps for each."""


def _lines_of_width(text: str, others: Sequence[Any]) -> int:
    return len(text) // max(1, next((other for other in others if type(other) is int), 79))


_QUADRATIC_FILTERS: dict[str, Callable[[str, Sequence[Any]], int]] = {
    "striptags": lambda text, _: text.count("<"), "wordwrap": _lines_of_width}
"""Filters that copy their text again and again, and how often at worst."""


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a filter: refuses results that could be too large, and charges the others."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # some get the environment first

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        value, others = args[first], (*args[first + 1:], *kwargs.values())
        _check_product(value, others)
        if name in _SIZED_FILTERS:
            _check_numbers(others)
        if name == "format":
            _check_format(value, percent=True)
        if name in _COSTS or isinstance(value, str):
            charge(_COSTS.get(name, 1) * _length(value))
        if name in _QUADRATIC_FILTERS and isinstance(value, str):
            charge(len(value) * _QUADRATIC_FILTERS[name](value, others) // _COPIED)
        if name in _NESTED_FILTERS:
            indent = max((other for other in others if isinstance(other, int)), default=1)
            _charge_nested(value, _NESTED_FILTERS[name], indent)
        if name in _ITEM_FILTERS and hasattr(value, "__iter__") and value:
            args = (*args[:first], _each(value), *args[first + 1:])
        return _charged(function(*args, **kwargs))

    return bounded


_LONG_TESTS = ("!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le",
               "lessthan", "lower", "lt", "ne", "upper")
"""Tests that may look at all of a text or a list; the others take one step."""


def _bounded_test(function: Callable[..., bool]) -> Callable[..., bool]:
    """Wraps a test: charges it with the length of its argument before it runs."""
    @functools.wraps(function)
    def bounded(*args: Any) -> bool:
        _compared(args[-1])
        return function(*args)

    return bounded


# Loops, literals, operators and calls

class _Counted:
    """An iterable for loops that charges each iteration."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return _each(self._items)

    def __len__(self) -> int:
        return len(self._items)


def _counted(items: Any) -> Any:
    return items if isinstance(items, jinja2.Undefined) else _Counted(items)


def _concatenate(parts: Sequence[Any]) -> str:
    """The operator ``~``, charged."""
    return "".join(str(part) for part in _charged(parts))


class _Bounds(NodeTransformer):
    """Inserts the charging functions into a template's syntax tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "elm_counted", node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "elm_concatenate", node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        for operand in node.ops:
            if not isinstance(operand.expr, nodes.Const):
                operand.expr = _filtered(operand.expr, "elm_compared", node.lineno)
        return node

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "elm_charged", node.lineno)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self.visit_List(node) if node.ctx == "load" else node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = _filtered(node.filter, "elm_charged", node.lineno)
        return node


def _filtered(node: nodes.Expr | None, name: str, line: int) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=line)


_TEXT_METHODS = frozenset((
    "capitalize", "casefold", "center", "count", "endswith", "expandtabs", "find", "format", "format_map",
    "index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace",
    "istitle", "isupper", "join", "ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix",
    "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip", "split", "splitlines",
    "startswith", "strip", "swapcase", "title", "upper", "zfill"))
"""Methods of texts that templates may call; of numbers and bytes, none."""
_SIZED_METHODS = ("ljust", "rjust", "center", "zfill", "expandtabs", "replace")


class Environment(jinja2.sandbox.SandboxedEnvironment):
    """The sandboxed environment; its compiled templates charge their work to the row's budget."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Runs a binary operator after checking that its result cannot be too large."""
        whole = isinstance(left, int), isinstance(right, int)
        if operator == "*" and any(whole) and not all(whole):
            number, other = (left, right) if whole[0] else (right, left)
            _refuse_giant(abs(number) * _length(other))
        elif operator in ("*", "**") and all(whole):
            bits = left.bit_length() * max(right, 1) if operator == "**" else (
                left.bit_length() + right.bit_length())
            if bits > _MAX_BITS:
                raise TemplateLimit(f"it computes a number of more than {_MAX_BITS:,} bits")
        elif operator == "%":
            _check_format(left, percent=True)
            _charged(right)
        return _charged(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function and charges it; methods of texts and collections are checked first."""
        method = getattr(function, "__wrapped__", function)  # Jinja wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str | bytes | int | float):
            if name not in (_TEXT_METHODS if isinstance(owner, str) else ()):
                raise TemplateLimit(f"it calls the method {name!r} of a {type(owner).__name__}")
            charge(len(owner))
            _check_text_method(owner, name, args)
        if name == "join" and args:
            args = (_charged(list(args[0])), *args[1:])
        charge(1)
        result = super().call(context, function, *args, **kwargs)
        if isinstance(owner, list | dict | set):
            _charged(owner)
        return result if isinstance(result, jinja2.utils.Namespace) else _charged(result)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Bounds().visit(super()._parse(source, name, filename))
        return tree.set_environment(self)


def _check_text_method(text: str, name: str, args: Sequence[Any]) -> None:
    _check_product(args[0] if name == "join" and args else text, (text, *args) if name == "join" else args)
    if name in _SIZED_METHODS:
        _check_numbers(args)
    if name == "expandtabs":
        _refuse_giant(len(text) * max((arg for arg in args if isinstance(arg, int)), default=8))
    if name in ("format", "format_map"):
        _check_format(text, percent=False)


def make_environment(**options: Any) -> Environment:
    """Makes an environment in which templates are compiled.

    Args:
        **options: of Jinja2's environment, as ``trim_blocks``.
    """
    environment = Environment(finalize=_written, **options)
    environment.globals["zip"] = zip
    del environment.globals["lipsum"]  # they generate text of any length
    environment.filters.update(
        choice=_choice, random=_choice, most_frequent=_most_frequent, highlight=_highlight,
        join=_join_filter(environment.filters["join"]), sum=jinja2.pass_environment(_sum))
    for name, function in environment.filters.items():
        environment.filters[name] = _bounded_filter(name, function)
    for name in _LONG_TESTS:
        environment.tests[name] = _bounded_test(environment.tests[name])
    environment.filters.update(elm_counted=_counted, elm_concatenate=_concatenate, elm_charged=_charged,
                               elm_compared=_compared)
    return environment


def _written(value: Any) -> Any:
    """Checks and charges the value of ``{{ ... }}`` before it is written out."""
    return _charged(value) if isinstance(value, list | tuple | dict | set | jinja2.utils.Namespace) else value
