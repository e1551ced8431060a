"""The workflow behind `elm tasks embed`: gives tasks vectors that the gates of a sparse base read.

A base whose gates read tasks gets a row of its table for each new task, a weighted mean of the rows that it
has. One whose gates read tokens alone gets gates that read both: the first table, and weights that are 0, so
that it computes what it did. Source: 2204.07689, whose tables are of the tasks that it was trained on.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.data.prompts.templates import dataset_path
from elm_jax.data.registry import registry
from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.experts.library import ExpertLibrary
from elm_jax.experts.weight_sources import expert_folder, fingerprint_of, open_source
from elm_jax.formats import detect, places, tree_checks
from elm_jax.formats.elm import base_json, elm_folders
from elm_jax.formats.model import Index, Model, Origin, Tensors, TensorSpec
from elm_jax.formats.tensors import leaf_values
from elm_jax.models import families
from elm_jax.models.layers.gate_tasks import number_of, reads_tasks
from elm_jax.models.layers.sparse_config import BOTH
from elm_jax.models.network import TASK_TABLE, NetworkConfig
from elm_jax.routing.encoders import make_encoder
from elm_jax.routing.text import format_text
from elm_jax.runtime import staging, storage, trees
from elm_jax.runtime.config_checks import (
    DEFAULT_MODULES,
    check_choice,
    check_positive,
    check_range,
    check_types,
    items_of,
)
from elm_jax.workflows.choices import PERS
from elm_jax.workflows.route import RouteConfig, open_library
from elm_jax.workflows.target_task import route_task, template_text

RANDOM, MEAN, TEXT, VOTES = WAYS = ("random", "mean", "text", "votes")
"""What a task's vector is made of; beside them ``TASK=WEIGHT,...``, weights of known tasks."""
TASK, DATASET = PERS
TEMPERATURE = 0.1
"""Of the softmax over similarities of texts, which are cosines."""
TASK_DIM = 64
"""Width of the vectors of a first table."""
TEXT_FORMAT = "label_instance"


@dataclasses.dataclass(frozen=True)
class TaskVectorConfig:
    """Which tasks get a vector on which base, and what it is made of.

    Attributes:
        base: folder of a sparse base, or of a full expert whose base its card names.
        output: folder of the new base; does not exist, or is empty.
        tasks: names of tasks or mixtures.
        made_of: one of `WAYS`, or weights of known tasks, ``TASK=WEIGHT,...``; None for the ``mean`` of all
            known ones, and for ``random`` in a first table. ``text`` there is a random projection of the
            texts' embeddings, so that tasks of like texts start alike; once tasks were trained, it weighs
            their vectors by the likeness of the texts.
        library: for ``votes``: its experts' tasks weigh as many votes as the experts got.
        encoder: of texts, one of `encoders.ENCODERS`; None for ``auto``.
        temperature: of the softmax over similarities of texts; None for `TEMPERATURE`.
        task_dim: width of a first table's vectors; None for `TASK_DIM`.
        seed: of a first table; None for 0.
        per: ``task``, or ``dataset`` for one vector for all tasks of a data set.
        modules: registries to import by name.
    """

    base: storage.PathLike
    output: storage.PathLike
    tasks: tuple[str, ...]
    made_of: str | None = None
    library: storage.PathLike | None = None
    encoder: str | None = None
    temperature: float | None = None
    task_dim: int | None = None
    seed: int | None = None
    per: str = TASK
    modules: tuple[str, ...] = DEFAULT_MODULES

    def __post_init__(self) -> None:
        """Raises InputError for settings that are wrong or have no effect."""
        check_types(self)
        check_choice("per", self.per, PERS)
        check_positive(temperature=self.temperature, task_dim=self.task_dim)
        check_range("seed", self.seed, 0)
        if not self.tasks:
            raise InputError(describe("No task is named", expected="names of tasks or mixtures"))
        if self.made_of is not None and "=" not in self.made_of and self.made_of not in WAYS:
            raise unknown_name("way to make a vector", self.made_of, WAYS, where="--from",
                               cure="or give weights of known tasks: --from TASK=WEIGHT,TASK=WEIGHT")
        for name, way in (("library", VOTES), ("encoder", TEXT), ("temperature", TEXT)):
            if getattr(self, name) is not None and self.made_of != way:
                raise _without_effect(name, getattr(self, name), f"--from {way}")
        if self.made_of == VOTES and self.library is None:
            raise InputError(describe("Votes are a library's", where="--from votes", expected="a library",
                                      cure="give --library DIR"))


def embed_tasks(config: TaskVectorConfig) -> dict[str, Any]:
    """Writes a base with vectors of more tasks, a leaf at a time; it gets its name when it is whole.

    Returns:
        What was written, JSON-ready: ``output``, ``fingerprint``, ``gate``, ``num_tasks`` and, by the name of
        each new task, the weights of known ones.

    Raises:
        InputError: the output is taken; a dense base; a task that is not registered, has a vector already or
            has no text; weights of unknown tasks, or none above 0; a setting without effect.
        RunError: the disk is full.
    """
    staging.check_free(config.output)
    model = _open(config.base)
    if getattr(model.config, "sparse", None) is None:
        raise InputError(describe("This base is dense: it has no gates that could read tasks",
                                  where=config.base, cure="make it sparse first: elm upcycle"))
    names = row_names(config.tasks, config.per, config.modules)
    known = model.config.sparse.tasks if reads_tasks(model.config) else ()
    if twice := [name for name in names if name in known]:
        raise InputError(describe("These tasks have a vector already", where=config.base,
                                  got=", ".join(twice[:3]), cure="leave them out"))
    if reads_tasks(model.config):
        network, leaves, weights = _more_rows(config, model, names)
    else:
        network, leaves = _first_table(config, model, names)
        weights = {name: {} for name in names}
    made = {"tasks": weights, "made_of": config.made_of or (MEAN if any(weights.values()) else RANDOM),
            "base": {"name": model.name, "fingerprint": fingerprint_of(model), "path": model.address}}
    written = dataclasses.replace(
        model, config=network, tensors=_Changed(model.tensors, leaves),
        facts={**model.facts, elm_folders.FACTS: {"training": {"task_vectors": made}}})
    elm_folders.write_elm(config.output, written)
    facts = base_json.read(storage.as_path(config.output))
    return {"output": str(config.output), "fingerprint": facts["fingerprint"], "gate": network.sparse.gate,
            "num_tasks": len(network.sparse.tasks), **made}


def _open(folder: storage.PathLike) -> Model:
    """Opens a base, or a full expert as a model."""
    if expert_folder(places.locate(folder)) is None:
        model = detect.open_model(folder)
        tree_checks.check_base(model.config, model.where)
        return model
    source = open_source("elm", folder)
    if source.expert is not None:
        raise InputError(describe("An expert of adapters has no table of tasks: its base has", where=folder,
                                  expected="a base, or a full expert", cure="give its base"))
    return source.model


def row_names(names: Sequence[str], per: str = TASK, modules: Sequence[str] = DEFAULT_MODULES
              ) -> tuple[str, ...]:
    """Names of a table's rows: of tasks, or of their data sets, in the order in which they are given.

    Args:
        names: of tasks or mixtures, of which those tasks count that have data.
        per: one of `choices.PERS`.
        modules: registries to import by name.

    Raises:
        InputError: neither a task nor a mixture (the nearest are named).
    """
    registry.import_tasks(modules)
    tasks = []
    for name in items_of(names):
        mixtures = registry.mixture_names()
        if name not in mixtures and registry.find_task(name) is None:
            raise unknown_name("task or mixture", name, [*registry.task_names(), *mixtures],
                               where=", ".join(modules), cure=registry.OWN_MODULE)
        tasks += registry.mixture_tasks(name) if name in mixtures else [name]
    return tuple(dict.fromkeys(map(_dataset_of, tasks) if per == DATASET else tasks))


def _dataset_of(task: str) -> str:
    known = registry.get_task(task)
    return dataset_path(known.dataset, known.config)


def _first_table(config: TaskVectorConfig, model: Model, names: Sequence[str]
                 ) -> tuple[NetworkConfig, dict[str, np.ndarray]]:
    """The config of gates that read tokens and tasks, and the new leaves: a table, and weights that are 0."""
    if config.made_of not in (None, RANDOM, TEXT):
        raise InputError(describe("A first table has no known tasks to weigh", where="--from",
                                  got=config.made_of, expected=f"{RANDOM} or {TEXT}"))
    if config.temperature is not None:
        raise _without_effect("temperature", config.temperature, "a base whose gates read tasks already")
    draw, width = np.random.default_rng(config.seed or 0), config.task_dim or TASK_DIM
    if config.made_of == TEXT:
        embedded = _embedded(config, names)
        table = embedded @ draw.standard_normal((embedded.shape[1], width))
    else:
        table = draw.standard_normal((len(names), width))
    network = _with_tasks(model.config, names, gate=BOTH, task_dim=width)
    shapes = trees.flatten(families.network_of(network).abstract_params())
    leaves = {path: np.zeros(leaf.shape, np.float32) for path, leaf in shapes.items()
              if path not in model.tensors.specs}
    return network, {**leaves, TASK_TABLE: table.astype(np.float32)}


def _more_rows(config: TaskVectorConfig, model: Model, names: Sequence[str]
               ) -> tuple[NetworkConfig, dict[str, np.ndarray], dict[str, dict[str, float]]]:
    """The config with more tasks, the table with their rows, and the weights that these were made with."""
    for name in ("task_dim", "seed"):
        if getattr(config, name) is not None:
            raise _without_effect(name, getattr(config, name), "a base whose gates read tokens alone")
    known = model.config.sparse.tasks
    table = np.asarray(leaf_values.read_float32(model.tensors.read(TASK_TABLE), TASK_TABLE, model.where))
    weights = _weights(config, names, known)
    rows = (weights @ table.astype(np.float64)).astype(np.float32)
    found = {name: {task: float(value) for task, value in zip(known, own, strict=True) if value}
             for name, own in zip(names, weights, strict=True)}
    return _with_tasks(model.config, (*known, *names)), {TASK_TABLE: np.concatenate([table, rows])}, found


def _with_tasks(config: NetworkConfig, tasks: Sequence[str], **more: Any) -> NetworkConfig:
    return dataclasses.replace(config, sparse=dataclasses.replace(config.sparse, tasks=tuple(tasks), **more))


def _weights(config: TaskVectorConfig, names: Sequence[str], known: Sequence[str]) -> np.ndarray:
    """Weights f64[N, M] of the known tasks for each new one; each row sums to 1."""
    if config.made_of in (None, MEAN):
        return np.full((len(names), len(known)), 1.0 / len(known))
    if config.made_of == RANDOM:
        raise InputError(describe("The gates were trained on other vectors than random ones", where="--from",
                                  got=RANDOM, expected=f"{MEAN}, {TEXT}, {VOTES}, or weights of known tasks"))
    if config.made_of == TEXT:
        return _by_text(config, names, known)
    if config.made_of == VOTES:
        library = open_library(config.library)
        return np.stack([_by_votes(config, library, name, known) for name in names])
    return np.tile(_given(config.made_of, known), (len(names), 1))


def _given(text: str, known: Sequence[str]) -> np.ndarray:
    """Weights of known tasks that a user wrote: ``TASK=WEIGHT,TASK=WEIGHT``."""
    weights = np.zeros(len(known))
    for part in text.split(","):
        name, _, number = part.strip().rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not 0.0 < value < float("inf"):
            raise InputError(describe("A weight is no number above 0", where="--from", got=part.strip(),
                                      expected="TASK=WEIGHT"))
        weights[number_of(known, name, where="--from")] += value
    return weights / weights.sum()


def _by_text(config: TaskVectorConfig, names: Sequence[str], known: Sequence[str]) -> np.ndarray:
    """Softmax of the cosines of the tasks' texts."""
    embedded = _embedded(config, [*names, *known])
    logits = embedded[:len(names)] @ embedded[len(names):].T / (config.temperature or TEMPERATURE)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _embedded(config: TaskVectorConfig, names: Sequence[str]) -> np.ndarray:
    """Unit vectors f64[N, K] of the texts of tasks; of a data set the mean over its tasks."""
    texts = [_texts_of(name) for name in names]
    flat = [text for own in texts for text in own]
    vectors = iter(make_encoder(config.encoder or "auto", texts=flat).embed(flat).astype(np.float64))
    means = np.stack([np.mean([next(vectors) for _ in own], axis=0) for own in texts])
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-9)


def _texts_of(name: str) -> list[str]:
    """The texts that say what a task is: its template, or the templates of all tasks of a data set."""
    tasks = [name] if registry.find_task(name) is not None else [
        task for task in registry.task_names() if _dataset_of(task) == name]
    found = [text for text in map(template_text, tasks) if text is not None]
    if not found:
        raise InputError(describe(
            "No text says what this task is", where=name,
            got="rows that are prompts already" if tasks else "no registered task, and no data set of one",
            cure="give weights of known tasks, --from TASK=WEIGHT,..., or import its registry with --module"))
    return [format_text(text, TEXT_FORMAT) for text in found]


def _by_votes(config: TaskVectorConfig, library: ExpertLibrary, name: str, known: Sequence[str]
              ) -> np.ndarray:
    """Votes of a library for a task, handed on to the known tasks that its experts were trained on."""
    task = name if registry.find_task(name) is not None else next(
        task for task in registry.task_names() if _dataset_of(task) == name)
    decision = route_task(RouteConfig(config.library, task=task, router="vote", modules=config.modules,
                                      split=registry.get_task(task).evaluation_split))
    weights = np.zeros(len(known))
    for line in decision.ranking:
        rows = _rows_of(library.entries[line.expert].card.tasks, known)
        if line.votes and len(rows):
            weights[rows] += line.votes / len(rows)
    if not weights.any():
        raise InputError(describe(
            "The library votes for no expert of a known task", where=f"{config.library}, task {task}",
            got=", ".join(line.expert for line in decision.ranking[:3] if line.votes) or "no votes",
            expected=f"experts of {', '.join(known[:3])}", cure=f"give another library, or --from {MEAN}"))
    return weights / weights.sum()


def _rows_of(tasks: Sequence[str], known: Sequence[str]) -> list[int]:
    """Rows of the tasks of an expert, by their own names or their data sets'."""
    names = [{task, *([_dataset_of(task)] if registry.find_task(task) is not None else [])} for task in tasks]
    return sorted({known.index(name) for own in names for name in own if name in known})


def _without_effect(name: str, value: object, needs: str) -> InputError:
    return InputError(describe("A setting has no effect", where=f"--{name}", got=value, expected=needs,
                               cure="leave it out"))


class _Changed:
    """`Tensors` of a model with some leaves in place of its own, or beside them."""

    def __init__(self, tensors: Tensors, leaves: Mapping[str, np.ndarray]) -> None:
        self._tensors, self._leaves = tensors, leaves
        own = {path: TensorSpec(tuple(leaf.shape), leaf.dtype.name) for path, leaf in leaves.items()}
        self.specs = dict(sorted({**tensors.specs, **own}.items()))
        self.origins = {path: Origin(path) for path in self.specs}

    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        """Reads a leaf, or a part of it."""
        if path in self._leaves and path in self._tensors.specs:
            self._tensors.read(path)  # in its turn, so that the model's check needs no second pass
        if path in self._leaves:
            return self._leaves[path] if index is None else self._leaves[path][index]
        return self._tensors.read(path, index)
