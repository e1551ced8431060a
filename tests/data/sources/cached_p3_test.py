"""T0's cached P3 is read as SeqIO wrote it, without TensorFlow, and becomes tasks without rendering."""

import pathlib
import random
import struct

import pytest

from elm_jax.data.registry import registry
from elm_jax.data.sources import cached_p3
from elm_jax.errors import InputError
from elm_jax.vocabularies.vocabulary import Vocabulary, train_vocabulary

ROWS = [{"inputs": f"Is {number} even?\nSay: ", "targets": "yes" if number % 2 == 0 else "no",
         "choices": ["yes", "no", "||| maybe"]} for number in range(7)]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Vocabulary:
    path = tmp_path_factory.mktemp("p3") / "v.model"
    train_vocabulary(["Is even ? Say : yes no maybe ||| 0 1 2 3 4 5 6 7 8 9"] * 20, path, 30, seed=0)
    return Vocabulary.load(path)


@pytest.fixture(scope="module")
def tf():
    return pytest.importorskip("tensorflow")


def write(tf, path: pathlib.Path, examples: list[dict]) -> pathlib.Path:
    """Records as TensorFlow writes them."""
    def feature(values: list):
        if isinstance(values[0], bytes):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
        if isinstance(values[0], float):
            return tf.train.Feature(float_list=tf.train.FloatList(value=values))
        return tf.train.Feature(int64_list=tf.train.Int64List(value=values))

    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for example in examples:
            features = {name: feature(values) for name, values in example.items() if values}
            writer.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())
    return path


def to_train(vocabulary: Vocabulary, row: dict) -> dict:
    return {"inputs": [*vocabulary.encode(row["inputs"]), 1],
            "targets": [*vocabulary.encode(row["targets"]), 1],
            "inputs_pretokenized": [row["inputs"].encode()],
            "targets_pretokenized": [row["targets"].encode()],
            "answer_choices": [choice.encode() for choice in row["choices"]]}


def scored(vocabulary: Vocabulary) -> list[dict]:
    found = []
    for number, row in enumerate(ROWS):
        for place, choice in enumerate(row["choices"]):
            example = to_train(vocabulary, {**row, "targets": choice, "choices": []})
            found.append({**example, "idx": [number, place], "is_correct": [int(choice == row["targets"])],
                          "weight": [1.0]})
    return found


def test_a_task_to_train_on(tf, vocabulary, tmp_path):
    examples = [to_train(vocabulary, row) for row in ROWS]
    write(tf, tmp_path / "train.tfrecord-00000-of-00002", examples[:4])
    write(tf, tmp_path / "train.tfrecord-00001-of-00002", examples[4:])
    assert cached_p3.read_rows(tmp_path, "train") == ROWS
    features, where = list(cached_p3.read_examples(tmp_path, "train"))[5]
    assert features["inputs"] == examples[5]["inputs"] and where.endswith("00001-of-00002, record 2")


def test_a_scored_task_is_gathered_by_its_rows(tf, vocabulary, tmp_path):
    write(tf, tmp_path / "validation.tfrecord-00000-of-00001", scored(vocabulary))
    assert cached_p3.read_rows(tmp_path, "validation") == ROWS
    assert next(cached_p3.read_examples(tmp_path, "validation"))[0]["weight"] == [1.0]


def test_choices_dealt_over_files_are_gathered(tf, vocabulary, tmp_path):
    examples = scored(vocabulary)[:18]
    write(tf, tmp_path / "one" / "validation.tfrecord-00000-of-00001", examples)
    whole = cached_p3.read_rows(tmp_path / "one", "validation")
    assert whole == ROWS[:6]
    random.Random(0).shuffle(examples)
    for shard in range(2):
        write(tf, tmp_path / "two" / f"validation.tfrecord-{shard:05d}-of-00002", examples[shard::2])
    assert cached_p3.read_rows(tmp_path / "two", "validation") == whole


def test_a_scored_row_without_all_its_choices_is_named(tf, vocabulary, tmp_path):
    def refused(examples: list[dict], match: str) -> None:
        write(tf, tmp_path / "validation.tfrecord-00000-of-00001", examples)
        with pytest.raises(InputError, match=match):
            cached_p3.read_rows(tmp_path, "validation")

    examples = scored(vocabulary)
    where = r"(?s)not all there, once each.*split validation, row 1 of idx.*choices "
    refused(examples[:3] + examples[4:], where + "1, 2\n")
    refused([*examples, examples[5]], where + "0, 1, 2, 2\n")
    other = {**examples[4], "inputs_pretokenized": [b"Is 2 odd?"]}
    refused([*examples[:4], other, *examples[5:]],
            r"(?s)unlike inputs.*split validation, row 1 of idx.*Is 1 even.*Is 2 odd")
    for name in ("idx", "is_correct"):
        refused([*examples[:2], {**examples[2], name: []}], rf"(?s)lacks a feature.*record 3.*{name} None")


def test_several_right_choices_or_none_are_as_t0_has_them(tf, vocabulary, tmp_path):
    examples = scored(vocabulary)[:6]
    for example, right in zip(examples, (0, 1, 1, 0, 0, 0), strict=True):
        example["is_correct"] = [right]
    write(tf, tmp_path / "validation.tfrecord-00000-of-00001", examples)
    rows = cached_p3.read_rows(tmp_path, "validation")
    assert [(row["targets"], row.get("scores")) for row in rows] == [("no", [0, 1, 1]), ("", None)]


def test_ids_alone_are_decoded(tf, vocabulary, tmp_path):
    examples = [{"inputs": [*vocabulary.encode(row["inputs"]), 1],
                 "targets": [*vocabulary.encode(row["targets"]), 1]} for row in ROWS]
    write(tf, tmp_path / "train.tfrecord-00000-of-00001", examples)
    found = cached_p3.read_rows(tmp_path, "train", vocabulary)
    assert [row["targets"] for row in found] == [row["targets"] for row in ROWS]
    assert found[3]["inputs"].split() == ROWS[3]["inputs"].split()
    with pytest.raises(InputError, match=r"(?s)token ids and no text.*record 1, inputs.*give the vocabulary"):
        cached_p3.read_rows(tmp_path, "train")


def test_numbers_of_every_size(tf, tmp_path):
    values = [0, 1, -1, 127, 128, 2**31, -2**31, 2**63 - 1, -2**63]
    write(tf, tmp_path / "train.tfrecord-00000-of-00001", [{"n": values, "f": [0.5, -2.0], "b": [b"", b"x"]}])
    features, _ = next(cached_p3.read_examples(tmp_path, "train"))
    assert features == {"n": values, "f": [0.5, -2.0], "b": [b"", b"x"]}


def test_cached_tasks_need_no_rendering(tf, vocabulary, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_TASKS", {})
    write(tf, tmp_path / "c" / "validation.tfrecord-00000-of-00001", scored(vocabulary))
    write(tf, tmp_path / "g" / "train.tfrecord-00000-of-00001", [to_train(vocabulary, row) for row in ROWS])
    ranked = registry.get_task(registry.add_cached_task(
        "parity", None, "ask", tmp_path / "c", kind="rank", role="extra", splits=("validation",)))
    written = registry.get_task(registry.add_cached_task(
        "parity", None, "say", tmp_path / "g", kind="generation", role="extra", splits=("train",)))
    for task, split in ((ranked, "validation"), (written, "train")):
        found = [(row.inputs, row.targets, row.choices) for _, row in task.render_rows(split)]
        assert found == [(row["inputs"], row["targets"], tuple(row["choices"])) for row in ROWS]
        assert task.num_rows(split) == 7 and task.source_digest(split)
    assert registry.describe_task(ranked.name)["unavailable"] is None


def test_digests_of_cached_tasks_are_those_of_their_files(tf, vocabulary, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_TASKS", {})

    def add(folder: str, **facts) -> registry.PromptedTask:
        return registry.get_task(registry.add_cached_task(
            "parity", None, f"say {len(registry._TASKS)}", tmp_path / folder, kind="generation", role="extra",
            splits=("train",), **facts))

    examples = [to_train(vocabulary, row) for row in ROWS]
    path = write(tf, tmp_path / "c" / "train.tfrecord-00000-of-00001", examples)
    head = path.read_bytes()
    path.write_bytes(b"no records at all")  # and yet: nothing reads them
    task = add("c")
    damaged = task.source_digest("train")
    path.write_bytes(head)
    assert damaged != task.source_digest("train") == task.source_digest("train")
    with_vocabulary = add("c", vocabulary=write(tf, tmp_path / "some.model", examples))
    assert with_vocabulary.source_digest("train") not in (damaged, task.source_digest("train"))
    absent = add("nowhere")
    assert absent.why_unavailable() == "no data" and not absent.has_rows("train")
    with pytest.raises(InputError, match="0 files of train"):
        absent.source_digest("train")
    assert task.places("train")(6).endswith("c, split train, row 7")


def test_the_checksum_is_the_same_with_and_without_the_library(monkeypatch):
    data = b"123456789"
    assert cached_p3._slow_crc(data) == 0xE3069283  # RFC 3720's check value
    module = pytest.importorskip("google_crc32c")
    assert cached_p3._fast_crc is module.value and module.value(data) == 0xE3069283
    with_library = cached_p3._masked_crc(data * 99)
    monkeypatch.setattr(cached_p3, "_fast_crc", None)
    assert cached_p3._masked_crc(data * 99) == with_library


def test_functions_may_give_ready_prompts(monkeypatch):
    monkeypatch.setattr(registry, "_TASKS", {})
    rows = [*ROWS, {"inputs": " ", "targets": "x"}, {"inputs": "x", "targets": "odd", "choices": ["a"]}]
    task = registry.get_task(registry.add_prompted_task(
        "parity", None, "ask", kind="rank", role="extra", rows=lambda split: rows, ready=True))
    assert len(list(task.render_rows("train"))) == 7
    rows.append({"inputs": "x", "targets": 3})
    with pytest.raises(InputError, match=r"(?s)'targets' of a ready prompt is no text.*train, row 10.*int"):
        list(task.render_rows("train"))
    rows[-1] = {"inputs": "x", "targets": "y", "choices": "yes"}
    with pytest.raises(InputError, match=r"(?s)no list of texts.*row 10"):
        list(task.render_rows("train"))


def test_damaged_caches_are_named(tf, vocabulary, tmp_path):
    path = write(tf, tmp_path / "train.tfrecord-00000-of-00001", [to_train(vocabulary, row) for row in ROWS])
    whole = path.read_bytes()
    for content, record in ((whole[:-1], 7), (whole[:30], 1), (b"\0" * 100, 1),
                            (whole[:4] + b"\xff" + whole[5:], 1), (whole + b"x", 8)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"(?s)cut off or damaged.*00000-of-00001, record {record}\n"):
            cached_p3.read_rows(tmp_path, "train")
    body = b"\x0a\xff\xff"
    head = struct.pack("<Q", len(body))
    path.write_bytes(head + cached_p3._masked_crc(head) + body + cached_p3._masked_crc(body))
    with pytest.raises(InputError, match=r"(?s)no tf.train.Example.*record 1"):
        cached_p3.read_rows(tmp_path, "train")
    path.rename(tmp_path / "train.tfrecord-00000-of-00003")
    with pytest.raises(InputError, match=r"(?s)lacks files.*1 files of train.*3 in all"):
        cached_p3.read_rows(tmp_path, "train")
    with pytest.raises(InputError, match="0 files of validation"):
        cached_p3.read_rows(tmp_path / "none", "validation")


def test_an_example_without_its_features_is_named(tf, tmp_path):
    write(tf, tmp_path / "train.tfrecord-00000-of-00001", [{"inputs_pretokenized": [b"x"]}])
    with pytest.raises(InputError, match=r"(?s)lacks a feature.*record 1.*targets_pretokenized, or targets"):
        cached_p3.read_rows(tmp_path, "train")
    write(tf, tmp_path / "train.tfrecord-00000-of-00001", [
        {"inputs_pretokenized": [b"x"], "targets_pretokenized": [b"y"], "is_correct": [1]}])
    with pytest.raises(InputError, match=r"(?s)lacks a feature.*idx None"):
        cached_p3.read_rows(tmp_path, "train")
