"""T5 as pure functions of parameters: loss, log-probabilities of choices, cached decoding.

Source of the network: Raffel et al.,
https://arxiv.org/abs/1910.10683, and for T5 1.1 Shazeer, https://arxiv.org/abs/2002.05202.
"""

import dataclasses
import functools
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.models.adapters.kind import is_adapter_leaf
from elm_jax.models.blocks.layer_stack import reports_of
from elm_jax.models.blocks.router_losses import with_router_losses
from elm_jax.models.blocks.sparse_mlp import ROUTER
from elm_jax.models.blocks.sparse_sublayer import below_drops, below_first_sparse, feed_forward_traffic
from elm_jax.models.blocks.traced_leaves import TracedLeaves
from elm_jax.models.layers.gate_tasks import reads_tasks
from elm_jax.models.layers.gates import RouterSums
from elm_jax.models.losses import PLAIN, LossConfig, LossSums, token_cross_entropy
from elm_jax.models.network import (
    ADAPTER,
    BODY,
    GATE,
    NORM,
    TASK_IDS,
    TASK_TABLE,
    TRUNK_STATES,
    TWO_SIDED,
    Layout,
    Start,
    StepAccount,
    is_gate,
    real_tokens,
)
from elm_jax.models.t5.config import T5Config
from elm_jax.models.t5.modules import Cache, Packing, Transformer, real_inputs
from elm_jax.runtime import trees
from elm_jax.types import Array, Batch, Padded, Params

__all__ = ["Cache", "Layout", "T5Config", "T5Network", "shift_right"]

_LAYER = re.compile(r"(?P<stack>encoder|decoder)/layers_(?P<number>\d+)/")


def shift_right(targets: Array, start_id: int = T5Config.start_id) -> Array:
    """Shifts targets right by one, behind the start token: i32[..., T] -> i32[..., T]."""
    start = jnp.full((*targets.shape[:-1], 1), start_id, targets.dtype)
    return jnp.concatenate([start, targets[..., :-1]], axis=-1)


def is_norm_leaf(path: str) -> bool:
    """Whether a leaf is the scale of one of T5's RMS norms."""
    return path.endswith("_norm/scale")


def role_of(path: str) -> str:
    """Role of a leaf of any T5: `ADAPTER`, `GATE` (a router, or what it reads of tasks), `NORM` or `BODY`."""
    if is_adapter_leaf(path):
        return ADAPTER
    if is_gate(path):
        return GATE
    return NORM if is_norm_leaf(path) else BODY


def _packing(batch: Batch, config: T5Config) -> Packing:
    """Segment ids, positions and tasks; for sparse layers also the decoder's segments of rows not packed.

    The decoder's inputs alone do not say where a row ends: the EOS behind its last place is no padding.
    """
    packing = Packing(**{key: batch[key] for key in Packing._fields if key in batch})
    if TASK_IDS in batch:
        packing = packing._replace(encoder_task_ids=batch[TASK_IDS], decoder_task_ids=batch[TASK_IDS])
    if config.sparse is not None and "decoder_target_tokens" in batch and all(
            each is None for each in packing[:4]):
        ends = real_inputs(batch["decoder_target_tokens"], config.pad_id)
        packing = packing._replace(decoder_segment_ids=ends.astype(jnp.int32))
    return packing


@dataclasses.dataclass(frozen=True)
class T5Network(TracedLeaves):
    """The T5 network of one config; implements `models.network.Network`.

    Attributes:
        config: dimensions, generation, adapters.
        layout: how it is computed: rematerialisation, layers one by one or as a scan.
        trunk: lowest layers of the encoder, frozen and without dropout; see `models.network.Trunk`.
        batches: the form of its training batches: inputs and targets in separate rows.
    """

    config: T5Config
    layout: Layout = dataclasses.field(default_factory=Layout)
    trunk: int = 0
    batches: ClassVar[str] = TWO_SIDED

    @property
    def deepest_trunk(self) -> int:
        """Layers of the encoder whose states follow from a row's tokens alone; the decoder's see targets."""
        return below_drops(self.config, self.config.num_encoder_layers)

    @property
    def _module(self) -> Transformer:
        return Transformer(self.config, self.layout, self.trunk)

    def role_of(self, path: str) -> str:
        """Role of a leaf: as its kind of adapter says, `NORM` (an RMS norm's scale) or `BODY`."""
        adapter = self.config.adapter
        return (adapter and adapter.role_of(path)) or role_of(path)

    def depth_of(self, path: str) -> int:
        """Number of layers before a leaf is first used; the decoder's follow the encoder's."""
        config = self.config
        layer = _LAYER.match(path)
        if path == TASK_TABLE:
            return below_first_sparse(config, config.num_encoder_layers)
        if layer is not None:
            return int(layer["number"]) + config.num_encoder_layers * (layer["stack"] == "decoder")
        if path.startswith(("decoder/decoder_norm/", "decoder/logits_dense/")):
            return config.num_layers
        return config.num_encoder_layers if path.startswith(("encoder/encoder_norm/", "decoder/")) else 0

    def trunk_states(self, params: Params, tokens: Array, segment_ids: Array) -> Array:
        """Computes the states f[B, S, D] above the trunk of inputs and segment ids i32[B, S]."""
        return self._module.apply({"params": params}, tokens, segment_ids, method="states_above_trunk")

    def trunk_rows(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Input tokens and segment ids i32[B, S] of a batch; a row that is not packed is one segment."""
        tokens = np.asarray(batch["encoder_input_tokens"])
        if "encoder_segment_ids" in batch:
            return tokens, np.asarray(batch["encoder_segment_ids"])
        behind = np.cumsum(tokens[:, ::-1] != self.config.pad_id, axis=1)[:, ::-1]
        return tokens, (behind > 0).astype(np.int32)

    def trunk_of_choices(self, params: Params, inputs: Padded, targets: Padded | None
                         ) -> tuple[Array, None]:
        """Computes the states f[B, S, D] above the trunk of inputs; choices pass no layer of the encoder."""
        del targets
        return self.trunk_states(params, inputs.tokens, real_tokens(inputs).astype(jnp.int32)), None

    def loss(self, params: Params, batch: Batch, rng: Array | None = None,
             settings: LossConfig = PLAIN) -> LossSums:
        """Computes loss sums f32[] over the target tokens of a batch.

        Args:
            params: as `init` makes them.
            batch: the keys of `logits`, decoder_target_tokens i32[B, T] and decoder_loss_weights f32[B, T].
            rng: see `models.network.Network`.
            settings: of the losses.
        """
        logits, reports = self._logits(params, batch, rng)
        sums = token_cross_entropy(
            logits, batch["decoder_target_tokens"], batch["decoder_loss_weights"], settings)
        return with_router_losses(sums, reports, settings)

    def logits(self, params: Params, batch: Batch, *, dropout_rng: Array | None = None) -> Array:
        """Computes the logits f32[B, T, V] of every decoder position.

        Args:
            params: as `init` makes them.
            batch: encoder_input_tokens i32[B, S], decoder_input_tokens i32[B, T]; perhaps trunk_states
                f[B, S, D], and the encoder starts from them; task_ids i32[B] for gates that read tasks. What
                packed rows have beside them says `modules.Packing`; to leave positions out gives the same,
                and is cheaper.
            dropout_rng: key of dropout; None switches dropout off.

        Returns:
            f32[B, T, V].

        Raises:
            InputError: segment ids are given for one side only.
        """
        return self._logits(params, batch, dropout_rng)[0]

    def _logits(self, params: Params, batch: Batch, dropout_rng: Array | None
                ) -> tuple[Array, dict[str, RouterSums]]:
        """The logits f32[B, T, V] of a batch, and the reports of the sparse layers."""
        if ("encoder_segment_ids" in batch) != ("decoder_segment_ids" in batch):
            raise InputError(
                describe("A packed batch needs segment ids of both sides", where="batch",
                         got=", ".join(sorted(batch)),
                         expected="encoder_segment_ids and decoder_segment_ids, or neither")
            )
        deterministic, reports = dropout_rng is None, {}

        def apply(*arguments: Any, **more: Any) -> Array:
            rngs = None if deterministic else {"dropout": dropout_rng}
            call = functools.partial(self._module.apply, {"params": params}, *arguments, rngs=rngs, **more)
            if self.config.sparse is None:
                return call()
            found, collected = call(mutable=[ROUTER])
            reports.update(reports_of(collected))
            return found

        inputs, targets = batch["encoder_input_tokens"], batch["decoder_input_tokens"]
        packing = _packing(batch, self.config)
        if TRUNK_STATES not in batch:
            return apply(inputs, targets, packing, deterministic), reports
        real = real_inputs(inputs, self.config.pad_id)
        encoded = apply(inputs, real, packing, deterministic, batch[TRUNK_STATES], method="encode")
        return apply(encoded, real, targets, packing, deterministic, method="decode"), reports

    def target_log_probs(self, params: Params, inputs: Padded, targets: Padded) -> Array:
        """Computes the log-probability f32[B, C, T] of each token of each choice.

        The encoder runs once an instance. All choices go through cross-attention as one query axis
        against that single encoding; its keys and values are computed once and never repeated.

        Args:
            params: as `init` makes them.
            inputs: tokens i32[B, S], lengths i32[B].
            targets: tokens i32[B, C, T], lengths i32[B, C]; each choice ends with EOS.

        Returns:
            f32[B, C, T]; 0 behind a choice's end, so that a sum over T is the choice's score.
        """
        tokens = targets.tokens
        logits = self._module.apply(
            {"params": params}, inputs.tokens, real_tokens(inputs),
            shift_right(tokens, self.config.start_id), real_tokens(targets), inputs.states, inputs.tasks,
            method="choice_logits"
        )
        # The token's logit minus the normaliser: no second array of the size of the logits. The
        # logit is a masked sum, not a gather: that stays local where V is split over the mesh.
        hit = jax.lax.broadcasted_iota(tokens.dtype, logits.shape, 3) == tokens[..., None]
        token_logits = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        log_probs = token_logits - jax.nn.logsumexp(logits, axis=-1)
        return jnp.where(real_tokens(targets), log_probs, 0.0)

    def start(self, params: Params, inputs: Padded, max_length: int) -> Start:
        """Makes the cache (cross-attention's keys and values of the encoder's states) and T5's start tokens.

        Args:
            params: as `init` makes them.
            inputs: tokens i32[B, S], lengths i32[B].
            max_length: positions that the cache holds; further steps would overwrite the last one.
        """
        real = real_tokens(inputs)
        encoded = self._module.apply(
            {"params": params}, inputs.tokens, real, Packing(encoder_task_ids=inputs.tasks),
            states=inputs.states, method="encode")
        cache = self._module.apply({"params": params}, encoded, real, max_length, inputs.tasks,
                                   method="init_cache")
        return Start(cache, jnp.full(inputs.tokens.shape[:1], self.config.start_id, jnp.int32))

    def step(self, params: Params, cache: Cache, token: Array) -> tuple[Array, Cache]:
        """Decodes one token.

        Args:
            params: as `init` makes them.
            cache: of `start` or the step before.
            token: i32[B].

        Returns:
            Logits f32[B, V] of the token after it, and the next cache.
        """
        return self._module.apply({"params": params}, token, cache, method="decode_step")

    def cache_axes(self, own: Params) -> Any:
        """Says which cache leaves differ between experts: all but the position and a shared position bias."""
        own_bias = any("relpos_bias" in path for path in trees.flatten(own))
        axes = {"index": None, "self_bias": 0 if own_bias else None, "cross_bias": 0, "layers": 0}
        return {**axes, "task": 0} if reads_tasks(self.config) else axes

    def account(self, source: int, target: int) -> StepAccount:
        """Counts what one row of S input and T target tokens sends through the network."""
        config = self.config
        inside, outside = config.num_encoder_layers * source, config.num_decoder_layers * target
        return StepAccount(
            width=config.emb_dim, heads=config.num_heads * config.head_dim, mlp=config.mlp_dim,
            attention_outputs=inside + 2 * outside, attention_inputs=config.num_decoder_layers * source,
            embedded=source + target, predicted=target, table="token_embedder/embedding",
            head=None if config.logits_via_embedding else "decoder/logits_dense/kernel",
            **feed_forward_traffic(config, (source, config.num_encoder_layers),
                                   (target, config.num_decoder_layers)))

    def _init_variables(self, rng: Array) -> Params:
        token, tasks = jnp.ones((1, 1), jnp.int32), jnp.zeros(1, jnp.int32)
        packing = Packing(encoder_task_ids=tasks, decoder_task_ids=tasks)
        return self._module.init({"params": rng}, token, token, packing)
