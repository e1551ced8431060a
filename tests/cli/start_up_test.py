"""Start-up imports what is used and nothing else; what is told by modules that are loaded, not by a clock."""

import argparse
import ast
import importlib
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

import elm_jax
from elm_jax import models
from elm_jax.cli import flags
from elm_jax.evaluation import evaluation_settings
from elm_jax.formats import detect
from elm_jax.runtime import lazy
from elm_jax.workflows import choices

HEAVY = {"jax", "numpy", "orbax", "flax", "optax", "tensorflow", "seqio", "tensorstore", "sklearn", "rich"}
ENDS = "import atexit, sys; atexit.register(lambda: print(*sys.modules))\n"


def loaded(program: str, *words: object) -> set[str]:
    """The packages that a program has imported at its end."""
    done = subprocess.run([sys.executable, "-c", ENDS + program, *map(str, words)], capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}


def test_importing_elm_jax_imports_nothing_else():
    assert not loaded("import elm_jax\n") & HEAVY


@pytest.mark.parametrize("words", [["--help"], ["merge", "--help"], ["train", "--help"]], ids=" ".join)
def test_help_imports_no_jax(words):
    assert not loaded("from elm_jax.cli.main import main; main(sys.argv[1:])", *words) & HEAVY


def test_merging_checkpoints_imports_no_network(tmp_path):
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file({"a": np.full((4, 3), number, np.float32)}, folder / "model.safetensors")
    found = loaded("from elm_jax.cli.main import main; status = main(sys.argv[1:]); assert status == 0\n",
                   "merge", tmp_path / "0", tmp_path / "1", "--output", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").exists()
    unneeded = {"orbax", "flax", "optax", "sklearn", "tensorflow", "seqio", "tensorstore", "sentencepiece",
                "tokenizers", "matplotlib", "jinja2", "gin", "transformers", "torch"}
    assert "jax" in found and not found & unneeded


@pytest.mark.parametrize("package", [elm_jax, models], ids=lambda package: package.__name__)
def test_public_names_resolve_and_are_listed_once_more_for_type_checkers(package):
    for name in package.__all__:
        found = getattr(importlib.import_module(package._MODULES[name]), name)
        assert getattr(package, name) is found and name in dir(package)
    block = next(node for node in ast.parse(pathlib.Path(package.__file__).read_text()).body
                 if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    listed = {alias.name: node.module for node in imports for alias in node.names if alias.name != "FAMILIES"}
    of_families = {name.id for node in block.body if isinstance(node, ast.Assign)
                   for name in ast.walk(node.targets[0]) if isinstance(name, ast.Name)}
    assert of_families == {"T5Config", "T5Network"}  # no module but the table names a family's classes
    assert listed == {name: module for name, module in package._MODULES.items() if name not in of_families}
    assert sorted({*listed, *of_families}) == sorted(package.__all__)


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'elm_jax' has no attribute 'marge'"):
        _ = elm_jax.marge
    with pytest.raises(ImportError):
        from elm_jax import marge  # noqa: F401


def runs(parser: argparse.ArgumentParser):
    """``module:function`` of every verb, those of verbs of verbs too."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from runs(verb)
    if parser.get_default("run"):
        yield parser.get_default("run")


def test_every_verb_has_its_function():
    found = set(runs(flags.make_parser()))
    assert len(found) > 20 and all(callable(lazy.resolve(f"elm_jax.cli.{run}")) for run in found)


def test_the_words_of_the_flags_are_those_of_what_they_choose():
    assert set(detect.KINDS) == set(choices.MODEL_KINDS)
    assert evaluation_settings.CHOICE_SCORES == choices.CHOICE_SCORES
