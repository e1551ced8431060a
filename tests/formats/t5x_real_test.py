"""What real T5X writes is read, and what is written real T5X restores, bit for bit; the networks agree."""

import copy
import dataclasses

import jax
import pytest
import t5x_checkpoints as made

from elm_jax.errors import InputError
from elm_jax.formats import detect
from elm_jax.formats.elm import elm_folders
from elm_jax.formats.t5x import t5x_checkpoints, t5x_writer
from elm_jax.models.adapters.config import AdapterConfig
from elm_jax.runtime import trees

try:
    import flax
    from t5x import checkpoints
    from t5x_peers import around, as_saved, flat, initial, peer

    import gin
except ImportError as error:
    pytest.skip(f"real T5X cannot be imported ({error}); it is on no package index", allow_module_level=True)

LAYOUTS = ("orbax", "zarr")


@pytest.fixture(autouse=True)
def t5x_promotes_ranks():
    """T5X adds arrays of different ranks, which this program's tests forbid."""
    with jax.numpy_rank_promotion("allow"):
        yield


CASES = [("minimal", "t5_1_1_untied", "float32"), ("minimal", "t5_1_0_tied", "bfloat16"),
         ("scalable", "t5_1_1_untied", "bfloat16"), ("scalable", "t5_1_0_tied", "float32"),
         ("scalable_unscanned", "t5_1_1_untied", "float32")]
"""t5x_families_test.py has all of them."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("form", "generation", "dtype"), CASES)
def test_reads_what_t5x_writes(tmp_path, form, generation, dtype, layout):
    config = made.config(generation)
    of_t5x, state = initial(config, form)
    of_t5x.save(tmp_path / "run", state, layout, dtype)
    model = detect.open_model(tmp_path / "run")
    assert (model.kind, model.config) == ("t5x", config)
    scanned, own_biases = made.FORMS[form]
    assert model.facts["t5x"] == {"step": 1234, "scanned": scanned, "own_biases": own_biases}
    made.assert_same(made.as_t5x(made.read_all(model), config, form), as_saved(state, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("form", "generation", "dtype"), CASES[:4])
def test_t5x_to_elm_to_t5x_is_bit_identical(tmp_path, form, generation, dtype, layout):
    config = made.config(generation)
    of_t5x, state = initial(config, form)
    wanted = as_saved(state, dtype)
    of_t5x.save(tmp_path / "run", state, layout, dtype)
    elm_folders.write_elm(tmp_path / "base", t5x_checkpoints.open_t5x(tmp_path / "run"))
    model = detect.open_model(tmp_path / "base")
    for back in LAYOUTS:
        out = tmp_path / f"to_{back}"
        t5x_writer.write_t5x(out, model, layout=back, scanned=form == "scalable")
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
    t5x_writer.write_t5x(tmp_path / "out", made.memory_model(config, leaves), layout=layout, scanned=scanned)
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
    model = t5x_checkpoints.open_t5x(tmp_path / "run")
    assert model.config == config
    made.assert_same(made.as_t5x(made.read_all(model), config, form), as_saved(state, "float32"))


@pytest.mark.parametrize("form", ["minimal", "scalable"])
def test_t5x_restores_onto_several_devices(tmp_path, form):
    config = dataclasses.replace(made.config(), num_heads=4, vocab_size=52)
    of_t5x, _ = initial(config, form, partitions=4)
    leaves = made.random_leaves(config)
    t5x_writer.write_t5x(tmp_path / "out", made.memory_model(config, leaves), scanned=form == "scalable")
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
        t5x_checkpoints.open_t5x(tmp_path / "run")


@pytest.mark.parametrize("scanned", [False, True])
def test_the_network_s_gin_file_builds_t5x_s_network(tmp_path, scanned):
    config = made.config("t5_1_0_tied")
    model = made.memory_model(config, made.random_leaves(config))
    t5x_writer.write_t5x(tmp_path / "out", model, scanned=scanned)
    gin.clear_config()
    text = (tmp_path / "out" / "network.gin").read_text()
    gin.parse_config(f"{text}\nMODULE = @network.Transformer()")
    built = copy.deepcopy(gin.query_parameter("%MODULE"))  # that is how gin itself calls a reference
    gin.clear_config()
    wanted = peer(config, "scalable" if scanned else "minimal").module.config
    for field in dataclasses.fields(wanted):
        if field.name not in ("dtype", "dropout_rate"):  # for whoever runs it to choose
            assert getattr(built.config, field.name) == getattr(wanted, field.name), field.name


def test_what_is_written_beside_adapters_restores_them_in_t5x(tmp_path):
    """network.gin builds our module, and T5X's model of it restores every leaf, adapters too."""
    config = made.config().with_adapter(AdapterConfig(7))
    leaves = made.random_leaves(config)
    t5x_writer.write_t5x(tmp_path / "out", made.memory_model(config, leaves))
    gin.clear_config()
    text = (tmp_path / "out" / "network.gin").read_text()
    gin.parse_config(f"{text}\nMODULE = @t5x_module.T5XTransformer()")
    module = copy.deepcopy(gin.query_parameter("%MODULE"))
    gin.clear_config()
    assert module.config == config
    restored = around(module, config).restore(
        tmp_path / "out" / "checkpoint_0", training=False, use_orbax=True)
    made.assert_same(flat(restored.params), leaves)
