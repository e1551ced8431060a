"""The whole chain on two processes of four devices: train, checkpoint, die, resume, evaluate.

What one process of the same mesh gives is the measure. Sums over devices are taken in another order
there, in float32: losses agree within `ROUNDING`, relative, and result rows within the scores' digits.
"""

import dataclasses
import json
import pathlib
import signal

import numpy as np
import pytest
import tiny_study as tiny
from processes import ROUNDING, Run, assert_lost, kill, newest_checkpoint

from elm_jax.evaluation.evaluator import EvaluationSettings, ResultsStore
from elm_jax.experts.overlay import load_expert
from elm_jax.runtime import sharding, trees
from elm_jax.runtime.preemption import STOPPED
from elm_jax.workflows.evaluate.evaluate_models import ScoringSetup, evaluate_models, model_in
from elm_jax.workflows.train.train_expert import train

pytestmark = pytest.mark.slow
STEPS = 36
MESHES = {"prompt": (8, 1), "dataset": (2, 4)}
TASKS = {"prompt": tiny.TOPIC, "dataset": "mini_topic"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make_base(tmp_path_factory.mktemp("base"))


def config(base, folder, kind):
    mesh = dict(zip(("mesh_data", "mesh_model"), MESHES[kind], strict=True))
    return tiny.train_config(base, folder, kind=kind, task=TASKS[kind], train_steps=STEPS, batch_size=8,
                             checkpoint_period=12, log_period=1, dropout_rate=0.1, **mesh)


def words(config):
    """The same run as a command line; it saves every step, so that no machine is too fast to be killed."""
    settings = {
        "MODEL_DIR": config.model_dir, "INITIAL_CHECKPOINT_PATH": config.initial_checkpoint_path,
        "TASK": config.task, "TASK_MODULES": config.modules, "EPOCHS": None, "TRAIN_STEPS": STEPS,
        "BATCH_SIZE": config.batch_size, "TASK_FEATURE_LENGTHS": config.task_feature_lengths,
        "MESH_DATA": config.mesh_data, "MESH_MODEL": config.mesh_model, "PREPARED_DIR": config.prepared_dir,
        "LEARNING_RATE": config.optimizer.learning_rate, "OptimizerConfig.name": config.optimizer.name,
        "MAX_EXAMPLES": config.max_examples, "train.adapter_bottleneck": config.adapter_bottleneck,
        "train.log_period": 1, "train.checkpoint_period": 1, "train.tensorboard": False}
    return ["train", "--gin_file", f"experts/{config.kind}.gin",
            *(f"--gin.{name}={value!r}" for name, value in settings.items())]


def rows_of(config):
    lines = (pathlib.Path(config.model_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def reference(base, folder, kind):
    """The run of one process with eight devices."""
    whole = config(base, folder / f"{kind}_one", kind)
    return whole, train(whole, base=base, mesh=sharding.make_mesh(*MESHES[kind])).expert


def assert_same_run(found, wanted, expert):
    """Losses of every step, once each, and the trained leaves."""
    rows, expected = rows_of(found), rows_of(wanted)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "param_norm", "tokens"):
        np.testing.assert_allclose([row[name] for row in rows], [row[name] for row in expected],
                                   rtol=ROUNDING, err_msg=name)
    leaves = trees.flatten(load_expert(found.model_dir).overlay)
    for path, leaf in trees.flatten(expert.overlay).items():
        # By norm: where a gradient is near zero, a rounding turns the step of a single number round.
        assert np.linalg.norm(leaves[path] - leaf) <= 2e-4 * np.linalg.norm(leaf), path


def test_a_prompt_expert_survives_its_processes(base, tmp_path):
    whole, expert = reference(base, tmp_path, "prompt")
    mine = config(base, tmp_path / "prompt_two", "prompt")
    run = Run(tmp_path / "log", words(mine))
    statuses, seconds = kill(run, 1, signal.SIGKILL, 4, mine)
    assert_lost(run, 1, statuses, seconds)
    run = Run(tmp_path / "log", words(mine))
    later = newest_checkpoint(pathlib.Path(mine.model_dir)) + 4
    statuses, seconds = kill(run, 0, signal.SIGKILL, later, mine)
    assert_lost(run, 0, statuses, seconds)
    assert newest_checkpoint(pathlib.Path(mine.model_dir)) < STEPS
    train(mine, base=base, mesh=sharding.make_mesh(4, 1))  # to the end, as one process with four devices
    assert_same_run(mine, whole, expert)


def test_a_dataset_expert_is_preempted_and_scored_by_two_processes(base, tmp_path):
    whole, expert = reference(base, tmp_path, "dataset")
    mine = config(base, tmp_path / "dataset_two", "dataset")
    run = Run(tmp_path / "log", words(mine))
    statuses, _ = kill(run, 1, signal.SIGTERM, 4, mine)  # one process is told; both save, at one step
    assert statuses == [STOPPED, STOPPED], run.said()
    saved = newest_checkpoint(pathlib.Path(mine.model_dir))
    assert saved == rows_of(mine)[-1]["step"] < STEPS  # nothing done was lost
    run = Run(tmp_path / "log", words(mine))
    assert run.wait() == [0, 0], run.said()
    assert run.outputs[0].read_text().strip() == f"{mine.model_dir}/expert"
    assert run.outputs[1].read_text() == ""
    assert_same_run(mine, whole, expert)
    assert_same_scores(base, mine, tmp_path)


def assert_same_scores(base, mine, folder):
    """`elm evaluate` on two processes, against one process of one device."""
    tasks = (tiny.REVIEW, "mini_emotion__name_the_emotion")
    data = dataclasses.replace(tiny.make_data(base, folder))
    store = ResultsStore(folder / "one")
    setup = ScoringSetup(base, data, EvaluationSettings(), sharding.make_mesh(1, 1), max_rows=24)
    evaluate_models([model_in(base, mine.model_dir)], lambda _: tasks, setup,
                    store)
    run = Run(folder / "log", [
        "evaluate", "--base", base.path, "--expert", mine.model_dir, "--task", tasks[0], "--task", tasks[1],
        "--output", folder / "two" / "results.jsonl", "--max_rows", 24, "--mesh_model", 2,
        "--prepared", folder / "prepared", "--module", "elm_jax.tasks.embedded"])
    assert run.wait() == [0, 0], run.said()
    found = ResultsStore(folder / "two")
    facts = [[{**row, "seconds": None} for row in rows] for rows in (store.rows(), found.rows())]
    assert facts[0] == facts[1]
    for task in tasks:
        pairs = zip(store.predictions(mine.task, task), found.predictions(mine.task, task), strict=True)
        for one, two in pairs:
            assert one["prediction"] == two["prediction"]
            np.testing.assert_allclose(one["scores"], two["scores"], rtol=ROUNDING, atol=2e-5)
    assert len((folder / "two" / "results.jsonl").read_text().splitlines()) == len(tasks)  # one writer


def test_an_error_in_one_process_ends_all_and_is_said_once(base, tmp_path):
    mine = config(base, tmp_path / "wrong", "prompt")
    run = Run(tmp_path / "log", [words(mine), [*words(mine), "--gin.BATCH_SIZE=-1"]])
    assert run.wait() == [2, 2]
    assert run.said().count("batch_size") == run.said(0).count("batch_size") == 1
    assert "process 1 of 2" in run.said(0) and "Traceback" not in run.said()
    unknown = dataclasses.replace(mine, task="mini_topic__about_wat")  # found by the first alone
    run = Run(tmp_path / "log", words(unknown))
    assert run.wait() == [2, 2]
    assert run.said().count("Unknown task or mixture") == 1 and tiny.TOPIC in run.said()
    assert not (tmp_path / "wrong").exists()
