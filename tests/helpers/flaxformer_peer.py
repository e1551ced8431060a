"""flaxformer's T5 with experts, as T5X trains it, if its sources are on the path (it is on no package index).

Its quantisation (`aqt`) and `chex`'s checks of shapes have no part in what is computed here. Where these
packages are not installed, empty ones stand in for them.
"""

import functools
import importlib.util
import sys
import types
from typing import Any

import flaxformer  # noqa: F401  (before anything stands in for what it needs)
import jax
import jax.numpy as jnp
from flax import linen as nn

from elm_jax.models.t5.config import T5Config
from elm_jax.types import Params


class _Anything(type):
    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent


class Absent(metaclass=_Anything):
    """Stands for every class and function of a package that is not there."""

    def __init__(self, *given: Any, **named: Any) -> None:
        del given, named


def _stand_in(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__getattr__ = lambda _: Absent
    return sys.modules.setdefault(name, module)


_LEGACY = "aqt.jax_legacy.jax"
if importlib.util.find_spec("chex") is None:
    _stand_in("chex")
if importlib.util.find_spec("aqt") is None:
    for _name in ("aqt", "aqt.jax_legacy", _LEGACY):
        _stand_in(_name)
    for _name in ("flax_layers", "quant_config", "quantization"):
        setattr(sys.modules[_LEGACY], _name, _stand_in(f"{_LEGACY}.{_name}"))

from flaxformer.architectures.moe import moe_architecture, moe_layers, routing  # noqa: E402
from flaxformer.architectures.moe.moe_enums import LayerLayout  # noqa: E402
from flaxformer.architectures.t5 import t5_architecture  # noqa: E402
from flaxformer.components import dense, embedding, layer_norm, relative_position_biases  # noqa: E402
from flaxformer.components.attention import dense_attention  # noqa: E402

_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
_NUMBERS = {"kernel_init": _INIT, "bias_init": nn.initializers.zeros, "use_bias": False, "dtype": jnp.float32}


class Peer:
    """flaxformer's network of a config whose sparse layers follow T5X's rule, with ample capacity."""

    def __init__(self, config: T5Config) -> None:
        self._config = config
        embed = functools.partial(
            embedding.Embed, num_embeddings=config.vocab_size, features=config.emb_dim, dtype=jnp.float32,
            cast_input_dtype=jnp.int32, attend_dtype=jnp.float32, one_hot=True, name="token_embedder",
            embedding_init=nn.initializers.normal(1.0))
        self.module = t5_architecture.EncoderDecoder(
            shared_token_embedder_factory=embed, dtype=jnp.float32,
            encoder_factory=functools.partial(
                moe_architecture.SparseEncoder, layer_factory=self._layer(t5_architecture.EncoderLayer),
                sparse_layer_factory=self._layer(moe_architecture.SparseEncoderLayer),
                input_dropout_factory=self._dropout, output_dropout_factory=self._dropout,
                **self._stack(config.num_encoder_layers)),
            decoder_factory=functools.partial(
                moe_architecture.SparseDecoder, layer_factory=self._layer(t5_architecture.DecoderLayer),
                sparse_layer_factory=self._layer(moe_architecture.SparseDecoderLayer),
                dropout_factory=self._dropout,
                output_logits_factory=None if config.logits_via_embedding else self._head,
                **self._stack(config.num_decoder_layers)))

    def init(self, seed: int, inputs: jax.Array, decoder_inputs: jax.Array) -> Params:
        """Its own initial parameters."""
        return self.module.init(jax.random.key(seed), inputs, decoder_inputs, jnp.ones_like(decoder_inputs),
                                enable_dropout=False)["params"]

    def logits(self, params: Params, inputs: jax.Array, decoder_inputs: jax.Array) -> jax.Array:
        """i32[B, S] and i32[B, T] -> f32[B, T, V]."""
        return self.module.apply({"params": params}, inputs, decoder_inputs, jnp.ones_like(decoder_inputs),
                                 enable_dropout=False)

    @staticmethod
    def _dropout() -> nn.Module:
        return nn.Dropout(rate=0.0)

    def _head(self) -> nn.Module:
        return dense.DenseGeneral(features=self._config.vocab_size, kernel_axis_names=["embed", "vocab"],
                                  **_NUMBERS)

    def _bias(self) -> nn.Module:
        return relative_position_biases.RelativePositionBiases(
            num_buckets=32, max_distance=128, num_heads=self._config.num_heads, dtype=jnp.float32,
            embedding_init=nn.initializers.normal(1.0))

    def _stack(self, layers: int) -> dict[str, Any]:
        return {"num_layers": layers, "num_sparse_layers": layers // self._config.sparse.step,
                "sparse_layout": LayerLayout.MIXED, "layer_norm_factory": layer_norm.T5LayerNorm,
                "shared_relative_position_bias_factory": self._bias, "dtype": jnp.float32}

    def _layer(self, kind: type) -> Any:
        """Makes layers of a class of flaxformer's."""
        both = ("self_attention", "encoder_decoder_attention")
        names = ("attention",) if "Encoder" in kind.__name__ else both
        is_sparse = kind.__name__.startswith("Sparse")

        def made(shared_relative_position_bias: nn.Module) -> nn.Module:
            more = {"extra_mlp": self._mlp()} if is_sparse and self._config.sparse.dense_sublayer else {}
            return kind(mlp=self._moe() if is_sparse else self._mlp(), dropout_factory=self._dropout,
                        layer_norm_factory=layer_norm.T5LayerNorm, **more,
                        shared_relative_position_bias=shared_relative_position_bias,
                        **{name: self._attention() for name in names})

        return made

    def _attention(self) -> nn.Module:
        return dense_attention.MultiHeadDotProductAttention(
            num_heads=self._config.num_heads, head_dim=self._config.head_dim, broadcast_dropout=True,
            dropout_rate=0.0, **_NUMBERS)

    def _mlp(self) -> nn.Module:
        return dense.MlpBlock(
            intermediate_dim=self._config.mlp_dim, activations=self._config.mlp_activations,
            intermediate_dropout_rate=0.0, final_dropout_rate=0.0, **_NUMBERS)

    def _moe(self) -> nn.Module:
        sparse = self._config.sparse
        router = routing.TokensChooseMaskedRouter(
            router_weights=routing.RouterWeights(use_bias=False, dtype=jnp.float32),
            num_selected_experts=sparse.experts_per_token, jitter_noise=0.0, dtype=jnp.float32,
            batch_prioritized_routing=False, ignore_padding_tokens=False)
        return moe_layers.MoeLayer(
            num_experts=sparse.num_experts, num_expert_partitions=1, num_model_partitions=1,
            max_group_size=4096, train_capacity_factor=64.0, eval_capacity_factor=64.0, expert=self._mlp(),
            router=router, dtype=jnp.float32)
