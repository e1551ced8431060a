"""Verifies a conversion: compares the logits of source and target, from two programs if possible."""

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from elm_jax.experts import hf_adapters
from elm_jax.experts.overlay import Expert, load_expert
from elm_jax.experts.weight_sources import Source, expert_folder
from elm_jax.formats import detect, places
from elm_jax.formats.model import Model
from elm_jax.formats.tensors import leaf_values
from elm_jax.models import families
from elm_jax.models.network import JOINED, Network, NetworkConfig
from elm_jax.models.t5.network import shift_right
from elm_jax.runtime import leftovers, storage, trees
from elm_jax.types import Array, Batch, FlatParams, Params
from elm_jax.workflows.convert.float64_logits import in_float64
from elm_jax.workflows.merge import merge_inputs

logger = logging.getLogger(__name__)
TOLERANCE = 1e-4
"""Allowed difference of logits, in float32, if they are small."""
RELATIVE_TOLERANCE = 2e-5
"""Allowed share of the largest logit: float32 errors are relative, and logits can be hundreds. In 30 layers
(SmolLM2) float32 comes 1e-5 of it away from float64, in this program and in transformers."""
ROUNDINGS, LARGEST_SHARE = 8.0, 0.01
"""Allowed multiple of float32's own error on these weights, which is measured where the former are exceeded;
and the share of the largest logit from which on no rounding explains a difference."""
SWITCH_SINCE = (5, 18)
"""The first transformers of version 5 whose SwitchTransformers drop tokens and weigh experts as they should:
https://github.com/huggingface/transformers/pull/48421."""
_ROWS, _SOURCE_LENGTH, _TARGET_LENGTH = 4, 24, 12
_SEED = 0
Logits = Callable[[Batch], np.ndarray]
"""A batch of `tokens` -> f32[B, T, V]."""


def compare(source: Source, source_kind: str, target: str, target_kind: str, *,
            as_it_lies: bool = True) -> dict[str, Any]:
    """Compares the logits of a conversion's source and target for the same tokens.

    Holds one whole model in float32 at a time. transformers computes the logits of a Hugging Face folder, if
    it is installed and the model has no adapters; this program's network computes the others, read back from
    disk.

    Args:
        source: what was converted, cast if it was cast.
        source_kind: of the folder that it came from.
        target: the folder that was written.
        target_kind: its kind.
        as_it_lies: whether the source was converted without a cast, so that its own folder can be compared.

    Returns:
        ``{'largest_difference', 'largest_logit', 'tolerance', 'source_by', 'target_by', 'shape'}``, and
        ``'float32_error'`` where the tolerance had to come from it.

    Raises:
        RunError: config.json of a Hugging Face folder is not true of its head.
    """
    if target_kind == "hf":
        merge_inputs.check_head(target)
    config = source.model.config
    batch = tokens(config)
    real = batch["segment_ids"][..., None] > 0 if "segment_ids" in batch else True
    with_adapters = source.expert is not None
    own = _ours(source.model, source.expert)
    ours = (own, "elm_jax")
    first, first_by = ours
    if source_kind == "hf" and as_it_lies and not with_adapters:
        first, first_by = _transformers(source.where, config) or ours
    wanted = np.where(real, first(batch), 0.0)
    back = (_read_back(target, source), "elm_jax")
    second, second_by = back
    if target_kind == "hf" and not with_adapters:
        second, second_by = _transformers(target, config) or back
    found = np.where(real, second(batch), 0.0)
    return judge(wanted, found, (first_by, second_by), lambda: float32_error(
        source.model, source.expert, batch, wanted if first is own else np.where(real, own(batch), 0.0)))


def judge(wanted: np.ndarray, found: np.ndarray, programs: tuple[str, str],
          error: Callable[[], float]) -> dict[str, Any]:
    """Compares two programs' logits; asks for float32's error only where it may explain the difference.

    Args:
        wanted: f32[B, T, V], of the source.
        found: likewise, of the target.
        programs: that computed them.
        error: gives the error that float32 makes on these weights.

    Returns:
        As `compare`; with ``float32_error`` where it was measured.
    """
    largest = float(np.abs(wanted).max())
    with np.errstate(invalid="ignore"):  # infinity less infinity
        difference = float(np.abs(wanted - found).max())
    tolerance, measured = max(TOLERANCE, RELATIVE_TOLERANCE * largest), {}
    if tolerance < difference <= LARGEST_SHARE * largest:
        measured = {"float32_error": error()}
        tolerance = max(tolerance, min(ROUNDINGS * measured["float32_error"], LARGEST_SHARE * largest))
    return {"largest_difference": difference, "largest_logit": largest, "tolerance": tolerance, **measured,
            "source_by": programs[0], "target_by": programs[1], "shape": list(wanted.shape)}


def float32_error(model: Model, expert: Expert | None, batch: Batch, found: np.ndarray) -> float:
    """Largest difference of this program's logits in float32, where they are not 0, from those in float64."""
    network, params = resolved(model, expert)
    exact = in_float64(network.logits, trees.unflatten(params), batch)
    return float(np.abs(np.where(found == 0.0, 0.0, exact - found)).max())


def resolved(model: Model, expert: Expert | None) -> tuple[Network, FlatParams]:
    """The network of a model, with an expert's overlay if there is one, and its leaves, all in float32."""
    whole = model if expert is None else hf_adapters.with_overlay(model, expert, adapters=True)
    network = families.network_of(dataclasses.replace(whole.config, dtype="float32"))
    params = {path: leaf_values.read_float32(whole.tensors.read(path), path, whole.where)
              for path in whole.tensors.specs}
    whole.check()
    return network, params


def network_logits(network: Network, params: FlatParams, batch: Batch) -> np.ndarray:
    """This program's logits f32[B, T, V]; both sides of a conversion, if of one config, share a program."""
    return np.asarray(_compiled_logits(network, trees.unflatten(params), batch))


@functools.partial(jax.jit, static_argnums=0)
def _compiled_logits(network: Network, params: Params, batch: Batch) -> Array:
    return network.logits(params, batch)


def tokens(config: NetworkConfig) -> dict[str, np.ndarray]:
    """Random tokens, the same every time, in rows of unequal lengths: a batch of the network's form."""
    draw, joined = np.random.default_rng(_SEED), families.network_of(config).batches == JOINED
    width = min(_SOURCE_LENGTH, config.max_length) if joined else _SOURCE_LENGTH
    inputs = draw.integers(2, config.vocab_size, (_ROWS, width)).astype(np.int32)
    lengths = np.maximum(width - 5 * np.arange(_ROWS), 1)[:, None]
    real = np.arange(width)[None] < lengths
    inputs = np.where(real, inputs, config.pad_id).astype(np.int32)
    if joined:
        positions = np.where(real, np.arange(width)[None], 0).astype(np.int32)
        return {"tokens": inputs, "segment_ids": real.astype(np.int32), "positions": positions}
    targets = draw.integers(2, config.vocab_size, (_ROWS, _TARGET_LENGTH)).astype(np.int32)
    return {"encoder_input_tokens": inputs,
            "decoder_input_tokens": np.asarray(shift_right(targets, config.start_id))}


def _ours(model: Model, expert: Expert | None) -> Logits:
    def logits(batch: Batch) -> np.ndarray:
        network, params = resolved(model, expert)
        return network_logits(network, params, batch)

    return logits


def _read_back(target: str, source: Source) -> Logits:
    """Opens the written folder; puts an expert's overlay onto the base of the conversion."""
    folder = places.locate(target)
    if expert_folder(folder) is not None:
        return _ours(source.model, load_expert(folder))
    model = detect.open_model(folder)
    expert = hf_adapters.read_hf_expert(folder) if hf_adapters.is_with_adapters(folder) else None
    return _ours(model, expert)


@contextlib.contextmanager
def with_metadata(folder: str) -> Iterator[str]:
    """The folder; or links to its files, beside an index with the ``metadata`` that transformers asks for.

    Other programs write indices of shards that are whole without it.
    """
    indices = [path for path in storage.as_path(folder).glob("*.index.json")
               if "metadata" not in storage.read_json(path, kind="index of the shards", schema_version=None)
               ] if storage.is_local(folder) and storage.as_path(folder).is_dir() else []
    if not indices:
        yield str(folder)
        return
    with leftovers.scratch_folder() as place:
        for path in storage.as_path(folder).iterdir():
            if path not in indices:
                os.symlink(os.path.abspath(path), os.path.join(place, path.name))
        for path in indices:
            values = storage.read_json(path, kind="index of the shards", schema_version=None)
            storage.write_json(storage.as_path(place) / path.name, {"metadata": {}, **values})
        yield place


def _version(text: str) -> tuple[int, ...]:
    """Major and minor number of a version."""
    return tuple(int(part) if part.isdecimal() else 0 for part in text.split(".")[:2])


def _transformers(folder: str, config: NetworkConfig) -> tuple[Logits, str] | None:
    """Loads transformers' model of a folder; None if transformers is not installed, or wrong about it."""
    try:
        import torch
        import transformers
    except ImportError:
        logger.info("transformers is not installed: this program's own network computes both sides")
        return None
    is_switch = config.family == "t5" and config.sparse is not None
    if is_switch and _version(transformers.__version__) < SWITCH_SINCE:
        logger.info("transformers %s is wrong about SwitchTransformers, %d.%d and newer are right: this "
                    "program's own network computes both sides", transformers.__version__, *SWITCH_SINCE)
        return None

    def logits(batch: Batch) -> np.ndarray:
        given = {name: torch.tensor(array).long() for name, array in batch.items()}
        joined = "segment_ids" in given
        kind = transformers.AutoModelForCausalLM if joined else transformers.AutoModelForSeq2SeqLM
        with with_metadata(folder) as place:
            model = kind.from_pretrained(place, dtype=torch.float32, local_files_only=True)
        with torch.no_grad():
            if joined:
                return model(input_ids=given["tokens"], attention_mask=given["segment_ids"]).logits.numpy()
            inputs = given["encoder_input_tokens"]
            return model(input_ids=inputs, attention_mask=(inputs != config.pad_id).long(),
                         decoder_input_ids=given["decoder_input_tokens"]).logits.numpy()

    return logits, f"transformers {transformers.__version__}"
