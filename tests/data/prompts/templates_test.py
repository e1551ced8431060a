"""Templates render as promptsource renders them, and run nothing that a file brings along."""

import importlib.util
import itertools
import json
import os
import pathlib
import random
import sys

import pytest
from checkout import ROOT
from golden_renders import load_promptsource

from elm_jax.data.prompts import templates
from elm_jax.data.prompts.templates import PromptTemplate
from elm_jax.data.registry import task_rows
from elm_jax.data.sources import row_files
from elm_jax.errors import InputError

DATA = pathlib.Path(os.environ.get("ELM_DATA_DIR")
                    or ROOT.parent / "shared" / "data")
ROW = {"text": "a ||| b", "label": 1, "words": ["x", "y", "y", "x", "z"], "long": "word " * 1000}


def template(jinja: str, answer_choices: str | None = None, **facts: object) -> PromptTemplate:
    return PromptTemplate("test", jinja, answer_choices, **facts)


@pytest.fixture(scope="module")
def promptsource_template():
    """promptsource's own class."""
    if (module := load_promptsource()) is None:
        pytest.skip("promptsource is not installed")
    return module.Template


def assert_same(reference: type, ours: PromptTemplate, row: dict, seed: int) -> None:
    """Both parts and choices, with and without truncation, after the same seed."""
    theirs = reference(ours.name, ours.jinja, "", None, ours.answer_choices)
    for truncate in (True, False):
        random.seed(seed)
        expected = theirs.apply(dict(row), truncate=truncate)
        assert ours.parts(row, seed=seed, truncate=truncate) == expected, ours.name
        rendered = ours.render(row, seed=seed, truncate=truncate)
        if rendered is None:
            assert len(expected) != 2 or not all(expected)
            continue
        assert [rendered.inputs, rendered.targets] == expected
        if ours.answer_choices and "choice" not in ours.answer_choices:
            assert list(rendered.choices) == theirs.get_answer_choices_list(row)


@pytest.mark.parametrize("jinja, answer_choices", [
    ("{{text}} ||| {{answer_choices[label]}}", "no ||| {{text}} ||| maybe"),
    ("{{words | most_frequent | join(' ')}} ||| {{words | choice}}", None),
    ("{{['one', 'two', 'three'] | choice}} {{words | choice}} ||| {{['b', 'c', 'd'] | choice}}", None),
    ("{{words | random}} ||| {{words | random}}", "{{words | choice}} ||| z"),
    ("{% for a, b in zip(words, words[1:]) %}{{a}}{{b}} {% endfor %} ||| {{long}}", None),
    ("{{long}} {{ text if label else long }} {# note #} ||| {{ {'a': label}['a'] }} ", None),
    ("{% if label == 2 %}{{text}} ||| yes{% endif %}", "yes ||| no"),
    ("only one part {{label}}", None),
    ("{{absent}} ||| {{words | length}}", None),
])
def test_rendering_equals_promptsource(promptsource_template, jinja, answer_choices):
    for seed in range(8):
        assert_same(promptsource_template, template(jinja, answer_choices), ROW, seed)


def usable_pairs() -> list[tuple[str, str | None]]:
    if not (DATA / "index.json").exists():
        return []
    entries = json.loads((DATA / "index.json").read_text())
    return [(entry["name"], entry["config"]) for entry in entries if entry["templates"]]


@pytest.mark.skipif(not usable_pairs(), reason="no data folder: set ELM_DATA_DIR")
def test_every_served_template_equals_promptsource(promptsource_template, monkeypatch):
    monkeypatch.setenv("ELM_DATA_DIR", str(DATA))
    compared = 0
    for dataset, config in usable_pairs():
        found = templates.find_templates(dataset, config, [DATA])
        templates.check_collisions(dataset, config, found)
        lines = row_files.read_lines(row_files.find_file(dataset, config, "validation"))
        rows = list(itertools.islice(lines, 3))
        unusable = set(row_files.read_index()[dataset, config].get("unusable_templates", ()))
        lacking = {name for name, value in found.items() if value.fields() - set(rows[0])}
        assert lacking == unusable, dataset
        for name in set(found) - unusable:
            for seed, row in enumerate(rows):
                assert_same(promptsource_template, found[name], row, seed)
            compared += 1
    assert compared == 260


def test_random_choice_is_fixed_by_the_seed():
    drawn = template("{{words | choice}} ||| {{words | choice}}")
    assert len({tuple(drawn.parts(ROW, seed=seed)) for seed in range(50)}) > 3
    assert all(drawn.parts(ROW, seed=7) == drawn.parts(ROW, seed=7) for _ in range(5))
    before = random.getstate()
    drawn.render(ROW, seed=1)
    assert random.getstate() == before  # the process's own generator is left alone


def test_fields_are_truncated_as_promptsource_does():
    rendered = template("{{long}} ||| {{label}}").render(ROW, seed=0)
    assert len(rendered.inputs) <= templates.TRUNCATED_FIELD and rendered.inputs.endswith("...")
    whole = template("{{long}} ||| {{label}}").render(ROW, seed=0, truncate=False)
    assert whole.inputs == ROW["long"].strip()


def test_separator_within_a_field_does_not_split():
    rendered = template("{{text}} ||| x {{text}}", "{{text}} ||| c").render(ROW, seed=0)
    assert rendered.inputs == "a ||| b"
    assert rendered.targets == "x a ||| b"
    assert rendered.choices == ("a ||| b", "c")
    assert rendered.choices_expression == "{{text}} ||| c"


@pytest.mark.parametrize("jinja", [
    "{{text}}", "{{text}} ||| ", " ||| {{text}}", "{{label}} ||| {{label}} ||| {{label}}",
    "{% if label == 0 %}{{text}} ||| yes{% endif %}",
])
def test_rows_without_input_or_target_are_skipped(jinja):
    assert template(jinja).render(ROW, seed=0) is None


def test_kind_follows_choices_and_metric():
    assert template("a ||| b", "b ||| c", metrics=("Accuracy",)).kind == "rank"
    assert template("a ||| b", "b ||| c", metrics=("BLEU",)).kind == "generation"
    assert template("a ||| b", None, metrics=("Accuracy",)).kind == "generation"


def test_fields_are_those_of_prompt_and_choices():
    found = template("{{text}}{% set n = label %}{{n}}{{zip(range(2))}} ||| {{answer_choices[0]}}",
                     "{{words | join('|||')}}")
    assert found.fields() == {"text", "label", "words"}


def test_missing_field_names_template_field_and_fields_present():
    with pytest.raises(InputError, match=r"(?s)'test'.*toys.*missing title.*fields among a, b"):
        template("{{title}} ||| {{a}}").check_fields(["a", "b"], "toys")


@pytest.mark.parametrize(("jinja", "row", "inputs"), [
    ("{% if hint is defined %}{{hint}} {% endif %}{{a}} ||| b", {"a": "x"}, "x"),
    ("{% if hint is defined %}{{hint}} {% endif %}{{a}} ||| b", {"a": "x", "hint": "h"}, "h x"),
    ("{% if hint is not defined %}{% set hint = 'h' %}{% endif %}{{hint}} {{a}} ||| b", {"a": "x"}, "h x"),
    ("{{hint | default('none')}} {{a}} ||| b", {"a": "x"}, "none x")])
def test_a_field_that_the_template_guards_may_be_missing(jinja, row, inputs):
    made = template(jinja)
    assert made.required_fields() == {"a"} and "hint" in made.fields() | {"hint"}
    rows = [row, {"a": "y", "hint": "z"}, row]
    found = [prompt for _, _, prompt in task_rows.rendered(
        enumerate(rows), made, str, truncate=True, ready=False)]
    assert found[0].inputs == found[2].inputs == inputs
    with pytest.raises(InputError, match="missing a"):
        made.check_fields(["hint"], "toys")


@pytest.mark.parametrize("jinja, message", [
    ("{{ ''.__class__.__mro__ }} ||| b", "SecurityError"),
    ("{{ text.__init__.__globals__ }} ||| b", "SecurityError"),
    ("{{ zip.mro() }} ||| b", "SecurityError"),
    ("{{ words[9].x }} ||| b", "UndefinedError"),
    ("{{ label / 0 }} ||| b", "ZeroDivisionError"),
    ("{{ text ||| b", "TemplateSyntaxError"),
])
def test_unsafe_and_failing_templates_are_refused(jinja, message):
    with pytest.raises(InputError, match=rf"(?s)Template 'test' fails.*text.*{message}"):
        template(jinja).parts(ROW, seed=0, truncate=False)


def test_a_source_that_would_compile_for_minutes_is_refused_at_once():
    large = template("{{text}}" * 200_000)
    for use in (large.fields, lambda: large.parts(ROW, seed=0)):
        with pytest.raises(InputError, match=r"too large to be compiled(.|\n)*200,000 parts(.|\n)*2,000"):
            use()
    assert template("{{label}}" * 2_000 + " ||| b").parts(ROW, seed=0, truncate=False)[0] == "1" * 2_000


def test_reserved_field_is_refused():
    with pytest.raises(InputError, match="answer_choices"):
        template("a ||| b").parts({"answer_choices": []}, seed=0)


YAML = """dataset: toys
templates:
  first: !Template
    answer_choices: no ||| yes
    jinja: '{{text}} ||| {{answer_choices[label]}}'
    metadata: !TemplateMetadata {choices_in_prompt: true, metrics: [Accuracy], original_task: true}
    name: 'First one '
    reference: somebody
"""


def write(folder: pathlib.Path, text: str) -> pathlib.Path:
    path = folder / "toys" / "templates.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_yaml_keeps_the_name_and_the_facts(tmp_path):
    found = templates.read_templates(write(tmp_path, YAML))["First one "]
    assert found == PromptTemplate(
        "First one ", "{{text}} ||| {{answer_choices[label]}}", "no ||| yes", ("Accuracy",), True,
        True, "somebody")


@pytest.mark.parametrize("text, message", [
    ("templates:\n  a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ("templates:\n  a: !Other {name: a, jinja: b}\n", "not valid YAML"),
    ("templates: [1, 2\n", "not valid YAML"),
    ("dataset: toys\n", "does not hold templates"),
    ("templates:\n  a: !Template {name: a}\n", "needs a name and a jinja"),
    (YAML + YAML.split("templates:\n")[1].replace("first:", "second:"), "one name"),
    (YAML.replace("{{text}}", "{{a}}" * 2001), "'First one ' is too large(?=.*template first.*2,002 parts)"),
    (YAML.replace("no |||", "n" * 100_001), "'First one ' is too large(?=.*template first.*100,0)"),
    ("a: &a {b: 1}\ntemplates:\n  <<: [*a, *a]\n", "not valid YAML(?=.*no merge keys)"),
    ("#" * 5_000_001, "too large"),
])
def test_bad_yaml_is_refused_with_its_file(tmp_path, text, message):
    with pytest.raises(InputError, match=rf"(?s){message}.*templates.yaml"):
        templates.read_templates(write(tmp_path, text))


def test_templates_are_found_in_folders_in_order(tmp_path):
    for folder, word in (("one", "{{text}}"), ("two", "other")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, YAML.replace("{{text}}", word))
    folders = [tmp_path / "none", tmp_path / "two", tmp_path / "one"]
    assert templates.find_template("toys", "any", "First one ", folders).jinja.startswith("other")
    write(tmp_path / "two", "templates: {a: {name: mine, jinja: '{{a}} ||| b'}}")
    templates._read_cached.cache_clear()
    assert templates.find_template("toys", "any", "First one ", folders).jinja.startswith("{{text}}"), (
        "a folder hides of the next ones only templates of its own names")
    assert {"mine", "First one "} <= set(templates.find_templates("toys", "any", folders))
    with pytest.raises(InputError, match=r"(?s)Unknown template 'mien'.*two.toys.*one.toys.*mine"):
        templates.find_template("toys", "any", "mien", folders)
    with pytest.raises(InputError, match="no templates for dolls"):
        templates.find_templates("dolls", None, folders)
    with pytest.raises(InputError, match=r"(?s)Unknown template 'First one'.*First one "):
        templates.find_template("toys", None, "First one", folders)


def test_installed_templates_are_found_without_importing_promptsource():
    if importlib.util.find_spec("promptsource") is None:
        pytest.skip("promptsource is not installed")
    modules = set(sys.modules)
    found = templates.find_templates("anli", "r2", [templates.installed_folder()])
    assert "MNLI crowdsource" in found
    assert "promptsource" not in set(sys.modules) - modules


@pytest.mark.parametrize("dataset, config, own, expected", [
    ("cosmos_qa", None, "no_prompt_text", "cosmos_qa__no_prompt_text"),
    ("super_glue", "rte", "MNLI crowdsource", "super_glue_rte__mnli_crowdsource"),
    ("super_glue", "wsc.fixed", "p is/are r", "super_glue_wsc_fixed__p_is_are_r"),
    ("imdb", None, "Sentiment with choices ", "imdb__sentiment_with_choices_"),
    ("super_glue", "copa", "C1 or C2? premise, so/because…",
     "super_glue_copa__c1_or_c2_premise_so_because_"),
])
def test_task_names(dataset, config, own, expected):
    assert templates.task_name(dataset, config, own) == expected


def test_colliding_names_are_refused():
    with pytest.raises(InputError, match=r"(?s)toys__a_b.*'a b' and 'A-b'"):
        templates.check_collisions("toys", None, ["a b", "c", "A-b"])
