"""The interface of networks: the functions and facts that every network offers, whatever its family.

Training, scoring, decoding, planning, merging and files use these functions and facts, and know no more of a
network. A family (T5, and what comes) is a folder beside this file and a row of `families.FAMILIES`.
"""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.runtime.sharding import Axes
from elm_jax.types import Array, Batch, Padded, Params, SpecialIds

if TYPE_CHECKING:  # readers of files need configs of networks, but not Flax
    from elm_jax.models.losses import LossConfig, LossSums

DTYPES = ("bfloat16", "float32")
"""Dtypes of activations, by name."""
TWO_SIDED, JOINED = "two_sided", "joined"
"""Forms of a training batch: inputs and targets in separate rows, or joined in one row."""
BODY, NORM, ADAPTER, GATE = ROLES = ("body", "norm", "adapter", "gate")
"""Roles of leaves: a gate weighs experts or adapters (a sparse layer's router is one); a norm is a scale or a
bias of a normalisation."""
ROUTER_PART = "router"
"""Part of the paths of a sparse layer's router."""
TASK_TABLE = "task_embedder/embedding"
"""Path of the table of tasks f32[M, D_t], which gates of sparse layers may read."""
EXPERT_PART = "expert"
"""Part of the paths of a sparse layer's experts, whose leaves lie side by side on a first axis."""
REMAT = ("none", "layer", "dots")
"""Names of what the backward pass recomputes."""

TASK_IDS = "task_ids"
"""Key of a batch: numbers i32[B] of the rows' tasks, or i32[B, L] of the tokens' of joined rows."""
TRUNK_STATES = "trunk_states"
"""Key of a training batch: states f[B, L, D] in place of what a network's trunk would compute."""

Cache = Any
"""State of decoding from step to step; only the network knows its leaves."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Execution settings of a network (rematerialisation, scan over layers); they change no result.

    Attributes:
        remat: what the backward pass recomputes: 'none' keeps all values that it needs, 'dots' keeps the
            products with kernels, 'layer' keeps the layers' inputs only.
        scan_layers: one compiled layer in a loop, in place of a copy of the program for each layer.
    """

    remat: str = "none"
    scan_layers: bool = False

    def __post_init__(self) -> None:
        """Raises InputError for an unknown value of either setting."""
        if self.remat not in REMAT:
            raise unknown_name("remat policy", str(self.remat), REMAT, where="remat")
        if not isinstance(self.scan_layers, bool):
            raise InputError(describe("Config value has the wrong type", where="scan_layers",
                                      got=repr(self.scan_layers), expected="True or False"))


class Start(NamedTuple):
    """The initial state of decoding.

    Attributes:
        cache: of the inputs.
        token: i32[B], what the first step takes: a start token, or the last token of the prompt.
    """

    cache: Cache
    token: Array


class HfParameter(NamedTuple):
    """A tensor of Hugging Face's files, and the leaves that it holds.

    Attributes:
        name: of the tensor.
        paths: of the leaves; several stand side by side in the leaves' last axis.
        transposed: whether its two dimensions are swapped against the leaves'.
        tied: whether Hugging Face's other modules use it too.
        expert: number of the expert whose part of the leaf it is, along the leaf's first axis; None for whole
            leaves.
    """

    name: str
    paths: tuple[str, ...]
    transposed: bool = False
    tied: bool = False
    expert: int | None = None


class StepAccount(NamedTuple):
    """Counts of what one row of a batch sends through a network, to estimate traffic between chips.

    Counts are of vectors of the model's width: tokens times sub-layers.

    Attributes:
        width: D.
        heads: width of all heads of an attention together.
        mlp: width F of the feed-forward.
        attention_outputs: outputs of attentions.
        attention_inputs: inputs of keys and values that are not the queries' own.
        mlp_outputs: outputs of dense feed-forwards.
        sparse_outputs: outputs of sparse ones.
        routed: places of their experts, taken or not, of one row's share of a group; without a capacity one
            for each choice.
        embedded: tokens that are looked up.
        predicted: positions that get logits.
        table: path of the embedding.
        head: path of the untied head; None if it is tied.
    """

    width: int
    heads: int
    mlp: int
    attention_outputs: int
    attention_inputs: int
    mlp_outputs: int
    embedded: int
    predicted: int
    table: str
    head: str | None
    sparse_outputs: int = 0
    routed: float = 0.0


@runtime_checkable
class NetworkConfig(Protocol):
    """Interface of network configs: dimensions, special ids and adapters. A frozen, hashable dataclass.

    Attributes:
        family: the row of `families.FAMILIES` that it belongs to.
        vocab_size: rows V of the embedding.
        dropout_rate: rate of every dropout while training.
        dtype: of the activations, by name.
        num_layers: layers, counted through the network in the order in which they are computed.
        adapter: the adapters that a prompt expert adds; None for none.
        sparse: experts in the place of some layers' feed-forward; None for a dense network.
        pad_id: token that fills rows up; it may be a real token as well, so masks come from lengths.
        eos_id: token that ends a text.
        start_id: token that a target begins with; None where a target follows its prompt.
    """

    family: str
    vocab_size: int
    dropout_rate: float
    dtype: str
    num_layers: int
    adapter: Any
    sparse: Any
    pad_id: int
    eos_id: int
    start_id: int | None

    @property
    def activation_dtype(self) -> Any:
        """`dtype` as a NumPy dtype."""

    def with_adapter(self, adapter: Any) -> "NetworkConfig":
        """Returns the same config with other adapters, or with none."""

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dictionary. Inverse of `families.config_of`."""


@runtime_checkable
class Network(Protocol):
    """Interface of networks. A network holds its config but no parameters; it is hashable, a static argument.

    Attributes:
        config: dimensions, ids, adapters.
        layout: how it is computed: rematerialisation, layers one by one or as a scan.
        batches: the form of its training batches, `TWO_SIDED` or `JOINED`.
    """

    config: NetworkConfig
    layout: Layout
    batches: str

    def init(self, rng: Array) -> Params:
        """Initialises parameters in float32. Pure: jit it with `out_shardings` to create them sharded."""

    def abstract_params(self) -> Params:
        """Returns the tree of `init` as `jax.ShapeDtypeStruct`; allocates nothing."""

    def logical_axes(self) -> Params:
        """Returns the tree of `init` as `sharding.Axes` (logical axis names by dimension)."""

    def axes_of(self, path: str) -> Axes | None:
        """Logical axes of one leaf, also of a stacked one; None if there is no such leaf."""

    def role_of(self, path: str) -> str:
        """Role of a leaf: one of `ROLES`."""

    def loss(self, params: Params, batch: Batch, rng: Array | None = None, settings: "LossConfig" = ...
             ) -> "LossSums":
        """Computes loss sums over the target tokens of a training batch.

        Args:
            params: as `init` makes them.
            batch: arrays [B, ...] of the form `batches` (`data.arrays.batch_forms`).
            rng: key of dropout; None switches dropout off, and gives sparse layers the capacity that they
                have outside of training.
            settings: of the cross-entropy, and coefficients of the losses of sparse layers.
        """

    def target_log_probs(self, params: Params, inputs: Padded, targets: Padded) -> Array:
        """Computes log-probabilities f32[B, C, T] of choices; each input is encoded once.

        Args:
            params: as `init` makes them.
            inputs: tokens i32[B, S], lengths i32[B]; tasks i32[B] where gates read them.
            targets: tokens i32[B, C, T], lengths i32[B, C]; a choice ends with EOS; length 0 is no choice.

        Returns:
            f32[B, C, T]; 0 behind a choice's end, so that a sum over T is the choice's score.
        """

    def start(self, params: Params, inputs: Padded, max_length: int) -> Start:
        """Makes the cache and the first tokens i32[B] of decoding.

        Args:
            params: as `init` makes them.
            inputs: tokens i32[B, S], lengths i32[B]; tasks i32[B] where gates read them.
            max_length: steps that the cache holds.
        """

    def step(self, params: Params, cache: Cache, token: Array) -> tuple[Array, Cache]:
        """Decodes one token: cache and i32[B] -> logits f32[B, V] of the next token, and the next cache."""

    def account(self, source: int, target: int) -> StepAccount:
        """Counts what one row of S input and T target tokens sends through the network."""

    def cache_axes(self, own: Params) -> Any:
        """Says which cache leaves differ between experts, given which parameter leaves `own` differ.

        Returns:
            A prefix of the cache's tree: 0 where an axis of experts goes in front, None where all share.
        """


@runtime_checkable
class Trunk(Protocol):
    """Interface of networks whose lower layers can be frozen and their states kept; an addition to `Network`.

    The trunk is the lowest `trunk` layers and the embeddings. It runs without dropout. Where a batch has
    states, it does not run at all: the rows start from them.

    Attributes:
        trunk: layers in the trunk; 0 for a network without.
        deepest_trunk: most layers that it can have: those whose states depend on tokens alone.
    """

    trunk: int
    deepest_trunk: int

    def depth_of(self, path: str) -> int:
        """Number of layers that are computed before a leaf is first used; 0 for embeddings."""

    def trunk_states(self, params: Params, tokens: Array, segment_ids: Array) -> Array:
        """Computes the states f[B, L, D], of the activations' dtype, that enter the layers above the trunk.

        A segment's states depend on its own tokens alone; those of padding mean nothing.

        Args:
            params: those of the trunk; others are not used.
            tokens: i32[B, L].
            segment_ids: i32[B, L]; segments count from 1 and lie one after another, padding has 0.
        """

    def trunk_rows(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and segment ids i32[B, L] of a training batch (numpy), as `trunk_states` takes them."""

    def trunk_of_choices(self, params: Params, inputs: Padded, targets: Padded) -> tuple[Array, Array | None]:
        """Computes the states of instances to score, as `target_log_probs` takes them in `Padded.states`.

        Args:
            params: those of the trunk.
            inputs: tokens i32[B, S], lengths i32[B].
            targets: tokens i32[B, C, T], lengths i32[B, C]; not used if batches are two-sided.

        Returns:
            f[B, S, D] of the inputs; f[B, C, T - 1, D] of the choices' tokens before the last, or None if
            batches are two-sided.
        """


def has_trunk(network: Network) -> Trunk:
    """Returns the network if it implements `Trunk`.

    Raises:
        InputError: it does not.
    """
    if not isinstance(network, Trunk):
        raise InputError(describe("Networks of this family have no trunk whose states could be kept",
                                  got=f"family {network.config.family!r}"))
    return network


def frozen_depth(network: Network, trained: Iterable[str]) -> int:
    """Number of lowest layers whose states no leaf of `trained` changes, given by their paths."""
    door = has_trunk(network)
    return min([door.deepest_trunk, *map(door.depth_of, trained)])


def is_multiplied(path: str) -> bool:
    """Whether a leaf is a matrix that is cast to the activations' dtype, by its Flax name.

    A router is none, nor is what it reads of tasks: it computes in float32.
    """
    return path.endswith(("/kernel", "/embedding")) and not is_gate(path)


def has_expert_axis(path: str) -> bool:
    """Whether a leaf [E, ...] holds the experts of a sparse layer, by its Flax name."""
    return f"/{EXPERT_PART}/" in path


def is_router(path: str) -> bool:
    """Whether a leaf is of a sparse layer's router, by its Flax name."""
    return f"/{ROUTER_PART}/" in path


def is_gate(path: str) -> bool:
    """Whether a leaf is of a sparse layer's router, or the table of tasks that it reads, by its Flax name."""
    return is_router(path) or path == TASK_TABLE


def ids_of(config: NetworkConfig) -> SpecialIds:
    """Returns the padding, EOS and start ids of a network, and BOS where its family has one."""
    return SpecialIds(config.pad_id, config.eos_id, config.start_id, getattr(config, "bos_id", None))


def ends_of(config: NetworkConfig) -> tuple[int, ...]:
    """Returns all tokens that end a text: EOS, and those that a family's config names beside it."""
    return tuple(dict.fromkeys((config.eos_id, *getattr(config, "extra_eos_ids", ()))))


def context_of(config: NetworkConfig) -> int | None:
    """Returns the most tokens of a prompt and its continuation together; None if a network has no limit."""
    return getattr(config, "max_length", None)


def real_tokens(rows: Padded) -> Array:
    """Mask bool[..., L] of the tokens that are not padding."""
    shape = rows.tokens.shape
    places = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    return places < jnp.asarray(rows.lengths)[..., None]
