"""The config: round trip, hash, clear refusals, and the gin files with the published sizes."""

import ast
import re

import pytest
from checkout import ROOT

from elm_jax import errors
from elm_jax.models import AdapterConfig, T5Config
from elm_jax.models.adapters.kind import AdapterKind

GIN_FOLDER = ROOT / "gin" / "models"
SIZES = {
    "tiny": (128, 4, 32, 256, 2, 9_012_992),
    "small": (512, 6, 64, 1024, 8, 76_961_152),
    "base": (768, 12, 64, 2048, 12, 247_577_856),
    "large": (1024, 16, 64, 2816, 24, 783_150_080),
    "xl": (2048, 32, 64, 5120, 24, 2_849_757_184),
    "xxl": (4096, 64, 64, 10240, 24, 11_135_332_352),
    "t5_1_0_small": (512, 8, 64, 2048, 6, 60_506_624),
    "t5_1_0_base": (768, 12, 64, 3072, 12, 222_903_552),
    "t5_1_0_large": (1024, 16, 64, 4096, 24, 737_668_096),
}
GOOD = {"vocab_size": 50, "emb_dim": 64, "num_heads": 2, "head_dim": 8, "mlp_dim": 32,
        "num_encoder_layers": 1, "num_decoder_layers": 1}


@pytest.mark.parametrize("adapter", [None, AdapterConfig(), AdapterConfig(3)])
def test_dictionary_round_trip(adapter: AdapterKind | None) -> None:
    config = T5Config(**GOOD, adapter=adapter, mlp_activations=("relu",))
    again = T5Config.from_dict(config.to_dict())
    assert again == config
    assert hash(again) == hash(config)


def test_a_list_of_activations_becomes_hashable() -> None:
    assert hash(T5Config(**GOOD, mlp_activations=["relu"])) == hash(
        T5Config(**GOOD, mlp_activations=("relu",))
    )


def test_bottleneck_default_and_choice() -> None:
    config = T5Config(**GOOD)
    assert config.with_adapter(AdapterConfig()).bottleneck == 2
    assert config.with_adapter(AdapterConfig(5)).bottleneck == 5
    assert T5Config(**{**GOOD, "emb_dim": 8}, adapter=AdapterConfig()).bottleneck == 1
    with pytest.raises(errors.InputError, match="no adapters"):
        _ = config.bottleneck


@pytest.mark.parametrize(("change", "message"), [
    ({"emb_dim": 0}, r"T5Config\.emb_dim\n  got: 0"),
    ({"num_heads": "8"}, r"T5Config\.num_heads\n  got: '8'"),
    ({"mlp_dim": True}, r"T5Config\.mlp_dim"),
    ({"mlp_activations": ("gelu", "linear", "relu")}, "one or two"),
    ({"mlp_activations": ("gelo", "linear")}, "Unknown activation 'gelo'(?s:.*)nearest: gelu"),
    ({"dtype": "bfloat61"}, "Unknown dtype(?s:.*)nearest: bfloat16"),
    ({"dropout_rate": 1.0}, r"dropout_rate\n  got: 1.0"),
    ({"logits_via_embedding": 1}, "logits_via_embedding"),
    ({"relative_attention_num_buckets": 30}, "multiple of 4"),
    ({"relative_attention_max_distance": 16}, "more than 16"),
    ({"adapter": 64}, "AdapterConfig"),
])
def test_wrong_values_are_refused(change: dict, message: str) -> None:
    with pytest.raises(errors.InputError, match=message):
        T5Config(**{**GOOD, **change})


def test_wrong_dictionaries_are_refused() -> None:
    with pytest.raises(errors.InputError, match="nearest: emb_dim"):
        T5Config.from_dict({**GOOD, "emb_dims": 3})
    with pytest.raises(errors.InputError, match="lacks fields\n  expected: emb_dim"):
        T5Config.from_dict({name: GOOD[name] for name in GOOD if name != "emb_dim"})
    with pytest.raises(errors.InputError, match="Unknown AdapterConfig field 'width'"):
        T5Config.from_dict({**GOOD, "adapter": {"width": 3}})
    with pytest.raises(errors.InputError, match="bottleneck"):
        AdapterConfig(0)


@pytest.mark.parametrize("size", SIZES)
def test_gin_file_has_the_published_dimensions(size: str) -> None:
    text = (GIN_FOLDER / f"{size}.gin").read_text()
    bindings = re.findall(r"^T5Config\.(\w+) = (.+)$", text, re.MULTILINE)
    macros = dict(re.findall(r"^([A-Z_]+) = (.+)$", text, re.MULTILINE))
    config = T5Config(**{
        name: ast.literal_eval(macros[value[1:]] if value.startswith("%") else value)
        for name, value in bindings
    })
    *dimensions, count = SIZES[size]
    assert [config.emb_dim, config.num_heads, config.head_dim, config.mlp_dim,
            config.num_encoder_layers] == dimensions
    assert config.num_decoder_layers == config.num_encoder_layers
    assert config.vocab_size == 32128
    assert config.logits_via_embedding == size.startswith("t5_1_0")
    assert f"{count:,}" in text  # tests/repository counts the network's own


def test_every_gin_file_is_known() -> None:
    texts = {path.stem: path.read_text() for path in GIN_FOLDER.glob("*.gin")}
    files = {name for name, text in texts.items() if "T5Config" in text and "SparseConfig" not in text}
    assert files == SIZES.keys()  # the others are of decoders, or have a dense one's dimensions
