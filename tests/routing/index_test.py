"""The index of a library's keys: adding, removing, files."""

import dataclasses

import numpy as np
import pytest
from older_library import save_index

from elm_jax.errors import InputError
from elm_jax.routing import index_files
from elm_jax.routing.index import KeyIndex
from elm_jax.routing.vote import decide
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


def test_what_is_added_to_one_index_is_seen_in_no_other():
    """Indices share the memory of their keys: the newest one writes behind what the others see."""
    rng = np.random.default_rng(2)
    parts = {f"e{number}": unit_rows(rng, 1 + number % 3) for number in range(40)}
    versions = [KeyIndex.empty(FakeEncoder(), "instance")]
    for name, keys in parts.items():
        versions.append(versions[-1].add(name, keys))
    first, second = versions[20].add("x", parts["e0"]), versions[20].add("y", parts["e1"])
    first, second = first.add("e20", parts["e2"]), second.add("x", parts["e3"])
    for number, index in enumerate(versions):
        expected = KeyIndex.empty(FakeEncoder(), "instance").add_all(dict(list(parts.items())[:number]))
        assert index.experts == expected.experts and index.digest() == expected.digest()
        assert "x" not in index and index.count("y") == 0 and index.count("e7") == 2 * (number > 7)
    for index, added in ((first, ("x", "e20")), (second, ("y", "x"))):
        assert index.experts == (*versions[20].experts, *added)
    np.testing.assert_array_equal(second.keys[len(versions[20]):], np.concatenate([parts["e1"], parts["e3"]]))
    np.testing.assert_array_equal(first.keys[len(versions[20]):], np.concatenate([parts["e0"], parts["e2"]]))
    assert second.remove_all(("e3", "y")).experts == (*(f"e{n}" for n in range(20) if n != 3), "x")
    with pytest.raises(ValueError, match="read-only"):
        first.keys[0] = 0


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


def test_what_is_opened_is_what_was_saved_mapped_or_in_memory_or_by_an_older_version(tmp_path):
    rng = np.random.default_rng(6)
    index = dataclasses.replace(
        make_index({"a": unit_rows(rng, 3), "b": unit_rows(rng, 2)}), instances_per_expert=3
    )
    saved(tmp_path / "keys", index)
    save_index(tmp_path / "older", index)
    mixed = dataclasses.replace(index, keys=index.keys[::-1], owners=index.owners[::-1])
    saved(tmp_path / "mixed", mixed)
    queries = unit_rows(rng, 9)
    for name, mapped in (("keys", True), ("keys", False), ("older", True)):
        opened = KeyIndex.open(tmp_path / name, FakeEncoder(), mapped=mapped)
        np.testing.assert_array_equal(opened.keys, index.keys)
        np.testing.assert_array_equal(opened.owners, index.owners)
        facts = ("experts", "encoder", "encoder_fingerprint", "text_format", "instances_per_expert")
        assert all(getattr(opened, name) == getattr(index, name) for name in facts)
        assert decide(queries, opened) == decide(queries, index)
        more = opened.add("c", queries)
        assert len(opened) == 5 and more.digest() == index.add("c", queries).digest()
    opened = KeyIndex.open(tmp_path / "mixed", FakeEncoder())
    for place, name in enumerate(mixed.experts):  # those of one expert stand together
        np.testing.assert_array_equal(opened.by_expert()[name], mixed.keys[mixed.owners == place])
    empty = KeyIndex.empty(FakeEncoder(), "choice")
    saved(tmp_path / "empty", empty)
    assert KeyIndex.open(tmp_path / "empty", FakeEncoder()).experts == ()


def test_what_is_written_behind_keys_counts_when_its_bytes_do(tmp_path):
    """A killed process leaves half of an expert: readers pass over it, the next one writes in its place."""
    rng = np.random.default_rng(12)
    index = make_index({"a": unit_rows(rng, 3)})
    storage.begin(tmp_path)
    sizes = index_files.write_index(tmp_path, index.facts(), index.by_expert())
    storage.commit(tmp_path)
    lost, added = unit_rows(rng, 7), unit_rows(rng, 2)
    index_files.append_keys(tmp_path, sizes, {"lost": lost})
    before = KeyIndex.open(tmp_path, FakeEncoder(), sizes=sizes)
    assert before.experts == ("a",)
    more = index_files.append_keys(tmp_path, sizes, {"b": added})
    assert KeyIndex.open(tmp_path, FakeEncoder(), sizes=more).digest() == index.add("b", added).digest()
    assert KeyIndex.open(tmp_path, FakeEncoder()).experts == ("a", "b")
    assert before.digest() == index.digest()
    with pytest.raises(InputError, match="shorter than it was written"):
        KeyIndex.open(tmp_path, FakeEncoder(), sizes={name: size + 64 for name, size in more.items()})


def test_another_encoder_is_refused(tmp_path):
    saved(tmp_path / "keys", make_index({"a": unit_rows(np.random.default_rng(7), 3)}))
    with pytest.raises(InputError) as error:
        KeyIndex.open(tmp_path / "keys", FakeEncoder("other", "sha256:2"))
    for part in ("another encoder", "got: other sha256:2", "expected: fake sha256:1", "cure"):
        assert part in str(error.value)


def test_damaged_folders_are_refused(tmp_path):
    rng = np.random.default_rng(8)
    index = make_index({"a": unit_rows(rng, 3), "b": unit_rows(rng, 1)})
    folder = tmp_path / "keys"
    saved(folder, index)
    (folder / storage.MARKER).unlink()
    with pytest.raises(InputError, match="not whole"):
        KeyIndex.open(folder, FakeEncoder())
    saved(folder, index)
    written = (folder / "keys.f32").read_bytes()
    other = written[:-32] + unit_rows(rng, 1).tobytes()
    for content in (other, written[:-1], written[:-32], written + b"\0" * 32):
        (folder / "keys.f32").write_bytes(content)
        with pytest.raises(InputError, match="not those that were written"):
            KeyIndex.open(folder, FakeEncoder())
    (folder / "keys.f32").write_bytes(other)
    with pytest.raises(InputError, match="keys of expert b are not"):
        KeyIndex.open(folder, FakeEncoder())


def test_damaged_folders_of_an_older_version_are_refused(tmp_path):
    rng = np.random.default_rng(8)
    index = make_index({"a": unit_rows(rng, 3)})
    folder = tmp_path / "keys"
    save_index(folder, index)
    np.savez(folder / "keys.npz", keys=unit_rows(rng, 3), owners=index.owners)
    with pytest.raises(InputError, match="not those that were written"):
        KeyIndex.open(folder, FakeEncoder())
    np.savez(folder / "keys.npz", keys=index.keys, owners=index.owners[:2])
    with pytest.raises(InputError, match="do not fit each other"):
        KeyIndex.open(folder, FakeEncoder())
    (folder / "keys.npz").write_bytes((folder / "keys.npz").read_bytes()[:60])
    with pytest.raises(InputError, match="file of arrays is damaged"):
        KeyIndex.open(folder, FakeEncoder())
    objects = np.array([{}], dtype=object)
    np.savez(folder / "keys.npz", keys=objects, owners=index.owners)
    with pytest.raises(InputError, match="file of arrays is damaged"):
        KeyIndex.open(folder, FakeEncoder())
