"""Plans a whole study: chip-hours of its stages, and bytes on disk."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from elm_jax.errors import InputError, describe
from elm_jax.models import families
from elm_jax.models.layers.gate_tasks import reads_tasks
from elm_jax.planning import traffic
from elm_jax.planning.chips import Topology
from elm_jax.runtime import trees
from elm_jax.runtime.terminal.text_tables import Column, document
from elm_jax.training import state as states
from elm_jax.types import Padded
from elm_jax.workflows.plan.step_plan import StepPlan, most_steps, plan_run, split_leaves
from elm_jax.workflows.study import study_checks
from elm_jax.workflows.study.study_config import StudyConfig
from elm_jax.workflows.study.study_runs import expert_config
from elm_jax.workflows.train.train_config import TrainConfig

SCORING_SHARE = 0.4
"""Assumed share of the chip's peak during scoring, for the upper figure."""
CHOICES, CHOICE_TOKENS = 4, 8
"""Numbers of choices, and of tokens of a choice, of a typical ranked row."""
GIGA = 1e9


@dataclasses.dataclass(frozen=True)
class Stage:
    """Chip-hours of one stage of a study.

    Attributes:
        name: of the stage.
        runs: how many of its kind.
        steps: of one run, at most; None for scoring.
        chip_hours: of all runs: at the bounds' maximum, and at their sum.
        remark: what the figure rests on.
    """

    name: str
    runs: int
    steps: int | None
    chip_hours: tuple[float, float]
    remark: str


@dataclasses.dataclass(frozen=True)
class StudyPlan:
    """Plan of a study: plans of its kinds of run, its stages, and bytes on disk by content."""

    plans: list[StepPlan]
    stages: list[Stage]
    disk: dict[str, float]

    @property
    def chip_hours(self) -> tuple[float, float]:
        """Chip-hours of the whole study."""
        return tuple(sum(stage.chip_hours[end] for stage in self.stages) for end in (0, 1))

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as a JSON-ready dictionary."""
        return {"plans": [plan.to_dict() for plan in self.plans],
                "stages": [dataclasses.asdict(stage) for stage in self.stages],
                "disk": self.disk, "chip_hours": self.chip_hours}

    def print_table(self, console: Console) -> None:
        """Prints stages and disk use as tables."""
        columns = (Column("stage"), Column("runs", kind="number"), Column("steps of one", kind="number"),
                   Column("chip-hours", kind="number"), Column("remark", kind="text"))
        rows = [(stage.name, stage.runs, "" if stage.steps is None else f"{stage.steps:,}",
                 _hours(stage.chip_hours), stage.remark) for stage in self.stages]
        rows.append(("in all", None, None, _hours(self.chip_hours), None))
        disk = [*self.disk.items(), ("in all", sum(self.disk.values()))]
        sizes = Column("GB", kind="number", show=lambda size: f"{size / GIGA:,.1f}")
        width = console.width if console.is_terminal else None
        for lines in (document(columns, rows, width, title="The whole study"),
                      document((Column("on disk"), sizes), disk, width)):
            console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _hours(found: tuple[float, float]) -> str:
    return f"{found[0]:,.0f} to {found[1]:,.0f}"


def plan_study(config: StudyConfig, topology: Topology) -> StudyPlan:
    """Plans every kind of run of a study; plans no pretraining if the config gives a base.

    Args:
        config: the study; its data need not be there.
        topology: the slice.
    """
    config = study_checks.expanded(config)
    runs = {
        "prompt": ("prompt experts", len(config.prompt_tasks), 1),
        "dataset": ("dataset experts", len(config.datasets), 1),
        "multitask": ("multitask baseline", 1, len(config.multitask_names)),
    }
    base = families.network_of(config.network).abstract_params()
    plans, stages, disk = [], [], {"base": 4.0 * trees.count(base)}
    for kind, (name, count, num_datasets) in runs.items():
        run = expert_config(config, kind, "(plan)", "(plan)", getattr(config, kind))
        # The baseline trains as dataset experts do, on more: one program is enough.
        known = plans[-1] if kind == "multitask" and config.multitask == config.dataset else None
        plan = known or plan_run(run, config.network, topology, name)
        plan = dataclasses.replace(plan, title=name, steps=most_steps(run, num_datasets))
        plans.append(plan)
        if plan.device_hours is None:
            raise InputError(describe("How long the stage trains depends on its data", where=f"study.{kind}",
                                      got="epochs without max_examples", cure="give one of them a cap"))
        hours = tuple(count * each for each in plan.device_hours)
        stages.append(Stage(f"train {name}", count, plan.steps, hours, "all at the cap of examples"))
        disk[name] = 4.0 * count * plan.trained
        disk[f"last checkpoints of {name}"] = count * _state_bytes(config, run)
    routed = len(config.prompt_tasks) + len(config.target_tasks)  # at most: equal choices are merged once
    disk["merged experts, at most"] = 4.0 * (plans[0].trained * routed + plans[1].trained)
    stages.append(_scoring(config, topology))
    return StudyPlan(plans, stages, disk)


def _state_bytes(config: StudyConfig, run: TrainConfig) -> float:
    """Bytes of one checkpoint: the trained leaves and the optimiser's state."""
    overlay, _ = split_leaves(run, config.network)
    return float(sum(leaf.size * leaf.dtype.itemsize
                     for leaf in jax.tree.leaves(states.abstract_state(overlay, run.optimizer))))


def _rows(*shape: int, tasks: bool = False) -> Padded:
    """Abstract padded rows: shapes only."""
    lengths = jax.ShapeDtypeStruct(shape[:-1], jnp.int32)
    return Padded(jax.ShapeDtypeStruct(shape, jnp.int32), lengths, tasks=lengths if tasks else None)


def _scoring(config: StudyConfig, topology: Topology) -> Stage:
    """The scoring stage: every expert on every task, one pass of the encoder and of the choices a row."""
    tasks = len(config.prompt_tasks) + len(config.target_tasks)
    models = len(config.prompt_tasks) + len(config.datasets) + 3  # base, baseline, merged dataset experts
    network = families.network_of(config.network)
    traced = jax.make_jaxpr(network.target_log_probs)(
        network.abstract_params(), _rows(1, config.eval_source_length, tasks=reads_tasks(network.config)),
        _rows(1, CHOICES, CHOICE_TOKENS))
    rows = tasks * config.max_eval_rows
    hours = models * rows * traffic.flops_of(traced) / topology.chip.flops / 3600
    return Stage("score the matrix", models, None, (hours, hours / SCORING_SHARE),
                 f"{tasks} tasks x {config.max_eval_rows} rows, at peak and at {SCORING_SHARE:.0%} of it")
