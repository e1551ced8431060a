"""Parameters of merging methods: kind, bounds, and the check of a value."""

import dataclasses
import math
from typing import Any

from elm_jax.errors import InputError, describe


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a merging method: a number, a boolean or a choice.

    Attributes:
        name: of the argument.
        kind: ``float``, ``bool``, ``int`` or ``choice``.
        default: where none is given; None if the method then does without.
        help: what it does, one line.
        low: smallest value of a float or int; minus infinity for no bound.
        high: largest value; infinity for no bound.
        choices: of a choice.
        per_expert: whether each expert may have its own.
    """

    name: str
    kind: str = "float"
    default: Any = None
    help: str = ""
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    per_expert: bool = False

    def check(self, value: Any, where: Any = None) -> Any:
        """Returns the value in the parameter's type; InputError for another type, or a value out of range."""
        if value is None and self.default is None:
            return None
        checked = _CHECKS[self.kind](self, value)
        if checked is None:
            raise InputError(describe(f"Parameter {self.name!r} cannot be this", where=where,
                                      got=repr(value)[:100], expected=self.range))
        return checked

    @property
    def range(self) -> str:
        """The allowed values, in words."""
        if self.kind == "choice":
            return " or ".join(self.choices)
        if self.kind == "bool":
            return "true or false"
        what = "a number" if self.kind == "float" else "an integer"
        if math.isinf(self.low) and math.isinf(self.high):
            return what
        return f"{what} from {self.low:g} to {self.high:g}"


def _check_float(parameter: Parameter, value: Any) -> float | None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fits and parameter.low <= value <= parameter.high else None


def _check_int(parameter: Parameter, value: Any) -> int | None:
    fits = isinstance(value, int) and not isinstance(value, bool)
    return value if fits and parameter.low <= value <= parameter.high else None


_CHECKS = {
    "float": _check_float,
    "int": _check_int,
    "bool": lambda parameter, value: value if isinstance(value, bool) else None,
    "choice": lambda parameter, value: value if value in parameter.choices else None,
}
