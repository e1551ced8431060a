"""Trains a small base from raw passages (`elm pretrain`).

Over raw passages only, with a SentencePiece vocabulary trained on the same passages, or one that is given.
The network's form of batches says what is learnt (`data.arrays.objectives`): span corruption and prefix
language modelling, or causal language modelling.
"""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from elm_jax.data.arrays.batch_forms import form_of
from elm_jax.data.arrays.cursor import MixtureSource, TrainStream
from elm_jax.data.arrays.objectives import PretrainingSettings, fill_defaults, objective_of
from elm_jax.data.registry.registry import import_module
from elm_jax.data.sources.row_files import DATA_DIR_VARIABLE
from elm_jax.errors import InputError, describe
from elm_jax.experts.base import Base, load_base, save_base
from elm_jax.experts.card import StoredTraining
from elm_jax.experts.overlay import frozen_by
from elm_jax.formats.elm import base_json
from elm_jax.models import families
from elm_jax.models.layers.gate_tasks import NO_TASK, check_without_tasks, tasks_of
from elm_jax.models.losses import LossConfig
from elm_jax.models.network import NetworkConfig
from elm_jax.runtime import hosts, locks, records, sharding, storage, trees
from elm_jax.runtime.config_checks import check_positive, check_types, items_of
from elm_jax.runtime.differences import as_json, differences
from elm_jax.training.loop import fit
from elm_jax.training.optimizers import OptimizerConfig
from elm_jax.training.run_settings import RunConfig, check_losses
from elm_jax.vocabularies.vocabulary import (
    EOS_ID,
    PAD_ID,
    SentencePieceVocabulary,
    Vocabulary,
    trained_contents,
)
from elm_jax.workflows.train import run_record

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Settings of one pretraining run (gin: ``pretrain.*``).

    Attributes:
        model_dir: run folder; the finished base is in its ``base/``.
        network: sizes of the network; its `vocab_size` is the number of embedding rows.
        passages: where raw passages come from, each ``module:function`` (called without arguments,
            gives strings) or the path of a text file with one passage a line.
        vocabulary: file of a vocabulary of any kind (`Vocabulary.load`); None trains a SentencePiece one.
        initial_checkpoint_path: folder of a base whose training goes on, with its vocabulary and a new
            optimiser state; its network must be `network`. None begins from nothing.
        vocab_pieces: pieces of the SentencePiece vocabulary, without the 100 extra ids.
        character_coverage: share of the passages' characters that get pieces of their own.
        train_steps: optimiser steps.
        batch_size: global batch size in packed rows.
        task_feature_lengths: ``{'inputs': S, 'targets': T}``, tokens; a decoder's rows hold S + T.
        chunk_length: most tokens of one piece of passage; None for 128 before corruption, and for a whole row
            of a decoder.
        prefix_lm_share: share of prefix-LM examples, the others are span corruption; None for 0.5. A decoder
            has none.
        optimizer: see `OptimizerConfig`.
        dropout_rate: while pretraining.
        random_seed: of the vocabulary, initialisation, order and noise.
        dtype: of activations.
        mesh_data: size of the mesh's data axis; -1 for all devices that `mesh_model` leaves.
        mesh_model: size of the mesh's model axis.
        checkpoint_period: steps between checkpoints.
        keep_checkpoints: how many of the newest are kept.
        log_period: steps between rows of ``metrics.jsonl``.
        tensorboard: whether TensorBoard files are written beside them.
        loss: of tokens, and of sparse layers; see `LossConfig`.
        freeze: leaves that stay as they are initialised, see `TrainConfig`; None for none.
    """

    model_dir: storage.PathLike
    network: NetworkConfig
    passages: tuple[str, ...]
    vocabulary: storage.PathLike | None = None
    vocab_pieces: int = 8000
    character_coverage: float = 0.9995
    train_steps: int = 1000
    batch_size: int = 32
    task_feature_lengths: dict[str, int] = dataclasses.field(
        default_factory=lambda: {"inputs": 256, "targets": 128})
    chunk_length: int | None = None
    prefix_lm_share: float | None = None
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    dropout_rate: float = 0.0
    random_seed: int = 0
    dtype: str = "float32"
    mesh_data: int = -1
    mesh_model: int = 1
    checkpoint_period: int = 1000
    keep_checkpoints: int = 2
    log_period: int = 10
    tensorboard: bool = True
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    freeze: str | None = None
    initial_checkpoint_path: storage.PathLike | None = None

    def __post_init__(self) -> None:
        check_types(self)
        network = families.network_of(self.network)
        check_losses(self.loss, network)
        frozen_by(network, self.freeze)
        if self.initial_checkpoint_path is not None and self.vocabulary is not None:
            raise InputError(describe(
                "A base that is trained on keeps its own vocabulary", where="pretrain.vocabulary",
                got=f"{self.vocabulary} beside initial_checkpoint_path", cure="leave one of them out"))
        check_positive(vocab_pieces=self.vocab_pieces, train_steps=self.train_steps,
                       batch_size=self.batch_size, chunk_length=self.chunk_length,
                       checkpoint_period=self.checkpoint_period, log_period=self.log_period)
        fill_defaults(self).check(self.examples, self.network)
        check_without_tasks(self.network, "pretrain.network")

    @property
    def examples(self) -> PretrainingSettings:
        """How passages become examples."""
        return PretrainingSettings(self.task_feature_lengths, self.chunk_length, self.prefix_lm_share,
                                   self.random_seed)

    def deciding(self) -> dict[str, Any]:
        """Returns all settings that decide the result, JSON-ready."""
        facts = families.plain_settings(self)
        for name in ("model_dir", "mesh_data", "mesh_model", "log_period", "checkpoint_period",
                     "keep_checkpoints", "tensorboard"):
            facts.pop(name)
        facts["loss"] = None if self.loss == LossConfig() else self.loss.facts()
        for name in ("vocabulary", "loss", "freeze"):
            if facts[name] is None:  # runs that may resume can be older than this setting
                facts.pop(name)
        if facts.pop("initial_checkpoint_path") is not None:
            facts["goes_on"] = True
        return as_json(facts)

    def digest(self) -> str:
        """Hash of all settings that decide the result."""
        return hashlib.sha256(json.dumps(self.deciding(), sort_keys=True).encode()).hexdigest()[:16]


def pretrain(config: PretrainConfig, *, mesh: Mesh | None = None,
             on_start: Callable[[], None] | None = None) -> Base | None:
    """Trains a base, and its vocabulary if none is given, and writes ``<model_dir>/base``.

    Resumes from a checkpoint if there is one, and loads the base if it is finished.

    Args:
        config: the run.
        mesh: the mesh, if there is one already.
        on_start: called once everything is checked, before training writes anything.

    Returns:
        The base, or None if SIGTERM stopped the run before its end.

    Raises:
        InputError: no passages, a vocabulary that does not fit, a run folder of another config, or one that
            another process is writing.
    """
    with locks.alone(config.model_dir):
        return _pretrain(config, mesh, on_start)


def _pretrain(config: PretrainConfig, mesh: Mesh | None, on_start: Callable[[], None] | None) -> Base | None:
    """Does as `pretrain`, in a folder that no other process writes."""
    folder, deciding, digest = storage.as_path(config.model_dir) / "base", config.deciding(), config.digest()
    mesh = mesh or sharding.make_mesh(config.mesh_data, config.mesh_model)
    if hosts.by_first(lambda: storage.is_committed(folder)):
        check_same_base(folder, config)
        return load_base(folder, mesh=mesh, rules=sharding.split_rules())
    first = first_base(config)
    passages = read_passages(config.passages)
    if first is not None:
        config = dataclasses.replace(config, initial_checkpoint_path=None, vocabulary=first.vocabulary_path)
    vocabulary_path = hosts.by_first(lambda: str(make_vocabulary(config, passages)))
    vocabulary = Vocabulary.load(vocabulary_path)
    check_fits(vocabulary, config.network, vocabulary_path)
    source, lengths = objective_of(config.network).examples(
        passages, vocabulary, config.examples, config.network)
    network = families.network_of(dataclasses.replace(
        config.network, dropout_rate=config.dropout_rate, dtype=config.dtype))
    params = network.init(jax.random.key(config.random_seed)) if first is None else first.params
    logger.info("pretraining %d parameters on %d passages", trees.count(params), len(passages))
    if tasks_of(network.config):
        source = MixtureSource([source], tasks=[NO_TASK])
    stream = TrainStream(source, form=form_of(network), batch_size=config.batch_size,
                         lengths=lengths, seed=config.random_seed, pack=True)
    facts = {} if first is None else {"base": f"{first.name} {first.fingerprint}"}
    run = RunConfig.of(config, name="base", config_digest="/".join([digest, *facts.values()]),
                       settings={**deciding, **facts}, donate_overlay=True)
    frozen, trained = trees.split(params, frozen_by(network, config.freeze))
    del params
    result = fit(network, frozen, trained, stream, run, mesh, on_start)
    if result.stopped:
        return None
    save_base(folder, trees.merge(frozen, result.overlay), config.network, vocabulary_path, {
        "steps": result.step, "passages": len(passages), "seed": config.random_seed,
        "config_digest": digest, "settings": deciding, "versions": run_record.versions(), **facts,
        "metrics": {name: float(value) for name, value in result.metrics.items()}})
    return load_base(folder, mesh=mesh, rules=sharding.split_rules())


def first_base(config: PretrainConfig) -> Base | None:
    """The base whose training goes on; None where a run begins from nothing.

    Raises:
        InputError: it is of another network, or has no vocabulary.
    """
    if config.initial_checkpoint_path is None:
        return None
    base, where = load_base(config.initial_checkpoint_path), "pretrain.initial_checkpoint_path"
    wanted, found = config.network.to_dict(), base.config.to_dict()
    wrong = differences({**found, "dropout_rate": 0, "dtype": 0}, {**wanted, "dropout_rate": 0, "dtype": 0})
    if type(base.config) is not type(config.network) or wrong:
        raise InputError(describe(
            "The base is not of the network that the config gives", where=where,
            got=f"{config.initial_checkpoint_path}: {'; '.join(wrong) or base.config.family}",
            cure="give the base's own sizes"))
    if base.vocabulary_path is None:
        raise InputError(describe("The base carries no vocabulary", where=where,
                                  got=config.initial_checkpoint_path))
    return base


def check_same_base(folder: storage.PathLike, config: PretrainConfig) -> None:
    """Raises InputError if the finished base in `folder` was pretrained with another config."""
    facts = base_json.read(storage.as_path(folder))
    records.check_record(facts["training"], StoredTraining, kind="base's training",
                         where=f"{storage.as_path(folder) / base_json.FILE}: training")
    made_with = facts["training"].get("config_digest")
    if made_with != config.digest():
        saved = facts["training"].get("settings")
        raise InputError(describe("The run folder holds a base of other settings", where=folder,
                                  got="; ".join(differences(saved, config.deciding())) if saved
                                  else f"config digest {made_with} there, {config.digest()} here",
                                  cure="choose an empty folder, or go back to the base's config"))


def check_fits(vocabulary: Vocabulary, network: NetworkConfig, where: storage.PathLike) -> None:
    """Raises InputError if a vocabulary has other special ids than the network, or more ids than rows."""
    vocabulary.check_ids(network.pad_id, network.eos_id, where)
    if vocabulary.size > network.vocab_size:
        raise InputError(describe("The vocabulary is larger than the embedding",
                                  got=f"{vocabulary.size} pieces with extra ids",
                                  expected=f"at most {type(network).__name__}.vocab_size = "
                                  f"{network.vocab_size}",
                                  cure="set a larger VOCAB_SIZE, or fewer pretrain.vocab_pieces where the "
                                  "vocabulary is trained"))


@dataclasses.dataclass(frozen=True)
class VocabularyMarker:
    """Fields of a vocabulary's marker; those with a default came with later versions."""

    made_of: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    fingerprint: str | None = None


def make_vocabulary(config: PretrainConfig, passages: list[str]) -> storage.PathLike:
    """Trains or copies the vocabulary into ``<model_dir>/vocabulary``, unless the same one is there.

    Raises:
        InputError: the passages are too few, or the vocabulary does not fit the network: nothing is written.
    """
    folder = storage.as_path(config.model_dir) / "vocabulary"
    given = None if config.vocabulary is None else Vocabulary.load(config.vocabulary)
    ids = (config.network.pad_id, config.network.eos_id)
    if given is None and ids != (PAD_ID, EOS_ID):
        raise InputError(describe(
            "No vocabulary is trained for a network with these special ids", where="pretrain.network",
            got=f"padding = {ids[0]}, EOS = {ids[1]}", expected=f"padding = {PAD_ID}, EOS = {EOS_ID}",
            cure="give the vocabulary that the ids are of, pretrain.vocabulary = 'FILE', or other ids: the "
            "network's pad_id and eos_id"))
    path = folder / (SentencePieceVocabulary if given is None else given).FILE
    made_of = given.fingerprint if given is not None else run_record.digest(
        [config.vocab_pieces, config.random_seed, config.character_coverage, passages])
    settings = {"vocabulary": made_of} if given is not None else {
        "vocab_pieces": config.vocab_pieces, "random_seed": config.random_seed,
        "character_coverage": config.character_coverage, "passages": run_record.digest(passages),
        "number of passages": len(passages)}
    if not storage.is_committed(folder):
        contents = given.contents if given is not None else trained_contents(
            passages, path, config.vocab_pieces, config.random_seed,
            character_coverage=config.character_coverage)
        made = Vocabulary.from_bytes(contents, path)
        check_fits(made, config.network, path)
        storage.begin(folder)
        storage.write_bytes(path, contents)
        storage.commit(folder, {"made_of": made_of, "settings": settings, "fingerprint": made.fingerprint})
    found = records.check_record(storage.read_marker(folder, "vocabulary"), VocabularyMarker,
                                 kind="marker of a vocabulary", where=folder / storage.MARKER)
    if found.get("made_of") != made_of:
        raise InputError(describe("The run folder holds a vocabulary of other passages or settings",
                                  where=folder, got="; ".join(differences(
                                      found.get("settings", {"made_of": found.get("made_of")}),
                                      settings if "settings" in found else {"made_of": made_of})),
                                  cure="choose an empty folder, or go back to what it was made of"))
    if found.get("fingerprint") not in (None, Vocabulary.load(path).fingerprint):  # older markers have none
        raise InputError(describe("The vocabulary is not the one that was written", where=path,
                                  expected=found["fingerprint"],
                                  cure="remove its folder: the same vocabulary is made again"))
    return path


def read_passages(sources: tuple[str, ...]) -> list[str]:
    """Reads the raw passages of all sources, in order, without exact repeats.

    Raises:
        InputError: a module, function or file that does not exist, or a source without passages.
    """
    passages: dict[str, None] = {}
    for source in items_of(sources):
        found = _call(source) if ":" in source and "://" not in source else _lines(source)
        if not found:
            raise InputError(describe(
                "A source of passages is empty", where=source,
                got=f"{DATA_DIR_VARIABLE}={os.environ.get(DATA_DIR_VARIABLE, '')}",
                cure=f"if it reads data sets, set {DATA_DIR_VARIABLE} to the folder that holds "
                "them"))
        passages.update(dict.fromkeys(found))
    return list(passages)


def _call(source: str) -> list[str]:
    module_name, function_name = source.split(":", 1)
    try:
        function = getattr(import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise InputError(describe("A source of passages cannot be imported", where=source,
                                  got=str(error), expected="module:function, or a text file")) from error
    return list(function())


def _lines(source: str) -> list[str]:
    return [line.strip() for line in storage.read_text(source).splitlines() if line.strip()]
