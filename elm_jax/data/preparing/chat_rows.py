"""Rows as a user's turn of a base's chat template: the prompt is framed, the target follows at once."""

import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from elm_jax.data.arrays.prepared import CHAT, LEFT, RIGHT, PreparedSplit
from elm_jax.data.prompts.chat_templates import ChatTemplate
from elm_jax.errors import InputError, describe
from elm_jax.vocabularies.vocabulary import Vocabulary

logger = logging.getLogger(__name__)
REMEMBERED = 1 << 16
"""Number of targets and choices whose tokens are kept."""


@dataclasses.dataclass(frozen=True)
class ChatFrame:
    """The frame that a base's chat template puts around a prompt.

    Attributes:
        template: of the base.
        bos_id: that the network's prompts begin with anyway: a template's own is left out; None for none.
        max_length: tokens of a prompt, with BOS or EOS; a longer text is cut, within the frame.
    """

    template: ChatTemplate
    bos_id: int | None
    max_length: int

    def tokens(self, text: str, vocabulary: Vocabulary, where: str, side: str = RIGHT
               ) -> tuple[list[int], bool]:
        """Encodes a framed text without EOS; also returns whether the text was cut.

        Args:
            text: of the user's turn.
            vocabulary: of the base.
            where: the text came from, for the error.
            side: on which the text is cut, one of `prepared.PROMPT_CUTS`.

        Raises:
            InputError: the frame alone is too long; the template cannot be rendered.
        """
        framed, own = self._framed(text, vocabulary), None
        while (over := len(framed) + 1 - self.max_length) > 0:
            own = vocabulary.encode(text) if own is None else own
            if not own:
                raise InputError(describe(
                    "The chat template alone is longer than a prompt", where=where,
                    got=f"{len(framed) + 1} tokens", expected=f"at most {self.max_length}",
                    cure="keep more tokens of an input"))
            own = own[over:] if side == LEFT else own[:max(0, len(own) - over)]
            framed = self._framed(vocabulary.decode(own), vocabulary)
        return framed, own is not None

    def _framed(self, text: str, vocabulary: Vocabulary) -> list[int]:
        ids = vocabulary.encode(self.template.ask(text))
        return ids[1:] if ids[:1] == [self.bos_id] else ids


def with_chat(split: PreparedSplit, vocabulary: Vocabulary, frame: ChatFrame) -> PreparedSplit:
    """Frames the inputs of a split; targets and choices are encoded as what an assistant says, by themselves.

    Args:
        split: rendered plainly.
        vocabulary: of the base.
        frame: of the base.

    Returns:
        The same rows in the same order, with texts as they were; ``info`` says ``rendering``, and
        ``chat_cut``, how many texts were cut.

    Raises:
        InputError: as `ChatFrame.tokens`.
    """
    cut = [0]

    @functools.lru_cache(REMEMBERED)
    def said(text: str) -> Sequence[int]:
        return [*vocabulary.encode(text), vocabulary.eos_id]

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(len(split)):
            text = split.text(number)
            where = f"{split.name} {split.split}, row {number}"
            tokens, is_cut = frame.tokens(text["inputs"], vocabulary, where, split.cut_prompt)
            cut[0] += is_cut
            yield {"inputs": [*tokens, vocabulary.eos_id], "targets": said(text["targets"]),
                   "choices": [said(choice) for choice in text["choices"]], "label": split.label(number),
                   "text": text}

    made = PreparedSplit.from_rows(split.name, split.split, split.info, rows())
    made.info.update(rendering=CHAT, chat_cut=cut[0])
    if cut[0]:
        logger.info("%s %s: %d of %d texts are cut to fit into the chat template and %d tokens", split.name,
                    split.split, cut[0], len(made), frame.max_length)
    return made
