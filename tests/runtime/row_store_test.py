"""Rows on disk: found again to the bit, never half written, never more bytes than allowed."""

import os

import ml_dtypes
import numpy as np
import pytest

from elm_jax.errors import InputError
from elm_jax.runtime import row_store
from elm_jax.runtime.row_store import RowStore

FACTS = {"base": "sha256:1", "layers": 2}


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def rows(count: int, dtype=np.float32) -> dict[bytes, np.ndarray]:
    draw = np.random.default_rng(0)
    return {key(number): draw.normal(size=(1 + number % 5, 3)).astype(dtype) for number in range(count)}


def open_store(root, name="a", facts=FACTS, most_bytes=10**6, dtype=np.float32, writers=1
               ) -> RowStore:
    return RowStore(root, name, facts, width=3, dtype=dtype, most_bytes=most_bytes, writers=writers)


def filled(root, made, **options) -> RowStore:
    store = open_store(root, **options)
    for name, row in made.items():
        assert store.put(name, row)
    store.flush()
    return store


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_rows_are_found_again_to_the_bit(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(row_store, "SHARD_BYTES", 200)
    made = rows(20, dtype)
    for store in (filled(tmp_path, made, dtype=dtype), open_store(tmp_path, dtype=dtype)):
        assert len(store) == 20 and store.get(key(99)) is None
        for name, row in made.items():
            assert store.get(name).dtype == dtype and store.get(name).tobytes() == row.tobytes()
    shards = list((tmp_path / "a").glob("*.rows"))
    assert len(shards) > 3 and {path.name for path in (tmp_path / "a").iterdir()} - {"about.json"} == {
        path.name for path in shards}


def test_rows_that_wait_are_there_for_this_run_and_lost_with_it(tmp_path):
    store = open_store(tmp_path)
    row = np.ones((2, 3), np.float32)
    store.put(key(1), row)
    row[:] = 5  # the store has a copy
    assert (store.get(key(1)) == 1).all() and open_store(tmp_path).get(key(1)) is None


def test_two_runs_share_a_store(tmp_path):
    first, second = open_store(tmp_path), open_store(tmp_path)
    made = rows(4)
    for store in (first, second):
        for name, row in made.items():
            store.put(name, row)
        store.flush()
    again = open_store(tmp_path)
    assert len(again) == 4 and all(np.array_equal(again.get(name), row) for name, row in made.items())


def test_processes_of_a_run_find_each_others_rows_and_keep_the_limit_together(tmp_path, monkeypatch):
    monkeypatch.setattr(row_store, "SHARD_BYTES", 200)
    both = [open_store(tmp_path, most_bytes=6000, writers=2) for _ in range(2)]
    made = list(rows(200).items())
    kept = [[name for name, row in made[number::2] if store.put(name, row)]
            for number, store in enumerate(both)]
    for store in both:
        store.flush()
    assert all(len(names) < 100 for names in kept), "both are full"
    both[0].read_others()
    assert all(both[0].get(name) is not None for name in kept[1])
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 6000


def test_half_written_shards_are_never_read(tmp_path):
    filled(tmp_path, rows(3))
    shard, = (tmp_path / "a").glob("*.rows")
    part = shard.read_bytes()[:-5]
    old = tmp_path / "a" / "x.rows.tmp-1-0123abcd"
    old.write_bytes(part)
    os.utime(old, (0, 0))
    assert len(open_store(tmp_path)) == 3 and not old.exists(), "what a killed run left is removed"
    shard.write_bytes(part)
    with pytest.raises(InputError, match="damaged"):
        open_store(tmp_path)


def test_a_row_that_changed_on_disk_is_refused(tmp_path):
    made = rows(3)
    filled(tmp_path, made)
    shard, = (tmp_path / "a").glob("*.rows")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    store = open_store(tmp_path)
    assert np.array_equal(store.get(key(0)), made[key(0)])
    with pytest.raises(InputError, match="damaged"):
        store.get(key(2))


def test_every_byte_of_a_shard_s_index_is_checked_and_its_description_is_needed(tmp_path):
    filled(tmp_path, rows(3))
    shard, = (tmp_path / "a").glob("*.rows")
    content = shard.read_bytes()
    for place in (*range(0, 60, 5), *range(128, 128 + 3 * 28)):
        shard.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
        with pytest.raises(InputError, match="damaged"):
            open_store(tmp_path)
    shard.write_bytes(content)
    (tmp_path / "a" / "about.json").unlink()
    with pytest.raises(InputError, match="lacks its description"):
        open_store(tmp_path)


def test_the_limit_counts_all_stores_of_the_folder(tmp_path, caplog):
    filled(tmp_path, rows(10), name="other")
    used = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    store = open_store(tmp_path, most_bytes=used + 1500)
    kept = [store.put(name, row) for name, row in rows(30).items()]
    store.flush()
    assert any(kept) and not all(kept) and sum("is full" in each.message for each in caplog.records) == 1
    assert len(open_store(tmp_path)) == sum(kept)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= used + 1500


def test_rows_of_something_else_are_refused(tmp_path):
    filled(tmp_path, rows(2))
    with pytest.raises(InputError, match="made of something else"):
        open_store(tmp_path, facts={**FACTS, "layers": 3})
    with pytest.raises(InputError, match="bucket"):
        open_store("gs://bucket/cache")
