"""Picks of a study's routers against plain loops over a made-up library and made-up results."""

import zlib

import numpy as np
import pytest
from scipy import stats

from elm_jax.data.registry import registry
from elm_jax.evaluation.results import ResultsStore, TaskResult
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.library import ExpertLibrary
from elm_jax.reporting.study_table import halves
from elm_jax.routing.index import KeyIndex
from elm_jax.routing.router import ROUTERS
from elm_jax.routing.text import RoutingInstance
from elm_jax.workflows.study.study_routers import ComparedTasks, compare_routers
from tests.routing.index_test import FakeEncoder, unit_rows

SEEN = ("mini_topic__which_section", "mini_review__good_or_bad", "mini_question__asks_for",
        "mini_headline__write_a_headline")
UNSEEN = ("mini_emotion__name_the_emotion", "mini_ending__choose_the_ending")
HELDOUT = ("mini_topic__about_what",)
ROWS, QUERIES = 9, 3


class WordsEncoder(FakeEncoder):
    """Embeds a text as the unit row of a seed that the text gives."""

    def embed(self, texts):
        return np.concatenate([unit_rows(np.random.default_rng(zlib.crc32(text.encode())), 1)
                               for text in texts])


def texts_of(task):
    return [RoutingInstance(f"{task} {number}") for number in range(QUERIES)]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A library of one expert a seen task, its results, their values by (expert, task), and the picks."""
    registry.import_tasks(("elm_jax.tasks.embedded",))
    folder, rng, encoder = tmp_path_factory.mktemp("study"), np.random.default_rng(3), WordsEncoder()
    index = KeyIndex.empty(encoder, "instance")
    for task in SEEN:
        index = index.add(task, unit_rows(rng, 4))
    cards = [ExpertCard(task, "prompt", "adapter", {"name": "b", "fingerprint": "f"}, {}, tasks=(task,))
             for task in SEEN]
    library = ExpertLibrary(folder / "library", {"text_format": "instance"}, encoder, index, [],
                            {card.id: (card, 4) for card in cards})
    store, values = ResultsStore(folder / "results"), {}
    for expert in SEEN:
        for task in (*SEEN, *UNSEEN):
            ranked = task != SEEN[-1]
            values[expert, task], scores = rng.random(ROWS), rng.normal(size=(ROWS, 3))
            lines = [{"index": n, "prediction": "p", "target": "t", **(
                {"correct": value, "scores": scores[n].tolist(), "label": 0} if ranked else
                {"rouge_l": value})} for n, value in enumerate(values[expert, task])]
            row = {"schema_version": 3, "expert": expert, "task": task, "split": "validation",
                   "metric": "accuracy" if ranked else "rouge_l", "value": float(values[expert, task].mean()),
                   "num_instances": ROWS, "ci95_low": 0.0, "ci95_high": 1.0, "settings": "s",
                   "dataset": task.split("__")[0], "chance": None}
            store.append(TaskResult([row], lines))
    tasks = ComparedTasks(SEEN, UNSEEN, HELDOUT, (*SEEN, *UNSEEN), texts_of, QUERIES)
    record = compare_routers(library, store, tasks)
    rows = {(row["router"], row["queries"]): row for row in record["routers"]}
    return library, store, tasks, values, record, rows


def plain_prior(values, target):
    """Mean over other data sets and families of an expert's normal score among those not trained on each."""
    kin = {task: registry.get_task(task) for task in (*SEEN, *UNSEEN)}
    found = {expert: [] for expert in SEEN}
    for task, one in kin.items():
        own = [expert for expert in SEEN if kin[expert].dataset_name != one.dataset_name]
        if one.dataset_name == kin[target].dataset_name or (
                one.category is not None and one.category == kin[target].category):
            continue
        ranks = stats.rankdata([values[expert, task].mean() for expert in own])
        for expert, rank in zip(own, ranks, strict=True):
            found[expert].append(stats.norm.ppf((rank - 0.5) / len(own)))
    return {expert: np.mean(scores) if scores else 0.0 for expert, scores in found.items()}


def test_votes_are_of_the_nearest_keys_and_one_query_has_its_share(study):
    library, _, _, _, _, rows = study
    keys, owners = library.index.keys, library.index.owners
    for task in (*SEEN, *UNSEEN, *HELDOUT):
        queries = library.encoder.embed([one.source for one in texts_of(task)])
        nearest = [SEEN[owners[(keys @ query).argmax()]] for query in queries]
        shares = {expert: nearest.count(expert) / QUERIES for expert in nearest}
        if task in HELDOUT:
            assert rows["vote", 1]["new_home"] == {task: pytest.approx(shares.get(SEEN[0], 0.0))}
            continue
        assert rows["vote", 1]["picks"][task] == [pytest.approx(shares)]
        most = max(shares, key=lambda expert: (shares[expert], -nearest.index(expert)))
        assert rows["vote", QUERIES]["picks"][task] == [{most: 1.0}]
        if task in SEEN:
            assert rows["vote", QUERIES]["home"][task] == (most == task)


def test_priors_leave_the_target_s_data_set_and_family_out(study):
    values, rows = study[3], study[5]
    for task in (*SEEN, *UNSEEN):
        prior = plain_prior(values, task)
        assert rows["prior", 0]["picks"][task] == [{max(prior, key=prior.__getitem__): 1.0}]
    assert [queries for name, queries in rows if name == "prior"] == [0]  # asks no query


def test_routers_with_rows_choose_on_one_half_and_are_scored_on_the_other(study):
    values, rows = study[3], study[5]
    for task in (*SEEN, *UNSEEN):
        chosen = [max(SEEN, key=lambda expert: values[expert, task][half[:QUERIES]].mean())
                  for half in reversed(halves(ROWS))]
        assert rows["labelled", QUERIES]["picks"][task] == [{expert: 1.0} for expert in chosen]
        if task in SEEN:
            assert rows["labelled", QUERIES]["home"][task] == chosen.count(task) / 2
    assert rows["labelled", QUERIES]["new_home"] == {}  # nobody was scored there


def test_every_router_stands_in_the_table_or_is_left_out_with_a_reason(study):
    record, rows = study[4], study[5]
    assert {name for name, _ in rows} | {one["router"] for one in record["left_out"]} == set(ROUTERS)
    assert all(one["router"] == "fitted" and one["reason"] for one in record["left_out"])
    assert ("centroid", 0) in rows and ("vote", 0) not in rows and ("shortlist", 0) not in rows
