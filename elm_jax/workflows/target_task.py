"""The task that `elm route` is asked about: its queries, its text, its rows, and the decisions for it."""

import dataclasses
import functools
import logging

from elm_jax.data.prompts.templates import SEPARATOR
from elm_jax.data.registry import registry
from elm_jax.data.registry.task_kin import kin_of
from elm_jax.data.sources import row_files
from elm_jax.errors import InputError, describe, in_short, unknown_name
from elm_jax.experts.base import load_base
from elm_jax.experts.card import base_folder
from elm_jax.experts.library import ExpertLibrary
from elm_jax.routing.cases import RoutedLibrary, RoutedTask, RouterSettings, RowScorer
from elm_jax.routing.evidence import Evidence
from elm_jax.routing.router import ROUTERS, check_router, counts_text, decide_evidence, task_evidence
from elm_jax.routing.text import RoutingInstance
from elm_jax.routing.vote import RoutingDecision
from elm_jax.runtime import storage
from elm_jax.workflows.route import (
    RouteConfig,
    RouteOptions,
    check_instruction,
    open_library,
    read_examples,
    routed_task,
    task_instances,
    usual_router,
    with_threshold,
)

logger = logging.getLogger(__name__)


def route_task(config: RouteConfig) -> RoutingDecision:
    """Opens a library, reads the task's queries, and routes the task (see `route`).

    Raises:
        InputError: no such library, task or file; no instance, or fewer than were asked for; a router that
            needs what is not there.
    """
    return TargetTask.read(config).decide()


@dataclasses.dataclass(frozen=True, eq=False)
class TargetTask:
    """A task and the library that it is routed over; both are read and embedded once.

    Attributes:
        config: that they were read by.
        library: open.
        routed: the library as arrays.
        instances: the queries; none at Q = 0.
        text: what says what the task is, if it counts.
        arrays: the task as routers see it.
    """

    config: RouteConfig
    library: ExpertLibrary
    routed: RoutedLibrary
    instances: tuple[RoutingInstance, ...]
    text: RoutingInstance | None
    arrays: RoutedTask

    @classmethod
    def read(cls, config: RouteConfig, *, every: bool = False) -> "TargetTask":
        """Reads what a config names; raises InputError as `route_task` does.

        Args:
            config: that names it.
            every: whether other routers than the config's will decide, too.
        """
        library = open_library(config.library, config.encoder_dir)
        routed, has_queries = library.routed(), config.most_queries > 0
        router = _router_of(config, routed)
        config.check_base(router)
        # Before rows are read and rendered, which may take long.
        check_router(router, routed, queries=has_queries, text=not has_queries)
        dataset, family = _kin_of(config, routed)
        instances = _instances(config, library)
        wanted = config.instruction is not None or any(
            counts_text(name, routed, queries=has_queries) for name in (ROUTERS if every else (router,)))
        text = _text_of(config) if wanted else None
        routed = with_threshold(routed, RouterSettings(none_of_these=config.none_of_these))
        options: RouteOptions = {"instruction": text, "dataset": dataset, "family": family}
        arrays = routed_task(library, instances, options)
        if not every:
            check_instruction(router, routed, arrays.text, queries=has_queries)
        return cls(config, library, routed, tuple(instances), text, arrays)

    @property
    def router(self) -> str:
        """Name of the router that decides if no other is named."""
        return _router_of(self.config, self.routed)

    def decide(self, router: str | None = None) -> RoutingDecision:
        """Ranks all experts by a router, by default that of the config."""
        name = router or self.router
        scorer = self._on_labelled() if ROUTERS[name].needs_rows else None
        centroids = ROUTERS[name].uses_centroids
        if centroids not in self._evidence:
            self._evidence[centroids] = task_evidence(self.arrays, self.routed, name).pooled()
        settings = RouterSettings(none_of_these=self.config.none_of_these and name == self.router)
        return decide_evidence(self._evidence[centroids], self.arrays, self.routed, name, settings=settings,
                               scorer=scorer)

    @functools.cached_property
    def _evidence(self) -> dict[bool, Evidence]:
        """Evidence of the queries, by whether it has similarities with centroids."""
        return {}

    def _on_labelled(self) -> RowScorer | None:
        from elm_jax.workflows.expert_scorer import LibraryScorer, ScoredRow  # late: a second, for networks

        if self.config.labelled is None:
            return None
        rows = [ScoredRow(*row).check(f"{self.config.labelled}, line {number}")
                for number, row in enumerate(read_labelled(self.config.labelled), start=1)]
        cards = [entry.card for entry in self.library.entries.values()]
        return LibraryScorer(self.library, load_base(base_folder(cards, self.config.base)), rows)


def read_labelled(path: storage.PathLike) -> list[tuple[str, tuple[str, ...], str]]:
    """Reads rows with their right answers from JSON lines: ``inputs``, ``choices`` and ``targets``, a text.

    Returns:
        For each row its input, its choices and the right one.

    Raises:
        InputError: as `read_examples`; a row without ``targets`` (file and line are named).
    """
    rows = []
    for number, (one, row) in enumerate(zip(read_examples(path), row_files.read_lines(path), strict=True), 1):
        target = row.get("targets")
        if not isinstance(target, str):
            raise InputError(describe(
                "A labelled row has no label", where=f"{path}, line {number}", expected="the right choice, "
                'a text, as "targets"', got=f"targets={in_short(target)}" if "targets" in row
                else f"the fields {', '.join(sorted(row))}"))
        rows.append((one.source, one.labels, target))
    return rows


def _router_of(config: RouteConfig, routed: RoutedLibrary) -> str:
    if config.router is not None:
        return config.router
    return usual_router(routed, queries=config.most_queries > 0) if config.labelled is None else "labelled"


def _kin_of(config: RouteConfig, routed: RoutedLibrary) -> tuple[str | None, str | None]:
    """Data set and family that priors leave out; none where there are no priors.

    Raises:
        InputError: the config names a data set or a family that the priors do not have.
    """
    priors = routed.priors
    if config.task is not None:
        if priors is None:
            return None, None
        registry.import_tasks(config.modules)
        return kin_in(config.task, routed)
    for name, value, there in (("dataset", config.dataset, priors and priors.datasets),
                               ("family", config.family, priors and priors.families)):
        if value is not None and there is None:
            raise InputError(describe("Only priors leave something out, and the library has none", where=name,
                                      got=value, cure="run `elm library calibrate`, or leave it out"))
        if value is not None and value not in there:
            raise unknown_name(f"{name} of the library's priors", value, set(there),
                               cure="leave it out: they know nothing of it")
    return config.dataset, config.family


def _instances(config: RouteConfig, library: ExpertLibrary) -> list[RoutingInstance]:
    """The queries: Q, or all that there are if Q was not asked for."""
    if not config.most_queries:
        return []
    if config.task is not None:
        found, where = task_instances(config, keys={row["source"] for row in library.instances}), config.task
    else:
        where = config.examples or config.labelled
        found = read_examples(where)[:config.most_queries]
    if config.num_queries is not None and len(found) < config.num_queries:
        raise InputError(describe("There are fewer rows than queries", where=where,
                                  got=f"{len(found)} rows", expected=f"num_queries = {config.num_queries}",
                                  cure="ask for fewer, or leave it out for as many as there are"))
    return found


def _text_of(config: RouteConfig) -> RoutingInstance | None:
    """What says what the task is: the instruction, or a registered task's template; None for neither.

    Raises:
        InputError: Q = 0, and the task has no template that can be read.
    """
    if config.instruction is not None:
        return RoutingInstance(config.instruction)
    if config.task is None:
        return None
    registry.import_tasks(config.modules)
    if config.most_queries:
        return None if registry.find_task(config.task) is None else template_text(config.task)
    text = template_text(config.task)
    if text is None:
        raise InputError(describe("The task has no template that says what it is", where=config.task,
                                  got="rows that are prompts already",
                                  cure="give --instruction TEXT, or queries"))
    return text


def template_text(task: str) -> RoutingInstance | None:
    """The template of a registered task as it is written, with its choices; None where rows are prompts.

    Raises:
        InputError: no such task, or no folder has its template.
    """
    template = registry.get_task(task).load_template()
    if not template.instruction:
        return None
    choices = template.answer_choices or ""
    fixed = [] if "{{" in choices or "{%" in choices else map(str.strip, choices.split(SEPARATOR))
    return RoutingInstance(template.instruction, template.answer_choices, tuple(filter(None, fixed)))


def target_options(task: str, routed: RoutedLibrary, router: str) -> RouteOptions:
    """What a router of rows is told of the registered task that they are of: its kin and its text."""
    if routed.priors is None:
        return {}
    dataset, family = kin_in(task, routed)
    counts = registry.find_task(task) is not None and counts_text(router, routed, queries=True)
    return {"dataset": dataset, "family": family, "instruction": template_text(task) if counts else None}


def kin_in(task: str, routed: RoutedLibrary) -> tuple[str, str | None]:
    """Data set and family of a task, which priors leave out.

    A task that is not registered says its data set by its name, and no family: it has the one that the
    library's priors know of the data set. Where they know none, nothing but the data set is left out, which
    is a warning.
    """
    dataset, family = kin_of(task)
    if registry.find_task(task) is not None:
        return dataset, family
    family = routed.family_of(dataset)
    if family is None:
        logger.warning("%s is not registered, and the library's priors do not know its data set %s: they "
                       "leave out nothing of its family", task, dataset)
    return dataset, family
