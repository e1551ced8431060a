"""Checkpoints of a wanted size for `merge.py`, and how far apart two of them are.

    python benchmarks/merge_checkpoints.py make FOLDER --count 8 --size 1.1GB --dtype bfloat16
    python benchmarks/merge_checkpoints.py compare LEFT RIGHT INPUT...

`make` writes FOLDER/base, FOLDER/expert0, ...: real names and shapes of Llama or T5 1.1, normal weights of
deviation 0.02, and experts that differ from the base by a tenth of that, from a fixed seed. `compare` counts
units in the last place, taken at the largest of the inputs that were merged. Both print one line of JSON. A
program of its own, so that the one which measures others stays small.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns the name "bfloat16" from it)
import numpy as np
import tokenizers

from elm_jax.formats.model import TensorSpec
from elm_jax.formats.tensors import safetensors_files

HEAD = 64
WIDTHS = (64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096)
FEWEST_LAYERS = 12
DEVIATION, CHANGE = 0.02, 0.002
POOL, PIECE = 1 << 22, 1 << 20
MANTISSA_BITS = {"bfloat16": 7, "float16": 10, "float32": 23}
Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Size:
    """Dimensions of a model: width D, feed-forward F, vocabulary V and layers L (of each stack)."""

    width: int
    layers: int

    @property
    def feed_forward(self) -> int:
        """8/3 of the width, in whole heads."""
        return self.width * 8 // 3 // HEAD * HEAD

    @property
    def vocabulary(self) -> int:
        """32,000 as Llama has it, fewer for small models."""
        return min(32_000, 32 * self.width)


def llama_shapes(size: Size) -> Shapes:
    """Names and shapes of LlamaForCausalLM."""
    square, wide = (size.width, size.width), (size.feed_forward, size.width)
    shapes: Shapes = {"model.embed_tokens.weight": (size.vocabulary, size.width)}
    for layer in range(size.layers):
        leaves = {f"self_attn.{name}_proj.weight": square for name in "qkvo"}
        leaves |= {"mlp.gate_proj.weight": wide, "mlp.up_proj.weight": wide,
                   "mlp.down_proj.weight": wide[::-1], "input_layernorm.weight": (size.width,),
                   "post_attention_layernorm.weight": (size.width,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in leaves.items()}
    return shapes | {"model.norm.weight": (size.width,), "lm_head.weight": (size.vocabulary, size.width)}


def llama_config(size: Size) -> dict[str, Any]:
    """The fields of config.json that say those shapes."""
    heads = size.width // HEAD
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": size.width,
            "intermediate_size": size.feed_forward, "num_hidden_layers": size.layers,
            "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": size.vocabulary,
            "tie_word_embeddings": False}


def t5_shapes(size: Size) -> Shapes:
    """Names and shapes of T5ForConditionalGeneration, 1.1: gated, with a head of its own."""
    table = (size.vocabulary, size.width)
    shapes: Shapes = {"shared.weight": table, "lm_head.weight": table}
    stacks = {"encoder": ["SelfAttention"], "decoder": ["SelfAttention", "EncDecAttention"]}
    for stack, attentions in stacks.items():
        for layer in range(size.layers):
            block = f"{stack}.block.{layer}.layer"
            for number, attention in enumerate(attentions):
                shapes |= {f"{block}.{number}.{attention}.{name}.weight": (size.width, size.width)
                           for name in "qkvo"}
            dense = f"{block}.{len(attentions)}.DenseReluDense"
            shapes |= {f"{dense}.wi_0.weight": (size.feed_forward, size.width),
                       f"{dense}.wi_1.weight": (size.feed_forward, size.width),
                       f"{dense}.wo.weight": (size.width, size.feed_forward)}
            shapes |= {f"{block}.{number}.layer_norm.weight": (size.width,)
                       for number in range(len(attentions) + 1)}
        shapes[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (
            32, size.width // HEAD)
        shapes[f"{stack}.final_layer_norm.weight"] = (size.width,)
    return shapes


def t5_config(size: Size) -> dict[str, Any]:
    """The fields of config.json that say those shapes."""
    return {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": size.width,
            "d_ff": size.feed_forward, "d_kv": HEAD, "num_heads": size.width // HEAD,
            "num_layers": size.layers, "num_decoder_layers": size.layers, "vocab_size": size.vocabulary,
            "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "is_encoder_decoder": True,
            "decoder_start_token_id": 0}


KINDS: dict[str, tuple[Callable[[Size], Shapes], Callable[[Size], dict[str, Any]]]] = {
    "llama": (llama_shapes, llama_config), "t5": (t5_shapes, t5_config)}


def choose_size(kind: str, parameters: float) -> Size:
    """The widest model of so many parameters that still has `FEWEST_LAYERS` layers, else the narrowest."""
    shapes_of = KINDS[kind][0]

    def count(width: int, layers: int) -> int:
        return sum(map(math.prod, shapes_of(Size(width, layers)).values()))

    width = max((w for w in WIDTHS if count(w, FEWEST_LAYERS) <= parameters), default=WIDTHS[0])
    layer = count(width, 2) - count(width, 1)
    return Size(width, max(1, round((parameters - count(width, 1)) / layer) + 1))


def bytes_of(text: str) -> float:
    """Bytes of a size like 1.1GB, 200MB (powers of ten)."""
    units = {"GB": 1e9, "MB": 1e6, "KB": 1e3}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units:
        raise SystemExit(f"a size is a number with {', '.join(units)}: got {text!r}")
    return float(number) * units[unit]


class Weights:
    """Weights drawn from a pool of normal numbers: a hundredth of the time that fresh ones would take."""

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        self.specs = specs
        self.pool = np.random.default_rng(0).standard_normal(POOL + PIECE, np.float32)

    def pieces(self, name: str, expert: int | None) -> Iterator[np.ndarray]:
        """A tensor of the base (None) or of an expert, piece by piece."""
        spec = self.specs[name]
        centre = 1.0 if len(spec.shape) == 1 else 0.0
        label = zlib.crc32(name.encode())
        draws = [np.random.default_rng([label, 0])]
        draws += [] if expert is None else [np.random.default_rng([label, 1 + expert])]
        left = math.prod(spec.shape)
        while left:
            size = min(left, PIECE)
            values = np.full(size, centre, np.float32)
            for draw, deviation in zip(draws, (DEVIATION, CHANGE), strict=False):
                start = int(draw.integers(POOL))
                values += np.float32(deviation) * self.pool[start:start + size]
            yield values.astype(spec.dtype)
            left -= size


def make(folder: pathlib.Path, kind: str, dtype: str, size: float, count: int, shards: int) -> dict[str, Any]:
    """Writes a base and `count` experts; returns what was written."""
    dimensions = choose_size(kind, size / np.dtype(dtype).itemsize)
    shapes_of, config_of = KINDS[kind]
    specs = {name: TensorSpec(shape, dtype) for name, shape in shapes_of(dimensions).items()}
    total = sum(spec.nbytes for spec in specs.values())
    config = config_of(dimensions) | {"torch_dtype": dtype}
    weights = Weights(specs)
    for expert in (None, *range(count)):
        target = folder / ("base" if expert is None else f"expert{expert}")
        target.mkdir(parents=True)
        (target / "config.json").write_text(json.dumps(config, indent=1))
        (target / "tokenizer_config.json").write_text("{}")
        tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0})).save(str(target / "tokenizer.json"))
        safetensors_files.write_tensors(
            target, specs, lambda name, expert=expert: weights.pieces(name, expert),
            math.inf if shards == 1 else 1.1 * total / shards)
    parameters = sum(math.prod(spec.shape) for spec in specs.values())
    return {"bytes": total, "tensors": len(specs), "parameters": parameters, **dataclasses.asdict(dimensions)}


def compare(left: pathlib.Path, right: pathlib.Path, inputs: Sequence[pathlib.Path]) -> dict[str, Any]:
    """How far apart two merges of some inputs are: the largest difference, also in units, and shares.

    A sum is as exact as its largest term; a unit is therefore that of the largest of the results and inputs.
    """
    ours, theirs, *others = (safetensors_files.open_tensors(folder) for folder in (left, right, *inputs))
    unlike = sorted(ours.keys() ^ theirs.keys()) + [
        name for name in ours.keys() & theirs.keys()
        if (ours[name].shape, ours[name].dtype) != (theirs[name].shape, theirs[name].dtype)]
    if unlike:
        return {"unlike": unlike}
    total = different = beyond = 0
    largest = units = 0.0
    for name, tensor in ours.items():
        for one, other, *terms in zip(*map(blocks, (tensor, theirs[name], *(each[name] for each in others))),
                                      strict=True):
            changed = one != other
            found = np.stack([each[changed].astype(np.float64) for each in (one, other, *terms)])
            apart = np.abs(found[0] - found[1])
            exponent = np.frexp(np.max(np.abs(found), axis=0))[1]
            steps = apart / np.exp2(exponent - 1.0 - MANTISSA_BITS[tensor.dtype])
            total, different = total + one.size, different + apart.size
            beyond += int(np.count_nonzero(steps > 1))
            largest, units = max(largest, apart.max(initial=0.0)), max(units, steps.max(initial=0.0))
    return {"elements": total, "share_different": different / total, "share_beyond_one_unit": beyond / total,
            "largest_difference": float(largest), "largest_difference_in_units": float(units)}


def blocks(tensor: safetensors_files.StoredTensor) -> Iterator[np.ndarray]:
    """A stored tensor in blocks of rows."""
    rows = max(1, 4 * PIECE // max(1, math.prod(tensor.shape[1:])))
    for start in range(0, tensor.shape[0], rows):
        block = np.empty((min(rows, tensor.shape[0] - start), *tensor.shape[1:]), np.dtype(tensor.dtype))
        tensor.fill(block, start)
        yield block


def main() -> None:
    """Makes checkpoints or compares two."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("make")
    making.add_argument("folder", type=pathlib.Path)
    making.add_argument("--kind", choices=KINDS, default="llama")
    making.add_argument("--dtype", choices=MANTISSA_BITS, default="bfloat16")
    making.add_argument("--size", type=bytes_of, default="1.1GB", help="of one checkpoint")
    making.add_argument("--count", type=int, default=3, help="experts beside the base")
    making.add_argument("--shards", type=int, default=2, help="files of one checkpoint")
    comparing = verbs.add_parser("compare")
    comparing.add_argument("left", type=pathlib.Path)
    comparing.add_argument("right", type=pathlib.Path)
    comparing.add_argument("inputs", type=pathlib.Path, nargs="*")
    flags = parser.parse_args()
    if flags.verb == "make":
        result = make(flags.folder, flags.kind, flags.dtype, flags.size, flags.count, flags.shards)
    else:
        result = compare(flags.left, flags.right, flags.inputs)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
