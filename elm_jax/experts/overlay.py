"""Experts and overlays: the leaves that an expert replaces or adds, and how they are put onto a base."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from elm_jax.errors import InputError, describe
from elm_jax.experts.base import Base
from elm_jax.experts.card import ExpertCard, read_stored
from elm_jax.formats.elm import elm_folders
from elm_jax.formats.model import Tensors
from elm_jax.formats.peft import adapter_files
from elm_jax.formats.places import EXPERT_FILE
from elm_jax.formats.tensors import leaf_values
from elm_jax.models import families
from elm_jax.models.adapters import carriers
from elm_jax.models.adapters.config import AdapterConfig
from elm_jax.models.adapters.kind import AdapterKind, is_adapter_leaf
from elm_jax.models.network import (
    ADAPTER,
    GATE,
    NORM,
    TASK_TABLE,
    Network,
    NetworkConfig,
    has_expert_axis,
    has_trunk,
)
from elm_jax.runtime import hosts, sharding, storage, tree_files, trees
from elm_jax.runtime.config_checks import check_choice
from elm_jax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class Expert:
    """An expert: its card and its overlay, a nested dictionary of only the expert's own leaves."""

    card: ExpertCard
    overlay: Params
    path: str | None = None

    def __repr__(self) -> str:
        """Says what it is, without its leaves."""
        return (f"Expert({self.card.id!r}, {self.card.kind}, {trees.count(self.overlay):,} parameters, base="
                f"{self.card.base.get('name')!r}, path={self.path!r})")


def trained_leaves(role_of: Callable[[str], str], form: str, train_norms: bool = True
                   ) -> Callable[[str], bool]:
    """Returns a predicate on leaf paths: whether an expert trains, saves and merges the leaf.

    Args:
        role_of: of the network: what each of its leaves is for.
        form: of the expert, ``adapter`` or ``full``.
        train_norms: for ``adapter``, whether the norms train too (in the paper they do).
    """
    if form == "full":
        return lambda path: True
    if form != "adapter":
        raise InputError(describe("Unknown form of overlay", got=form, expected=("adapter", "full")))
    return lambda path: _is_new(role_of, path) or (train_norms and role_of(path) == NORM)


ALL_BUT = "all but "
FREEZES = ("gate", "experts", "sparse layers", f"{ALL_BUT}task vectors",
           f"{ALL_BUT}task vectors and experts")
"""What may stay frozen: of sparse feed-forwards the routers (with the tasks' vectors), the experts,
or both; or all else than the vectors that gates read of tasks, for a task that came later."""


def frozen_by(network: Network, freeze: str | None) -> Callable[[str], bool]:
    """Returns a predicate on leaf paths: whether a full training leaves the leaf as it is.

    Args:
        network: in training.
        freeze: one of `FREEZES`, or None for no leaf.

    Raises:
        InputError: another name, or the network has no such leaf.
    """
    if freeze is None:
        return lambda path: False
    check_choice("freeze", freeze, FREEZES)

    def frozen(path: str) -> bool:
        if freeze.startswith(ALL_BUT):
            return path != TASK_TABLE and not (has_expert_axis(path) and freeze.endswith("experts"))
        gate = network.role_of(path) == GATE and not is_adapter_leaf(path)
        return (gate and freeze != "experts") or (has_expert_axis(path) and freeze != "gate")

    paths = trees.flatten(network.abstract_params())
    if freeze.startswith(ALL_BUT) and TASK_TABLE not in paths:
        raise InputError(describe(
            "There is nothing to train: the network's gates read no tasks", where="freeze", got=repr(freeze),
            expected="a base with gates that read tasks", cure="leave it out, or make one: elm tasks embed"))
    if not any(map(frozen, paths)):
        raise InputError(describe(
            "There is nothing to freeze: the network has no sparse layer", where="freeze", got=repr(freeze),
            expected="None for a dense network", cure="leave it out, or give a sparse base"))
    return frozen


def leaves_to_train(network: Network, form: str, train_norms: bool = True, freeze: str | None = None
                    ) -> Callable[[str], bool]:
    """As `trained_leaves` for one network: norms below the lowest layer with adapters do not train.

    `freeze` names leaves of a full training that do not, see `frozen_by`.
    """
    if freeze is not None:
        frozen = frozen_by(network, freeze)
        return lambda path: not frozen(path)
    trains = trained_leaves(network.role_of, form, train_norms)
    first = 0 if form == "full" else carriers.lowest(network.config.adapter)
    if first == 0:
        return trains
    depth_of = has_trunk(network).depth_of
    return lambda path: trains(path) and depth_of(path) >= first


def initial_overlay(
    base: Base, form: str, *, adapter: AdapterKind | None, train_norms: bool, seed: int,
    freeze: str | None = None,
) -> tuple[NetworkConfig, Params, Params]:
    """Makes the network config, the initial overlay and the frozen leaves for training one expert.

    Returns:
        (network config, overlay, frozen): the overlay holds new adapters and the base's own values
        of every other trained leaf; frozen holds the base's remaining leaves.
    """
    if form == "full" and freeze is None:
        return base.config, base.params, {}
    if form == "full":
        trains = leaves_to_train(families.network_of(base.config), form, freeze=freeze)
        return base.config, *trees.split(base.params, trains)
    config = base.config.with_adapter(adapter or AdapterConfig())
    network = families.network_of(config)
    config.adapter.check_used(trees.flatten(network.abstract_params()))
    trains = leaves_to_train(network, form, train_norms)
    overlay, frozen = trees.split(trees.merge(base.params, _fresh_adapters(network, seed)), trains)
    return config, overlay, frozen


def _fresh_adapters(network: Network, seed: int) -> Params:
    """Initialises adapters and gates alone, as one program that never makes the network's other leaves."""
    return _adapters_from(network, jax.random.key(seed))


@functools.partial(jax.jit, static_argnames="network")
def _adapters_from(network: Network, rng: Array) -> Params:
    return trees.split(network.init(rng), lambda path: _is_new(network.role_of, path))[0]


def _is_new(role_of: Callable[[str], str], path: str) -> bool:
    """Whether an adapter expert adds the leaf to its base: an adapter, or a gate but a router."""
    return role_of(path) == ADAPTER or (role_of(path) == GATE and is_adapter_leaf(path))


def identity_overlay(base: Base, expert: Expert) -> Params:
    """Makes an overlay of an expert's shape with which the network computes what the base does.

    Its adapters are neutral, all else is the base's own; so the base can be one of a stack of experts.
    """
    neutral = families.config_of(expert.card.network).adapter.neutral
    own, shared = trees.flatten(expert.overlay), trees.flatten(base.params)
    return trees.unflatten({
        path: np.asarray(shared[path]).astype(leaf.dtype) if path in shared
        else np.full(leaf.shape, neutral, leaf.dtype) for path, leaf in own.items()})


def resolve(base: Base, expert: Expert | None) -> tuple[Network, Params]:
    """Returns the network and the full parameter tree of an expert on its base (None: the base itself).

    Raises:
        InputError: the expert belongs to another base, or a leaf does not fit.
    """
    if expert is None:
        return families.network_of(base.config), base.params
    card = expert.card
    check_base(base, card, expert.path or card.id)
    config = families.config_of(card.network)
    params = trees.merge(base.params, expert.overlay)
    difference = trees.first_difference(params, families.network_of(config).abstract_params())
    if difference:
        raise InputError(describe("The expert's overlay does not fit its network config",
                                  where=expert.path or card.id,
                                  got=f"leaf {difference} (expert against config)"))
    return families.network_of(config), params


def check_base(base: Base, card: ExpertCard, where: object) -> None:
    """Raises InputError if the card's expert belongs to another base."""
    if card.base["fingerprint"] != base.fingerprint:
        raise InputError(describe(
            "The expert belongs to another base", where=where,
            got=f"{card.base.get('name')} {card.base['fingerprint']}",
            expected=f"{base.name} {base.fingerprint}",
            cure="give the base that this expert was trained on"))


def save_expert(folder: storage.PathLike, expert: Expert) -> None:
    """Writes an expert's folder: ``expert.json`` and ``weights/`` (the overlay only), then the commit marker.

    With several processes, every process calls this; an overlay that is split over them is written shard by
    shard.
    """
    folder = storage.begin(folder)
    hosts.barrier()
    write_expert(folder, expert)
    hosts.barrier()


def write_expert(folder: storage.PathLike, expert: Expert) -> None:
    """Writes an expert as `save_expert` does, into an existing empty folder (see `staging.staged`)."""
    folder = storage.as_path(folder)
    tree_files.save_tree(folder / elm_folders.WEIGHTS, expert.overlay)
    _write_card(folder, expert.card, trees.fingerprint(expert.overlay))
    storage.commit(folder)


def save_leaves_as_expert(
    folder: storage.PathLike, card: ExpertCard, tensors: Tensors, check: Callable[[], None] = lambda: None,
) -> None:
    """Writes an expert whose overlay need not fit into memory: a few leaves at a time.

    Args:
        folder: exists and is empty.
        card: of the expert.
        tensors: every leaf of the overlay, in float32.
        check: called after all leaves were read, before the folder is committed.
    """
    folder = storage.as_path(folder)
    fingerprint = elm_folders.save_leaves(folder / elm_folders.WEIGHTS, tensors)
    check()
    _write_card(folder, card, fingerprint)
    storage.commit(folder)


def _write_card(folder: storage.PathLike, card: ExpertCard, fingerprint: str) -> None:
    storage.write_json(storage.as_path(folder) / EXPERT_FILE,
                       {**card.to_dict(), "overlay_fingerprint": fingerprint})


def load_expert(folder: storage.PathLike, *, mesh: Mesh | None = None) -> Expert:
    """Reads an expert's folder and checks the overlay against its fingerprint.

    A run folder that holds a finished ``expert/`` may be given instead.

    Args:
        folder: of the expert.
        mesh: puts the overlay onto it; every process calls this and reads the shards of its own devices. With
            several processes no one reads all of it, so the fingerprint is not checked.

    Raises:
        InputError: the folder is not whole, the card is not valid, or the weights have changed or are not
            finite.
    """
    folder, card, written = read_card(folder)
    weights = folder / elm_folders.WEIGHTS
    overlay = tree_files.restore_tree(weights, None if mesh is None else _on_mesh(weights, card, mesh))
    found = written if mesh is not None and hosts.count() > 1 else trees.fingerprint(overlay)
    if found != written:
        raise InputError(describe("The expert's weights are not those that were written",
                                  where=f"{folder}, overlay_fingerprint in {EXPERT_FILE}",
                                  got=found, expected=written,
                                  cure="copy or train the expert again"))
    if mesh is None:
        for path, leaf in trees.flatten(overlay).items():
            leaf_values.check_finite(np.asarray(leaf), path, folder)
    return Expert(card=card, overlay=overlay, path=str(folder))


def read_card(folder: storage.PathLike) -> tuple[epath.Path, ExpertCard, str | None]:
    """Reads an expert's card and its overlay's fingerprint, without the weights; also finds its folder.

    Raises:
        InputError: the folder is not whole, or the card is not valid.
    """
    folder = storage.as_path(folder)
    if not (folder / EXPERT_FILE).exists() and (folder / "expert").exists():
        folder = folder / "expert"
    if not (folder / EXPERT_FILE).exists() and adapter_files.is_peft(folder):
        raise InputError(describe("This is a PEFT adapter, which must become an expert first", where=folder,
                                  cure=f"elm convert --from peft --to elm --base BASE {folder} EXPERT"))
    folder = storage.require_committed(folder, "expert")
    return folder, *read_stored(folder / EXPERT_FILE)


def _on_mesh(weights: epath.Path, card: ExpertCard, mesh: Mesh) -> Params:
    """Abstract leaves of a stored overlay, each with its sharding on the mesh."""
    axes = trees.flatten(families.network_of(families.config_of(card.network)).logical_axes())
    leaves = trees.flatten(tree_files.tree_metadata(weights))
    unknown = sorted(leaves.keys() - axes.keys())
    if unknown:
        raise InputError(describe("The expert's overlay does not fit its network config", where=weights,
                                  got=f"leaf {unknown[0]}, which that network has not"))
    return trees.unflatten({path: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding.leaf_sharding(axes[path], leaf.shape, mesh))
        for path, leaf in leaves.items()})


def copy_expert(source: storage.PathLike, target: storage.PathLike) -> Expert:
    """Copies an expert's folder and verifies it meanwhile; the commit marker comes last."""
    expert = load_expert(source)
    save_expert(target, expert)
    return dataclasses.replace(expert, path=str(target))
