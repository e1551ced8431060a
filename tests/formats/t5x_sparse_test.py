"""T5X's checkpoints of networks with experts: names and shapes of flaxformer's, settings of gin, faults."""

import numpy as np
import pytest
import t5x_checkpoints as made

from elm_jax.cli import main
from elm_jax.errors import InputError
from elm_jax.experts.base import load_base
from elm_jax.formats.t5x import t5x_checkpoints, t5x_writer
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.models.t5.config import T5Config
from elm_jax.workflows.convert.convert_model import ConvertConfig, convert

D, H, K, F, E = 24, 3, 5, 40, 6
ROUTER, WO = "mlp/router/router_weights/w/kernel", "mlp/expert/wo/kernel"
SWITCH_GIN = """from __gin__ import dynamic_registration
# Macros:
# ==============================================================================
NUM_EXPERTS = 6
NUM_SELECTED_EXPERTS = 1
TRAIN_EXPERT_CAPACITY_FACTOR = 1.5
EVAL_EXPERT_CAPACITY_FACTOR = 2.0
EXPERT_DROPOUT_RATE = %DROPOUT_RATE
JITTER_NOISE = 0.0
moe_layers.MoeLayer.min_expert_capacity = 2
# Parameters for sparse_encoder/routing.TokensChooseMaskedRouter:
sparse_encoder/routing.TokensChooseMaskedRouter.batch_prioritized_routing = \\
    False
"""


def shapes(layers=4, sparse=(1, 3), *, gated=False, extra=False, tied=True, experts=E):
    """Name and shape of every tensor of flaxformer's SparseEncoder and SparseDecoder."""
    inner = ("wi_0", "wi_1") if gated else ("wi",)
    found = {"token_embedder/embedding": (50, D)}
    if not tied:
        found["decoder/logits_dense/kernel"] = (D, 50)
    for stack, attentions in (("encoder", ("attention",)),
                              ("decoder", ("self_attention", "encoder_decoder_attention"))):
        found |= {f"{stack}/{stack}_norm/scale": (D,), f"{stack}/relpos_bias/rel_embedding": (H, 32)}
        for layer in range(layers):
            place = f"{stack}/layers_{layer}/"
            for name in attentions:
                norm = {"encoder_decoder_attention": "cross_attention"}.get(name, name)
                found[f"{place}pre_{norm}_layer_norm/scale"] = (D,)
                found |= {f"{place}{name}/{part}/kernel": (D, H * K) for part in ("query", "key", "value")}
                found[f"{place}{name}/out/kernel"] = (H * K, D)
            found[f"{place}pre_mlp_layer_norm/scale"] = (D,)
            mlps = {"mlp/": ()}
            if layer in sparse:
                found[f"{place}mlp/router/router_weights/w/kernel"] = (D, experts)
                mlps = {"mlp/expert/": (experts,), **({"extra_mlp/": ()} if extra else {})}
                if extra:
                    found[f"{place}pre_extra_mlp_layer_norm/scale"] = (D,)
            for mlp, count in mlps.items():
                found |= {f"{place}{mlp}{name}/kernel": (*count, D, F) for name in inner}
                found[f"{place}{mlp}wo/kernel"] = (*count, F, D)
    return found


def leaves(seed=0, **kind):
    """Random tensors of these names."""
    draw = np.random.default_rng(seed)
    return {name: np.float32(draw.normal(size=shape) / 5) for name, shape in shapes(**kind).items()}


@pytest.mark.parametrize("writer", ["orbax", "zarr"])
def test_switch_as_t5x_writes_it(writer, tmp_path):
    wanted = leaves()
    made.WRITERS[writer](tmp_path, wanted)
    (tmp_path / "config.gin").write_text(SWITCH_GIN)
    model = t5x_checkpoints.open_t5x(tmp_path)
    sparse = SparseConfig(E, capacity_factor=1.5, capacity_counts_choices=False, min_capacity=2)
    assert model.config == T5Config(50, D, H, K, F, 4, 4, ("relu",), logits_via_embedding=True, sparse=sparse)
    made.assert_same(made.read_all(model), wanted)
    note, = (note for note in model.notes if "experts" in note)
    assert note.startswith("A token has 1 of 6 experts (as its gin config says); outside of training nothing")
    path = f"encoder/layers_3/{WO}"
    part = model.tensors.read(path, (slice(2, 4), slice(3, 9), slice(0, 5)))
    assert np.array_equal(part, wanted[path][2:4, 3:9, :5])


def test_st_moe_with_two_experts_a_token_and_a_dense_sublayer(tmp_path):
    made.write_orbax(tmp_path, leaves(gated=True, extra=True, tied=False, sparse=(3,)))
    (tmp_path / "config.gin").write_text("NUM_SELECTED_EXPERTS = 2\n")
    config = t5x_checkpoints.open_t5x(tmp_path).config
    assert config.sparse == SparseConfig(E, experts_per_token=2, capacity_counts_choices=False, step=4,
                                         dense_sublayer=True, order="choice")
    assert config.mlp_activations == ("gelu", "linear") and not config.logits_via_embedding
    (tmp_path / "config.gin").write_text(
        "NUM_SELECTED_EXPERTS = 2\n"
        "sparse_encoder/routing.TokensChooseMaskedRouter.batch_prioritized_routing = True\n")
    assert t5x_checkpoints.open_t5x(tmp_path).config.sparse.order == "probability"


def test_experts_choose_in_the_encoder(tmp_path):
    made.write_orbax(tmp_path, leaves(gated=True))
    (tmp_path / "config.gin").write_text(
        "NUM_SELECTED_EXPERTS = 2\nTRAIN_EXPERT_CAPACITY_FACTOR = 1.0\nEVAL_EXPERT_CAPACITY_FACTOR = 1.0\n"
        "sparse_encoder/moe_layers.MoeLayer.router = \\\n"
        "    @sparse_encoder/routing.ExpertsChooseMaskedRouter()\n")
    sparse = t5x_checkpoints.open_t5x(tmp_path).config.sparse
    assert (sparse.choice, sparse.experts_per_token, sparse.eval_capacity_factor) == ("experts", 2, 1.0)
    assert sparse.of_decoder().choice == "tokens"


def test_experts_per_token_are_asked_for_where_no_file_says_it(tmp_path, capsys):
    """One is assumed, and said; the flag and the setting give another number; it must mean something."""
    made.write_orbax(tmp_path / "moe", leaves())
    model = t5x_checkpoints.open_t5x(tmp_path / "moe")
    assert model.config.sparse.experts_per_token == 1 and any("assumed" in note for note in model.notes)
    words = ["convert", "--from", "t5x", "--to", "elm", "--verify", *(
        str(tmp_path / name) for name in ("moe", "base"))]
    assert main.main([*words, "--experts_per_token", "3"]) == 0, capsys.readouterr().err
    base = load_base(tmp_path / "base")
    assert base.config.sparse.experts_per_token == 3 and base.config.sparse.order == "choice"
    assert "A token has 3 of 6 experts (as was asked for)" in capsys.readouterr().out
    for fault, words in (({"experts_per_token": 7}, "more experts than there are"),
                         ({"experts_per_token": 0}, "experts_per_token"),
                         ({"experts_per_token": 2, "source_kind": "elm"}, "T5X's checkpoints")):
        with pytest.raises(InputError, match=words):
            convert(ConvertConfig(**{"source": str(tmp_path / "moe"), "source_kind": "t5x",
                                     "target": str(tmp_path / "x"), "target_kind": "elm", **fault}))
    made.write("orbax", tmp_path / "dense", "minimal")
    with pytest.raises(InputError, match="has no experts"):
        t5x_checkpoints.open_t5x(tmp_path / "dense", experts_per_token=2)


def changed(change, **kind):
    """Tensors with some of them changed: None takes one away."""
    found = leaves(**kind)
    for name, values in change.items():
        found.pop(name, None)
        if values is not None:
            found[name] = np.zeros(values, np.float32)
    return found


@pytest.mark.parametrize(("change", "gin", "words"), [
    ({}, "NUM_EXPERTS = 8\n", r"number of experts than its gin config[^$]*: 6 experts[^$]*NUM_EXPERTS = 8"),
    ({f"decoder/layers_3/{WO}": (4, F, D)}, "", rf"wrong shape \(1\): decoder/layers_3/{WO}: \[4, 40, 24\] "
     r"instead of \[6, 40, 24\]"),
    ({f"encoder/layers_1/{WO}": None}, "", rf"missing \(1\): encoder/layers_1/{WO}"),
    ({f"encoder/layers_3/{ROUTER}": (D, 5)}, "", rf"{ROUTER}: \[24, 5\] instead of \[24, 6\]"),
    ({f"encoder/layers_2/{ROUTER}": (D, E)}, "", r"equal distances[^$]*encoder \[1, 2, 3\] of 4"),
    ({"encoder/layers_1/mlp/wi/kernel": (D, F)}, "", r"unexpected \(1\): encoder/layers_1/mlp/wi/kernel"),
    ({"encoder/encoder/subblock_1/mlp/wo/kernel": (F, 2, D)}, "", "in blocks[^$]*scan_layers = False"),
    ({}, "TRAIN_EXPERT_CAPACITY_FACTOR = -1\n", "capacity_factor"),
])
def test_faults_are_one_clear_error(change, gin, words, tmp_path):
    made.write_orbax(tmp_path, changed(change))
    (tmp_path / "config.gin").write_text(gin)
    with pytest.raises(InputError, match=words):
        t5x_checkpoints.open_t5x(tmp_path)


def test_t5x_s_own_networks_have_no_experts(tmp_path):
    made.write_orbax(tmp_path / "moe", leaves())
    with pytest.raises(InputError, match=r"no sparse layers[^$]*--to elm"):
        t5x_writer.write_t5x(tmp_path / "out", t5x_checkpoints.open_t5x(tmp_path / "moe"))


def test_switch_of_t5x_becomes_transformers_switch(tmp_path):
    """Every second layer is sparse in both; the logits agree, and nothing is dropped."""
    made.write_orbax(tmp_path / "moe", leaves(sparse=(1, 3)))
    convert(ConvertConfig(tmp_path / "moe", "t5x", tmp_path / "base", "elm"))
    report = convert(ConvertConfig(tmp_path / "base", "elm", tmp_path / "hf", "hf", verify=True))
    assert report["verified"]["target_by"].startswith("transformers")
    assert report["verified"]["largest_difference"] < 1e-4
