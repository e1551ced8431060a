"""Mixed evaluation: scores each row with its own expert, chosen by routing or by an assignment."""

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Unpack

from elm_jax.data.registry import registry
from elm_jax.data.sources import row_files
from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.evaluation import stacked_evaluator
from elm_jax.evaluation.results import TaskResult
from elm_jax.experts.base import Base
from elm_jax.experts.library import ExpertLibrary
from elm_jax.experts.overlay import Expert, identity_overlay, resolve
from elm_jax.experts.rendering import shared_rendering
from elm_jax.models.adapters.stacked import Many
from elm_jax.models.network import Network
from elm_jax.routing.cases import RouterSettings
from elm_jax.routing.router import ROUTERS, check_router, default_router
from elm_jax.routing.text import RoutingInstance
from elm_jax.runtime import hosts, storage, trees
from elm_jax.runtime.config_checks import items_of
from elm_jax.runtime.terminal.progress import tell_item
from elm_jax.workflows.choices import NONE_PER
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
from elm_jax.workflows.route import check_row_router, routed_task, with_threshold
from elm_jax.workflows.row_routes import (
    BASE_ID,
    check_none_of_these,
    chosen_experts,
    folder_of_answers,
)
from elm_jax.workflows.target_task import target_options

logger = logging.getLogger(__name__)
Assignment = Mapping[str, Mapping[int, str]]
"""From a task to the expert of each of its rows, by the row's index in the source."""


@dataclasses.dataclass(frozen=True)
class MixedExperts(Scorable):
    """Experts of one base and one shape, and the choice of an expert for each row.

    Attributes:
        members: the experts, and the base itself where it may answer (`base_among`).
        choose: gives the ids of the experts of a task's rows, one a row; the same in every process. A row
            that none of them fits has None.
        otherwise: id of the member that such rows go to; None where it is not asked whether one fits.
    """

    members: tuple[ScoredModel, ...]
    choose: Callable[[str, ScoringSetup], list[str | None]]
    otherwise: str | None = None
    mixed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raises InputError for members that cannot be scored in one program."""
        for member in self.members:
            if member.card is None:
                continue
            if member.expert is None:
                raise _unlike(member.id, f"of form {member.card.form!r}", "experts of the form 'adapter'")
            if member.card.network != self.members[0].card.network:
                raise _unlike(member.id, "another network config", f"that of {self.members[0].id}")

    @property
    def rendering(self) -> str:
        """That of all members; InputError if they differ."""
        return shared_rendering([member.card for member in self.members if member.card is not None],
                                "a mixed evaluation")

    def score(self, tasks: Sequence[str], setup: ScoringSetup) -> Iterator[TaskResult]:
        """Scores each task in batches of rows of many experts; a prediction names its expert."""
        chosen = {task: self.choose(task, setup) for task in tasks}
        used = {name or self.otherwise for names in chosen.values() for name in names}
        members = [member for member in self.members if member.id in used]
        places = {member.id: place for place, member in enumerate(members)}
        network, params = _put_experts([member.expert() for member in members], setup)
        with setup.above_trunk(network, trees.flatten(params[1]), self.id) as (network, scoring):
            for task, fitting in chosen.items():
                names = [name or self.otherwise for name in fitting]
                instances = setup.rows(task, self.rendering, self.id)
                for member in members:
                    warn_of_rows(member.card, instances)
                result = stacked_evaluator.evaluate_task_mixed(
                    network, params, instances, [places[name] for name in names], scoring, self.id)
                tell_item(logger, "%s on %s: %s", self.id, task, ", ".join(
                    f"{count} rows by {name}" for name, count in Counter(names).most_common()))
                places_of = {instances.text(row)["index"]: row for row in range(len(instances))}
                yield self._told(result, fitting, places_of)

    def _told(self, result: TaskResult, fitting: Sequence[str | None], places_of: Mapping[int, int]
              ) -> TaskResult:
        """A result that says who answered each row, and which rows no expert fits if that was asked.

        Args:
            result: of one task.
            fitting: the expert of each row.
            places_of: from a row's index in the source to its place among them.
        """
        predictions = []
        for one in result.predictions:
            name = fitting[places_of[one["index"]]]
            asked = {} if self.otherwise is None else {"none_fits": name is None}
            predictions.append({**one, "expert": name or self.otherwise, **asked})
        if self.otherwise is None:
            return dataclasses.replace(result, predictions=predictions)
        told = {"none_of_these": self.otherwise, "none_fits": fitting.count(None) / len(fitting)}
        return dataclasses.replace(result, predictions=predictions,
                                   rows=[{**row, **told} for row in result.rows])


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


def base_among(base: Base, experts: Sequence[ScoredModel]) -> ScoredModel:
    """The base as one of a stack of experts: by an overlay of their shape that changes nothing.

    It reads inputs in their rendering.
    """
    def as_expert() -> Expert:
        like = experts[0].expert()
        return Expert(dataclasses.replace(like.card, id=BASE_ID), identity_overlay(base, like))

    return ScoredModel(BASE_ID, base.fingerprint, lambda: resolve(base, None), as_expert)


def mixed_of_library(base: Base, library: ExpertLibrary, mixed_id: str | None = None,
                     router: str | None = None, none_of_these: storage.PathLike | Expert | None = None,
                     none_per: str | None = None) -> MixedExperts:
    """Mixed experts of a library: each row is scored by the expert that routing chooses for it alone.

    Args:
        base: that the experts were trained on.
        library: an open library.
        mixed_id: name in the results; None for ``mixed:`` and the library's folder, with ``+`` and who
            answers where none fits.
        router: that decides for each row; None for the library's own. Priors leave the scored task's data set
            and family out.
        none_of_these: who answers a row that none of the experts fits: `BASE_ID`, or an expert, its id in the
            library, or its folder. None does not ask whether one fits.
        none_per: one of `NONE_PER`; None for each row by itself.

    Raises:
        InputError: experts of another base, or such as do not stack; a router that does not decide for rows;
            a library that cannot tell when none of its experts fits.
    """
    check_row_router(router)
    check_none_of_these(none_of_these, none_per, library)
    routed = with_threshold(library.routed(), RouterSettings(none_of_these=none_of_these is not None))
    name = router or default_router(routed)
    check_router(name, routed, queries=True, text=False)
    members = tuple(model_in(base, library.path / "experts" / name) for name in library)
    last = None if none_of_these is None else _last_resort(base, library, members, none_of_these)
    per = None if last is None else none_per or NONE_PER[0]

    def choose(task: str, setup: ScoringSetup) -> list[str | None]:
        data = dataclasses.replace(setup.data, few_shot=0)  # exemplars say nothing of the row
        rows = data.split(task, setup.split_of(task), setup.max_rows)
        instances = [RoutingInstance(**rows.routing_instance(row)) for row in range(len(rows))]
        options = target_options(task, routed, name)
        # In one process: rounding could differ between hosts.
        return hosts.by_first(lambda: chosen_experts(
            routed, routed_task(library, instances, options), name, none_per=per))

    rule = [library.index.digest(), library.encoder.fingerprint, library.text_format]
    if name != "vote":  # a fingerprint of votes is as it was before there were others
        priors = routed.priors if ROUTERS[name].needs_priors else None
        rule += [name, None if routed.copies is None else routed.copies.tolist(), priors and [
            priors.datasets, priors.families, trees.fingerprint({"generality": priors.generality})]]
    own = f"mixed:{library.path.name or 'library'}"
    if last is None:
        return MixedExperts(mixed_id or own, _fingerprint(members, rule), members, choose)
    # What the threshold is fitted on, beside the keys: its own last digits are the machine's.
    rule += ["none of these", last.id, last.fingerprint, per, list(map(sorted, routed.datasets))]
    return MixedExperts(mixed_id or f"{own}+{last.id}", _fingerprint(members, rule),
                        tuple(distinct([*members, last])), choose, last.id)


def _last_resort(base: Base, library: ExpertLibrary, members: Sequence[ScoredModel],
                 answers: storage.PathLike | Expert) -> ScoredModel:
    """Who answers where none of the experts fits, as a member of the stack."""
    if isinstance(answers, Expert):
        return model_of(base, answers)
    folder = folder_of_answers(library, answers)
    return base_among(base, members) if folder is None else model_in(base, folder)


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


class MixedOptions(ScoringOptions, total=False):
    """Options of `evaluate_mixed`: those of `evaluate`, and of a library's choices.

    Attributes:
        router: of a library; None for its own.
        none_of_these: who answers rows that none of a library's experts fits: ``"base"``, or an expert, its
            id in the library, or its folder; None does not ask whether one fits.
        none_per: ``row`` tells so of each row by itself, as None does, ``task`` of all rows of a task.
    """

    router: str | None
    none_of_these: storage.PathLike | Expert | None
    none_per: str | None


def evaluate_mixed(
    base: Base, experts: ExpertLibrary | Sequence[Expert], tasks: Sequence[str], *,
    assignment: Assignment | None = None, **options: Unpack[MixedOptions],
) -> list[dict]:
    """Evaluates tasks with an expert for each row; returns result rows and writes nothing.

    Args:
        base: the base.
        experts: a library, which routes each row by itself; or experts of that base, with an assignment.
        tasks: names of tasks; a string is one name.
        assignment: from a task to the expert's id of each row, by the row's index in the source.
        **options: router, none_of_these and none_per of a library (`MixedOptions`); data, settings, mesh,
            split and max_rows, as `evaluate` takes them.

    Raises:
        InputError: neither a library nor an assignment, or both; experts that do not stack; options that
            have no effect.
    """
    routed = isinstance(experts, ExpertLibrary)
    if routed == (assignment is not None):
        raise InputError(describe(
            "Rows find their experts through a library, or through an assignment to given experts",
            got="both" if routed else "neither", expected="one of the two"))
    choice = {name: options.pop(name, None) for name in ("router", "none_of_these", "none_per")}
    if choice["router"] is not None and not routed:
        raise InputError(describe("An assignment needs no router", where="router", got=choice["router"],
                                  cure="leave it out, or give a library"))
    check_none_of_these(choice["none_of_these"], choice["none_per"], experts if routed else None)
    setup = ScoringSetup.of(base, **options)
    registry.import_tasks(setup.data.modules)  # prepared arrays need none, families of tasks come from there
    mixed = mixed_of_library(base, experts, **choice) if routed else mixed_of_assignment(
        [model_of(base, expert) for expert in experts], assignment, "mixed:assignment")
    setup.check_metrics(items_of(tasks))
    return [row for result in mixed.score(items_of(tasks), setup) for row in result.rows]
