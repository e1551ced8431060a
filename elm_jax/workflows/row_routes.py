"""Routes each of a task's instances by itself: its expert, why, and whether any expert fits it."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Unpack

import numpy as np

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.experts.library import ExpertLibrary
from elm_jax.experts.routed_library import text_of_key
from elm_jax.routing.cases import RoutedLibrary, RoutedTask, RouterSettings
from elm_jax.routing.router import RowDecisions, are_sure, explain_rows, task_evidence
from elm_jax.routing.search import nearest_key
from elm_jax.routing.text import RoutingInstance
from elm_jax.runtime import storage
from elm_jax.workflows.choices import NONE_PER
from elm_jax.workflows.route import RouteOptions, check_row_router, routed_task, with_threshold

AT_ONCE = 512
"""Rows that are decided at once: so many times the experts are in memory."""
BASE_ID = "base"
"""Name of the base itself among the models that are scored, and that answer."""


def route_rows(library: ExpertLibrary, instances: Sequence[RoutingInstance], router: str | None = None,
               **options: Unpack[RouteOptions]) -> list[str | None]:
    """Routes each instance alone; returns the best expert's id for each instance.

    Args:
        library: an open library.
        instances: of any tasks.
        router: one that scores no experts; None for the library's own.
        **options: see `RouteOptions`; what they say of the task counts for all instances. Where settings ask
            for `none_of_these`, an instance that no expert fits has None.
    """
    check_row_router(router, options.get("scorer"))
    task, settings = routed_task(library, instances, options), options.get("settings")
    none_per = "row" if settings is not None and settings.none_of_these else None
    return chosen_experts(library.routed(), task, router, settings, none_per=none_per)


def chosen_experts(routed: RoutedLibrary, task: RoutedTask, router: str | None = None,
                   settings: RouterSettings | None = None, *, none_per: str | None = None
                   ) -> list[str | None]:
    """The best expert's id for each query of a task alone, None for one that none fits; as `row_reasons`."""
    experts = routed.index.experts
    return [experts[chosen] if found.are_sure is None or found.are_sure[row] else None
            for _, found in _decided_rows(routed, task, router, settings, none_per)
            for row, chosen in enumerate(found.experts)]


@dataclasses.dataclass(frozen=True)
class RowRoute:
    """Which expert an instance was routed to, and why.

    Attributes:
        expert: its id.
        similarity: of the instance with the nearest key; 0 for one of which the encoder knows nothing, which
            goes to the library's oldest expert.
        nearest: the training instance that this key stands for; None of a library of means, which keeps none.
        next_expert: the expert that would have been next; None if there is no other.
        next_similarity: with that expert's nearest key.
        is_sure: whether any expert of the library fits the instance, or its task; None where that was not
            asked.
    """

    expert: str
    similarity: float
    nearest: str | None
    next_expert: str | None = None
    next_similarity: float | None = None
    is_sure: bool | None = None

    def to_dict(self) -> dict[str, str | float | bool | None]:
        """Returns the route as a JSON-ready dictionary."""
        found = dataclasses.asdict(self)
        if self.is_sure is None:
            del found["is_sure"]
        return found


def explained_routes(library: ExpertLibrary, instances: Sequence[RoutingInstance], router: str | None = None,
                     **options: Unpack[RouteOptions]) -> list[RowRoute]:
    """Routes each instance alone, as `route_rows` does, and says why."""
    check_row_router(router, options.get("scorer"))
    task, settings = routed_task(library, instances, options), options.get("settings")
    none_per = "row" if settings is not None and settings.none_of_these else None
    return row_reasons(library, library.routed(), task, router, settings, none_per=none_per)


def row_reasons(library: ExpertLibrary, routed: RoutedLibrary, task: RoutedTask, router: str | None = None,
                settings: RouterSettings | None = None, *, none_per: str | None = None) -> list[RowRoute]:
    """Routes each query of a task alone, and says why.

    Args:
        library: has the texts of the keys.
        routed: the same as arrays.
        task: with its queries.
        router: one that scores no experts; None for the library's own.
        settings: constants of the routers.
        none_per: ``row`` says of each query whether any expert fits it, ``task`` of all together; None of
            none.
    """
    experts, routes = routed.index.experts, []
    for queries, found in _decided_rows(routed, task, router, settings, none_per):
        for row, (query, chosen) in enumerate(zip(queries, found.experts, strict=True)):
            second = None if found.next_experts is None else found.next_experts[row]
            own = found.similarities[row]
            routes.append(RowRoute(
                experts[chosen], round(float(own[chosen]), 4),
                text_of_key(library, nearest_key(query, routed.index, chosen)),
                None if second is None else experts[second],
                None if second is None else round(float(own[second]), 4),
                None if found.are_sure is None else bool(found.are_sure[row])))
    return routes


def _decided_rows(routed: RoutedLibrary, task: RoutedTask, router: str | None,
                  settings: RouterSettings | None, none_per: str | None
                  ) -> Iterator[tuple[np.ndarray, RowDecisions]]:
    """At most `AT_ONCE` queries of a task, and the decision for each of them."""
    settings = dataclasses.replace(settings or RouterSettings(), none_of_these=none_per is not None)
    routed = with_threshold(routed, settings)
    whole = _fits_task(routed, task) if none_per == "task" else None
    for part in _parts(task):
        found = explain_rows(part, routed, router, settings=settings)
        yield part.queries, found if whole is None else dataclasses.replace(
            found, are_sure=np.full(len(part.queries), whole))


def _fits_task(routed: RoutedLibrary, task: RoutedTask) -> bool:
    """Whether the library has an expert for a task, by all of its queries."""
    pooled = None
    for part in _parts(task):
        new = task_evidence(part, routed, "vote").pooled()  # similarities with keys alone
        pooled = new if pooled is None else pooled.joined(new).pooled()
    return pooled is None or bool(are_sure(pooled, routed)[0])


def _parts(task: RoutedTask) -> Iterator[RoutedTask]:
    for start in range(0, len(task.queries), AT_ONCE):
        yield dataclasses.replace(task, queries=task.queries[start:start + AT_ONCE])


def check_none_of_these(answers: storage.PathLike | None, none_per: str | None, library: object) -> None:
    """Raises InputError for settings of who answers where no expert fits that are wrong or have no effect.

    Args:
        answers: `BASE_ID`, or an expert's id or folder; None where it is not asked whether one fits.
        none_per: one of `NONE_PER`; None for the first.
        library: whose experts may fit; None for none.
    """
    if none_per is not None and none_per not in NONE_PER:
        raise unknown_name("part of a task", none_per, NONE_PER, where="none_per")
    if answers is None and none_per is not None:
        raise InputError(describe("Nothing asks whether any expert fits", where="none_per", got=none_per,
                                  cure=f"give --none_of_these {BASE_ID} too, or leave it out"))
    if answers is not None and library is None:
        raise InputError(describe("Only of a library's experts it is asked whether any fits",
                                  where="none_of_these", got=answers,
                                  cure="give a library, or leave it out"))


def folder_of_answers(library: ExpertLibrary, answers: storage.PathLike) -> storage.PathLike | None:
    """Folder of the expert that answers where none of a library fits; None for the base itself.

    Args:
        library: an open library.
        answers: `BASE_ID`, the id of one of its experts, or an expert's folder.

    Raises:
        InputError: it is nothing of these; or the base, and an expert has that name.
    """
    if answers == BASE_ID and BASE_ID in library:
        raise InputError(describe("An expert of the library is named as the base is", where="none_of_these",
                                  got=BASE_ID, expected="a library in which that name is the base's",
                                  cure="give that expert another name"))
    if answers == BASE_ID:
        return None
    if answers in library:
        return library.path / "experts" / answers
    if not storage.as_path(answers).exists():
        raise unknown_name("expert", str(answers), [BASE_ID, *library], where="none_of_these",
                           cure=f"give {BASE_ID}, an expert of the library, or an expert's folder")
    return answers
