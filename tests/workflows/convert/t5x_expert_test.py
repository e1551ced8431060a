"""A T5X run's MODEL_DIR becomes an expert: on the command line and in Python, in both of T5X's layouts.

The runs are made without T5X: its checkpoints by Orbax and TensorStore, its config.gin by hand. Real runs
are in tests/t5x/launches_test.py.
"""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
import t5x_checkpoints as made

from elm_jax.cli import main
from elm_jax.errors import InputError
from elm_jax.experts.base import load_base, save_base
from elm_jax.experts.overlay import load_expert
from elm_jax.formats import detect
from elm_jax.models.adapters.config import AdapterConfig
from elm_jax.models.adapters.kind import is_adapter_leaf
from elm_jax.models.t5.network import is_norm_leaf
from elm_jax.runtime import trees
from elm_jax.workflows.convert.t5x_expert import expert_from_checkpoint

NETWORK = made.config()
MODULE = "elm_jax.tasks.embedded"
TASK = "mini_topic__about_what"
LAYOUTS = ("orbax", "zarr")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base of random weights, without a vocabulary."""
    folder = tmp_path_factory.mktemp("bases") / "small"
    save_base(folder, trees.unflatten(made.random_leaves(NETWORK)), NETWORK, None, {})
    return load_base(folder)


def gin_file(task: str | None, **macros: object) -> str:
    """What T5X leaves of a run, in gin's own manner: a long value stands on a line of its own."""
    lines = ["from __gin__ import dynamic_registration", "", "# Macros:", "# " + 78 * "=", "BATCH_SIZE = 8",
             "MODEL = @models.EncoderDecoderModel()", "RANDOM_SEED = 5", "SHUFFLE_SEED = %RANDOM_SEED",
             *(f"{name} = {value!r}" for name, value in macros.items())]
    if task is not None:
        lines.insert(4, f"MIXTURE_OR_TASK_NAME = \\\n    {task!r}" if len(task) > 40
                     else f"MIXTURE_OR_TASK_NAME = {task!r}")
    return "\n".join(lines) + "\n"


def make_run(folder: pathlib.Path, base, layout: str, *, form: str, task: str | None, norms: bool = True,
             step: int = 30, **macros: object) -> dict[str, np.ndarray]:
    """A run's MODEL_DIR; returns the leaves that it trained."""
    network = NETWORK.with_adapter(AdapterConfig(7)) if form == "adapter" else NETWORK
    leaves = made.random_leaves(network, seed=9)
    own = {path: leaf for path, leaf in leaves.items()
           if form == "full" or is_adapter_leaf(path) or (norms and is_norm_leaf(path))}
    made.WRITERS[layout](folder, {**trees.flatten(base.params), **own}, step)
    (folder / "config.gin").write_text(gin_file(task, **macros))
    return own


def run(capsys, *words):
    status = main.main(["convert", "--from", "t5x", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prompt_run_becomes_an_expert(capsys, base, tmp_path, layout):
    own = make_run(tmp_path / "run", base, layout, form="adapter", task=TASK)
    status, out, err = run(capsys, "--to", "elm", "--base", base.path, "--verify", "--json", tmp_path / "run",
                           tmp_path / "expert")
    assert status == 0, err
    report, expert = json.loads(out), load_expert(tmp_path / "expert")
    assert report["source"]["expert"] == TASK and report["verified"]["largest_difference"] < 1e-4
    assert {leaf["leaf"]: leaf["source"] for leaf in report["leaves"]} == {
        path: f"target.{path.replace('/', '.')}" for path in own}
    made.assert_same(trees.flatten(expert.overlay), own)
    card = expert.card
    assert (card.id, card.kind, card.form, card.tasks, card.dataset) == (
        TASK, "prompt", "adapter", (TASK,), "mini_topic")
    assert card.templates and card.base == base.reference()
    assert (card.training["steps"], card.training["seed"], card.training["batch_size"]) == (30, 5, 8)
    assert card.network == {**NETWORK.to_dict(), "adapter": {"bottleneck": 7}}
    again = expert_from_checkpoint(tmp_path / "run", base, modules=[MODULE])
    assert dataclasses.replace(again.card, created=card.created) == card
    assert trees.fingerprint(again.overlay) == trees.fingerprint(expert.overlay)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dataset_run_becomes_an_expert(capsys, base, tmp_path, layout):
    own = make_run(tmp_path / "run", base, layout, form="full", task="mini_topic")
    status, _, err = run(capsys, "--to", "elm", "--base", base.path, tmp_path / "run", tmp_path / "expert")
    assert status == 0, err
    expert = load_expert(tmp_path / "expert")
    made.assert_same(trees.flatten(expert.overlay), own)
    card = expert.card
    assert (card.id, card.kind, card.form, card.dataset) == ("mini_topic", "dataset", "full", "mini_topic")
    assert len(card.tasks) == len(card.templates) > 1 and card.base == base.reference()
    # Without a base it is a model of its own, and as one it leaves for Hugging Face.
    assert run(capsys, "--to", "elm", tmp_path / "run", tmp_path / "model")[0] == 0
    for kind, words in (("elm", ()), ("hf", ("--base", base.path))):
        assert run(capsys, "--to", kind, *words, tmp_path / "run", tmp_path / kind)[0] == 0
        made.assert_same(made.read_all(detect.open_model(tmp_path / kind)), own)


def test_names_kinds_and_modules(capsys, base, tmp_path):
    make_run(tmp_path / "my run", base, "zarr", form="full", task=None)
    words = ("--to", "elm", "--base", base.path)
    status, _, err = run(capsys, *words, tmp_path / "my run", tmp_path / "x")
    assert status == 2 and "which kind of expert" in err and "--kind" in err
    assert run(capsys, *words, "--kind", "multitask", tmp_path / "my run", tmp_path / "a")[0] == 0
    card = load_expert(tmp_path / "a").card
    assert (card.id, card.kind, card.tasks) == ("my_run", "multitask", ())
    more = ("--kind", "dataset", "--id", "mine")
    assert run(capsys, *words, *more, tmp_path / "my run", tmp_path / "b")[0] == 0
    assert load_expert(tmp_path / "b").card.id == "mine"
    status, _, err = run(capsys, *words, "--kind", "prompt", tmp_path / "my run", tmp_path / "x")
    assert status == 2 and "none of that kind" in err
    assert not (tmp_path / "x").exists()


def test_a_mixture_is_the_same_whatever_data_lie_here(base, monkeypatch, tmp_path):
    """A multitask run stays one where one data set, or none, is at hand."""
    make_run(tmp_path / "run", base, "zarr", form="full", task="t0_train")
    cards = []
    for folder in ("nothing", "some"):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path / folder))
        cards.append(expert_from_checkpoint(tmp_path / "run", base).card)
        rows = tmp_path / "some" / "ag_news"
        rows.mkdir(parents=True, exist_ok=True)
        for split in ("train", "validation"):
            (rows / f"{split}.jsonl").write_text('{"text": "x", "label": 0}\n')
    assert cards[0].kind == cards[1].kind == "multitask" and cards[0].tasks == cards[1].tasks
    assert cards[1].dataset is None and len(cards[0].tasks) > 200


@pytest.mark.parametrize("line", [
    "MIXTURE_OR_TASK_NAME = 5", "MIXTURE_OR_TASK_NAME = ['a']", "RANDOM_SEED = {1, 2}", "RANDOM_SEED = 1e999",
    "BATCH_SIZE = b'x'", "TRAIN_NORMS = 'False'", "TRAIN_NORMS = 0", "BATCH_SIZE = True"])
def test_macros_of_another_kind(base, tmp_path, line):
    make_run(tmp_path / "run", base, "zarr", form="adapter", task=None)
    path = tmp_path / "run" / "config.gin"
    name = line.partition(" ")[0]
    kept = [old for old in path.read_text().splitlines() if not old.startswith(f"{name} ")]
    path.write_text("\n".join([*kept, line]) + "\n")
    with pytest.raises(InputError, match=rf"of another kind(.|\n)*config.gin(.|\n)*{name}"):
        expert_from_checkpoint(tmp_path / "run", base)


def test_macros_that_are_no_values_are_left_alone(base, tmp_path):
    make_run(tmp_path / "run", base, "zarr", form="adapter", task=TASK)
    with open(tmp_path / "run" / "config.gin", "a") as file:
        file.write(f"A = {{[]: 1}}\nB = {'-' * 10_000}1\nC = {'[' * 10_000}\nD = %BATCH_SIZE\n")
    assert expert_from_checkpoint(tmp_path / "run", base, modules=[MODULE]).card.tasks == (TASK,)


def test_two_nameless_runs_do_not_collide(base, tmp_path):
    ids = set()
    for name in ("one", "two"):
        make_run(tmp_path / name, base, "zarr", form="adapter", task=None, step=200)
        places = (tmp_path / name, tmp_path / name / "checkpoint_200")
        ids |= {expert_from_checkpoint(place, base).card.id for place in places}
    assert ids == {"one", "two"}


def test_a_long_name_is_read_where_gin_puts_it(base, tmp_path):
    name = "super_glue_multirc__" + 60 * "x"
    make_run(tmp_path / "run", base, "zarr", form="adapter", task=name)
    card = expert_from_checkpoint(tmp_path / "run", base).card
    assert (card.id, card.tasks) == (name, (name,))


def test_norms_that_were_frozen_stay_the_bases(base, tmp_path):
    own = make_run(tmp_path / "run", base, "orbax", form="adapter", task=TASK, norms=False, TRAIN_NORMS=False)
    expert = expert_from_checkpoint(tmp_path / "run", base, modules=[MODULE])
    made.assert_same(trees.flatten(expert.overlay), own)
    make_run(tmp_path / "changed", base, "orbax", form="adapter", task=TASK, norms=True, TRAIN_NORMS=False)
    with pytest.raises(InputError, match=r"frozen leaves differ: .*_norm/scale"):
        expert_from_checkpoint(tmp_path / "changed", base, modules=[MODULE])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_written_and_cut_checkpoints(capsys, base, tmp_path, layout):
    """The newest whole checkpoint counts; one that is named must be whole."""
    own = make_run(tmp_path / "run", base, layout, form="adapter", task=TASK)
    half = tmp_path / "run" / "checkpoint_60"
    shutil.copytree(tmp_path / "run" / "checkpoint_30", half)
    (half / ("checkpoint" if layout == "zarr" else "state/_METADATA")).unlink()
    expert = expert_from_checkpoint(tmp_path / "run", base, modules=[MODULE])
    assert expert.card.training["steps"] == 30
    made.assert_same(trees.flatten(expert.overlay), own)
    status, _, err = run(capsys, "--to", "elm", "--base", base.path, half, tmp_path / "x")
    assert status == 2 and "half written" in err
    for file in (tmp_path / "run" / "checkpoint_30").rglob("*"):
        if file.is_file() and file.stat().st_size > 3000:
            file.write_bytes(file.read_bytes()[:-100])
    status, _, err = run(capsys, "--to", "elm", "--base", base.path, tmp_path / "run", tmp_path / "x")
    assert status == 2 and ("not whole" in err or "cannot be read" in err) and not (tmp_path / "x").exists()


def test_what_does_not_fit(capsys, base, tmp_path):
    make_run(tmp_path / "run", base, "zarr", form="adapter", task=TASK)
    other = tmp_path / "other"
    save_base(other, trees.unflatten(made.random_leaves(NETWORK, seed=4)), NETWORK, None, {})
    smaller = dataclasses.replace(NETWORK, num_decoder_layers=3)
    save_base(tmp_path / "smaller", trees.unflatten(made.random_leaves(smaller)), smaller, None, {})
    for words, message in (
        ((), "base is needed"),
        (("--base", other), "belongs to another base"),
        (("--base", tmp_path / "smaller"), "unexpected ("),
        (("--base", tmp_path / "run"), "no base: it holds the adapters"),
    ):
        status, _, err = run(capsys, "--to", "elm", *words, tmp_path / "run", tmp_path / "x")
        assert status == 2 and message in err and "Traceback" not in err, err
    status, _, err = run(capsys, "--to", "elm", "--id", "x", base.path, tmp_path / "x")
    assert status == 2 and not (tmp_path / "x").exists()


def test_an_experts_name_can_be_chosen(capsys, base, tmp_path):
    make_run(tmp_path / "run", base, "zarr", form="adapter", task=TASK)
    words = ["convert", "--base", base.path]
    assert main.main([*words, "--from", "t5x", "--to", "hf", str(tmp_path / "run"),
                      str(tmp_path / "hf")]) == 0
    assert main.main([*words, "--from", "hf", "--to", "elm", "--id", "renamed", str(tmp_path / "hf"),
                      str(tmp_path / "elm")]) == 0
    assert load_expert(tmp_path / "elm").card.id == "renamed"
    status = main.main(["convert", "--from", "elm", "--to", "hf", "--id", "x", base.path,
                        str(tmp_path / "x")])
    assert status == 2 and "whole model" in capsys.readouterr().err
