"""The index of a library's keys: adding, removing, files."""

import dataclasses

import numpy as np
import pytest

from elm_jax.errors import InputError
from elm_jax.routing.index import KeyIndex
from elm_jax.runtime import storage


@dataclasses.dataclass
class FakeEncoder:
    """An encoder that embeds nothing."""

    name: str = "fake"
    fingerprint: str = "sha256:1"
    dimension: int = 8


def unit_rows(rng: np.random.Generator, number: int, dimension: int = 8) -> np.ndarray:
    """Random rows of unit length."""
    rows = rng.normal(size=(number, dimension))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def make_index(keys_by_expert: dict[str, np.ndarray]) -> KeyIndex:
    """An index of these experts, in this order."""
    dimension = len(next(iter(keys_by_expert.values()))[0])
    index = KeyIndex.empty(FakeEncoder(dimension=dimension), "instance")
    for name, keys in keys_by_expert.items():
        index = index.add(name, keys)
    return index


def test_add_and_remove_give_new_indices():
    rng = np.random.default_rng(4)
    parts = {name: unit_rows(rng, n) for name, n in (("a", 3), ("b", 2), ("c", 4))}
    index = make_index(parts)
    assert index.experts == ("a", "b", "c") and [index.count(n) for n in "abcd"] == [3, 2, 4, 0]
    without = index.remove("b")
    assert index.experts == ("a", "b", "c") and len(index) == 9
    assert without.digest() == make_index({"a": parts["a"], "c": parts["c"]}).digest()
    assert index.remove("c").digest() == make_index({"a": parts["a"], "b": parts["b"]}).digest()
    assert without.add("b", parts["b"]).experts == ("a", "c", "b")


def test_bad_experts_are_refused():
    rng = np.random.default_rng(5)
    index = make_index({"a": unit_rows(rng, 3)})
    for name, keys, message in (
        ("a", unit_rows(rng, 2), "has this expert already"),
        ("b", unit_rows(rng, 2, 9), r"got: float32\[2, 9\][\s\S]*float32\[n, 8\]"),
        ("b", unit_rows(rng, 0), "needs instances"),
        ("b", 2 * unit_rows(rng, 2), "unit length"),
        ("b", np.full((1, 8), np.nan, np.float32), "unit length"),
    ):
        with pytest.raises(InputError, match=message):
            index.add(name, keys)
    with pytest.raises(InputError, match="Unknown expert 'z'"):
        index.remove("z")
    with pytest.raises(InputError, match="Unknown text format"):
        KeyIndex.empty(FakeEncoder(), "instanse")


def saved(folder, index: KeyIndex) -> None:
    storage.begin(folder)
    index.save(folder)
    storage.commit(folder)


def test_save_and_open(tmp_path):
    rng = np.random.default_rng(6)
    index = dataclasses.replace(
        make_index({"a": unit_rows(rng, 3), "b": unit_rows(rng, 2)}), instances_per_expert=3
    )
    saved(tmp_path / "keys", index)
    opened = KeyIndex.open(tmp_path / "keys", FakeEncoder())
    np.testing.assert_array_equal(opened.keys, index.keys)
    np.testing.assert_array_equal(opened.owners, index.owners)
    facts = ("experts", "encoder", "encoder_fingerprint", "text_format", "instances_per_expert")
    assert all(getattr(opened, name) == getattr(index, name) for name in facts)
    empty = KeyIndex.empty(FakeEncoder(), "choice")
    saved(tmp_path / "empty", empty)
    assert KeyIndex.open(tmp_path / "empty", FakeEncoder()).experts == ()


def test_another_encoder_is_refused(tmp_path):
    saved(tmp_path / "keys", make_index({"a": unit_rows(np.random.default_rng(7), 3)}))
    with pytest.raises(InputError) as error:
        KeyIndex.open(tmp_path / "keys", FakeEncoder("other", "sha256:2"))
    for part in ("another encoder", "got: other sha256:2", "expected: fake sha256:1", "cure"):
        assert part in str(error.value)


def test_damaged_folders_are_refused(tmp_path):
    rng = np.random.default_rng(8)
    index = make_index({"a": unit_rows(rng, 3)})
    folder = tmp_path / "keys"
    saved(folder, index)
    (folder / storage.MARKER).unlink()
    with pytest.raises(InputError, match="not whole"):
        KeyIndex.open(folder, FakeEncoder())
    saved(folder, index)
    np.savez(folder / "keys.npz", keys=unit_rows(rng, 3), owners=index.owners)
    with pytest.raises(InputError, match="not those that were written"):
        KeyIndex.open(folder, FakeEncoder())
    np.savez(folder / "keys.npz", keys=index.keys, owners=index.owners[:2])
    with pytest.raises(InputError, match="do not fit each other"):
        KeyIndex.open(folder, FakeEncoder())
    (folder / "keys.npz").write_bytes((folder / "keys.npz").read_bytes()[:60])
    with pytest.raises(InputError, match="file of arrays is damaged"):
        KeyIndex.open(folder, FakeEncoder())


def test_pickled_arrays_are_refused(tmp_path):
    index = make_index({"a": unit_rows(np.random.default_rng(9), 3)})
    saved(tmp_path / "keys", index)
    objects = np.array([{}], dtype=object)
    np.savez(tmp_path / "keys" / "keys.npz", keys=objects, owners=index.owners)
    with pytest.raises(InputError, match="file of arrays is damaged"):
        KeyIndex.open(tmp_path / "keys", FakeEncoder())
