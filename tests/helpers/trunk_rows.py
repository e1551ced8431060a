"""Networks of every family with a trunk, batches that fit them, and a cache of their states."""

import dataclasses
import functools

import family_rows as made
import numpy as np
import weights

from elm_jax.data.arrays.batch_forms import form_of
from elm_jax.data.arrays.batches import ChoiceShape, make_choice_batch
from elm_jax.models import AdapterConfig, T5Config, families
from elm_jax.models.decoder.config import DecoderConfig
from elm_jax.runtime import sharding, trees
from elm_jax.training.trunk.trunk_cache import TrunkBase, TrunkCache, TrunkSettings

LENGTHS = {"inputs": 10, "targets": 7}
DEPTH = 1
ADAPTERS = {"bottleneck": AdapterConfig(4, layers="upper 2"),
            "lora": AdapterConfig(kind="lora", rank=2, layers="upper 2")}
CONFIGS = {
    "t5": T5Config(29, 24, 3, 5, 40, 2, 1),
    "llama": DecoderConfig(29, 24, 4, 2, 6, 40, 3, 64, tied_head=True),
    "gpt2": DecoderConfig(29, 24, 2, 2, 12, 40, 3, 64, mlp_activations=("gelu_tanh",), norm="layer",
                          position="learned", dense_bias=True, tied_head=True),
}
"""Three layers each, adapters in the upper two."""


@functools.cache
def network_and_params(name: str, adapter: str = "bottleneck", **changes):
    """A network with a trunk of one layer, and parameters, none of them zero."""
    config = dataclasses.replace(CONFIGS[name].with_adapter(ADAPTERS[adapter]), **changes)
    network = families.network_of(config)
    return dataclasses.replace(network, trunk=DEPTH), weights.drawn(network)


def batches(network, pack: bool, count: int = 2, seed: int = 0):
    """Training batches of three rows, packed or not."""
    form, examples = form_of(network), made.examples(network.config, 40, seed)
    if not pack:
        return [form.make(examples[3 * number:3 * number + 3], LENGTHS, 3) for number in range(count)]
    sizes = [(len(inputs), len(targets)) for inputs, targets in examples]
    rows = [[examples[number] for number in row] for row in form.pack(sizes, LENGTHS)]
    return [form.make_packed(rows[3 * number:3 * number + 3], LENGTHS, 3) for number in range(count)]


def instances(network, rows: int = 4):
    """Instances to score, as the evaluator's batches have them: the last row is padding, a prompt empty."""
    examples = made.examples(network.config, rows - 1, seed=3)
    form = form_of(network)
    choices = [[made.examples(network.config, 1, seed=10 * row + number)[0][1]
                for number in range(1 + row % 3)] for row in range(rows - 1)]
    prompts = [form.prompt(inputs, 9) for inputs, _ in examples]
    prompts[1] = prompts[1][:0] if network.batches == "joined" else prompts[1]
    batch = dict(make_choice_batch(prompts, choices, ChoiceShape(rows, 9, 3, 6), form.ids.pad))
    del batch["choice_mask"]
    return batch


def cache_of(network, params, folder, fingerprint: str = "sha256:1", mesh=None, **settings) -> TrunkCache:
    base, _ = trees.split(params, lambda path: "_adapter/" not in path)
    return TrunkCache(network, TrunkBase(fingerprint, base), TrunkSettings(folder, **settings),
                      mesh or sharding.make_mesh(1, 1))


def is_trained(network):
    """Whether a leaf is of an expert: adapters, and norms from the trunk on."""
    return lambda path: "_adapter/" in path or ("norm/" in path and network.depth_of(path) >= DEPTH)


def as_arrays(tree):
    return {path: np.asarray(leaf) for path, leaf in trees.flatten(tree).items()}
