"""Allowed values of flags and config fields, without importing the code that they select."""

import re

from elm_jax.errors import InputError, describe

MODEL_KINDS = ("elm", "hf", "t5x", "gguf")
"""Kinds of whole models, the keys of `formats.detect.KINDS`."""
WRITTEN_KINDS = ("elm", "hf", "t5x")
"""Those that are written, too."""
FOLDER_KINDS = (*MODEL_KINDS, "peft")
"""Kinds that `elm convert` reads: those of whole models, and of adapters."""
WRITTEN_FOLDERS = (*WRITTEN_KINDS, "peft")
"""Those of them that it writes."""
EXPERT_KINDS = ("prompt", "dataset", "multitask")
"""Kinds of experts that a T5X run trains."""
TRAIN_KINDS = ("prompt", "lora", "dataset", "multitask", "prompt_stack")
"""Files of gin/experts/, which `elm train --kind` names."""
DTYPES = ("bfloat16", "float16", "float32")
"""Dtypes to which parameters may be cast."""
LAYOUTS = ("orbax", "zarr")
"""Layouts of a T5X checkpoint."""
CHOICE_SCORES = ("sum", "mean")
"""Scores of an answer choice: the sum of its tokens' log-probabilities, or their mean."""
MORE_METRICS = ("acc_norm", "acc_norm_tokens", "exact_match", "squad_em", "squad_f1", "bleu")
"""Metrics beside accuracy and ROUGE-L (`evaluation.task_metrics` says what they are)."""
NONE_PER = ("row", "task")
"""Of what it is told that no expert fits: of each row by itself, or of all rows of a task together."""
SEARCHES = ("gradient", "evolution")
"""Ways to search merge weights."""
RESTS = ("mean", "base")
"""What all leaves beside the experts are in a base upcycled from full experts: their mean, or the base's."""
GATES = ("token", "task", "both")
"""What the routers of sparse layers read."""
PERS = ("task", "dataset")
"""Whether each task has a vector of its own, or all of a data set have one."""
ALLOWED = {
    "dtypes": "leaves of unlike dtypes (the result takes the first model's)",
    "configs": "unlike settings in config.json (the result takes the donor's)",
    "vocabularies": "unlike tokenizers of one size (the result takes the donor's)",
    "heads": "a model whose head is tied among others with a head of their own: its embedding is its head",
    "missing": "leaves that some models lack: the base's take their place, or the first that has them",
}
"""Differences between merged models that can be allowed by name."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", re.IGNORECASE)
_UNITS = {"": 1, "B": 1, "KB": 1e3, "K": 1e3, "MB": 1e6, "M": 1e6, "GB": 1e9, "G": 1e9, "TB": 1e12, "T": 1e12}


def parse_size(text: str) -> float:
    """Parses a size in bytes: ``5GB``, ``500MB``, ``30KB`` (powers of 1000) or a number."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InputError(describe("This is no size", got=repr(text),
                                  expected="5GB, 500MB or a number of bytes"))
    return float(match[1]) * _UNITS[match[2].upper()]
