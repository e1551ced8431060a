"""An expert from a checkpoint of a T5X run. Needs neither T5X nor TensorFlow."""

import ast
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from elm_jax import storage, trees
from elm_jax.data import registry
from elm_jax.errors import InputError, describe
from elm_jax.experts.base import Base
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.overlay import Expert, trained_leaves
from elm_jax.models.t5 import T5Network
from elm_jax.models.t5_config import AdapterConfig, T5Config
from elm_jax.workflows import run_record
from elm_jax.workflows.checks import check_choice

T5X_COMMIT = "cc342d4"
"""The T5X that gin/t5x/ and this module were tested with."""
KINDS = ("prompt", "dataset", "multitask")
Shapes = Mapping[str, tuple[int, ...]]
_CHECKPOINT = re.compile(r"checkpoint_(\d+)")
_MACRO = re.compile(r"^([A-Z_]+) = (.+)$", re.MULTILINE)
_BOTTLENECK = re.compile(r"_adapter/down/bias$")


def expert_from_checkpoint(
    folder: storage.PathLike, base: Base, *, kind: str | None = None, expert_id: str | None = None,
    modules: Sequence[str] = ("elm_jax.tasks",),
) -> Expert:
    """The expert that a T5X run of `gin/t5x/` trained.

    Args:
        folder: the run's MODEL_DIR, whose newest checkpoint counts, or one checkpoint's folder.
        base: the base that the run started from.
        kind: ``prompt``, ``dataset`` or ``multitask``; by default ``prompt`` if there are adapters, else
            by the data sets of its tasks.
        expert_id: name of the expert; the name of the run's task or mixture by default.
        modules: task registries, for the names of tasks and templates.

    Returns:
        The expert, in memory; `experts.overlay.save_expert` writes it.

    Raises:
        InputError: no checkpoint that can be read; leaves that are missing, left over or of another
            shape, all named; leaves that a prompt expert does not train and that are not the base's.
    """
    if kind is not None:
        check_choice("kind", kind, KINDS)
    checkpoint = Checkpoint(folder)
    config = _network(base.config, checkpoint)
    form = "adapter" if config.adapter is not None else "full"
    if kind is not None and (kind == "prompt") != (form == "adapter"):
        raise InputError(describe(
            "The checkpoint is none of that kind of expert", where=checkpoint.folder,
            got=f"{kind}, and {'adapters' if form == 'adapter' else 'no adapters'}",
            expected="adapters in a prompt expert, and in no other"))
    leaves = trees.flatten(T5Network(config).abstract_params())
    difference = describe_difference(
        checkpoint.shapes, {path: tuple(leaf.shape) for path, leaf in leaves.items()})
    if difference:
        raise InputError(describe("The checkpoint does not fit the base's network", where=checkpoint.folder,
                                  got=difference, cure="give the base that the run started from"))
    run = _run_facts(checkpoint.folder.parent)
    trains = trained_leaves(form, bool(run.get("TRAIN_NORMS", True)))
    _check_frozen(checkpoint, base, trains)
    trained = filter(trains, checkpoint.shapes)
    overlay = {path: value.astype(np.float32) for path, value in checkpoint.read(trained)}
    name = expert_id or run.get("MIXTURE_OR_TASK_NAME")
    if not name:
        raise InputError(describe(
            "The run does not say what it trained on", where=checkpoint.folder.parent,
            expected="a config.gin beside the checkpoint", cure="give the expert an id"))
    card = _card(name, kind, form, base, config, run, checkpoint.step, modules)
    return Expert(card, trees.unflatten(overlay))


class Checkpoint:
    """Parameters of a checkpoint in the layout that T5X writes, read when they are asked for.

    Attributes:
        folder: ``checkpoint_<step>``.
        step: finished updates.
        shapes: shape of each parameter, by path.
    """

    def __init__(self, folder: storage.PathLike) -> None:
        path = storage.as_path(folder)
        self.folder = _newest(path.resolve() if storage.is_local(path) else path)
        self.step = int(_CHECKPOINT.fullmatch(self.folder.name)[1])
        self._state = self.folder / "state"
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                tree = checkpointer.metadata(self._state).item_metadata.tree
            self._leaves = trees.flatten(tree["target"])
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(describe(
                "The T5X checkpoint cannot be read", where=self.folder, got=str(error)[:300],
                expected=f"the Orbax layout that T5X at {T5X_COMMIT} writes")) from error
        self.shapes = {path: tuple(leaf.shape) for path, leaf in self._leaves.items()}

    def read(self, paths: Iterator[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Path and value of one parameter after the other."""
        with ocp.PyTreeCheckpointer() as checkpointer:
            for path in paths:
                leaf = self._leaves[path]
                item = {"target": trees.unflatten({path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)})}
                restored = checkpointer.restore(self._state, args=ocp.args.PyTreeRestore(
                    item=item, partial_restore=True,
                    restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)))
                yield path, trees.flatten(restored["target"])[path]


def describe_difference(found: Shapes, wanted: Shapes) -> str | None:
    """Every leaf that is missing, left over or of another shape, in one sentence; None if there is none."""
    lists = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "other shape": [f"{path} {found[path]} for {shape}" for path, shape in sorted(wanted.items())
                        if found.get(path, shape) != shape],
    }
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in lists.items() if names) or None


def _newest(folder: epath.Path) -> epath.Path:
    """The checkpoint itself, or the newest one of a run folder; unfinished ones have other names."""
    if _CHECKPOINT.fullmatch(folder.name) and folder.exists():
        return folder
    found = [path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name)] if folder.exists() else []
    if not found:
        raise InputError(describe("There is no T5X checkpoint here", where=folder,
                                  expected="a folder checkpoint_<step>, or one that holds such folders"))
    return max(found, key=lambda path: int(_CHECKPOINT.fullmatch(path.name)[1]))


def _network(base: T5Config, checkpoint: Checkpoint) -> T5Config:
    """The base's network, with adapters of the checkpoint's width if it has any."""
    widths = [checkpoint.shapes[path][0] for path in checkpoint.shapes if _BOTTLENECK.search(path)]
    if not widths:
        return base
    default = base.with_adapter(AdapterConfig())
    return default if default.bottleneck == widths[0] else base.with_adapter(AdapterConfig(widths[0]))


def _check_frozen(checkpoint: Checkpoint, base: Base, trains: Any) -> None:
    """Raises InputError if a parameter that was not to train is not the base's."""
    own = trees.flatten(base.params)
    frozen = [path for path in checkpoint.shapes if not trains(path)]
    changed = [path for path, value in checkpoint.read(iter(frozen))
               if not np.array_equal(np.asarray(own[path]).astype(value.dtype), value)]
    if changed:
        raise InputError(describe(
            "The checkpoint belongs to another base, or trained more than a prompt expert does",
            where=checkpoint.folder, got=f"{len(changed)} of {len(frozen)} frozen leaves differ: "
            f"{', '.join(changed)}", expected=f"those of base {base.name}, {base.fingerprint}"))


def _run_facts(folder: epath.Path) -> dict[str, Any]:
    """The macros with plain values of the ``config.gin`` that T5X leaves in a run folder."""
    path = folder / "config.gin"
    if not path.exists():
        return {}
    text = path.read_text()
    facts: dict[str, Any] = {"digest": hashlib.sha256(text.encode()).hexdigest()[:16]}
    for name, value in _MACRO.findall(text):
        try:
            facts[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a reference, or the first line of a longer value
            continue
    return facts


def _card(
    name: str, kind: str | None, form: str, base: Base, config: T5Config, run: Mapping[str, Any], step: int,
    modules: Sequence[str],
) -> ExpertCard:
    registry.import_tasks(modules)
    source = run.get("MIXTURE_OR_TASK_NAME", name)
    names = _tasks_of(source)
    tasks = [registry.get_task(task) for task in names if task in registry.task_names()]
    datasets = sorted({"/".join(part for part in (task.dataset, task.config) if part) for task in tasks})
    if kind is None:
        kind = "prompt" if form == "adapter" else "dataset" if len(datasets) < 2 else "multitask"
    return ExpertCard(
        id=name, kind=kind, form=form, base={"name": base.name, "fingerprint": base.fingerprint},
        network=config.to_dict(), tasks=tuple(names), templates=tuple(task.template for task in tasks),
        dataset=datasets[0] if len(datasets) == 1 else None,
        training={"steps": step, "seed": run.get("RANDOM_SEED"), "batch_size": run.get("BATCH_SIZE"),
                  "config_digest": run.get("digest"), "trained_by": "T5X",
                  "converted_with": run_record.versions()})


def _tasks_of(name: str) -> Sequence[str]:
    """A mixture's tasks that have data here; all of them where there are no data at all."""
    if name not in registry.mixture_names():
        return (name,)
    tasks = registry.get_mixture(name).tasks
    return [task for task in tasks if registry.get_task(task).why_unavailable() is None] or tasks
