"""Decoder-only networks as pure functions of parameters: loss, log-probabilities of choices, cached decoding.

Sources: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2); Touvron et al.,
https://arxiv.org/abs/2302.13971 (Llama); Qwen Team, https://arxiv.org/abs/2505.09388 (norms of heads).
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from elm_jax.errors import InputError, describe
from elm_jax.models.adapters.kind import is_adapter_leaf
from elm_jax.models.blocks.grouped_attention import Reach, causal
from elm_jax.models.blocks.head_loss import head_cross_entropy, num_parts
from elm_jax.models.blocks.layer_stack import reports_of
from elm_jax.models.blocks.router_losses import with_router_losses
from elm_jax.models.blocks.sparse_mlp import ROUTER
from elm_jax.models.blocks.sparse_sublayer import Routed, feed_forward_traffic, routed_of
from elm_jax.models.blocks.traced_leaves import TracedLeaves
from elm_jax.models.decoder.causal_trunk import CausalTrunk, side_by_side, within
from elm_jax.models.decoder.config import DecoderConfig
from elm_jax.models.decoder.modules import CausalTransformer, DecoderCache
from elm_jax.models.layers.gate_tasks import reads_tasks
from elm_jax.models.layers.gates import RouterSums
from elm_jax.models.losses import PLAIN, LossConfig, LossSums, token_cross_entropy
from elm_jax.models.network import (
    ADAPTER,
    BODY,
    GATE,
    JOINED,
    NORM,
    TASK_IDS,
    TRUNK_STATES,
    Layout,
    Start,
    StepAccount,
    is_gate,
    real_tokens,
)
from elm_jax.types import Array, Batch, Padded, Params


def role_of(path: str) -> str:
    """Role of a leaf of any decoder: `ADAPTER`, `GATE` (a router or the tasks' table), `NORM` or `BODY`."""
    if is_adapter_leaf(path):
        return ADAPTER
    if is_gate(path):
        return GATE
    return NORM if "_norm/" in path else BODY


@dataclasses.dataclass(frozen=True)
class DecoderNetwork(TracedLeaves, CausalTrunk):
    """The decoder-only network of one config; implements `models.network.Network`.

    A prompt without tokens counts as one token: `DecoderConfig.bos_id`, or where that is None
    `DecoderConfig.eos_id`, the token that stood before every text in training.

    Attributes:
        config: dimensions, special ids, adapters.
        layout: how it is computed: rematerialisation, layers one by one or as a scan.
        trunk: lowest layers that are frozen and run without dropout; see `models.network.Trunk`.
        batches: the form of its training batches: prompt and target joined in one row.
    """

    config: DecoderConfig
    layout: Layout = dataclasses.field(default_factory=Layout)
    trunk: int = 0
    batches: ClassVar[str] = JOINED

    def role_of(self, path: str) -> str:
        """Role of a leaf: as its kind of adapter says, `NORM` (a norm's scale or bias) or `BODY`."""
        adapter = self.config.adapter
        return (adapter and adapter.role_of(path)) or role_of(path)

    def loss(self, params: Params, batch: Batch, rng: Array | None = None,
             settings: LossConfig = PLAIN) -> LossSums:
        """Computes loss sums f32[] over the target tokens of a batch.

        Args:
            params: as `init` makes them.
            batch: the keys of `logits`, target_tokens i32[B, L] and loss_weights f32[B, L].
            rng: see `models.network.Network`.
            settings: of the losses.
        """
        targets, weights = batch["target_tokens"], batch["loss_weights"]
        if num_parts(*targets.shape, self.config.vocab_size) == 1:
            logits, reports = self._of_rows(params, batch, rng)
            sums = token_cross_entropy(logits, targets, weights, settings)
        else:
            states, reports = self._of_rows(params, batch, rng, "states")
            sides, head = _head_of(self.config, params)
            sums = head_cross_entropy(sides, settings, states, head, targets, weights)
        return with_router_losses(sums, reports, settings)

    def logits(self, params: Params, batch: Batch, *, dropout_rng: Array | None = None) -> Array:
        """Computes the logits f32[B, L, V] of every place, which predict the next token.

        Args:
            params: as `init` makes them.
            batch: tokens, segment_ids, positions and, for gates that read tasks, task_ids i32[B, L], as
                `data.arrays.joined` makes them; perhaps trunk_states f[B, L, D]: the rows start from them.
            dropout_rng: key of dropout; None switches dropout off.

        Raises:
            InputError: rows are longer than the context.
        """
        return self._of_rows(params, batch, dropout_rng)[0]

    def target_log_probs(self, params: Params, inputs: Padded, targets: Padded) -> Array:
        """Computes the log-probability f32[B, C, T] of each token of each choice.

        Each row holds the prompt once and behind it the tokens of all choices. These attend to the prompt's
        keys and values and to their own choice; they, and the prompt's last token, alone get logits.

        Args:
            params: as `init` makes them.
            inputs: tokens i32[B, S], lengths i32[B].
            targets: tokens i32[B, C, T], lengths i32[B, C]; each choice ends with EOS.

        Returns:
            f32[B, C, T]; 0 behind a choice's end, so that a sum over T is the choice's score. NaN for a
            choice that is, with its prompt, longer than the context; padding does not count.

        Raises:
            InputError: S or T is more than the context.
        """
        rows, routed = self._choice_rows(inputs, targets)
        tokens, lengths = targets.tokens, _prompts(self.config, inputs)[1]
        batch, choices, length = tokens.shape
        width = rows[0].shape[1] - choices * (length - 1)
        states = _without_drops(self)._apply(
            params, *rows, True, side_by_side(inputs, targets), routed, method="states")
        last = jnp.take_along_axis(states, lengths[:, None, None] - 1, axis=1)
        logits = self._apply(params, jnp.concatenate([last, states[:, width:]], axis=1), method="logits")
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        first = _logits_of(logits[:, :1], tokens[..., 0]) - normaliser[:, :1]
        rest = _logits_of(logits[:, 1:], tokens[..., 1:].reshape(batch, -1)) - normaliser[:, 1:]
        log_probs = jnp.concatenate([first[..., None], rest.reshape(batch, choices, length - 1)], axis=-1)
        fits = lengths[:, None] + jnp.asarray(targets.lengths) <= self.config.max_length
        return jnp.where(fits[..., None], jnp.where(real_tokens(targets), log_probs, 0.0), jnp.nan)

    def start(self, params: Params, inputs: Padded, max_length: int) -> Start:
        """Makes the cache (keys and values of the prompts), and the prompts' last tokens.

        Args:
            params: as `init` makes them.
            inputs: tokens i32[B, S], lengths i32[B].
            max_length: steps that the cache holds; further steps would overwrite the last one.

        Raises:
            InputError: prompt and steps are longer than the context.
        """
        prompts, lengths = _prompts(self.config, inputs)
        width = prompts.shape[1]
        self._check_length(width + max_length - 1)
        routed = routed_of(self.config, real_tokens(Padded(prompts, lengths)), inputs.tasks)
        layers = self._apply(params, prompts, jnp.arange(width)[None], Reach(causal(width)), max_length,
                             routed, method="prefill")
        token = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]
        cache = {"index": jnp.zeros((), jnp.int32), "prompt": lengths - 1, "layers": layers}
        return Start({**cache, TASK_IDS: inputs.tasks} if reads_tasks(self.config) else cache, token)

    def step(self, params: Params, cache: DecoderCache, token: Array) -> tuple[Array, DecoderCache]:
        """Decodes one token.

        Args:
            params: as `init` makes them.
            cache: of `start` or the step before.
            token: i32[B].

        Returns:
            Logits f32[B, V] of the token after it, and the next cache.
        """
        index, prompt = cache["index"], cache["prompt"]
        width = cache["layers"]["layers_0"]["prompt_value"].shape[-2]
        real = jnp.arange(width)[None] < prompt[:, None]
        positions = (prompt + index)[:, None]
        routed = routed_of(self.config, None, cache.get(TASK_IDS))
        logits, layers = self._apply(params, token[:, None], positions, cache["layers"], index, real, routed,
                                     method="step")
        return logits, {**cache, "index": index + 1, "layers": layers}

    def cache_axes(self, own: Params) -> Any:
        """Says which cache leaves differ between experts: all but the position."""
        del own
        axes = {"index": None, "prompt": 0, "layers": 0}
        return {**axes, TASK_IDS: 0} if reads_tasks(self.config) else axes

    def account(self, source: int, target: int) -> StepAccount:
        """Counts what one row of S input and T target tokens sends through the network."""
        config, tokens = self.config, min(source + target, self.config.max_length)
        return StepAccount(
            width=config.emb_dim, heads=config.num_heads * config.head_dim, mlp=config.mlp_dim,
            attention_outputs=config.num_layers * tokens, attention_inputs=0,
            embedded=tokens, predicted=tokens,
            table="token_embedder/embedding", head=None if config.tied_head else "head/kernel",
            **feed_forward_traffic(config, (tokens, config.num_layers)))

    def _init_variables(self, rng: Array) -> Params:
        token, routed = jnp.zeros((1, 1), jnp.int32), routed_of(self.config, None, jnp.zeros(1, jnp.int32))
        return CausalTransformer(self.config).init({"params": rng}, token, token, Reach(causal(1)),
                                                   routed=routed)

    def _apply(self, params: Params, *arguments: Any, **more: Any) -> Any:
        module = CausalTransformer(self.config, self.layout, self.trunk)
        return module.apply({"params": params}, *arguments, **more)

    def _of_rows(self, params: Params, batch: Batch, rng: Array | None, method: str | None = None
                 ) -> tuple[Array, dict[str, RouterSums]]:
        """What a method of the module gives for the rows of a batch, and the reports of its sparse layers."""
        tokens, segments = batch["tokens"], batch["segment_ids"]
        self._check_length(tokens.shape[1])
        found = self._apply(params, tokens, batch["positions"], within(segments), rng is None,
                            batch.get(TRUNK_STATES),
                            routed_of(self.config, segments > 0, batch.get(TASK_IDS)), method=method,
                            rngs=None if rng is None else {"dropout": rng},
                            mutable=False if self.config.sparse is None else [ROUTER])
        return (found, {}) if self.config.sparse is None else (found[0], reports_of(found[1]))

    def _choice_rows(self, inputs: Padded, targets: Padded
                     ) -> tuple[tuple[Array, Array, Reach], Routed | None]:
        """Rows [B, S + C * (T - 1)] of prompts and choices without their last tokens: tokens, positions."""
        prompts, lengths = _prompts(self.config, inputs)
        tokens = jnp.asarray(targets.tokens)
        (batch, choices, length), width = tokens.shape, prompts.shape[1]
        self._check_length(max(width, length))
        behind = jnp.tile(lengths[:, None] + jnp.arange(length - 1)[None], (1, choices))
        behind = jnp.minimum(behind, self.config.max_length - 1)  # of padding alone, in rows that fit
        before = jnp.broadcast_to(jnp.arange(width)[None], prompts.shape)
        real = real_tokens(Padded(prompts, lengths))
        rows = (jnp.concatenate([prompts, tokens[..., :-1].reshape(batch, -1)], axis=1),
                jnp.concatenate([before, behind], axis=1),
                Reach(causal(width), choices if length > 1 else 0, real))
        # A choice's last token is in no row.
        own = real_tokens(Padded(tokens[..., :-1], jnp.asarray(targets.lengths) - 1))
        return rows, routed_of(self.config, jnp.concatenate([real, own.reshape(batch, -1)], axis=1),
                               inputs.tasks)

    def _check_length(self, length: int) -> None:
        if length > self.config.max_length:
            raise InputError(describe(
                "Rows are longer than the network's context", got=f"{length} tokens, padding included",
                expected=f"at most {self.config.max_length}",
                cure="keep less of them: source_length, target lengths or max_new_tokens"))


def _prompts(config: DecoderConfig, inputs: Padded) -> tuple[Array, Array]:
    """Tokens i32[B, S], S at least 1, and lengths i32[B], at least 1 (see the class on empty prompts)."""
    tokens, lengths = jnp.asarray(inputs.tokens), jnp.asarray(inputs.lengths)
    if tokens.shape[1] == 0:
        tokens = jnp.zeros((tokens.shape[0], 1), tokens.dtype)
    first = config.eos_id if config.bos_id is None else config.bos_id
    empty = (lengths == 0)[:, None] & (jnp.arange(tokens.shape[1]) == 0)[None]
    return jnp.where(empty, first, tokens), jnp.maximum(lengths, 1)


def _logits_of(logits: Array, tokens: Array) -> Array:
    """Logits f32[B, N] of tokens i32[B, N]; logits f32[B, N or 1, V].

    A masked sum, not a gather: that stays local where V is split over the mesh.
    """
    vocabulary = jax.lax.broadcasted_iota(tokens.dtype, (1, 1, logits.shape[-1]), 2)
    return jnp.sum(jnp.where(vocabulary == tokens[..., None], logits, 0.0), axis=-1)


def _head_of(config: DecoderConfig, params: Params) -> tuple[str, Array]:
    """The head's axes and weights: the table f[V, D], or a kernel f[D, V]."""
    return ("vd", params["token_embedder"]["embedding"]) if config.tied_head else (
        "dv", params["head"]["kernel"])


def _without_drops(network: DecoderNetwork) -> DecoderNetwork:
    """The same network where nothing is dropped: choices side by side would compete for places."""
    sparse = network.config.sparse
    if sparse is None or not sparse.drops_in_use:
        return network
    return dataclasses.replace(
        network, config=dataclasses.replace(network.config, sparse=sparse.without_drops()))
