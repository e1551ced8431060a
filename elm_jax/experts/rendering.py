"""How an expert's inputs are rendered: plainly, or as a user's turn of its base's chat template."""

from collections.abc import Sequence

from elm_jax.data.arrays.prepared import CHAT, PLAIN
from elm_jax.data.preparing.chat_rows import ChatFrame
from elm_jax.errors import InputError, describe
from elm_jax.experts.base import Base
from elm_jax.experts.card import ExpertCard
from elm_jax.models.network import ids_of


def check_chat(base: Base, wanted: bool | None, where: str = "chat") -> None:
    """Raises InputError if a chat template is wanted and the base has none."""
    if wanted and base.chat_template is None:
        raise InputError(describe("The base has no chat template", where=where, got=base.path or base.name,
                                  expected="a base whose tokenizer brought one",
                                  cure="another base; or plainly: --no-chat, RENDERING = 'plain'"))


def frame_of(base: Base, rendering: str, max_length: int, where: str) -> ChatFrame | None:
    """The frame of rows in a rendering, one of `prepared.RENDERINGS`; None for plain ones.

    Args:
        base: whose chat template it is.
        rendering: of the rows.
        max_length: tokens of a prompt.
        where: who wants it so, for the error.

    Raises:
        InputError: the base has no chat template.
    """
    if rendering == PLAIN:
        return None
    check_chat(base, rendering == CHAT, where)
    return ChatFrame(base.chat_template, ids_of(base.config).bos, max_length)


def shared_rendering(cards: Sequence[ExpertCard], what: str) -> str:
    """The one rendering of all experts.

    Raises:
        InputError: they differ.
    """
    renderings = {card.rendering for card in cards}
    if len(renderings) > 1:
        raise InputError(describe(
            f"Experts of unlike renderings have no rows in common for {what}",
            got=", ".join(f"{card.id}: {card.rendering}" for card in cards), expected="one rendering",
            cure="take the experts of one rendering"))
    return renderings.pop() if renderings else PLAIN
