"""Checks that the rows of a split agree in the fields that a template reads, and in their types."""

from collections.abc import Callable, Mapping
from typing import Any

from elm_jax.data.prompts.templates import EMPTY_INPUT, EMPTY_TARGET, PromptTemplate, Rendered
from elm_jax.errors import InputError, describe

_KINDS = {bool: "true or false", int: "number", float: "number", str: "text", list: "list", tuple: "list",
          dict: "object"}


class RowChecks:
    """Compares the fields of each row with those of the rows before it.

    Args:
        template: the template; only fields that it reads are compared.
        place_of: from a row's index to its file and line, for the errors.
    """

    def __init__(self, template: PromptTemplate, place_of: Callable[[int], str]) -> None:
        self._template = template
        self._place_of = place_of
        self._fields: frozenset[str] = frozenset()
        self._kinds: dict[str, tuple[str, int]] = {}
        self._names = sorted(template.fields())

    def check(self, row: Mapping[str, Any], index: int) -> None:
        """Raises InputError if a row lacks a field, or has it in another type than an earlier row.

        A field may be null in some rows; one that the template guards may be missing.
        """
        if self._fields != row.keys():  # rows of one file may differ in their fields
            self._template.check_fields(row, self._place_of(index))
            self._fields = frozenset(row)
        for name in self._names:
            value = row.get(name)
            if value is None:
                continue
            kind = _KINDS.get(type(value), type(value).__name__)
            known, first = self._kinds.setdefault(name, (kind, index))
            if kind != known:
                raise InputError(describe(
                    f"Field {name!r} is of another type than before", where=self._place_of(index),
                    got=f"{kind}: {str(value)[:60]!r}", expected=f"{known}, as in {self._place_of(first)}"))


def ready_prompt(row: Mapping[str, Any], where: str) -> Rendered | str:
    """Reads a row that is a prompt already; returns it, or the reason why it is dropped.

    Args:
        row: ``inputs`` and ``targets`` (a text, or a list of texts that are all right), perhaps
            ``choices``; with ``scores``, one a choice, it needs no ``targets``; other fields are skipped.
        where: file and line of the row.

    Raises:
        InputError: a field is missing or of another type.
    """
    inputs, targets, choices = row.get("inputs"), row.get("targets"), row.get("choices") or ()
    if isinstance(targets, list | tuple) and targets:
        targets = targets[0]  # the others come as references
    if targets is None and row.get("scores"):
        targets = str(choices[0]) if choices else None  # the scores will say which
    for name, value in (("inputs", inputs), ("targets", targets)):
        if not isinstance(value, str):
            raise InputError(describe(f"Field {name!r} of a ready prompt is no text", where=where,
                                      got="no such field" if value is None else type(value).__name__))
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) for choice in choices):
        raise InputError(describe("Field 'choices' of a ready prompt is no list of texts", where=where,
                                  got=repr(choices)[:60]))
    if not inputs.strip() or not targets.strip():
        return EMPTY_TARGET if inputs.strip() else EMPTY_INPUT
    return Rendered(inputs, targets, tuple(choices) or None, None)
