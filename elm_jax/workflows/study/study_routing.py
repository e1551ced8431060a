"""The routing stage of a study: decisions for target tasks, and how often routing finds the own dataset."""

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from elm_jax.data.preparing.task_data import TaskData
from elm_jax.data.registry import registry
from elm_jax.experts.library import ExpertLibrary
from elm_jax.reporting.study_facts import RoutingRecord
from elm_jax.routing.embed import TextEncoder, TfidfEncoder
from elm_jax.routing.encoders import find_minilm, make_encoder
from elm_jax.routing.index import KeyIndex
from elm_jax.routing.text import RoutingInstance, format_text
from elm_jax.routing.vote import RoutingDecision, decide
from elm_jax.runtime import records, storage
from elm_jax.runtime.terminal.progress import StageLine
from elm_jax.workflows.route import draw_instances, route
from elm_jax.workflows.study.study_checks import BENCHMARK_FIELDS
from elm_jax.workflows.study.study_config import StudyConfig

logger = logging.getLogger(__name__)


def route_study(config: StudyConfig, library: ExpertLibrary, data: TaskData,
                path: storage.PathLike) -> dict[str, Any]:
    """Routes every task of a study, and measures routing on tasks whose dataset is known.

    Returns:
        ``decisions``: from task to its ranking and top k. ``figures``: rows of
        ``{encoder, text_format, queries, same_dataset, num_tasks}``, where same_dataset is the share
        of tasks that are sent to an expert of the same dataset. Kept in `path`; read back if there.
    """
    path = storage.as_path(path)
    if path.exists():
        return records.read_record(path, RoutingRecord, kind="routing record")
    targets = [*config.prompt_tasks, *config.target_tasks]
    decisions = {}
    with StageLine("routing", len(targets), "task") as line:
        for task in targets:
            decisions[task] = route(library, queries(config, data, task), num_queries=config.num_queries)
            line.step()
        figures = routing_figures(config, library, data)
    record = {
        "schema_version": 1,
        "decisions": {task: {"top_k": decision.top(config.top_k), **decision.to_dict()}
                      for task, decision in decisions.items()},
        "figures": figures,
    }
    storage.write_json(path, record)
    return record


def settings_of(config: StudyConfig) -> dict[str, Any]:
    """The settings on which a study's routing depends; if one changes, routing is done again."""
    settings = {"queries": config.num_queries, "top_k": config.top_k, "rows": config.max_eval_rows,
                "seed": config.random_seed, "seen": config.prompt_tasks, "unseen": config.unseen_tasks,
                "generative": config.generative_tasks, "heldout": config.heldout_prompts}
    for field in BENCHMARK_FIELDS:  # not in the records of older studies, which had none
        if tasks := getattr(config, field):
            settings[field.removesuffix("_tasks")] = tasks
    return settings


def library_settings_of(config: StudyConfig) -> dict[str, Any]:
    """The settings on which a study's library depends."""
    settings = {"encoder": config.encoder, "text_format": config.text_format,
                "instances": config.instances_per_expert, "seed": config.random_seed}
    if config.means_per_expert is not None:  # not in the records of older studies
        settings["means"] = config.means_per_expert
    return settings


def queries(config: StudyConfig, data: TaskData, task: str) -> list[RoutingInstance]:
    """Draws Q instances of a task's own evaluation split by the study's seed."""
    rows = data.split(task, data.evaluation_split(task), config.max_eval_rows)
    return draw_instances(rows, config.num_queries, config.random_seed)


def routing_figures(config: StudyConfig, library: ExpertLibrary, data: TaskData) -> list[dict[str, Any]]:
    """Share of seen tasks, and of held-out prompts of seen datasets, routed to their own dataset.

    By the library's encoder and another one, each with two text formats; of a library of means, which has no
    texts to embed again, by its own encoder and format alone.
    """
    texts = [RoutingInstance(row["source"], row["choices_expression"], tuple(row["labels"]))
             for row in library.instances]
    encoders: list[TextEncoder] = [library.encoder]
    formats = ("choice_instance", "instance") if library.means is None else (library.text_format,)
    if library.means is not None:
        logger.warning("The library keeps means and no texts: how another encoder, or another text format, "
                       "routes is left out")
    elif library.encoder.name != TfidfEncoder.name:
        encoders.append(make_encoder("tfidf", texts=[
            format_text(instance, config.text_format) for instance in texts]))
    elif find_minilm() is not None:
        encoders.insert(0, make_encoder("minilm", texts=()))
    encoders = [RememberingEncoder(encoder) for encoder in encoders]
    homes = {name: registry_dataset(entry.card.tasks[0]) for name, entry in library.entries.items()}
    rows = []
    for encoder in encoders:
        for text_format in formats:
            index = index_of(library, texts, encoder, text_format)
            for label, tasks in (("seen prompts", config.prompt_tasks),
                                 ("prompts that no expert saw", config.heldout_prompts)):
                if tasks:
                    rows.append(_figure(config, data, encoder, index, homes, label, tasks))
    for label, tasks in (("seen prompts", config.prompt_tasks),
                         ("prompts that no expert saw", config.heldout_prompts)):
        if tasks:
            chance = [sum(home == registry_dataset(task) for home in homes.values()) / len(homes)
                      for task in tasks]
            rows.append({"encoder": "random pick", "text_format": "-", "queries": label,
                         "same_dataset": sum(chance) / len(chance), "num_tasks": len(tasks)})
    return rows


class RememberingEncoder:
    """An encoder that caches embeddings by text: held-out and seen prompts share library and queries."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.name, self.fingerprint = encoder.name, encoder.fingerprint
        self.dimension, self._encoder = encoder.dimension, encoder
        self._rows: dict[str, np.ndarray] = {}

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts as unit rows f32[N, K], each text once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._rows]
        if new:
            self._rows.update(zip(new, self._encoder.embed(new), strict=True))
        return np.stack([self._rows[text] for text in texts])


def index_of(library: ExpertLibrary, texts: Sequence[RoutingInstance], encoder: TextEncoder,
             text_format: str) -> KeyIndex:
    """A library's index, or its instances embedded by another encoder or in another format."""
    if (encoder.fingerprint, text_format) == (library.encoder.fingerprint, library.text_format):
        return library.index
    own: dict[str, list[str]] = {name: [] for name in library}
    for instance, row in zip(texts, library.instances, strict=True):
        own[row["expert"]].append(format_text(instance, text_format))
    empty = KeyIndex.empty(encoder, text_format)
    return empty.add_all({name: encoder.embed(rows) for name, rows in own.items()})


def _figure(config: StudyConfig, data: TaskData, encoder: TextEncoder, index: KeyIndex,
            homes: dict[str, str], label: str, tasks: Sequence[str]) -> dict[str, Any]:
    """Measures the share of tasks routed to their own dataset, by an index in its own text format."""
    hits = []
    for task in tasks:
        vectors = encoder.embed([format_text(i, index.text_format) for i in queries(config, data, task)])
        decision: RoutingDecision = decide(vectors, index)
        hits.append(homes[decision.ranking[0].expert] == registry_dataset(task))
    return {"encoder": encoder.name, "text_format": index.text_format, "queries": label,
            "same_dataset": sum(hits) / len(hits), "num_tasks": len(tasks)}


def registry_dataset(task: str) -> str:
    """Name of the dataset (with config) of a registered task."""
    return registry.get_task(task).dataset_name


def merged_id(members: Sequence[str]) -> str:
    """Id of the merged expert of a set of experts, in any order: the mean does not depend on it."""
    digest = hashlib.sha256("\n".join(sorted(members)).encode()).hexdigest()[:10]
    return f"roe{len(members)}-{digest}"


def merged_sets(routing: dict[str, Any]) -> dict[str, list[str]]:
    """Ids of the merged experts of all decisions; members are in the order of the first decision for them."""
    sets: dict[str, list[str]] = {}
    for decision in routing["decisions"].values():
        sets.setdefault(merged_id(decision["top_k"]), decision["top_k"])
    return sets
