"""What is merged in tests: checkpoints of real classes, models of every kind, experts of one base."""

import dataclasses
import functools
import json
import pathlib
import shutil

import mergekit_peer as peer
import ml_dtypes
import numpy as np
import safetensors.torch
import tiny_model
import torch

from elm_jax.cli import main
from elm_jax.experts.base import Base, save_base
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.overlay import Expert, save_expert
from elm_jax.models import AdapterConfig, T5Network
from elm_jax.models.adapters.kind import is_adapter_leaf
from elm_jax.models.t5.network import is_norm_leaf
from elm_jax.runtime import trees
from elm_jax.workflows.convert.convert_model import ConvertConfig, convert

NUM_EXPERTS = peer.NUM_EXPERTS
KINDS = ("elm", "t5x", "hf")
CONFIG = tiny_model.network(adapter=False).config


def run(capsys, *words) -> tuple[int, str, str]:
    """`elm merge`: exit status, output, errors."""
    status = main.main(["merge", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def values(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a folder of safetensors, read by the safetensors library."""
    return {name: as_numpy(tensor) for name, tensor in peer.read(folder).items()}


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def set_tensors(folder: pathlib.Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Puts tensors in place of those of their names, or beside them; drops those that are None.

    The folder's tensors lie in one file afterwards.
    """
    tensors = peer.read(folder) | changes
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    kept = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
    safetensors.torch.save_file(kept, folder / "model.safetensors", {"format": "pt"})


def set_config(folder: pathlib.Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def copies(folders: dict[str, pathlib.Path], where: pathlib.Path) -> dict[str, pathlib.Path]:
    """The same folders to spoil."""
    return {name: pathlib.Path(shutil.copytree(folder, where / name)) for name, folder in folders.items()}


def experts_of(folders: dict[str, pathlib.Path]) -> list[str]:
    return [str(folders[f"expert{number}"]) for number in range(NUM_EXPERTS)]


@functools.cache
def params(seed: int) -> dict:
    """Of a whole model without adapters."""
    return tiny_model.parameters(tiny_model.network(adapter=False), seed)


def save_models(where: pathlib.Path, kinds=KINDS, count: int = 3) -> dict[str, list[str]]:
    """The same models in every form: {kind: folders}."""
    found: dict[str, list[str]] = {kind: [] for kind in kinds}
    for number in range(count):
        source = where / "elm" / str(number)
        save_base(source, params(number), CONFIG, None, {})
        found.setdefault("elm", []).append(str(source))
        for kind in set(kinds) - {"elm"}:
            target = str(where / kind / str(number))
            convert(ConvertConfig(str(source), "elm", target, kind, max_shard_bytes=20_000))
            found[kind].append(target)
    return found


@functools.cache
def base() -> Base:
    return Base("tiny", params(0), CONFIG, trees.fingerprint(params(0)), tiny_model.vocabulary())


FORMS = {
    "adapter": [AdapterConfig(8)] * 3, "full": [None] * 3,
    "lora": [AdapterConfig(kind="lora", rank=2, alpha=6.0), AdapterConfig(kind="lora", rank=3),
             AdapterConfig(kind="lora", rank=2, alpha=1.0)],
}


@functools.cache
def expert(form: str, number: int) -> Expert:
    """An expert of `base`: a prompt expert with adapters or LoRA (of unlike ranks and scales), or whole."""
    adapter = FORMS[form][number]
    network = T5Network(dataclasses.replace(CONFIG, adapter=adapter))
    overlay, _ = trees.split(tiny_model.parameters(network, 20 + number), lambda path: (
        form == "full" or is_adapter_leaf(path) or is_norm_leaf(path)))
    card = ExpertCard(id=f"{form}{number}", kind="dataset" if form == "full" else "prompt",
                      form="full" if form == "full" else "adapter", base=base().reference(),
                      network=network.config.to_dict(), tasks=(f"toys__{number}",))
    return Expert(card, overlay)


def save_experts(where: pathlib.Path, form: str, count: int = 3) -> list[str]:
    for number in range(count):
        save_expert(where / f"{form}{number}", expert(form, number))
    return [str(where / f"{form}{number}") for number in range(count)]


def save_own_base(where: pathlib.Path) -> str:
    save_base(where, base().params, base().config, None, {})
    return str(where)


def assert_mean(found: np.ndarray, arrays, weights=None, name: str = "") -> None:
    """The float64 mean rounded once, but for a few roundings in float32 at the size of what is added up.

    In bfloat16 this is the nearest number, or its neighbour where the exact mean lies between the two.
    """
    share = np.ones(len(arrays)) if weights is None else np.asarray(weights, np.float64)
    terms = [w * x.astype(np.float64) for w, x in zip(share / share.sum(), arrays, strict=True)]
    exact, size = sum(terms), sum(np.abs(term) for term in terms)
    nearest = np.abs(exact.astype(found.dtype).astype(np.float64) - exact)
    assert found.shape == exact.shape and found.dtype == arrays[0].dtype, name
    error = np.abs(found.astype(np.float64) - exact)
    assert np.all(error <= nearest + 2 * 2.0**-23 * size), name
