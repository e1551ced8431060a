"""The base: a full parameter tree with its network config and its vocabulary."""

import dataclasses
from typing import Any

from elm_jax import storage, trees
from elm_jax.data.vocabulary import Vocabulary
from elm_jax.errors import InputError, describe
from elm_jax.experts.card import utc_now
from elm_jax.models.t5 import T5Network
from elm_jax.models.t5_config import T5Config
from elm_jax.types import Params

SCHEMA_VERSION = 1
VOCABULARY_FILE = "vocabulary.model"


@dataclasses.dataclass(frozen=True)
class Base:
    """A frozen model that overlays are put on.

    Attributes:
        name: last part of its folder's name.
        params: nested dictionary of float32 arrays, without adapters.
        config: the network's config, without adapters.
        fingerprint: hash over leaf names, shapes, dtypes and contents.
        vocabulary: its SentencePiece vocabulary; None if the folder carries none.
        vocabulary_path: where that vocabulary's file lies.
        path: the folder it was read from.
    """

    name: str
    params: Params
    config: T5Config
    fingerprint: str
    vocabulary: Vocabulary | None = None
    vocabulary_path: str | None = None
    path: str | None = None


def save_base(
    folder: storage.PathLike, params: Params, config: T5Config,
    vocabulary_path: storage.PathLike | None, training: dict[str, Any],
) -> None:
    """Writes ``base.json``, ``weights/`` and the vocabulary; the commit marker last.

    Args:
        folder: emptied first.
        params: the full tree, without adapters.
        config: network config without an adapter.
        vocabulary_path: SentencePiece model file to copy, or None.
        training: what it was trained on; kept in ``base.json``.
    """
    folder = storage.begin(folder)
    storage.save_tree(folder / "weights", params)
    if vocabulary_path is not None:
        content = storage.as_path(vocabulary_path).read_bytes()
        with storage.guard_writes(folder):
            (folder / VOCABULARY_FILE).write_bytes(content)
    storage.write_json(folder / "base.json", {
        "schema_version": SCHEMA_VERSION,
        "network": config.to_dict(),
        "fingerprint": trees.fingerprint(params),
        "vocabulary": None if vocabulary_path is None else VOCABULARY_FILE,
        "training": training,
        "created": utc_now(),
    })
    storage.commit(folder)


def load_base(folder: storage.PathLike) -> Base:
    """Reads a base folder and checks it against its config and its fingerprint.

    Raises:
        InputError: the folder is not whole; a leaf does not fit the config (it is named); the
            contents are not those that were written; the vocabulary is larger than the embedding.
    """
    folder = storage.require_committed(folder, "base model")
    facts = storage.read_json(folder / "base.json", kind="base's description",
                              schema_version=SCHEMA_VERSION)
    config = T5Config.from_dict(facts["network"])
    params = storage.restore_tree(folder / "weights")
    check_fits(params, config, where=folder)
    fingerprint = trees.fingerprint(params)
    if fingerprint != facts["fingerprint"]:
        raise InputError(describe("The base's weights are not those that were written", where=folder,
                                  got=fingerprint, expected=facts["fingerprint"],
                                  cure="fetch or train the base again"))
    vocabulary, vocabulary_path = None, None
    if facts["vocabulary"]:
        vocabulary_path = folder / facts["vocabulary"]
        vocabulary = Vocabulary.load(vocabulary_path)
        if vocabulary.size > config.vocab_size:
            raise InputError(describe("The vocabulary is larger than the embedding", where=folder,
                                      got=vocabulary.size, expected=f"at most {config.vocab_size}"))
    return Base(name=folder.name, params=params, config=config, fingerprint=fingerprint,
                vocabulary=vocabulary, vocabulary_path=str(vocabulary_path) if vocabulary_path else None,
                path=str(folder))


def check_fits(params: Params, config: T5Config, where: Any) -> None:
    """Raises InputError naming the first leaf that does not fit the network's config."""
    difference = trees.first_difference(params, T5Network(config).abstract_params())
    if difference:
        raise InputError(describe("The base does not fit its network config", where=where,
                                  got=f"leaf {difference} (file against config)",
                                  cure="use the config that the base was made with"))
