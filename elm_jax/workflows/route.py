"""The verb `elm route`: ranks the experts of a library for a task that none was trained on."""

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import TypedDict, Unpack

import numpy as np

from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.draw import draw_rows
from elm_jax.data.registry import registry
from elm_jax.data.registry.prompted_task import PromptedTask
from elm_jax.data.sources import row_files
from elm_jax.errors import InputError, describe, in_short, unknown_name
from elm_jax.experts.library import ExpertLibrary
from elm_jax.routing.cases import RoutedLibrary, RoutedTask, RouterSettings, RowScorer
from elm_jax.routing.encoders import MiniLMEncoder
from elm_jax.routing.none_of_these import fit_threshold
from elm_jax.routing.router import (
    ROUTERS,
    RouterStream,
    counts_text,
    decide_task,
    default_router,
)
from elm_jax.routing.text import RoutingInstance, format_text
from elm_jax.routing.vote import RoutingDecision
from elm_jax.runtime import records, storage
from elm_jax.runtime.config_checks import DEFAULT_MODULES, check_range, check_types

QUERIES = 32
"""Q, where nothing else is said: at most so many instances of a task."""


@dataclasses.dataclass(frozen=True)
class RouteConfig:
    """Settings of routing one task over a library.

    The task is registered, or a file of examples; an instruction alone, or labelled rows alone, will do too.

    Attributes:
        library: its folder.
        task: registered task, instances of which are the queries.
        examples: file of instances, see `read_examples`.
        split: of the task.
        num_queries: Q, number of instances that are used, an error if there are fewer; 0 routes by the task's
            text alone; None for at most `QUERIES`.
        encoder_dir: folder of the encoder's weights; None for the encoder that the library names.
        seed: of the draw of the task's instances.
        modules: registries to import by name.
        prepared_dir: folder of prepared arrays, which are read in place of the task's data.
        router: one of `router.ROUTERS`; None for `labelled` where there are labelled rows, else that of the
            library: ``prior+nearest`` with priors; without, votes, and the centroid at Q = 0.
        instruction: text that says what the task is, in place of a registered task's template; beside queries
            it counts with priors alone.
        labelled: file of rows with answers, on which the router `labelled` scores experts (see
            `target_task.read_labelled`); without a task and examples their inputs are the queries, too.
        base: of the experts, for routers that score them; None for the one that their cards name.
        dataset: of a task that is not registered; priors leave it out.
        family: kind of such a task; priors leave out all data sets of it.
        none_of_these: whether the decision says if its first expert fits (`RoutingDecision.is_sure`).
    """

    library: storage.PathLike
    task: str | None = None
    examples: storage.PathLike | None = None
    split: str = "validation"
    num_queries: int | None = None
    encoder_dir: storage.PathLike | None = None
    seed: int = 0
    modules: tuple[str, ...] = DEFAULT_MODULES
    prepared_dir: storage.PathLike | None = None
    router: str | None = None
    instruction: str | None = None
    labelled: storage.PathLike | None = None
    base: storage.PathLike | None = None
    dataset: str | None = None
    family: str | None = None
    none_of_these: bool = False

    def __post_init__(self) -> None:
        """Raises InputError for settings that are wrong, exclude each other or have no effect."""
        check_types(self)
        check_range("num_queries", self.num_queries, 0)
        check_range("seed", self.seed, 0)
        if (self.task is not None and self.examples is not None) or not any(
                (self.task, self.examples, self.instruction, self.labelled)):
            raise InputError(describe("Routing needs a task, or a file of examples of one",
                                      got=f"task {self.task}, examples {self.examples}",
                                      expected="one of the two; or an instruction, or labelled rows"))
        if self.router is not None and self.router not in ROUTERS:
            raise unknown_name("router", self.router, ROUTERS)
        self._check_text()
        self._check_used()

    def _check_text(self) -> None:
        """Raises InputError where Q = 0 and nothing says what the task is, or what says so is empty."""
        if self.instruction is not None and not self.instruction.strip():
            raise InputError(describe("The instruction is empty", where="instruction"))
        if self.num_queries == 0 and (self.examples or not (self.task or self.instruction)):
            raise InputError(describe("Without queries a task is known by its text alone",
                                      where="num_queries = 0",
                                      got="examples" if self.examples else "no text of a task",
                                      expected="a registered task, or an instruction and no examples",
                                      cure="give --instruction TEXT"))
        if self.num_queries and not (self.task or self.examples or self.labelled):
            raise InputError(describe("Queries come from a task, or from examples", where="num_queries",
                                      got=self.num_queries, expected="0 for an instruction alone"))

    def _check_used(self) -> None:
        """Raises InputError for a setting that has no effect on the router."""
        if self.labelled is not None and self.router is not None and not ROUTERS[self.router].needs_rows:
            able = [name for name, row in ROUTERS.items() if row.needs_rows]
            raise InputError(describe(f"The router {self.router} has no use for labelled rows",
                                      where="labelled", got=self.labelled,
                                      cure=f"leave them out, or take --router {', '.join(able)}"))
        if self.none_of_these and self.most_queries == 0:
            raise InputError(describe("Whether none of the experts fits is told by queries",
                                      where="none_of_these", got="the task's text alone",
                                      cure="leave it out"))
        if self.router is not None:
            self.check_base(self.router)
        if self.task is not None and (self.dataset, self.family) != (None, None):
            raise InputError(describe("A task itself says its data set and family", where="dataset, family",
                                      got=f"{self.dataset}, {self.family}", cure="leave them out"))

    def check_base(self, router: str) -> None:
        """Raises InputError if a base is given, and the router that decides scores no expert."""
        if self.base is not None and not ROUTERS[router].needs_rows:
            rows = "" if self.router else "; or give labelled rows"
            raise InputError(describe("Only routers that score experts need a base", where="base",
                                      got=self.base, cure=f"leave it out: {router} decides{rows}"))

    @property
    def most_queries(self) -> int:
        """At most so many instances are used."""
        if self.num_queries is not None:
            return self.num_queries
        return QUERIES if self.task or self.examples or self.labelled else 0


class RouteOptions(TypedDict, total=False):
    """What else a router is told.

    Attributes:
        instruction: text that says what the task is; beside queries it counts with priors alone.
        dataset: of the task; priors leave it out.
        family: kind of the task; priors leave out all data sets of it.
        settings: constants of the routers.
        scorer: scores experts on rows, for routers that need it (`LibraryScorer`).
    """

    instruction: str | RoutingInstance | None
    dataset: str | None
    family: str | None
    settings: RouterSettings | None
    scorer: RowScorer | None


def route(library: ExpertLibrary, texts: Sequence[str | RoutingInstance] = (), *, num_queries: int = QUERIES,
          router: str | None = None, **options: Unpack[RouteOptions]) -> RoutingDecision:
    """Routes one task over a library by the first `num_queries` of its instances.

    Args:
        library: an open library.
        texts: instances of ONE task; plain strings are taken as inputs without answer choices. A string or an
            instance alone is one of them. Without any an instruction says what the task is.
        num_queries: Q, at most this many instances are used; fewer instances mean fewer votes.
        router: one of `router.ROUTERS`; None for the library's own: ``prior+nearest`` with priors; without,
            votes, and the centroid where there is an instruction alone.
        **options: see `RouteOptions`.

    Returns:
        The ranking of all experts, with votes, similarities and the router's scores.

    Raises:
        InputError: neither an instance nor an instruction, or an instruction that has no effect; no such
            router, or one that needs what is not there.
    """
    texts = [texts] if isinstance(texts, str | RoutingInstance) else texts
    check_range("num_queries", num_queries, 1)
    if not texts and options.get("instruction") is None:
        raise InputError(describe("Routing needs at least one instance of the task, or an instruction"))
    task, routed = routed_task(library, texts[:num_queries], options), library.routed()
    name, settings = router or usual_router(routed, queries=len(texts) > 0), options.get("settings")
    check_instruction(name, routed, task.text, queries=len(texts) > 0)
    routed = with_threshold(routed, settings)
    return decide_task(task, routed, name, settings=settings, scorer=options.get("scorer"))


class RouteStream:
    """Decisions for one task that sharpen as its instances come.

    After any number of updates the decision is that of `route` for all instances at once.

    Example:
        >>> stream = elm.RouteStream(library)
        >>> for text in texts: print(stream.update(text).top(1))
    """

    def __init__(self, library: ExpertLibrary, router: str | None = None,
                 **options: Unpack[RouteOptions]) -> None:
        """Takes what `route` takes, but for a scorer."""
        check_row_router(router, options.get("scorer"))
        self.library, task, routed = library, routed_task(library, (), options), library.routed()
        router, settings = router or default_router(routed), options.get("settings")
        check_instruction(router, routed, task.text, queries=True)
        self._stream = RouterStream(
            with_threshold(routed, settings), router, text=task.text, dataset=task.dataset,
            family=task.family, settings=settings)

    def update(self, texts: Sequence[str | RoutingInstance]) -> RoutingDecision:
        """Adds instances, at least one, and returns the decision by all so far."""
        if not texts:
            raise InputError(describe("A stream goes on with at least one instance of the task"))
        return self._stream.update(embedded(self.library, texts))


def usual_router(routed: RoutedLibrary, *, queries: bool) -> str:
    """Name of the router where none is asked for: the library's; ``centroid`` if that needs queries."""
    name = default_router(routed)
    return name if queries or not ROUTERS[name].needs_queries else "centroid"


def with_threshold(routed: RoutedLibrary, settings: RouterSettings | None) -> RoutedLibrary:
    """The library with the threshold that `none_of_these` asks for, fitted on its own tasks if it has none.

    Raises:
        InputError: the library has too few experts of too few data sets to tell.
    """
    if settings is None or not settings.none_of_these or routed.threshold is not None:
        return routed
    return dataclasses.replace(routed, threshold=fit_threshold(routed))


def check_instruction(router: str, routed: RoutedLibrary, text: np.ndarray | None, *, queries: bool) -> None:
    """Raises InputError if a task has a text f32[K] that changes nothing."""
    if text is None or router not in ROUTERS or counts_text(router, routed, queries=queries):
        return
    raise InputError(describe(
        f"The router {router} has no use for an instruction"
        + (" beside queries" if ROUTERS[router].takes_text else ""), where="instruction",
        cure="leave it out" + (", or route by it alone: --queries 0" if ROUTERS[router].takes_text else "")))


def routed_task(library: ExpertLibrary, texts: Sequence[str | RoutingInstance], options: RouteOptions
                ) -> RoutedTask:
    """The task of some instances, perhaps none, as routers see it."""
    instruction = options.get("instruction")
    queries = embedded(library, texts) if texts else np.zeros((0, library.index.keys.shape[1]), np.float32)
    text = None if instruction is None else embedded(library, [instruction])[0]
    return RoutedTask(queries, text, options.get("dataset"), options.get("family"))


def embedded(library: ExpertLibrary, texts: Sequence[str | RoutingInstance]) -> np.ndarray:
    """Embeds instances in a library's format: unit rows f32[Q, K]."""
    texts = [texts] if isinstance(texts, str | RoutingInstance) else texts
    instances = [RoutingInstance(text) if isinstance(text, str) else text for text in texts]
    return library.encoder.embed([format_text(instance, library.text_format) for instance in instances])


def check_row_router(router: str | None, scorer: RowScorer | None = None) -> None:
    """Raises InputError for a router that is unknown, or that scores experts: it decides for whole tasks."""
    if router is not None and router not in ROUTERS:
        raise unknown_name("router", router, ROUTERS)
    if scorer is not None or (router is not None and ROUTERS[router].needs_rows):
        able = [name for name, row in ROUTERS.items() if not row.needs_rows]
        raise InputError(describe("A router that scores experts on rows decides for a task, not for each row",
                                  got=router, expected=f"one of {', '.join(able)}"))


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
        return draw_instances(PreparedSplit.open(folder), config.most_queries, config.seed, keys)
    registry.import_tasks(config.modules)
    return drawn_instances(registry.get_task(name), split, config.most_queries, config.seed, keys)


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
