"""`elm tasks stats`, `check` and `show`, compared with counts of their own over real and broken rows."""

import csv
import gzip
import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import tiny_study as tiny

from elm_jax.cli import main
from elm_jax.data.registry import registry
from elm_jax.data.sources import row_files
from elm_jax.workflows.tasks import task_stats

TASKS = ["--module", "elm_jax.tasks"]
LONG = "one two three " * 120
TEMPLATES = """dataset: ag_news
templates:
  a: !Template
    answer_choices: World ||| Sports
    jinja: '{% if label < 3 %}{{text}} ||| {{answer_choices[label]}}{% endif %}'
    name: classify
  b: !Template
    answer_choices: null
    jinja: '{{missing}} ||| {{text}}'
    name: recommend
"""


def run(capsys, *words):
    status = main.main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def data(tmp_path, monkeypatch):
    """ag_news of six rows: four are whole, one is skipped, one has a label without a choice."""
    folder = tmp_path / "data" / "ag_news"
    folder.mkdir(parents=True)
    words = ["one", "one two", LONG, "four", "five", "six"]
    rows = [{"text": text, "label": label} for text, label in zip(words, [0, 1, 0, 1, 3, 2], strict=True)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "templates.yaml").write_text(TEMPLATES)
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def smallest_length(counts: list[int], percent: int) -> int:
    """The smallest of the counts that at least so many percent of them do not exceed, by its definition."""
    ordered = sorted(counts)
    return ordered[math.ceil(percent * len(ordered) / 100) - 1]


def test_stats_count_what_is_there(world, data, capsys):
    broken = ("{% if label < 2 %}{{text}} ||| {{answer_choices[label]}}"
              "{% elif label == 2 %}{{text}} |||{% endif %}")
    (data / "ag_news" / "templates.yaml").write_text(TEMPLATES.replace(
        "{% if label < 3 %}{{text}} ||| {{answer_choices[label]}}{% endif %}", broken))
    status, out, _ = run(capsys, "tasks", "stats", "--base", world.base.path, "--source_length", 20, "--json",
                         "--split", "train", *TASKS, "ag_news__classify")
    row, = json.loads(out)["splits"]
    encode = world.base.vocabulary.encode
    inputs = [len(encode(text)) + 1 for text in ("one", "one two", LONG.strip(), "four")]
    targets = [len(encode(text)) + 1 for text in ("World", "Sports", "World", "Sports")]
    assert status == 0 and (row["instances"], row["rows"], row["choices"]) == (6, 4, [2, 2])
    assert row["dropped"] == {"skipped by the template": 1, "target is empty": 1}
    for name, counts, length in (("inputs", inputs, 20), ("targets", targets, 128)):
        assert row[name]["max"] == max(counts) and row[name]["length"] == length
        assert row[name]["cut"] == sum(count > length for count in counts)
        assert row[name]["cut_share"] == np.mean([count > length for count in counts])
        assert row[name]["percentiles"] == {
            str(percent): smallest_length(counts, percent) for percent in (50, 90, 99)}
    _, out, err = run(capsys, "tasks", "stats", "--base", world.base.path, "--split", "train", *TASKS,
                      "ag_news__classify")
    printed, = csv.DictReader(io.StringIO(out), delimiter="\t")
    assert "dropped, target is empty: 1" in err and printed["input length"] == "256", "the recipe's"
    assert printed["rows"] == "4" and printed["input cut"] == "1" and printed["input max"] == str(max(inputs))


def test_lengths_are_the_recipe_s_or_those_of_evaluation():
    registry.import_tasks(["elm_jax.tasks"])
    assert task_stats.lengths_of("ag_news__classify") == {"inputs": 256, "targets": 128}
    assert task_stats.lengths_of("xsum__doc_tldr") == {"inputs": 512, "targets": 128}
    assert task_stats.lengths_of("super_glue_rte__can_we_infer") == {"inputs": 512, "targets": 128}
    assert task_stats.lengths_of("ag_news__classify", 64, 8) == {"inputs": 64, "targets": 8}


def test_stats_of_prepared_arrays_need_no_data(world, capsys, tmp_path, monkeypatch):
    world.data.split(tiny.REVIEW, "validation")
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
    words = ["tasks", "stats", "--base", world.base.path, "--json", "--split", "validation", tiny.REVIEW]
    of_rows = json.loads(run(capsys, *words)[1])
    of_arrays = json.loads(run(capsys, *words, "--prepared", world.folder / "prepared")[1])
    assert of_rows == of_arrays and of_rows["splits"][0]["rows"] == 150


def test_show_tells_what_is_cut_off(world, data, capsys):
    words = ["tasks", "show", "ag_news__classify", "--split", "train", "--base", world.base.path, *TASKS]
    status, out, _ = run(capsys, *words, "--source_length", 8, "--json")
    rows = json.loads(out)["rows"]
    encode = world.base.vocabulary.encode
    assert status == 0 and [row["row"] for row in rows] == [0, 1, 2]
    for row in rows:
        tokens = encode(row["input"])
        kept = tokens if len(tokens) < 8 else tokens[:7]
        assert row["tokens"]["input"] == len(tokens) + 1
        assert row["cut"]["input"] == {"length": 8, "text": world.base.vocabulary.decode(tokens[len(kept):])}
    assert rows[2]["cut"]["input"]["text"] and not rows[0]["cut"]["input"]["text"]
    _, out, _ = run(capsys, *words, "--source_length", 8)
    assert f"input tokens: {rows[2]['tokens']['input']} of at most 8, cut off: " in out
    bigbench = ["tasks", "show", "bigbench_winowhy__bigbench", *TASKS]
    assert run(capsys, *bigbench)[0] == 2, "no file; but its own split is asked for"


def test_check_finds_what_is_there_and_says_how_to_get_the_rest(data, capsys):
    status, out, err = run(capsys, "tasks", "check", "--json", *TASKS)
    rows = {(row["dataset"], row["config"]): row for row in json.loads(out)["datasets"]}
    assert rows["ag_news", None]["splits"] == {"train": 6} and rows["ag_news", None]["origin"] is None
    faults = rows["ag_news", None]["faults"]
    assert status == 1 and any("ag_news__recommend" in fault and "missing" in fault for fault in faults)
    assert not any("ag_news__classify:" in fault for fault in faults), "this template fits its rows"
    assert rows["glue", "qqp"]["origin"] == "datasets.load_dataset('glue', 'qqp')"
    assert "rocstories" in rows["story_cloze", "2016"]["origin"]
    assert "google/BIG-bench" in rows["bigbench", "winowhy"]["origin"]
    there = sum(bool(row["splits"]) for row in rows.values())
    status, out, err = run(capsys, "tasks", "check", *TASKS)
    assert status == 1 and f"{there} data sets are there" in err and "ag_news__recommend" in err
    assert "datasets.load_dataset('glue', 'qqp')" in out and len(out.splitlines()) == 1 + len(rows)
    asked = {("glue", "qnli"), ("glue", "qqp")} & set(rows)
    for words, expected in ((["--has_data"], {name for name, row in rows.items()
                                                 if row["splits"] and row["roles"] != ["extra"]}),
                            (["--missing", "ag*", "glue/q*"], asked)):
        found = json.loads(run(capsys, "tasks", "check", "--json", *words, *TASKS)[1])["datasets"]
        # Other files' tests may have registered tasks of their own ("extra") in this process.
        assert {(row["dataset"], row["config"]) for row in found if row["roles"] != ["extra"]} == expected
    assert run(capsys, "tasks", "check", "no_such_*", *TASKS)[0] == 2


def test_a_data_set_of_one_split_is_counted_and_cached(world, data, capsys, tmp_path):
    (data / "ag_news" / "templates.yaml").write_text(TEMPLATES.replace("{{missing}}", "{{label}}"))
    words = ["--base", world.base.path, *TASKS, "ag_news__classify"]
    status, out, err = run(capsys, "tasks", "stats", "--json", *words)
    splits = {(row["task"], row["split"]) for row in json.loads(out)["splits"]}
    assert status == 0 and splits == {("ag_news__classify", "train")}
    assert "ag_news__classify: there are no rows of validation" in err
    status, out, err = run(capsys, "tasks", "cache", "--prepared", tmp_path / "arrays", *words)
    row, = csv.DictReader(io.StringIO(out), delimiter="\t")
    assert status == 0 and (row["task"], row["split"]) == ("ag_news__classify", "train")
    assert (row["rows"], row["dropped"]) == ("4", "2") and "skipped by the template: 1" in row["why"]
    assert "preparing 1 split: 1 of 1, 4 rows, " in err and err.count("prepar") == 1
    assert "ag_news__classify: there are no rows of validation" in err
    rows = {row["dataset"]: row for row in json.loads(
        run(capsys, "tasks", "check", "--json", *TASKS)[1])["datasets"]}
    assert rows["ag_news"]["without"] == ["validation"]
    (data / "ag_news" / "test.jsonl").write_text('{"text": "a test row", "label": 0}\n')
    assert registry.get_task("ag_news__classify").num_rows("validation") == 1, "stands for validation"


def test_numbers_and_splits_that_are_none_are_refused(world, data, capsys):
    for words in (["show", "ag_news__classify", "--rows", "0"],
                  ["show", "ag_news__classify", "--source_length", "-4", "--base", world.base.path],
                  ["stats", "ag_news__classify", "--target_length", "0", "--base", world.base.path],
                  ["stats", "ag_news__classify", "--split", "tset", "--base", world.base.path]):
        status, _, err = run(capsys, "tasks", *words, *TASKS)
        assert status == 2 and ("a number above 0" in err or "train, validation" in err), words


def test_one_fault_does_not_keep_the_other_rows_from_stats(world, data, capsys):
    status, out, err = run(capsys, "tasks", "stats", "--json", "--base", world.base.path, "--split", "train",
                           *TASKS, "ag_news__recommend", "ag_news__classify")
    found = json.loads(out)
    assert status == 2 and [row["task"] for row in found["splits"]] == ["ag_news__classify"]
    assert len(found["faults"]) == 1 and "missing" in err


def test_check_reads_every_row(data, capsys):
    whole = gzip.compress(b"".join(b'{"text": "%d", "label": 1}\n' % number for number in range(5000)))
    (data / "ag_news" / "validation.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    (data / "trec").mkdir()
    (data / "trec" / "train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    status, out, err = run(capsys, "tasks", "check", *TASKS)
    assert status == 1 and "trec/train.jsonl, line 2" in err and "validation.jsonl.gz, line " in err
    assert "damaged" in out


@pytest.mark.slow
def test_check_of_the_whole_data_folder():
    if row_files.data_dir() is None:
        pytest.skip("no data folder: set ELM_DATA_DIR")
    # In a process of its own: other tests register tasks whose rows are gone.
    done = subprocess.run([sys.executable, "-m", "elm_jax.cli", "tasks", "check", "--json", *TASKS],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {(row["dataset"], row["config"]): row["splits"] for row in json.loads(done.stdout)["datasets"]}
    for (name, config), entry in row_files.read_index().items():
        own = found[name, config]  # the unseen ones' train splits are nobody's to read
        assert own == {split: entry["splits"][split] for split in own}, (name, config)
        assert "validation" in own or "test" in own
