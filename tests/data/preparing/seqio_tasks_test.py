"""Tasks through SeqIO: ordinary SeqIO use works, and prepared arrays hold exactly what was rendered."""

import json
import os
import pathlib
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from checkout import ROOT

seqio = pytest.importorskip("seqio")

from elm_jax.data.arrays.cursor import MixtureSource, TrainStream  # noqa: E402
from elm_jax.data.arrays.joined import Joined  # noqa: E402
from elm_jax.data.arrays.prepared import PreparedSplit  # noqa: E402
from elm_jax.data.arrays.prompt_rows import examples_of, task_number  # noqa: E402
from elm_jax.data.preparing import seqio_tasks  # noqa: E402
from elm_jax.data.preparing.prepare import prepare  # noqa: E402
from elm_jax.data.prompts.templates import PromptTemplate  # noqa: E402
from elm_jax.data.registry import registry  # noqa: E402
from elm_jax.errors import InputError  # noqa: E402
from elm_jax.evaluation.metrics import TEXT_METRICS  # noqa: E402
from elm_jax.evaluation.rank import accuracy_of_scores  # noqa: E402
from elm_jax.types import SpecialIds  # noqa: E402
from elm_jax.vocabularies import vocabulary  # noqa: E402
from elm_jax.vocabularies.vocabulary import Vocabulary  # noqa: E402

LENGTHS = {"inputs": 40, "targets": 12}
SIZE = 34
"""Trained pieces."""
WORDS = ["red", "green", "bright", "house", "river", "stands", "near", "old"]
RANK = PromptTemplate(
    "Which", "Is it {{words | join(', ')}}? {{ ['Say', 'Tell'] | choice }}: ||| {{words[label]}}",
    "{{words | join('|||')}}", ("Accuracy",))
WRITE = PromptTemplate("Write", "{% if label %}Colour {{label}} ||| a {{words[0]}} ü{% endif %}", None)


def make_rows(split: str) -> list[dict]:
    draw = np.random.default_rng(len(split))
    count = 40 if split == "train" else 10
    return [{"words": draw.permutation(WORDS)[:2 + number % 4].tolist(), "label": number % 2}
            for number in range(count)]


@pytest.fixture(scope="module")
def names() -> dict[str, str]:
    added = {
        template.name: registry.add_prompted_task(
            "pipeline toys", None, template, kind=kind, role="train", rows=make_rows)
        for template, kind in ((RANK, "rank"), (WRITE, "generation"))}
    registry.add_mixture("pipeline_toys", list(added.values()))
    seqio_tasks.register(TEXT_METRICS)
    return added


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("vocabulary") / "v.model"
    texts = [" ".join(row["words"]) + " Say Tell Colour Is it , ? : 0123" for row in make_rows("train")]
    vocabulary.train_vocabulary(texts, path, SIZE, seed=0)
    return str(path)


def test_prepared_rows_are_the_rendered_rows(names, model):
    ours = Vocabulary.load(model)
    for name in names.values():
        split = seqio_tasks.prepare(name, "train", model)
        expected = list(registry.get_task(name).render_rows("train"))
        assert len(split) == len(expected)
        for row, (index, rendered) in enumerate(expected):
            choices = list(rendered.choices or ())
            assert split.text(row) == {"inputs": rendered.inputs, "targets": rendered.targets,
                                       "choices": choices, "index": index}
            assert split.inputs(row).tolist() == [*ours.encode(rendered.inputs), 1]
            assert split.targets(row).tolist() == [*ours.encode(rendered.targets), 1]
            assert [found.tolist() for found in split.choices(row)] == [
                [*ours.encode(choice), 1] for choice in choices]
            assert split.label(row) == (index % 2 if choices else -1)


@pytest.mark.parametrize("pack", [False, True])
def test_batches_are_those_of_rows_without_seqio_tasks_included(names, model, pack):
    """A mixture for a network whose gates read tasks: the order, the tokens and the tasks' numbers."""
    form = Joined(SpecialIds(0, 1, None), None, (names["Write"], "pipeline toys"))

    def stream(prepared) -> TrainStream:
        splits = [prepared(name) for name in names.values()]
        numbers = [task_number(split, form) for split in splits]
        assert numbers == [1, 0]  # the first by its data set
        source = MixtureSource([examples_of(split, form, LENGTHS) for split in splits], 30, tasks=numbers)
        return TrainStream(source, form=form, batch_size=4, lengths=LENGTHS, seed=0, pack=pack)

    mine = stream(lambda name: prepare(name, "train", Vocabulary.load(model)))
    theirs = stream(lambda name: seqio_tasks.prepare(name, "train", model))
    for step in range(5):
        wanted, found = mine.batch(step), theirs.batch(step)
        assert wanted.keys() == found.keys() and "task_ids" in found
        assert all(np.array_equal(wanted[name], found[name]) for name in wanted)


def test_info_tells_what_was_prepared(names, model):
    info = seqio_tasks.prepare(names["Which"], "validation", model).info
    assert re.fullmatch("[0-9a-f]{16}", info.pop("source"))
    assert info == {
        "dataset": "pipeline toys", "config": None, "template": "Which", "kind": "rank",
        "role": "train", "choices_expression": RANK.answer_choices,
        "template_digest": RANK.digest, "template_version": "",
        "vocabulary": Vocabulary.load(model).fingerprint,
        "vocabulary_facts": Vocabulary.load(model).facts(), "num_source": 10, "num_dropped": 0, "dropped": {},
        "max_rows": None, "seed": 0}
    info = seqio_tasks.prepare(names["Write"], "validation", model).info
    assert info["num_dropped"] == 5 and info["dropped"] == {"skipped by the template": 5}


def assert_same(first: PreparedSplit, second: PreparedSplit) -> None:
    for key, array in first.arrays.items():
        np.testing.assert_array_equal(array, second.arrays[key])


def test_preparing_is_deterministic(names, model):
    assert_same(seqio_tasks.prepare(names["Which"], "train", model),
                seqio_tasks.prepare(names["Which"], "train", model))


def test_max_rows_is_a_seeded_subset_in_order(names, model):
    def indices(**options: int) -> list[int]:
        split = seqio_tasks.prepare(names["Which"], "train", model, **options)
        return [split.text(row)["index"] for row in range(len(split))]

    everything = indices()
    some = indices(max_rows=8, seed=1)
    assert len(some) == 8 and some == sorted(some) and set(some) <= set(everything)
    assert some == indices(max_rows=8, seed=1) != indices(max_rows=8, seed=2)
    assert indices(max_rows=1000) == everything
    with pytest.raises(InputError, match="max_rows"):
        indices(max_rows=0)


def test_ordinary_seqio_use(names, model, monkeypatch):
    lengths = {"inputs": 8, "targets": 3}
    monkeypatch.setenv("ELM_VOCABULARY", model)
    task = seqio.get_mixture_or_task(names["Which"])
    examples = list(task.get_dataset(lengths, split="train", shuffle=False).as_numpy_iterator())
    prepared = seqio_tasks.prepare(names["Which"], "train", model)
    assert len(examples) == len(prepared) == task.num_input_examples("train")
    for row, example in enumerate(examples):
        assert example["inputs"].tolist() == prepared.inputs(row)[:8].tolist()
        assert example["targets"].tolist() == prepared.targets(row)[:3].tolist()
        assert example["targets_pretokenized"].decode() == prepared.text(row)["targets"]
    left = registry.add_prompted_task("pipeline left", None, RANK, kind="rank", role="train", rows=make_rows,
                                      cut_prompt="left")
    seqio_tasks.register(TEXT_METRICS)
    examples = seqio.get_mixture_or_task(left).get_dataset(lengths, split="train", shuffle=False)
    for row, example in enumerate(examples.as_numpy_iterator()):
        assert example["inputs"].tolist() == prepared.inputs(row)[-8:].tolist()
    assert task.output_features["inputs"].vocabulary.vocab_size == SIZE + 100
    model_batches = seqio.EncDecFeatureConverter(pack=True)(
        task.get_dataset({"inputs": 256, "targets": 64}, split="train"),
        {"inputs": 256, "targets": 64})
    assert next(model_batches.as_numpy_iterator())["encoder_segment_ids"].max() > 1


def test_mixture_draws_from_all_its_tasks(names, model):
    mixture = seqio.get_mixture_or_task("pipeline_toys")
    assert mixture.total_rate == 80.0
    with seqio_tasks.use_vocabulary(model):
        data = mixture.get_dataset(None, split="train", num_epochs=1, seed=0,
                                   copy_pretokenized=True, compute_stats_empirically=False)
        starts = {row["inputs_pretokenized"][:6] for row in data.as_numpy_iterator()}
    assert starts == {b"Is it ", b"Colour"}


def test_two_vocabularies_serve_one_task(names, model, tmp_path):
    texts = ["Colour 1 a ü " + " ".join(WORDS[::-1])] * 20
    vocabulary.train_vocabulary(texts, tmp_path / "other.model", 25, seed=0)
    for path in (model, str(tmp_path / "other.model")):
        split = seqio_tasks.prepare(names["Write"], "train", path)
        assert split.inputs(0).tolist() == [*Vocabulary.load(path).encode("Colour 1"), 1]
        assert split.info["vocabulary"] == Vocabulary.load(path).fingerprint


def test_without_a_vocabulary_the_error_says_how_to_set_one(names, monkeypatch):
    monkeypatch.delenv("ELM_VOCABULARY", raising=False)
    with pytest.raises(InputError, match=r"(?s)No vocabulary is in use.*ELM_VOCABULARY"):
        seqio.get_mixture_or_task(names["Which"]).get_dataset(None, split="train")


def test_seqio_metrics(names):
    rank, write = (seqio.get_mixture_or_task(name) for name in names.values())
    assert rank.postprocess_fn(" Red. ") == "Red."
    assert rank.metric_fns[0](["Red", "green"], ["red.", "blue"]) == {"accuracy": 50.0}
    scores = write.metric_fns[0](["a red house stands", "x"], ["a red houses", "y"])
    # 3 of 4 target words and 3 of 3 predicted: F1 = 6/7 for the first, 0 for the second.
    assert scores["rouge_l"] == pytest.approx(100 * 6 / 7 / 2)


def test_bad_requests_are_clear_errors(names, model, tmp_path):
    with pytest.raises(InputError, match=r"Unknown task(?s:.*)nearest: pipeline_toys__write"):
        seqio_tasks.prepare("pipeline_toys__writ", "train", model)
    with pytest.raises(InputError, match="no split 'test'"):
        seqio_tasks.prepare(names["Which"], "test", model)
    with pytest.raises(InputError, match="no vocabulary here"):
        seqio_tasks.prepare(names["Which"], "train", str(tmp_path / "none.model"))


def test_errors_of_the_data_come_out_as_themselves(model, tmp_path, monkeypatch):
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
    (tmp_path / "broken").mkdir()
    rows = [{"words": WORDS, "label": 0}] * 3
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path = tmp_path / "broken" / "train.jsonl"
    name = registry.add_prompted_task("broken", None, RANK, kind="rank", role="train")
    for content, message in (
            (text + '{"words"', r"half written(?s:.*)train.jsonl, line 4"),
            (text.replace("words", "tokens"), "(?s)'Which' reads a field.*missing words"),
            (text.replace("0}", "99}"), r"no row left|fails on a row"),
            ("", "is empty")):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            seqio_tasks.prepare(name, "train", model)


def test_task_that_skips_every_row_is_an_error(model):
    empty = PromptTemplate("Empty", "{{label}}", None)
    name = registry.add_prompted_task("pipeline toys", None, empty, kind="generation", role="train",
                                      rows=make_rows)
    with pytest.raises(InputError, match=r"(?s)no row left.*40 dropped .40 skipped by the template"):
        seqio_tasks.prepare(name, "train", model)


def test_registered_again_after_new_data(tmp_path, monkeypatch):
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
    names = [registry.add_prompted_task(dataset, None, RANK, kind="rank", role="train")
             for dataset in ("early", "late")]
    registry.add_mixture("early_and_late", names)
    seqio_tasks.register(TEXT_METRICS)
    assert "early_and_late" not in seqio.MixtureRegistry.names()
    for dataset, expected in (("early", names[:1]), ("late", names)):
        (tmp_path / dataset).mkdir()
        row = json.dumps({"words": WORDS, "label": 0})
        (tmp_path / dataset / "train.jsonl").write_text(row + "\n")
        seqio_tasks.register(TEXT_METRICS)
        mixture = seqio.get_mixture_or_task("early_and_late")
        assert [task.name for task in mixture.tasks] == expected


@pytest.mark.slow
def test_real_tasks_are_in_seqio_s_registry():
    data = pathlib.Path(os.environ.get("ELM_DATA_DIR")
                        or ROOT.parent / "shared" / "data")
    if not (data / "index.json").exists():
        pytest.skip("no data folder: set ELM_DATA_DIR")
    code = (
        "import elm_jax.tasks.for_seqio, seqio\n"
        "assert len(seqio.TaskRegistry.names()) >= 282\n"
        "tasks = seqio.get_mixture_or_task('t0_train').tasks\n"
        "assert len(tasks) == 147\n"
        "assert len(seqio.get_mixture_or_task('cosmos_qa').tasks) == 13\n")
    subprocess.run([sys.executable, "-c", code], check=True,
                   env={**os.environ, "ELM_DATA_DIR": str(data), "TF_CPP_MIN_LOG_LEVEL": "3"})


def test_a_ranked_task_is_evaluated_choice_by_choice(names, model):
    asked = []

    def metric(targets, scores):
        asked.append((targets, scores))
        return {"rows": len({target["index"] for target in targets})}

    name = seqio_tasks.evaluation_name(names["Which"], metric)
    assert name == f"{names['Which']}_score_eval"
    with seqio_tasks.use_vocabulary(model):
        evaluator = seqio.Evaluator(name, seqio.EncDecFeatureConverter(pack=False), "validation",
                                    sequence_length={"inputs": 20})
        batch = list(evaluator.cached_model_datasets[name].as_numpy_iterator())
        scores = [(index, float(row["decoder_target_tokens"].sum())) for index, row in batch]
        evaluator.evaluate(compute_metrics=True, score_fn=lambda data: scores)[0].result()
    split = seqio_tasks.prepare(names["Which"], "validation", model)
    found = iter(zip(*asked[0], batch, strict=True))
    for number in range(len(split)):
        text = split.text(number)
        for place, choice in enumerate(split.choices(number)):
            target, score, (_, row) = next(found)
            assert target == {"choice": text["choices"][place], "index": text["index"], "place": place,
                              "credit": float(place == split.label(number)), "length": len(choice),
                              "num_choices": len(text["choices"])}
            assert score == choice.sum()
            np.testing.assert_array_equal(row["decoder_target_tokens"][:len(choice)], choice)
            assert row["encoder_input_tokens"].shape == (20,)
    assert next(found, None) is None


def test_several_right_answers_reach_seqio_and_its_metrics(model, monkeypatch):
    monkeypatch.setenv(seqio_tasks.VOCABULARY_VARIABLE, model)  # its evaluator decodes in another thread
    rows = [{"inputs": f"Is it {word}?", "choices": [word, "old", "old house"], "scores": scores}
            for word, scores in (("red", [0, 1, 1]), ("near", [0.25, 0, 1]), ("green", [0, 0, 0]))]
    texts = [{"inputs": "Say one", "targets": ["red", "old house"]}, {"inputs": "Say", "targets": "near"}]
    ranked, written = (registry.add_prompted_task(
        "several right", None, name, kind=name, role="train", splits=("validation",), ready=True,
        rows=lambda _, own=own: own) for name, own in (("rank", rows), ("generation", texts)))
    seqio_tasks.register(TEXT_METRICS)
    for task in (ranked, written):
        mine, theirs = prepare(task, "validation", Vocabulary.load(model)), seqio_tasks.prepare(
            task, "validation", model)
        assert list(map(mine.text, range(len(mine)))) == list(map(theirs.text, range(len(theirs))))
    assert [mine.text(row).get("references") for row in range(2)] == [["red", "old house"], None]
    ranking = prepare(ranked, "validation", Vocabulary.load(model))
    assert [ranking.label(row) for row in range(3)] == [1, 2, -1]
    assert [ranking.text(row)["targets"] for row in range(3)] == ["old", "old house", ""]
    name = seqio_tasks.evaluation_name(ranked, accuracy_of_scores)
    found = seqio.Evaluator(name, seqio.EncDecFeatureConverter(pack=False), "validation")
    metrics = found.evaluate(compute_metrics=True, score_fn=lambda data: [
        (int(index), -float(index % 3)) for index, _ in data])[0].result()
    assert metrics[name]["accuracy"] == pytest.approx(100 * 0.25 / 3)  # always the first choice
    found = seqio.Evaluator(ranked, seqio.EncDecFeatureConverter(pack=False), "validation")
    answers = [[*Vocabulary.load(model).encode(text), *[1] * 20][:20]
               for text in ("old house", "near", "old")]
    metrics = found.evaluate(compute_metrics=True, predict_fn=lambda data: list(enumerate(answers)))
    assert metrics[0].result()[ranked]["accuracy"] == pytest.approx(200 / 3)  # texts with any credit
    found = seqio.Evaluator(written, seqio.EncDecFeatureConverter(pack=False), "validation")
    answers = [[*Vocabulary.load(model).encode(text), *[1] * 20][:20] for text in ("old house", "red")]
    metrics = found.evaluate(compute_metrics=True, predict_fn=lambda data: list(enumerate(answers)))
    assert metrics[0].result()[written]["rouge_l"] == pytest.approx(50.0)


def test_other_tasks_are_their_own_evaluation_and_mixtures_mix(names):
    def metric(targets, scores):
        return {}

    assert seqio_tasks.evaluation_name(names["Write"], metric) == names["Write"]
    name = seqio_tasks.evaluation_name("pipeline_toys", metric)
    tasks = {task.name for task in seqio.get_subtasks(seqio.get_mixture_or_task(name))}
    assert tasks == {names["Write"], f"{names['Which']}_score_eval"}
    with pytest.raises(InputError, match="Unknown task"):
        seqio_tasks.evaluation_name("nothing", metric)


def test_tasks_without_a_row_are_not_evaluated(names, caplog):
    def metric(targets, scores):
        return {}

    never = registry.add_prompted_task(
        "never", None, PromptTemplate("Which", "{% if label > 5 %}{{words[0]}} ||| x{% endif %}", "x"),
        kind="rank", role="train", rows=make_rows)
    registry.add_mixture("mostly_never", [never, names["Which"]])
    tasks = seqio.get_subtasks(seqio.get_mixture_or_task(seqio_tasks.evaluation_name("mostly_never", metric)))
    assert [task.name for task in tasks] == [f"{names['Which']}_score_eval"]
    assert "1 of 2 tasks have no row" in caplog.text
    with pytest.raises(InputError, match="nothing to evaluate"):
        seqio_tasks.evaluation_name(never, metric)


def test_a_vocabulary_set_once_serves_every_thread(names, model, monkeypatch):
    monkeypatch.delenv(seqio_tasks.VOCABULARY_VARIABLE, raising=False)
    with pytest.raises(InputError, match="There is no vocabulary here"):
        seqio_tasks.set_vocabulary("nowhere.model")
    found = seqio_tasks.set_vocabulary(model)
    encoded = []
    thread = threading.Thread(target=lambda: encoded.append(found.encode("red house")))
    thread.start()
    thread.join()
    assert encoded == [Vocabulary.load(model).encode("red house")]
    monkeypatch.delenv(seqio_tasks.VOCABULARY_VARIABLE)
