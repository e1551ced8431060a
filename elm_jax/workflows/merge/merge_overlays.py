"""Merges experts overlay by overlay: checks that they fit together, and plans how each leaf is merged."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.data.arrays.prepared import PLAIN
from elm_jax.errors import InputError, describe
from elm_jax.experts.card import ExpertCard
from elm_jax.formats.model import TensorSpec
from elm_jax.merging.methods import alike, compose, low_rank_products, method_table
from elm_jax.merging.methods.method_table import shares_of
from elm_jax.merging.recipes.depth import depth_of
from elm_jax.merging.recipes.recipe import LeafRecipe, MergeRecipe
from elm_jax.merging.stream import LeafMerge, LeafSource
from elm_jax.models.adapters.config import adapter_of
from elm_jax.models.adapters.kind import is_adapter_leaf
from elm_jax.models.adapters.low_rank import DOWN, UP, LowRankConfig, merged_config, place_of
from elm_jax.models.adapters.scaling import ScalingConfig
from elm_jax.types import Array
from elm_jax.workflows.merge import absent_layers

NO_WEIGHTS = ("dropout_rate", "dtype")
"""Fields of a network's config that affect how it runs, but not what its weights mean."""


def check_alike(cards: Sequence[ExpertCard], leaves: Sequence[Mapping[str, Any]], with_base: bool) -> None:
    """Raises InputError unless experts can be merged.

    Args:
        cards: of the experts.
        leaves: of each, by path, what has a shape and a dtype.
        with_base: whether there is a base, for norms that some of them did not train.

    Raises:
        InputError: they have unlike bases, kinds or networks, or unlike leaves, all of which are named. Of
            LoRA's updates ranks and layers may differ, and an update that an expert lacks counts as zero.
    """
    first = cards[0]
    absent_layers.check_layers(cards)
    for other, own in zip(cards[1:], leaves[1:], strict=True):
        for what, left, right in (("base", first.base["fingerprint"], other.base["fingerprint"]),
                                  ("kind", kind_of(first), kind_of(other)),
                                  ("network", _network(first), _network(other))):
            if left != right:
                if what == "network":
                    left, right = _unlike(left, right), _unlike(right, left)
                raise InputError(describe(
                    f"Experts of unlike {what} cannot be merged", where=f"{first.id} and {other.id}",
                    got=f"{left} and {right} ({_first_leaf(leaves[0], own)})", expected="the same for all"))
    shared = set(leaves[0]).intersection(*leaves[1:])
    absent = absent_layers.absent_norms(cards, leaves, with_base)
    alike.check_alike([{path: _without_rank(path, leaf, first) for path, leaf in own.items()
                        if path in shared or not (is_low_rank(path, first) or path in absent)}
                       for own in leaves],
                      [f"{card.id}#{n}" for n, card in enumerate(cards, start=1)])


def _without_rank(path: str, leaf: Any, card: ExpertCard) -> Any:
    """Shape of a leaf for comparison: for low-rank factors without the rank."""
    if not is_low_rank(path, card):
        return leaf
    outer = leaf.shape[0] if path.endswith(DOWN) else leaf.shape[1]
    return TensorSpec((outer,), np.dtype(leaf.dtype).name)


def kind_of(card: ExpertCard) -> str:
    """Kind of an expert; for a merged one that of its parents, which all have the same."""
    return card.parents[0]["kind"] if card.kind == "merged" and card.parents else card.kind


def _network(card: ExpertCard) -> dict[str, Any]:
    """The part of a network's config that must be equal: of low-rank updates that there are some."""
    network = {name: value for name, value in card.network.items() if name not in NO_WEIGHTS}
    adapter = adapter_of(network)
    return {**network, "adapter": adapter.kind} if isinstance(adapter, LowRankConfig) else network


def _unlike(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in ours.items() if theirs.get(name, ...) != value}


def _first_leaf(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    for path in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(path), theirs.get(path)
        if a is None or b is None or tuple(a.shape) != tuple(b.shape):
            shapes = ["absent" if each is None else list(each.shape) for each in (a, b)]
            return f"first differing leaf: {path}, {shapes[0]} and {shapes[1]}"
    return "their leaves have equal names and shapes"


def is_low_rank(path: str, card: ExpertCard) -> bool:
    """Whether a leaf is a factor of a low-rank update."""
    is_factor = is_adapter_leaf(path) and path.endswith((DOWN, UP))
    return is_factor and isinstance(adapter_of(card.network), LowRankConfig)


def plan_overlay(cards: Sequence[ExpertCard], sources: Sequence[LeafSource], base: LeafSource | None,
                 marks: Sequence[str], recipe: MergeRecipe, rank: int | None = None,
                 ) -> tuple[list["LeafMerge | FactorLeaf"], dict[str, Any]]:
    """Plans how every leaf of the merged overlay is made, and its network's config.

    Args:
        cards: of the experts, which fit together (`check_alike`).
        sources: their overlays.
        base: leaves of the base, for methods that need it. It has no adapters: they are counted from zero.
        marks: fingerprints of the overlays.
        recipe: weights and parameters.
        rank: of merged low-rank updates; None for the sum of the ranks, which is exact for weighted sums.

    Raises:
        InputError: a setting or a filter that does not fit.
    """
    names = [card.id for card in cards]
    sources, layers = absent_layers.completed(cards, sources, base)
    paths = list(dict.fromkeys(path for source in sources for path in source.specs))
    recipe.check_filters(paths)
    if base is None and method_table.get_method(recipe.method).needs_base:
        raise method_table.no_base(method_table.get_method(recipe.method))
    if base is not None:
        lacking = [path for path in paths if path not in base.specs and not is_adapter_leaf(path)]
        if lacking:
            raise InputError(describe("The base lacks leaves of the experts", got=", ".join(lacking)))
    if isinstance(adapter_of(cards[0].network), ScalingConfig) and base is not None and (
            method_table.get_method(recipe.method).needs_base):
        raise InputError(describe("Factors of (IA)^3 are no task vectors: they start from one",
                                  got=f"method {recipe.method}", expected="mean, linear or slerp"))
    recipes = recipe.plan(paths, depth_of(paths))
    network, leaves = dict(cards[0].network), []
    for path in paths:
        if is_low_rank(path, cards[0]):
            continue
        leaves.append(LeafMerge(path, recipes[path], sources, base, names, marks=marks))
    updates = sorted({path.removesuffix(DOWN) for path in paths if is_low_rank(path, cards[0])
                      and path.endswith(DOWN)})
    if updates:
        adapters = [adapter_of(card.network) for card in cards]
        for prefix in updates:
            if recipes[prefix + DOWN] != recipes[prefix + UP]:
                raise InputError(describe(
                    "The two factors of a low-rank update are merged together, by one setting", where=prefix,
                    got="other settings for down than for up",
                    cure="name the update, not one of its factors"))
        places = {prefix: place_of(prefix + DOWN) for prefix in updates}
        merged = [UpdateMerge(prefix, recipes[prefix + DOWN], sources,
                              [adapter.scale_of(places[prefix]) for adapter in adapters], names, marks, rank)
                  for prefix in updates]
        ranks: dict[str, int] = {}
        for prefix, update in zip(updates, merged, strict=True):
            ranks[places[prefix]] = max(update.rank, ranks.get(places[prefix], 0))
        for prefix, update in zip(updates, merged, strict=True):
            update.rank = ranks[places[prefix]]  # one in all layers; zeros fill up those of fewer experts
        leaves += [leaf for update in merged for leaf in update.leaves()]
        network["adapter"] = merged_config(ranks, layers=layers).to_dict()
    return sorted(leaves, key=lambda leaf: leaf.path), network


class UpdateMerge:
    """Merges one low-rank update of several experts through its product (see `low_rank_products`)."""

    def __init__(self, prefix: str, recipe: LeafRecipe, sources: Sequence[LeafSource],
                 scales: Sequence[float], names: Sequence[str], marks: Sequence[str],
                 rank: int | None) -> None:
        """Stores the arguments; reads nothing.

        Args:
            prefix: of its two leaves' paths.
            recipe: how it is merged; its base is zero.
            sources: the experts.
            scales: that each of them multiplies its updates by.
            names: of the experts, for errors.
            marks: of the experts, see `LeafMerge`.
            rank: of the result, at most; None for the sum of the ranks.
        """
        self._prefix, self.sources, self._scales = prefix, sources, scales
        self._names, self._marks = names, marks
        self._row = method_table.get_method(recipe.method)
        self._settings = self._row.settings(recipe.parameters, len(sources), prefix)
        self._weights = method_table.resolve_weights(self._row, recipe.weights, len(sources), self._settings,
                                                     prefix)
        shapes = [[source.specs[prefix + end].shape for source in sources if prefix + end in source.specs]
                  for end in (DOWN, UP)]
        self.size = (shapes[0][0][0], shapes[1][0][1])
        total = sum(shape[1] for shape in shapes[0])
        self._exact = self._row.is_weighted_sum and rank is None
        self.rank = total if self._exact else min(rank or total, *self.size)
        self._error = 0.0

    def measured_error(self) -> float:
        """Relative error of the factors: 0 where they hold the whole sum."""
        if not self._exact:
            self.factors  # noqa: B018  measures it
        return self._error

    def leaves(self) -> list["FactorLeaf"]:
        """The two factors of the merged update, as leaves to write."""
        return [FactorLeaf(self, self._prefix + DOWN, 0, (self.size[0], self.rank)),
                FactorLeaf(self, self._prefix + UP, 1, (self.rank, self.size[1]))]

    @property
    def settings(self) -> dict[str, Any]:
        """Method, weights and parameters, as `LeafMerge.settings` gives them."""
        return method_table.to_json(self._row, self._weights, self._settings)

    @functools.cached_property
    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Computes the merged factors (f32[D, R], f32[R, F])."""
        downs, ups = low_rank_products.without_gaps(*(
            [self._whole(source, self._prefix + end, name)
             for source, name in zip(self.sources, self._names, strict=True)] for end in (DOWN, UP)))
        if self._exact:
            return low_rank_products.stack_factors(downs, ups, np.multiply(self._shares(),
                                                                           self._scales).tolist())
        products = [scale * (down @ up) for scale, down, up in zip(self._scales, downs, ups, strict=True)]
        settings = tuple((name, value) for name, value in self._settings.items() if name != "t")
        keys = (compose.leaf_keys(self._settings["seed"], self._prefix, self._marks)
                if self._row.sparsify == "random" else None)
        update = np.asarray(_merge_products(self._row.name, products, keys, self._weights, settings))
        down, up, self._error = low_rank_products.factorise(update, self.rank)
        return down, up

    def _shares(self) -> np.ndarray:
        """Factors of the updates in a weighted sum."""
        weights = np.asarray(self._weights, np.float64)
        total = self._row.total(self._weights, self._settings)
        return weights / total * self._settings.get("scale", 1.0)

    @staticmethod
    def _whole(source: LeafSource, path: str, name: str) -> np.ndarray | None:
        if path not in source.specs:
            return None
        spec = source.specs[path]
        out = np.empty(int(np.prod(spec.shape, dtype=np.int64)), np.dtype(spec.dtype))
        source.fill(path, 0, out)
        if not np.all(np.isfinite(out.astype(np.float32))):
            raise InputError(describe("A value is not finite", where=f"leaf {path} of {name}",
                                      got="NaN or infinity", expected="finite values in all that is merged"))
        return out.reshape(spec.shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("method", "weights", "settings"))
def _merge_products(method: str, products: Sequence[Array], keys: Array | None, weights: tuple[float, ...],
                    settings: tuple[tuple[str, Any], ...]) -> Array:
    """Merges full updates f32[D, F], with one program for each shape; their base is zero."""
    base = jnp.zeros_like(products[0]) if method_table.get_method(method).needs_base else None
    return compose.merge_leaf(method, products, list(weights), base, keys=keys, **dict(settings))


@dataclasses.dataclass
class FactorLeaf:
    """One factor of a merged update, as a leaf to write."""

    update: UpdateMerge
    path: str
    which: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the leaf."""
        return np.dtype(np.float32)

    @property
    def width(self) -> int:
        """Number of elements of a row."""
        return self.shape[1]

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.shape[0]

    @property
    def size(self) -> int:
        """Number of elements of the leaf."""
        return self.shape[0] * self.shape[1]

    @property
    def settings(self) -> dict[str, Any]:
        """Method, weights and parameters, as `LeafMerge.settings` gives them."""
        return self.update.settings

    @property
    def bytes_read(self) -> int:
        """Bytes that are read from all experts."""
        return sum(4 * int(np.prod(source.specs[self.path].shape)) for source in self.update.sources
                   if self.path in source.specs)

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes as `LeafMerge.memory` gives them; includes the full products if they are needed."""
        return 4 * int(np.prod(self.update.size)) * (len(self.update.sources) + 3), 0

    def look(self, workers: Executor) -> None:
        """Computes both factors, once."""
        self.update.factors  # noqa: B018  (it is kept there)

    def forget(self) -> None:
        """Does nothing: both factors are small, and kept."""

    def slices(self) -> list[tuple[int, int]]:
        """One slice of all rows."""
        return [(0, self.num_rows)] if self.size else []

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Returns rows `start` to `stop`, flat, f32[n]."""
        values = np.zeros(self.shape, np.float32)
        found = self.update.factors[self.which]
        values[tuple(slice(0, size) for size in found.shape)] = found
        return values[start:stop].reshape(-1)


def factorisation_error(leaves: Sequence[Any]) -> float | None:
    """Largest relative error of merged low-rank updates that were factorised; None if there are none.

    Updates that an interrupted run has merged are computed again for it.
    """
    updates = [leaf.update for leaf in leaves if isinstance(leaf, FactorLeaf)]
    return max((update.measured_error() for update in updates), default=None)


def make_card(cards: Sequence[ExpertCard], fingerprints: Sequence[str | None], network: Mapping[str, Any],
              settings: Sequence[Mapping[str, Any]], expert_id: str | None) -> ExpertCard:
    """Makes the card of a merged expert; its inputs are rendered plainly unless all parents agree otherwise.

    Args:
        cards: of its parents.
        fingerprints: of their overlays.
        network: its network's config.
        settings: see `method_table.settings_of`.
        expert_id: None makes a name of the parents' names.
    """
    first, shares = cards[0], shares_of(settings)
    datasets, renderings = {card.dataset for card in cards}, {card.rendering for card in cards}
    return ExpertCard(
        id=expert_id or "merged-" + "+".join(card.id for card in cards)[:150],
        kind="merged", form=first.form, base=dict(first.base), network=dict(network),
        tasks=tuple(dict.fromkeys(task for card in cards for task in card.tasks)),
        dataset=datasets.pop() if len(datasets) == 1 else None, method=settings[0]["method"],
        parents=tuple({"id": card.id, "kind": kind_of(card), "weight": share, "fingerprint": fingerprint}
                      for card, share, fingerprint in zip(cards, shares, fingerprints, strict=True)),
        merging=tuple(settings), rendering=renderings.pop() if len(renderings) == 1 else PLAIN)
