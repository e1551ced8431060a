"""Questions to a base, to experts and to a library: who answers, how they are rendered, what is refused."""

import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
import tiny_study as tiny

import elm_jax as elm
from elm_jax.cli import main
from elm_jax.errors import InputError
from elm_jax.evaluation.evaluator import EvaluationSettings, evaluate_task
from elm_jax.evaluation.generation_settings import GenerationSettings
from elm_jax.experts.overlay import resolve, save_expert
from elm_jax.experts.rendering import frame_of
from elm_jax.workflows.evaluate.evaluate_models import ScoringSetup, model_of
from elm_jax.workflows.generate import GenerateConfig, Panel, Question, read_questions
from elm_jax.workflows.merge.merge_overlays import make_card
from elm_jax.workflows.route import task_instances
from elm_jax.workflows.row_routes import route_rows
from elm_jax.workflows.train.train_expert import framed, train

TEXTS = ("What is this text about? The team won the match.", "Good or bad? I liked every minute of it.")
FEW = GenerationSettings(max_new_tokens=6)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def chat_base(world, tmp_path_factory):
    """The base with a chat template, as a tokenizer of Hugging Face's form brings it."""
    folder = tmp_path_factory.mktemp("chat") / "base"
    shutil.copytree(world.base.path, folder)
    facts = json.loads((folder / "base.json").read_text())
    facts["facts"] = {"hf": {"tokenizer": {"tokenizer_config.json": {"chat_template": TEMPLATE}}}}
    (folder / "base.json").write_text(json.dumps(facts))
    return elm.load_base(folder)


def run(capsys, *words):
    """The JSON object that the verb prints."""
    assert main.main(["generate", *map(str, words), "--max_new_tokens", "6", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_verb_says_what_python_says(world, capsys):
    """The base, then two experts on the base that their cards name."""
    told = run(capsys, "--base", world.base.path, *TEXTS)
    assert told["settings"] == FEW.to_dict() and [row["expert"] for row in told["answers"]] == ["base"] * 2
    assert [row["text"] for row in told["answers"]] == elm.generate(world.base, None, TEXTS, max_new_tokens=6)
    folders = [word for name in ("topic", "review") for word in ("--expert", world.folder / name)]
    told = run(capsys, *folders, *TEXTS)
    assert [(row["question"], row["expert"]) for row in told["answers"]] == [
        (number, name) for number in (0, 1) for name in (tiny.TOPIC, tiny.REVIEW)]
    for start, expert in enumerate((world.topic, world.review)):
        expected = elm.generate(world.base, expert, TEXTS, max_new_tokens=6)
        assert [row["text"] for row in told["answers"][start::2]] == expected
    assert set(told["answers"][0]) == {"question", "input", "expert", "text", "tokens", "finish", "rendering"}


def test_a_library_chooses_an_expert_for_each_question_and_says_why(world, capsys, tmp_path):
    config = elm.RouteConfig(world.library.path, task=tiny.REVIEW, num_queries=4, modules=tiny.MODULES)
    instances = [*task_instances(config), *task_instances(dataclasses.replace(config, task=tiny.TOPIC))]
    lines = [{"inputs": each.source, "choices": list(each.labels),
              "choices_expression": each.choices_expression} for each in instances]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    told = run(capsys, "--library", world.library.path, "--examples", tmp_path / "questions.jsonl")["answers"]
    assert [row["expert"] for row in told] == route_rows(world.library, instances)
    assert {row["expert"] for row in told} == {tiny.TOPIC, tiny.REVIEW}
    sources = {row["source"]: row["expert"] for row in world.library.instances}
    for row in told:
        routed = row["routed"]
        assert routed["expert"] == row["expert"] != routed["next_expert"]
        assert routed["similarity"] >= routed["next_similarity"]
        assert sources[routed["nearest"]] == row["expert"]
    for expert in (world.topic, world.review):
        own = [row for row in told if row["expert"] == expert.card.id]
        assert [row["text"] for row in own] == elm.generate(
            world.base, expert, [row["input"] for row in own], max_new_tokens=6)


def test_a_task_is_asked_as_it_renders_its_rows(world, capsys):
    rows = elm.TaskData(world.base.vocabulary, tiny.MODULES).split(tiny.REVIEW, "validation")
    words = ["--expert", world.folder / "review", "--task", tiny.REVIEW, "--module", *tiny.MODULES]
    told = run(capsys, *words, "--rows", "2")["answers"]
    assert [(row["input"], row["target"]) for row in told] == [
        (rows.text(number)["inputs"], rows.text(number)["targets"]) for number in (0, 1)]
    assert len(run(capsys, *words)["answers"]) == 3
    assert len(run(capsys, *words, "--split", "train", "--rows", "1")["answers"]) == 1


def test_free_texts_to_a_base_are_framed_by_its_template_and_experts_as_their_cards_say(
        world, chat_base, capsys, tmp_path):
    framed = [f"<user>{text}<assistant>" for text in TEXTS]
    plain, expected = (elm.generate(world.base, None, texts, max_new_tokens=6) for texts in (TEXTS, framed))
    assert plain != expected
    assert elm.generate(chat_base, None, TEXTS, max_new_tokens=6) == expected
    assert elm.generate(chat_base, None, TEXTS, chat=False, max_new_tokens=6) == plain
    told = run(capsys, "--base", chat_base.path, *TEXTS)["answers"]
    assert [(row["text"], row["rendering"]) for row in told] == [(text, "chat") for text in expected]
    told = run(capsys, "--base", chat_base.path, "--task", tiny.TOPIC, "--module", *tiny.MODULES)["answers"]
    assert {row["rendering"] for row in told} == {"plain"}
    card = dataclasses.replace(world.topic.card, rendering="chat")
    save_expert(tmp_path / "framed", dataclasses.replace(world.topic, card=card))
    for folder, rendering in ((world.folder / "topic", "plain"), (tmp_path / "framed", "chat")):
        told = run(capsys, "--base", chat_base.path, "--expert", folder, *TEXTS)["answers"]
        assert {row["rendering"] for row in told} == {rendering}
        assert [row["text"] for row in told] == elm.generate(
            world.base, world.topic, framed if rendering == "chat" else TEXTS, max_new_tokens=6)
    with pytest.raises(InputError, match="no chat template\n  where: the card of"):
        Panel(GenerateConfig(base=world.base.path, experts=(tmp_path / "framed",), texts=TEXTS))


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self):
        return True


def test_what_is_typed_is_answered_line_by_line(world, monkeypatch):
    expected = elm.generate(world.base, None, TEXTS, max_new_tokens=6)
    out, errors = Terminal(), io.StringIO()
    monkeypatch.setattr("sys.stdin", Terminal("\n".join([TEXTS[0], "", TEXTS[1]]) + "\n"))
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", errors)
    assert main.main(["generate", "--base", world.base.path, "--max_new_tokens", "6"]) == 0
    assert out.getvalue() == f"> {expected[0]}\n> > {expected[1]}\n> \n"
    assert "Ctrl-D" in errors.getvalue()


def test_a_terminal_gets_what_a_file_gets(world, monkeypatch, capsys):
    words = ["generate", "--library", str(world.library.path), "--max_new_tokens", "6", *TEXTS]
    assert main.main(words) == 0
    told = capsys.readouterr().out
    assert told.count("[text ") == 2 and "similarity" in told and "then mini_" in told
    monkeypatch.setattr("sys.stdout", out := Terminal())
    assert main.main(words) == 0
    assert out.getvalue() == told
    monkeypatch.undo()
    assert main.main(["generate", "--base", world.base.path, "--max_new_tokens", "6", TEXTS[0]]) == 0
    assert capsys.readouterr().out == elm.generate(world.base, None, TEXTS[0], max_new_tokens=6)[0] + "\n"


REFUSED = [
    ([], "There is no model to ask"),
    (["--base", "{base}"], "There is nothing to answer"),
    (["--base", "{base}", "--json"], "There is nothing to answer"),
    (["--base", "{base}", "  "], "A text to answer is empty"),
    (["--base", "{base}", "a", "--task", "b"], "Questions come from one place"),
    (["--library", "{library}", "--expert", "{topic}", "a"], "Experts come from one place"),
    (["--base", "{base}", "a", "--rows", "2"], "no effect without a task"),
    (["--base", "{base}", "a", "--split", "train"], "no effect without a task"),
    (["--base", "{base}", "a", "--encoder_dir", "x"], "no effect without a library"),
    (["--base", "{base}", "--task", "mini_topic__about_what", "--rows", "0"], "rows"),
    (["--base", "{base}", "a", "--top_k", "3"], "no effect without a temperature"),
    (["--base", "{base}", "a", "--seed", "3"], "no effect without a temperature"),
    (["--base", "{base}", "a", "--temperature", "-1"], "temperature"),
    (["--base", "{base}", "a", "--temperature", "1", "--top_p", "0"], "top_p"),
    (["--base", "{base}", "a", "--max_new_tokens", "0"], "max_new_tokens"),
    (["--base", "{base}", "a", "--stop", ""], "stop"),
    (["--base", "{base}", "a", "--chat"], "The base has no chat template"),
    (["--expert", "{topic}", "--expert", "{topic}", "a"], "An expert is given twice"),
    (["--base", "{other}", "--expert", "{topic}", "a"], "belongs to another base"),
    (["--base", "{base}", "--examples", "{empty}"], "Data file is empty"),
    (["--base", "{base}", "--examples", "{blank}"], "blank.jsonl, line 2"),
]


@pytest.mark.parametrize(("words", "reason"), REFUSED, ids=[" ".join(words)[-40:] for words, _ in REFUSED])
def test_what_is_wrong_is_status_2_and_one_clear_error(world, capsys, tmp_path, words, reason):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text('{"inputs": "a"}\n{"inputs": ""}\n')
    places = {"base": world.base.path, "other": world.other_base.path, "topic": world.folder / "topic",
              "library": world.library.path, "empty": tmp_path / "empty.jsonl",
              "blank": tmp_path / "blank.jsonl"}
    assert main.main(["generate", *(word.format(**places) for word in words)]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("elm generate: ") and reason in told.err


@pytest.mark.parametrize(("options", "reason"), [
    ({"texts": [3]}, "question is a text"), ({"texts": "half \udc00"}, "surrogate"),
    ({"top": 3}, "no such setting"),
    ({"seed": 1}, "without a temperature"), ({"chat": True}, "no chat template")])
def test_python_refuses_the_same(world, options, reason):
    with pytest.raises(InputError, match=reason):
        elm.generate(world.base, None, **{"texts": ["a"], **options})


def test_experts_of_one_id_are_told_apart(world):
    folder = str(world.folder / "topic")
    panel = Panel(GenerateConfig(experts=(folder, f"{folder}/expert"), texts=TEXTS, settings=FEW))
    assert len(panel.names) == 2 and all("topic" in name for name in panel.names)


def test_a_merged_expert_is_asked_as_all_its_parents_were(world):
    plain = world.topic.card
    framed = dataclasses.replace(plain, rendering="chat")
    settings = [{"method": "mean", "weights": [0.5, 0.5]}]
    for parents, rendering in (((plain, plain), "plain"), ((framed, framed), "chat"),
                               ((plain, framed), "plain")):
        assert make_card(parents, ["a", "b"], plain.network, settings, "m").rendering == rendering
    with pytest.raises(InputError, match="Unknown rendering"):
        dataclasses.replace(plain, rendering="loud")


def test_questions_say_where_they_come_from(world):
    config = GenerateConfig(base=world.base.path, texts=TEXTS, settings=FEW)
    assert read_questions(config)[1] == Question.free(TEXTS[1], "text 2")
    assert read_questions(GenerateConfig(base=world.base.path)) == []
    np.testing.assert_equal(Panel(config).names, ["base"])


def test_an_expert_of_the_chat_template_is_trained_and_scored_in_it(world, chat_base, tmp_path):
    config = tiny.train_config(chat_base, tmp_path / "run", rendering="chat",
                               prepared_dir=str(world.folder / "prepared"))
    data = tiny.make_data(chat_base, world.folder)
    expert = train(config, base=chat_base, data=data, mesh=tiny.one_device()).expert
    assert expert.card.rendering == "chat" and config.digest() != dataclasses.replace(
        config, rendering="plain").digest()
    rows = framed(config, chat_base, data).split(tiny.TOPIC, "train")
    texts = [rows.text(number)["inputs"] for number in range(len(rows))]
    whole = [[*chat_base.vocabulary.encode(chat_base.chat_template.ask(text)), 1] for text in texts]
    fits = [number for number, tokens in enumerate(whole) if len(tokens) <= tiny.LENGTHS["inputs"]]
    assert fits and all(rows.inputs(number).tolist() == whole[number] for number in fits)
    assert rows.info["chat_cut"] == len(rows) - len(fits)
    setup = ScoringSetup.of(chat_base, data=data, mesh=tiny.one_device(), max_rows=4,
                            settings=EvaluationSettings(source_length=64, max_new_tokens=4))
    (found,) = model_of(chat_base, expert).score([tiny.TOPIC], setup)
    framed_rows = data.with_frame(frame_of(chat_base, "chat", 64, "here")).split(tiny.TOPIC, "validation", 4)
    wanted = evaluate_task(*resolve(chat_base, expert), framed_rows, setup.scoring, "x")
    plain = evaluate_task(*resolve(chat_base, expert), setup.rows(tiny.TOPIC), setup.scoring, "x")
    assert found.predictions == wanted.predictions != plain.predictions
    assert found.rows[0]["settings"] != plain.rows[0]["settings"] and "rendering" not in plain.rows[0]
    row, cut = found.rows[0], framed_rows.info["chat_cut"]
    assert (row["rendering"], row["num_cut"]) == ("chat", cut)


def test_a_base_without_a_template_trains_and_scores_none_of_it(world, chat_base, tmp_path):
    chat = dataclasses.replace(world.topic, card=dataclasses.replace(world.topic.card, rendering="chat"))
    config = tiny.train_config(world.base, tmp_path / "run", rendering="chat")
    with pytest.raises(InputError, match=r"no chat template(.|\n)*train.rendering"):
        train(config, base=world.base, mesh=tiny.one_device())
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"no chat template(.|\n)*the card of"):
        elm.evaluate(world.base, chat, [tiny.TOPIC], data=tiny.make_data(world.base, world.folder))
    with pytest.raises(InputError, match="Exemplars are not put into chat templates"):
        train(dataclasses.replace(config, few_shot=2), base=chat_base, mesh=tiny.one_device())
    with pytest.raises(InputError, match="Unknown rendering 'chatty'"):
        dataclasses.replace(config, rendering="chatty")
