"""Prepared splits come back from disk as they went, or are refused."""

import json

import numpy as np
import pytest

from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.errors import InputError
from elm_jax.runtime import storage

INFO = {"kind": "rank", "dataset": "toys", "choices_expression": "no ||| yes", "vocabulary": "sha256:0"}


def make_row(index: int = 0, **changes: object) -> dict:
    text = {"inputs": f"frage {index} ä", "targets": "yes", "choices": ["no", "yes"], "index": index}
    return {"inputs": [5, 6 + index, 1], "targets": [8, 9, 1], "choices": [[7, 1], [8, 9, 1]],
            "text": text, **changes}


def make_split(count: int = 4) -> PreparedSplit:
    return PreparedSplit.from_rows(
        "toys__ask", "train", INFO, [make_row(index) for index in range(count)])


def assert_equal(found: PreparedSplit, expected: PreparedSplit) -> None:
    assert (found.name, found.split, found.info) == (expected.name, expected.split, expected.info)
    assert len(found) == len(expected)
    for index in range(len(expected)):
        assert found.inputs(index).tolist() == expected.inputs(index).tolist()
        assert found.targets(index).tolist() == expected.targets(index).tolist()
        assert list(map(list, found.choices(index))) == list(map(list, expected.choices(index)))
        assert found.label(index) == expected.label(index)
        assert found.text(index) == expected.text(index)


def test_rows_come_back():
    split = make_split()
    assert len(split) == 4 and split.kind == "rank"
    assert split.inputs(2).tolist() == [5, 8, 1] and split.inputs(2).dtype == np.int32
    assert split.targets(3).tolist() == [8, 9, 1]
    assert [choice.tolist() for choice in split.choices(1)] == [[7, 1], [8, 9, 1]]
    assert split.label(0) == 1
    assert split.text(2) == make_row(2)["text"]
    inputs, targets = split.example(2, epoch=5)
    assert (inputs.tolist(), targets.tolist()) == ([5, 8, 1], [8, 9, 1])
    assert split.routing_instance(1) == {
        "source": "frage 1 ä", "choices_expression": "no ||| yes", "labels": ["no", "yes"]}


def test_rows_differ_in_number_and_length_of_choices():
    rows = [make_row(0), make_row(1, choices=[], text={**make_row()["text"], "choices": []})]
    split = PreparedSplit.from_rows("toys", "train", INFO, rows)
    assert [len(split.choices(index)) for index in range(2)] == [2, 0]
    assert [split.label(index) for index in range(2)] == [1, -1]
    assert split.inputs(1).tolist() == [5, 7, 1]


def test_label_is_found_by_text_unless_it_is_given():
    twice = {**make_row()["text"], "choices": ["yes", "yes"]}
    rows = [make_row(), make_row(label=0), make_row(text=twice),
            make_row(text={**make_row()["text"], "targets": "maybe"})]
    split = PreparedSplit.from_rows("toys", "train", INFO, rows)
    assert [split.label(index) for index in range(4)] == [1, 0, 0, -1]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_save_and_open(tmp_path, count):
    split = make_split(count)
    split.save(tmp_path / "split")
    found = PreparedSplit.open(tmp_path / "split")
    assert_equal(found, split)
    if count:
        assert isinstance(found.arrays["tokens"].base, np.memmap)


def test_saving_again_replaces(tmp_path):
    make_split(5).save(tmp_path / "split")
    make_split(2).save(tmp_path / "split")
    assert len(PreparedSplit.open(tmp_path / "split")) == 2


@pytest.mark.parametrize("index", [-1, 4, 100])
def test_rows_outside_are_an_error(index):
    split = make_split()
    for read in (split.inputs, split.targets, split.choices, split.label, split.text):
        with pytest.raises(IndexError, match="4 rows"):
            read(index)


@pytest.mark.parametrize("row, message", [
    (make_row(inputs=[]), "empty or not flat"),
    (make_row(targets=[[1]]), "empty or not flat"),
    (make_row(choices=[[1]]), "Choices differ in number"),
    (make_row(label=2), "not the index of a choice"),
    (make_row(text={"inputs": "a"}), "other fields"),
])
def test_bad_rows_are_named(row, message):
    with pytest.raises(InputError, match=rf"(?s){message}.*toys train, row 1"):
        PreparedSplit.from_rows("toys", "train", INFO, [make_row(), row])


def test_kind_is_needed():
    with pytest.raises(InputError, match="needs a kind"):
        PreparedSplit.from_rows("toys", "train", {"kind": "other"}, [])


def test_half_written_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no prepared split here"):
        PreparedSplit.open(tmp_path / "none")
    make_split().save(tmp_path / "split")
    (tmp_path / "split" / storage.MARKER).unlink()
    with pytest.raises(InputError, match="not whole"):
        PreparedSplit.open(tmp_path / "split")


def rewrite(path, change) -> None:
    np.save(path, change(np.load(path)))


def old(folder) -> None:
    """Makes a folder as older versions wrote it, without digests."""
    info = json.loads((folder / "info.json").read_text())
    del info["arrays"]
    (folder / "info.json").write_text(json.dumps(info))
    (folder / storage.MARKER).write_text('{"schema_version": 1}')


def edit(folder, name: str, **changes) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("damage, message", [
    (lambda folder: (folder / "tokens.npy").write_bytes(b"short"), "cannot be read.*tokens"),
    (lambda folder: (folder / "tokens.npy").write_bytes(b"PK\x03\x04" * 40), "cannot be read.*tokens"),
    (lambda folder: (folder / "labels.npy").unlink(), "cannot be read.*labels"),
    (lambda folder: np.save(folder / "labels.npy", np.array([None] * 4), allow_pickle=True),
     "another type.*labels"),
    (lambda folder: huge(folder / "rows.npy"), "cannot be read.*rows.*1000000000"),
    (lambda folder: rewrite(folder / "tokens.npy", lambda a: a.astype(np.int64)), "another type"),
    (lambda folder: rewrite(folder / "tokens.npy", lambda a: a[:-1]), "sequences against tokens"),
    (lambda folder: rewrite(folder / "rows.npy", lambda a: a[:-1]), "rows against sequences"),
    (lambda folder: rewrite(folder / "text_ends.npy", lambda a: a[::-1]), "text_ends against texts"),
    (lambda folder: rewrite(folder / "sequences.npy", lambda a: a.clip(max=a[2])),
     "sequences against tokens"),
    (lambda folder: rewrite(folder / "labels.npy", lambda a: a[:-1]), "do not fit.*labels"),
    (lambda folder: rewrite(folder / "labels.npy", lambda a: a * 0 + 255),
     "index of a choice.*row 0.*255.*-1 to 1"),
    (lambda folder: rewrite(folder / "labels.npy", lambda a: a - 3), "index of a choice.*row 0.*-2"),
    (lambda folder: rewrite(folder / "tokens.npy", lambda a: -a), "no such id.*at least 0"),
    (lambda folder: (folder / "info.json").write_text(json.dumps({"schema_version": 99})),
     "schema version"),
    (lambda folder: edit(folder, "info.json", num_rows="4"), "split is wrong.*json: num_rows"),
    (lambda folder: edit(folder, "info.json", info=[]), "split is wrong.*json: info"),
    (lambda folder: edit(folder, "info.json", arrays={"tokens": {}}), "missing.*arrays/tokens/bytes"),
    (lambda folder: edit(folder, storage.MARKER, schema_version=7), "marker.*damaged.*schema version"),
    (lambda folder: (folder / storage.MARKER).write_bytes(b""), "marker of this prepared split is damaged"),
])
def test_damaged_folders_are_refused(tmp_path, damage, message):
    folder = tmp_path / "split"
    make_split().save(folder)
    old(folder)
    damage(folder)
    with pytest.raises(InputError, match=rf"(?s){message}"):
        PreparedSplit.open(folder)


def huge(path) -> None:
    """Lets an array's head tell a thousand million values."""
    content = path.read_bytes()
    path.write_bytes(content.replace(b"(5,), }" + b" " * 9, b"(1000000000,), }"))


def test_every_byte_of_a_split_is_checked(tmp_path):
    folder = tmp_path / "split"
    split = make_split()
    split.save(folder)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for place in range(0, len(content), 37 if path.suffix == ".npy" else 11):
            path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1:])
            with pytest.raises(InputError):
                PreparedSplit.open(folder)
        path.write_bytes(content)
    assert_equal(PreparedSplit.open(folder), split)


@pytest.mark.parametrize("text", [b"{]", b"[1]", b"\xff", b'{"inputs": 1}', b"[" * 60])
def test_a_damaged_text_of_an_older_folder_names_its_row(tmp_path, text):
    make_split().save(tmp_path)
    old(tmp_path)
    rewrite(tmp_path / "texts.npy", lambda a: np.frombuffer(
        bytes(a[:len(a) // 4]) + text.ljust(len(a) // 4) + bytes(a[len(a) // 2:]), np.uint8))
    split = PreparedSplit.open(tmp_path)
    assert split.text(0) == make_row(0)["text"]
    with pytest.raises(InputError, match="toys__ask train, row 1"):
        split.text(1)
