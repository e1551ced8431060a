"""Rank scoring on SmolLM2's real weights: `elm evaluate` against transformers with a cache of the prompt.

ELM_AGREEMENT_ROWS says how many rows of each of three tasks (200 take two cores a quarter of an hour);
without it 12 rows of one task are scored.
"""

import copy
import os

import numpy as np
import pytest
import real_vocabularies as real
import smollm2

from elm_jax.cli.main import main
from elm_jax.data.registry import registry
from elm_jax.evaluation.results import ResultsStore
from elm_jax.vocabularies.vocabulary import Vocabulary

ROWS = int(os.environ.get("ELM_AGREEMENT_ROWS", "0"))
TASKS = ("ag_news__classify", "sciq__multiple_choice",
         "story_cloze_2016__choose_story_ending")[:3 if ROWS else 1]
NEAR = 1e-3
"""Two scores that differ by less may change places."""


pytestmark = smollm2.needs_file


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ResultsStore:
    real.need_data()
    folder = tmp_path_factory.mktemp("smollm2")
    assert main(["base", "get", "smollm2", str(folder / "base")]) == 0
    tasks = [word for task in TASKS for word in ("--task", task)]
    assert main(["evaluate", "--base", str(folder / "base"), *tasks, "--mesh_data", "1",
                 "--max_rows", str(ROWS or 12),
                 "--output", str(folder / "results.jsonl")]) == 0
    return ResultsStore(folder)


@pytest.fixture(scope="module")
def model():
    return smollm2.their_model()


def their_scores(model, ids: list[int], choices: list[list[int]]) -> np.ndarray:
    """Log-probability of each choice, by one pass over the prompt and one over each choice behind it."""
    import torch

    found = []
    with torch.inference_mode():
        prompt = model(input_ids=torch.tensor([ids]), use_cache=True)
        for choice in choices:
            cache = copy.deepcopy(prompt.past_key_values)
            rest = model(input_ids=torch.tensor([choice[:-1]]), past_key_values=cache).logits[0]
            logits = torch.cat([prompt.logits[0, -1:], rest]).double().log_softmax(-1)
            found.append(logits[range(len(choice)), choice].sum().item())
    return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_predictions_are_those_of_transformers(task, store, model):
    vocabulary = Vocabulary.load(store.folder / "base" / "tokenizer.json")
    split, = {row["split"] for row in store.rows() if row["task"] == task}
    for found, (prompt, texts) in zip(store.predictions("base", task, split), rendered(task, split, store),
                                      strict=True):
        choices = [[*vocabulary.encode(" " + text), vocabulary.eos_id] for text in texts]
        scores = their_scores(model, vocabulary.encode(prompt), choices)
        np.testing.assert_allclose(found["scores"], scores, rtol=0, atol=5e-3)
        best = scores.max()
        assert best - scores[texts.index(found["prediction"])] < NEAR, (found, scores)


def rendered(task, split, store):
    """Input and choices of the rows that were scored, as the task renders them."""
    rows = {index: (row.inputs, list(row.choices)) for index, row in
            registry.get_task(task).render_rows(split, None)}
    return [rows[found["index"]] for found in store.predictions("base", task, split)]
