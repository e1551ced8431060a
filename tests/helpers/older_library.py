"""Indices of keys and libraries as an older version of the program wrote them."""

import pathlib
import shutil

import numpy as np

from elm_jax.experts.library import ExpertLibrary
from elm_jax.routing.index import KeyIndex
from elm_jax.runtime import storage


def save_index(folder: pathlib.Path, index: KeyIndex) -> None:
    """Writes an index: keys and owners in one file, ids and a digest of all keys in the other."""
    storage.begin(folder)
    np.savez(folder / "keys.npz", keys=index.keys, owners=index.owners)
    facts = {name: getattr(index, name) for name in ("encoder", "encoder_fingerprint", "text_format")}
    storage.write_json(folder / "index.json", {
        "schema_version": 1, "experts": index.experts, "digest": index.digest(),
        "instances_per_expert": index.instances_per_expert, **facts})
    storage.commit(folder)


def make_older(path: pathlib.Path) -> None:
    """Turns a library's folder into what an older version would have written."""
    library = ExpertLibrary.open(path)
    save_index(path / "keys" / "000700", library.index)
    storage.append_jsonl(path / "keys" / "000700" / "instances.jsonl", library.instances)
    facts = {name: library.facts[name] for name in ("encoder", "text_format", "instances_per_expert")}
    storage.write_json(path / "library.json", {
        "schema_version": 1, **facts, "keys": "000700", "revision": 700,
        "experts": [{"card": entry.card.to_dict(), "num_keys": entry.num_keys}
                    for entry in library.entries.values()]})
    shutil.rmtree(path / "keys" / library.facts["keys"])
    shutil.rmtree(path / "cards")
