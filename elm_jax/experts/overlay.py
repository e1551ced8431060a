"""Overlays: the leaves that an expert replaces or adds, and how they go onto a base."""

import dataclasses
import functools
from collections.abc import Callable

import jax

from elm_jax import storage, trees
from elm_jax.errors import InputError, describe
from elm_jax.experts.base import Base
from elm_jax.experts.card import SCHEMA_VERSION, ExpertCard
from elm_jax.experts.formats import elm
from elm_jax.experts.formats.model import Tensors
from elm_jax.models.t5 import T5Network
from elm_jax.models.t5_config import AdapterConfig, T5Config
from elm_jax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class Expert:
    """A card and an overlay: nested dictionary holding only the expert's own leaves."""

    card: ExpertCard
    overlay: Params
    path: str | None = None


def is_adapter_leaf(path: str) -> bool:
    """Whether the leaf belongs to an adapter, e.g. ``encoder/layers_0/mlp_adapter/up/kernel``."""
    return any(part.endswith("_adapter") for part in path.split("/"))


def is_norm_leaf(path: str) -> bool:
    """Whether the leaf is the scale of one of T5's RMS norms."""
    return path.endswith("_norm/scale")


def trained_leaves(form: str, train_norms: bool = True) -> Callable[[str], bool]:
    """Predicate over leaf paths: what an expert of this form trains, saves and merges.

    Args:
        form: ``adapter`` or ``full``.
        train_norms: for ``adapter``, whether the RMS norms train too (in the paper they do).
    """
    if form == "full":
        return lambda path: True
    if form != "adapter":
        raise InputError(describe("Unknown form of overlay", got=form, expected=("adapter", "full")))
    return lambda path: is_adapter_leaf(path) or (train_norms and is_norm_leaf(path))


def initial_overlay(
    base: Base, form: str, *, adapter: AdapterConfig | None, train_norms: bool, seed: int
) -> tuple[T5Config, Params, Params]:
    """What training of one expert starts from.

    Returns:
        (network config, overlay, frozen): the overlay holds new adapters and the base's own values
        of every other trained leaf; frozen holds the base's remaining leaves.
    """
    if form == "full":
        return base.config, base.params, {}
    config = base.config.with_adapter(adapter or AdapterConfig())
    adapters = _fresh_adapters(T5Network(config), seed)
    overlay, frozen = trees.split(trees.merge(base.params, adapters), trained_leaves(form, train_norms))
    return config, overlay, frozen


def _fresh_adapters(network: T5Network, seed: int) -> Params:
    """Adapters alone: compiled as one program, the network's other leaves are never made."""
    return _adapters_from(network, jax.random.key(seed))


@functools.partial(jax.jit, static_argnames="network")
def _adapters_from(network: T5Network, rng: Array) -> Params:
    return trees.split(network.init(rng), is_adapter_leaf)[0]


def resolve(base: Base, expert: Expert | None) -> tuple[T5Network, Params]:
    """The network and the full parameter tree of an expert on its base (None: the base itself).

    Raises:
        InputError: the expert belongs to another base, or a leaf does not fit.
    """
    if expert is None:
        return T5Network(base.config), base.params
    card = expert.card
    if card.base["fingerprint"] != base.fingerprint:
        raise InputError(describe(
            "The expert belongs to another base", where=expert.path or card.id,
            got=f"{card.base.get('name')} {card.base['fingerprint']}",
            expected=f"{base.name} {base.fingerprint}",
            cure="give the base that this expert was trained on"))
    config = T5Config.from_dict(card.network)
    params = trees.merge(base.params, expert.overlay)
    difference = trees.first_difference(params, T5Network(config).abstract_params())
    if difference:
        raise InputError(describe("The expert's overlay does not fit its network config",
                                  where=expert.path or card.id,
                                  got=f"leaf {difference} (expert against config)"))
    return T5Network(config), params


def save_expert(folder: storage.PathLike, expert: Expert) -> None:
    """Writes ``expert.json`` and ``weights/`` (the overlay only); the commit marker last."""
    folder = storage.begin(folder)
    storage.save_tree(folder / elm.WEIGHTS, expert.overlay)
    _write_card(folder, expert.card, trees.fingerprint(expert.overlay))
    storage.commit(folder)


def save_leaves_as_expert(folder: storage.PathLike, card: ExpertCard, tensors: Tensors) -> None:
    """As `save_expert`, for an overlay that need not fit into memory: a few leaves at a time.

    Args:
        folder: emptied first.
        card: of the expert.
        tensors: every leaf of the overlay, in float32.
    """
    folder = storage.begin(folder)
    fingerprint = elm.save_leaves(folder / elm.WEIGHTS, tensors)
    _write_card(folder, card, fingerprint)
    storage.commit(folder)


def _write_card(folder: storage.PathLike, card: ExpertCard, fingerprint: str) -> None:
    storage.write_json(storage.as_path(folder) / "expert.json",
                       {**card.to_dict(), "overlay_fingerprint": fingerprint})


def load_expert(folder: storage.PathLike) -> Expert:
    """Reads an expert's folder; the overlay's contents are checked against their fingerprint.

    A run folder that holds a finished ``expert/`` may be given instead.

    Raises:
        InputError: the folder is not whole, the card is not valid, or the weights have changed.
    """
    folder = storage.as_path(folder)
    if not (folder / "expert.json").exists() and (folder / "expert").exists():
        folder = folder / "expert"
    folder = storage.require_committed(folder, "expert")
    value = storage.read_json(folder / "expert.json", kind="expert's card",
                              schema_version=SCHEMA_VERSION)
    written = value.pop("overlay_fingerprint", None)
    card = ExpertCard.from_dict(value, where=folder / "expert.json")
    overlay = storage.restore_tree(folder / "weights")
    found = trees.fingerprint(overlay)
    if found != written:
        raise InputError(describe("The expert's weights are not those that were written",
                                  where=folder, got=found, expected=written,
                                  cure="copy or train the expert again"))
    return Expert(card=card, overlay=overlay, path=str(folder))


def copy_expert(source: storage.PathLike, target: storage.PathLike) -> Expert:
    """Copies an expert's folder, verified on the way; the commit marker comes last."""
    expert = load_expert(source)
    save_expert(target, expert)
    return dataclasses.replace(expert, path=str(target))
