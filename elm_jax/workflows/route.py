"""The verb `elm route`: ranks the experts of a library for a task that none was trained on."""

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.draw import draw_rows
from elm_jax.data.registry import registry
from elm_jax.data.registry.prompted_task import PromptedTask
from elm_jax.data.sources import row_files
from elm_jax.errors import InputError, describe, in_short
from elm_jax.experts.library import ExpertLibrary
from elm_jax.routing.encoders import MiniLMEncoder
from elm_jax.routing.search import nearest_key
from elm_jax.routing.text import RoutingInstance, format_text
from elm_jax.routing.vote import RoutingDecision, decide, decide_each, nearest_experts
from elm_jax.runtime import records, storage
from elm_jax.runtime.config_checks import DEFAULT_MODULES, check_range, check_types


@dataclasses.dataclass(frozen=True)
class RouteConfig:
    """Settings of routing one task over a library; either `task` or `examples` is given.

    Attributes:
        library: its folder.
        task: registered task, instances of which are the queries.
        examples: file of instances, see `read_examples`.
        split: of the task.
        num_queries: Q, the largest number of instances that are used.
        encoder_dir: folder of the encoder's weights; None for the encoder that the library names.
        seed: of the draw of the task's instances.
        modules: registries to import by name.
        prepared_dir: folder of prepared arrays, which are read in place of the task's data.
    """

    library: storage.PathLike
    task: str | None = None
    examples: storage.PathLike | None = None
    split: str = "validation"
    num_queries: int = 32
    encoder_dir: storage.PathLike | None = None
    seed: int = 0
    modules: tuple[str, ...] = DEFAULT_MODULES
    prepared_dir: storage.PathLike | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_range("num_queries", self.num_queries, 1)
        check_range("seed", self.seed, 0)
        if (self.task is None) == (self.examples is None):
            raise InputError(describe("Routing needs a task, or a file of examples of one",
                                      got=f"task {self.task}, examples {self.examples}",
                                      expected="one of the two"))


def route_task(config: RouteConfig) -> RoutingDecision:
    """Opens a library, reads the task's queries, and routes the task (see `route`).

    Raises:
        InputError: no such library, task or file, or no instance.
    """
    library = open_library(config.library, config.encoder_dir)
    if config.examples is not None:
        instances = read_examples(config.examples)
    else:
        instances = task_instances(config, keys={row["source"] for row in library.instances})
    return route(library, instances, num_queries=config.num_queries)


def route(library: ExpertLibrary, texts: Sequence[str | RoutingInstance], *, num_queries: int = 32,
          ) -> RoutingDecision:
    """Routes one task: each of its first `num_queries` instances votes for its nearest key's expert.

    Args:
        library: an open library.
        texts: instances of ONE task; plain strings are taken as inputs without answer choices. A string or an
            instance alone is one of them.
        num_queries: Q, at most this many instances are used; fewer instances mean fewer votes.

    Returns:
        The ranking of all experts, with votes and similarities.
    """
    texts = [texts] if isinstance(texts, str | RoutingInstance) else texts
    if not texts:
        raise InputError(describe("Routing needs at least one instance of the task"))
    if num_queries < 1:
        raise InputError(describe("Config value is out of range", where="num_queries", got=num_queries,
                                  expected="1 or more"))
    instances = [RoutingInstance(text) if isinstance(text, str) else text for text in texts[:num_queries]]
    queries = library.encoder.embed([format_text(instance, library.text_format) for instance in instances])
    return decide(queries, library.index)


def route_rows(library: ExpertLibrary, instances: Sequence[RoutingInstance]) -> list[str]:
    """Routes each instance alone; returns the best expert's id for each instance.

    Args:
        library: an open library.
        instances: of any tasks.
    """
    queries = library.encoder.embed([format_text(instance, library.text_format) for instance in instances])
    return decide_each(queries, library.index)


@dataclasses.dataclass(frozen=True)
class RowRoute:
    """Which expert an instance was routed to, and why.

    Attributes:
        expert: its id.
        similarity: of the instance with the nearest key; 0 for one of which the encoder knows nothing, which
            goes to the library's oldest expert.
        nearest: the training instance that this key stands for.
        next_expert: the expert that would have been next; None if there is no other.
        next_similarity: with that expert's nearest key.
    """

    expert: str
    similarity: float
    nearest: str
    next_expert: str | None = None
    next_similarity: float | None = None

    def to_dict(self) -> dict[str, str | float | None]:
        """Returns the route as a JSON-ready dictionary."""
        return dataclasses.asdict(self)


def explained_routes(library: ExpertLibrary, instances: Sequence[RoutingInstance]) -> list[RowRoute]:
    """Routes each instance alone, as `route_rows` does, and says why."""
    queries = library.encoder.embed([format_text(instance, library.text_format) for instance in instances])
    experts, routes = library.index.experts, []
    for query, chosen, own in zip(queries, *nearest_experts(queries, library.index), strict=True):
        key = nearest_key(query, library.index, chosen)
        others = [number for number in range(len(experts)) if number != chosen]
        second = max(others, key=own.__getitem__, default=None)
        routes.append(RowRoute(
            experts[chosen], round(float(own[chosen]), 4), library.instances[key]["source"],
            None if second is None else experts[second],
            None if second is None else round(float(own[second]), 4)))
    return routes


def open_library(folder: storage.PathLike, encoder_dir: storage.PathLike | None = None) -> ExpertLibrary:
    """Opens a library, with the encoder in a folder or with the one that the library names."""
    encoder = MiniLMEncoder.from_folder(encoder_dir) if encoder_dir else None
    return ExpertLibrary.open(folder, encoder)


@dataclasses.dataclass(frozen=True)
class Example:
    """Fields of a line of a file of instances."""

    inputs: str
    choices: list[str] | None = None
    choices_expression: str | None = None


def read_examples(path: storage.PathLike) -> list[RoutingInstance]:
    """Reads instances from JSON lines: ``{"inputs": str, "choices": [str], "choices_expression": str}``.

    Raises:
        InputError: a line that is not JSON or has no ``inputs``, or empty ones (file and line are named).
    """
    instances = []
    for number, row in enumerate(row_files.read_lines(path), start=1):
        where = f"{path}, line {number}"
        if not isinstance(row.get("inputs"), str) or not row["inputs"].strip():
            raise InputError(describe("An instance has no text", where=where,
                                      got=f"inputs={in_short(row['inputs'])}" if "inputs" in row
                                      else in_short(sorted(row)),
                                      expected='a field "inputs" with a string that is not empty'))
        records.check_record(row, Example, kind="instance", where=where)
        instances.append(RoutingInstance(row["inputs"], row.get("choices_expression"),
                                         tuple(row.get("choices") or ())))
    return instances


def task_instances(config: RouteConfig, keys: Collection[str] = ()) -> list[RoutingInstance]:
    """Draws at most Q instances of the config's task by its seed; needs no tokens.

    Args:
        config: says task, split, Q and seed, and where the rows come from.
        keys: inputs of a library's keys; a query from a train split is never one of them.

    Raises:
        InputError: no such task or split, or it is not among the prepared arrays.
    """
    name, split = config.task, config.split
    if config.prepared_dir is not None:
        folder = storage.as_path(config.prepared_dir) / name / split
        if not storage.is_committed(folder):
            raise InputError(describe("The task is not among the prepared arrays", where=folder))
        return draw_instances(PreparedSplit.open(folder), config.num_queries, config.seed, keys)
    registry.import_tasks(config.modules)
    return drawn_instances(registry.get_task(name), split, config.num_queries, config.seed, keys)


def drawn_instances(task: PromptedTask, split: str, count: int, seed: int,
                    keys: Collection[str] = ()) -> list[RoutingInstance]:
    """Draws at most `count` instances of a task's split as `draw_instances` does; renders no other rows.

    Args:
        task: a registered task.
        split: one of its splits.
        count: at most this many.
        seed: of the draw.
        keys: inputs that are not drawn from a train split.

    Raises:
        InputError: no such split, no data, or a row that does not fit the template.
    """
    rows = task.render_rows(split, order=lambda own: draw_rows(own, own, seed))
    ranked = task.kind == "rank"
    return _first_free(count, split, keys, (
        RoutingInstance(row.inputs, row.choices_expression, row.choices or () if ranked else ())
        for _, row in rows))


def draw_instances(prepared: PreparedSplit, count: int, seed: int,
                   keys: Collection[str] = ()) -> list[RoutingInstance]:
    """Draws at most `count` instances of a split without replacement, by a fixed seed.

    The rows of the source are drawn one after another, and those count that rendering left.

    Args:
        prepared: the split.
        count: at most this many.
        seed: of the draw.
        keys: inputs that are not drawn from a train split.
    """
    return _first_free(count, prepared.split, keys, (
        RoutingInstance(**prepared.routing_instance(number)) for number in _draw_order(prepared, seed)))


def _first_free(count: int, split: str, keys: Collection[str], drawn: Iterable[RoutingInstance]
                ) -> list[RoutingInstance]:
    """Takes the first `count` instances, of a train split those that are no keys."""
    free = (instance for instance in drawn if split != "train" or instance.source not in keys)
    return list(itertools.islice(free, count))


def _draw_order(prepared: PreparedSplit, seed: int) -> list[int]:
    """Numbers of all rows in the order in which their places in the source are drawn."""
    own, source = len(prepared), prepared.info.get("num_source")
    if source in (None, own) or prepared.info.get("max_rows") is not None:
        return draw_rows(own, own, seed).tolist()
    places = np.array([prepared.text(number)["index"] for number in range(own)], np.int64)
    total = max(source, places.max(initial=-1) + 1)
    turns = np.argsort(draw_rows(int(total), int(total), seed))
    return np.argsort(turns[places], kind="stable").tolist()
