"""Benchmarks run, at their smallest: nothing else calls them."""

import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from checkout import ROOT


@pytest.mark.slow
def test_the_benchmarks_of_tiny_shapes_run():
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    for words in (["accelerator.py"], ["mixed_batch.py"], ["stacked.py", "--experts", "1,2"],
                  ["trunk_cache.py", "--tiny"], ["sparse.py", "--shapes", "tiny"],
                  ["sparse.py", "--shapes", "tiny", "--growth", "2,4"]):
        command = [sys.executable, str(ROOT / "benchmarks" / words[0]), *words[1:], "--rounds", "1"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("{"), done.stderr[-2000:]


def test_a_ranking_without_its_ties_gives_the_scores_of_ties(tmp_path, monkeypatch):
    """A stable sort hid which experts are equal: they have one score, better ones no less; copies too."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("router_table")
    rng = np.random.default_rng(0)
    experts = [f"{dataset}@{prompt}" for dataset in ("dream", "quail", "sciq") for prompt in "abcdef"]
    prompts = [f"{dataset}@{prompt}" for dataset in module.T5_LM for prompt in "xyz"]
    values = {prompt: dict(zip(experts, rng.integers(0, 4, len(experts)), strict=True)) for prompt in prompts}
    for scores in values.values():
        scores["dream@c"] = scores["dream@b"] = scores["dream@a"]  # copies
    lists = {prompt: sorted(experts, key=lambda one: -scores[one]) for prompt, scores in values.items()}
    picks = {prompt: [lists[prompt][0]] for prompt in prompts}
    for name, content in (("oracle_sorted", lists), ("ST_choice_instance_top1_32", picks)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    table = module.read_table(tmp_path)
    for prompt, scores in zip(table.prompts, table.scores, strict=True):
        true = np.array([values[prompt][expert] for expert in table.experts])
        assert all(len(set(scores[true == value])) == 1 for value in set(true))
        order = np.argsort(true)
        assert (np.diff(scores[order]) >= 0).all()
    copies = [table.experts.index(f"dream@{name}") for name in "abc"]
    assert table.copies[copies].tolist() == [copies[0]] * 3
    assert len(set(table.copies)) == len(experts) - 2
    first = {row: table.scores[row, voted[0]] for row, voted in enumerate(table.voted)}
    assert table.accuracy(first) == pytest.approx(module.REFERENCE)
