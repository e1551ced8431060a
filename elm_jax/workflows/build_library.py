"""The verbs `elm library ...`: libraries of experts and of the training instances that represent them."""

from collections.abc import Sequence
from typing import TypedDict, Unpack

from elm_jax.data.preparing.task_data import TaskData
from elm_jax.data.registry import registry
from elm_jax.errors import InputError, describe
from elm_jax.experts.library import ExpertLibrary
from elm_jax.experts.library_files import check_means
from elm_jax.experts.overlay import load_expert
from elm_jax.experts.template_versions import warn_of_arrays, warn_of_changes
from elm_jax.routing.embed import TextEncoder
from elm_jax.routing.encoders import make_encoder
from elm_jax.routing.text import RoutingInstance, format_text
from elm_jax.runtime import storage
from elm_jax.runtime.config_checks import check_positive, items_of
from elm_jax.runtime.terminal.progress import StageLine
from elm_jax.workflows.route import draw_instances, drawn_instances


class KeyCounts(TypedDict, total=False):
    """How many keys an expert has.

    Attributes:
        instances_per_expert: S, the number of training instances that are drawn, 100 if not given; each is a
            key.
        means: 1 to 10, of the instances, which are the keys in their place; no training text is kept then.
    """

    instances_per_expert: int
    means: int | None


def build_library(
    path: storage.PathLike, expert_folders: Sequence[storage.PathLike], data: TaskData, *,
    encoder: str | TextEncoder = "auto", text_format: str = "choice_instance",
    seed: int = 0, **counts: Unpack[KeyCounts],
) -> ExpertLibrary:
    """Builds a library of experts, with keys from their own training tasks.

    Args:
        path: folder of the new library.
        expert_folders: finished experts of one base; a folder alone is one of them.
        data: where the training instances come from.
        encoder: ``auto``, ``minilm``, ``tfidf``, or an encoder.
        text_format: format of keys and queries.
        seed: of the draw of instances.
        **counts: see `KeyCounts`.

    Raises:
        InputError: a number that is out of its range; experts, tasks or data that are not there.
    """
    count, means = _checked(**counts)
    instances = {str(folder): training_instances(folder, data, count, seed)
                 for folder in items_of(expert_folders)}
    if isinstance(encoder, str):
        texts = [format_text(instance, text_format) for rows in instances.values() for instance in rows]
        encoder = make_encoder(encoder, texts=texts)
    library = ExpertLibrary.create(path, encoder, text_format, count, means)
    library.add(instances)
    return library


def _checked(instances_per_expert: int = 100, means: int | None = None) -> tuple[int, int | None]:
    """The numbers of instances and of means; InputError before anything is drawn."""
    check_positive(instances_per_expert=instances_per_expert)
    check_means(means)
    return instances_per_expert, means


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
