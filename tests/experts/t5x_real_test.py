"""What real T5X writes is read, and what is written real T5X restores, bit for bit; the networks agree."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5x_checkpoints as made

from elm_jax import trees
from elm_jax.errors import InputError
from elm_jax.experts.formats import detect, elm, t5x
from elm_jax.models.t5 import T5Network
from elm_jax.models.t5_config import T5Config

try:
    import flax
    import seqio
    from t5x import adafactor, checkpoints, models, partitioning, utils
    from t5x.examples.scalable_t5 import network as scalable_network
    from t5x.examples.t5 import network as minimal_network

    import gin
except ImportError as error:
    pytest.skip(f"real T5X cannot be imported ({error}); it is on no package index", allow_module_level=True)

LAYOUTS = ("orbax", "zarr")
INPUT_SHAPES = {
    "encoder_input_tokens": (8, 7), "decoder_input_tokens": (8, 6), "decoder_target_tokens": (8, 6)}
Flat = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def t5x_promotes_ranks():
    """T5X adds arrays of different ranks, which this program's tests forbid."""
    with jax.numpy_rank_promotion("allow"):
        yield


@dataclasses.dataclass
class Peer:
    """A model of real T5X, and how it initialises, saves and restores."""

    module: Any
    partitioner: Any
    train: Any
    infer: Any

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
    vocabulary = seqio.PassThroughVocabulary(config.vocab_size)
    optimizer = adafactor.Adafactor(1e-3, logical_factor_rules=adafactor.standard_logical_factor_rules())
    model = models.EncoderDecoderModel(module, vocabulary, vocabulary, optimizer)
    partitioner = partitioning.PjitPartitioner(num_partitions=partitions)
    # On a CPU, T5X splits over all devices, whatever it is told.
    partitioner.mesh = jax.sharding.Mesh(np.array(jax.devices()[:partitions])[None], ("data", "model"))
    train, infer = (
        utils.TrainStateInitializer(of_state, model.get_initial_variables, INPUT_SHAPES, partitioner)
        for of_state in (optimizer, None))
    return Peer(module, partitioner, train, infer)


_KEPT: dict[tuple, Any] = {}


def initial(
    config: T5Config, form: str, *, equal_biases: bool = True, partitions: int = 1,
) -> tuple[Peer, Any]:
    """A peer, and its train state as T5X initialises it, but for norms drawn too and equal biases."""
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


CASES = [("minimal", "t5_1_1_untied", "float32"), ("minimal", "t5_1_0_tied", "bfloat16"),
         ("scalable", "t5_1_1_untied", "bfloat16"), ("scalable", "t5_1_0_tied", "float32"),
         ("scalable_unscanned", "t5_1_1_untied", "float32")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("form", "generation", "dtype"), CASES)
def test_reads_what_t5x_writes(tmp_path, form, generation, dtype, layout):
    config = made.config(generation)
    of_t5x, state = initial(config, form)
    of_t5x.save(tmp_path / "run", state, layout, dtype)
    model = detect.open_model(tmp_path / "run")
    assert (model.kind, model.config) == ("t5x", config)
    assert model.facts["t5x"] == {"step": 1234, "scanned": form == "scalable"}
    made.assert_same(made.as_t5x(made.read_all(model), config, form), as_saved(state, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("form", "generation", "dtype"), CASES[:4])
def test_t5x_to_elm_to_t5x_is_bit_identical(tmp_path, form, generation, dtype, layout):
    config = made.config(generation)
    of_t5x, state = initial(config, form)
    wanted = as_saved(state, dtype)
    of_t5x.save(tmp_path / "run", state, layout, dtype)
    elm.write_elm(tmp_path / "base", t5x.open_t5x(tmp_path / "run"))
    model = detect.open_model(tmp_path / "base")
    for back in LAYOUTS:
        out = tmp_path / f"to_{back}"
        t5x.write_t5x(out, model, layout=back, scanned=form == "scalable")
        restored = of_t5x.restore(out / "checkpoint_1234", training=False, use_orbax=True)
        made.assert_same(flat(restored.params), wanted)
        assert int(restored.step) == 1234
        again = of_t5x.restore(out, training=True, use_orbax=True, mode="latest")
        made.assert_same(flat(again.params), wanted)
        assert int(again.step) == 1234
    old = of_t5x.restore(tmp_path / "to_zarr" / "checkpoint_1234", training=True, use_orbax=False)
    made.assert_same(flat(old.params), wanted)
    loaded = checkpoints.load_t5x_checkpoint(str(tmp_path / "to_zarr"))
    made.assert_same(flat(loaded["target"]), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scanned", [False, True])
def test_step_0_is_restored_too(tmp_path, layout, scanned):
    config = made.config()
    of_t5x, _ = initial(config, "scalable" if scanned else "minimal")
    leaves = made.random_leaves(config, "bfloat16")
    t5x.write_t5x(tmp_path / "out", made.memory_model(config, leaves), layout=layout, scanned=scanned)
    restored = of_t5x.restore(tmp_path / "out", training=True, use_orbax=True, mode="latest")
    made.assert_same(flat(restored.params), made.as_t5x(leaves, config, "scalable" if scanned else "minimal"))
    assert int(restored.step) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["minimal", "scalable"])
def test_reads_what_t5x_writes_from_several_devices(tmp_path, form, layout):
    """Split over four parts of eight devices, whose shards are chunks of their own."""
    config = dataclasses.replace(made.config(), num_heads=4, vocab_size=52)
    of_t5x, state = initial(config, form, partitions=4)
    of_t5x.save(tmp_path / "run", state, layout, "float32")
    model = t5x.open_t5x(tmp_path / "run")
    assert model.config == config
    made.assert_same(made.as_t5x(made.read_all(model), config, form), as_saved(state, "float32"))


@pytest.mark.parametrize("form", ["minimal", "scalable"])
def test_t5x_restores_onto_several_devices(tmp_path, form):
    config = dataclasses.replace(made.config(), num_heads=4, vocab_size=52)
    of_t5x, _ = initial(config, form, partitions=4)
    leaves = made.random_leaves(config)
    t5x.write_t5x(tmp_path / "out", made.memory_model(config, leaves), scanned=form == "scalable")
    restored = of_t5x.restore(tmp_path / "out" / "checkpoint_0", training=False, use_orbax=True)
    made.assert_same(flat(restored.params), made.as_t5x(leaves, config, form))
    kernel = trees.flatten(flax.core.unfreeze(restored.params))[
        "encoder/encoder/mlp/wo/kernel" if form == "scalable" else "encoder/layers_0/mlp/wo/kernel"]
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scalable_t5_as_initialised_has_biases_of_its_own(tmp_path, layout):
    of_t5x, state = initial(made.config(), "scalable", equal_biases=False)
    of_t5x.save(tmp_path / "run", state, layout, "float32")
    with pytest.raises(InputError, match="relative position biases of their own"):
        t5x.open_t5x(tmp_path / "run")


@pytest.mark.parametrize("generation", made.GENERATIONS)
@pytest.mark.parametrize("form", ["minimal", "scalable"])
def test_logits_are_t5x_s(tmp_path, form, generation):
    """T5X's network on what it restores of a checkpoint that this program wrote; ours on the leaves."""
    config = made.config(generation)
    of_t5x, state = initial(config, form)
    of_t5x.save(tmp_path / "run", state, "orbax", "float32")
    model = t5x.open_t5x(tmp_path / "run")
    t5x.write_t5x(tmp_path / "out", model, scanned=form == "scalable")
    params = of_t5x.restore(tmp_path / "out" / "checkpoint_1234", training=False, use_orbax=True).params
    rng = np.random.default_rng(5)
    inputs, targets = (rng.integers(2, config.vocab_size, (5, length)).astype(np.int32)
                       for length in (31, 11))
    for row, length in enumerate((31, 20, 7, 1, 30)):
        inputs[row, length:] = 0
    shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    theirs = np.asarray(
        of_t5x.module.apply({"params": params}, inputs, shifted, targets, enable_dropout=False))
    ours = np.asarray(T5Network(config).logits(
        trees.unflatten(made.read_all(model)),
        {"encoder_input_tokens": inputs, "decoder_input_tokens": shifted}))
    assert theirs.std() > 0.3
    assert np.max(np.abs(theirs - ours)) <= 1e-4


@pytest.mark.parametrize("scanned", [False, True])
def test_the_network_s_gin_file_builds_t5x_s_network(tmp_path, scanned):
    config = made.config("t5_1_0_tied")
    model = made.memory_model(config, made.random_leaves(config))
    t5x.write_t5x(tmp_path / "out", model, scanned=scanned)
    gin.clear_config()
    text = (tmp_path / "out" / "network.gin").read_text()
    gin.parse_config(f"{text}\nMODULE = @network.Transformer()")
    built = copy.deepcopy(gin.query_parameter("%MODULE"))  # that is how gin itself calls a reference
    gin.clear_config()
    wanted = peer(config, "scalable" if scanned else "minimal").module.config
    for field in dataclasses.fields(wanted):
        if field.name not in ("dtype", "dropout_rate"):  # for whoever runs it to choose
            assert getattr(built.config, field.name) == getattr(wanted, field.name), field.name
