"""Settings of generating texts. Imports nothing that computes."""

import dataclasses
import math
from typing import Any

from elm_jax.errors import InputError, describe

LARGEST_SEED = 2**32
LARGEST_TEMPERATURE = 100.0


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """How texts are generated; without a temperature the likeliest token is taken at every step.

    Attributes:
        max_new_tokens: most tokens of a text, EOS included.
        temperature: 0 takes the likeliest token; above 0 tokens are drawn, from logits divided by it.
        top_k: only the k likeliest tokens can be drawn; None for all.
        top_p: only the likeliest tokens that together have this probability can be drawn; None for all.
        seed: of the draws; None for 0. The draws of a row depend on the seed and on its own prompt, and on
            how often the same prompt came before it, but on no other row.
        stop: strings; a text ends before the first that it contains.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises InputError for a setting out of range, or one that would have no effect."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        _check("max_new_tokens", self.max_new_tokens, _is_whole(self.max_new_tokens, 1),
               "a whole number above 0")
        _check("temperature", self.temperature, _is_number(self.temperature)
               and 0 <= self.temperature <= LARGEST_TEMPERATURE,
               f"a number from 0 (the likeliest token) to {LARGEST_TEMPERATURE:g}")
        _check("top_k", self.top_k, self.top_k is None or _is_whole(self.top_k, 1), "a whole number above 0")
        _check("top_p", self.top_p, self.top_p is None or (_is_number(self.top_p) and 0 < self.top_p <= 1),
               "a number above 0, at most 1")
        _check("seed", self.seed, self.seed is None or (_is_whole(self.seed, 0) and self.seed < LARGEST_SEED),
               f"a whole number from 0 to below {LARGEST_SEED}")
        _check("stop", self.stop, all(isinstance(each, str) and each for each in self.stop),
               "texts that are not empty")
        idle = [name for name in ("top_k", "top_p", "seed") if getattr(self, name) is not None]
        if not self.temperature and idle:
            raise InputError(describe(
                "A setting of drawing tokens has no effect without a temperature", where=", ".join(idle),
                got="temperature 0, which takes the likeliest token at every step",
                cure="give a temperature above 0, or leave these settings out"))

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature > 0

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings that have an effect as a JSON-ready dictionary."""
        fields = {**dataclasses.asdict(self), "stop": list(self.stop)}
        if not self.samples:
            return {name: fields[name] for name in ("max_new_tokens", "temperature", "stop")}
        return {**fields, "seed": self.seed or 0}


def _check(name: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(describe("Setting of generation is out of range", where=name, got=repr(value)[:200],
                                  expected=expected))


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
