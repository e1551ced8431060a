"""Training batches of decoder-only networks: prompt and target joined in one row, loss on the target."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from elm_jax.data.arrays.batches import (
    Example,
    Lengths,
    Tokens,
    check_lengths,
    check_rows,
    of_segments,
    pack_rows,
    task_rows,
    trim,
)
from elm_jax.errors import InputError, describe
from elm_jax.models.network import TASK_IDS
from elm_jax.types import Batch, SpecialIds


@dataclasses.dataclass(frozen=True)
class Joined:
    """Makes training batches for decoder-only networks (see `batch_forms.BatchForm`).

    A row holds S + T tokens, or as many as the network's context does. Segment ids mark padding, not token
    ids: the padding token may be EOS, and id 0 may be a real token.

    Attributes:
        ids: of the network.
        context: most tokens of a row; None for no limit.
        tasks: see `batch_forms.BatchForm`.
    """

    ids: SpecialIds
    context: int | None = None
    tasks: tuple[str, ...] = ()

    def make(self, examples: Sequence[Example], lengths: Lengths, batch_size: int,
             task_ids: Sequence[int] | None = None) -> Batch:
        """Makes a batch of one example a row, with the keys of `make_packed`; missing rows have weight 0."""
        return self.make_packed([[example] for example in examples], lengths, batch_size,
                                None if task_ids is None else [[each] for each in task_ids])

    def make_packed(self, rows: Sequence[Sequence[Example]], lengths: Lengths, batch_size: int,
                    task_ids: Sequence[Sequence[int]] | None = None) -> Batch:
        """Makes a batch of several examples a row, separated by segment ids.

        Args:
            rows: at most `batch_size` lists of examples, each fitting into one row after cutting: a prompt to
                S tokens, a target to T, EOS kept.
            lengths: ``{'inputs': S, 'targets': T}``.
            batch_size: B.
            task_ids: numbers of the tasks of each row's examples, for a network that takes them.

        Returns:
            tokens, target_tokens (of the next place), segment_ids, positions i32[B, L] and loss_weights
            f32[B, L], 1 where the next token is one of the target; L is S + T, or the context if that is
            less. Segments count from 1 and positions from 0 in each; padding has 0 in both. For a network
            that takes them also task_ids i32[B, L].
        """
        source_length, target_length = check_lengths(lengths)
        check_rows(len(rows), batch_size)
        shape = (batch_size, self._width(source_length, target_length))
        batch = {name: np.full(shape, self.ids.pad, np.int32) for name in ("tokens", "target_tokens")}
        batch |= {name: np.zeros(shape, np.int32) for name in ("segment_ids", "positions")}
        batch["loss_weights"] = np.zeros(shape, np.float32)
        for row, examples in enumerate(rows):
            start = 0
            for segment, (inputs, targets) in enumerate(examples, start=1):
                prompt, target = self.prompt(inputs, source_length), self.target(targets, target_length)
                start = _place(batch, row, segment, (prompt, target), start)
        if self.tasks:
            numbers = task_rows(task_ids, list(map(len, rows)))
            batch[TASK_IDS] = of_segments(numbers, batch["segment_ids"])
        return batch

    def pack(self, sizes: Iterable[tuple[int, int]], lengths: Lengths) -> list[list[int]]:
        """Groups examples into rows: prompt and target of an example must fit together.

        Args:
            sizes: (number of input tokens, number of target tokens) of each example, in reading order.
                Longer ones count as cut.
            lengths: ``{'inputs': S, 'targets': T}``; a row holds S + T, or the context if that is less.
        """
        room = check_lengths(lengths)
        width = self._width(*room)
        # A prompt loses its EOS and gains what stands in front; only inputs without EOS grow by one.
        needs = (min(size + 1, room[0]) + min(target, room[1]) for size, target in sizes)
        return pack_rows(((min(need, width),) for need in needs), (width,))

    def misfits(self, sizes: Iterable[tuple[int, int]], lengths: Lengths) -> list[int]:
        """Numbers of the examples that no row holds: prompt and target, cut, are longer than the context.

        Args:
            sizes: (number of input tokens, number of target tokens) of each example, EOS among them.
            lengths: ``{'inputs': S, 'targets': T}``.
        """
        room = check_lengths(lengths)
        width = self._width(*room)
        if width == sum(room):
            return []
        return [number for number, (size, target) in enumerate(sizes)
                if min(self.prompt_length(size), room[0]) + min(target, room[1]) > width]

    def prompt_length(self, size: int) -> int:
        """Number of tokens of the whole prompt of `size` input tokens, EOS among them."""
        return max(1, size - 1 + (self.ids.bos is not None))

    def last_of(self, inputs: Tokens, length: int) -> Tokens:
        """The last input tokens, as many as a prompt of at most `length` keeps."""
        inputs = np.asarray(inputs, np.int32)
        kept = length - (self.ids.bos is not None) + (len(inputs) > 0 and inputs[-1] == self.ids.eos)
        return inputs[max(0, len(inputs) - kept):]

    def prompt(self, inputs: Tokens, length: int) -> Tokens:
        """Cuts input tokens at the end to at most `length`, without EOS: the target follows them.

        In front stands BOS where the network has one; an empty prompt is EOS alone where it has none.
        """
        inputs = np.asarray(inputs, np.int32)
        own = inputs[:-1] if len(inputs) and inputs[-1] == self.ids.eos else inputs
        if self.ids.bos is None:
            front = [] if len(own) else [self.ids.eos]
        else:
            front = [self.ids.bos]
        return np.concatenate([np.array(front, np.int32), own])[:length]

    def target(self, targets: Tokens, length: int) -> Tokens:
        """Cuts target tokens to at most `length`; EOS stays."""
        return trim(targets, length, self.ids.eos)

    def _width(self, source_length: int, target_length: int) -> int:
        whole = source_length + target_length
        return whole if self.context is None else min(whole, self.context)


def _place(batch: dict[str, np.ndarray], row: int, segment: int, example: Example, start: int) -> int:
    """Writes an example into a row of the batch; returns where the next one starts."""
    prompt, target = example
    tokens = np.concatenate([prompt, target])
    length = batch["tokens"].shape[1]
    if start + len(tokens) > length:
        raise InputError(describe(
            "Examples do not fit into one packed row", where=f"row {row}, example {segment - 1}",
            got=f"{start} + {len(tokens)} tokens", expected=f"at most {length}"))
    part = slice(start, start + len(tokens))
    batch["tokens"][row, part] = tokens
    batch["target_tokens"][row, part][:-1] = tokens[1:]
    batch["loss_weights"][row, part][max(0, len(prompt) - 1):-1] = 1.0
    batch["segment_ids"][row, part] = segment
    batch["positions"][row, part] = np.arange(len(tokens))
    return part.stop
