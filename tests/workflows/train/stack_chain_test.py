"""A stack over two processes of four devices: trained, killed, resumed by other numbers of processes, scored.

The measure is a stack of one process with eight devices. Sums over devices are taken in another order there,
in float32; `ROUNDING` as in the chain of one expert.
"""

import json
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
from elm_jax.workflows.train.train_stack import TrainStackConfig, train_stack

pytestmark = pytest.mark.slow
STEPS = {"long": 30, "short": 9, "middle": 17, "late": 8, "last": 5}
TASKS = (tiny.TOPIC, tiny.REVIEW)
SLOTS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "experts.jsonl"
    rows = [{"task": TASKS[number % 2], "expert_id": name, "train_steps": steps, "seed": number,
             "learning_rate": 0.002 * (number + 1)} for number, (name, steps) in enumerate(STEPS.items())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(base, folder, table, mesh, **more):
    """The command of a stack; it saves every step, so that no machine is too fast to be killed."""
    data, experts, model = mesh
    settings = {
        "MODEL_DIR": str(folder), "INITIAL_CHECKPOINT_PATH": base.path, "TABLE": str(table),
        "TASK_MODULES": tiny.MODULES, "EPOCHS": None, "BATCH_SIZE": 4, "TRAIN_STEPS": 3,
        "TASK_FEATURE_LENGTHS": tiny.LENGTHS, "MAX_EXAMPLES": None, "STACK_EXPERTS": SLOTS,
        "MESH_DATA": data, "MESH_EXPERTS": experts, "MESH_MODEL": model,
        "OptimizerConfig.name": "adamw", "train.adapter_bottleneck": 4, "train.log_period": 1,
        "train.checkpoint_period": 1, "train.tensorboard": False, **more}
    return ["train", "--gin_file", "experts/prompt_stack.gin",
            *(f"--gin.{name}={value!r}" for name, value in settings.items())]


@pytest.fixture(scope="module")
def reference(base, table, tmp_path_factory):
    """Folder of the experts that one process with eight devices trains."""
    folder = tmp_path_factory.mktemp("one") / "runs"
    shared = tiny.train_config(base, folder, task="", log_period=1, dropout_rate=0.1,
                               prepared_dir=str(folder.parent / "prepared"))
    config = TrainStackConfig(shared, str(table), stack_experts=SLOTS, mesh_experts=4)
    train_stack(config, base=base, mesh=sharding.make_mesh(2, 1, 4))
    return folder


def assert_same_experts(found, wanted):
    for name, steps in STEPS.items():
        rows, expected = ([json.loads(line) for line in (folder / name / "metrics.jsonl").read_text(
            ).splitlines()] for folder in (found, wanted))
        assert [row["step"] for row in rows] == list(range(1, steps + 1)), name  # each step once
        for metric in ("loss", "grad_norm", "tokens"):
            np.testing.assert_allclose([row[metric] for row in rows], [row[metric] for row in expected],
                                       rtol=ROUNDING, err_msg=f"{name} {metric}")
        leaves, right = (trees.flatten(load_expert(folder / name).overlay) for folder in (found, wanted))
        for path, leaf in right.items():
            # By norm: where a gradient is near zero, a rounding turns the step of a single number round.
            assert np.linalg.norm(leaves[path] - leaf) <= 2e-4 * np.linalg.norm(leaf), (name, path)
    assert not (found / "stack").exists()


@pytest.mark.parametrize("mesh", [(2, 4, 1), (8, 1, 1), (2, 2, 2)], ids=str)
def test_a_stack_survives_its_processes(base, table, reference, tmp_path, mesh):
    """Experts over the processes; rows over them; both, and parameters over the devices of each."""
    folder = tmp_path / "runs"
    if mesh[0] == 8:
        more = {"BATCH_SIZE": 8}
        wanted = tmp_path / "wanted"
        run = Run(tmp_path / "log", words(base, wanted, table, mesh, **more), count=1, devices=8)
        assert run.wait() == [0], run.said()
    else:
        more, wanted = {}, reference
    stack, command = folder / "stack", words(base, folder, table, mesh, **more)
    run = Run(tmp_path / "log", command)
    statuses, seconds = kill(run, 1, signal.SIGKILL, 4, _Dir(stack))
    assert_lost(run, 1, statuses, seconds)
    if mesh == (2, 4, 1):
        run = Run(tmp_path / "log", command)
        statuses, _ = kill(run, 0, signal.SIGTERM, newest_checkpoint(stack) + 4, _Dir(stack))
        assert statuses == [STOPPED, STOPPED], run.said()
        assert 8 <= newest_checkpoint(stack) < STEPS["long"]
        # One process of four devices, and slots for more experts, goes on from there.
        last = words(base, folder, table, (1, 4, 1), STACK_EXPERTS=8)
        run = Run(tmp_path / "log", last, count=1, devices=4)
    else:
        run = Run(tmp_path / "log", command)
    assert set(run.wait()) == {0}, run.said()
    assert [line.split("/")[-2] for line in run.outputs[0].read_text().split()] == list(STEPS)
    assert_same_experts(folder, wanted)


class _Dir:
    """What `kill` asks of a config."""

    def __init__(self, model_dir) -> None:
        self.model_dir = str(model_dir)


def test_two_processes_score_a_stack_as_one_does_one_after_another(base, reference, tmp_path):
    data = tiny.make_data(base, tmp_path)
    store, names = ResultsStore(tmp_path / "one"), ["long", "short", "middle", "late"]
    tasks = (tiny.REVIEW, "mini_emotion__name_the_emotion")
    setup = ScoringSetup(base, data, EvaluationSettings(), sharding.make_mesh(1, 1), max_rows=16)
    evaluate_models([model_in(base, reference / name) for name in names], lambda _: tasks, setup,
                    store)
    run = Run(tmp_path / "log", [
        "evaluate", "--base", base.path, *(word for name in names for word in ("--expert", reference / name)),
        *(word for task in tasks for word in ("--task", task)), "--output", tmp_path / "two/results.jsonl",
        "--max_rows", 16, "--mesh_experts", 4, "--mesh_data", 2, "--stack_experts", 4,
        "--prepared", tmp_path / "prepared", "--module", "elm_jax.tasks.embedded"])
    assert run.wait() == [0, 0], run.said()
    assert "scoring 1 stack: 1 of 1" in run.said()
    found = ResultsStore(tmp_path / "two")
    key = lambda row: (row["expert"], row["task"])  # noqa: E731
    facts = [sorted(({**row, "seconds": None} for row in rows), key=key)
             for rows in (store.rows(), found.rows())]
    assert facts[0] == facts[1] and len(facts[0]) == 8
    for name in names:
        for task in tasks:
            for one, two in zip(store.predictions(name, task), found.predictions(name, task), strict=True):
                assert one["prediction"] == two["prediction"]
