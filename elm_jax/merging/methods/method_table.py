"""The table of merging methods; `compose` computes them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.merging.methods.parameter import Parameter

RESCALES = ("none", "density", "l1")
DIVISORS = ("sum", "absolute")
NEAR_ZERO = 0.1
"""A sum of weights below this share of the sum of their sizes nearly cancels: division magnifies by it."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A merging method: a row of the table, which says the steps that it takes.

    With task vectors ``d_i = x_i - base`` (``x_i`` itself where there is no base), every method but
    ``slerp`` is ``base + scale * sum_i m_i w_i r_i d_i [/ sum_i m_i w_i]``: ``r_i d_i`` is the task vector
    sparsified (`sparsify`) and rescaled (`rescale`), ``m_i`` is 1 where its sign is that of the sum
    (`consensus`; else 1 everywhere), and the division happens where `normalize` is set.

    Attributes:
        name: in `METHODS`.
        summary: what it is for, one line.
        equation: of one element.
        source: link to where it was published.
        needs_base: whether it works on task vectors.
        normalize: whether the sum is divided, unless a parameter ``normalize`` says otherwise.
        num_experts: how many it takes; None for any number.
        sparsify: ``magnitude``, ``random`` or None.
        consensus: whether signs are voted on, element by element.
        spherical: whether it goes along the arc between two experts.
        signed: whether weights may be negative.
        parameters: that it takes, beside the weights.
    """

    name: str
    summary: str
    equation: str
    source: str
    needs_base: bool = False
    normalize: bool = False
    num_experts: int | None = None
    sparsify: str | None = None
    consensus: bool = False
    spherical: bool = False
    signed: bool = True
    parameters: tuple[Parameter, ...] = ()

    def default_weights(self, count: int) -> tuple[float, ...]:
        """Default weights: 1 each if the method normalises them, else 1/E each."""
        return (1.0 if self.normalize or self.spherical else 1.0 / count,) * count

    @property
    def is_weighted_sum(self) -> bool:
        """Whether the result is a sum of the experts with weights that do not depend on their values."""
        return self.sparsify is None and not self.consensus and not self.spherical

    def settings(self, parameters: Mapping[str, Any], count: int, where: Any = None) -> dict[str, Any]:
        """All parameters of the method, checked, with defaults for those that are not given.

        Args:
            parameters: given ones, None for the default; of one that each expert has, one for all or each.
            count: how many experts there are.
            where: for errors.

        Raises:
            InputError: a parameter that the method does not take, or a value out of its range.
        """
        known = {each.name: each for each in self.parameters}
        for name, value in parameters.items():
            if name not in known and value is not None:
                raise unknown_name(f"parameter of {self.name}", name, known)
        found = {}
        for name, each in known.items():
            value = each.default if parameters.get(name) is None else parameters[name]
            if each.per_expert:
                values = value if isinstance(value, list | tuple) else (value,) * count
                if len(values) != count:
                    raise InputError(describe(f"There must be one {name} an expert", where=where,
                                              got=len(values), expected=count))
                found[name] = tuple(each.check(one, where) for one in values)
            else:
                found[name] = each.check(value, where)
        if found.get("divisor") == "absolute" and not found["normalize"]:
            raise InputError(describe("A divisor has no effect where nothing is divided", where=where,
                                      got=f"divisor absolute, and {self.name} with normalize false",
                                      cure="give normalize true, or leave the divisor out"))
        return found

    def divides(self, settings: Mapping[str, Any]) -> bool:
        """Whether the sum is divided by weights, under these settings."""
        return settings.get("normalize", self.normalize)

    def total(self, weights: Sequence[float], settings: Mapping[str, Any]) -> float:
        """What all elements are divided by: 1 without division, and where each has a divisor of its own."""
        if self.consensus or not (self.divides(settings) or self.spherical):
            return 1.0
        return math.fsum(map(abs, weights) if settings.get("divisor") == "absolute" else weights)


def _normalize(default: bool) -> Parameter:
    return Parameter("normalize", "bool", default, "divide by the sum of the weights that take part")


_DIVISOR = Parameter("divisor", "choice", "sum", choices=DIVISORS,
                     help="of normalize: the sum of the weights that take part, or of their absolute values")


def _rescale(default: str) -> Parameter:
    return Parameter("rescale", "choice", default, choices=RESCALES,
                     help="after thinning: divide by the density, or match the L1 norm from before")


_DENSITY = Parameter("density", "float", 1.0, "share of each task vector that is kept", 0, 1, per_expert=True)
_SCALE = Parameter("scale", "float", 1.0, "factor of the merged task vector (lambda)")
_SEED = Parameter("seed", "int", 0, "of the random masks", 0, 2**31 - 1)
_T = Parameter("t", "float", None, "share of the second expert; in place of weights", 0, 1)
_SUM = "y = base + scale * sum_i w_i (x_i - base)"

METHODS: dict[str, Method] = {method.name: method for method in (
    Method("mean", "weighted average; the soup, and the paper's merging of prompt experts",
           "y = sum_i w_i x_i / sum_i w_i, w_i >= 0", "https://arxiv.org/abs/2203.05482", normalize=True,
           signed=False),
    Method("linear", "weighted sum with any weights, normalised or not",
           "y = sum_i w_i x_i [/ sum_i w_i]", "https://arxiv.org/abs/2203.05482", normalize=True,
           parameters=(_normalize(True), _DIVISOR)),
    Method("task_arithmetic", "adds task vectors to the base; the paper's merging of dataset experts",
           _SUM + " [/ sum_i w_i]", "https://arxiv.org/abs/2212.04089", needs_base=True,
           parameters=(_normalize(False), _DIVISOR, _SCALE)),
    Method("ties", "keeps the largest changes, and those that agree in sign",
           "y = base + scale * sum_i m_i w_i top(d_i) / sum_i m_i w_i", "https://arxiv.org/abs/2306.01708",
           needs_base=True, normalize=True, sparsify="magnitude", consensus=True,
           parameters=(_DENSITY, _normalize(True), _DIVISOR, _rescale("none"), _SCALE)),
    Method("dare_linear", "drops changes at random, rescales the others, adds them up",
           "y = base + scale * sum_i w_i drop(d_i) / density_i", "https://arxiv.org/abs/2311.03099",
           needs_base=True, sparsify="random",
           parameters=(_DENSITY, _normalize(False), _DIVISOR, _rescale("density"), _SCALE, _SEED)),
    Method("dare_ties", "drops changes at random, then votes on signs as TIES does",
           "y = base + scale * sum_i m_i w_i drop(d_i) / density_i", "https://arxiv.org/abs/2311.03099",
           needs_base=True, sparsify="random", consensus=True,
           parameters=(_DENSITY, _normalize(False), _DIVISOR, _rescale("density"), _SCALE, _SEED)),
    Method("slerp", "along the arc between two experts, leaf by leaf",
           "y = sin((1-t) a) / sin a * x_1 + sin(t a) / sin a * x_2, a = angle(x_1, x_2)",
           "https://doi.org/10.1145/325334.325242", num_experts=2, spherical=True, signed=False,
           parameters=(_T,)),
)}
"""By name. A further method is a row here, with a step in `sparsify` or `compose` if it takes a new one."""


PARAMETERS = {each.name: each for method in METHODS.values() for each in method.parameters}
"""All parameters of all methods."""


def get_method(name: str) -> Method:
    """Returns a method by name; an unknown one is an InputError with the nearest names."""
    if name not in METHODS:
        raise unknown_name("merging method", name, METHODS)
    return METHODS[name]


def check_weights(method: Method, weights: Sequence[float] | None, count: int,
                  settings: Mapping[str, Any], where: Any = None) -> tuple[float, ...]:
    """Checks weights and returns them; None gives the method's default weights.

    Raises:
        InputError: another number of them than of experts, one that is not finite, or negative where that
            makes no sense; a sum of zero that should be divided by; experts that the method does not take.
    """
    check_count(method, count, where)
    weights = method.default_weights(count) if weights is None else tuple(weights)
    if len(weights) != count:
        raise InputError(describe("There must be one weight an expert", where=where,
                                  got=f"{len(weights)} weights", expected=count))
    if not all(isinstance(weight, int | float) and math.isfinite(weight) for weight in weights):
        raise InputError(describe("Weights must be finite numbers", where=where, got=list(weights)))
    if not method.signed and (min(weights) < 0 or math.fsum(weights) <= 0):
        raise InputError(describe(f"Weights of {method.name} must not be negative, nor all be zero",
                                  where=where, got=list(weights), cure="method linear takes any weights"))
    if abs(method.total(weights, settings)) < 1e-8:
        raise InputError(describe("Weights that sum to zero cannot be normalised", where=where,
                                  got=list(weights),
                                  cure="other weights, normalize false, or divisor absolute"))
    return tuple(float(weight) for weight in weights)


def resolve_weights(method: Method, weights: Sequence[float] | None, count: int,
                    settings: Mapping[str, Any], where: Any = None) -> tuple[float, ...]:
    """Checks and returns weights as `check_weights` does; for slerp, ``t`` gives the weights too."""
    if settings.get("t") is not None:
        if weights is not None:
            raise InputError(describe("Weights and t say the same, and both are given", where=where,
                                      got=f"weights {list(weights)}, t {settings['t']}",
                                      expected="one of them"))
        weights = (1 - settings["t"], settings["t"])
    return check_weights(method, weights, count, settings, where)


def to_json(method: Method, weights: Sequence[float], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Method, weights and all parameters as a JSON-ready dictionary for a card."""
    return {"method": method.name, "weights": list(weights),
            **{name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}}


def check_count(method: Method, count: int, where: Any = None) -> None:
    """Raises InputError if the method does not take this number of experts."""
    wrong = count < 1 if method.num_experts is None else count != method.num_experts
    if wrong:
        raise InputError(describe(f"Another number of experts than {method.name} takes", where=where,
                                  got=count, expected=method.num_experts or "1 or more"))


def no_base(method: Method) -> InputError:
    """The error for a method on task vectors that is given no base."""
    return InputError(describe(f"Method {method.name} works on differences from a base", got="no base",
                               expected="the base that the experts were trained from",
                               cure="give it, or take a method that needs none (`elm methods` lists them)"))


def settings_of(leaves: Sequence[Any]) -> list[dict[str, Any]]:
    """The settings of merged leaves, for a card: one entry for each group of leaves with equal settings."""
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for leaf in leaves:
        if hasattr(leaf, "settings"):
            groups.setdefault(repr(leaf.settings), (leaf.settings, []))[1].append(leaf.path)
    return [{**settings, "leaves": "all" if len(groups) == 1 else paths}
            for settings, paths in groups.values()]


def notes_on_signs(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a user should know of negative weights in a merge that divides; empty where they do no harm.

    Args:
        settings: see `settings_of`.
    """
    divided = [own for own in settings if get_method(own["method"]).divides(own)
               and own.get("divisor") != "absolute" and min(own["weights"]) < 0]
    for own in divided:
        weights, total = list(own["weights"]), math.fsum(own["weights"])
        cure = "--divisor absolute keeps each sign and bounds the divisor; normalize false does not divide"
        if get_method(own["method"]).consensus:
            return [f"{own['method']} divides each element by the sum of the weights that take part in it, "
                    f"which with weights {weights} may be negative or near zero: where an expert of negative "
                    f"weight wins the vote alone its sign cancels, so that it is added; where the weights "
                    f"nearly cancel the change is magnified (as in mergekit). Cure: {cure}"]
        if abs(total) < NEAR_ZERO * math.fsum(map(abs, weights)):
            return [f"{own['method']} divides by the sum of the weights {weights}, {total:.3g}, which "
                    f"magnifies every change. Cure: {cure}"]
    return []


def shares_of(settings: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Each parent's weight, divided as the method divides all elements; None if it differs by leaf.

    A vote on signs divides each element by the weights that take part in it: its weights are those given.
    """
    each = []
    for own in settings:
        total = get_method(own["method"]).total(own["weights"], own)
        each.append([weight / total for weight in own["weights"]])
    return [weights[0] if len(set(weights)) == 1 else None for weights in zip(*each, strict=True)]
