"""Small checkpoints of real classes, and mergekit's and our merge of them by one YAML file.

mergekit is a program of its own (LGPL-3.0): it is run here, never copied.
"""

import atexit
import copy
import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
import yaml

from elm_jax.errors import InputError

SHARD_SIZE = "30KB"
NUM_EXPERTS = 3
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_T5 = {"d_model": 24, "d_kv": 5, "d_ff": 40, "num_heads": 3, "num_layers": 2, "num_decoder_layers": 3,
       "vocab_size": 320, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
_LLAMA = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 4, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": 320}
SHAPES = ("llama", "llama_tied", "t5_untied", "t5_tied")
Tensors = dict[str, torch.Tensor]


def build(shape: str) -> transformers.PreTrainedModel:
    """A model of `SHAPES`, random, with a head of its own where it is untied."""
    tied = shape.endswith("_tied")
    if shape.startswith("llama"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=tied))
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**_T5, tie_word_embeddings=tied))
    if not tied:  # transformers 5 ties every T5 until its head is another array
        model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape))
    return model


def save(model: transformers.PreTrainedModel, shape: str, folder: pathlib.Path) -> pathlib.Path:
    """Writes a folder in several shards, with the tie that published configs of that kind state."""
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = shape.endswith("_tied")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_family(folder: pathlib.Path, shape: str, dtype: str) -> dict[str, pathlib.Path]:
    """A base and experts beside it, several shards each: {"base": folder, "expert0": folder, ...}.

    An expert is its base and a normal difference of a tenth of each leaf's own deviation, so that task
    vectors are as small beside their base as they are in practice.
    """
    torch.manual_seed(0)
    model = build(shape)
    weights = list(model.parameters())
    with torch.no_grad():
        start = [weight + 0.05 * torch.randn_like(weight) for weight in weights]
        folders = {}
        for name in ("base", *(f"expert{number}" for number in range(NUM_EXPERTS))):
            for weight, value in zip(weights, start, strict=True):
                change = 0.0 if name == "base" else 0.1 * value.std() * torch.randn_like(value)
                weight.copy_(value + change)
            folders[name] = save(copy.deepcopy(model).to(DTYPES[dtype]), shape, folder / name)
    return folders


def read(folder: pathlib.Path) -> Tensors:
    """All tensors of a folder's safetensors files, by the safetensors library."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(file)
    return tensors


def write_yaml(path: pathlib.Path, folders: Mapping[str, pathlib.Path], config: Mapping[str, Any],
               models: Sequence[Mapping[str, Any]], base: bool) -> pathlib.Path:
    """A merge's YAML: `models` holds the parameters of each expert, in order."""
    whole: dict[str, Any] = dict(config)
    whole["models"] = [{"model": str(folders[f"expert{number}"]), "parameters": dict(parameters)}
                       for number, parameters in enumerate(models)]
    if base:
        whole["base_model"] = str(folders["base"])
    path.write_text(yaml.safe_dump(whole))
    return path


def run_mergekit(config: pathlib.Path, output: pathlib.Path, seed: int | None = None) -> Tensors:
    """mergekit's merge, by its Python interface."""
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    LoaderCache.loaders.clear()  # it remembers folders' indices by their path, for the whole process
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(config.read_text())), str(output),
              MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, random_seed=seed))
    return read(output)


OURS = """
import json, sys
from elm_jax.errors import ElmError
from elm_jax.merging.recipes import mergekit_yaml
from elm_jax.workflows.merge import merge_folders
for line in sys.stdin:
    config, output = json.loads(line)
    try:
        merge_folders.merge_folders(mergekit_yaml.read_config(config), output,
                                    merge_folders.MergeOptions(quiet=True))
        answer = None
    except ElmError as error:
        answer = str(error)
    print(json.dumps(answer), flush=True)
"""


@functools.cache
def ours_process() -> subprocess.Popen:
    """A process that merges as users' do: in this one the compiler's passes that fuse are left out."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    process = subprocess.Popen([sys.executable, "-c", OURS], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True, env=environment)
    atexit.register(process.kill)
    return process


def run_ours(config: pathlib.Path, output: pathlib.Path) -> Tensors:
    """Our merge by the same file; raises InputError with the message of one that is refused."""
    process = ours_process()
    process.stdin.write(json.dumps([str(config), str(output)]) + "\n")
    process.stdin.flush()
    answer = json.loads(process.stdout.readline())
    if answer is not None:
        raise InputError(answer)
    return read(output)


def units_apart(left: torch.Tensor, right: torch.Tensor, scale: torch.Tensor | None = None) -> np.ndarray:
    """Differences in units in the last place of `left`'s dtype.

    Args:
        left, right: tensors of one shape and dtype.
        scale: where given, a unit is taken at this magnitude where it is larger than the result's own: a
            sum cannot be more exact than its largest term.

    Returns:
        f64 of the tensors' shape.
    """
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    mantissa = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}[left.dtype]
    one, other = left.double(), right.double()
    size = torch.maximum(one.abs(), other.abs())
    if scale is not None:
        size = torch.maximum(size, scale.double())
    unit = torch.exp2(torch.floor(torch.log2(size.clamp(min=torch.finfo(left.dtype).tiny))) - mantissa)
    return ((one - other).abs() / unit).numpy()
