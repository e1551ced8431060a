"""A real task prepared, trained on and scored in each kind of vocabulary; ids are those of other programs."""

import dataclasses
import json

import elm_jax.tasks  # noqa: F401  (fills the registry)
import hf_folders
import numpy as np
import pytest
import real_vocabularies as real
import sentencepiece
import tiny_study as tiny
import transformers
import weights

from elm_jax.data.preparing.task_data import TaskData
from elm_jax.data.registry import registry
from elm_jax.errors import InputError
from elm_jax.experts.base import load_base, save_base
from elm_jax.models.t5.network import T5Network
from elm_jax.runtime import storage, trees
from elm_jax.vocabularies.vocabulary import ByteVocabulary, train_vocabulary
from elm_jax.workflows.convert.convert_model import ConvertConfig, convert
from elm_jax.workflows.evaluate.evaluate_models import evaluate
from elm_jax.workflows.train import pretrain as pretraining
from elm_jax.workflows.train.pretrain import PretrainConfig
from elm_jax.workflows.train.train_expert import train

TASK, WRITE = "twenty_ag_news__classify", "twenty_xsum__doc_tldr"
"""The first rows of real tasks."""
MODULES = ("elm_jax.tasks",)
KINDS = ("sentencepiece", "bytes", "tokenizer")
ROWS = 20
FILES = dict(zip(KINDS, ("vocabulary.model", "vocabulary.json", "tokenizer.json"), strict=True))


@pytest.fixture(scope="module")
def texts():
    with pytest.MonkeyPatch.context() as patch:
        yield real.real_texts(patch)


@pytest.fixture(scope="module", autouse=True)
def few_rows(texts):
    """Tasks of the real ones' templates and first rows."""
    for task in map(registry.get_task, ("ag_news__classify", "xsum__doc_tldr")):
        registry.add_prompted_task(
            f"twenty {task.dataset}", None, task.load_template(), kind=task.kind, role="extra",
            rows=lambda split, task=task: list(task.read_rows(split))[:ROWS])


def make_vocabulary(kind, folder, texts):
    """Its file, and another program's function from a text to ids that end with EOS."""
    if kind == "sentencepiece":
        train_vocabulary(texts * 3, folder / "v.model", 1000, seed=0)
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "v.model"))
        return folder / "v.model", lambda text: [*theirs.EncodeAsIds(text), 1]
    if kind == "bytes":
        (folder / "v.json").write_text(json.dumps({"schema_version": 1, "kind": "bytes", "extra_ids": 125}))
        return folder / "v.json", lambda text: transformers.ByT5Tokenizer()(text).input_ids
    file = real.write_tokenizer(folder / "hf", real.make_tokenizer("bpe", texts))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "hf")
    return file, lambda text: theirs(text, truncation=False).input_ids


@pytest.fixture(scope="module", params=KINDS)
def made(request, texts, tmp_path_factory):
    """(kind, base, ids of other programs, folder)."""
    folder = tmp_path_factory.mktemp(request.param)
    file, ids = make_vocabulary(request.param, folder, texts)
    params = weights.drawn(T5Network(tiny.NETWORK))
    save_base(folder / "base", params, tiny.NETWORK, file, {})
    return request.param, load_base(folder / "base"), ids, folder


@pytest.fixture(autouse=True)
def data(monkeypatch):
    monkeypatch.setenv("ELM_DATA_DIR", str(real.DATA))


def task_data(base, folder):
    return TaskData(base.vocabulary, MODULES, str(folder / "prepared"))


def test_a_base_keeps_its_vocabulary(made):
    kind, base, ids, folder = made
    assert base.vocabulary_path == str(folder / "base" / FILES[kind])
    assert json.loads((folder / "base" / "base.json").read_text())["vocabulary"] == FILES[kind]
    assert [*base.vocabulary.encode("Zwölf Boxkämpfer"), 1] == ids("Zwölf Boxkämpfer")
    (changed := folder / "gone").mkdir(exist_ok=True)
    for path in (folder / "base").iterdir():
        if path.name != FILES[kind]:
            (changed / path.name).exists() or (changed / path.name).symlink_to(path)
    with pytest.raises(InputError, match=rf"(?s)File does not exist.*{FILES[kind]}"):
        load_base(changed)


def test_prepared_arrays_hold_the_ids_of_other_programs(made):
    _, base, ids, folder = made
    split = task_data(base, folder).split(TASK, "train")
    prompts = dict(registry.get_task(TASK).render_rows("train"))
    assert len(split) == ROWS
    for number in range(ROWS):
        prompt = prompts[split.text(number)["index"]]
        assert split.inputs(number).tolist() == ids(prompt.inputs)
        assert split.targets(number).tolist() == ids(prompt.targets)
        assert [found.tolist() for found in split.choices(number)] == [ids(text) for text in prompt.choices]
        assert prompt.choices[split.label(number)] == prompt.targets


def test_ordinary_seqio_use_gives_the_same_ids(made, monkeypatch):
    seqio = pytest.importorskip("seqio")
    from elm_jax.data.preparing import seqio_tasks
    from elm_jax.evaluation.metrics import TEXT_METRICS

    _, base, ids, _ = made
    seqio_tasks.register(TEXT_METRICS)
    monkeypatch.setenv("ELM_VOCABULARY", base.vocabulary_path)
    task = seqio.get_mixture_or_task(TASK)
    vocabulary = task.output_features["inputs"].vocabulary
    assert (vocabulary.vocab_size, vocabulary.unk_id) == (base.vocabulary.size, base.vocabulary.unk_id)
    data = task.get_dataset({"inputs": 512, "targets": 64}, split="validation", shuffle=False)
    rows = list(data.take(ROWS).as_numpy_iterator())
    for row in rows:
        assert row["inputs"].tolist() == ids(row["inputs_pretokenized"].decode())[:512]
        assert vocabulary.decode(row["targets"].tolist()) == row["targets_pretokenized"].decode()
        assert vocabulary.decode_tf(row["targets"]).numpy() == row["targets_pretokenized"]
    padded = np.stack([np.pad(row["targets"], (0, 64 - len(row["targets"]))) for row in rows])
    wanted = [row["targets_pretokenized"] for row in rows]
    assert vocabulary.decode_tf(seqio.utils.tf.constant(padded)).numpy().tolist() == wanted
    ragged = vocabulary.encode_tf(seqio.utils.tf.constant(wanted))
    assert vocabulary.decode_tf(ragged).numpy().tolist() == wanted


def test_an_expert_trains_and_is_scored(made):
    kind, base, _, folder = made
    config = tiny.train_config(base, folder / "run", task=TASK, train_steps=2, modules=MODULES,
                               prepared_dir=str(folder / "prepared"))
    expert = train(config, base=base, mesh=tiny.one_device()).expert
    assert expert.card.training["steps"] == 2 and expert.card.training["examples"] == ROWS
    moved = trees.flatten(expert.overlay)
    assert all(np.isfinite(leaf).all() for leaf in moved.values())
    rows = evaluate(base, expert, [TASK, WRITE], data=task_data(base, folder), mesh=tiny.one_device(),
                    max_rows=6)
    assert {row["task"] for row in rows} == {TASK, WRITE}, kind
    assert all(0 <= row["value"] <= 100 for row in rows)


def test_arrays_of_another_vocabulary_are_refused(made, tmp_path):
    kind, base, _, folder = made
    data = task_data(base, folder)
    data.split(TASK, "train")
    other = ByteVocabulary(124) if kind == "bytes" else ByteVocabulary()
    with pytest.raises(InputError, match="made with another vocabulary") as raised:
        TaskData(other, MODULES, str(folder / "prepared")).split(TASK, "train")
    assert other.fingerprint in str(raised.value) and base.vocabulary.fingerprint in str(raised.value)


def test_a_base_travels_to_t5x_and_back_with_its_vocabulary(made, tmp_path):
    kind, base, _, _ = made
    convert(ConvertConfig(base.path, "elm", str(tmp_path / "t5x"), "t5x"))
    assert (tmp_path / "t5x" / FILES[kind]).exists()
    if base.vocabulary.size <= tiny.NETWORK.vocab_size - 128:  # bytes: 384 ids on 1152 rows
        with pytest.raises(InputError, match="not that of the embedding"):
            convert(ConvertConfig(str(tmp_path / "t5x"), "t5x", str(tmp_path / "back"), "elm"))
        return
    convert(ConvertConfig(str(tmp_path / "t5x"), "t5x", str(tmp_path / "back"), "elm"))
    again = load_base(tmp_path / "back")
    assert (again.vocabulary.fingerprint, again.fingerprint) == (
        base.vocabulary.fingerprint, base.fingerprint)


def test_a_vocabulary_that_is_larger_than_the_embedding_is_refused(made, tmp_path):
    _, base, _, _ = made
    small = dataclasses.replace(tiny.NETWORK, vocab_size=256)
    params = weights.drawn(T5Network(small))
    save_base(tmp_path / "base", params, small, base.vocabulary_path, {})
    with pytest.raises(InputError, match="larger than the embedding"):
        load_base(tmp_path / "base")


def test_a_byt5_folder_becomes_a_base_and_a_folder_again(tmp_path):
    """By `elm convert`; and --vocabulary gives a model another tokenizer than the one it came with."""
    hf_folders.publish(hf_folders.build("byt5"), "byt5", tmp_path / "hf")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "hf")
    convert(ConvertConfig(str(tmp_path / "hf"), "hf", str(tmp_path / "base"), "elm"))
    convert(ConvertConfig(str(tmp_path / "base"), "elm", str(tmp_path / "back"), "hf"))
    report = json.loads((tmp_path / "base" / "conversion_report.json").read_text())
    assert any("bytes and 125 extra ids" in note for note in report["notes"])
    back, text = transformers.AutoTokenizer.from_pretrained(tmp_path / "back"), "Ünï字"
    assert back(text).input_ids == [*load_base(tmp_path / "base").vocabulary.encode(text), 1]
    (tmp_path / "v.json").write_text('{"schema_version": 1, "kind": "bytes", "extra_ids": 120}')
    convert(ConvertConfig(str(tmp_path / "hf"), "hf", str(tmp_path / "other"), "hf",
                          vocabulary=str(tmp_path / "v.json")))
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "other")) == 379


def test_pretraining_takes_a_vocabulary(made, tmp_path):
    """The base that comes of it carries it; another file is not that of the run."""
    _, base, _, _ = made
    file = tmp_path / "given"
    file.write_bytes(storage.read_bytes(base.vocabulary_path))
    config = PretrainConfig(
        model_dir=str(tmp_path / "run"), network=tiny.NETWORK, passages=("elm_jax.tasks.embedded:passages",),
        vocabulary=str(file), train_steps=1, batch_size=4, task_feature_lengths=tiny.LENGTHS, chunk_length=64,
        optimizer=tiny.OPTIMIZER, tensorboard=False)
    made_of_it = pretraining.pretrain(config, mesh=tiny.one_device())
    assert made_of_it.vocabulary.fingerprint == base.vocabulary.fingerprint
    kept = tmp_path / "run" / "vocabulary" / base.vocabulary.FILE
    assert kept.read_bytes() == base.vocabulary.contents
    file.write_bytes(ByteVocabulary(120).contents)
    with pytest.raises(InputError, match="vocabulary of other passages or settings"):
        pretraining.make_vocabulary(config, [])
    assert config.digest() != dataclasses.replace(config, vocabulary=None).digest()


@pytest.mark.parametrize(("settings", "message"), [
    ({"vocab_pieces": 50_000}, "The vocabulary cannot be trained"),
    ({"vocab_pieces": 400}, "larger than the embedding"),
    ({"vocabulary": "given"}, "larger than the embedding"),
])
def test_a_vocabulary_that_does_not_fit_leaves_nothing(settings, message, tmp_path, texts):
    """The next try, with settings that fit, then finds no vocabulary of other settings in its way."""
    passages = [text for text in texts if text.isascii()]
    (tmp_path / "passages.txt").write_text("\n".join(passages))
    (tmp_path / "given").write_bytes(ByteVocabulary(200).contents)
    if "vocabulary" in settings:
        settings = {"vocabulary": tmp_path / "given"}
    network = dataclasses.replace(tiny.NETWORK, vocab_size=384)
    config = PretrainConfig(model_dir=tmp_path / "run", network=network, train_steps=1, tensorboard=False,
                            passages=(str(tmp_path / "passages.txt"),), **settings)
    with pytest.raises(InputError, match=message):
        pretraining.pretrain(config, mesh=tiny.one_device())
    assert not (tmp_path / "run").exists()
    fits = dataclasses.replace(config, vocabulary=None, vocab_pieces=200)
    assert pretraining.make_vocabulary(fits, passages).exists()
