"""`elm evaluate`: folders of a base and of experts, scored on tasks into ``results.jsonl``."""

import dataclasses

from elm_jax.data.preparing.task_data import TaskData
from elm_jax.data.registry import registry
from elm_jax.evaluation.evaluator import EvaluationSettings, ResultsStore
from elm_jax.experts.base import load_base
from elm_jax.runtime import hosts, sharding, storage
from elm_jax.runtime.config_checks import check_positive, check_range, check_types
from elm_jax.workflows.evaluate.evaluate_models import ScoringSetup, evaluate_models, model_in, model_of


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """One evaluation.

    Attributes:
        base: folder of the base.
        tasks: names of tasks and mixtures.
        output: file of the results; what it holds is not scored again. ``predictions/`` stand beside it.
        experts: folders of experts; none scores the base itself.
        split: of every task; None for each task's own: validation, or the only one.
        max_rows: a seeded random subset of at most so many rows a task; None for what mixtures say, or all.
        source_length: tokens of an input that are kept.
        max_new_tokens: of a generation.
        few_shot: rows with answers to put before every input, as far as `source_length` allows.
        stack_experts: so many experts of one shape are scored in one program.
        mesh_data: parts of the mesh over which instances are split; -1 for all devices that are left.
        mesh_model: parts of the mesh over which parameters are split.
        mesh_experts: parts of the mesh over which a stack of experts is split.
        modules: registries to import by name.
        prepared_dir: folder of prepared arrays; None prepares in memory, of several processes beside the
            results.
    """

    base: str
    tasks: tuple[str, ...]
    output: str
    experts: tuple[str, ...] = ()
    split: str | None = None
    max_rows: int | None = None
    source_length: int = 512
    max_new_tokens: int = 128
    few_shot: int = 0
    stack_experts: int = 1
    mesh_data: int = -1
    mesh_model: int = 1
    mesh_experts: int = 1
    modules: tuple[str, ...] = ("elm_jax.tasks",)
    prepared_dir: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(max_rows=self.max_rows, stack_experts=self.stack_experts)
        check_range("few_shot", self.few_shot, 0)
        self.settings  # noqa: B018  raises for its own fields

    @property
    def settings(self) -> EvaluationSettings:
        """How instances become batches."""
        return EvaluationSettings(source_length=self.source_length, max_new_tokens=self.max_new_tokens,
                                  few_shot=self.few_shot)


def evaluate_folders(config: EvaluateConfig) -> ResultsStore:
    """Scores a base, or experts, on tasks; appends rows to the output, whose rows are not made again.

    Returns:
        All results of the output, also those that stood there before.

    Raises:
        InputError: folders, tasks or results that do not fit each other.
        Stopped: several processes were told to stop; what was scored is kept.
    """
    mesh = sharding.make_mesh(config.mesh_data, config.mesh_model, config.mesh_experts)
    base = load_base(config.base, mesh=mesh, rules=sharding.split_rules())
    output = storage.as_path(config.output)
    prepared = config.prepared_dir or (str(output.parent / "prepared") if hosts.count() > 1 else None)
    data = TaskData(base.vocabulary, tuple(config.modules), prepared,
                    few_shot=config.few_shot, few_shot_length=config.source_length)
    tasks = list(dict.fromkeys(task for name in config.tasks for task in data.tasks_of(name)))
    registry.import_tasks(config.modules)  # of registered tasks a changed template is noticed
    models = [model_in(base, folder, mesh=mesh) for folder in config.experts]
    store = ResultsStore(output.parent, output.name)
    most = data.evaluation_rows(config.tasks) if config.max_rows is None else config.max_rows
    setup = ScoringSetup(base, data, config.settings, mesh, config.split, most)
    evaluate_models(models or [model_of(base, None)], lambda _: tasks, setup, store,
                    stack_experts=config.stack_experts)
    return store
