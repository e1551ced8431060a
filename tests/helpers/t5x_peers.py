"""Models of real T5X beside this program's own: their network, their checkpoints, their decoding.

T5X must be there when this is imported.
"""

import dataclasses
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import seqio
import t5x_checkpoints as made
from t5x import adafactor, checkpoints, decoding, models, partitioning, utils
from t5x.examples.scalable_t5 import network as scalable_network
from t5x.examples.t5 import network as minimal_network

from elm_jax.models.t5.config import T5Config
from elm_jax.runtime import trees

INPUT_SHAPES = {
    "encoder_input_tokens": (8, 7), "decoder_input_tokens": (8, 6), "decoder_target_tokens": (8, 6)}
Flat = dict[str, np.ndarray]


@dataclasses.dataclass
class Peer:
    """A model of real T5X, and how it initialises, saves and restores."""

    module: Any
    model: Any
    partitioner: Any
    train: Any
    infer: Any

    def __post_init__(self) -> None:
        self._logits = jax.jit(lambda params, *tokens: self.module.apply(
            {"params": params}, *tokens, enable_dropout=False))
        self._greedy = jax.jit(lambda params, batch: self.model.predict_batch_with_aux(
            params, batch, decoder_params={"temperature": 0.0})[0])

    def logits(self, params: Any, inputs: np.ndarray, decoder_inputs: np.ndarray) -> np.ndarray:
        """T5X's network: i32[B, S] and i32[B, T] -> f32[B, T, V]."""
        no_padding = np.ones_like(decoder_inputs)  # T5X masks the decoder by its targets
        return np.asarray(self._logits(params, inputs, decoder_inputs, no_padding))

    def greedy(self, params: Any, inputs: np.ndarray, length: int) -> np.ndarray:
        """T5X's own decoding, with its cache: i32[B, S] -> i32[B, length]."""
        empty = np.zeros((len(inputs), length), np.int32)
        return np.asarray(self._greedy(params, {
            "encoder_input_tokens": inputs, "decoder_input_tokens": empty, "decoder_target_tokens": empty}))

    def save(self, folder: Path, state: Any, layout: str, dtype: str) -> None:
        """Saves as `t5x.train` does, with or without Orbax."""
        folder.mkdir()
        if layout == "zarr":
            saver = checkpoints.Checkpointer(
                state, self.partitioner, str(folder), save_dtype=jnp.dtype(dtype))
            saver.save(state)
            return
        # With Orbax, T5X leaves `save_dtype` unheeded: parameters lie on disk as they are in memory.
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), state.params)
        state = state.replace_params(params)
        manager = checkpoints.OrbaxCheckpointManagerInterface(str(folder), state, self.partitioner)
        manager.save(state)
        manager.close()

    def restore(self, path: Path, *, training: bool, use_orbax: bool, mode: str = "specific") -> Any:
        """Restores as `t5x.infer` does, or as `t5x.train` does from another's parameters."""
        config = utils.RestoreCheckpointConfig(
            path=str(path), mode=mode, fallback_to_scratch=training,
            assignment_map=((r"state/param_states/.*", None),) if training else None)
        _, paths = utils.get_first_valid_restore_config_and_paths([config])
        state, manager = utils.create_checkpoint_manager_and_restore(
            self.train if training else self.infer, self.partitioner, config, paths[0],
            jax.random.PRNGKey(9) if training else None, use_orbax=use_orbax,
            model_dir=str(path if mode == "latest" else path.parent))
        manager.close()
        return state


def peer(config: T5Config, form: str, partitions: int = 1) -> Peer:
    """The same network in T5X."""
    scanned, own_biases = made.FORMS[form]
    network = scalable_network if own_biases else minimal_network
    fields = ("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim", "num_encoder_layers",
              "num_decoder_layers", "mlp_activations", "logits_via_embedding")
    module = network.Transformer(network.T5Config(
        **{name: getattr(config, name) for name in fields}, dropout_rate=0.0, dtype="float32",
        **({"scan_layers": scanned} if own_biases else {})))
    return around(module, config, partitions)


def around(module: Any, config: T5Config, partitions: int = 1) -> Peer:
    """T5X's model and partitioner around a module."""
    vocabulary = seqio.PassThroughVocabulary(config.vocab_size, eos_id=1)
    # T5X has no rules for the adapters' width; see gin/t5x/.
    rules = adafactor.standard_logical_factor_rules().copy({"bottleneck": adafactor.FactorDim.NONE})
    optimizer = adafactor.Adafactor(1e-3, logical_factor_rules=rules)
    # T5X's beam search of one beam is not greedy; see gin/t5x/_run.gin.
    model = models.EncoderDecoderModel(
        module, vocabulary, vocabulary, optimizer, decode_fn=decoding.temperature_sample)
    partitioner = partitioning.PjitPartitioner(
        num_partitions=partitions,
        logical_axis_rules=partitioning.standard_logical_axis_rules(additional_rules=[("bottleneck", None)]))
    # On a CPU, T5X splits over all devices, whatever it is told.
    partitioner.mesh = jax.sharding.Mesh(np.array(jax.devices()[:partitions])[None], ("data", "model"))
    train, infer = (
        utils.TrainStateInitializer(of_state, model.get_initial_variables, INPUT_SHAPES, partitioner)
        for of_state in (optimizer, None))
    return Peer(module, model, partitioner, train, infer)


_KEPT: dict[tuple, Any] = {}


def initial(
    config: T5Config, form: str, *, equal_biases: bool = True, partitions: int = 1, lively: bool = False,
) -> tuple[Peer, Any]:
    """A peer, and its train state as T5X initialises it, but for norms drawn too and equal biases.

    `lively` makes a tied embedding smaller, without which every text repeats its first token.
    """
    key = (config, form, partitions)
    if key not in _KEPT:
        made_peer = peer(config, form, partitions)
        _KEPT[key] = made_peer, made_peer.train.from_scratch(jax.random.PRNGKey(3))
    of_t5x, state = _KEPT[key]
    rng = np.random.default_rng(4)

    def change(path: tuple, leaf: Any) -> Any:
        names = [getattr(part, "key", str(part)) for part in path]
        values = np.asarray(leaf)
        if names[-1] == "scale":
            values = (values + rng.normal(size=values.shape) / 4).astype(np.float32)
        if equal_biases and names[-1] == "rel_embedding" and made.FORMS[form] == (True, True):
            values = np.broadcast_to(values[:, :1], values.shape)
        if lively and names[-1] == "embedding" and config.logits_via_embedding:
            values = values / 8
        return jax.device_put(values, leaf.sharding)

    params = jax.tree_util.tree_map_with_path(change, flax.core.unfreeze(state.params))
    if equal_biases and form == "scalable_unscanned":
        for stack in ("encoder", "decoder"):
            layers = [layer for name, layer in params[stack].items() if name.startswith("layers_")]
            for layer in layers:
                layer["relpos_bias"] = layers[0]["relpos_bias"]
    if isinstance(state.params, flax.core.FrozenDict):
        params = flax.core.freeze(params)
    return of_t5x, state.replace_params(params).replace_step(jnp.asarray(1234, jnp.int32))


def flat(params: Any) -> Flat:
    """T5X's parameters by name."""
    return {path: np.asarray(leaf) for path, leaf in trees.flatten(flax.core.unfreeze(params)).items()}


def as_saved(state: Any, dtype: str) -> Flat:
    """The parameters of a state as they lie on disk."""
    return {path: leaf.astype(jnp.dtype(dtype)) for path, leaf in flat(state.params).items()}
