"""Reads experts that T5X trained from the checkpoints of its runs. Needs neither T5X nor TensorFlow."""

import ast
import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.data.prompts.templates import dataset_path
from elm_jax.data.registry import registry
from elm_jax.errors import InputError, describe
from elm_jax.experts import template_versions
from elm_jax.experts.base import Base
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.overlay import Expert, trained_leaves
from elm_jax.experts.weight_sources import Source, needed_base, of_card, reference
from elm_jax.formats import leaf_names, tree_checks
from elm_jax.formats.model import Model, Tensors
from elm_jax.formats.t5x import t5x_checkpoints
from elm_jax.formats.tensors import boxes, leaf_values, streaming
from elm_jax.models.adapters.bottleneck import BottleneckConfig
from elm_jax.models.t5 import t5x_names
from elm_jax.models.t5.config import T5Config
from elm_jax.models.t5.network import role_of
from elm_jax.runtime import storage, trees
from elm_jax.runtime.config_checks import DEFAULT_MODULES, check_choice, items_of
from elm_jax.workflows.choices import EXPERT_KINDS
from elm_jax.workflows.train import run_record

T5X_COMMIT = "cc342d4"
"""The T5X that gin/t5x/ and this module were tested with."""
CONFIG_FILE = "config.gin"
_MACRO = re.compile(r"^([A-Z_]+) = (.+)$", re.MULTILINE)
_MACRO_KINDS = {"MIXTURE_OR_TASK_NAME": str, "RANDOM_SEED": int, "BATCH_SIZE": int, "TRAIN_NORMS": bool}
"""Macros that are read, with their types."""


@dataclasses.dataclass(frozen=True)
class Ground:
    """The base of an expert: its tensors, config and reference.

    Attributes:
        tensors: of the base.
        config: its network.
        reference: what a card says of it (`base.Base.reference`).
    """

    tensors: Tensors
    config: T5Config
    reference: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Naming:
    """Names and kind for an expert, where its run does not record them.

    Attributes:
        expert_id: None takes the name of the run's task or mixture, else that of its folder.
        kind: a key of `EXPERT_KINDS`; None tells it by its adapters and the data sets of its tasks.
        modules: task registries, for the names of tasks and templates.
    """

    expert_id: str | None = None
    kind: str | None = None
    modules: Sequence[str] = DEFAULT_MODULES

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", items_of(self.modules))
        if self.kind is not None:
            check_choice("kind", self.kind, EXPERT_KINDS)


def expert_from_checkpoint(
    folder: storage.PathLike, base: Base, *, kind: str | None = None, expert_id: str | None = None,
    modules: Sequence[str] = DEFAULT_MODULES,
) -> Expert:
    """Reads the expert that a T5X run of `gin/t5x/` trained.

    Args:
        folder: the run's MODEL_DIR, whose newest whole checkpoint counts, or one checkpoint's folder; in
            either of T5X's layouts.
        base: the base that the run started from.
        kind: ``prompt``, ``dataset`` or ``multitask``; by default ``prompt`` if there are adapters, else
            by the data sets of its tasks.
        expert_id: name of the expert; by default that of the run's task or mixture, else the folder's.
        modules: task registries, for the names of tasks and templates.

    Returns:
        The expert, in memory, in float32; `experts.overlay.save_expert` writes it.

    Raises:
        InputError: no checkpoint that can be read, or one that is half written or cut short; leaves that are
            missing, left over or of another shape, all named; leaves that a prompt expert does not train
            and that are not the base's.
    """
    ground = Ground(streaming.ArrayTensors(base.params), base.config, base.reference())
    model = t5x_checkpoints.open_t5x(folder)
    card, trained = expert_of(model, ground, Naming(expert_id, kind, modules))
    return Expert(card, _in_memory(model, trained))


def as_expert(source: Source, base: storage.PathLike | None, naming: Naming) -> Source:
    """Turns an opened T5X checkpoint into an expert on a base; a full expert stays unread.

    Args:
        source: a model of T5X's.
        base: folder of the base, of any kind.
        naming: of the expert.

    Raises:
        InputError: as `expert_from_checkpoint`; or there is no base.
    """
    model = source.model
    under = needed_base(source.where, base, None)
    card, trained = expert_of(model, Ground(under.tensors, under.config, reference(under)), naming)
    if card.form == "adapter":  # of any other it takes nothing from the base's tensors
        under.check()
    config = T5Config.from_dict(card.network)
    # Data beside the leaves that T5X does not keep come from the base.
    model = dataclasses.replace(
        model, config=config, facts={**under.facts, **model.facts}, notes=(*model.notes, *under.notes),
        vocabulary=model.vocabulary if model.vocabulary is not None else under.vocabulary)
    if card.form == "full":
        return Source(source.where, of_card(model, card), card=card)
    on = dataclasses.replace(model, kind=under.kind, where=under.where, config=under.config,
                             tensors=under.tensors)
    return Source(source.where, on, Expert(card, _in_memory(model, trained), path=model.where),
                  {path: model.tensors.origins[path] for path in trained})


def expert_of(model: Model, base: Ground, naming: Naming) -> tuple[ExpertCard, list[str]]:
    """The card of a T5X checkpoint's expert, and the leaves that it trained.

    Raises:
        InputError: as `expert_from_checkpoint`.
    """
    config = _network(base.config, model.config)
    form = "full" if config.adapter is None else "adapter"
    if naming.kind is not None and (naming.kind == "prompt") != (form == "adapter"):
        raise InputError(describe(
            "The checkpoint is none of that kind of expert", where=model.where,
            got=f"{naming.kind}, and {'adapters' if form == 'adapter' else 'no adapters'}",
            expected="adapters in a prompt expert, and in no other"))
    tree_checks.check_leaves("The checkpoint does not fit the base's network", model.where,
                             {path: spec.shape for path, spec in model.tensors.specs.items()},
                             t5x_names.leaf_shapes(config), "give the base that the run started from")
    run = run_facts(model)
    trains = trained_leaves(role_of, form, bool(run.get("TRAIN_NORMS", True)))
    _check_frozen(model, base, trains)
    return _card(model, base, config, naming, run), [path for path in model.tensors.specs if trains(path)]


def _in_memory(model: Model, paths: Sequence[str]) -> dict[str, Any]:
    return trees.unflatten({path: leaf_values.read_float32(model.tensors.read(path), path, model.where)
                            for path in paths})


def _network(base: T5Config, found: T5Config) -> T5Config:
    """The base's network config, with adapters of the checkpoint's width if it has any."""
    if found.adapter is None:
        return base
    default = base.with_adapter(BottleneckConfig())
    return default if default.bottleneck == found.bottleneck else base.with_adapter(found.adapter)


def _check_frozen(model: Model, base: Ground, trains: Callable[[str], bool]) -> None:
    """Raises InputError if a parameter that should be frozen differs from the base's."""
    frozen = [path for path in model.tensors.specs if not trains(path)]
    changed = [path for path in frozen if not _equal(model.tensors, base.tensors, path)]
    if changed:
        raise InputError(describe(
            "The checkpoint belongs to another base, or trained more than a prompt expert does",
            where=model.where, got=f"{len(changed)} of {len(frozen)} frozen leaves differ: "
            f"{', '.join(changed)}", expected=f"those of base {base.reference['name']}, "
            f"{base.reference['fingerprint']}", cure="give the base that the run started from"))


def _equal(checkpoint: Tensors, base: Tensors, path: str) -> bool:
    """Whether a leaf equals the base's, in the checkpoint's dtype; compared in boxes."""
    spec = checkpoint.specs[path]
    step = boxes.chunk_shape(spec.shape, np.dtype(spec.dtype).itemsize, streaming.AHEAD_BYTES)
    for box in boxes.cut([range(size) for size in spec.shape], step):
        found = checkpoint.read(path, box)
        if not np.array_equal(np.asarray(base.read(path, box)).astype(found.dtype, copy=False), found):
            return False
    return True


def run_facts(model: Model) -> dict[str, Any]:
    """Macros with plain values in the ``config.gin`` of a T5X run folder."""
    path = storage.as_path(model.where).parent / CONFIG_FILE
    if not path.exists():
        return {}
    text = storage.read_text(path)
    facts: dict[str, Any] = {"digest": hashlib.sha256(text.encode()).hexdigest()[:16]}
    for name, value in _MACRO.findall(text.replace("\\\n", "")):  # gin puts a long value on a line of its own
        try:
            facts[name] = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue  # a reference, or the first line of a longer value
    for name, kind in _MACRO_KINDS.items():
        value = facts.get(name)
        if value is not None and not (isinstance(value, kind) and (kind is bool) == isinstance(value, bool)):
            raise InputError(describe("A macro of the run is of another kind", where=path,
                                      got=f"{name} = {value!r}"[:200],
                                      expected=f"{name} = a {kind.__name__}"))
    return facts


def _card(model: Model, base: Ground, config: T5Config, naming: Naming, run: Mapping[str, Any]) -> ExpertCard:
    registry.import_tasks(naming.modules)
    source = run.get("MIXTURE_OR_TASK_NAME")
    trained_on = () if source is None else _tasks_of(source)
    tasks = [registry.get_task(task) for task in trained_on if task in registry.task_names()]
    datasets = sorted({dataset_path(task.dataset, task.config) for task in tasks})
    form = "full" if config.adapter is None else "adapter"
    kind = naming.kind or _kind(model, form, datasets)
    return ExpertCard(
        id=naming.expert_id or leaf_names.as_id(source or model.name), kind=kind, form=form,
        base=dict(base.reference), network=config.to_dict(), tasks=tuple(trained_on),
        templates=tuple(task.template for task in tasks), **template_versions.of_tasks(tasks),
        dataset=datasets[0] if len(datasets) == 1 else None,
        training={"steps": model.facts[t5x_checkpoints.FACTS]["step"], "seed": run.get("RANDOM_SEED"),
                  "batch_size": run.get("BATCH_SIZE"), "config_digest": run.get("digest"),
                  "trained_by": "T5X", "converted_with": run_record.versions()})


def _kind(model: Model, form: str, datasets: Sequence[str]) -> str:
    """The kind of an expert: prompt if it has adapters, else by its tasks."""
    if form == "adapter":
        return "prompt"
    if not datasets:
        raise InputError(describe(
            "The run does not say which kind of expert it trained", where=model.where,
            expected=f"a {CONFIG_FILE} above it that names a task or mixture of a registry",
            cure="give --kind, or the registry with --module; or leave --base out to read it as a base"))
    return "dataset" if len(datasets) == 1 else "multitask"


def _tasks_of(name: str) -> Sequence[str]:
    """A task's name, or the names of all tasks of a mixture, whether or not their data exist here."""
    return registry.get_mixture(name).tasks if name in registry.mixture_names() else (name,)
