"""Verifies a conversion from or to PEFT: PEFT itself, if it is installed, computes its side's logits."""

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.experts.overlay import Expert, load_expert
from elm_jax.experts.weight_sources import Source, open_source
from elm_jax.formats.hf import hf_models
from elm_jax.formats.model import Model
from elm_jax.formats.peft import adapter_files
from elm_jax.runtime import leftovers
from elm_jax.types import Batch
from elm_jax.workflows.convert import verify

PACKAGES = ("peft", "transformers", "torch")


def require() -> None:
    """Raises InputError if PEFT, or what it needs, is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(describe("Verifying an adapter needs PEFT", got=f"no {', no '.join(missing)}",
                                  cure=f"pip install {' '.join(missing)}, or leave --verify out"))


def compare(source: Source, source_kind: str, target: str, target_kind: str) -> dict[str, Any]:
    """Compares the logits of an adapter's two forms on its base, as `verify.compare` does for models.

    Args:
        source: the expert and its base.
        source_kind: of the folder that it came from.
        target: the folder that was written.
        target_kind: its kind.
    """
    batch = verify.tokens(source.model.config)
    sides = []
    for kind, folder in ((source_kind, source.where), (target_kind, target)):
        if kind == adapter_files.KIND:
            sides.append((_by_peft(source.model, folder, batch), f"peft {_version()}"))
        else:
            expert = source.expert if folder == source.where else load_expert(folder)
            sides.append((_by_us(source.model, expert, batch), "elm_jax"))
    if source_kind == target_kind:  # both by PEFT: this program's reading of them counts too
        expert = open_source(target_kind, target, base=source.model.where).expert
        sides[1] = (_by_us(source.model, expert, batch), "elm_jax")
    real = batch["segment_ids"][..., None] > 0 if "segment_ids" in batch else True
    (wanted, found), (first_by, second_by) = zip(*sides, strict=True)
    wanted, found = np.where(real, wanted, 0.0), np.where(real, found, 0.0)
    return verify.judge(wanted, found, (first_by, second_by), lambda: verify.float32_error(
        source.model, source.expert, batch, np.where(real, _by_us(source.model, source.expert, batch), 0.0)))


def _by_us(base: Model, expert: Expert, batch: Batch) -> np.ndarray:
    return verify.network_logits(*verify.resolved(base, expert), batch)


def _by_peft(base: Model, folder: str, batch: Batch) -> np.ndarray:
    """Logits of PEFT's own model; a base of another form is written as a Hugging Face folder for it."""
    if base.kind == "hf":
        return _logits(base.where, folder, batch)
    with leftovers.scratch_folder() as place:
        hf_models.write_model_folder(f"{place}/base", base)
        return _logits(f"{place}/base", folder, batch)


def _logits(base: str, folder: str, batch: Batch) -> np.ndarray:
    import peft
    import torch
    import transformers

    two_sided = "encoder_input_tokens" in batch
    kind: Callable[..., Any] = (transformers.AutoModelForSeq2SeqLM if two_sided
                                else transformers.AutoModelForCausalLM)
    with verify.with_metadata(base) as place:
        model = kind.from_pretrained(place, dtype=torch.float32, local_files_only=True)
    model = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    rows = {name: torch.tensor(np.asarray(array)).long() for name, array in batch.items()}
    with torch.no_grad():
        if two_sided:
            inputs = rows["encoder_input_tokens"]
            return model(input_ids=inputs, attention_mask=(inputs != model.config.pad_token_id).long(),
                         decoder_input_ids=rows["decoder_input_tokens"]).logits.numpy()
        return model(input_ids=rows["tokens"], attention_mask=rows["segment_ids"]).logits.numpy()


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("peft")
