"""Searches merge weights on a few instances of a task, merges with them, and compares with equal weights.

The instances come from the train split, or from a part of the validation split; a test split is refused. The
used rows are recorded one by one. The found weights and the uniform mean are compared on rows that the search
did not see.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from elm_jax.data.arrays.batch_forms import form_of
from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.draw import draw_rows
from elm_jax.data.preparing.task_data import TaskData
from elm_jax.data.prompts.templates import dataset_path
from elm_jax.errors import InputError, describe
from elm_jax.evaluation.evaluator import EvaluationSettings, Scoring, evaluate_task
from elm_jax.evaluation.intervals import paired_difference
from elm_jax.experts.base import Base, load_base
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.overlay import Expert, load_expert, resolve, write_expert
from elm_jax.experts.rendering import frame_of, shared_rendering
from elm_jax.merging import weight_search
from elm_jax.merging.methods import low_rank_products, method_table
from elm_jax.merging.weight_search import Evolution, Found
from elm_jax.models import families
from elm_jax.models.adapters.low_rank import DOWN, UP, merged_config, place_of
from elm_jax.models.network import Network
from elm_jax.runtime import hosts, locks, sharding, staging, storage, trees
from elm_jax.types import Params
from elm_jax.workflows.merge import absent_layers, search_objective
from elm_jax.workflows.merge.in_memory import merge
from elm_jax.workflows.merge.merge_overlays import is_low_rank
from elm_jax.workflows.merge.search_config import SearchConfig, check_split
from elm_jax.workflows.merge.search_objective import MergeData, MergeObjective

logger = logging.getLogger(__name__)
SCHEMA_VERSION = 1
REPORT = "search.json"
LOG_EVERY = 10


@dataclasses.dataclass(frozen=True)
class Instances:
    """The rows that a search uses, and the rows on which its result is compared.

    Attributes:
        split: the split that is searched on.
        rows: numbers of the searched rows in it, ascending.
        held_back: rows that are not among them; None where there are none or no comparison is wanted.
    """

    split: PreparedSplit
    rows: tuple[int, ...]
    held_back: PreparedSplit | None

    def indices(self) -> list[int]:
        """Indices of the searched rows in the source."""
        return indices_of(self.split, self.rows)


def indices_of(split: PreparedSplit, rows: Sequence[int]) -> list[int]:
    """Indices of some rows in the source."""
    return [split.text(row)["index"] for row in rows]


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """The found weights, the rows of the search, and the comparison on other rows.

    Attributes:
        weights: f[E], as `merge` takes them; those of equal weights if none were better.
        found: objective, history and evaluations of the search.
        report: all of it, JSON-ready; what `search_and_merge` writes beside the merged expert.
    """

    weights: tuple[float, ...]
    found: Found
    report: dict[str, Any]


def choose_instances(config: SearchConfig, data: TaskData) -> Instances:
    """Draws the rows to search on by the seed, and sets apart rows for the comparison.

    A search on the train split is compared on the validation split, if the task has one; otherwise on the
    rows that are left.

    Raises:
        InputError: a test split, or too few rows.
    """
    check_split(config.split)
    train = config.split == "train"
    split = data.split(config.task, config.split, None if train else config.max_rows)
    answered = not (config.labelled and split.kind == "rank")
    usable = [row for row in range(len(split)) if answered or split.label(row) >= 0]
    if len(usable) < config.num_examples + (not train):
        raise InputError(describe(
            "There are too few rows to search on", where=f"{config.task} {config.split}", got=len(usable),
            expected=f"{config.num_examples} to search on" + ("" if train else ", and some to hold back")))
    rows = sorted(usable[place] for place in draw_rows(len(usable), config.num_examples, config.seed))
    return Instances(split, tuple(rows), _held_back(config, data, split, rows) if config.compare else None)


def _held_back(config: SearchConfig, data: TaskData, split: PreparedSplit, rows: Sequence[int]
               ) -> PreparedSplit | None:
    if config.split == "train" and data.has_rows(config.task, "validation", config.max_rows):
        return data.split(config.task, "validation", config.max_rows)
    searched = set(indices_of(split, rows))  # an index that comes twice is one instance
    rest = [row for row in range(len(split)) if split.text(row)["index"] not in searched]
    if config.split == "train" and config.max_rows is not None:
        rest = sorted(rest[place] for place in draw_rows(len(rest), config.max_rows, config.seed))
    return split.take(rest) if rest else None


def search_weights(config: SearchConfig, *, base: Base | None = None, experts: Sequence[Expert] | None = None,
                   data: TaskData | None = None, mesh: Mesh | None = None) -> SearchResult:
    """Searches merge weights on a few instances, and compares them with the uniform mean on others.

    Args:
        config: the search.
        base: the base, if it is loaded already.
        experts: the experts, if they are loaded already.
        data: the task data, if they are there already.
        mesh: instances are split over its data axis; by default all devices.

    Raises:
        InputError: fewer than two experts, experts that do not fit together or to the base, a test split,
            too few rows.
        RunError: an objective that is not finite.
    """
    start = time.monotonic()
    mesh = mesh or sharding.make_mesh(len(jax.devices()), 1)
    base = base or load_base(config.base)
    experts = list(experts or map(load_expert, config.experts))
    data = data or TaskData(base.vocabulary, config.modules, config.prepared_dir)
    rendering = shared_rendering([expert.card for expert in experts], "a search for weights")
    frame = frame_of(base, rendering, config.source_length, "the experts' cards")
    data = data if frame is None else data.with_frame(frame)
    uniform = merge(experts, base=base)  # all checks, and the merge that every other is compared with
    instances = choose_instances(config, data)
    network, shared, overlays = mergeable(base, experts, config.method)
    method = method_table.get_method(config.method)
    objective = MergeObjective(
        network, config.method, instances.split.kind, config.labelled, config.l1,
        tuple(sorted(config.parameters.items())),
        tuple(trees.fingerprint(one.overlay) for one in experts) if method.sparsify == "random" else None)
    batches = search_objective.make_batches(instances.split, instances.rows, labelled=config.labelled,
                                            settings=config.settings, form=form_of(network),
                                            data_axis=mesh.shape["data"])
    placed = search_objective.make_data(network, shared, overlays, batches, mesh,
                                        needs_base=method.needs_base)
    found = _run(config, objective, placed, len(experts))
    mean, uniform_mean = dataclasses.replace(objective, method="mean", l1=0.0, parameters=()), found.start
    # The mean of one expert is the expert itself, which a sparsifying method would not return.
    alone = hosts.whole(weight_search.score_population(
        mean, np.eye(len(experts), dtype=np.float32), placed, config.at_once))
    if mean != objective:
        equal = np.full((1, len(experts)), 1 / len(experts), np.float32)
        uniform_mean = float(hosts.whole(weight_search.score_population(mean, equal, placed))[0])
    report = {
        "schema_version": SCHEMA_VERSION, "task": config.task,
        "dataset": dataset_of(instances.split), "split": config.split,
        "rows": instances.indices(), "labelled": config.labelled, "method": config.method,
        "parameters": config.parameters, "search": config.search, "seed": config.seed, "steps": config.steps,
        **({"learning_rate": config.learning_rate} if config.search == "gradient"
           else {"population": config.population}),
        "l1": config.l1, "source_length": config.source_length, "base": base.fingerprint,
        "objective": {
            "name": search_objective.KINDS[instances.split.kind, config.labelled],
            "found": found.objective, "start": found.start,
            "uniform_mean": uniform_mean,
            "alone": [float(value) for value in alone],
            "history": list(found.history), "evaluations": found.evaluations},
        "experts": [{"id": expert.card.id, "weight": weight}
                    for expert, weight in zip(experts, found.weights, strict=True)],
        "seconds": time.monotonic() - start,
    }
    del placed
    if instances.held_back is not None:
        merged = merge(experts, method=config.method, weights=found.weights, base=base, **config.parameters)
        report["held_back"] = compare(base, uniform, merged, instances.held_back, config.settings, mesh)
    return SearchResult(found.weights, found, report)


def mergeable(base: Base, experts: Sequence[Expert], method: str) -> tuple[Network, Params, list[Params]]:
    """Prepares experts for merging: network, leaves that all merges share, and overlays to merge.

    Low-rank updates are merged through their products: here as updates of the summed rank (`side_by_side`).

    Raises:
        InputError: an overlay that does not fit, or low-rank updates by a method that is no weighted sum.
    """
    networks = [resolve(base, expert)[0] for expert in experts]
    flat = [trees.flatten(expert.overlay) for expert in experts]
    prefixes = sorted({path.removesuffix(DOWN) for own in flat for path in own
                       if is_low_rank(path, experts[0].card) and path.endswith(DOWN)})
    if not prefixes:
        return networks[0], base.params, [expert.overlay for expert in experts]
    row = method_table.get_method(method)
    if not row.is_weighted_sum:
        raise InputError(describe("Of low-rank updates only weighted sums can be searched", got=method,
                                  expected="mean, linear or task_arithmetic"))
    if absent_layers.unlike([expert.card for expert in experts]):
        raise InputError(describe(
            "Weights of low-rank updates in unlike layers cannot be searched", got=", ".join(
                f"{expert.card.id}: {expert.card.network['adapter'].get('layers', 'all')}"
                for expert in experts), expected="updates in the same layers",
            cure="train the experts with one ADAPTER_LAYERS, or merge them with --weights"))
    adapters = [families.config_of(expert.card.network).adapter for expert in experts]
    shared, ranks = trees.flatten(base.params), {}
    for prefix in prefixes:
        downs, ups = low_rank_products.without_gaps(*(
            [own.pop(prefix + end, None) for own in flat] for end in (DOWN, UP)))
        place = place_of(prefix + DOWN)
        scales = [each.scale_of(place) for each in adapters]
        shared[prefix + DOWN], wide = low_rank_products.side_by_side(downs, ups, scales)
        ranks[place] = shared[prefix + DOWN].shape[1]
        for own, up in zip(flat, wide, strict=True):
            own[prefix + UP] = up
    adapter = merged_config(ranks, layers=adapters[0].layers)
    network = families.network_of(networks[0].config.with_adapter(adapter))
    return network, trees.unflatten(shared), [trees.unflatten(own) for own in flat]


def _run(config: SearchConfig, objective: MergeObjective, data: MergeData, count: int) -> Found:
    def report(step: int, value: float) -> None:
        if step % LOG_EVERY == 0 or step == config.steps:
            logger.info("%s, step %d of %d: objective %.4f", config.search, step, config.steps, value)

    if config.search == "gradient":
        return weight_search.by_gradient(objective, data, count, space=config.space, steps=config.steps,
                                         learning_rate=config.learning_rate, report=report)
    how = Evolution(config.steps, config.population, config.seed, config.at_once)
    return weight_search.by_evolution(objective, data, count, space=config.space, how=how, report=report)


def compare(base: Base, uniform: Expert, merged: Expert, split: PreparedSplit, settings: EvaluationSettings,
            mesh: Mesh) -> dict[str, Any]:
    """Scores the uniform mean and another merge on the same rows; adds the interval of their difference.

    Scores have Wilson's interval, their difference the paired bootstrap's.
    """
    values, rows = {}, {}
    scoring = Scoring(settings, base.vocabulary, mesh, base.fingerprint)
    for name, expert in (("uniform_mean", uniform), ("found", merged)):
        network, params = resolve(base, expert)
        params = sharding.put_tree(params, sharding.tree_shardings(network.logical_axes(), params, mesh))
        result = evaluate_task(network, params, split, scoring, expert.card.id)
        rows[name] = result.rows[0]
        values[name] = np.asarray([one.get("correct", one.get("rouge_l")) for one in result.predictions])
        del params
    difference = paired_difference([(values["found"] - values["uniform_mean"])[:, None]])
    measured = {name: {"value": row["value"], "ci95_low": row["ci95_low"], "ci95_high": row["ci95_high"]}
                for name, row in rows.items()}
    return {"split": split.split, "num_rows": len(split), "metric": rows["found"]["metric"],
            "rows": indices_of(split, range(len(split))), **measured,
            "difference": {"value": difference.value, "ci95_low": difference.low,
                           "ci95_high": difference.high, "interval": "paired bootstrap"}}


def search_and_merge(config: SearchConfig, output: storage.PathLike, *, base: Base | None = None,
                     experts: Sequence[Expert] | None = None, data: TaskData | None = None,
                     mesh: Mesh | None = None) -> tuple[Expert, SearchResult]:
    """Searches weights, merges with them and saves the expert; its card and ``search.json`` name the rows.

    Args:
        config: the search.
        output: folder of the merged expert, which does not exist; it gets its name when it is whole.
        base, experts, data, mesh: as for `search_weights`.

    Raises:
        InputError: as for `search_weights`, or the output exists, or another process is writing it; nothing
            is written then.
        RunError: an objective that is not finite.
    """
    with locks.alone(output):  # also while it searches: a second one is refused before its work
        return _search_and_merge(config, output, base, experts, data, mesh)


def _search_and_merge(config: SearchConfig, output: storage.PathLike, base: Base | None,
                      experts: Sequence[Expert] | None, data: TaskData | None, mesh: Mesh | None
                      ) -> tuple[Expert, SearchResult]:
    """Does as `search_and_merge`, in a folder that no other process writes."""
    staging.check_free(output)
    base = base or load_base(config.base)
    experts = list(experts or map(load_expert, config.experts))
    result = search_weights(config, base=base, experts=experts, data=data, mesh=mesh)
    merged = merge(experts, method=config.method, weights=result.weights, base=base,
                   expert_id=config.expert_id, **config.parameters)
    told = ("task", "dataset", "split", "rows", "labelled", "search", "seed", "steps")
    card = dataclasses.replace(merged.card, training={
        "weight_search": {name: result.report[name] for name in told}})
    merged = dataclasses.replace(merged, card=card, path=str(output))

    def save() -> None:
        with staging.staged(output) as folder:
            storage.write_json(folder / REPORT, result.report)
            write_expert(folder, merged)  # its marker comes last

    hosts.barrier()  # until all have seen that the name is free
    hosts.by_first(save)
    return merged, result


def warn_of_searched_rows(card: ExpertCard | None, instances: PreparedSplit) -> None:
    """Logs a warning if rows are scored on which a merged expert's weights were searched."""
    found = card.training.get("weight_search", {}) if card is not None else {}
    if found.get("split") != instances.split or found.get("dataset") != dataset_of(instances):
        return
    rows = set(found["rows"])
    shared = sum(index in rows for index in indices_of(instances, range(len(instances))))
    if shared:
        logger.warning("the merge weights of %s were searched on %d of the %d rows of %s %s that are scored: "
                       "its result there is optimistic", card.id, shared, len(instances), instances.name,
                       instances.split)


def dataset_of(split: PreparedSplit) -> str:
    """Name of a split's data set, as results have it."""
    return dataset_path(split.info["dataset"], split.info.get("config"))
