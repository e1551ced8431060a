"""Inputs of a merge: opens checkpoints and experts on disk and compares them, without reading weights.

Two models of equal shapes need not be two states of one network: another number of heads, another epsilon
or another vocabulary make a merge worthless. All of that is compared; differences are an error that lists
them, unless they are allowed by name (`choices.ALLOWED`).
"""

import dataclasses
import hashlib
import math
import pathlib
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from etils import epath

from elm_jax.errors import InputError, RunError, describe
from elm_jax.formats import places
from elm_jax.formats.hf.config_json import CONFIG_FILE, check_unquantised
from elm_jax.formats.model import FLOAT_DTYPES, Tensors, TensorSpec
from elm_jax.formats.peft import adapter_files
from elm_jax.formats.tensors import leaf_values, safetensors_files, streaming
from elm_jax.formats.tensors.safetensors_files import StoredTensor
from elm_jax.merging.stream import as_rows
from elm_jax.models.hf_versions import by_transformers_5
from elm_jax.runtime import storage
from elm_jax.workflows.choices import ALLOWED

EMBEDDINGS = ("shared.weight", "model.embed_tokens.weight", "transformer.wte.weight",
              "gpt_neox.embed_in.weight", "embed_tokens.weight")
HEADS = ("lm_head.weight", "embed_out.weight")
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_TIED_BY_DEFAULT = ("t5", "switch_transformers", "gpt2", "gemma", "gemma2", "gemma3", "gemma3_text", "bert",
                    "opt", "bloom")
_SCALED_HEADS = ("t5", "mt5", "umt5", "switch_transformers")
"""Networks that scale the input of a tied head, but not that of an untied one."""
_VOCABULARIES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt",
                 "added_tokens.json")
_UNIMPORTANT = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "_commit_hash",
                "task_specific_params", "finetuning_task", "_attn_implementation_autoset")
CARD_FILE = "merge.json"
_WEIGHTS = (safetensors_files.SINGLE_FILE, safetensors_files.INDEX_FILE)
_SAMPLES, _SAMPLE_BYTES, _SMALL = 256, 1 << 16, 1 << 18


class TensorsSource:
    """Leaves of `Tensors` as a source for `merging.stream`.

    Chunked formats decode whole chunks, of tens of megabytes, for every part that is read. So a leaf is read
    in bands, larger than the slices, and the last two are kept: workers on one leaf use no more at a time.
    All threads share the bands, and one memory budget covers the bands of all sources.
    """

    BAND_BYTES = 1 << 25
    """Most bytes of a band."""
    BUDGET_BYTES = 1 << 27
    """Most bytes of all bands of all sources."""
    _all: ClassVar["weakref.WeakSet[TensorsSource]"] = weakref.WeakSet()

    def __init__(self, tensors: Tensors) -> None:
        self._tensors, self.specs = tensors, tensors.specs
        self._lock = threading.Lock()
        self._path: str | None = None
        self._bands: list[tuple[int, np.ndarray]] = []
        self._all.add(self)

    def fill(self, path: str, start: int, out: np.ndarray) -> None:
        """Reads whole rows into a flat array [n]."""
        shape = self.specs[path].shape
        if out.size == math.prod(shape):
            out[...] = np.asarray(self._tensors.read(path)).reshape(-1)
            return
        place, done = start * as_rows(shape)[1], 0
        while done < out.size:
            first, values = self._band(path, place + done)
            part = values[place + done - first:][:out.size - done]
            out[done:done + part.size] = part
            done += part.size

    def _band(self, path: str, place: int) -> tuple[int, np.ndarray]:
        """The band that contains an element: the index of its first element, and its values, flat."""
        with self._lock:
            if path != self._path:
                self._path, self._bands = path, []
            for first, values in self._bands:
                if first <= place < first + values.size:
                    return first, values
            self._bands = self._bands[-1:]  # before the next one is read
            self._bands.append(self._read_band(path, place))
            return self._bands[-1]

    def _read_band(self, path: str, place: int) -> tuple[int, np.ndarray]:
        """Reads consecutive indices of the first dimension, as many as a band holds."""
        shape, item = self.specs[path].shape, np.dtype(self.specs[path].dtype).itemsize
        limit = min(self.BAND_BYTES, self.BUDGET_BYTES // (2 * len(self._all)))
        axis = next((axis for axis in range(len(shape)) if math.prod(shape[axis + 1:]) * item <= limit),
                    len(shape) - 1)
        each = math.prod(shape[axis + 1:])
        outer, inner = divmod(place, each * shape[axis])
        count = max(1, limit // (each * item))
        first = inner // each // count * count
        before = (slice(int(at), int(at) + 1) for at in np.unravel_index(outer, shape[:axis]))
        rows = slice(first, min(first + count, shape[axis]))
        index = (*before, rows, *(slice(0, size) for size in shape[axis + 1:]))
        return (outer * shape[axis] + first) * each, np.asarray(self._tensors.read(path, index)).reshape(-1)


class StoredSource:
    """Tensors of safetensors files under their own names, as a source for `merging.stream`."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = stored
        self.specs = {name: TensorSpec(tensor.shape, tensor.dtype) for name, tensor in stored.items()}

    def fill(self, path: str, start: int, out: np.ndarray) -> None:
        """Reads whole rows into a flat array [n], without another copy."""
        if not out.size:
            return
        tensor, shape = self._stored[path], as_rows(self._stored[path].shape)
        dataclasses.replace(tensor, shape=shape).fill(out.reshape(-1, shape[1]), start)


class CastSource:
    """A source whose values are rounded to another dtype before they are merged; `where` is its folder."""

    def __init__(self, source: Any, dtype: str, where: str) -> None:
        self._source, self._where = source, where
        self.specs = {path: TensorSpec(tuple(spec.shape), dtype if spec.dtype in FLOAT_DTYPES
                                       else spec.dtype) for path, spec in source.specs.items()}

    def fill(self, path: str, start: int, out: np.ndarray) -> None:
        """Reads and casts whole rows into a flat array [n].

        Raises:
            InputError: a value is too large for the type.
        """
        dtype = np.dtype(self._source.specs[path].dtype)
        if dtype == out.dtype:
            self._source.fill(path, start, out)
            return
        found = np.empty(out.size, dtype)
        self._source.fill(path, start, found)
        out[...] = leaf_values.cast_leaf(found, out.dtype, path, self._where)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: a folder of safetensors, of any network.

    Attributes:
        where: the folder.
        stored: tensors by name.
        config: contents of config.json; empty if there is none.
    """

    where: epath.Path
    stored: dict[str, StoredTensor]
    config: dict[str, Any]

    @property
    def says_tied(self) -> bool:
        """Whether the config, or the network's kind, says that the head is tied to the embedding."""
        kind = self.config.get("model_type")
        return bool(self.config.get("tie_word_embeddings", kind in _TIED_BY_DEFAULT))

    @property
    def tied(self) -> bool:
        """Whether the head is tied to the embedding; of a T5 that transformers 5 wrote, the weights tell."""
        if self.config.get("model_type") in _SCALED_HEADS and by_transformers_5(self.config):
            return self.head is None
        return self.says_tied

    @property
    def head(self) -> str | None:
        """Name of the head's tensor; None if there is none."""
        return next((name for name in HEADS if name in self.stored), None)

    @property
    def embedding(self) -> str | None:
        """Name of the embedding's tensor; None if it is not known."""
        return next((name for name in EMBEDDINGS if name in self.stored), None)


def open_checkpoint(name: str) -> Checkpoint:
    """Opens a folder of safetensors, local or on the hub; checks headers and reads no contents.

    Raises:
        InputError: no such folder, no safetensors in it, or a header that does not fit its file; an adapter
            beside the model.
    """
    folder = places.locate(name)
    adapter_files.check_no_adapter(folder)
    if not is_checkpoint(name):
        raise InputError(describe("There are no safetensors here", where=folder,
                                  expected=" or ".join(_WEIGHTS)))
    config = {}
    if (folder / CONFIG_FILE).exists():
        config = storage.read_json(folder / CONFIG_FILE, kind=CONFIG_FILE, schema_version=None)
        check_unquantised(config, folder / CONFIG_FILE)
    return Checkpoint(folder, safetensors_files.open_tensors(folder), config)


def check_head(name: str) -> None:
    """Raises RunError if the config.json of a folder that was written is not true of its head.

    Some versions of transformers believe the one, others the other.
    """
    model = open_checkpoint(name)
    head, embedding = model.head, model.embedding
    own = head is not None and not (
        embedding is not None and streaming.equal(model.stored[head], model.stored[embedding]))
    if model.config and embedding is not None and (own if model.says_tied else head is None):
        raise RunError(describe(
            "config.json does not say what the weights are", where=model.where,
            got=f"tie_word_embeddings {str(model.says_tied).lower()}, and "
            f"{'a head of its own' if own else 'no head'} in the weights",
            cure="do not use what was written; report this"))


def is_checkpoint(name: str) -> bool:
    """Whether a folder, or a hub name's folder, contains safetensors."""
    folder = places.locate(name)
    return any((folder / file).exists() for file in _WEIGHTS)


def check_checkpoints(models: Sequence[Checkpoint], allow: Sequence[str],
                      with_base: bool) -> list[Checkpoint]:
    """Checks that checkpoints are of one network; adds leaves that may be missing.

    Args:
        models: the experts, and last the base, if there is one.
        allow: keys of `choices.ALLOWED`.
        with_base: whether there is a base.

    Returns:
        The checkpoints with the same tensors each.

    Raises:
        InputError: lists what differs.
    """
    if "configs" not in allow:
        _check_configs(models, set(_UNIMPORTANT) | ({"tie_word_embeddings"} if "heads" in allow else set()))
    if "vocabularies" not in allow:
        _check_vocabularies(models)
    models = _without_copies(models)
    if "heads" in allow:
        models = _with_heads(models)
    if "missing" in allow:
        models = _completed(models, with_base)
    _check_tensors(models, "dtypes" not in allow)
    return list(models)


def _check_configs(models: Sequence[Checkpoint], ignored: set[str]) -> None:
    first, faults = models[0], []
    ours = _settings(first)
    for other in models[1:]:
        theirs = _settings(other)
        keys = sorted((ours.keys() | theirs.keys()) - ignored)
        if ours.get("model_type") != theirs.get("model_type"):
            keys = ["model_type"]  # all else follows from it
        for key in keys:
            if ours.get(key) != theirs.get(key) and "dropout" not in key:
                faults.append(f"{key}: {ours.get(key)!r} in {first.where}, "
                              f"{theirs.get(key)!r} in {other.where}")
    if faults:
        raise InputError(describe("These are different networks: their config.json differ",
                                  where=", ".join(str(model.where) for model in models),
                                  got="; ".join(faults), expected="equal settings",
                                  cure="--allow configs, if that makes no difference to the weights"))


def _settings(model: Checkpoint) -> dict[str, Any]:
    """A checkpoint's config; of a T5 what it means, which versions of transformers write in two ways."""
    values = dict(model.config)
    if values.get("model_type") in _SCALED_HEADS:
        said = values["model_type"] in ("t5", "switch_transformers") or not by_transformers_5(values)
        scaled = model.says_tied and said
        values = {"scale_decoder_outputs": scaled, **values, "tie_word_embeddings": model.tied}
    return values


def _check_vocabularies(models: Sequence[Checkpoint]) -> None:
    faults, kinds = [], []
    for file in _VOCABULARIES:
        having = [model for model in models if (model.where / file).exists()]
        digests = [_digest(model.where / file) for model in having]
        faults += [f"{file} differs between {having[0].where} and {model.where}"
                   for model, digest in zip(having, digests, strict=True) if digest != digests[0]]
        kinds += [{str(model.where) for model in having}] if having else []
    with_one = set.union(set(), *kinds)
    if kinds and not any(with_one <= names for names in kinds):
        faults.append("no file of a vocabulary is in all of them, and so they cannot be compared")
    if faults:
        raise unlike_vocabularies(models[0].where, "; ".join(faults))


def unlike_vocabularies(where: object, got: str | None = None) -> InputError:
    """The error for models whose embedding rows belong to different tokens."""
    return InputError(describe(
        "The models have different vocabularies", where=where, got=got,
        expected="one vocabulary: row i of the embeddings must be one token in all",
        cure="--allow vocabularies, if only unused parts of these files differ"))


def _digest(path: epath.Path) -> str:
    return hashlib.sha256(storage.read_bytes(path)).hexdigest()


def _without_copies(models: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Drops copies of the embedding that only some models store; they must equal it."""
    everywhere = set.intersection(*(set(model.stored) for model in models))
    all_tied = all(model.tied for model in models)
    kept = []
    for model in models:
        embedding = model.embedding
        heads = HEADS if model.tied else ()
        copies = [name for name in (*COPIES, *heads) if embedding is not None and name in model.stored
                  and (name not in everywhere or (name in heads and all_tied))]
        for name in copies:
            if not streaming.equal(model.stored[name], model.stored[embedding]):
                raise InputError(describe(
                    f"{name} differs from {embedding}, of which it should be a copy", where=model.where,
                    expected="the same values, or this tensor in all models"))
        kept.append(dataclasses.replace(model, stored={
            name: tensor for name, tensor in model.stored.items() if name not in copies}))
    return kept


def _with_heads(models: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Copies the tied embedding as a head of its own, if another model has one."""
    head = next((name for name in HEADS if any(name in model.stored for model in models)), None)
    if head is None or all(head in model.stored for model in models):
        return list(models)
    if models[0].config.get("model_type") in _SCALED_HEADS:
        raise InputError(describe(
            "Tied and own heads of T5 cannot be merged: the one of them is scaled", where=models[0].where,
            cure="give all models heads of their own, or none"))
    return [model if head in model.stored or not model.tied or model.embedding is None
            else dataclasses.replace(model, stored={**model.stored, head: model.stored[model.embedding]})
            for model in models]


def _completed(models: Sequence[Checkpoint], with_base: bool) -> list[Checkpoint]:
    """Fills leaves that a model lacks from the base, or else from the first model that has them."""
    have: dict[str, StoredTensor] = {}
    for model in ((models[-1], *models) if with_base else models):
        have = {**model.stored, **have}
    return [dataclasses.replace(model, stored={**have, **model.stored}) for model in models]


def _check_tensors(models: Sequence[Checkpoint], dtypes: bool) -> None:
    first, faults, cures = models[0], [], set()
    for other in models[1:]:
        for name in sorted(first.stored.keys() | other.stored.keys()):
            ours, theirs = first.stored.get(name), other.stored.get(name)
            if ours is None or theirs is None:
                faults.append(f"{name} is missing from {(first if ours is None else other).where}")
                cures.add("heads" if name in HEADS else "missing")
            elif ours.shape != theirs.shape:
                faults.append(f"{name}: {list(ours.shape)} in {first.where}, {list(theirs.shape)} "
                              f"in {other.where}")
            elif ours.dtype != theirs.dtype and (dtypes or not _is_float(ours) or not _is_float(theirs)):
                faults.append(f"{name}: {ours.dtype} in {first.where}, {theirs.dtype} in {other.where}")
                cures.add("dtypes")
    if faults:
        more = f"; and {len(faults) - 50} more" if len(faults) > 50 else ""
        cure = " or ".join(f"--allow {name} ({ALLOWED[name]})" for name in sorted(cures)) or None
        raise InputError(describe("The models do not have the same tensors", where=first.where,
                                  got="; ".join(faults[:50]) + more, cure=cure))


def _is_float(tensor: StoredTensor) -> bool:
    return tensor.dtype in FLOAT_DTYPES


def sampled_digest(folder: epath.Path) -> str:
    """Hash (sha256) of samples of a checkpoint, to distinguish weights without reading all of them.

    Hashes the name and length of every safetensors file; small files whole, larger ones in 256 evenly spread
    pieces of 64 KiB, and every tensor below 256 KiB, such as norms. Checkpoints that differ only in a few
    bytes of a large tensor may have equal hashes.
    """
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name.endswith(".safetensors"):
            size = path.stat().length
            whole.update(f"{path.name}:{size}:".encode())
            with path.open("rb") as file:
                for start, stop in _samples(path, size):
                    file.seek(start)
                    whole.update(file.read(stop - start))
    return f"sampled-sha256:{whole.hexdigest()}"


def _samples(path: epath.Path, size: int) -> list[tuple[int, int]]:
    """Byte ranges (from, to) of a file that are hashed."""
    if size <= _SAMPLES * _SAMPLE_BYTES:
        return [(0, size)]
    last = size - _SAMPLE_BYTES
    starts = [last * number // (_SAMPLES - 1) for number in range(_SAMPLES)]
    tensors = safetensors_files.read_header(path).values()
    return [*((start, start + _SAMPLE_BYTES) for start in starts),
            *((each.offset, each.offset + each.nbytes) for each in tensors if each.nbytes <= _SMALL)]


def changed_at(folder: epath.Path) -> list[tuple[str, int, int]]:
    """Name, length and modification time of every local file below a folder."""
    if not storage.is_local(folder):
        return []
    local = pathlib.Path(folder)
    paths = sorted(local.rglob("*")) if local.is_dir() else [local]
    found = [(path.name, path.stat()) for path in paths if path.is_file()]
    return [(name, info.st_size, info.st_mtime_ns) for name, info in found]


def copied_files(folder: epath.Path) -> list[epath.Path]:
    """Files of a checkpoint beside its weights: tokenizer, generation settings, chat template."""
    left_out = (CONFIG_FILE, CARD_FILE, "adapter_config.json", "conversion_report.json")
    return [path for path in sorted(folder.iterdir())
            if path.name.endswith((".json", ".model", ".txt", ".jinja")) and not path.is_dir()
            and path.name not in left_out and not path.name.endswith(".index.json")]
