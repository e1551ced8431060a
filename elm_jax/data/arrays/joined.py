"""Training batches of decoder-only networks: prompt and target joined in one row, loss on the target."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from elm_jax.data.arrays.batches import Example, Lengths, Tokens, check_lengths, check_rows, pack_rows, trim
from elm_jax.errors import InputError, describe
from elm_jax.types import Batch, SpecialIds


@dataclasses.dataclass(frozen=True)
class Joined:
    """Makes training batches for decoder-only networks (see `batch_forms.BatchForm`).

    A row holds S + T tokens. Segment ids mark padding, not token ids: the padding token may be EOS, and id 0
    may be a real token.

    Attributes:
        ids: of the network.
    """

    ids: SpecialIds

    def make(self, examples: Sequence[Example], lengths: Lengths, batch_size: int) -> Batch:
        """Makes a batch of one example a row, with the keys of `make_packed`; missing rows have weight 0."""
        return self.make_packed([[example] for example in examples], lengths, batch_size)

    def make_packed(self, rows: Sequence[Sequence[Example]], lengths: Lengths, batch_size: int) -> Batch:
        """Makes a batch of several examples a row, separated by segment ids.

        Args:
            rows: at most `batch_size` lists of examples, each fitting into one row after cutting: a prompt to
                S tokens, a target to T, EOS kept.
            lengths: ``{'inputs': S, 'targets': T}``.
            batch_size: B.

        Returns:
            tokens, target_tokens (of the next place), segment_ids, positions i32[B, S + T] and loss_weights
            f32[B, S + T], 1 where the next token is one of the target. Segments count from 1 and positions
            from 0 in each; padding has 0 in both.
        """
        source_length, target_length = check_lengths(lengths)
        check_rows(len(rows), batch_size)
        shape = (batch_size, source_length + target_length)
        batch = {name: np.full(shape, self.ids.pad, np.int32) for name in ("tokens", "target_tokens")}
        batch |= {name: np.zeros(shape, np.int32) for name in ("segment_ids", "positions")}
        batch["loss_weights"] = np.zeros(shape, np.float32)
        for row, examples in enumerate(rows):
            start = 0
            for segment, (inputs, targets) in enumerate(examples, start=1):
                prompt, target = self.prompt(inputs, source_length), self.target(targets, target_length)
                start = _place(batch, row, segment, (prompt, target), start)
        return batch

    def pack(self, sizes: Iterable[tuple[int, int]], lengths: Lengths) -> list[list[int]]:
        """Groups examples into rows: prompt and target of an example must fit together.

        Args:
            sizes: (number of input tokens, number of target tokens) of each example, in reading order.
                Longer ones count as cut.
            lengths: ``{'inputs': S, 'targets': T}``; a row holds S + T.
        """
        room = check_lengths(lengths)
        # A prompt loses its EOS and gains what stands in front; only inputs without EOS grow by one.
        return pack_rows(((min(size + 1, room[0]) + min(target, room[1]),) for size, target in sizes),
                         (sum(room),))

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
