"""Checks that every reader makes on a model's leaves and vocabulary."""

from collections.abc import Mapping, Sequence
from typing import Any

from elm_jax.errors import InputError, describe
from elm_jax.formats.model import FLOAT_DTYPES
from elm_jax.models.network import NetworkConfig
from elm_jax.vocabularies.vocabulary import Vocabulary

_PADDING = 128
"""Embedding rows are usually padded to a multiple of this number."""


def check_leaves(what: str, where: Any, found: Mapping[str, Sequence[int]],
                 wanted: Mapping[str, Sequence[int]], cure: str | None = None) -> None:
    """Raises one InputError that lists every missing and unexpected name and every wrong shape."""
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    shapes = [f"{name}: {list(found[name])} instead of {list(wanted[name])}"
              for name in wanted if name in found and tuple(found[name]) != tuple(wanted[name])]
    parts = [f"{kind} ({len(names)}): {', '.join(names)}" for kind, names in
             (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes)) if names]
    if parts:
        raise InputError(describe(what, where=where, got="; ".join(parts), cure=cure))


def check_dtypes(where: Any, dtypes: Mapping[str, str]) -> None:
    """Raises InputError if a parameter is not of a floating-point type; all such are named."""
    wrong = [f"{name}: {dtype}" for name, dtype in dtypes.items() if dtype not in FLOAT_DTYPES]
    if wrong:
        raise InputError(describe("Tensors of a type that is no parameter's", where=where,
                                  got=", ".join(wrong), expected=", ".join(FLOAT_DTYPES)))


def check_base(config: NetworkConfig, where: Any) -> None:
    """Raises InputError if a model cannot be a base because it contains an expert's adapters."""
    if config.adapter is not None:
        raise InputError(describe(
            "This is no base: it holds the adapters of a prompt expert", where=where,
            got=f"adapters: {config.adapter.to_dict()}", expected="a model without adapters",
            cure=f"give the base that they were trained on; `elm convert --from t5x --to elm {where} EXPERT "
            "--base BASE` makes an expert of them"))


def check_vocabulary(contents: bytes | None, config: NetworkConfig, where: Any) -> None:
    """Raises InputError if a vocabulary does not fit a network: other special ids, or another size.

    T5's 32,100 ids on 32,128 rows are the normal case: the rest is padding.

    Args:
        contents: of the vocabulary's file, of any kind; None passes.
        config: of the network.
        where: for the error.
    """
    if contents is None:
        return
    vocabulary, rows = Vocabulary.from_bytes(contents, where), config.vocab_size
    vocabulary.check_ids(config.pad_id, config.eos_id, where)
    size = vocabulary.size
    slack = max(_PADDING, rows // 50)
    if not rows - slack < size <= rows:
        raise InputError(describe(
            "The vocabulary is not that of the embedding", where=where, got=f"{size} ids, {rows} rows",
            expected=f"at most {rows} ids and more than {rows - slack}: rows are padded a little, no more",
            cure="give the vocabulary that the model was trained with"))
