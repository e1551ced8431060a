"""Token lists -> rectangular numpy batches: trim, pad, pack, choices, length buckets.

Key names are T5X's and SeqIO's. Axis letters: B rows, S source length, T target length, C choices.
Padding id 0; targets are shifted right by one to make the decoder's inputs, which start with 0.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.types import Batch

PAD_ID = 0
EOS_ID = 1

Tokens: TypeAlias = np.ndarray
"""i32[n], without padding."""
Example: TypeAlias = tuple[Tokens, Tokens]
"""(inputs i32[n], targets i32[m])."""
Lengths: TypeAlias = Mapping[str, int]
"""{'inputs': S, 'targets': T}."""


def check_lengths(lengths: Lengths, where: str = "lengths") -> tuple[int, int]:
    """The pair (S, T) of ``{'inputs': S, 'targets': T}``.

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


def trim(tokens: Tokens, length: int, eos_id: int = EOS_ID) -> Tokens:
    """Cuts to `length` tokens; a sequence that ended with EOS still ends with it.

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


def pad(sequences: Sequence[Tokens], length: int) -> np.ndarray:
    """Pads (and never cuts) sequences with 0 to i32[len(sequences), length].

    Raises:
        InputError: a sequence is longer than `length`.
    """
    rows = np.full((len(sequences), length), PAD_ID, np.int32)
    for number, tokens in enumerate(sequences):
        if len(tokens) > length:
            raise InputError(
                describe("Sequence is longer than its row", where=f"sequence {number}",
                         got=len(tokens), expected=f"at most {length} tokens", cure="trim it first")
            )
        rows[number, : len(tokens)] = tokens
    return rows


def shift_right(targets: np.ndarray) -> np.ndarray:
    """Decoder inputs i32[..., T]: the targets one place later, after the start token 0."""
    shifted = np.zeros_like(targets)
    shifted[..., 1:] = targets[..., :-1]
    return shifted


def make_batch(examples: Sequence[Example], lengths: Lengths, batch_size: int) -> Batch:
    """One example a row; missing rows are padding with weight 0.

    Args:
        examples: at most `batch_size` pairs of token lists; longer ones are cut, EOS kept.
        lengths: ``{'inputs': S, 'targets': T}``.
        batch_size: B.

    Returns:
        encoder_input_tokens i32[B, S]; decoder_input_tokens, decoder_target_tokens i32[B, T];
        decoder_loss_weights f32[B, T], 1 at every real target token.
    """
    source_length, target_length = check_lengths(lengths)
    _check_rows(len(examples), batch_size)
    empty = [np.zeros(0, np.int32)] * (batch_size - len(examples))
    inputs = pad([trim(pair[0], source_length) for pair in examples] + empty, source_length)
    targets = pad([trim(pair[1], target_length) for pair in examples] + empty, target_length)
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": shift_right(targets),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets != PAD_ID).astype(np.float32),
    }


def _check_rows(count: int, batch_size: int) -> None:
    if batch_size < 1 or count > batch_size:
        raise InputError(
            describe("Batch does not hold its rows", got=f"{count} rows",
                     expected=f"at most batch_size={batch_size}, and batch_size at least 1")
        )


def pack_rows(
    sizes: Iterable[tuple[int, int]], lengths: Lengths, open_rows: int = 16
) -> list[list[int]]:
    """Greedy first-fit packing: which examples share a row.

    Args:
        sizes: (number of input tokens, number of target tokens) of each example, in reading order.
            Longer ones count as cut.
        lengths: ``{'inputs': S, 'targets': T}``, what a row holds.
        open_rows: how many unfinished rows are tried; bounds the work per example.

    Returns:
        Rows, in the order in which they were opened, each a list of example numbers. Every number
        from 0 to the last appears exactly once.
    """
    source_length, target_length = check_lengths(lengths)
    rows: list[list[int]] = []
    room: list[list[int]] = []
    first_open = 0
    for number, (num_inputs, num_targets) in enumerate(sizes):
        need = min(num_inputs, source_length), min(num_targets, target_length)
        for row in range(first_open, len(rows)):
            if room[row][0] >= need[0] and room[row][1] >= need[1]:
                break
        else:
            row = len(rows)
            rows.append([])
            room.append([source_length, target_length])
            first_open = max(0, len(rows) - open_rows)
        rows[row].append(number)
        room[row][0] -= need[0]
        room[row][1] -= need[1]
    return rows


def make_packed_batch(
    rows: Sequence[Sequence[Example]], lengths: Lengths, batch_size: int
) -> Batch:
    """Several examples a row, told apart by segment ids.

    Args:
        rows: at most `batch_size` lists of examples, each fitting into one row after cutting.
        lengths: ``{'inputs': S, 'targets': T}``.
        batch_size: B.

    Returns:
        The keys of `make_batch`, and encoder_segment_ids, encoder_positions i32[B, S],
        decoder_segment_ids, decoder_positions i32[B, T]. Segments count from 1, positions from 0;
        padding has 0 in both. The decoder's inputs start with 0 in every segment.
    """
    source_length, target_length = check_lengths(lengths)
    _check_rows(len(rows), batch_size)
    batch = {
        f"{side}_{name}": np.zeros((batch_size, length), np.int32)
        for side, length, names in (
            ("encoder", source_length, ("input_tokens", "segment_ids", "positions")),
            ("decoder", target_length,
             ("target_tokens", "input_tokens", "segment_ids", "positions")),
        )
        for name in names
    }
    for row, examples in enumerate(rows):
        starts = [0, 0]
        for segment, (inputs, targets) in enumerate(examples, start=1):
            inputs, targets = trim(inputs, source_length), trim(targets, target_length)
            where = f"row {row}, example {segment - 1}"
            at = _place(starts[0], len(inputs), source_length, where)
            batch["encoder_input_tokens"][row, at] = inputs
            batch["encoder_segment_ids"][row, at] = segment
            batch["encoder_positions"][row, at] = np.arange(len(inputs))
            to = _place(starts[1], len(targets), target_length, where)
            batch["decoder_target_tokens"][row, to] = targets
            batch["decoder_input_tokens"][row, to] = shift_right(targets)
            batch["decoder_segment_ids"][row, to] = segment
            batch["decoder_positions"][row, to] = np.arange(len(targets))
            starts = [at.stop, to.stop]
    weights = (batch["decoder_target_tokens"] != PAD_ID).astype(np.float32)
    return {**batch, "decoder_loss_weights": weights}


def _place(start: int, size: int, length: int, where: str) -> slice:
    if start + size > length:
        raise InputError(
            describe("Examples do not fit into one packed row", where=where,
                     got=f"{start} + {size} tokens", expected=f"at most {length}")
        )
    return slice(start, start + size)


def make_choice_batch(
    inputs: Sequence[Tokens], choices: Sequence[Sequence[Tokens]], *, source_length: int,
    target_length: int, num_choices: int, batch_size: int,
) -> Batch:
    """Instances with all their answer choices, for rank classification.

    Args:
        inputs: at most `batch_size` token lists; longer ones are cut to `source_length`, EOS kept.
        choices: for each instance its choices' tokens, EOS included; never cut.
        source_length: S.
        target_length: T, at least the longest choice.
        num_choices: C, at least the largest number of choices.
        batch_size: B.

    Returns:
        inputs i32[B, S], choices i32[B, C, T], choice_mask bool[B, C] (True for a real choice).

    Raises:
        InputError: a choice is longer than T, or an instance has more than C choices or none.
    """
    _check_rows(len(inputs), batch_size)
    empty = np.zeros(0, np.int32)
    rows = np.zeros((batch_size, num_choices, target_length), np.int32)
    mask = np.zeros((batch_size, num_choices), bool)
    for number, own in enumerate(choices):
        longest = max((len(choice) for choice in own), default=0)
        if not 1 <= len(own) <= num_choices or longest > target_length:
            raise InputError(
                describe("Choices do not fit; none is ever cut", where=f"instance {number}",
                         got=f"{len(own)} choices, the longest of {longest} tokens",
                         expected=f"1 to {num_choices} choices of at most {target_length} tokens",
                         cure="choose a larger bucket")
            )
        rows[number, : len(own)] = pad(own, target_length)
        mask[number, : len(own)] = True
    padded = [trim(tokens, source_length) for tokens in inputs]
    padded += [empty] * (batch_size - len(inputs))
    return {"inputs": pad(padded, source_length), "choices": rows, "choice_mask": mask}


def choose_bucket(length: int, buckets: Sequence[int], *, cut: bool = False) -> int:
    """The smallest bucket that holds `length` tokens.

    Args:
        length: number of tokens.
        buckets: row lengths in rising order; a run compiles one program for each that it meets.
        cut: whether something longer than the largest bucket may be cut to it.

    Raises:
        InputError: the buckets do not rise, or nothing holds `length` and `cut` is False.
    """
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
        raise InputError(
            describe("Length buckets are wrong", got=list(buckets),
                     expected="rising positive lengths")
        )
    for bucket in buckets:
        if length <= bucket:
            return bucket
    if cut:
        return buckets[-1]
    raise InputError(
        describe("No length bucket is large enough", got=length, expected=f"at most {buckets[-1]}",
                 cure="add a larger bucket")
    )
