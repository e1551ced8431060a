"""Token lists -> rectangular numpy arrays: trimming, padding, packing, answer choices, length buckets.

Axis letters: B rows, S source length, T target length, C choices. `batch_forms` makes training batches.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.models.layers.gate_tasks import missing_tasks
from elm_jax.models.network import TASK_IDS
from elm_jax.types import Batch, Padded

Tokens: TypeAlias = np.ndarray
"""i32[n], without padding."""
Example: TypeAlias = tuple[Tokens, Tokens]
"""(inputs i32[n], targets i32[m])."""
Lengths: TypeAlias = Mapping[str, int]
"""{'inputs': S, 'targets': T}."""


def check_lengths(lengths: Lengths, where: str = "lengths") -> tuple[int, int]:
    """Checks ``{'inputs': S, 'targets': T}`` and returns (S, T).

    Raises:
        InputError: a name is missing or unknown, or a length is not a positive integer.
    """
    wrong_value = any(
        not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1
        for value in lengths.values()
    )
    if set(lengths) != {"inputs", "targets"} or wrong_value:
        raise InputError(
            describe("Feature lengths are wrong", where=where, got=dict(lengths),
                     expected="{'inputs': S, 'targets': T} with positive integers")
        )
    return int(lengths["inputs"]), int(lengths["targets"])


def trim(tokens: Tokens, length: int, eos_id: int) -> Tokens:
    """Cuts a sequence to `length` tokens; if it ended with EOS, the result does too.

    Args:
        tokens: i32[n].
        length: the most tokens to keep, at least 1.
        eos_id: the end token.

    Returns:
        i32[min(n, length)].
    """
    tokens = np.asarray(tokens, np.int32)
    if len(tokens) <= length:
        return tokens
    cut = tokens[:length].copy()
    if tokens[-1] == eos_id:
        cut[-1] = eos_id
    return cut


def pad(sequences: Sequence[Tokens], length: int, pad_id: int) -> np.ndarray:
    """Pads sequences to one array i32[len(sequences), length]; never cuts.

    Raises:
        InputError: a sequence is longer than `length`.
    """
    rows = np.full((len(sequences), length), pad_id, np.int32)
    for number, tokens in enumerate(sequences):
        if len(tokens) > length:
            raise InputError(
                describe("Sequence is longer than its row", where=f"sequence {number}",
                         got=len(tokens), expected=f"at most {length} tokens", cure="trim it first")
            )
        rows[number, : len(tokens)] = tokens
    return rows


def check_rows(count: int, batch_size: int) -> None:
    """Raises InputError if the batch size is not positive or smaller than the number of rows."""
    if batch_size < 1 or count > batch_size:
        raise InputError(
            describe("Batch does not hold its rows", got=f"{count} rows",
                     expected=f"at most batch_size={batch_size}, and batch_size at least 1")
        )


def pack_rows(
    needs: Iterable[tuple[int, ...]], room: tuple[int, ...], open_rows: int = 16
) -> list[list[int]]:
    """Groups examples into rows by greedy first-fit packing.

    Args:
        needs: what each example takes of a row's parts, in reading order: tokens of its inputs and of its
            targets, or of both together. None is more than `room`.
        room: what a row holds, part by part.
        open_rows: how many unfinished rows are tried; bounds the work per example.

    Returns:
        Rows, in the order in which they were opened, each a list of example numbers. Every number
        from 0 to the last appears exactly once.
    """
    rows: list[list[int]] = []
    left: list[list[int]] = []
    first_open = 0
    for number, need in enumerate(needs):
        for row in range(first_open, len(rows)):
            if all(free >= part for free, part in zip(left[row], need, strict=True)):
                break
        else:
            row = len(rows)
            rows.append([])
            left.append(list(room))
            first_open = max(0, len(rows) - open_rows)
        rows[row].append(number)
        left[row] = [free - part for free, part in zip(left[row], need, strict=True)]
    return rows


class ChoiceShape(NamedTuple):
    """Shape of a batch of instances with choices: B rows of S input tokens, C choices of T tokens."""

    rows: int
    source: int
    choices: int
    target: int


def make_choice_batch(
    prompts: Sequence[Tokens], choices: Sequence[Sequence[Tokens]], shape: ChoiceShape, pad_id: int
) -> Batch:
    """Makes a batch of instances with all their answer choices, for rank classification.

    Args:
        prompts: at most B token lists, none longer than S (`BatchForm.prompt` cuts them).
        choices: for each instance its choices' tokens, EOS included; never cut.
        shape: T holds the longest choice, C the largest number of choices.
        pad_id: fills rows up.

    Returns:
        inputs i32[B, S], input_lengths i32[B], choices i32[B, C, T], choice_lengths i32[B, C] (0 for no
        choice), choice_mask bool[B, C] (True for a real choice).

    Raises:
        InputError: a choice is longer than T, or an instance has more than C choices or none.
    """
    check_rows(len(prompts), shape.rows)
    rows = np.full((shape.rows, shape.choices, shape.target), pad_id, np.int32)
    lengths = np.zeros((shape.rows, shape.choices), np.int32)
    mask = np.zeros((shape.rows, shape.choices), bool)
    for number, own in enumerate(choices):
        longest = max((len(choice) for choice in own), default=0)
        if not 1 <= len(own) <= shape.choices or longest > shape.target:
            raise InputError(
                describe("Choices do not fit; none is ever cut", where=f"instance {number}",
                         got=f"{len(own)} choices, the longest of {longest} tokens",
                         expected=f"1 to {shape.choices} choices of at most {shape.target} tokens",
                         cure="choose a larger bucket")
            )
        rows[number, : len(own)] = pad(own, shape.target, pad_id)
        lengths[number, : len(own)] = [len(choice) for choice in own]
        mask[number, : len(own)] = True
    return {**pad_prompts(prompts, shape.rows, shape.source, pad_id),
            "choices": rows, "choice_lengths": lengths, "choice_mask": mask}


def pad_prompts(prompts: Sequence[Tokens], rows: int, length: int, pad_id: int) -> Batch:
    """Pads at most B prompts to inputs i32[B, S] and input_lengths i32[B]; missing ones have length 0."""
    missing = [np.zeros(0, np.int32)] * (rows - len(prompts))
    found = [*prompts, *missing]
    lengths = np.asarray(list(map(len, found)), np.int32)
    return {"inputs": pad(found, length, pad_id), "input_lengths": lengths}


def padded(batch: Batch, name: str) -> Padded:
    """Returns ``inputs`` or ``choices`` of a batch, with lengths, and what else it has of them."""
    tasks = batch.get(TASK_IDS) if name == "inputs" else None
    return Padded(batch[name], batch[f"{name.removesuffix('s')}_lengths"], batch.get(f"{name}_states"), tasks)


def task_rows(task_ids: Sequence[Sequence[int]] | None, counts: Sequence[int]) -> Sequence[Sequence[int]]:
    """Checks the numbers of tasks of each row's examples, for a network that takes them; returns them.

    Args:
        task_ids: of each row's examples.
        counts: numbers of examples of the rows.

    Raises:
        InputError: none are given, or not one an example.
    """
    if task_ids is None:
        raise missing_tasks("training rows")
    if list(map(len, task_ids)) != list(counts):
        raise InputError(describe("Each example needs the number of its task",
                                  got=f"{sum(map(len, task_ids))} of {sum(counts)} examples"))
    return task_ids


def of_segments(values: Sequence[Sequence[int]], segment_ids: np.ndarray) -> np.ndarray:
    """Gives each token the value of its segment: i32[B, L]; padding has 0.

    Args:
        values: of the segments of each row, in their order; rows may be missing at the end.
        segment_ids: i32[B, L], from 1; padding has 0.
    """
    found = np.zeros_like(segment_ids)
    for row, own in enumerate(values):
        found[row] = np.asarray([0, *own], np.int32)[segment_ids[row]]
    return found


def choose_bucket(length: int, buckets: Sequence[int]) -> int:
    """Returns the smallest bucket that holds `length` tokens.

    Args:
        length: number of tokens.
        buckets: row lengths in rising order; a run compiles one program for each that it meets.

    Raises:
        InputError: the buckets do not rise, or none holds `length`.
    """
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
        raise InputError(
            describe("Length buckets are wrong", got=list(buckets),
                     expected="rising positive lengths")
        )
    for bucket in buckets:
        if length <= bucket:
            return bucket
    raise InputError(
        describe("No length bucket is large enough", got=length, expected=f"at most {buckets[-1]}",
                 cure="add a larger bucket")
    )
