"""Reads and writes ``base.json``, the description of a base, and the vocabulary that it names."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.formats.hf import folder_files, hf_models
from elm_jax.formats.t5x import t5x_checkpoints
from elm_jax.models.network import NetworkConfig
from elm_jax.runtime import storage
from elm_jax.runtime.storage import utc_now
from elm_jax.vocabularies import hf_tokenizer
from elm_jax.vocabularies.vocabulary import SentencePieceVocabulary, Vocabulary

SCHEMA_VERSION = 1
FILE = "base.json"
_FIELDS = {"network": dict, "fingerprint": str, "training": dict, "vocabulary": str | None}


def read(folder: epath.Path) -> dict[str, Any]:
    """Reads ``base.json`` and checks its fields; `NetworkConfig` checks those of the network."""
    path = folder / FILE
    facts = storage.read_json(path, kind="base's description", schema_version=SCHEMA_VERSION)
    others = facts.get("facts", {})
    wrong = [f"{name}: {facts[name]!r}"[:100] if name in facts else f"no {name}"
             for name, kind in _FIELDS.items()
             if name not in facts or not isinstance(facts[name], kind)]
    if not isinstance(others, dict) or not all(isinstance(kept, dict) for kept in others.values()):
        wrong.append(f"facts: {others!r}"[:100])
    if wrong:
        raise InputError(describe("The base's description is wrong", where=path, got="; ".join(wrong),
                                  expected="network, fingerprint, training, and vocabulary, null or a name",
                                  cure="fetch or write the base again"))
    _check_others(others, path)
    return facts


def _check_others(others: Mapping[str, Mapping[str, Any]], where: epath.Path) -> None:
    """Checks the fields that other formats need when the model is converted back to them."""
    kept = others.get(folder_files.FACTS, {})
    if "config" in kept:
        hf_models.check_config(kept["config"] if isinstance(kept["config"], dict) else {}, where)
    if not isinstance(kept.get("generation_config", {}), dict):
        raise InputError(describe("The base's generation_config is wrong", where=where,
                                  got=repr(kept["generation_config"])[:100], expected="an object"))
    hf_tokenizer.check_kept(kept.get("tokenizer", {}), kept.get("added_tokens", {}), where)
    step = others.get(t5x_checkpoints.FACTS, {}).get("step", 0)
    if type(step) is not int or not 0 <= step <= t5x_checkpoints.LARGEST_STEP:
        raise InputError(describe("The base's step is wrong", where=where, got=repr(step)[:100],
                                  expected=f"a whole number from 0 to {t5x_checkpoints.LARGEST_STEP}"))


def read_vocabulary(folder: epath.Path, name: str | None, config: NetworkConfig,
                    facts: Mapping[str, Any]) -> bytes | None:
    """Reads and checks the vocabulary that ``base.json`` names; None if it names none.

    Older versions kept tokens behind a SentencePiece model beside it: they are put into the vocabulary.
    """
    if not name:
        return None
    path = folder / storage.require_name(name, folder / FILE, "vocabulary")
    contents = storage.read_bytes(path)
    behind = facts.get(folder_files.FACTS, {}).get("added_tokens")
    if behind and name == SentencePieceVocabulary.FILE:
        contents = hf_tokenizer.with_added(
            contents, {int(number): entry for number, entry in behind.items()}, path)
    vocabulary = Vocabulary.from_bytes(contents, path)
    vocabulary.check_ids(config.pad_id, config.eos_id, path)
    size = vocabulary.size
    if size > config.vocab_size:
        raise InputError(describe("The vocabulary is larger than the embedding", where=folder, got=size,
                                  expected=f"at most {config.vocab_size}"))
    return contents


def write(folder: epath.Path, config: NetworkConfig, fingerprint: str, vocabulary: bytes | None,
          training: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Writes ``base.json`` and the vocabulary."""
    file = None if vocabulary is None else Vocabulary.from_bytes(vocabulary).FILE
    if file is not None:
        storage.write_bytes(folder / file, vocabulary)
    storage.write_json(folder / FILE, {
        "schema_version": SCHEMA_VERSION,
        "network": config.to_dict(),
        "fingerprint": fingerprint,
        "vocabulary": file,
        "training": dict(training),
        **({"facts": dict(facts)} if facts else {}),
        "created": utc_now(),
    })
