"""Compares the templates that an expert was trained with to the templates of today."""

import logging
from collections.abc import Iterable, Sequence

from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.prompts.templates import dataset_path
from elm_jax.data.registry import registry
from elm_jax.data.registry.registry import PromptedTask
from elm_jax.errors import InputError
from elm_jax.experts.card import ExpertCard

logger = logging.getLogger(__name__)


def of_arrays(splits: Sequence[PreparedSplit]) -> dict[str, tuple[str, ...]]:
    """The card's template fields for prepared arrays; no digests if any array has none."""
    digests = [split.info.get("template_digest") for split in splits]
    if None in digests:
        return {}
    return {"template_digests": tuple(digests),
            "template_versions": tuple(split.info.get("template_version", "") for split in splits)}


def of_tasks(tasks: Sequence[PromptedTask]) -> dict[str, tuple[str, ...]]:
    """The card's template fields for registered tasks; none if a template is missing."""
    try:
        return {"template_digests": tuple(task.load_template().digest for task in tasks),
                "template_versions": tuple(task.template_version() or "" for task in tasks)}
    except InputError:
        return {}


def changed(card: ExpertCard) -> list[str]:
    """Lists the templates that changed since the expert was trained, one sentence each; reads no rows.

    A task that is not registered, or whose template is missing, is skipped.
    """
    messages = []
    for name, then in zip(card.tasks, card.template_digests, strict=False):
        if name not in registry.task_names():
            continue
        task = registry.get_task(name)
        now = of_tasks([task])
        if now and now["template_digests"] != (then,):
            messages.append(_message(card, task.template, task.dataset_name, then,
                                     now["template_digests"][0], now["template_versions"][0]))
    return messages


def changed_in_arrays(card: ExpertCard, split: PreparedSplit) -> list[str]:
    """Lists the prepared arrays that were made with another template text than the expert's."""
    digest = split.info.get("template_digest")
    texts = dict(zip(card.tasks, card.template_digests, strict=False))
    then = texts.get(split.name)
    if None in (digest, then) or digest == then:
        return []
    dataset = dataset_path(split.info["dataset"], split.info["config"])
    return [_message(card, split.info["template"], dataset, then, digest, split.info.get("template_version"))]


def _message(card: ExpertCard, template: str, dataset: str, then: str, now: str, version: str | None) -> str:
    return (f"expert {card.id}: the text of template {template!r} of {dataset} has changed since it was "
            f"trained (digest {then} then, {now} now, {version or 'no pinned version'}); give the templates "
            "that it was trained with, or train it again")


def warn_of_changes(cards: Iterable[ExpertCard]) -> None:
    """Logs a warning for every template of an expert whose text has changed since its training."""
    for card in cards:
        for message in changed(card):
            logger.warning(message)


def warn_of_arrays(card: ExpertCard | None, split: PreparedSplit) -> None:
    """Logs a warning if the arrays were made with another text than the expert was trained with."""
    for message in changed_in_arrays(card, split) if card else ():
        logger.warning(message)
