"""Names and paths in docs, README and docstrings exist; tests, verbs and README's tree follow the folders.

Each rule is a function from texts, or from lists of files, to faults; each is also broken on purpose.
"""

import argparse
import ast
import functools
import re
from collections.abc import Collection, Iterable, Iterator

import pytest
from checkout import ROOT

from elm_jax.cli import flags

ROOMS = sorted(path.name for path in (ROOT / "elm_jax").iterdir() if (path / "__init__.py").exists())
STEMS = {path.stem: [each.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
                     for each in (ROOT / "elm_jax").rglob(path.name)]
         for path in (ROOT / "elm_jax").rglob("[a-z]*.py")
         if path.stem not in (*ROOMS, "train", "pretrain", "study", "network")}
"""Modules by their last names, less those that are a config's name in gin files, or a variable's."""
TOPS = ("elm_jax", "tests", "docs", "gin", "launch", "benchmarks", "tasks")
NOT_NAMES = {"elm_jax.gin": "the gin files in an installed package", "elm_jax.adapters": "a format's name",
             "elm_jax.benchmarks": "a logger"}
NOT_NAMES |= dict.fromkeys(
    ("elm_jax.config.gin_folder", "elm_jax.merging.compose", "elm_jax.evaluation.stacked",
     "elm_jax.workflows.t5x_expert"), "CHANGELOG says what it is called now")
OWN = "tests/repository/places_test.py"  # its examples are stale on purpose
FILE = re.compile(r"(?<![\w./$*<>{}-])((?:[\w.-]+/)+[\w.-]*\w\.(?:py|gin|md|sh|json|toml))(?![\w*/<{])")
DOTTED = re.compile(r"(?<![\w./-])elm_jax(?:\.[A-Za-z_]\w*)+")
QUOTED = re.compile(r"`([a-z_]\w*(?:\.[A-Za-z_]\w*)+)`")
EXAMPLES = {"gin/runs/x.gin"}
SUFFIXES = (".py", ".gin", ".md", ".json", ".jsonl", ".sh", ".yaml", ".html", ".model", ".safetensors",
            ".gguf")


def documents() -> Iterator[tuple[str, str]]:
    """Texts by place: documents, of CHANGELOG what is unreleased, docstrings and comments."""
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
                 *sorted((ROOT / "benchmarks").glob("*.md")), *sorted((ROOT / "gin").rglob("*.gin"))):
        yield path.relative_to(ROOT).as_posix(), path.read_text()
    yield "CHANGELOG.md", re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1]
    for folder in ("elm_jax", "tasks", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), "\n".join(words_of(path.read_text()))


def words_of(source: str) -> Iterator[str]:
    """Docstrings, strings under a name, and comments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(
                node.value.value, str):
            yield node.value.value
    yield from re.findall(r"^\s*#.*|  # .*", source, re.MULTILINE)


def names_in(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """What a module or a class defines, imports or assigns, also under conditions and on `self`."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name, node) for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((each.id, node) for target in targets for each in ast.walk(target)
                        if isinstance(each, ast.Name))
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from names_in(node.body)
            yield from names_in(getattr(node, "orelse", []))


@functools.cache
def exists(name: str) -> bool:
    """Whether a dotted name is a module, or is defined or offered in one; read, not imported."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:count])
        if parts[:2] == ["elm_jax", "tasks"]:
            path = ROOT.joinpath("tasks", *parts[2:count])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if path.exists():
            tree, rest = ast.parse(path.read_text()), parts[count:]
            break
    else:
        return False
    body = tree.body
    for part in rest:
        found = dict(names_in(body)).get(part)
        if found is None:
            return False
        if not isinstance(found, ast.ClassDef):
            return True  # of what a name holds nothing is known here
        body = found.body
    return True


def stale_names(text: str) -> list[str]:
    """Dotted names that do not exist: of elm_jax; in backquotes also from a room or a module on."""
    quoted = {name for name in QUOTED.findall(text) if not name.endswith(SUFFIXES)}
    names = set(DOTTED.findall(text)) | {f"elm_jax.{name}" for name in quoted if name.split(".")[0] in ROOMS}
    faults = [name for name in names if name not in NOT_NAMES and not exists(name)]
    for name in quoted:
        stem, _, rest = name.partition(".")
        if stem in STEMS and not any(exists(f"{module}.{rest}") for module in STEMS[stem]):
            faults.append(name)
    return sorted(faults)


def stale_paths(text: str) -> list[str]:
    """Paths of files in the checkout, from its top, from elm_jax or from gin on, that do not exist."""
    found = set(FILE.findall(text)) - EXAMPLES
    return sorted(path for path in found if path.split("/")[0] in (*TOPS, *ROOMS)
                  and not any((ROOT / top / path).exists() for top in ("", "elm_jax", "gin")))


def test_names_and_paths_in_texts_exist():
    texts = dict(documents())
    assert len(texts) > 300
    faults = {path: found for path, text in texts.items()
              if path != OWN and (found := stale_names(text) + stale_paths(text))}
    assert faults == {}


@pytest.mark.parametrize(("text", "fault"), [
    ("read by `elm_jax.tree_files`", "elm_jax.tree_files"),
    ("see elm_jax.runtime.trees.flat, too", "elm_jax.runtime.trees.flat"),
    ("a name in `merging.methods.METHODS`", "elm_jax.merging.methods.METHODS"),
    ("a name in `method_table.METHOD`", "method_table.METHOD"),
    ("as `models.network.Network.batch` says", "elm_jax.models.network.Network.batch"),
])
def test_a_stale_name_is_seen(text, fault):
    assert stale_names(text) == [fault]


@pytest.mark.parametrize("path", ["models/recompute.py", "elm_jax/cli/commands.py", "docs/none.md",
                                  "tests/models/none_test.py", "gin/experts/none.gin"])
def test_a_stale_path_is_seen(path):
    assert stale_paths(f"computed again ({path}), and") == [path]


def test_what_exists_is_no_fault():
    assert stale_names("`models.network.Network.batches`, elm_jax.tasks.embedded.") == []
    assert stale_paths("models/layers/recompute.py, elm_jax/cli/main.py, launch/test.sh") == []


OWN_TESTS = {"repository": "rules of the checkout", "compat": "folders of an older version",
             "t5x": "runs of T5X", "helpers": "what tests import"}


def lost_folders(tests: Collection[str], package: Collection[str]) -> list[str]:
    """Folders of tests that have no folder of elm_jax, exceptions apart."""
    return sorted(folder for folder in tests
                  if folder not in package and folder.split("/")[0] not in OWN_TESTS)


def folders(top: str) -> set[str]:
    return {path.parent.relative_to(ROOT / top).as_posix() for path in (ROOT / top).rglob("*.py")} - {"."}


def test_tests_follow_the_folders():
    assert lost_folders(folders("tests"), folders("elm_jax")) == []
    assert set(OWN_TESTS) <= folders("tests")
    assert lost_folders({"models", "data/arrays", "t5x", "kitchen", "data/old"}, folders("elm_jax")) == [
        "data/old", "kitchen"]


def verbs(parser: argparse.ArgumentParser, above: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Each verb's words, and the ``module:function`` that runs it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from verbs(below, (*above, name))
    if runs := parser.get_default("run"):
        yield " ".join(above), runs


def misplaced(found: Collection[tuple[str, str]]) -> list[str]:
    """Verbs that another file of cli/ than the one of their name runs."""
    return [f"elm {verb} is in {runs}" for verb, runs in found
            if runs.split(":")[0].rsplit(".", 1)[-1] != verb.split()[0]]


def test_a_verb_is_found_in_the_file_of_its_name():
    found = list(verbs(flags.make_parser()))
    assert len(found) > 15
    assert misplaced(found) == []
    assert misplaced([("route", "library:route")]) == ["elm route is in library:route"]


def missing_in_tree(readme: str) -> list[str]:
    """What README's `What is where` names outside elm_jax/, less what stands on the disk, and the reverse."""
    block = re.search(r"## What is where\n+```\n(.*?)```", readme, re.DOTALL)[1]
    lines = re.findall(r"^(\w+)/ +(\S.*(?:\n {8,}.*)*)", block, re.MULTILINE)
    told = {folder: set(re.findall(r"(?<!\S)\w+(?:/|\.(?:sh|sbatch|yaml|md))(?=[\s;:,)]|$)", words))
            for folder, words in lines if folder != "elm_jax"}
    faults = [folder for folder in told if not (ROOT / folder).is_dir()]
    for folder, names in told.items():
        faults += [f"{folder}/{name}" for name in sorted(names)
                   if not (ROOT / folder / name).exists()]
    here = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))}
    return faults + sorted(here & set(TOPS) - set(told) - {"elm_jax"})


CHANGED = [
    ("quickstart.sh", "start.sh", "launch/start.sh"), ("sharding/", "sharded/", "gin/sharded/"),
    ("\nbenchmarks/ ", "\nbenches/    ", "benches"), ("compat/", "compatible/", "tests/compatible/"),
    ("  hosts.md", "  guests.md", "docs/guests.md"), ("\ntasks/ ", "\n", "tasks"),
]


def test_the_tree_of_the_readme_exists_outside_the_package_too():
    readme = (ROOT / "README.md").read_text()
    assert missing_in_tree(readme) == []
    for old, new, fault in CHANGED:
        assert old in readme
        assert fault in missing_in_tree(readme.replace(old, new)), fault
