"""The files that Hugging Face folders of all networks share: weights, generation settings, tokenizer."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.formats.hf.config_json import CONFIG_FILE, check_unquantised
from elm_jax.formats.model import Model
from elm_jax.formats.tensors import safetensors_files, streaming, torch_files
from elm_jax.runtime import storage
from elm_jax.vocabularies import hf_tokenizer

GENERATION_FILE = "generation_config.json"
FACTS = "hf"
"""Key of `Model.facts` for data that this program does not use but writes again: ``{'config': {...},
'generation_config': {...}}``, as the files had it; ``'tokenizer'``, files by name, where the vocabulary is no
SentencePiece model; ``'added_tokens'``, by their ids, behind one, in bases of older versions."""
_WEIGHTS = (safetensors_files.SINGLE_FILE, safetensors_files.INDEX_FILE,
            torch_files.SINGLE_FILE, torch_files.INDEX_FILE)
"""Names of weight files, in the order in which transformers looks for them."""


def is_hf(folder: epath.Path) -> bool:
    """Whether a folder is a Hugging Face model folder: it has a config.json, which is written last."""
    return (folder / CONFIG_FILE).exists()


def require_hf(folder: storage.PathLike) -> epath.Path:
    """Returns a Hugging Face model folder.

    Raises:
        InputError: there is none.
    """
    folder = storage.as_path(folder)
    if not is_hf(folder):
        raise InputError(describe("There is no Hugging Face model here", where=folder,
                                  expected=f"a folder with a {CONFIG_FILE}"))
    return folder


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads the object of a JSON file."""
    return storage.read_json(path, kind=path.name, schema_version=None)


def read_config(folder: epath.Path) -> dict[str, Any]:
    """Reads a folder's config.json.

    Raises:
        InputError: it is no JSON object, or says that the weights are quantised.
    """
    values = read_json(folder / CONFIG_FILE)
    check_unquantised(values, folder / CONFIG_FILE)
    narrow = [name for name in ("torch_dtype", "dtype") if str(values.get(name)).startswith("float8")]
    return {**values, **dict.fromkeys(narrow, "bfloat16")}  # as such weights are read


_GREEDY = {
    "num_beams": 1, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0, "length_penalty": 1.0,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "bad_words_ids": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "sequence_bias": None, "do_sample": False,
}
"""Settings that make another text than the likeliest next token each time, and their values that do not."""


def generation_notes(generation: Mapping[str, Any], ids: Mapping[str, int] | None = None) -> tuple[str, ...]:
    """Names settings of a generation_config.json that `elm generate` does not apply; it keeps all of them.

    Args:
        generation: values of the file.
        ids: special ids by their name there, where the network has these alone.
    """
    wanted = {**_GREEDY, **(ids or {})}
    unlike = [f"{name} = {generation[name]!r}"[:100] for name, value in wanted.items()
              if generation.get(name) not in (None, value, [value], [])]
    if not unlike:
        return ()
    return (f"{GENERATION_FILE} is kept, but greedy decoding here does not apply: {', '.join(unlike)}",)


def open_weights(folder: epath.Path) -> tuple[dict[str, streaming.Stored], tuple[str, ...]]:
    """Opens the stored tensors of a folder by name; returns them, and notes for the report.

    Raises:
        InputError: the folder holds no weights, or a file is damaged or holds code.
    """
    file = next((name for name in _WEIGHTS if (folder / name).exists()), None)
    if file is None:
        raise InputError(describe("The folder holds no weights that this program reads", where=folder,
                                  got=", ".join(sorted(path.name for path in folder.iterdir())),
                                  expected=" or ".join(_WEIGHTS)))
    if file in (torch_files.SINGLE_FILE, torch_files.INDEX_FILE):
        tensors, notes = torch_files.open_tensors(folder)
        return dict(tensors), notes
    return dict(safetensors_files.open_tensors(folder)), ()


def tokenizer_files(model: Model) -> dict[str, Any]:
    """Makes a model's tokenizer files by their names: its vocabulary's, and those that its source folder had.

    Raises:
        InputError: Hugging Face's tokenizers cannot give the vocabulary's ids.
    """
    files = {} if model.vocabulary is None else hf_tokenizer.vocabulary_files(model.vocabulary)
    kept = model.facts.get(FACTS, {}).get("tokenizer", {})
    return files | {storage.require_name(name, model.where, "tokenizer's file"): contents
                    for name, contents in kept.items()}


def write_rest(target: epath.Path, model: Model, config: Mapping[str, Any],
               generation: Mapping[str, Any] | None, tokenizer: Mapping[str, Any]) -> None:
    """Writes what stands beside a model's weights; config.json, which readers look for, comes last.

    Args:
        target: the folder that is written.
        model: gives further files.
        config: values of config.json.
        generation: values of generation_config.json; None for no such file.
        tokenizer: as `tokenizer_files`, which is asked before the weights are written.
    """
    hf_tokenizer.write_files(target, tokenizer)
    if generation is not None:
        storage.write_json(target / GENERATION_FILE, generation)
    for name, value in model.beside.items():
        storage.write_json(target / name, value)
    storage.write_json(target / CONFIG_FILE, config)


def without_tokenizer(kept: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that a folder kept (see `FACTS`), less those of its tokenizer, for a new vocabulary."""
    return {name: value for name, value in kept.items() if name not in ("tokenizer", "added_tokens")}
