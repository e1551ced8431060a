"""TaskInstances of a task, as tokens, grouped into batches of few shapes."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from elm_jax.data.arrays.batch_forms import BatchForm, form_of
from elm_jax.data.arrays.batches import ChoiceShape, Tokens, choose_bucket, make_choice_batch, pad_prompts
from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.arrays.prompt_rows import check_context, prompts_of, task_number
from elm_jax.errors import InputError, describe
from elm_jax.evaluation.evaluation_settings import CHOICE_TOKEN_COST, EvaluationSettings
from elm_jax.models.network import TASK_IDS, Network
from elm_jax.runtime import trees

SMALLEST_CHOICE_BUCKET = 2
FEWEST_ROWS = 4
"""Rows of the smallest batch, for each part of the mesh's data axis: fewer would save little."""
LEAST_SAVED = 10**10
"""Parameters times tokens that fewer rows must save: two cores compute so many in a tenth of a second. A
batch of other rows is another program to compile, and rounds the last bits of a score in another way."""


@dataclasses.dataclass(frozen=True, order=True)
class BatchShape:
    """Shape of one batch: S input tokens, C choices of T tokens (both 0 in a generation), B rows."""

    source: int
    choices: int
    target: int
    rows: int

    def holds(self, other: "BatchShape") -> bool:
        """Whether an instance of the other shape fits into a row of this one."""
        return (self.source >= other.source and self.choices >= other.choices
                and self.target >= other.target)

    def for_rows(self, count: int, data_axis: int, cost: int) -> "BatchShape":
        """The shape for `count` rows in all: of fewer rows, a power of two, if one batch is not filled.

        Args:
            count: of rows.
            data_axis: the rows are a multiple of it.
            cost: of a row, in parameters times tokens; rows that cost next to nothing stay.
        """
        fewer = min(self.rows, _power_of_two(-(-count // data_axis), FEWEST_ROWS) * data_axis)
        saved = (self.rows - fewer) // data_axis * cost
        return dataclasses.replace(self, rows=fewer if saved >= LEAST_SAVED else self.rows)


@dataclasses.dataclass(frozen=True)
class TaskInstances:
    """The instances of a split, as tokens.

    Attributes:
        split: of a task.
        form: of the network's batches.
        prompts: of each row, cut.
        choices: answer choices of each row; None where texts are generated.
        parameters: number of the network's, which says what a row costs.
        task: number of the split's task, for a network whose batches carry it; None for others.
    """

    split: PreparedSplit
    form: BatchForm
    prompts: list[Tokens]
    choices: list[list[Tokens]] | None
    parameters: int
    task: int | None = None

    @classmethod
    def of(cls, split: PreparedSplit, network: Network, settings: EvaluationSettings) -> "TaskInstances":
        """Makes prompts and choices of a split's rows, as one network takes them.

        Raises:
            InputError: the split has no rows, a row to rank has no choices, a prompt and what follows it are
                longer than the network's context, or the network's gates do not know the task.
        """
        where, form = f"{split.name} {split.split}", form_of(network)
        if not len(split):
            raise InputError(describe("There is nothing to evaluate", where=where, got="no rows"))
        choices = [split.choices(row) for row in range(len(split))] if split.kind == "rank" else None
        for row, own in enumerate(choices or ()):
            if not own:
                raise InputError(describe("A row has no choices to rank", got=f"row {row}", where=where))
        prompts = prompts_of(split, form, settings.source_length)
        check_context(split, form, prompts, [settings.max_new_tokens] * len(split) if choices is None
                      else [max(map(len, own)) for own in choices])
        return cls(split, form, prompts, choices, trees.count(network.abstract_params()),
                   task_number(split, form))

    def batch(self, shape: BatchShape, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Makes the batch of some rows: inputs i32[B, S], choices i32[B, C, T] if any, and their lengths.

        For a network that takes them also task_ids i32[B].
        """
        tasks = {} if self.task is None else {TASK_IDS: np.full(shape.rows, self.task, np.int32)}
        prompts = [self.prompts[row] for row in rows]
        if self.choices is None:
            # Copies of a real row, not empty ones: decoding continues until the last row has ended.
            prompts += prompts[:1] * (shape.rows - len(rows))
            return {**pad_prompts(prompts, shape.rows, shape.source, self.form.ids.pad), **tasks}
        batch = {**make_choice_batch(
            prompts, [self.choices[row] for row in rows],
            ChoiceShape(shape.rows, shape.source, shape.choices, shape.target), self.form.ids.pad), **tasks}
        del batch["choice_mask"]  # the lengths imply it
        return batch


def plan_batches(instances: TaskInstances, settings: EvaluationSettings, data_axis: int
                 ) -> Iterator[tuple[BatchShape, list[int]]]:
    """Groups rows into batches of few shapes, shortest prompts first.

    The number of rows of a shape follows from the token budget, so a run compiles one program for each
    bucket; one that does not fill a batch has fewer rows, if that saves something. Rows left over from a
    bucket join the half-empty batch of a larger one.

    Args:
        instances: the rows.
        settings: buckets and budget.
        data_axis: size of the mesh's data axis, of which the rows are a multiple.

    Yields:
        A shape and at most that many numbers of rows; every row comes once.
    """
    groups: dict[BatchShape, list[int]] = {}
    prompts = instances.prompts
    for number in sorted(range(len(prompts)), key=lambda number: (len(prompts[number]), number)):
        groups.setdefault(shape_of(instances, number, settings, data_axis), []).append(number)
    for shape in sorted(groups):
        left = len(groups[shape]) % shape.rows
        for larger in groups:
            free = -len(groups[larger]) % larger.rows
            if left and larger != shape and larger.holds(shape) and left <= free:
                groups[larger] += groups[shape][-left:]
                del groups[shape][-left:]
                break
    for full, numbers in sorted(groups.items()):
        tokens = full.source + (full.choices * full.target or settings.max_new_tokens)
        shape = full.for_rows(len(numbers), data_axis, tokens * instances.parameters)
        for start in range(0, len(numbers), shape.rows):
            yield shape, numbers[start:start + shape.rows]


def shape_of(instances: TaskInstances, number: int, settings: EvaluationSettings, data_axis: int
             ) -> BatchShape:
    """Shape of full batches of rows like the given one; no longer than the network's context."""
    context, choices = instances.form.context, instances.choices
    source = source_width(len(instances.prompts[number]), settings,
                          None if context is None else
                          context - (settings.max_new_tokens if choices is None else 0))
    count = target = 0
    if choices is not None:
        count = _power_of_two(len(choices[number]), SMALLEST_CHOICE_BUCKET)
        target = target_width(max(map(len, choices[number])), settings, context)
    tokens = max(source, CHOICE_TOKEN_COST * count * target)
    return BatchShape(source, count, target, max(1, settings.tokens_per_batch // tokens) * data_axis)


def source_width(length: int, settings: EvaluationSettings, most: int | None) -> int:
    """Width of the rows of a prompt of `length` tokens: a bucket of at most `most` and `source_length`."""
    limit = settings.source_length if most is None else min(settings.source_length, most)
    return choose_bucket(length, [*(bucket for bucket in settings.source_buckets if bucket < limit), limit])


def target_width(length: int, settings: EvaluationSettings, most: int | None) -> int:
    """Width of the rows of a choice of `length` tokens: a bucket or a power of two, at most `most`."""
    fitting = [bucket for bucket in settings.target_buckets if bucket >= length]
    width = fitting[0] if fitting else _power_of_two(length, 1)
    return width if most is None else min(width, most)


def _power_of_two(value: int, smallest: int) -> int:
    return max(smallest, 1 << (value - 1).bit_length())
