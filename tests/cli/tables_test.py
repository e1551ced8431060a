"""Tables as people and scripts get them: on terminals of some widths, through a pipe, with hostile names."""

import csv
import io
import os
import random
import re
import sys
import threading
import tty

import pytest
import tiny_study as tiny
from rich.cells import cell_len

from elm_jax.cli import main
from elm_jax.cli.printing import Column, print_table, visible
from elm_jax.runtime.terminal.text_tables import fitted, separated
from elm_jax.workflows.farm import jobs

LEAF = "decoder/layers_0/mlp_adapter/up/bias"
TABLE = (Column("expert"), Column("task", 2), Column("value", 1, "number", "{:.2f}".format),
         Column("what it says", 3, "text"), Column("raw", where="scripts"))
HOSTILE = ["a\x1b[31mred\x1b[0m", "[bold]b[/bold]", "tab\there", "two\nlines", "\udc80", "\u202eback",
           '"quoted', ":smile:", "日本語の名前", "\x07\x9b31m"]


def on_terminal(monkeypatch, width, call):
    """What a call prints on a terminal of so many columns: a pseudo terminal, read while it is written."""
    master, slave = os.openpty()
    tty.setraw(slave)
    found = []

    def read():
        while part := os.read(master, 65536):
            found.append(part)
            if part.endswith(b"\0"):
                return

    reader = threading.Thread(target=read)
    reader.start()
    with open(slave, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        patch.setattr(sys, "stdout", stream)
        call()
        stream.write("\0")
        stream.flush()
        reader.join(10)
    os.close(master)
    return b"".join(found).decode()[:-1]


@pytest.mark.parametrize("width", [20, 40, 80, 100, None])
def test_names_are_whole_and_lines_fit(width):
    draw = random.Random(width or 0)
    for _ in range(30):
        rows = [("e" * draw.randint(1, 30), "t" * draw.randint(1, 66), draw.random(),
                 " ".join("w" * draw.randint(1, 9) for _ in range(draw.randint(0, 12))), 1)
                for _ in range(3)]
        lines, left_out = fitted(TABLE, rows, width)
        text = "\n".join(lines)
        if width is not None:
            longest = max(len(row[0]) for row in rows)
            if "expert:" in text:  # each cell on a line of its own
                longest = max(len(f"  {cell}") for row in rows for cell in row[:2])
            assert all(cell_len(line) <= max(width, longest) for line in lines)
        for row in rows:
            cells = [row[0], f"{row[2]:.2f}", row[1]]
            present = [cell for cell, name in zip(cells, ("expert", "value", "task"), strict=True)
                       if name not in left_out]
            assert all(re.search(rf"(^|\s){re.escape(cell)}($|\s)", text, re.MULTILINE) for cell in present)
        assert width is not None or not left_out


def test_nothing_in_a_name_acts_on_a_terminal_or_breaks_a_row(monkeypatch, capsys):
    rows = [(name, name, 0.5, name, name) for name in HOSTILE]
    print_table(TABLE, rows, title=HOSTILE[0])
    captured = capsys.readouterr()
    read = list(csv.reader(io.StringIO(captured.out), delimiter="\t"))
    assert read[0] == ["expert", "task", "value", "what it says", "raw"]
    assert [row[0] for row in read[1:]] == [
        r"a\x1b[31mred\x1b[0m", "[bold]b[/bold]", r"tab\there", r"two\nlines", r"\udc80", r"\u202eback",
        r"\"quoted", ":smile:", "日本語の名前", r"\x07\x9b31m"]
    assert all(len(row) == 5 and row[2] == "0.5" for row in read[1:])
    assert captured.err == r"a\x1b[31mred\x1b[0m" + "\n"
    for width in (20, 80, 200):
        printed = on_terminal(monkeypatch, width, lambda: print_table(TABLE, rows))
        assert all(char == "\n" or char.isprintable() for char in printed)
        assert all(visible(name) in printed for name in HOSTILE)


def test_numbers_are_whole_for_scripts():
    columns = (Column("a", show="{:.1f}".format), Column("b", where="people"), Column("c"), Column("d"))
    line = separated(columns, [(2 / 3, 1, None, ["x", "y"])])[1]
    assert line.split("\t") == [repr(2 / 3), "", "x, y"]


@pytest.fixture
def places(world, tmp_path, monkeypatch):
    """Verbs that print a table and compute nothing, each with the names that it has to show."""
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
    config = tiny.train_config(world.base, tmp_path / "run")
    jobs.create(tmp_path / "farm", [jobs.Job(f"expert-{number}-{'x' * 40}", config) for number in (0, 1)])
    module, library = ["--module", "elm_jax.tasks.embedded"], ["--library", str(world.folder / "library")]
    tasks = [tiny.TOPIC, tiny.REVIEW]
    return [
        (["tasks", "list", *module], tasks), (["tasks", "check", "mini_topic", *module], ["mini_topic"]),
        (["tasks", "list", "--missing"],
         ["dbpedia_14__given_a_list_of_category_what_does_the_title_belong_to"]),
        (["tasks", "stats", "--base", world.base.path, "--split", "validation", "--max_rows", "9", *module,
          *tasks], tasks),
        (["methods"], ["task_arithmetic"]), (["base", "list"], ["smollm2"]),
        (["library", "list", *library], tasks),
        (["route", *library, "--task", tiny.REVIEW, "--queries", "4", *module], tasks),
        (["farm", "status", "--dir", str(tmp_path / "farm")], [f"expert-1-{'x' * 40}"]),
        (["merge", "--dry_run", *(str(world.folder / name / "expert") for name in ("topic", "review"))],
         [LEAF]),
    ]


def test_every_verb_s_table_fits_80_and_100_columns_and_is_read_as_tsv(places, monkeypatch, capsys):
    for words, names in places:
        for width in (80, 100):
            printed = on_terminal(monkeypatch, width, lambda words=words: main.main(words))
            lines = printed.split("\n")
            assert all(cell_len(line) <= width for line in lines), (words, width, printed)
            assert all(any(name in line.split() for line in lines) for name in names), (words, printed[:500])
            assert "\x1b" not in printed
        capsys.readouterr()
        assert main.main(words) == 0
        head, *rows = csv.reader(io.StringIO(capsys.readouterr().out), delimiter="\t")
        assert all(len(row) == len(head) for row in rows) and len(set(head)) == len(head), words
        assert all(any(name in row for row in rows) for name in names)
    wide = on_terminal(monkeypatch, 80, lambda: main.main(["base", "list", "--wide"]))
    assert "not shown" not in wide and "file, or how to install it" in wide and len(wide.split("\n")) == 4


def test_tasks_are_listed_by_name_and_data(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "ag_news"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a", "label": 1}\n')
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))

    def listed(*words):
        assert main.main(["tasks", "list", *words, "--module", "elm_jax.tasks"]) == 0
        rows = csv.DictReader(io.StringIO(capsys.readouterr().out), delimiter="\t")
        return {row["task or mixture"]: row["data"] for row in rows}

    every, there, missing = listed(), listed("--has_data"), listed("--missing")
    assert set(there.values()) == {"yes"} and {"ag_news", "ag_news__classify"} <= set(there)
    assert set(missing.values()) == {"no"} and {"trec", "trec__trec1"} <= set(missing)
    assert {name for name, data in every.items() if data != "some"} == {*there, *missing}
    assert listed("trec__t*", "ag_") == {name: data for name, data in every.items()
                                         if name.startswith("trec__t") or "ag_" in name}
    assert main.main(["tasks", "list", "ag_newz*"]) == 2
    assert "nearest: " in capsys.readouterr().err
