"""The config of one training run (gin: ``train.*``)."""

import dataclasses
import hashlib
import json
from typing import Any

from elm_jax.data.arrays.prepared import PLAIN, RENDERINGS
from elm_jax.errors import InputError, describe
from elm_jax.experts.overlay import FREEZES
from elm_jax.models import families
from elm_jax.models.adapters.bottleneck import BottleneckConfig
from elm_jax.models.adapters.carriers import check_form
from elm_jax.models.adapters.kind import AdapterKind
from elm_jax.models.adapters.low_rank import TARGETS, LowRankConfig
from elm_jax.models.losses import LossConfig
from elm_jax.models.network import DTYPES, Layout, Network, NetworkConfig
from elm_jax.runtime import sharding, storage
from elm_jax.runtime.config_checks import (
    DEFAULT_MODULES,
    check_choice,
    check_positive,
    check_range,
    check_types,
)
from elm_jax.runtime.differences import as_json
from elm_jax.training.early_end import EarlyEnd
from elm_jax.training.optimizers import OptimizerConfig

FORM_OF_KIND = {"prompt": "adapter", "dataset": "full", "multitask": "full"}
UNDECIDING = ("model_dir", "mesh_data", "mesh_model", "mesh_experts", "sharding_rules", "prepared_dir",
              "log_period", "tensorboard", "initial_checkpoint_path", "checkpoint_period", "keep_checkpoints",
              "remat", "scan_layers", "network", "trunk_cache", "trunk_cache_bytes")
"""Settings of a run that change no result."""
LATER = ("early_end", "lora_rank", "lora_alpha", "lora_targets", "adapter_layers", "loss", "freeze")
"""Settings that came later, which earlier runs' digests lack: None is what was before."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run (gin: ``train.*``).

    Attributes:
        model_dir: run folder; the finished expert is in its ``expert/``.
        task: name of a task or of a mixture of tasks, or several names separated by commas.
        kind: ``prompt``, ``dataset`` or ``multitask``.
        initial_checkpoint_path: folder of the base.
        train_steps: optimiser steps; give this or `epochs`.
        epochs: passes over the data; give this or `train_steps`.
        batch_size: global batch size, in rows (packed rows when `pack`).
        task_feature_lengths: ``{'inputs': S, 'targets': T}``, tokens.
        optimizer: see `OptimizerConfig`.
        dropout_rate: of the network while training.
        random_seed: of order, dropout and adapter initialisation.
        pack: several examples in one row, separated by segment ids.
        max_examples: at most this many examples of each dataset an epoch; None for all.
        train_norms: whether the RMS norms train with the adapters.
        adapter_bottleneck: width of the adapters; None for d_model // 32.
        lora_rank: LoRA's updates of this rank in place of the adapters; None for adapters.
        lora_alpha: the updates are scaled by ``lora_alpha / lora_rank``; None for no scaling.
        adapter_layers: layers that carry adapters, ``'upper 10'``, ``'20-29'`` or a tuple of numbers from 0;
            None for all. Norms below the lowest of them do not train.
        trunk_dropout: whether there is dropout below the lowest leaf that trains, as elsewhere.
        trunk_cache: folder in which the states below the lowest leaf that trains are kept, so that each row's
            are computed once; None computes them in every step.
        trunk_cache_bytes: most bytes of that folder; None for 16 GiB.
        lora_targets: projections that LoRA updates, or 'all' (`LowRankConfig`); None for queries and values.
        task_recipe: whether lengths, batch size, epochs and `max_examples` are those of the task's own
            recipe (ELM.md's, for the training tasks), whatever is given here.
        rendering: of the inputs: 'plain', or 'chat' for a user's turn of the base's chat template, which the
            expert's card says then.
        few_shot: rows of the train split that are put, with their answers, before each input, as far as its
            length allows.
        dtype: of activations; parameters are float32.
        num_microbatches: gradient accumulation steps in one optimiser step.
        mesh_data: size of the mesh's data axis; -1 for all devices that the other two leave.
        mesh_model: size of the mesh's model axis.
        mesh_experts: size of its expert axis: of sparse layers' experts, and of what `sharding_rules` say.
        sharding_rules: rows (logical axis, mesh axis) in place of those of `sharding.DEFAULT_RULES`.
        remat: what the backward pass recomputes: ``none``, ``dots`` or ``layer``; see `Layout`.
        scan_layers: whether layers run as a loop: one compiled layer, whatever their number.
        base_dtype: dtype of the frozen kernels and embeddings on the devices; None for float32.
        network: dimensions of the base, if they are to be checked; `elm train --plan` needs no base then.
        checkpoint_period: steps between checkpoints.
        keep_checkpoints: how many of the newest are kept.
        log_period: steps between rows of ``metrics.jsonl``.
        tensorboard: whether TensorBoard files are written beside them.
        modules: registries to import by name.
        prepared_dir: folder of prepared arrays; None prepares in memory.
        expert_id: name of the expert; None for the task's name.
        early_end: the rule by which the run may end before its last step; None for no such rule.
        loss: of tokens, and of sparse layers; see `LossConfig`.
        freeze: what a run of every leaf of a sparse base leaves as it is: a name of `FREEZES`, or None.
    """

    model_dir: storage.PathLike
    task: str
    initial_checkpoint_path: storage.PathLike
    kind: str = "prompt"
    train_steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    task_feature_lengths: dict[str, int] = dataclasses.field(
        default_factory=lambda: {"inputs": 256, "targets": 128})
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    dropout_rate: float = 0.1
    random_seed: int = 0
    pack: bool = True
    max_examples: int | None = 50_000
    train_norms: bool = True
    adapter_bottleneck: int | None = None
    dtype: str = "float32"
    num_microbatches: int = 1
    mesh_data: int = -1
    mesh_model: int = 1
    mesh_experts: int = 1
    sharding_rules: tuple[tuple | list, ...] = ()
    remat: str = "none"
    scan_layers: bool = False
    base_dtype: str | None = None
    network: NetworkConfig | None = None
    checkpoint_period: int = 1000
    keep_checkpoints: int = 2
    log_period: int = 10
    tensorboard: bool = True
    modules: tuple[str, ...] = DEFAULT_MODULES
    prepared_dir: storage.PathLike | None = None
    expert_id: str | None = None
    early_end: EarlyEnd | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: str | tuple[str, ...] | None = None
    task_recipe: bool = False
    few_shot: int = 0
    rendering: str = PLAIN
    adapter_layers: str | tuple[int, ...] | None = None
    trunk_dropout: bool = True
    trunk_cache: storage.PathLike | None = None
    trunk_cache_bytes: int | None = None
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    freeze: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("kind", self.kind, FORM_OF_KIND)
        _check_freeze(self)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("rendering", self.rendering, RENDERINGS)
        self.rules()
        self.layout()
        self._check_base_dtype()
        _check_trunk(self)
        check_form(self.adapter_layers)
        check_range("dropout_rate", self.dropout_rate, 0, 1)
        check_range("random_seed", self.random_seed, 0)
        check_range("few_shot", self.few_shot, 0)
        check_positive(batch_size=self.batch_size, num_microbatches=self.num_microbatches,
                       checkpoint_period=self.checkpoint_period, log_period=self.log_period,
                       keep_checkpoints=self.keep_checkpoints, train_steps=self.train_steps,
                       epochs=self.epochs, max_examples=self.max_examples, mesh_model=self.mesh_model,
                       adapter_bottleneck=self.adapter_bottleneck, lora_rank=self.lora_rank,
                       lora_alpha=self.lora_alpha, trunk_cache_bytes=self.trunk_cache_bytes,
                       mesh_experts=self.mesh_experts,
                       **{f"task_feature_lengths[{name!r}]": length
                          for name, length in self.task_feature_lengths.items()})
        if (self.train_steps is None) == (self.epochs is None):
            raise InputError(describe("Give the length of training once", where="train",
                                      got=f"train_steps={self.train_steps}, epochs={self.epochs}",
                                      expected="exactly one of TRAIN_STEPS and EPOCHS"))
        _check_one_kind(self)
        self.adapter()
        if self.task_recipe and self.kind != "prompt":
            raise InputError(describe("A task's recipe is that of a prompt expert", where="train.task_recipe",
                                      got=f"kind {self.kind!r}", cure="give lengths, batch size and epochs"))
        if set(self.task_feature_lengths) != {"inputs", "targets"}:
            raise InputError(describe("TASK_FEATURE_LENGTHS names the wrong features",
                                      got=sorted(self.task_feature_lengths),
                                      expected=["inputs", "targets"]))

    def _check_base_dtype(self) -> None:
        if self.base_dtype is None:
            return
        check_choice("base_dtype", self.base_dtype, DTYPES)
        if FORM_OF_KIND[self.kind] == "full":
            raise InputError(describe(
                "There is no frozen base whose dtype could be chosen", where="train.base_dtype",
                got=f"{self.base_dtype} for kind {self.kind!r}, which trains every leaf",
                expected="None", cure="leaves that train stay in float32; leave BASE_DTYPE out"))

    def layout(self) -> Layout:
        """Execution settings of the network (rematerialisation, scanned layers); they change no result."""
        return Layout(self.remat, self.scan_layers)

    def network_of(self, base: NetworkConfig) -> Network:
        """Makes the network to train; `base` is the base's config with its adapters."""
        config = dataclasses.replace(base, dropout_rate=self.dropout_rate, dtype=self.dtype)
        return families.network_of(config, self.layout())

    def rules(self) -> sharding.Rules:
        """Sharding rules of the run: the defaults, with `sharding_rules` replaced."""
        return sharding.make_rules(self.sharding_rules, where="train.sharding_rules")

    def base_rules(self) -> sharding.Rules:
        """Sharding rules of the base: the run's rules if its leaves train, else split as far as possible."""
        return self.rules() if FORM_OF_KIND[self.kind] == "full" else sharding.split_rules(self.rules())

    def adapter(self) -> AdapterKind:
        """Config of a prompt expert's adapters; None for other experts."""
        if self.lora_rank is None:
            return BottleneckConfig(self.adapter_bottleneck, layers=self.adapter_layers)
        targets = TARGETS if self.lora_targets is None else self.lora_targets
        return LowRankConfig(rank=self.lora_rank, alpha=self.lora_alpha, targets=targets,
                             layers=self.adapter_layers)

    def deciding(self) -> dict[str, Any]:
        """Returns all settings that decide the result, JSON-ready; folders, mesh and logging do not."""
        facts = dataclasses.asdict(self)
        for name in UNDECIDING:
            facts.pop(name)
        if facts["trunk_dropout"]:
            facts.pop("trunk_dropout")
        facts["loss"] = None if self.loss == LossConfig() else self.loss.facts()
        for name in LATER:
            if facts[name] is None:  # as it was before there were such settings
                facts.pop(name)
        for name in ("task_recipe", "few_shot"):
            if not facts[name]:
                facts.pop(name)
        if tuple(self.modules) == DEFAULT_MODULES:  # as it was before they were the default
            facts["modules"] = DEFAULT_MODULES[:1]
        if self.rendering == PLAIN:
            facts.pop("rendering")
        if self.base_dtype in (None, "float32"):  # as it was before there was a choice
            facts.pop("base_dtype")
        return as_json(facts)

    def digest(self) -> str:
        """Hash of all settings that decide the result."""
        return hashlib.sha256(json.dumps(self.deciding(), sort_keys=True).encode()).hexdigest()[:16]


def check_expert_axis(config: TrainConfig, network: NetworkConfig) -> None:
    """Raises InputError if the mesh has an expert axis over which nothing of the network is split."""
    size, sparse = config.mesh_experts, network.sparse
    split = any("experts" in sharding.axes_in(row[1]) for row in config.rules() if row[0] != "expert")
    if size > 1 and not split and (sparse is None or sparse.num_experts % size):
        raise InputError(describe(
            "The mesh has an expert axis that splits nothing", where="train.mesh_experts", got=size,
            expected="1 for a base without sparse layers" if sparse is None else
            f"a divisor of {sparse.num_experts}, the experts of a layer",
            cure="change MESH_EXPERTS, or split the batch over it too: gin/sharding/experts.gin"))


def _check_freeze(config: TrainConfig) -> None:
    """Raises InputError for leaves to freeze that are unknown, or of a run whose base is frozen anyway."""
    if config.freeze is None:
        return
    check_choice("freeze", config.freeze, FREEZES)
    if FORM_OF_KIND[config.kind] != "full":
        raise InputError(describe(
            "This setting has no effect: the base is frozen", where="train.freeze",
            got=f"{config.freeze!r} for kind {config.kind!r}",
            expected="None, or kind 'dataset' or 'multitask'", cure="leave FREEZE out"))


def _check_one_kind(config: TrainConfig) -> None:
    """Raises InputError for settings of two kinds of adapters, or of LoRA without a rank."""
    without = config.lora_rank is None and (config.lora_alpha, config.lora_targets) != (None, None)
    if without or (config.lora_rank is not None and config.adapter_bottleneck is not None):
        raise InputError(describe(
            "Give one kind of adapters", where="train",
            got=f"adapter_bottleneck={config.adapter_bottleneck}, lora_rank={config.lora_rank}, "
            f"lora_alpha={config.lora_alpha}, lora_targets={config.lora_targets}",
            expected="a bottleneck, or a rank (and perhaps an alpha and targets)"))


def _check_trunk(config: TrainConfig) -> None:
    """Raises InputError for settings of frozen lower layers without effect, or that exclude each other."""
    given = {"adapter_layers": config.adapter_layers is not None, "trunk_dropout": not config.trunk_dropout,
             "trunk_cache": config.trunk_cache is not None,
             "trunk_cache_bytes": config.trunk_cache_bytes is not None}
    for name in (name for name, is_given in given.items() if is_given):
        why = None
        if FORM_OF_KIND[config.kind] == "full":
            why = f"kind {config.kind!r} trains every leaf: no layer is frozen"
        elif name == "trunk_cache_bytes" and config.trunk_cache is None:
            why = "there is no trunk_cache"
        elif name == "trunk_dropout" and not config.dropout_rate:
            why = "dropout_rate is 0"
        if why is not None:
            raise InputError(describe("This setting has no effect", where=f"train.{name}", got=why,
                                      cure="leave it out"))
    if config.trunk_cache is not None and config.trunk_dropout and config.dropout_rate:
        raise InputError(describe(
            "States that are kept have no dropout", where="train.trunk_cache",
            got=f"dropout_rate={config.dropout_rate} in all layers",
            cure="give TRUNK_DROPOUT = False (dropout above the frozen layers only) or DROPOUT_RATE = 0"))
