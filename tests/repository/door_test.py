"""Nothing above the networks knows a family: what is asked of one goes through `models.network`.

A rule is a function from a module's syntax tree to what breaks it. No module of the checkout breaks one, and
each form in which a family or its ids have been written breaks its rule.
"""

import ast
import itertools
import re
from collections.abc import Iterator

import pytest
from checkout import ROOT

import elm_jax
from elm_jax import models

PACKAGE = ROOT / "elm_jax"
INSIDE = ("models/t5/", "formats/t5x/", "formats/hf/t5_models.py", "workflows/convert/", "models/families.py",
          "models/t5x_module.py", "models/t5_config.py")
"""Where T5 may be named: the family, what reads and writes its files, the table, two kept modules."""
PUBLIC = ("__init__.py", "models/__init__.py")
"""Give the public names, which T5's are part of; each name is imported on first use."""
MODULES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text())
           for path in sorted(PACKAGE.rglob("*.py"))}
KEPT = ("elm_jax.models.t5x_module", "elm_jax.models.t5_config")
CLASSES = {node.name for path in (PACKAGE / "models" / "t5").glob("*.py")
           for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)}
OWN = {"Cache", "EncoderLayer"}  # the door's, and BERT's
NAMES = (CLASSES - OWN) | {
    name for package in (elm_jax, models) for name, module in package._MODULES.items()
    if module.startswith("elm_jax.models.t5")} | {"T5XTransformer"}
"""T5's classes, and what elm_jax and elm_jax.models offer of T5."""
UNIQUE = {name for name in NAMES if not name.islower()}
"""Those that nothing else has: `shift_right` is a function of two-sided batches too."""
FAMILIES = tuple(f"models/{path.parent.name}/" for path in (PACKAGE / "models").glob("*/network.py"))


T5_QUOTED = re.compile(r"""['"]t5['"]""")


def is_of_t5(module: str) -> bool:
    return module.startswith(("elm_jax.models.t5.", *KEPT)) or module == "elm_jax.models.t5"


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Each imported name and its module; an imported module has no name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def uses_of_t5(tree: ast.AST) -> Iterator[str]:
    """Imports of T5's modules and names, its classes in the text or in strings, its row of the table."""
    for module, name in imports(tree):
        offered = module in ("elm_jax", "elm_jax.models") and name in NAMES
        if is_of_t5(module) or is_of_t5(f"{module}.{name}") or offered:
            yield f"{module} {name}"
    sentences = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    quotes = T5_QUOTED.search(ast.unparse(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if name in UNIQUE:
                yield name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in sentences:
            if is_of_t5(node.value) or UNIQUE & set(re.findall(r"\w+", node.value)):
                yield repr(node.value)
        elif quotes and isinstance(node, ast.Subscript | ast.Call | ast.Compare):
            words = ast.unparse(node)
            if re.search(r"FAMILIES|family", words) and T5_QUOTED.search(words):
                yield words


IDS = re.compile(r"_?(pad|padding|eos|bos|start|decoder_start)(_token)?_id", re.IGNORECASE)
BARE = re.compile(r"_?(PAD|PADDING|EOS|BOS)|eos|bos")
ARRAYS = re.compile(r"(^|_)(tokens?|targets|inputs|choices|ids|rows?)$")
COUNTS = re.compile(r"(max|num|eval|extra)_\w+|\w*segment_ids|_row")
"""Names of numbers, not of tokens; segment ids count from 1, so that 0 is no segment of any family."""
COMPARISONS = {"equal", "not_equal", "greater", "greater_equal", "less", "less_equal"}
AS_MASK = {"astype", "count_nonzero", "nonzero", "flatnonzero"}


def name_of(node: ast.AST) -> str:
    """The name of an array: that of a variable, of an attribute, of a key, of an array that is indexed."""
    if isinstance(node, ast.Subscript):
        key = getattr(node.slice, "value", None)
        return key if isinstance(key, str) else name_of(node.value)
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("asarray", "array") and node.args:
        return name_of(node.args[0])
    return getattr(node, "id", getattr(node, "attr", ""))


def is_tokens(node: ast.AST) -> bool:
    name = name_of(node)
    return bool(ARRAYS.search(name)) and not COUNTS.fullmatch(name)


def is_number(node: ast.AST | None, *values: int) -> bool:
    """Whether a node is a literal whole number, one of `values` if there are any."""
    value = getattr(node, "value", None)
    return isinstance(node, ast.Constant) and type(value) is int and value in (values or (value,))


def is_fixed(name: str, value: ast.AST | None) -> bool:
    """Whether a name is that of a special id and its value a literal one."""
    return is_number(value) if IDS.fullmatch(name) else bool(BARE.fullmatch(name)) and is_number(value, 0, 1)


def bindings(node: ast.AST) -> Iterator[tuple[str, ast.AST | None]]:
    """Names and their values: of assignments, defaults, keywords of calls, and dictionaries."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            several = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
            pairs = zip(target.elts, node.value.elts, strict=False) if several else [(target, node.value)]
            yield from ((name_of(each), value) for each, value in pairs)
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr):
        yield name_of(node.target), node.value
    elif isinstance(node, ast.arguments):
        names = [*node.posonlyargs, *node.args][-len(node.defaults):] if node.defaults else []
        yield from ((name.arg, value) for name, value in zip(names, node.defaults, strict=True))
        yield from ((name.arg, value) for name, value in zip(node.kwonlyargs, node.kw_defaults, strict=True))
    elif isinstance(node, ast.keyword):
        yield node.arg or "", node.value
    elif isinstance(node, ast.Dict):
        yield from ((str(getattr(key, "value", "")), value)
                    for key, value in zip(node.keys, node.values, strict=True))


def constants_of_ids(tree: ast.AST) -> Iterator[str]:
    """Where a module fixes an id as a constant, or takes an id for padding, or for EOS."""
    for node in ast.walk(tree):
        yield from (f"{name}={ast.unparse(value)}" for name, value in bindings(node) if is_fixed(name, value))
        pairs = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            pairs = [pair for two in itertools.pairwise(sides) for pair in (two, two[::-1])]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in COMPARISONS:
            pairs = [tuple(node.args[:2]), tuple(node.args[1::-1])] if len(node.args) > 1 else []
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in AS_MASK:
            masks = [node.func.value] if ast.unparse(node.args[:1]) == "bool" else node.args[:1]
            yield from (ast.unparse(node) for each in masks if is_tokens(each))
        if any(is_tokens(one) and is_number(other, 0, 1) for one, other in pairs):
            yield ast.unparse(node)


def test_t5_is_named_nowhere_outside_its_family():
    assert {"T5Config", "T5Network", "Transformer", "shift_right"} <= NAMES and len(MODULES) > 150
    found = {path: uses for path, tree in MODULES.items() if not path.startswith(INSIDE)
             and path not in PUBLIC and (uses := list(uses_of_t5(tree)))}
    assert found == {}
    for path in (*PUBLIC, "models/families.py", "models/t5x_module.py", "workflows/convert/verify.py"):
        assert list(uses_of_t5(MODULES[path])), f"{path} needs no exception"


@pytest.mark.parametrize("text", [
    "from elm_jax.models.t5.network import is_norm_leaf",
    "from elm_jax.models.t5 import hf_names",
    "from elm_jax.models import t5",
    "import elm_jax.models.t5.network as n",
    "from elm_jax import T5Config as C",
    "from elm_jax.models import shift_right",
    "from elm_jax.models import t5x_module as m",
    "from elm_jax.models.t5x_module import AdapterConfig",
    "import elm_jax.models.t5_config",
    "x = t5x_module.T5XTransformer",
    "x = elm.T5Network(1)",
    "def f(x: 'T5Network'): pass",
    "x = getattr(n, 'T5Network')",
    "m = importlib.import_module('elm_jax.models.t5.network')",
    "x = FAMILIES['t5'].network(1)",
    "x = families.FAMILIES.get('t5')",
    "if config.family == 't5': pass",
])
def test_each_use_of_t5_is_seen(text):
    assert list(uses_of_t5(ast.parse(text)))


def test_special_ids_are_constants_of_families_and_vocabularies_alone():
    assert "models/t5/" in FAMILIES
    found = {path: fixed for path, tree in MODULES.items()
             if not path.startswith((*INSIDE, *FAMILIES, "vocabularies/"))
             and (fixed := list(constants_of_ids(tree)))}
    assert found == {}


@pytest.mark.parametrize("text", [
    "PAD_ID = 0", "PAD = 0", "EOS = 1", "_PAD, _EOS = 0, 1", "pad_id: int = 0", "self.eos_id = 1",
    "def f(a, eos_id=1): pass", "def f(*, pad_id: int = 0): pass", "f(x, eos_id=1)", "f(x, pad_id=0)",
    "ids = {'pad_id': 0}", "f(pad_token_id=0)",
    "a.tokens > 0", "batch['decoder_target_tokens'] != 0", "input_tokens > 0", "0 < tokens", "tokens >= 1",
    "tokens == 1", "row[-1] == 1", "rows[:, -1] == 1", "targets[..., None] != 0", "np.asarray(ids) != 0",
    "token == 1", "jnp.not_equal(tokens, 0)", "jnp.equal(1, tokens)", "tokens.astype(bool)",
    "np.count_nonzero(row)",
])
def test_each_constant_id_is_seen(text):
    assert list(constants_of_ids(ast.parse(text)))


@pytest.mark.parametrize("text", [
    "len(tokens) > 0", "tokens.shape[0] == 1", "max_rows < 1", "segment_ids > 0", "tokens == eos_id",
    "f(start=0)", "eos_id = config.eos_id", "enumerate(rows, start=1)", "tokens.astype(int)", "pad_id = None",
])
def test_what_is_no_id_is_let_through(text):
    assert not list(constants_of_ids(ast.parse(text)))
