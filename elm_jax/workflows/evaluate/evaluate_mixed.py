"""Mixed evaluation: scores each row with its own expert, chosen by routing or by an assignment."""

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Unpack

from elm_jax.data.sources import row_files
from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.evaluation import stacked_evaluator
from elm_jax.evaluation.results import TaskResult
from elm_jax.experts.base import Base
from elm_jax.experts.library import ExpertLibrary
from elm_jax.experts.overlay import Expert, resolve
from elm_jax.experts.rendering import shared_rendering
from elm_jax.models.adapters.stacked import Many
from elm_jax.models.network import Network
from elm_jax.routing.router import ROUTERS, check_router, default_router
from elm_jax.routing.text import RoutingInstance
from elm_jax.runtime import hosts, storage, trees
from elm_jax.runtime.config_checks import items_of
from elm_jax.runtime.terminal.progress import tell_item
from elm_jax.workflows.evaluate.evaluate_models import (
    Scorable,
    ScoredModel,
    ScoringOptions,
    ScoringSetup,
    distinct,
    model_in,
    model_of,
    warn_of_rows,
)
from elm_jax.workflows.route import check_row_router, route_rows
from elm_jax.workflows.target_task import target_options

logger = logging.getLogger(__name__)
Assignment = Mapping[str, Mapping[int, str]]
"""From a task to the expert of each of its rows, by the row's index in the source."""


@dataclasses.dataclass(frozen=True)
class MixedExperts(Scorable):
    """Experts of one base and one shape, and the choice of an expert for each row.

    Attributes:
        members: the experts.
        choose: gives the ids of the experts of a task's rows, one a row; the same in every process.
    """

    members: tuple[ScoredModel, ...]
    choose: Callable[[str, ScoringSetup], list[str]]
    mixed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raises InputError for members that cannot be scored in one program."""
        for member in self.members:
            if member.expert is None:
                raise _unlike(member.id, f"of form {member.card.form!r}", "experts of the form 'adapter'")
            if member.card.network != self.members[0].card.network:
                raise _unlike(member.id, "another network config", f"that of {self.members[0].id}")

    @property
    def rendering(self) -> str:
        """That of all members; InputError if they differ."""
        return shared_rendering([member.card for member in self.members], "a mixed evaluation")

    def score(self, tasks: Sequence[str], setup: ScoringSetup) -> Iterator[TaskResult]:
        """Scores each task in batches of rows of many experts; a prediction names its expert."""
        chosen = {task: self.choose(task, setup) for task in tasks}
        used = {name for names in chosen.values() for name in names}
        members = [member for member in self.members if member.id in used]
        places = {member.id: place for place, member in enumerate(members)}
        network, params = _put_experts([member.expert() for member in members], setup)
        with setup.above_trunk(network, trees.flatten(params[1]), self.id) as (network, scoring):
            for task, names in chosen.items():
                instances = setup.rows(task, self.rendering, self.id)
                for member in members:
                    warn_of_rows(member.card, instances)
                result = stacked_evaluator.evaluate_task_mixed(
                    network, params, instances, [places[name] for name in names], scoring, self.id)
                expert_of = {instances.text(row)["index"]: name for row, name in enumerate(names)}
                predictions = [{**one, "expert": expert_of[one["index"]]} for one in result.predictions]
                tell_item(logger, "%s on %s: %s", self.id, task, ", ".join(
                    f"{count} rows by {name}" for name, count in Counter(names).most_common()))
                yield dataclasses.replace(result, predictions=predictions)


def _unlike(expert: str, got: str, expected: str) -> InputError:
    return InputError(describe("Only experts of adapters of one shape are scored in mixed batches",
                               where=f"expert {expert}", got=got, expected=expected,
                               cure="leave it out, or score the experts one after another"))


def _put_experts(experts: Sequence[Expert], setup: ScoringSetup) -> tuple[Network, Many]:
    """Puts the base and all overlays on the mesh; returns them with the experts' network.

    Raises:
        InputError: an expert of another base, or overlays of unlike shapes.
    """
    network, _ = resolve(setup.base, experts[0])
    for expert in experts[1:]:
        resolve(setup.base, expert)  # belongs to this base, fits its own network
        difference = trees.first_difference(experts[0].overlay, expert.overlay)
        if difference:
            raise _unlike(expert.card.id, f"leaf {difference}", f"the leaves of {experts[0].card.id}")
    overlays = [expert.overlay for expert in experts]
    return network, stacked_evaluator.put_stack(network, setup.base.params, overlays, setup.mesh)


def mixed_of_library(base: Base, library: ExpertLibrary, mixed_id: str | None = None,
                     router: str | None = None) -> MixedExperts:
    """Mixed experts of a library: each row is scored by the expert that routing chooses for it alone.

    Args:
        base: that the experts were trained on.
        library: an open library.
        mixed_id: name in the results; None for ``mixed:`` and the library's folder.
        router: that decides for each row; None for the library's own. Priors leave the scored task's data set
            and family out.

    Raises:
        InputError: experts of another base, or such as do not stack; a router that does not decide for rows.
    """
    check_row_router(router)
    routed = library.routed()
    name = router or default_router(routed)
    check_router(name, routed, queries=True, text=False)
    members = tuple(model_in(base, library.path / "experts" / name) for name in library)

    def choose(task: str, setup: ScoringSetup) -> list[str]:
        data = dataclasses.replace(setup.data, few_shot=0)  # exemplars say nothing of the row
        rows = data.split(task, setup.split_of(task), setup.max_rows)
        instances = [RoutingInstance(**rows.routing_instance(row)) for row in range(len(rows))]
        options = target_options(task, routed, name)
        # In one process: rounding could differ between hosts.
        return hosts.by_first(lambda: route_rows(library, instances, name, **options))

    rule = [library.index.digest(), library.encoder.fingerprint, library.text_format]
    if name != "vote":  # a fingerprint of votes is as it was before there were others
        priors = routed.priors if ROUTERS[name].needs_priors else None
        rule += [name, None if routed.copies is None else routed.copies.tolist(), priors and [
            priors.datasets, priors.families, trees.fingerprint({"generality": priors.generality})]]
    return MixedExperts(mixed_id or f"mixed:{library.path.name or 'library'}", _fingerprint(members, rule),
                        members, choose)


def mixed_of_assignment(members: Sequence[ScoredModel], assignment: Assignment, mixed_id: str
                        ) -> MixedExperts:
    """Mixed experts of an assignment, which names the expert of each row.

    Args:
        members: experts of one base.
        assignment: see `Assignment`; it may have rows that are not scored.
        mixed_id: name in the results.

    Raises:
        InputError: experts that do not stack, or an assignment to one that is not among them.
    """
    members = tuple(distinct(members))
    for task, experts in assignment.items():
        _check_known(experts.values(), [member.id for member in members], f"assignment of {task}")

    def choose(task: str, setup: ScoringSetup) -> list[str]:
        instances, known = setup.rows(task), assignment.get(task, {})
        indices = [instances.text(row)["index"] for row in range(len(instances))]
        missing = [index for index in indices if index not in known]
        if missing:
            raise InputError(describe(
                "The assignment gives some rows no expert", where=f"{task} {setup.split_of(task)}",
                got=f"{len(missing)} of {len(indices)} rows without, the first with index {missing[0]}",
                expected="an expert for every row that is scored"))
        return [known[index] for index in indices]

    rule = {task: sorted(experts.items()) for task, experts in sorted(assignment.items())}
    return MixedExperts(mixed_id, _fingerprint(members, rule), members, choose)


def _check_known(experts: Collection[str], known: Sequence[str], where: str) -> None:
    for name in dict.fromkeys(experts):
        if name not in known:
            raise unknown_name("expert", name, known, where=where)


def _fingerprint(members: Sequence[ScoredModel], rule: Any) -> str:
    """Fingerprint of the experts' weights and of the choice among them."""
    facts = [[[member.id, member.fingerprint] for member in members], rule]
    return f"sha256:{hashlib.sha256(json.dumps(facts).encode()).hexdigest()}"


def read_assignment(path: storage.PathLike, tasks: Sequence[str]) -> dict[str, dict[int, str]]:
    """Reads an assignment from JSON lines: ``{"index": int, "expert": str, "task": str}``.

    Args:
        path: of the file.
        tasks: that are scored; if there is only one (a string, say), lines need not name it.

    Raises:
        InputError: a line without one of these, or two lines of one row (file and line are named).
    """
    found: dict[str, dict[int, str]] = {}
    tasks = items_of(tasks)
    for number, row in enumerate(row_files.read_lines(path), start=1):
        index, expert = row.get("index"), row.get("expert")
        task = row.get("task", tasks[0] if len(tasks) == 1 else None)
        if type(index) is not int or not isinstance(expert, str) or not isinstance(task, str):
            raise InputError(describe(
                "A line assigns no row to an expert", where=f"{path}, line {number}", got=row,
                expected='"index" in the source, "expert", and "task" if several are scored'))
        if found.setdefault(task, {}).setdefault(index, expert) != expert:
            raise InputError(describe("A row is assigned twice", where=f"{path}, line {number}",
                                      got=f"{task} {index}: {found[task][index]} and {expert}"))
    return found


def evaluate_mixed(
    base: Base, experts: ExpertLibrary | Sequence[Expert], tasks: Sequence[str], *,
    assignment: Assignment | None = None, router: str | None = None, **options: Unpack[ScoringOptions],
) -> list[dict]:
    """Evaluates tasks with an expert for each row; returns result rows and writes nothing.

    Args:
        base: the base.
        experts: a library, which routes each row by itself; or experts of that base, with an assignment.
        tasks: names of tasks; a string is one name.
        assignment: from a task to the expert's id of each row, by the row's index in the source.
        router: of a library; None for its own.
        **options: data, settings, mesh, split and max_rows, as `evaluate` takes them.

    Raises:
        InputError: neither a library nor an assignment, or both; experts that do not stack.
    """
    routed = isinstance(experts, ExpertLibrary)
    if routed == (assignment is not None):
        raise InputError(describe(
            "Rows find their experts through a library, or through an assignment to given experts",
            got="both" if routed else "neither", expected="one of the two"))
    if router is not None and not routed:
        raise InputError(describe("An assignment needs no router", where="router", got=router,
                                  cure="leave it out, or give a library"))
    mixed = mixed_of_library(base, experts, router=router) if routed else mixed_of_assignment(
        [model_of(base, expert) for expert in experts], assignment, "mixed:assignment")
    setup = ScoringSetup.of(base, **options)
    setup.check_metrics(items_of(tasks))
    return [row for result in mixed.score(items_of(tasks), setup) for row in result.rows]
