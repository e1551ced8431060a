"""Raw passages for pretraining: which field of which training data set is one.

A raw passage is text that the data set's makers took from somewhere: an article, a review, a
dialogue, a paragraph to be asked about. Never a prompted input, a question, an answer, an
explanation, a summary, or a row of an unseen or generative data set.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from elm_jax.tasks import bbh, bigbench, generative, t0_eval, t0_train

from elm_jax.data.arrays import span_corruption
from elm_jax.data.prompts import templates
from elm_jax.data.registry import registry
from elm_jax.data.sources import row_files

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PassageField:
    """Fields of a data set that, joined line by line, are one raw passage."""

    dataset: str
    config: str | None
    fields: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the data set's mixture."""
        return templates.dataset_name(self.dataset, self.config)


PASSAGES = (
    PassageField("ag_news", None, ("text",)),
    PassageField("cosmos_qa", None, ("context",)),
    PassageField("dbpedia_14", None, ("content",)),
    PassageField("dream", None, ("dialogue",)),
    PassageField("gigaword", None, ("document",)),
    PassageField("glue", "mrpc", ("sentence1",)),
    PassageField("imdb", None, ("text",)),
    PassageField("quail", None, ("context",)),
    PassageField("ropes", None, ("background", "situation")),
    PassageField("sciq", None, ("support",)),
    PassageField("xsum", None, ("document",)),
)


def candidates() -> Iterator[str]:
    """Raw passages of all data sets of the table that have train rows below the data folder.

    Those that have none are named in the log: a base of other passages is another base.
    """
    missing = []
    for field in PASSAGES:
        if row_files.find_split(field.dataset, field.config, "train") is not None:
            yield from row_files.read_passages(field.dataset, field.config, field.fields)
        else:
            missing.append(field.name)
    if missing:
        logger.warning("no passages of %s: the data folder has no train rows of them", ", ".join(missing))


def held_out() -> Iterator[str]:
    """Texts of every row that anything is evaluated on, as far as there are data.

    These are all rows of the unseen, generative and BIG-bench data sets, and the validation rows of the
    training data sets. Rows that a generative data set borrows from a training one count as the latter's.
    """
    generated = [dataset for dataset in (*generative.DATASETS, *generative.TEST_DATASETS)
                 if dataset.source is None]
    held = [(dataset.name, dataset.config, split)
            for datasets, splits in ((t0_eval.DATASETS, ("train", "validation")),
                                     (generated, ("train", "validation", "test")),
                                     (t0_train.DATASETS + t0_train.EXTRA_DATASETS, ("validation",)))
            for dataset in datasets for split in splits]
    held += [(task.dataset, task.config, "test")
             for task in map(registry.get_task, bigbench.TASKS + bigbench.EXTRA_TASKS + bbh.TASKS)]
    for dataset, config, split in held:
        if row_files.find_split(dataset, config, split) is not None:
            for row in row_files.read_rows(dataset, config, split):
                yield from _texts(row)


def _texts(value: Any) -> Iterator[str]:
    """All texts within a row's value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)


def read_passages() -> list[str]:
    """Raw passages for pretraining: the candidates that share no twelve words in a row with `held_out`."""
    found = list(candidates())
    overlaps = span_corruption.check_overlap(found, held_out())
    return [passage for number, passage in enumerate(found) if number not in overlaps]
