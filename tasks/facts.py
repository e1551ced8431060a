"""The form of the registries' tables, and how a table becomes tasks and mixtures."""

import dataclasses
import os
from collections.abc import Iterable, Sequence

from elm_jax.data import registry, templates

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
    """

    name: str
    config: str | None
    rank: tuple[str, ...]
    generation: tuple[str, ...]

    @property
    def templates(self) -> tuple[str, ...]:
        """All templates' names."""
        return self.rank + self.generation


def add_datasets(datasets: Iterable[Dataset], *, role: str, splits: Sequence[str]) -> list[str]:
    """Registers every prompt of every data set, and each data set's prompts as a mixture.

    Args:
        datasets: a table.
        role: one of `registry.ROLES`.
        splits: names of the data sets' splits.

    Returns:
        The tasks' names.
    """
    names = []
    for dataset in datasets:
        templates.check_collisions(dataset.name, dataset.config, dataset.templates)
        tasks = [
            registry.add_prompted_task(
                dataset.name, dataset.config, template, kind=kind, role=role, splits=splits,
                template_folder=TEMPLATE_FOLDER)
            for kind, names_of_kind in (("rank", dataset.rank), ("generation", dataset.generation))
            for template in names_of_kind]
        registry.add_mixture(templates.dataset_name(dataset.name, dataset.config), tasks)
        names += tasks
    return names
