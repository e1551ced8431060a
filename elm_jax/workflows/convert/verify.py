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
from elm_jax.models.t5.network import T5Network, shift_right
from elm_jax.runtime import trees
from elm_jax.types import FlatParams

logger = logging.getLogger(__name__)
TOLERANCE = 1e-4
"""Allowed difference of logits, in float32, if they are small."""
RELATIVE_TOLERANCE = 1e-5
"""Allowed share of the largest logit: float32 errors are relative, and logits can be hundreds."""
_ROWS, _SOURCE_LENGTH, _TARGET_LENGTH = 4, 24, 12
_SEED = 0
Logits = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""inputs i32[B, S], decoder inputs i32[B, T] -> f32[B, T, V]."""


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
    """
    inputs, decoder_inputs = tokens(source.model.config.vocab_size)
    with_adapters = source.expert is not None
    ours = (_ours(source.model, source.expert), "elm_jax")
    first, first_by = ours
    if source_kind == "hf" and as_it_lies and not with_adapters:
        first, first_by = _transformers(source.where) or ours
    wanted = first(inputs, decoder_inputs)
    back = (_read_back(target, source), "elm_jax")
    second, second_by = back
    if target_kind == "hf" and not with_adapters:
        second, second_by = _transformers(target) or back
    found = second(inputs, decoder_inputs)
    largest = float(np.abs(wanted).max())
    return {"largest_difference": float(np.abs(wanted - found).max()), "largest_logit": largest,
            "tolerance": max(TOLERANCE, RELATIVE_TOLERANCE * largest), "source_by": first_by,
            "target_by": second_by, "shape": list(wanted.shape)}


def tokens(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Random token ids, the same every time: inputs with padding, and decoder inputs."""
    draw = np.random.default_rng(_SEED)
    inputs = draw.integers(2, vocab_size, (_ROWS, _SOURCE_LENGTH)).astype(np.int32)
    for row in range(1, _ROWS):
        inputs[row, _SOURCE_LENGTH - 5 * row:] = 0
    targets = draw.integers(2, vocab_size, (_ROWS, _TARGET_LENGTH)).astype(np.int32)
    return inputs, np.asarray(shift_right(targets))


def _ours(model: Model, expert: Expert | None) -> Logits:
    def logits(inputs: np.ndarray, decoder_inputs: np.ndarray) -> np.ndarray:
        whole = model if expert is None else hf_adapters.with_overlay(model, expert, adapters=True)
        network = T5Network(dataclasses.replace(whole.config, dtype="float32"))
        params: FlatParams = {path: whole.tensors.read(path).astype(np.float32, copy=False)
                              for path in whole.tensors.specs}
        whole.check()
        batch = {"encoder_input_tokens": inputs, "decoder_input_tokens": decoder_inputs}
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


def _transformers(folder: str) -> tuple[Logits, str] | None:
    """Loads transformers' model of a folder; None if transformers is not installed."""
    try:
        import torch
        import transformers
    except ImportError:
        logger.info("transformers is not installed: this program's own network computes both sides")
        return None

    def logits(inputs: np.ndarray, decoder_inputs: np.ndarray) -> np.ndarray:
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True)
        with torch.no_grad():
            return model(input_ids=torch.tensor(inputs).long(),
                         attention_mask=torch.tensor(inputs > 0).long(),
                         decoder_input_ids=torch.tensor(decoder_inputs).long()).logits.numpy()

    return logits, f"transformers {transformers.__version__}"
