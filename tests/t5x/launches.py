"""A base, a few rows of real data sets, and launches of `python -m t5x.train` on them, each made once.

T5X must be there when this is imported.
"""

import dataclasses
import gzip
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import seqio
import tensorflow as tf
from t5x import checkpoints, partitioning, train_state, utils

from elm_jax.experts.base import Base, load_base, save_base
from elm_jax.experts.overlay import trained_leaves
from elm_jax.models.adapters.config import AdapterConfig
from elm_jax.models.t5.config import T5Config
from elm_jax.models.t5.network import T5Network, role_of
from elm_jax.models.t5x_module import T5XTransformer
from elm_jax.runtime import sharding, trees
from elm_jax.training.loop import fit
from elm_jax.training.optimizers import OptimizerConfig
from elm_jax.training.run_settings import RunConfig
from elm_jax.vocabularies.vocabulary import train_vocabulary

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = pathlib.Path(__file__).resolve().parent
NETWORK = T5Config(vocab_size=640, emb_dim=136, num_heads=2, head_dim=70, mlp_dim=264, num_encoder_layers=1,
                   num_decoder_layers=3)
"""No two dimensions are equal; two partitions divide those that T5X splits; the largest leaves are
wide enough for Adafactor to factor their second moments."""
BOTTLENECK = 6
LENGTHS = {"inputs": 64, "targets": 16}
BATCH_SIZE = 8
STEPS = 30
LEARNING_RATE, ADAPTER_RATE = 3e-4, 3e-3
"""Of all weights, and of adapters and norms alone. Rounding grows from step to step, the faster the larger
the rate: of all weights at 1e-3 to 4e-5 of the loss."""
DATASETS = ("ag_news", "trec", "common_gen")
ROWS = {"train": 300, "validation": 24}
RANKED, WRITTEN, DATASET, MULTITASK = "ag_news__classify", "common_gen__example_prompt", "trec", "t0_train"


def real_data() -> pathlib.Path | None:
    """The folder of the real data sets, None where there is none."""
    folder = pathlib.Path(os.environ.get("ELM_DATA_DIR") or ROOT.parent / "shared" / "data")
    return folder if all((folder / name).is_dir() for name in DATASETS) else None


def copy_rows(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """A data folder with the first rows of the data sets."""
    index = json.loads((source / "index.json").read_text())
    for name in DATASETS:
        (target / name).mkdir(parents=True)
        shutil.copy(source / name / "templates.yaml", target / name)
        for split, count in ROWS.items():
            with gzip.open(source / name / f"{split}.jsonl.gz", "rt") as rows:
                kept = [line for _, line in zip(range(count), rows, strict=False)]
            with gzip.open(target / name / f"{split}.jsonl.gz", "wt") as rows:
                rows.writelines(kept)
    (target / "index.json").write_text(json.dumps([entry for entry in index if entry["name"] in DATASETS]))
    return target


def make_base(folder: pathlib.Path, data: pathlib.Path) -> Base:
    """Random weights, and a vocabulary of the data's words."""
    texts = []
    for name in DATASETS:
        with gzip.open(data / name / "train.jsonl.gz", "rt") as rows:
            texts.extend(rows)
    vocabulary = folder / "words.model"
    train_vocabulary(texts, vocabulary, 500, seed=0)
    save_base(folder / "base", T5Network(NETWORK).init(jax.random.key(3)), NETWORK, vocabulary, {})
    return load_base(folder / "base")


def write_checkpoint(folder: pathlib.Path, base: Base, step: int, *, legacy: bool = False) -> str:
    """The base as T5X itself writes it; `legacy` is the layout of its older checkpoints."""
    folder.mkdir(parents=True)
    ones = jnp.ones((1, 1), jnp.int32)
    axes = jax.eval_shape(lambda: T5XTransformer(base.config).init(
        jax.random.key(0), ones, ones, ones, enable_dropout=False))["params_axes"]
    state = train_state.InferenceState(
        step=jnp.array(step), params=flax.core.freeze(base.params), params_axes=flax.core.freeze(axes))
    partitioner = partitioning.PjitPartitioner(
        num_partitions=1, logical_axis_rules=partitioning.standard_logical_axis_rules())
    if legacy:
        checkpoints.Checkpointer(state, partitioner, str(folder)).save(state)
    else:
        manager = checkpoints.OrbaxCheckpointManagerInterface(str(folder), state, partitioner)
        manager.save(state)
        manager.wait_until_finished()
        manager.close()
    return str(folder / f"checkpoint_{step}")


@dataclasses.dataclass
class Run:
    """A finished launch."""

    folder: pathlib.Path
    status: int
    output: str
    seconds: float

    def losses(self) -> np.ndarray:
        """Loss of every step, as T5X wrote it for TensorBoard."""
        found = {}
        for file in (self.folder / "train").glob("events*"):
            for event in tf.compat.v1.train.summary_iterator(str(file)):
                for value in event.summary.value:
                    if value.tag == "loss":
                        found[event.step] = float(tf.make_ndarray(value.tensor))
        return np.asarray([found[step] for step in sorted(found)])

    def metrics(self, task: str) -> dict:
        """The last row of what T5X's evaluation says of a task."""
        lines = (self.folder / "inference_eval" / f"{task}-metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])

    def inferences(self, task: str, step: int) -> list[dict]:
        """Every example of an evaluation."""
        file = self.folder / "inference_eval" / f"{task}-{step:06d}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]


class World:
    """What the tests share: data, base, its checkpoint in T5X's layout, and launches by name."""

    def __init__(self, folder: pathlib.Path, source: pathlib.Path) -> None:
        self.folder = folder
        self.data = copy_rows(source, folder / "data")
        self.base = make_base(folder, self.data)
        self.checkpoint = write_checkpoint(folder / "t5x_base", self.base, 7)
        self._runs: dict[str, Run] = {}

    def launch(self, name: str, gin_file: str, *, devices: int = 1, network: str = "",
               **bindings: object) -> Run:
        """Runs `python -m t5x.train` once a name, in ``<folder>/<name>``.

        Args:
            name: of the run.
            gin_file: of the launch.
            devices: simulated devices.
            network: gin file with another network than ours.
            bindings: macros; a name with two underscores is a parameter.
        """
        if name not in self._runs:
            self._runs[name] = self._launch(self.folder / name, gin_file, devices, network, bindings)
        return self._runs[name]

    def _launch(self, folder: pathlib.Path, gin_file: str, devices: int, network: str, bindings: dict) -> Run:
        macros = {
            "MODEL_DIR": str(folder), "INITIAL_CHECKPOINT_PATH": self.checkpoint,
            "VOCABULARY_PATH": self.base.vocabulary_path, "TASK_FEATURE_LENGTHS": LENGTHS,
            "BATCH_SIZE": BATCH_SIZE, "TRAIN_STEPS": STEPS,
            "LEARNING_RATE": ADAPTER_RATE if "prompt" in gin_file else LEARNING_RATE,
            "DROPOUT_RATE": 0.0, "STATS_PERIOD": 1, "EVAL_STEPS": 1, "TRAIN_EVAL": None,
            "INFER_EVAL": None, **bindings}
        command = [
            sys.executable, "-m", "t5x.train", f"--gin_search_paths=gin,{HERE}", f"--gin_file={gin_file}",
            f"--gin_file={HERE / 'tiny.gin'}", *([f"--gin_file={network}"] if network else []),
            *(f"--gin.{name.replace('__', '.')}={_gin_value(value)}" for name, value in macros.items()),
            "--alsologtostderr"]
        environment = {
            **os.environ, "ELM_DATA_DIR": str(self.data), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        start = time.monotonic()
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
        seconds = time.monotonic() - start
        print(f"{folder.name}: status {done.returncode}, {seconds:.0f} s")
        return Run(folder, done.returncode, done.stdout + done.stderr, seconds)


def _gin_value(value: object) -> str:
    return value if isinstance(value, str) and value.startswith("@") else repr(value)


def seqio_batches(task: str, count: int) -> list[dict[str, np.ndarray]]:
    """The batches of a launch, in SeqIO's own order."""
    data = utils.get_dataset(
        utils.DatasetConfig(mixture_or_task_name=task, task_feature_lengths=LENGTHS, split="train",
                            batch_size=BATCH_SIZE, shuffle=True, seed=0, pack=True,
                            module="elm_jax.tasks.for_seqio"),
        0, 1, seqio.EncDecFeatureConverter)
    return list(data.take(count).as_numpy_iterator())


def parameters(checkpoint: pathlib.Path) -> dict[str, np.ndarray]:
    """A launch's parameters by path, as Orbax itself reads them."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        state = checkpointer.restore(checkpoint / "state")
    return {path: np.asarray(leaf) for path, leaf in trees.flatten(state["target"]).items()}


class Batches:
    """Batches as a stream of `elm train`'s loop."""

    def __init__(self, batches: list[dict[str, np.ndarray]]) -> None:
        self._batches = batches
        self.batch_size = len(batches[0]["decoder_target_tokens"])

    def batch(self, step: int, rows: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """The batch of a step, or some of its rows."""
        return {name: array[slice(None) if rows is None else rows]
                for name, array in self._batches[step].items()}

    def facts(self) -> dict:
        """Nothing is resumed here."""
        return {}


def elm_train(run: Run, task: str, optimizer: str, adapters: bool) -> tuple[np.ndarray, dict]:
    """Losses and trained leaves of `elm train`'s loop, from the parameters with which a launch began.

    Those are in the checkpoint that T5X writes before its first step.
    """
    config = NETWORK.with_adapter(AdapterConfig(BOTTLENECK)) if adapters else NETWORK
    params = parameters(run.folder / "checkpoint_0")
    overlay, frozen = trees.split(trees.unflatten(params), trained_leaves(role_of,
                                                                          "adapter" if adapters else "full"))
    rate = ADAPTER_RATE if adapters else LEARNING_RATE
    settings = RunConfig(
        train_steps=STEPS, optimizer=OptimizerConfig(name=optimizer, learning_rate=rate), name=None)
    result = fit(T5Network(config), frozen, overlay, Batches(seqio_batches(task, STEPS)), settings,
                 sharding.make_mesh(1, 1))
    return np.asarray([row["loss"] for row in result.rows]), trees.flatten(jax.device_get(result.overlay))
