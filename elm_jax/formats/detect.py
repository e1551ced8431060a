"""Detects which kind of model a folder holds, and opens it."""

from collections.abc import Callable

from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.formats import places
from elm_jax.formats.elm import base_json, elm_folders
from elm_jax.formats.gguf import gguf_models
from elm_jax.formats.hf import folder_files, hf_models
from elm_jax.formats.model import Model
from elm_jax.formats.peft import adapter_files
from elm_jax.formats.t5x import t5x_checkpoints, t5x_folders
from elm_jax.runtime import storage


def _open_alone(folder: epath.Path) -> Model:
    """Opens a Hugging Face folder that holds no adapter beside its model."""
    adapter_files.check_no_adapter(folder)
    return hf_models.open_model_folder(folder)


KINDS: dict[str, tuple[Callable[[epath.Path], bool], Callable[..., Model]]] = {
    "elm": (elm_folders.is_elm, elm_folders.open_elm),
    "hf": (folder_files.is_hf, _open_alone),
    "t5x": (t5x_folders.is_t5x, t5x_checkpoints.open_t5x),
    "gguf": (gguf_models.is_gguf, gguf_models.open_gguf),
}
"""(test of a folder, function that opens it) by kind; the first kind whose test holds is used."""


def open_model(name: storage.PathLike) -> Model:
    """Opens the model in a folder of any supported kind, or on the Hugging Face hub.

    Args:
        name: a folder, local or in a bucket; or a hub name, ``google/t5-v1_1-small``, which
            ``hf://google/t5-v1_1-small`` cannot be taken for anything else.

    Raises:
        InputError: there is no such folder, or nothing that this program reads is in it, or its reader
            finds a fault; or it is an adapter, or has one beside it.
    """
    folder = places.locate(name)
    _check_is_model(folder)
    for is_kind, open_kind in KINDS.values():
        if is_kind(folder):
            return open_kind(folder)
    raise InputError(describe(
        "The folder holds no model that this program reads", where=folder,
        got=", ".join(sorted(path.name for path in folder.iterdir())[:20]) or "an empty folder",
        expected=f"a model of a kind among {', '.join(KINDS)}"))


def _check_is_model(folder: epath.Path) -> None:
    """Raises InputError for folders of this program and of PEFT that hold no model: says what they are."""
    if not folder.is_dir():
        return
    if (folder / places.EXPERT_FILE).exists():
        raise _is_expert(folder, folder)
    if folder_files.is_hf(folder) or (folder / base_json.FILE).exists():
        return  # a model, whatever lies beside it
    if (folder / "expert" / places.EXPERT_FILE).exists():
        raise _is_expert(folder, folder / "expert")
    if adapter_files.is_peft(folder):
        raise _is_adapter(folder)
    if not elm_folders.is_elm(folder) and (folder / "base" / base_json.FILE).exists():
        raise InputError(describe("This is a run folder of `elm pretrain`, with the base inside",
                                  where=folder, expected="the base's own folder",
                                  cure=f"give {folder / 'base'}"))


def _is_expert(folder: epath.Path, expert: epath.Path) -> InputError:
    card = storage.read_json(expert / places.EXPERT_FILE, kind="expert's card", schema_version=None)
    base = card.get("base") if isinstance(card.get("base"), dict) else {}
    known = base.get("path") or base.get("name") or "BASE"
    whole = (f"; `elm convert --from elm --to hf {folder} MODEL` makes a model of it"
             if card.get("form") == "full" else "")
    return InputError(describe(
        "This is an expert's folder, and a base or a whole model is needed", where=folder,
        got=f"expert {card.get('id')}", expected=f"the base that it was trained on: {known}",
        cure=f"--base {known} --expert {folder}{whole}"))


def _is_adapter(folder: epath.Path) -> InputError:
    recorded = adapter_files.recorded_base(folder)
    return InputError(describe(
        "This is a PEFT adapter, and a base or a whole model is needed", where=folder,
        got=f"{adapter_files.CONFIG_FILE}, of base {recorded or 'not recorded'}", expected="the base",
        cure=f"`elm convert --from peft --to elm --base BASE {folder} EXPERT` makes an expert of it; then "
        "give --base BASE --expert EXPERT"))
