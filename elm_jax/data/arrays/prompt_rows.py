"""Rows of a prepared split as prompts and training examples, cut on the side that their task says."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from elm_jax.data.arrays.batch_forms import BatchForm
from elm_jax.data.arrays.batches import Example, Lengths, Tokens
from elm_jax.data.arrays.prepared import LEFT, PLAIN, PreparedSplit
from elm_jax.data.prompts.templates import dataset_path
from elm_jax.errors import InputError, describe
from elm_jax.models.layers.gate_tasks import number_of


def prompts_of(split: PreparedSplit, form: BatchForm, length: int, rows: Sequence[int] | None = None
               ) -> list[Tokens]:
    """Makes the prompts of a split's rows, each i32[n], cut to at most `length` tokens.

    Args:
        split: of a task.
        form: of the network's batches.
        length: tokens that are kept: the first ones, or the last if the task cuts on the left.
        rows: numbers of the rows; None for all.
    """
    inputs = (split.inputs(row) for row in (range(len(split)) if rows is None else rows))
    if split.cut_prompt == LEFT:
        inputs = (form.last_of(tokens, length) for tokens in inputs)
    return [form.prompt(tokens, length) for tokens in inputs]


def task_number(split: PreparedSplit, form: BatchForm) -> int | None:
    """Number of a split's task, the task's own or its data set's; None for a network that takes none.

    Raises:
        InputError: the network's gates know neither.
    """
    if not form.tasks:
        return None
    dataset = split.info.get("dataset") and dataset_path(split.info["dataset"], split.info.get("config"))
    return number_of(form.tasks, split.name, dataset)


def rendering_in(split: PreparedSplit) -> str:
    """How the inputs of a split are rendered, one of `prepared.RENDERINGS`."""
    return split.info.get("rendering", PLAIN)


def count_cut(split: PreparedSplit, form: BatchForm, length: int) -> int:
    """Number of rows whose prompt loses tokens if `length` are kept, or did in a chat template."""
    sizes = (form.prompt_length(split.lengths_of(row)[0]) for row in range(len(split)))
    return split.info.get("chat_cut", 0) + sum(size > length for size in sizes)


@dataclasses.dataclass(frozen=True)
class _LastOfPrompts:
    """A source of training examples whose inputs are cut on the left already."""

    split: PreparedSplit
    form: BatchForm
    length: int

    def __len__(self) -> int:
        return len(self.split)

    def example(self, index: int, epoch: int = 0) -> Example:
        """Inputs, cut on the left, and targets of a row."""
        inputs, targets = self.split.example(index, epoch)
        return self.form.last_of(inputs, self.length), targets

    def lengths_of(self, index: int, epoch: int = 0) -> tuple[int, int]:
        """Their lengths, without reading the tokens."""
        inputs, targets = self.split.lengths_of(index, epoch)
        lost = max(0, self.form.prompt_length(inputs) - self.length)
        return inputs - lost, targets


def examples_of(split: PreparedSplit, form: BatchForm, lengths: Lengths) -> PreparedSplit | _LastOfPrompts:
    """Makes the source of a split's training examples (`cursor.ExampleSource`).

    Args:
        split: of a task.
        form: of the network's batches.
        lengths: ``{'inputs': S, 'targets': T}``; the form cuts the ends of what is longer, but prompts that
            their task cuts on the left.

    Raises:
        InputError: rows that are longer than the network's context even when they are cut.
    """
    if misfits := form.misfits(map(split.lengths_of, range(len(split))), lengths):
        size, target = split.lengths_of(misfits[0])
        prompt = min(form.prompt_length(size), lengths["inputs"])
        raise too_long(split, misfits, f"{prompt} + {min(target, lengths['targets'])}", form.context,
                       cure="give smaller lengths (--source_length and --target_length, "
                       "or TASK_FEATURE_LENGTHS)")
    return _LastOfPrompts(split, form, lengths["inputs"]) if split.cut_prompt == LEFT else split


def check_context(split: PreparedSplit, form: BatchForm, prompts: Sequence[Tokens], behind: Sequence[int],
                  rows: Sequence[int] | None = None) -> None:
    """Raises InputError for rows whose prompt and answer are together longer than the network's context.

    Args:
        split: of the rows, for the error.
        form: of the network's batches.
        prompts: of the rows, cut.
        behind: most tokens that follow each: of its longest choice, or of a text to generate.
        rows: their numbers in the split; None for all.
    """
    if form.context is None:
        return
    sizes = np.asarray([len(prompt) for prompt in prompts]) + np.asarray(behind)
    found = np.flatnonzero(sizes > form.context)
    if len(found):
        first = found[0]
        numbers = found if rows is None else np.asarray(rows)[found]
        raise too_long(split, numbers, f"{len(prompts[first])} + {behind[first]}", form.context,
                       cure="keep fewer tokens of inputs (source_length) or generate fewer (max_new_tokens)")


def too_long(split: PreparedSplit, rows: Sequence[int], first: str, context: int, cure: str) -> InputError:
    """The error for rows of a split that are longer than the context."""
    others = f", and {len(rows) - 1} more row{'s' if len(rows) > 2 else ''}" if len(rows) > 1 else ""
    return InputError(describe(
        "Rows are longer than the network's context", where=f"{split.name} {split.split}, row {rows[0]}",
        got=f"{first} tokens of the prompt and behind it{others}", expected=f"at most {context} together",
        cure=cure))
