"""Pretraining objectives, by the form of batches that a network takes.

Encoder-decoders learn span corruption and prefix language modelling; decoder-only networks learn plain causal
language modelling.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

from elm_jax.data.arrays.batches import Lengths, check_lengths
from elm_jax.data.arrays.causal_text import CausalSource
from elm_jax.data.arrays.cursor import ExampleSource
from elm_jax.data.arrays.span_corruption import PretrainingSource
from elm_jax.errors import InputError, describe
from elm_jax.models import families
from elm_jax.models.network import JOINED, TWO_SIDED, NetworkConfig, context_of, ids_of
from elm_jax.vocabularies.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class PretrainingSettings:
    """How passages become examples; None is the objective's default.

    Attributes:
        lengths: ``{'inputs': S, 'targets': T}``.
        chunk_length: tokens of one piece of passage.
        prefix_lm_share: share of prefix-LM examples; the others are span corruption.
        seed: of the noise.
    """

    lengths: Lengths
    chunk_length: int | None
    prefix_lm_share: float | None
    seed: int


class Examples(NamedTuple):
    """Pretraining examples and the lengths of the rows that hold them."""

    source: ExampleSource
    lengths: Lengths


class Objective(Protocol):
    """A pretraining objective: makes examples of passages for one form of batches.

    Attributes:
        defaults: of the settings that may be None.
    """

    defaults: ClassVar[Mapping[str, Any]]

    def check(self, settings: PretrainingSettings, network: NetworkConfig) -> None:
        """Raises InputError for a setting that the objective cannot take, before anything is read."""

    def examples(self, texts: Iterable[str], vocabulary: Vocabulary, settings: PretrainingSettings,
                 network: NetworkConfig) -> Examples:
        """Makes the examples of passages.

        Raises:
            InputError: the passages or the vocabulary do not do.
        """


class SpanCorruption:
    """Span corruption and prefix language modelling (see `Objective`)."""

    defaults: ClassVar[Mapping[str, Any]] = {"chunk_length": 128, "prefix_lm_share": 0.5}

    def check(self, settings: PretrainingSettings, network: NetworkConfig) -> None:
        """Raises InputError for a share that is not from 0 to 1."""
        del network
        if not 0.0 <= settings.prefix_lm_share <= 1.0:
            raise InputError(describe("Config value is out of range", where="prefix_lm_share",
                                      got=settings.prefix_lm_share, expected="0 to 1"))

    def examples(self, texts: Iterable[str], vocabulary: Vocabulary, settings: PretrainingSettings,
                 network: NetworkConfig) -> Examples:
        """Makes one example of each chunk, with new noise in every epoch."""
        del network
        source = PretrainingSource.from_texts(
            texts, vocabulary, chunk_length=settings.chunk_length,
            prefix_lm_share=settings.prefix_lm_share, seed=settings.seed)
        return Examples(source, settings.lengths)


class CausalModelling:
    """Plain causal language modelling, with loss on every token (see `Objective`).

    A row holds S + T tokens: passages side by side, each a segment. The part of a row's inputs is what stands
    in front of a chunk; the rest is the targets'.
    """

    defaults: ClassVar[Mapping[str, Any]] = {"chunk_length": None, "prefix_lm_share": None}

    def check(self, settings: PretrainingSettings, network: NetworkConfig) -> None:
        """Raises InputError for a share of prefix-LM, a row above the context, a chunk above a row."""
        if settings.prefix_lm_share is not None:
            raise InputError(describe(
                "prefix_lm_share is of encoder-decoders' pretraining", where="prefix_lm_share",
                got=settings.prefix_lm_share, expected="None: a decoder predicts every token of a passage",
                cure="leave it out"))
        row, context = sum(check_lengths(settings.lengths, "task_feature_lengths")), context_of(network)
        if context is not None and row > context:
            raise InputError(describe("Rows are longer than the network's context",
                                      where="task_feature_lengths", got=f"inputs + targets = {row} tokens",
                                      expected=f"at most {context}", cure="make either shorter"))
        room = _lengths(settings, network)["targets"]
        if room < 2 or (settings.chunk_length or 1) > room:
            raise InputError(describe(
                "A chunk does not fit into a row", where="chunk_length and task_feature_lengths",
                got=f"chunks of {settings.chunk_length or 2} tokens in rows of inputs + targets = {row}",
                expected=f"at most {room} tokens, and at least room for 2: what stands in front takes "
                f"{row - room}", cure="choose shorter chunks, longer rows, or leave chunk_length out"))

    def examples(self, texts: Iterable[str], vocabulary: Vocabulary, settings: PretrainingSettings,
                 network: NetworkConfig) -> Examples:
        """Makes one example of each chunk; chunks are as long as a row where no length is given."""
        lengths = _lengths(settings, network)
        length = settings.chunk_length or lengths["targets"]
        return Examples(CausalSource.from_texts(texts, vocabulary, chunk_length=length), lengths)


def _lengths(settings: PretrainingSettings, network: NetworkConfig) -> dict[str, int]:
    """Parts of a row: BOS, where there is one, and one token in front of a chunk, and the chunk."""
    front = 1 if ids_of(network).bos is None else 2
    return {"inputs": front, "targets": sum(check_lengths(settings.lengths)) - front}


OBJECTIVES: dict[str, Objective] = {TWO_SIDED: SpanCorruption(), JOINED: CausalModelling()}


def objective_of(network: NetworkConfig) -> Objective:
    """Returns the pretraining objective of a network."""
    return OBJECTIVES[families.network_of(network).batches]


def fill_defaults(config: Any) -> Objective:
    """Gives fields of a frozen config that are None the defaults of the objective of its network.

    Args:
        config: a dataclass with `network` and the fields that `Objective.defaults` names.

    Returns:
        The objective.
    """
    objective = objective_of(config.network)
    for name, default in objective.defaults.items():
        if getattr(config, name) is None:
            object.__setattr__(config, name, default)
    return objective
