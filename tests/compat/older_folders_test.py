"""Folders that an older version wrote are read, found finished and gone on with, with the numbers of then."""

import ast
import dataclasses
import importlib
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import older_folders as older
import pytest

from elm_jax.cli.main import main as elm
from elm_jax.experts.base import load_base
from elm_jax.experts.overlay import load_expert
from elm_jax.models.t5.config import T5Config
from elm_jax.runtime import trees

EXPECTED = json.loads(older.EXPECTED.read_text())
SAME_COMPILER = older.compiler() == EXPECTED["compiler"]
TOLERANCE = 1e-5
"""Of a figure that another version of the compiler, or another processor, computes: last bits differ. Without
AVX the farthest, a norm of a gradient, is 2.2e-6 off."""
HASH = "sha256:"
"""Begins what weights decide to the bit: fingerprints, under whichever name a file keeps them."""
MADE_OF = "/made_of.json/made_of/"
"""Where a study keeps hashes of its experts' fingerprints, shortened."""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(older.ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def here(unpacked: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
         ) -> Iterator[pathlib.Path]:
    """A copy of the older folders, which is the current folder."""
    folder = tmp_path / "here"
    shutil.copytree(unpacked, folder)
    monkeypatch.syspath_prepend(str(older.HERE))
    with older.inside(folder):
        yield folder


def alike(found: Any, wanted: Any, at: str = "") -> list[str]:
    """Where a JSON value is not what it was; fields that are new pass.

    Unless the compiler is the one of then, figures are compared loosely.
    """
    if isinstance(wanted, dict) and isinstance(found, dict) and found.keys() >= wanted.keys():
        return [fault for name in wanted for fault in alike(found[name], wanted[name], f"{at}/{name}")]
    if isinstance(wanted, list) and isinstance(found, list) and len(found) == len(wanted):
        return [fault for number, pair in enumerate(zip(found, wanted, strict=True))
                for fault in alike(*pair, f"{at}/{number}")]
    if not SAME_COMPILER and (at.startswith(MADE_OF) or _nearly(found, wanted)):
        return []
    return [] if found == wanted else [f"{at}: {found!r:.200}, then {wanted!r:.200}"]


def _nearly(found: Any, wanted: Any) -> bool:
    """Whether one program under two compilers may give both values: two hashes, or figures that are close."""
    if isinstance(wanted, str) and isinstance(found, str):
        return found.startswith(HASH) and wanted.startswith(HASH)
    return (isinstance(wanted, float) and isinstance(found, float)
            and math.isclose(found, wanted, rel_tol=TOLERANCE, abs_tol=TOLERANCE))


def test_what_is_said_of_them_is_what_was_said(here):
    """Votes, similarities, cards, faults, states of a farm: all as the older program printed them."""
    assert alike(older.told(elm), EXPECTED["commands"]) == []


def test_finished_work_is_found_finished(here):
    """Runs, arrays and results: the command of then does nothing again, and writes what it wrote then."""
    before = older.files(here)
    assert alike(older.run_facts(here), EXPECTED["finished"]) == []
    for command in older.FINISHED.values():
        older.said(elm, command)
    after = older.files(here)
    assert sorted(name for name in after if before.get(name) != after[name]) == EXPECTED["written_again"]
    assert before.keys() == after.keys()


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name in ("half_study", "half_dataset", "half_lora")))
    for name in older.HALF_DONE])
def test_half_done_work_goes_on_to_the_same_end(here, name):
    """Losses of the steps before and after the stop, cards, and weights by their fingerprints."""
    older.said(elm, older.HALF_DONE[name])
    found = older.run_facts(here / name)
    assert alike(older.without_newer(found), older.without_newer(EXPECTED[name])) == []


def test_a_base_half_done_under_elm_train_goes_on_under_elm_pretrain(here):
    older.said(elm, ["pretrain", *older.HALF_DONE["half_base"][1:]])
    assert alike(older.run_facts(here / "half_base"), EXPECTED["half_base"]) == []


def test_experts_score_what_they_scored(here):
    """Every prediction of each kind of expert, scored again from its folder."""
    then = here / "results"
    then.rename(here / "results_then")
    for name in ("evaluation", "base's evaluation"):
        older.said(elm, older.FINISHED[name])
    found, wanted = older.run_facts(then), older.run_facts(here / "results_then")
    assert alike(older.without_newer(found), older.without_newer(wanted)) == []


def test_experts_merge_to_what_they_merged_to(here):
    older.said(elm, ["merge", "--output", "again", "--id", "merged", "runs/prompt/expert",
                     "runs/sum_up/expert"])
    found, wanted = load_expert("again"), load_expert("merged")
    assert trees.fingerprint(found.overlay) == trees.fingerprint(wanted.overlay)
    assert older.without_clock(found.card.to_dict()) == older.without_clock(wanted.card.to_dict())


@pytest.mark.parametrize(("kind", "folder"), [("t5x", "t5x_export"), ("hf", "hf_export")])
def test_exports_with_adapters_come_back_as_the_expert(here, kind, folder):
    older.said(elm, ["convert", "--from", kind, "--to", "elm", *older.BASE, *older.MODULE, folder, "back"])
    found, wanted = trees.flatten(load_expert("back").overlay), trees.flatten(
        load_expert("runs/prompt/expert").overlay)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_a_network_without_a_family_is_a_t5(here):
    """No older file says of which family its network is."""
    assert "family" not in json.loads(pathlib.Path("base/base/base.json").read_text())["network"]
    base = load_base("base/base")
    assert type(base.config) is T5Config and base.config.emb_dim == 4
    for name in ("prompt", "lora", "dataset"):
        card = load_expert(f"runs/{name}/expert").card
        assert "family" not in card.network and T5Config.from_dict(card.network).vocab_size == 224


def test_an_exported_network_gin_names_modules_that_are_there(here):
    """The file's imports, and the configs that its bindings name, as T5X makes them."""
    text = pathlib.Path("t5x_export/network.gin").read_text()
    modules = {name: importlib.import_module(f"{package}.{name}")
               for package, name in re.findall(r"^from (elm_jax[.\w]*) import (\w+)$", text, re.MULTILINE)}
    assert set(modules) == {"t5x_module", "t5_config"}
    bound: dict[str, dict] = {}
    for module, name, parameter, value in re.findall(r"^(\w+)\.(\w+)\.(\w+) = (.+)$", text, re.MULTILINE):
        assert hasattr(modules[module], name)
        if not value.startswith("@"):
            bound.setdefault(name, {})[parameter] = ast.literal_eval(value)
    adapter = modules["t5_config"].AdapterConfig(**bound["AdapterConfig"])
    config = modules["t5_config"].T5Config(**bound["T5Config"], adapter=adapter)
    card = load_expert("runs/prompt/expert").card
    assert config == dataclasses.replace(T5Config.from_dict(card.network), dropout_rate=config.dropout_rate)
    assert modules["t5x_module"].T5XTransformer(config).config == config


PATHS: dict[str, tuple[str, ...]] = {
    "elm_jax.data.registry": (
        "EVALUATION_ONLY", "PromptMixture", "ROLES", "add_cached_task", "add_mixture", "add_origin",
        "add_prompted_task", "capped_mixture", "check_trainable", "describe_task", "evaluation_only",
        "find_mixture", "get_mixture", "get_task", "import_tasks", "mixture_names", "mixture_rates",
        "mixture_tasks", "origin_of", "task_names"),
    "elm_jax.data.templates": ("PromptTemplate",),
    "elm_jax.models.t5x_module": ("T5XTransformer", "T5Config", "AdapterConfig"),
    "elm_jax.models.t5_config": ("T5Config", "AdapterConfig"),
}
"""Dotted names that stand in README, in registries of users and in exported folders."""


@pytest.mark.parametrize("path", PATHS)
def test_dotted_names_that_others_hold_are_there(path):
    module = importlib.import_module(path)
    assert [name for name in PATHS[path] if not hasattr(module, name)] == []


def test_the_command_line_is_still_a_module():
    done = subprocess.run([sys.executable, "-m", "elm_jax.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "elm demo" in done.stdout
