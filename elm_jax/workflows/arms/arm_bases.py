"""The bases of a study's arms: one dense base, and what each arm makes of it or of nothing, in equal steps.

``bases/<arm>/first`` is where an arm's own part begins, ``bases/<arm>/base`` its base. The first arm's first
part is pretrained from nothing and is the first part of every arm that continues it or is upcycled from it.
"""

import dataclasses

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from elm_jax.experts.base import Base, load_base, save_base
from elm_jax.models import families
from elm_jax.models.network import Network
from elm_jax.runtime import sharding, storage, trees
from elm_jax.runtime.differences import as_json
from elm_jax.runtime.preemption import Stopped
from elm_jax.types import Params
from elm_jax.workflows.arms.arm_settings import REGATED, SCRATCH, UPCYCLED, ArmSettings, ArmStudySettings
from elm_jax.workflows.train import run_record
from elm_jax.workflows.train.pretrain import PretrainConfig, pretrain
from elm_jax.workflows.upcycle.upcycle_base import upcycle


@dataclasses.dataclass(frozen=True)
class ArmBases:
    """Makes the bases of the arms, and finds those that are made.

    Attributes:
        config: of the study.
        mesh: on which they train.
    """

    config: ArmStudySettings
    mesh: Mesh

    @property
    def root(self) -> epath.Path:
        """Folder of all bases."""
        return storage.as_path(self.config.workdir) / "bases"

    def folder(self, arm: ArmSettings) -> epath.Path:
        """Folder of an arm's base."""
        return self.root / arm.name / "base" / "base"

    def first_folder(self, arm: ArmSettings) -> epath.Path:
        """Folder of what an arm's own part begins with."""
        if arm.origin == UPCYCLED:
            return self.root / arm.name / "first"
        owner = arm if arm.origin == SCRATCH else self.config.dense
        return self.root / owner.name / "first" / "base"

    def digest(self, arm: ArmSettings) -> str:
        """Hash of all that decides an arm's base."""
        config, owner = self.config, self.config.dense
        return run_record.digest(as_json([
            families.plain_settings(arm), families.plain_settings(owner),
            None if arm.of is None else families.plain_settings(config.arm(arm.of)),
            dataclasses.asdict(config.pretrain),
            config.extra_steps, config.passages, config.vocab_pieces, config.character_coverage,
            config.chunk_length, config.prefix_lm_share, config.random_seed]))

    def make(self, arm: ArmSettings) -> Base:
        """Makes an arm's base, unless it is there.

        Raises:
            Stopped: by SIGTERM.
        """
        if arm.origin == REGATED:
            self._regate(arm)
            return load_base(self.folder(arm))
        first = self._first(arm)
        self._pretrain(self.pretraining(arm, goes_on=True, start=first))
        return load_base(self.folder(arm))

    def _first(self, arm: ArmSettings) -> epath.Path:
        dense = self.config.dense
        self._pretrain(self.pretraining(dense, goes_on=False))
        if arm.origin == UPCYCLED:
            self._upcycle(arm)
        elif arm.origin == SCRATCH:
            self._pretrain(self.pretraining(arm, goes_on=False))
        return self.first_folder(arm)

    def _pretrain(self, config: PretrainConfig) -> None:
        if pretrain(config, mesh=self.mesh) is None:
            raise Stopped

    def _upcycle(self, arm: ArmSettings) -> None:
        """Makes the first base sparse, unless that was done."""
        folder = self.first_folder(arm)
        if storage.is_committed(folder):
            return
        dense = load_base(self.first_folder(self.config.dense))
        base = upcycle(dense, arm.network.sparse, noise=arm.upcycle_noise, seed=self.config.random_seed)
        save_base(folder, base.params, base.config, dense.vocabulary_path, {
            "upcycled_from": dense.fingerprint, "settings": families.plain_settings(arm)})

    def _regate(self, arm: ArmSettings) -> None:
        """Gives the base of another arm other gates, unless that was done: leaves of new names are fresh."""
        folder = self.folder(arm)
        if storage.is_committed(folder):
            return
        other = self.make(self.config.arm(arm.of))
        params = regated(other.params, families.network_of(arm.network), self.config.random_seed)
        save_base(folder, params, arm.network, other.vocabulary_path, {
            "regated_from": other.fingerprint, "settings": families.plain_settings(arm)})

    def pretraining(self, arm: ArmSettings, *, goes_on: bool, start: storage.PathLike | None = None
                    ) -> PretrainConfig:
        """Config of one part of an arm's pretraining: the first one, or the extra steps behind it."""
        config, stage = self.config, self.config.pretrain
        vocabulary = None
        if not goes_on and arm != config.dense:
            vocabulary = load_base(self.first_folder(config.dense)).vocabulary_path
        return PretrainConfig(
            model_dir=str(self.root / arm.name / ("base" if goes_on else "first")), network=arm.network,
            passages=config.passages, vocabulary=vocabulary, vocab_pieces=config.vocab_pieces,
            character_coverage=config.character_coverage, batch_size=stage.batch_size,
            train_steps=config.extra_steps if goes_on else stage.train_steps,
            task_feature_lengths=stage.task_feature_lengths, chunk_length=config.chunk_length,
            prefix_lm_share=config.prefix_lm_share, optimizer=stage.optimizer,
            dropout_rate=stage.dropout_rate, random_seed=config.random_seed + goes_on,
            checkpoint_period=stage.checkpoint_period, tensorboard=False, loss=arm.loss,
            initial_checkpoint_path=None if start is None else str(start))


def regated(params: Params, network: Network, seed: int) -> Params:
    """Parameters of a network with other gates: the known leaves, and fresh ones of new names or shapes.

    Gates that read tokens and tasks begin as gates that read tokens: the tasks' weights are 0.

    Args:
        params: of the network with the first gates.
        network: with the other gates.
        seed: of the fresh leaves.
    """
    known, fresh = trees.flatten(params), trees.flatten(network.init(jax.random.key(seed)))
    return trees.unflatten({
        path: known[path] if path in known and known[path].shape == leaf.shape else np.asarray(leaf)
        for path, leaf in fresh.items()})


def mesh_of(config: ArmStudySettings) -> Mesh:
    """A mesh of as many devices as divide every batch size of the study, on the data axis."""
    sizes = [config.pretrain.batch_size, *config.batch_sizes]
    return sharding.make_mesh(sharding.largest_data_axis(sizes, len(jax.devices())), 1)
