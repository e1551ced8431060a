"""The embedded tasks: fixed, balanced, apart, and with labels that follow from the text."""

import collections
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from elm_jax.tasks import embedded
from elm_jax.tasks.embedded import datasets, news, opinions, reading
from elm_jax.tasks.embedded.draw import Draw, polish
from elm_jax.tasks.embedded.lexicon import KINDS
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from elm_jax.data.arrays.span_corruption import check_overlap
from elm_jax.data.prompts import templates
from elm_jax.data.registry import registry
from elm_jax.errors import InputError

NAMES = tuple(datasets.MAIN_FIELDS)
LABELS = {
    "mini_topic": ("topic", news.TOPICS), "mini_review": ("sentiment", opinions.SENTIMENTS),
    "mini_question": ("asks_for", opinions.QUESTIONS), "mini_entailment": ("follows", ("yes", "no")),
    "mini_emotion": ("emotion", opinions.EMOTIONS), "mini_product": ("category", opinions.PRODUCTS),
    "mini_paraphrase": ("same", ("yes", "no")), "mini_extraction": ("asks", ("who", "where", "when")),
}
_DIGEST = """
import hashlib, json, sys
from elm_jax.tasks.embedded import datasets
value = [datasets.rows(name, split) for name in datasets.MAIN_FIELDS for split in datasets.NUM_ROWS]
value.append(datasets.passages())
assert not {"tensorflow", "seqio", "torch", "sklearn"} & set(sys.modules)
print(hashlib.sha256(json.dumps(value).encode()).hexdigest())
"""
_IMPORT = """
import time, elm_jax
from elm_jax.data import registry
start = time.process_time()
import elm_jax.tasks.embedded
print(time.process_time() - start)
"""


def _run(code, **environment):
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, text=True,
                          capture_output=True, check=True)
    return done.stdout.strip()


@pytest.mark.slow
def test_rows_are_the_same_in_a_fresh_process_whatever_the_hash_seed():
    value = [datasets.rows(name, split) for name in NAMES for split in datasets.NUM_ROWS]
    value.append(datasets.passages())
    here = hashlib.sha256(json.dumps(value).encode()).hexdigest()
    assert _run(_DIGEST, PYTHONHASHSEED="1") == here
    assert _run(_DIGEST, PYTHONHASHSEED="77") == here


def test_rows_handed_out_are_copies_and_generated_anew_are_equal():
    first = datasets.rows("mini_topic", "train")
    before = json.dumps(first)
    first[0]["text"] = "spoiled"
    datasets._all_rows.cache_clear()
    assert json.dumps(datasets.rows("mini_topic", "train")) == before


def test_import_is_fast():
    assert float(_run(_IMPORT)) < 1.0


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_row_and_no_row_comes_twice(name):
    splits = {split: datasets.rows(name, split) for split in ("train", "validation")}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 600, "validation": 150}
    keys = [tuple(row[field] for field in datasets.MAIN_FIELDS[name])
            for rows in splits.values() for row in rows]
    assert len(set(keys)) == 750


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_balanced(name):
    field, labels = LABELS[name]
    for split, count in datasets.NUM_ROWS.items():
        counts = collections.Counter(row[field] for row in datasets.rows(name, split))
        assert set(counts) == set(labels)
        assert max(counts.values()) - min(counts.values()) <= 1
        assert sum(counts.values()) == count


@pytest.mark.parametrize(("name", "field"), [("mini_reading", "choices"), ("mini_ending", "endings")])
def test_the_right_choice_stands_at_every_place_about_equally_often(name, field):
    rows = datasets.rows(name, "train")
    places = collections.Counter(row[field].index(row["answer"]) for row in rows)
    number = len(rows[0][field])
    assert set(places) == set(range(number))
    assert all(abs(count / len(rows) - 1 / number) < 0.07 for count in places.values())
    assert all(len(set(row[field])) == number for row in rows)


@pytest.mark.parametrize(("name", "least"), [
    ("mini_topic", 0.9), ("mini_review", 0.85), ("mini_question", 0.85), ("mini_emotion", 0.9),
    ("mini_product", 0.9),
])
def test_words_tell_the_label(name, least):
    field, labels = LABELS[name]
    text = datasets.MAIN_FIELDS[name][0]
    rows, held = datasets.rows(name, "train"), datasets.rows(name, "validation")
    model = make_pipeline(CountVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=200))
    model.fit([row[text] for row in rows], [row[field] for row in rows])
    score = model.score([row[text] for row in held], [row[field] for row in held])
    assert score > least > 1.5 / len(labels)


@pytest.mark.parametrize(("name", "field"), [
    ("mini_entailment", "follows"), ("mini_paraphrase", "same")])
def test_the_first_sentence_alone_tells_nothing(name, field):
    text = datasets.MAIN_FIELDS[name][0]
    rows, held = datasets.rows(name, "train"), datasets.rows(name, "validation")
    model = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=200))
    model.fit([row[text] for row in rows], [row[field] for row in rows])
    score = model.score([row[text] for row in held], [row[field] for row in held])
    assert 0.35 < score < 0.65


def test_what_was_bought_decides_the_entailment():
    checked = 0
    for split in datasets.NUM_ROWS:
        for row in datasets.rows("mini_entailment", split):
            words = row["hypothesis"].rstrip(".").split(" bought a ")
            words = words if len(words) == 2 else row["hypothesis"].rstrip(".").split(" bought an ")
            if len(words) == 2 and words[1] in KINDS:
                buyer, kind = words
                is_kind = any(f" {thing} " in row["premise"] or f" {thing}." in row["premise"]
                              for thing in KINDS[kind])
                assert (row["follows"] == "yes") == (is_kind and buyer in row["premise"]), row
                checked += 1
    assert checked >= 20


def test_trades_and_ages_go_one_way():
    checked = 0
    for split in datasets.NUM_ROWS:
        for row in datasets.rows("mini_entailment", split):
            premise, words = row["premise"], row["hypothesis"].rstrip(".").split()
            if " bought the " in row["hypothesis"] and "from" in words:
                paid = premise.index(words[0]) > premise.index(words[-1])
                paid = not paid if " paid " in premise else paid
                assert (row["follows"] == "yes") == paid, row
                checked += 1
            if words[1:4] == ["is", "older", "than"] and words[0] != "Nobody":
                first_is_older = premise.index(words[0]) < premise.index(words[4])
                if premise.startswith("When "):
                    first_is_older = not first_is_older
                assert (row["follows"] == "yes") == first_is_older, row
                checked += 1
    assert checked >= 20


@pytest.mark.parametrize("name", ["mini_reading", "mini_extraction"])
def test_the_answer_stands_in_the_passage(name):
    for split in datasets.NUM_ROWS:
        for row in datasets.rows(name, split):
            assert row["answer"].lower() in row["passage"].lower()
            assert row["answer"].lower() not in row["question"].lower()
            if name == "mini_reading":
                assert row["answer"] in row["choices"]


def test_wrong_answers_are_of_other_sorts_or_of_the_same():
    rows = datasets.rows("mini_reading", "train")
    lists = {word.lower(): sort for sort, found in reading._WORDS.items() if sort in reading._SORTS
             for word in found}
    alike = 0
    for row in rows:
        sorts = [reading._SORTS[lists[choice.lower()]] for choice in row["choices"]]
        standing = sum(choice.lower() in row["passage"].lower() for choice in row["choices"])
        if len(set(sorts)) == 3:
            assert standing == 3, row
        else:
            alike += 1
            assert standing in (1, 2), row
    assert 0.25 < alike / len(rows) < 0.5


def test_a_written_text_says_what_its_record_says():
    for row in datasets.rows("mini_data_to_text", "validation"):
        values = [field.split(": ")[1] for field in row["data"].split("; ")]
        for value in values:
            if value != "concert":
                assert value.lower() in row["text"].lower(), (value, row)


@pytest.mark.parametrize(("name", "long", "short"), [
    ("mini_headline", "text", "headline"), ("mini_note", "note", "summary")])
def test_names_in_a_summary_come_from_the_text(name, long, short):
    for row in datasets.rows(name, "train"):
        names = [word.strip(".") for word in row[short].split()[1:] if word[0].isupper()]
        assert all(word.lower() in row[long].lower() for word in names), row
        assert len(row[short].split()) < len(row[long].split())


@pytest.mark.parametrize("task", [*embedded.TRAIN_TASKS, *embedded.UNSEEN_TASKS])
def test_every_prompt_renders_every_row(task):
    found = registry.get_task(task)
    for split in found.splits:
        rendered = list(found.render_rows(split))
        assert [index for index, _ in rendered] == list(range(datasets.NUM_ROWS[split]))
        lengths = [len(row.inputs.split()) for _, row in rendered]
        assert min(lengths) >= 12 and max(lengths) <= 70
        for _, row in rendered:
            assert "{" not in row.inputs + row.targets and "\n\n" not in row.inputs
            if found.kind == "rank":
                assert row.targets in row.choices and len(set(row.choices)) == len(row.choices)


def test_two_prompts_a_data_set_registered_by_name():
    assert len(datasets.TRAIN) == 8 and len(datasets.UNSEEN) == 5
    assert embedded.TRAIN_TASKS[0] == "mini_topic__which_section"
    for role, tasks in (("extra", embedded.TRAIN_TASKS), ("unseen_extra", embedded.UNSEEN_TASKS)):
        for name in tasks:
            task = registry.get_task(name)
            template = task.load_template()
            assert (task.role, task.name) == (role, templates.task_name(task.dataset, None, template.name))
            assert task.kind == template.kind
            assert task.splits == (("train", "validation") if role == "extra" else ("validation",))
            assert task.why_unavailable() is None
    for name in NAMES:
        assert len(registry.mixture_tasks(name)) == 2
    assert sorted(registry.mixture_tasks("embedded_train")) == sorted(embedded.TRAIN_TASKS)
    kinds = collections.Counter(registry.get_task(task).kind for task in embedded.UNSEEN_TASKS)
    assert kinds == {"rank": 8, "generation": 2}


def test_each_template_file_names_its_data_set_and_has_unlike_prompts():
    for name in NAMES:
        path = os.path.join(embedded.TEMPLATE_FOLDER, name, templates.FILE_NAME)
        with open(path, encoding="utf-8") as file:
            assert yaml.load(file, Loader=templates._TemplateLoader)["dataset"] == name
        found = templates.read_templates(path)
        assert set(found) == set(embedded.PROMPTS[name])
        assert len({prompt.jinja for prompt in found.values()}) == 2
    listed = {registry.get_task(task).load_template().choices_in_prompt for task in embedded.TRAIN_TASKS}
    assert listed == {True, False}


def test_passages_hold_nothing_that_is_evaluated():
    passages = embedded.passages()
    assert len(passages) == len(set(passages)) == datasets.NUM_PASSAGES
    assert all(2 <= len(datasets.sentences(text)) <= 5 for text in passages)
    joined = "\n".join(passages)
    for name in NAMES:
        for split in datasets.NUM_ROWS:
            for row in datasets.rows(name, split):
                assert not any(text in joined for text in datasets.texts(row)), row
    held = datasets.held_out()
    assert len(held) > 5000
    assert check_overlap(passages, held, words=12) == {}


def test_a_text_is_found_in_a_passage_by_its_sentences():
    whole = frozenset({("An owl.", "A hen?")})
    assert datasets._holds_one_of("One fox. An owl. A hen? Two dogs.", whole)
    assert not datasets._holds_one_of("An owl. One fox. A hen?", whole)


def test_passages_tell_good_from_bad_and_know_every_section():
    passages = embedded.passages()
    for verdicts in opinions._VERDICT.values():
        for verdict in verdicts:
            if "{" not in verdict:
                assert sum(polish(verdict) in text for text in passages) >= 10, verdict
    for word in ("league", "shares", "experiment", "ballot", "forecasters", "question"):
        assert sum(word in text for text in passages) >= 10, word


def test_passages_hold_every_answer_that_unseen_rows_choose_from():
    words = collections.Counter(re.findall(r"\w+", " ".join(embedded.passages()).lower()))
    for name in embedded.UNSEEN_TASKS:
        choices = [set(row.choices or ()) for _, row in registry.get_task(name).render_rows("validation")]
        if choices[0] and all(own == choices[0] for own in choices):  # not the endings, which are sentences
            assert all(words[choice.lower()] >= 10 for choice in choices[0]), (name, choices[0])


def test_passages_have_the_characters_of_the_prompts():
    known = set("".join(embedded.passages()))
    for name in (*embedded.TRAIN_TASKS, *embedded.UNSEEN_TASKS):
        for _, row in registry.get_task(name).render_rows("validation"):
            assert not set(row.inputs + row.targets) - known - {"\n"}, name


def test_no_passage_is_a_prompt_or_an_answer():
    passages = set(embedded.passages())
    for name in (*embedded.TRAIN_TASKS, *embedded.UNSEEN_TASKS):
        task = registry.get_task(name)
        for split in task.splits:
            for _, row in task.render_rows(split):
                assert row.inputs not in passages and row.targets not in passages
    answers = {row[field] for name, field in (("mini_headline", "headline"), ("mini_note", "summary"),
                                              ("mini_data_to_text", "text"))
               for split in datasets.NUM_ROWS for row in datasets.rows(name, split)}
    assert not answers & {sentence for text in passages for sentence in datasets.sentences(text)}


def test_an_unknown_data_set_or_split_is_a_clear_error():
    with pytest.raises(InputError, match="mini_topic"):
        datasets.rows("mini_topics", "train")
    with pytest.raises(InputError, match="no split 'test'"):
        datasets.rows("mini_topic", "test")


def test_draws_depend_on_the_key_alone_and_cover_their_range():
    assert [Draw("a", 1).number(0, 9) for _ in range(3)] == [Draw("a", 1).number(0, 9)] * 3
    draw = Draw("b")
    assert {draw.number(2, 4) for _ in range(100)} == {2, 3, 4}
    assert sorted(draw.shuffled("abcd")) == list("abcd")
    slots = {}
    text = draw.bind("{pet} and {pet2}", {"pet": ("Owl", "Hen")}, slots)
    assert sorted(text.split(" and ")) == ["Hen", "Owl"]


@pytest.mark.parametrize(("text", "better"), [
    ("a old man saw a owl.", "An old man saw an owl."), ("a university", "A university"),
    ("a umbrella", "An umbrella"), ("one. two", "One. Two"), ("a useful hen", "A useful hen"),
])
def test_polish(text, better):
    assert polish(text) == better


def test_tickets_are_letters_of_their_own():
    """No two share an opening or many words, no line is a form, filled in, no word gives a team away."""
    with open(embedded.TICKETS) as lines:
        tickets = [json.loads(line) for line in lines]
    teams = collections.Counter(ticket["team"] for ticket in tickets)
    assert len(tickets) == 240 and set(teams.values()) == {48} and len(teams) == 5
    words = [re.findall(r"[\w']+", ticket["text"].lower()) for ticket in tickets]
    runs = [run for each in words for run in set(zip(*(each[place:] for place in range(5)), strict=False))]
    assert len({tuple(each[:3]) for each in words}) == 240 and len(set(runs)) == len(runs)
    pairs = itertools.combinations(map(set, words), 2)
    shared = [len(one & other) / len(one | other) for one, other in pairs]
    assert max(shared) < 0.3
    by_word = collections.defaultdict(collections.Counter)
    for ticket, each in zip(tickets, words, strict=True):
        for word in set(each):
            by_word[word][ticket["team"]] += 1
    telling = {word: found for word, found in by_word.items()
               if max(found.values()) > 0.2 * 48 and max(found.values()) > 2 / 3 * sum(found.values())}
    assert telling == {}
    common = ("charge", "card", "label", "order", "address", "warranty")
    assert all(len(by_word[word]) >= 3 for word in common)
