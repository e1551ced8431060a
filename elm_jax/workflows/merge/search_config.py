"""The config of a search for merge weights."""

import dataclasses
import re

from elm_jax.errors import InputError, describe
from elm_jax.evaluation.evaluation_settings import EvaluationSettings
from elm_jax.merging.methods import method_table
from elm_jax.runtime.config_checks import (
    DEFAULT_MODULES,
    PathLike,
    check_choice,
    check_positive,
    check_range,
    check_types,
)
from elm_jax.workflows.choices import SEARCHES


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """Settings of one search for merge weights.

    Attributes:
        experts: folders of two or more experts of one base and one form.
        base: folder of their base.
        task: name of the task whose instances are searched on.
        split: ``train``, or another split, whose searched rows are then left out of the comparison; never a
            test split.
        num_examples: how many instances the search sees.
        labelled: whether their right answers are used; if not, the entropy of the choices is minimised.
        search: ``gradient`` or ``evolution``.
        steps: updates, or generations.
        population: weight vectors of a generation.
        at_once: number of them that are scored in parallel, each with its merged overlay; None for all.
        learning_rate: of Adam, for ``gradient``.
        l1: factor of the mean absolute weight; for methods whose weights are not normalised to sum one.
        seed: of the rows' draw and of the population.
        method: of the merge, a name in `method_table.METHODS`.
        parameters: of the method, beside the weights.
        max_rows: of the validation split a seeded random subset of at most this many rows counts, the same
            as `elm evaluate` scores; None for all.
        compare: whether the found weights and the uniform mean are compared on rows not searched.
        source_length: tokens of an input that are kept.
        max_new_tokens: of a generation, and of a target that is searched on.
        tokens_per_batch: see `EvaluationSettings`.
        expert_id: name of the merged expert; None for one made of its parents' names.
        modules: registries to import by name.
        prepared_dir: folder of prepared arrays; None prepares in memory.
    """

    experts: tuple[PathLike, ...]
    base: PathLike
    task: str
    split: str = "train"
    num_examples: int = 32
    labelled: bool = True
    search: str = "gradient"
    steps: int = 40
    population: int = 16
    at_once: int | None = None
    learning_rate: float = 0.1
    l1: float = 0.0
    seed: int = 0
    method: str = "mean"
    parameters: dict[str, object] = dataclasses.field(default_factory=dict)
    max_rows: int | None = None
    compare: bool = True
    source_length: int = 512
    max_new_tokens: int = 128
    tokens_per_batch: int = 8192
    expert_id: str | None = None
    modules: tuple[str, ...] = DEFAULT_MODULES
    prepared_dir: PathLike | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("search", self.search, SEARCHES)
        check_positive(num_examples=self.num_examples, steps=self.steps, learning_rate=self.learning_rate,
                       at_once=self.at_once, max_rows=self.max_rows)
        check_range("population", self.population, 4)
        check_range("l1", self.l1, 0.0)
        check_range("seed", self.seed, 0)
        check_split(self.split)
        method_table.get_method(self.method).settings(self.parameters, len(self.experts))
        if "t" in self.parameters:
            raise InputError(describe("The search finds what t would say", got=f"t = {self.parameters['t']}"))
        if self.l1 and self.space == "simplex":
            raise InputError(describe("The l1 term changes nothing where weights are shares of one",
                                      where=f"method {self.method}", got=f"l1 = {self.l1}",
                                      cure="leave it out, or take linear or task_arithmetic"))

    @property
    def space(self) -> str:
        """Space of the weights, a name in `weight_search.SPACES`.

        A method that divides by the weights' sum needs only weights of sum one. A sign vote divides by the
        sum of the weights that agree, element by element, which weights of both signs could bring near zero,
        unless absolute weights are summed.
        """
        method = method_table.get_method(self.method)
        divided = method.divides(self.parameters)
        bounded = self.parameters.get("divisor") == "absolute"
        if not method.signed or (divided and method.consensus and not bounded):
            return "simplex"
        return "plane" if divided else "free"

    @property
    def settings(self) -> EvaluationSettings:
        """The settings that turn instances into batches, in the search and in the comparison."""
        return EvaluationSettings(source_length=self.source_length, max_new_tokens=self.max_new_tokens,
                                  tokens_per_batch=self.tokens_per_batch)


def check_split(split: str) -> None:
    """Raises InputError for a test split, in any spelling: ``test``, ``test_r1``, ``test[:32]``."""
    if "test" in re.split(r"[^a-z]+", split.lower()):
        raise InputError(describe("Merge weights are never searched on a test split", got=split,
                                  expected="train, or validation, of which the searched rows are held back"))
