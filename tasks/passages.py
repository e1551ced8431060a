"""Raw passages for pretraining: which field of which training data set is one.

A raw passage is text that the data set's makers took from somewhere: an article, a review, a
dialogue, a paragraph to be asked about. Never a prompted input, a question, an answer, an
explanation, a summary, or a row of an unseen or generative data set.
"""

import dataclasses
from collections.abc import Iterator

from elm_jax.data import sources, templates


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


def read_passages() -> Iterator[str]:
    """Raw passages of all data sets of the table that have train rows below the data folder."""
    for field in PASSAGES:
        if sources.find_file(field.dataset, field.config, "train") is not None:
            yield from sources.read_passages(field.dataset, field.config, field.fields)
