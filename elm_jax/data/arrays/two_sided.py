"""Training batches of encoder-decoders: inputs and targets in separate rows.

Names of the arrays are T5X's and SeqIO's. Targets are shifted right by one, behind the start token, to make
the decoder's inputs.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np

from elm_jax.data.arrays.batches import (
    Example,
    Lengths,
    Tokens,
    check_lengths,
    check_rows,
    of_segments,
    pack_rows,
    pad,
    task_rows,
    trim,
)
from elm_jax.errors import InputError, describe
from elm_jax.models.network import TASK_IDS
from elm_jax.types import Batch, SpecialIds


@dataclasses.dataclass(frozen=True)
class TwoSided:
    """Makes training batches for encoder-decoders (see `batch_forms.BatchForm`).

    Attributes:
        ids: of the network; its padding is no token of a text.
        tasks: see `batch_forms.BatchForm`.
        context: None: inputs and targets have no limit in common.
    """

    ids: SpecialIds
    tasks: tuple[str, ...] = ()
    context: ClassVar[None] = None

    def make(self, examples: Sequence[Example], lengths: Lengths, batch_size: int,
             task_ids: Sequence[int] | None = None) -> Batch:
        """Makes a batch of one example a row; missing rows are padding with weight 0.

        Args:
            examples: at most `batch_size` pairs of token lists; longer ones are cut, EOS kept.
            lengths: ``{'inputs': S, 'targets': T}``.
            batch_size: B.
            task_ids: number of each example's task, for a network that takes them.

        Returns:
            encoder_input_tokens i32[B, S]; decoder_input_tokens, decoder_target_tokens i32[B, T];
            decoder_loss_weights f32[B, T], 1 at every real target token; task_ids i32[B] for a network that
            takes them.
        """
        source_length, target_length = check_lengths(lengths)
        check_rows(len(examples), batch_size)
        empty = [np.zeros(0, np.int32)] * (batch_size - len(examples))
        inputs = [*(self.prompt(pair[0], source_length) for pair in examples), *empty]
        targets = [*(self.target(pair[1], target_length) for pair in examples), *empty]
        rows = pad(targets, target_length, self.ids.pad)
        ends = np.asarray(list(map(len, targets)))
        tasks = {}
        if self.tasks:
            rows_of = task_rows(None if task_ids is None else [[each] for each in task_ids],
                                [1] * len(examples))
            tasks[TASK_IDS] = np.asarray([*(own for own, in rows_of), *[0] * len(empty)], np.int32)
        return {
            **tasks,
            "encoder_input_tokens": pad(inputs, source_length, self.ids.pad),
            "decoder_input_tokens": self.shift_right(rows),
            "decoder_target_tokens": rows,
            "decoder_loss_weights": (np.arange(target_length) < ends[:, None]).astype(np.float32),
        }

    def make_packed(self, rows: Sequence[Sequence[Example]], lengths: Lengths, batch_size: int,
                    task_ids: Sequence[Sequence[int]] | None = None) -> Batch:
        """Makes a batch of several examples a row, separated by segment ids.

        Args:
            rows: at most `batch_size` lists of examples, each fitting into one row after cutting.
            lengths: ``{'inputs': S, 'targets': T}``.
            batch_size: B.
            task_ids: numbers of the tasks of each row's examples, for a network that takes them.

        Returns:
            The keys of `make`, and encoder_segment_ids, encoder_positions i32[B, S],
            decoder_segment_ids, decoder_positions i32[B, T]. Segments count from 1, positions from 0;
            padding has 0 in both. The decoder's inputs begin with the start token in every segment. In the
            place of task_ids stand encoder_task_ids i32[B, S] and decoder_task_ids i32[B, T].
        """
        check_rows(len(rows), batch_size)
        batch = self._empty(*check_lengths(lengths), batch_size)
        for row, examples in enumerate(rows):
            starts = (0, 0)
            for segment, example in enumerate(examples, start=1):
                starts = self._place(batch, row, segment, example, starts)
        weights = (batch["decoder_segment_ids"] > 0).astype(np.float32)
        tasks = {} if not self.tasks else {f"{side}_{TASK_IDS}": of_segments(
            task_rows(task_ids, list(map(len, rows))), batch[f"{side}_segment_ids"])
            for side in ("encoder", "decoder")}
        return {**batch, "decoder_loss_weights": weights, **tasks}

    def pack(self, sizes: Iterable[tuple[int, int]], lengths: Lengths) -> list[list[int]]:
        """Groups examples into rows: inputs and targets must both fit.

        Args:
            sizes: (number of input tokens, number of target tokens) of each example, in reading order.
                Longer ones count as cut.
            lengths: ``{'inputs': S, 'targets': T}``, what a row holds.
        """
        room = check_lengths(lengths)
        return pack_rows((tuple(map(min, size, room)) for size in sizes), room)

    def misfits(self, sizes: Iterable[tuple[int, int]], lengths: Lengths) -> list[int]:
        """Numbers of the examples that no row holds even when they are cut: none."""
        del sizes, lengths
        return []

    def prompt_length(self, size: int) -> int:
        """Number of tokens of the whole prompt of `size` input tokens, EOS among them: all."""
        return size

    def last_of(self, inputs: Tokens, length: int) -> Tokens:
        """The last `length` input tokens, EOS among them."""
        inputs = np.asarray(inputs, np.int32)
        return inputs[max(0, len(inputs) - length):]

    def prompt(self, inputs: Tokens, length: int) -> Tokens:
        """Cuts input tokens to at most `length`; EOS stays."""
        return trim(inputs, length, self.ids.eos)

    def target(self, targets: Tokens, length: int) -> Tokens:
        """Cuts target tokens to at most `length`; EOS stays."""
        return trim(targets, length, self.ids.eos)

    def shift_right(self, targets: np.ndarray) -> np.ndarray:
        """Shifts targets right by one, behind the start token: decoder inputs i32[..., T]."""
        shifted = np.full_like(targets, self.ids.start)
        shifted[..., 1:] = targets[..., :-1]
        return shifted

    def _empty(self, source_length: int, target_length: int, batch_size: int) -> dict[str, np.ndarray]:
        sides = (("encoder", source_length, ("input_tokens", "segment_ids", "positions")),
                 ("decoder", target_length, ("target_tokens", "input_tokens", "segment_ids", "positions")))
        fill = {name: self.ids.pad if "tokens" in name else 0 for _, _, names in sides for name in names}
        return {f"{side}_{name}": np.full((batch_size, length), fill[name], np.int32)
                for side, length, names in sides for name in names}

    def _place(self, batch: dict[str, np.ndarray], row: int, segment: int, example: Example,
               starts: tuple[int, int]) -> tuple[int, int]:
        """Writes an example into a row of the batch; returns where the next one starts."""
        ends = []
        for side, name, tokens, start in zip(
                ("encoder", "decoder"), ("input_tokens", "target_tokens"), example, starts, strict=True):
            length = batch[f"{side}_{name}"].shape[1]
            tokens = trim(tokens, length, self.ids.eos)
            if start + len(tokens) > length:
                raise InputError(describe(
                    "Examples do not fit into one packed row", where=f"row {row}, example {segment - 1}",
                    got=f"{start} + {len(tokens)} tokens", expected=f"at most {length}"))
            part = slice(start, start + len(tokens))
            batch[f"{side}_{name}"][row, part] = tokens
            batch[f"{side}_segment_ids"][row, part] = segment
            batch[f"{side}_positions"][row, part] = np.arange(len(tokens))
            if side == "decoder":
                batch["decoder_input_tokens"][row, part] = self.shift_right(tokens)
            ends.append(part.stop)
        return ends[0], ends[1]
