"""Verifies a conversion: compares the logits of source and target, from two programs if possible."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from elm_jax.experts import hf_adapters
from elm_jax.experts.overlay import Expert, load_expert
from elm_jax.experts.weight_sources import Source, expert_folder
from elm_jax.formats import detect, places
from elm_jax.formats.model import Model
from elm_jax.models import families
from elm_jax.models.network import JOINED, NetworkConfig
from elm_jax.models.t5.network import shift_right
from elm_jax.runtime import trees
from elm_jax.types import Batch, FlatParams
from elm_jax.workflows.merge import merge_inputs

logger = logging.getLogger(__name__)
TOLERANCE = 1e-4
"""Allowed difference of logits, in float32, if they are small."""
RELATIVE_TOLERANCE = 2e-5
"""Allowed share of the largest logit: float32 errors are relative, and logits can be hundreds. In 30 layers
(SmolLM2) float32 comes 1e-5 of it away from float64, in this program and in transformers."""
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
        ``{'largest_difference', 'largest_logit', 'tolerance', 'source_by', 'target_by', 'shape'}``.

    Raises:
        RunError: config.json of a Hugging Face folder is not true of its head.
    """
    if target_kind == "hf":
        merge_inputs.check_head(target)
    config = source.model.config
    batch = tokens(config)
    real = batch["segment_ids"][..., None] > 0 if "segment_ids" in batch else True
    with_adapters = source.expert is not None
    ours = (_ours(source.model, source.expert), "elm_jax")
    first, first_by = ours
    if source_kind == "hf" and as_it_lies and not with_adapters:
        first, first_by = _transformers(source.where, config) or ours
    wanted = np.where(real, first(batch), 0.0)
    back = (_read_back(target, source), "elm_jax")
    second, second_by = back
    if target_kind == "hf" and not with_adapters:
        second, second_by = _transformers(target, config) or back
    found = np.where(real, second(batch), 0.0)
    largest = float(np.abs(wanted).max())
    return {"largest_difference": float(np.abs(wanted - found).max()), "largest_logit": largest,
            "tolerance": max(TOLERANCE, RELATIVE_TOLERANCE * largest), "source_by": first_by,
            "target_by": second_by, "shape": list(wanted.shape)}


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
        whole = model if expert is None else hf_adapters.with_overlay(model, expert, adapters=True)
        network = families.network_of(dataclasses.replace(whole.config, dtype="float32"))
        params: FlatParams = {path: whole.tensors.read(path).astype(np.float32, copy=False)
                              for path in whole.tensors.specs}
        whole.check()
        return np.asarray(jax.jit(network.logits)(trees.unflatten(params), batch))

    return logits


def _read_back(target: str, source: Source) -> Logits:
    """Opens the written folder; puts an expert's overlay onto the base of the conversion."""
    folder = places.locate(target)
    if expert_folder(folder) is not None:
        return _ours(source.model, load_expert(folder))
    model = detect.open_model(folder)
    expert = hf_adapters.read_hf_expert(folder) if hf_adapters.is_with_adapters(folder) else None
    return _ours(model, expert)


def _transformers(folder: str, config: NetworkConfig) -> tuple[Logits, str] | None:
    """Loads transformers' model of a folder; None if transformers is not installed."""
    try:
        import torch
        import transformers
    except ImportError:
        logger.info("transformers is not installed: this program's own network computes both sides")
        return None

    def logits(batch: Batch) -> np.ndarray:
        given = {name: torch.tensor(array).long() for name, array in batch.items()}
        joined = "segment_ids" in given
        kind = transformers.AutoModelForCausalLM if joined else transformers.AutoModelForSeq2SeqLM
        model = kind.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True)
        with torch.no_grad():
            if joined:
                return model(input_ids=given["tokens"], attention_mask=given["segment_ids"]).logits.numpy()
            inputs = given["encoder_input_tokens"]
            return model(input_ids=inputs, attention_mask=(inputs != config.pad_id).long(),
                         decoder_input_ids=given["decoder_input_tokens"]).logits.numpy()

    return logits, f"transformers {transformers.__version__}"
