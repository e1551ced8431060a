"""The rules of the house, read from the syntax trees of elm_jax, from README and from pyproject.toml.

A rule is a function from the files, by path, to what breaks it. Each is proved twice: nothing in the checkout
breaks it, and a file that is changed on purpose does.
"""

import ast
import collections
import functools
import re
import tomllib
from collections.abc import Iterator, Mapping

import pytest
from checkout import ROOT

Files = Mapping[str, str]
"""Text of each file by its path in the checkout."""

AT_TOP = {"__init__.py", "errors.py", "types.py"}
MOST_MODULES, MOST_PARAMETERS, MOST_LINES = 18, 7, 200
LARGER_FOLDERS = {"elm_jax/cli": "a file a verb", "elm_jax/merging/methods": "a file a method"}
LONGER_CLASSES = {"training/stack/stacked_loop.py:_StackLoop": "one loop for both trainers comes first",
                  "merging/stream.py:LeafMerge": "becomes methods that are objects"}
PUBLIC, T5X = "a public function that is kept as it is", "T5X's convention of arguments"
MORE_PARAMETERS = {
    "data/registry/own_task.py:add_task": PUBLIC,
    "data/registry/registry.py:add_cached_task": PUBLIC,
    "data/registry/registry.py:add_prompted_task": PUBLIC,
    "workflows/evaluate/evaluate_models.py:evaluate": PUBLIC,
    "workflows/merge/in_memory.py:merge": PUBLIC,
    "models/t5x_module.py:T5XTransformer.__call__": T5X,
    "models/t5x_module.py:T5XTransformer.decode": T5X,
}
COMPATIBILITY = {"elm_jax/data/templates.py", "elm_jax/models/t5_config.py", "elm_jax/workflows/for_t5x.py"}
"""Keep an older dotted path alive, which README or exported folders hold."""
FAMILY_FILES = {"config", "network", "modules", "hf_names"}
"""The files that each family of networks and kind of adapter has; in models/, the door that they fit."""
SHARED_CLASSES: dict[str, str] = {}
"""Names of public classes that stand more than once, with the reason."""
ORDERED = [f"elm_jax.{room}" for room in ("models", "data", "formats", "merging", "workflows")]
"""Rooms in which the contracts hold an order of folders and modules too."""
LAYERS = [
    "cli", "workflows", "reporting", "experts | evaluation",
    "training | formats | data | routing | planning", "models | vocabularies | merging", "runtime",
    "errors | types",
]


@functools.cache
def tree_of(text: str) -> ast.Module:
    return ast.parse(text)


def modules(files: Files) -> dict[str, ast.Module]:
    return {path: tree_of(text) for path, text in files.items() if path.endswith(".py")}


def folder_of(path: str) -> str:
    return path.rpartition("/")[0]


Definition = tuple[str, ast.ClassDef | ast.FunctionDef, bool]
"""A class or function with its place, ``training/step.py:train_step``, and whether it is public."""


def definitions(files: Files) -> Iterator[Definition]:
    for path, tree in modules(files).items():
        yield from definitions_of(tree, path.removeprefix("elm_jax/") + ":")


@functools.cache
def definitions_of(tree: ast.Module, file: str) -> list[Definition]:
    def inside(node: ast.AST, name: str, public: bool) -> Iterator:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                seen = public and not child.name.startswith("_")
                yield f"{name}{child.name}", child, seen
                yield from inside(child, f"{name}{child.name}.", seen and isinstance(child, ast.ClassDef))
            else:
                yield from inside(child, name, public)

    return list(inside(tree, file, True))


def top(files: Files) -> list[str]:
    found = {path.removeprefix("elm_jax/") for path in modules(files) if folder_of(path) == "elm_jax"}
    return [f"at the top: {name}" for name in sorted(found ^ AT_TOP)]


def folder_size(files: Files) -> list[str]:
    counts = collections.Counter(folder_of(path) for path in modules(files) if "__init__" not in path)
    return [f"{folder} has {count} modules" for folder, count in counts.items()
            if count > MOST_MODULES and folder not in LARGER_FOLDERS]


def parameters(files: Files) -> list[str]:
    found = {}
    for place, node, _ in definitions(files):
        if not isinstance(node, ast.ClassDef):
            names = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            count += (node.args.vararg is not None) + (node.args.kwarg is not None)
            if count > MOST_PARAMETERS:
                found[place] = f"{place} takes {count}"
    needless = [f"{place} needs no exception" for place in MORE_PARAMETERS if place not in found]
    return needless + [words for place, words in found.items() if place not in MORE_PARAMETERS]


def class_length(files: Files) -> list[str]:
    lengths = {place: node.end_lineno - node.lineno + 1 for place, node, _ in definitions(files)
               if isinstance(node, ast.ClassDef)}
    long = {place for place, length in lengths.items() if length > MOST_LINES}
    return [f"{place}, {lengths.get(place)} lines" for place in sorted(long ^ set(LONGER_CLASSES))]


def module_names(files: Files) -> list[str]:
    """A file of cli/ may have the name of what it calls, and families of networks have alike files."""
    places = collections.defaultdict(list)
    for path in modules(files):
        name = path.rpartition("/")[2].removesuffix(".py")
        is_family = path.startswith("elm_jax/models/") and name in FAMILY_FILES
        if name not in ("__init__", "__main__") and path not in COMPATIBILITY and not is_family:
            places[name, folder_of(path) == "elm_jax/cli"].append(path)
            if name in FAMILY_FILES:
                places[name, False].append("a family's file in models/")
    return [" and ".join(paths) for paths in places.values() if len(paths) > 1]


def class_names(files: Files) -> list[str]:
    places = collections.defaultdict(list)
    for place, node, public in definitions(files):
        if isinstance(node, ast.ClassDef) and public:
            places[node.name].append(place)
    return [" and ".join(found) for name, found in places.items()
            if (len(found) > 1) != (name in SHARED_CLASSES)]


def contract(files: Files) -> list[str]:
    """The rows are these, siblings in one may not import each other, and every room stands in one."""
    found = tomllib.loads(files["pyproject.toml"])["tool"]["importlinter"]["contracts"]
    rows = [row.replace("elm_jax.", "") for row in found[0]["layers"]]
    rooms = {path.split("/")[1].removesuffix(".py") for path in modules(files)} - {"__init__"}
    left_out = rooms ^ set(re.findall(r"\w+", " ".join(rows)))
    wrong = rows != LAYERS or any(each["type"] != "layers" for each in found)
    return [f"rows: {rows}"] * wrong + [f"in no row, or in no folder: {room}" for room in left_out] + [
        f"{key} weakens the contract" for each in found for key in each if "ignore" in key]


def contracts_inside(files: Files) -> list[str]:
    """In each of these rooms every folder and module stands in one row, above what it imports."""
    contracts = tomllib.loads(files["pyproject.toml"])["tool"]["importlinter"]["contracts"][1:]
    rows = {room: each["layers"] for each in contracts for room in each["containers"] if each["exhaustive"]}
    faults = [f"no rows of their own, or unasked: {room}" for room in set(rows) ^ set(ORDERED)]
    for room, layers in rows.items():
        path = room.replace(".", "/") + "/"
        inside = {each.removeprefix(path).split("/")[0].removesuffix(".py")
                  for each in modules(files) if each.startswith(path)} - {"__init__"}
        named = re.findall(r"\w+", " ".join(layers))
        wrong = (inside ^ set(named)) | {name for name in named if named.count(name) > 1}
        faults += [f"in {room}, in no row, in no folder, or twice: {name}" for name in wrong]
        faults += [f"in {room} siblings may import each other: {row}" for row in layers if ":" in row]
    return faults


def readme_tree(files: Files) -> list[str]:
    """Under `What is where` each folder of elm_jax has a line: indent, name, slash, words."""
    block = re.search(r"## What is where\n+```\n(.*?)```", files["README.md"], re.DOTALL)[1]
    tree = re.search(r"^elm_jax/ .*\n((?: .*\n)*)", block, re.MULTILINE)[1]
    told, above, faults = [], [], []
    for line in tree.splitlines():
        parts = re.fullmatch(r"((?:  )+)(\w+)/ +\S.*", line)
        if parts is None:
            faults.append(f"no line of a folder: {line}")
            continue
        above[len(parts[1]) // 2 - 1:] = [parts[2]]
        told.append("/".join(("elm_jax", *above)))
    folders = {folder_of(path) for path in modules(files)} - {"elm_jax"}
    return faults + [f"README or the disk alone has, or twice: {folder}"
                     for folder in sorted((collections.Counter(told) - collections.Counter(folders))
                                          + (collections.Counter(folders) - collections.Counter(told)))]


def docstrings(files: Files) -> list[str]:
    """Of all modules that hold something, and of all public classes and functions in them and in classes."""
    empty = [path for path, tree in modules(files).items() if tree.body and not ast.get_docstring(tree)]
    return empty + [place for place, node, public in definitions(files)
                    if public and not ast.get_docstring(node)]


RULES = (top, folder_size, parameters, class_length, module_names, class_names, contract,
         contracts_inside, readme_tree, docstrings)


@pytest.fixture(scope="module")
def files() -> Files:
    paths = [*sorted((ROOT / "elm_jax").rglob("*.py")), ROOT / "README.md", ROOT / "pyproject.toml"]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule, files):
    assert rule(files) == []


EIGHT = ", ".join("abcdefgh")
LONG = "class Long:\n" + '    """Doc."""\n' * 200
NEW = "elm_jax/runtime/new.py"
BROKEN = [
    (top, {"elm_jax/new.py": ""}, "at the top: new.py"),
    (folder_size, {f"elm_jax/runtime/new{number}.py": "" for number in range(18)}, "elm_jax/runtime has"),
    (parameters, {NEW: f"def add({EIGHT}): pass"}, "runtime/new.py:add takes 8"),
    (parameters, {NEW: "class A:\n  def add(self, a, b, c, *d, e, f, g, **h): pass"}, "new.py:A.add takes 8"),
    (parameters, {NEW: f"def outer():\n  def add({EIGHT}): pass"}, "new.py:outer.add takes 8"),
    (parameters, {"elm_jax/data/registry/own_task.py": ""}, "own_task.py:add_task needs no exception"),
    (class_length, {NEW: LONG}, "runtime/new.py:Long, 201 lines"),
    (class_length, {"elm_jax/merging/stream.py": ""}, "LeafMerge, None lines"),
    (module_names, {"elm_jax/data/sources/trees.py": ""},
     "runtime/trees.py and elm_jax/data/sources/trees.py"),
    (module_names, {"elm_jax/runtime/report.py": ""}, "reporting/report.py and elm_jax/runtime/report.py"),
    (module_names, {"elm_jax/runtime/config.py": ""}, "elm_jax/runtime/config.py"),
    (class_names, {NEW: "class Base: pass"}, "experts/base.py:Base and runtime/new.py:Base"),
    (contract, {"elm_jax/kitchen/new.py": ""}, "in no row, or in no folder: kitchen"),
    (contract, {"pyproject.toml": (" | elm_jax.evaluation", " : elm_jax.evaluation")}, "rows: "),
    (contract, {"pyproject.toml": ('type = "layers"', 'type = "layers"\nignore_imports = []')}, "weakens"),
    (contracts_inside, {"elm_jax/formats/pickled/new.py": ""}, "in elm_jax.formats, in no row"),
    (contracts_inside, {"pyproject.toml": ('"hf | t5x"', '"hf", "t5x", "hf"')}, "or twice: hf"),
    (contracts_inside, {"pyproject.toml": ('"hf | t5x"', '"hf : t5x"')}, "siblings may import each other"),
    (contracts_inside, {"pyproject.toml": ('["elm_jax.data"]', '["elm_jax.cli"]')}, "unasked: elm_jax.data"),
    (readme_tree, {"elm_jax/runtime/deep/new.py": ""}, "elm_jax/runtime/deep"),
    (readme_tree, {"README.md": ("  cli/  ", "  shell/")}, "elm_jax/shell"),
    (readme_tree, {"README.md": ("    farm/  ", "  cellar/\n    farm/  ")}, "no line of a folder: "),
    (docstrings, {NEW: "import os"}, "elm_jax/runtime/new.py"),
    (docstrings, {NEW: '"""Doc."""\nclass A:\n  """Doc."""\n  def add(self): pass'}, "runtime/new.py:A.add"),
]


@pytest.mark.parametrize(("rule", "changes", "fault"), BROKEN,
                         ids=[f"{number}-{case[0].__name__}" for number, case in enumerate(BROKEN)])
def test_what_breaks_a_rule_is_seen(rule, changes, fault, files):
    """A text takes a file's place, or is put in the place of another text in it."""
    changed = {path: change if isinstance(change, str) else files[path].replace(*change)
               for path, change in changes.items()}
    assert all(files.get(path) != text for path, text in changed.items())
    assert any(fault in found for found in rule({**files, **changed}))
