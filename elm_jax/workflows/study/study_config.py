"""The config of a study: one gin file for the whole chain."""

import dataclasses
from typing import Any

from elm_jax.data.arrays.objectives import fill_defaults
from elm_jax.errors import InputError, describe
from elm_jax.experts.library_files import check_means
from elm_jax.models.adapters.carriers import check_form
from elm_jax.models.losses import LossConfig
from elm_jax.models.network import NetworkConfig
from elm_jax.runtime import storage
from elm_jax.runtime.config_checks import check_positive, check_types
from elm_jax.training.optimizers import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class StageSettings:
    """Training settings of one kind of model in a study (gin: scoped ``StageSettings``).

    Attributes:
        train_steps: optimiser steps; None where `epochs` says how long.
        batch_size: global batch size in packed rows.
        task_feature_lengths: ``{'inputs': S, 'targets': T}``, tokens.
        optimizer: see `OptimizerConfig`.
        dropout_rate: while training.
        max_examples: at most this many examples of each dataset an epoch; None for all.
        checkpoint_period: steps between checkpoints.
        epochs: passes over the data; for experts, not for the base.
        loss: of tokens, and of sparse layers; see `LossConfig`.
        freeze: leaves that do not train, as in `TrainConfig`; for a base, and for experts of every leaf.
        num_microbatches: this and all later fields are as in `TrainConfig`; for experts.
    """

    train_steps: int | None
    batch_size: int
    task_feature_lengths: dict[str, int]
    optimizer: OptimizerConfig
    dropout_rate: float = 0.0
    max_examples: int | None = None
    checkpoint_period: int = 100
    epochs: float | None = None
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    freeze: str | None = None
    num_microbatches: int = 1
    dtype: str = "float32"
    base_dtype: str | None = None
    remat: str = "none"
    scan_layers: bool = False
    sharding_rules: tuple[tuple | list, ...] = ()
    adapter_layers: str | tuple[int, ...] | None = None
    trunk_dropout: bool = True
    trunk_cache: storage.PathLike | None = None
    trunk_cache_bytes: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_form(self.adapter_layers)
        check_positive(train_steps=self.train_steps, batch_size=self.batch_size, epochs=self.epochs,
                       max_examples=self.max_examples, checkpoint_period=self.checkpoint_period,
                       num_microbatches=self.num_microbatches)
        if (self.train_steps is None) == (self.epochs is None):
            raise InputError(describe("Give the length of training once", where="StageSettings",
                                      got=f"train_steps={self.train_steps}, epochs={self.epochs}",
                                      expected="exactly one of train_steps and epochs"))

    def for_training(self) -> dict[str, Any]:
        """All settings by name, as `TrainConfig` takes them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Settings of a whole study (gin: ``study.*``).

    Attributes:
        workdir: folder of everything that the study writes.
        title: heading of the report.
        selection_note: how the tasks were chosen, where that favours a score; the report prints it.
        modules: registries to import by name.
        passages: sources of raw passages, see `PretrainConfig.passages`.
        network: sizes of the base.
        vocab_pieces: pieces of its vocabulary, without the extra ids.
        character_coverage: see `PretrainConfig`.
        chunk_length: tokens of one pretraining chunk, see `PretrainConfig`.
        prefix_lm_share: share of prefix-LM examples in pretraining, see `PretrainConfig`.
        pretrain: settings of the base's pretraining; None where a base is given.
        prompt: settings of every prompt expert.
        dataset: settings of every dataset expert.
        multitask: settings of the multitask baseline.
        adapter_bottleneck: width of the adapters; None for d_model // 32.
        prompt_tasks: one prompt expert each.
        datasets: mixtures, one dataset expert each.
        multitask_tasks: tasks and mixtures that the multitask baseline is trained on; empty for `datasets`.
        unseen_tasks: tasks of datasets that no expert saw, for accuracy.
        generative_tasks: tasks of datasets that no expert saw, for ROUGE-L.
        bigbench_tasks: tasks, or mixtures of them, of BIG-bench: columns of their own, for evaluation only.
            Those without data are left out and reported as absent.
        bbh_tasks: the same of BIG-Bench-Hard.
        heldout_prompts: tasks of training datasets whose prompt no prompt expert saw, for routing.
        max_eval_rows: at most this many validation rows a task.
        eval_source_length: tokens of an input at evaluation.
        max_new_tokens: of a generation.
        instances_per_expert: S, training instances of each expert, its keys.
        means_per_expert: of them, 1 to 10, that are its keys in their place; None for the instances.
        num_queries: Q, instances of a target task that vote.
        top_k: experts merged for RoE.
        encoder: ``auto``, ``minilm`` or ``tfidf``.
        text_format: of keys and queries.
        random_seed: seed of all stages.
        mesh_data: size of the mesh's data axis; -1 for all devices that `mesh_model` leaves.
        mesh_model: size of the mesh's model axis.
        stack_experts: prompt experts that train at once, in one program, and are scored at once; 1 is one
            after another.
        stack_at_once: most of them that are computed at once, the others in turn within the same step;
            None for all. Less memory, and where caches are small more speed.
        initial_checkpoint_path: folder of a base, or a hub name; None pretrains one. Its dimensions must be
            those of `network`.
    """

    workdir: storage.PathLike
    modules: tuple[str, ...]
    passages: tuple[str, ...]
    network: NetworkConfig
    pretrain: StageSettings | None
    prompt: StageSettings
    dataset: StageSettings
    multitask: StageSettings
    prompt_tasks: tuple[str, ...]
    datasets: tuple[str, ...]
    unseen_tasks: tuple[str, ...]
    generative_tasks: tuple[str, ...]
    title: str = "Expert language models"
    selection_note: str = ""
    heldout_prompts: tuple[str, ...] = ()
    vocab_pieces: int = 8000
    character_coverage: float = 0.9995
    chunk_length: int | None = None
    prefix_lm_share: float | None = None
    adapter_bottleneck: int | None = None
    max_eval_rows: int = 300
    eval_source_length: int = 512
    max_new_tokens: int = 64
    instances_per_expert: int = 100
    num_queries: int = 32
    top_k: int = 3
    encoder: str = "auto"
    text_format: str = "choice_instance"
    random_seed: int = 0
    mesh_data: int = -1
    mesh_model: int = 1
    stack_experts: int = 1
    stack_at_once: int | None = None
    initial_checkpoint_path: storage.PathLike | None = None
    bigbench_tasks: tuple[str, ...] = ()
    bbh_tasks: tuple[str, ...] = ()
    multitask_tasks: tuple[str, ...] = ()
    means_per_expert: int | None = None

    @property
    def target_tasks(self) -> tuple[str, ...]:
        """All tasks of data sets that no expert has seen."""
        return (*self.unseen_tasks, *self.generative_tasks, *self.bigbench_tasks, *self.bbh_tasks)

    @property
    def multitask_names(self) -> tuple[str, ...]:
        """Tasks and mixtures that the multitask baseline is trained on."""
        return self.multitask_tasks or self.datasets

    def __post_init__(self) -> None:
        check_types(self)
        fill_defaults(self)
        if (self.pretrain is None) == (self.initial_checkpoint_path is None):
            raise InputError(describe(
                "A study needs one base", where="study.pretrain and study.initial_checkpoint_path",
                got="both" if self.pretrain else "neither", expected="settings to pretrain one, or a folder"))
        check_positive(max_eval_rows=self.max_eval_rows, eval_source_length=self.eval_source_length,
                       max_new_tokens=self.max_new_tokens, num_queries=self.num_queries,
                       instances_per_expert=self.instances_per_expert, top_k=self.top_k,
                       stack_experts=self.stack_experts, stack_at_once=self.stack_at_once)
        check_means(self.means_per_expert, "study.means_per_expert")
        for name in ("modules", "passages", "prompt_tasks", "datasets", "multitask_tasks", "unseen_tasks",
                     "generative_tasks", "bigbench_tasks", "bbh_tasks", "heldout_prompts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            values = getattr(self, name)
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise InputError(describe("A name is given twice", where=f"study.{name}", got=twice))
        if self.top_k > len(self.prompt_tasks):
            raise InputError(describe("top_k is larger than the number of prompt experts",
                                      got=self.top_k, expected=f"at most {len(self.prompt_tasks)}"))
