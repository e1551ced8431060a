"""Which models a study scores on which tasks, and the facts that its report needs beside the results."""

from collections.abc import Mapping, Sequence
from typing import Any

from elm_jax.data.registry import registry
from elm_jax.experts.card import ExpertCard
from elm_jax.models import families
from elm_jax.workflows.evaluate.evaluate_models import BASE_ID
from elm_jax.workflows.study.study_config import StudyConfig
from elm_jax.workflows.study.study_routing import merged_id
from elm_jax.workflows.study.study_runs import MULTITASK_ID

ALL_DATASETS_ID = "merged_dataset_experts"


def tasks_to_score(config: StudyConfig, trained: Sequence[str], routing: Mapping[str, Any],
                   dataset_tasks: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Tasks that each model of a study is scored on, by the model's id.

    Args:
        config: the study.
        trained: ids of the experts and of the baseline; they are scored on everything, as the base is.
        routing: of `route_study`; a merged expert is scored on the tasks that were routed to it.
        dataset_tasks: by data set, all of its prompts; its expert is scored on them too.
    """
    everything = [*config.prompt_tasks, *config.target_tasks]
    tasks_of = {name: list(everything) for name in (*trained, BASE_ID, ALL_DATASETS_ID)}
    for task, decision in routing["decisions"].items():
        if task in everything:
            tasks_of.setdefault(merged_id(decision["top_k"]), []).append(task)
    for name, tasks in dataset_tasks.items():
        own = tasks_of[f"{name}-de"]
        own.extend(task for task in tasks if task not in own)
    return tasks_of


def facts_of_models(cards: Sequence[ExpertCard], library: Sequence[str]) -> dict[str, Any]:
    """Facts for the report: the experts of a study, and the ids of its other models.

    Args:
        cards: of all experts.
        library: ids of those that RoE picks from.
    """
    return {
        "experts": [{"id": card.id, "kind": card.kind, "dataset": card.dataset,
                     "tasks": list(card.tasks)} for card in cards],
        "library": list(library),
        "base": BASE_ID, "multitask": MULTITASK_ID, "merged_datasets": ALL_DATASETS_ID,
    }


def facts_of_tasks(config: StudyConfig, absent: Sequence[Mapping[str, str]],
                   dataset_tasks: Mapping[str, Sequence[str]], multitask: Sequence[str]) -> dict[str, Any]:
    """Facts for the report: the tasks of a study by their role.

    Args:
        config: the study.
        absent: tasks that cannot be scored, see `study_checks.absent_tasks`.
        dataset_tasks: by data set, the tasks of its expert.
        multitask: the tasks of the baseline.
    """
    return {
        "seen_tasks": list(config.prompt_tasks), "unseen_tasks": list(config.unseen_tasks),
        "generative_tasks": list(config.generative_tasks),
        "bigbench_tasks": list(config.bigbench_tasks), "bbh_tasks": list(config.bbh_tasks),
        "absent_tasks": absent, "dataset_tasks": dataset_tasks, "multitask_tasks": multitask,
        "categories": {task: registry.get_task(task).category for task in config.prompt_tasks},
    }


def facts_of_routing(routing: Mapping[str, Any]) -> dict[str, Any]:
    """Facts for the report: each task's decision and merged expert, and how often routing finds home."""
    return {
        "decisions": {task: {**decision, "merged": merged_id(decision["top_k"])}
                      for task, decision in routing["decisions"].items()},
        "routing_figures": routing["figures"],
    }


def plain(config: StudyConfig) -> dict[str, Any]:
    """A study's config as plain values, without its work folder."""
    return {name: value for name, value in families.plain_settings(config).items() if name != "workdir"}
