"""The verbs `elm library ...`: libraries of experts and of the training instances that represent them."""

from collections.abc import Sequence

from elm_jax.data.preparing.task_data import TaskData
from elm_jax.data.registry import registry
from elm_jax.errors import InputError, describe
from elm_jax.experts.library import ExpertLibrary
from elm_jax.experts.overlay import load_expert
from elm_jax.experts.template_versions import warn_of_arrays, warn_of_changes
from elm_jax.routing.embed import TextEncoder
from elm_jax.routing.encoders import make_encoder
from elm_jax.routing.text import RoutingInstance, format_text
from elm_jax.runtime import storage
from elm_jax.runtime.config_checks import items_of
from elm_jax.runtime.terminal.progress import StageLine
from elm_jax.workflows.route import draw_instances, drawn_instances


def build_library(
    path: storage.PathLike, expert_folders: Sequence[storage.PathLike], data: TaskData, *,
    encoder: str | TextEncoder = "auto", text_format: str = "choice_instance",
    instances_per_expert: int = 100, seed: int = 0,
) -> ExpertLibrary:
    """Builds a library of experts, with keys from their own training tasks.

    Args:
        path: folder of the new library.
        expert_folders: finished experts of one base; a folder alone is one of them.
        data: where the training instances come from.
        encoder: ``auto``, ``minilm``, ``tfidf``, or an encoder.
        text_format: format of keys and queries.
        instances_per_expert: S, the number of keys of each expert.
        seed: of the draw of instances.
    """
    instances = {str(folder): training_instances(folder, data, instances_per_expert, seed)
                 for folder in items_of(expert_folders)}
    if isinstance(encoder, str):
        texts = [format_text(instance, text_format) for rows in instances.values() for instance in rows]
        encoder = make_encoder(encoder, texts=texts)
    library = ExpertLibrary.create(path, encoder, text_format, instances_per_expert)
    library.add(instances)
    return library


def add_experts(library: ExpertLibrary, expert_folders: Sequence[storage.PathLike], data: TaskData,
                seed: int = 0) -> None:
    """Adds experts to a library, with its own encoder, text format and number of keys."""
    count = library.facts["instances_per_expert"]
    folders, drawn = items_of(expert_folders), {}
    with StageLine("adding", len(folders), "expert") as line:
        for folder in folders:
            drawn[str(folder)] = training_instances(folder, data, count, seed)
            line.step(len(drawn[str(folder)]))
        library.add(drawn)


def training_instances(folder: storage.PathLike, data: TaskData, count: int,
                       seed: int) -> list[RoutingInstance]:
    """Draws S instances of an expert's training tasks, as many of each task (within one)."""
    card = load_expert(folder).card
    tasks = card.tasks
    shares = [count // len(tasks) + (number < count % len(tasks)) for number in range(len(tasks))]
    if not data.needs_arrays:
        registry.import_tasks(data.modules)
        warn_of_changes([card])
    instances = []
    for task, share in zip(tasks, shares, strict=True):
        if share and data.needs_arrays:
            split = data.split(task, "train")
            warn_of_arrays(card, split)
            instances += draw_instances(split, share, seed)
        elif share:
            instances += _rendered(task, share, seed)
    return instances


def _rendered(task: str, count: int, seed: int) -> list[RoutingInstance]:
    """Draws instances of a task's train split by rendering these rows alone."""
    drawn = drawn_instances(registry.get_task(task), "train", count, seed)
    if not drawn:
        raise InputError(describe(f"Task {task} has no row left after rendering", where="split train"))
    return drawn
