"""The form of the registries' tables, and how a table becomes tasks and mixtures."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence

from elm_jax.tasks.pins import versions_of
from elm_jax.tasks.recipes import recipe_of

from elm_jax.data.prompts import templates
from elm_jax.data.registry import registry
from elm_jax.evaluation.evaluation_settings import KNOWN_METRICS

TEMPLATE_FOLDER = os.path.join(os.path.dirname(__file__), "templates")
"""Templates of our own, in promptsource's layout, for data sets that promptsource has none for."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One data set and the names of its templates, to the letter.

    Attributes:
        name: as in the Hugging Face hub.
        config: its config, None without one.
        rank: templates with answer choices that accuracy measures.
        generation: all others.
        extra: those of both that the published comparison leaves out.
        source: data set and config whose rows these are, None for its own.
        metrics: to score its tasks by beside accuracy or ROUGE-L, as far as they are of their kind.
        references: field that lists all right texts of a row, where a task writes one of them.
    """

    name: str
    config: str | None
    rank: tuple[str, ...]
    generation: tuple[str, ...]
    extra: tuple[str, ...] = ()
    source: tuple[str, str | None] | None = None
    metrics: tuple[str, ...] = ()
    references: str | None = None

    @property
    def templates(self) -> tuple[str, ...]:
        """All templates' names."""
        return self.rank + self.generation

    @property
    def key(self) -> str:
        """``<dataset>[_<config>]``, the name of its mixture."""
        return templates.dataset_name(self.name, self.config)


def add_datasets(
    datasets: Iterable[Dataset], *, role: str, splits: Sequence[str], extra_role: str | None = None,
    categories: Mapping[str, str] | None = None,
) -> list[str]:
    """Registers every prompt of every data set, and each data set's prompts as a mixture.

    A data set's mixture holds its prompts of the role, and all of them where none is of it.

    Args:
        datasets: a table.
        role: one of `registry.ROLES`.
        splits: names of the data sets' splits.
        extra_role: role of the prompts that the comparison leaves out.
        categories: from a data set's key to its category.

    Returns:
        The names of the tasks of the role.
    """
    names = []
    for dataset in datasets:
        templates.check_collisions(dataset.name, dataset.config, dataset.templates)
        own = {template: _add(dataset, template, extra_role if template in dataset.extra else role, splits,
                              (categories or {}).get(dataset.key))
               for template in dataset.templates}
        kept = [name for template, name in own.items() if template not in dataset.extra]
        registry.add_mixture(dataset.key, kept)
        names += kept
    return names


def _add(dataset: Dataset, template: str, role: str, splits: Sequence[str], category: str | None) -> str:
    kind = "rank" if template in dataset.rank else "generation"
    return registry.add_prompted_task(
        dataset.name, dataset.config, template, kind=kind, role=role, splits=splits,
        template_folder=TEMPLATE_FOLDER, source=dataset.source, category=category,
        recipe=recipe_of(dataset.key) if role not in registry.EVALUATION_ONLY else None,
        versions=versions_of, lists=registry.RowLists(references=dataset.references),
        metrics=[name for name in dataset.metrics if name in KNOWN_METRICS[kind]])
