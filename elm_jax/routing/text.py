"""Texts that represent instances as keys or queries of a library.

Source: Jang et al., https://arxiv.org/abs/2302.03202, section 3.2; ELM.md 'Retrieval'.
"""

import dataclasses
from collections.abc import Callable

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.runtime.config_checks import check_characters, items_of

NONE = "None"
"""Replaces the choices of a template that has none."""


@dataclasses.dataclass(frozen=True)
class RoutingInstance:
    """One instance of a task, as routing uses it.

    Attributes:
        source: the rendered input.
        choices_expression: the template's own answer-choices expression, not the rendered labels;
            None if the template has none.
        labels: the rendered answer choices; empty if there are none.
    """

    source: str
    choices_expression: str | None = None
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks types and characters; turns the labels into a tuple, of one if they are a string."""
        labels = items_of(self.labels or ())
        texts = (self.source, self.choices_expression or "")
        if not all(isinstance(t, str) for t in (*texts, *labels)):
            raise InputError(
                describe(
                    "A routing instance is not made of texts",
                    got=f"{self.source!r}, {self.choices_expression!r}, {labels!r}",
                    expected="source: str, choices_expression: str or None, labels: several str",
                )
            )
        for text in (*texts, *labels):
            check_characters(text, "a routing instance")
        object.__setattr__(self, "labels", tuple(labels))


def _choice(instance: RoutingInstance) -> str:
    return instance.choices_expression or NONE


def _label(instance: RoutingInstance) -> str:
    return ", ".join(instance.labels) or NONE


FORMATS: dict[str, Callable[[RoutingInstance], str]] = {
    "instance": lambda instance: instance.source,
    "choice_instance": lambda instance: (
        f"Answer Choices: {_choice(instance)}, Instance: {instance.source}"
    ),
    "label_instance": lambda instance: (
        f"Answer Choices: {_label(instance)}, Instance: {instance.source}"
    ),
    "choice": _choice,
    "label": _label,
}
"""Text formats by name. A library has one, for its keys and its queries."""
WITHOUT_INPUT = ("choice", "label")
"""Formats of which the input is no part: instances of unlike tasks may have one text."""


def format_text(instance: RoutingInstance, text_format: str) -> str:
    """Formats one instance as a text, in one of `FORMATS`.

    Raises:
        InputError: there is no such format.

    Example:
        >>> format_text(RoutingInstance("Is it good?", "yes ||| no"), "choice_instance")
        'Answer Choices: yes ||| no, Instance: Is it good?'
    """
    if text_format not in FORMATS:
        raise unknown_name("text format", text_format, FORMATS)
    return FORMATS[text_format](instance)
