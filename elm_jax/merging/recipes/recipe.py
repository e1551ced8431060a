"""Merge recipes: how each leaf is merged, by expert and by part of the model, in order of precedence."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from elm_jax.errors import InputError, describe, in_short, unknown_name
from elm_jax.merging.methods.parameter import Parameter
from elm_jax.merging.recipes.depth import depth_of
from elm_jax.merging.recipes.leaf_settings import (
    Setting,
    check_setting,
    check_value,
    convert,
    resolve,
    rules_of,
)
from elm_jax.merging.recipes.regions import Region, check_layers, places_of

WEIGHT = "weight"
"""The setting that holds the experts' weights; every method has it."""


@dataclasses.dataclass(frozen=True)
class Scope:
    """Settings by name, and the experts and leaves to which they apply.

    Attributes:
        settings: name of a parameter, or ``weight``, to its setting.
        where: how messages name the place of these settings.
        expert: number of the expert they are for; None for all.
        region: the one of the recipe's regions that they are for; None for all.
    """

    settings: Mapping[str, Setting]
    where: str = "merge settings"
    expert: int | None = None
    region: Region | None = None


@dataclasses.dataclass(frozen=True)
class LeafRecipe:
    """The method, weights and parameters that merge one leaf.

    Attributes:
        method: the method's name.
        weights: one an expert; None where nothing is set: the method's own default.
        parameters: value by name; a tuple, one an expert, for a parameter that each expert has.
    """

    method: str
    weights: tuple[float, ...] | None
    parameters: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class MergeRecipe:
    """The method, weights and parameters that merge each leaf of a model.

    Attributes:
        method: the method's name.
        experts: how messages name the experts, in order.
        scopes: settings, in order of precedence.
        parameters: what the method takes.
        required: settings that every leaf needs from a scope.
        regions: empty, or parts that together make up the model.

    Raises:
        InputError: no expert; a setting of an unknown name, of another type or out of range, whichever leaf
            it is for.
    """

    method: str
    experts: tuple[str, ...]
    scopes: tuple[Scope, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    required: tuple[str, ...] = ()
    regions: tuple[Region, ...] = ()

    def __post_init__(self) -> None:
        specs = self._specs()
        if not self.experts:
            raise InputError(describe("Merging needs experts", got=0, expected="1 or more"))
        for scope in self.scopes:
            for name, setting in scope.settings.items():
                where = f"{scope.where}.{name}"
                if name not in specs:
                    raise unknown_name(f"parameter of {self.method}", name, specs, where=scope.where)
                if scope.expert is not None and not specs[name].per_expert:
                    raise InputError(describe(
                        "This parameter is one for all experts", where=where, got="a value for one of them"))
                check_setting(setting, specs[name], where)

    @classmethod
    def simple(
        cls, method: str, weights: Sequence[Setting | None] | None = None,
        parameters: Mapping[str, Setting | tuple[Setting, ...]] | None = None, *,
        experts: int | Sequence[str] | None = None, specs: Iterable[Parameter] = (),
    ) -> "MergeRecipe":
        """Makes a recipe of plain values.

        Args:
            method: the method's name.
            weights: one setting an expert; None for the method's own default.
            parameters: a setting for all experts, or a tuple of one an expert.
            experts: their number, or names for messages; None counts the weights.
            specs: what the method takes.

        Example:
            >>> MergeRecipe.simple("linear", [0.7, 0.3]).at("encoder/norm/scale", 0.0).weights
            (0.7, 0.3)
        """
        rows = dict(parameters or {})
        if weights is not None:
            rows[WEIGHT] = tuple(weights)
        if experts is None:
            experts = max((len(value) for value in rows.values() if isinstance(value, tuple)), default=0)
        if isinstance(experts, int):
            experts = [f"expert {number}" for number in range(1, experts + 1)]
        names = tuple(experts)
        scopes = []
        for name, value in rows.items():
            if not isinstance(value, tuple):
                scopes.append(Scope({name: value}, "parameters"))
                continue
            if len(value) != len(names):
                raise InputError(describe("There must be one value an expert", where=name,
                                          got=f"{len(value)} values", expected=f"{len(names)}"))
            scopes += [Scope({name: setting}, label, expert=number)
                       for number, (label, setting) in enumerate(zip(names, value, strict=True))
                       if setting is not None]
        return cls(method, names, tuple(scopes), tuple(specs))

    def at(self, leaf: str, depth: float) -> LeafRecipe:
        """Returns the weights and parameters of one leaf.

        Args:
            leaf: its name.
            depth: relative depth in its stack, as `depth_of` says; regions of layers compute their own.

        Raises:
            InputError: a required setting is missing, weights are given for some experts only, or the leaf
                lies outside of all regions.
        """
        found = [(region, self._resolve(leaf, own, region))
                 for region, own in places_of(leaf, depth, self.regions)]
        for region, other in found[1:]:
            if other != found[0][1]:
                raise InputError(describe(
                    "A leaf outside of the layers is given two settings", where=f"leaf {leaf}",
                    got=f"{found[0][0]}: {_words(found[0][1])}; {region}: {_words(other)}",
                    expected="one setting", cure="give both parts the same settings for this leaf"))
        return found[0][1]

    def plan(self, leaves: Iterable[str], depths: Mapping[str, float] | None = None) -> dict[str, LeafRecipe]:
        """Returns the weights and parameters of all leaves of a model.

        Args:
            leaves: their names.
            depths: by name; None takes `depth_of` these leaves, which must then be those of all layers.

        Raises:
            InputError: see `at`; and regions whose layers are not those of the model.
        """
        leaves = list(leaves)
        check_layers(self.regions, leaves)
        depths = depth_of(leaves) if depths is None else depths
        return {leaf: self.at(leaf, depths[leaf]) for leaf in leaves}

    def unmatched_filters(self, leaves: Iterable[str]) -> list[str]:
        """Filters that match no leaf, with their place in the file; most likely they are misspelt."""
        leaves = list(leaves)
        return list(dict.fromkeys(
            f"{scope.where}.{name}: {rule['filter']!r}"
            for scope in self.scopes for name, setting in scope.settings.items()
            for rule in rules_of(setting)
            if rule.get("filter") not in (None, "*") and not any(rule["filter"] in leaf for leaf in leaves)))

    def check_filters(self, leaves: Sequence[str]) -> None:
        """Raises InputError if a filter matches no leaf."""
        unmatched = self.unmatched_filters(leaves)
        if unmatched:
            raise InputError(describe("A filter matches no leaf", got="; ".join(unmatched),
                                      expected=f"a part of names such as {', '.join(leaves[:3])}"))

    def _specs(self) -> dict[str, Parameter]:
        return {WEIGHT: Parameter(WEIGHT, per_expert=True), **{p.name: p for p in self.parameters}}

    def _resolve(self, leaf: str, depth: float, region: Region | None) -> LeafRecipe:
        values: dict[str, Any] = {}
        for name, spec in self._specs().items():
            if not spec.per_expert:
                values[name] = self._value(spec, None, leaf, depth, region)
                continue
            each = tuple(self._value(spec, number, leaf, depth, region)
                         for number in range(len(self.experts)))
            if None in each and any(value is not None for value in each):
                lacking = self.experts[each.index(None)]
                raise InputError(describe(f"An expert has no {name}", where=f"leaf {leaf}, {lacking}",
                                          expected=f"a {name} for every expert, or for none"))
            values[name] = None if None in each else each
        weights = values.pop(WEIGHT)
        return LeafRecipe(self.method, weights, values)

    def _value(self, spec: Parameter, expert: int | None, leaf: str, depth: float,
               region: Region | None) -> Any:
        for scope in self.scopes:
            if (spec.name not in scope.settings or scope.expert not in (None, expert)
                    or scope.region not in (None, region)):
                continue
            where = f"{scope.where}.{spec.name}, leaf {leaf}" + _of(self.experts, expert)
            value = resolve(scope.settings[spec.name], leaf, depth, spec.kind, where)
            if value is not None:
                check_value(value, spec, where)
                return value
        if spec.name in self.required:
            raise InputError(describe(
                f"{self.method} needs a {spec.name} for every leaf",
                where=f"leaf {leaf}" + _of(self.experts, expert), got="no setting that matches",
                cure="add a rule without a filter, as the last one"))
        return spec.default


def parse_patterns(
    texts: Iterable[str], default: Sequence[float] | None = None
) -> tuple[Setting, ...] | None:
    """Parses weights by parts of leaf names, from texts such as ``SelfAttention=0.7,0.3``.

    Args:
        texts: each a part of leaf names, ``=``, and one weight an expert; the first that matches counts.
        default: weights of the leaves that no text matches; None leaves them to the method's own default.

    Returns:
        One setting an expert; None if there are neither texts nor a default.

    Raises:
        InputError: another form, unlike numbers of weights, or a text that can never count, because an
            earlier one matches the same leaves.

    Example:
        >>> parse_patterns(["norm=1,0"], [0.5, 0.5])[1]
        [{'value': 0.0, 'filter': 'norm'}, {'value': 0.5, 'filter': None}]
    """
    rows: list[tuple[str | None, list[float]]] = []
    for text in texts:
        pattern, equals, values = text.rpartition("=")
        if not (equals and pattern.strip() and values.strip()):
            raise InputError(describe("Weights of a part of the leaves have another form", got=repr(text),
                                      expected="a part of leaf names, =, and weights: norm=0.7,0.3"))
        where = f"weights of {pattern!r}"
        for earlier, _ in rows:
            if earlier == "*" or earlier in pattern:
                raise InputError(describe("These weights can never count", where=where,
                                          got=f"{earlier!r} matches the same leaves before",
                                          cure="name the longer pattern first"))
        rows.append((pattern, [convert(value.strip(), "float", where) for value in values.split(",")]))
    if default is not None:
        rows.append((None, [convert(value, "float", "weights") for value in default]))
    for pattern, values in rows:
        if len(values) != len(rows[-1][1]):
            raise InputError(describe("There must be one weight an expert", where=f"weights of {pattern!r}",
                                      got=f"{len(values)} weights", expected=len(rows[-1][1])))
    if not rows:
        return None
    return tuple([{"value": values[number], "filter": pattern} for pattern, values in rows]
                 for number in range(len(rows[0][1])))


def _of(experts: Sequence[str], number: int | None) -> str:
    return "" if number is None else f", {experts[number]}"


def _words(found: LeafRecipe) -> str:
    return in_short({WEIGHT: found.weights, **found.parameters})
