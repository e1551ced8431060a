"""The table of routers against plain loops, on made-up picks and a made-up matrix."""

import json

import numpy as np
import pytest
from synthetic_study import facts_and_matrix

from elm_jax.errors import InputError
from elm_jax.evaluation.intervals import over_datasets, share_over_datasets
from elm_jax.reporting.router_comparison import FILE, read_picks, router_comparison
from elm_jax.reporting.router_grid import routers_content
from elm_jax.reporting.study_table import halves
from elm_jax.routing.router import ROUTERS


def study_with_picks() -> tuple[dict, dict, dict]:
    """A study, and picks by votes, by one query of four, and by labelled rows of the other half."""
    facts, matrix = facts_and_matrix(25)
    library, rng = facts["library"], np.random.default_rng(0)
    tasks = [*facts["seen_tasks"], *facts["unseen_tasks"]]

    def row(router, queries, rows, make):
        home = {task: float(task in make) for task in facts["seen_tasks"]}
        return {"router": router, "queries": queries, "rows": rows, "home": home, "new_home": {},
                "picks": {task: make.get(task) or spread(rows) for task in tasks}}

    def spread(rows):
        one, other = rng.choice(library, 2, replace=False)
        return [{one: 1.0}, {other: 1.0}] if rows else [{one: 0.75, other: 0.25}]

    own = {task: [{task: 1.0}] for task in facts["seen_tasks"]}
    record = {"schema_version": 1, "experts": library, "default": "prior",
              "routers": [row("vote", 32, 0, own), row("vote", 1, 0, own), row("prior", 1, 0, {}),
                          row("labelled", 32, 8, own)],
              "left_out": [{"router": "centroid", "queries": 0, "reason": "no <text>"}],
              "priors": {"tasks": 3, "datasets": 2, "families": 1}}
    return facts, matrix, record


def plain_score(matrix, picks, tasks) -> dict[str, float]:
    """Score of each data set by loops over tasks, instances and experts."""
    found: dict[str, list[float]] = {}
    for task in tasks:
        total, first = 0.0, set(halves(25)[0].tolist())
        for number in range(25):
            shares = picks[task][0 if number in first else -1]
            total += sum(share * matrix[expert, task].values[number] for expert, share in shares.items())
        found.setdefault(task.split("__")[0], []).append(total / 25)
    return {name: sum(values) / len(values) for name, values in found.items()}


def test_the_table_is_that_of_plain_loops() -> None:
    facts, matrix, record = study_with_picks()
    table = router_comparison(facts, matrix, record)
    votes = plain_score(matrix, record["routers"][0]["picks"], facts["unseen_tasks"])
    references = {row["name"]: row for row in table["references"]}
    for row, one in zip(table["routers"], record["routers"], strict=True):
        scores = plain_score(matrix, one["picks"], facts["unseen_tasks"])
        mean = sum(scores.values()) / len(scores)
        assert row["unseen"]["value"] == pytest.approx(mean) and row["unseen"]["n"] == len(scores) == 5
        oracle = references["split-half oracle"]["unseen"]["value"]
        assert row["regret"]["value"] == pytest.approx(oracle - mean)
        if one is record["routers"][0]:
            assert row["difference"] is None
        else:
            assert row["difference"]["value"] == pytest.approx(
                sum(scores[name] - votes[name] for name in scores) / 5)
        assert row["home"] == row["home_by_votes"] - (one["router"] == "prior")
    everywhere = {task: [dict.fromkeys(record["experts"], 1 / len(record["experts"]))]
                  for task in facts["unseen_tasks"]}
    alike = plain_score(matrix, everywhere, facts["unseen_tasks"])
    assert references["random expert"]["unseen"]["value"] == pytest.approx(sum(alike.values()) / 5)


def test_an_interval_over_data_sets_is_that_of_all_ways_to_draw_them() -> None:
    """Of three data sets there are 27 draws; the bootstrap's ends are quantiles among their means."""
    values = np.array([0.1, 0.5, 0.9])
    means = sorted(np.mean([values[i], values[j], values[k]]) for i in range(3) for j in range(3)
                   for k in range(3))
    found = over_datasets(values)
    assert found.value == pytest.approx(0.5) and found.n == 3
    assert found.low == pytest.approx(means[0]) and found.high == pytest.approx(means[-1])  # each 1 of 27
    assert np.isnan(over_datasets(values[:1]).low)
    half = share_over_datasets(values / 2, values)
    assert (half.value, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))
    assert share_over_datasets(values, np.array([-0.1, 0.2, 0.2])) is None  # a gap that may be none


def test_cells_say_what_the_table_says_and_who_goes_home_less_often() -> None:
    facts, matrix, record = study_with_picks()
    table = router_comparison(facts, matrix, record)
    json.dumps(table, allow_nan=False)
    content = routers_content(table)
    cells = {(row[0], row[1]): row for row in content["grid"]["rows"]}
    score = table["routers"][3]["unseen"]["value"]
    assert cells["labelled", "32 + 8 rows"][2].startswith(f"{100 * score:.1f} [")
    assert cells["prior (default)", "1"][7] == "0.0" and cells["vote", "32"][3] == "–"
    assert content["lines"] == [
        "Seen tasks go home less often than by votes, with: prior (Q = 1); with all others at least as "
        "often.",
        "Not compared: centroid at Q = 0: no <text>."]
    assert routers_content(None) == {}


def test_picks_of_another_study_are_refused(tmp_path) -> None:
    facts, _, record = study_with_picks()
    assert read_picks(tmp_path, facts) is None
    (tmp_path / FILE).write_text(json.dumps(record))
    assert read_picks(tmp_path, facts)["experts"] == facts["library"]
    with pytest.raises(InputError, match="not those of the study's facts"):
        read_picks(tmp_path, {**facts, "library": facts["library"][1:]})


def test_a_router_of_an_older_version_is_shown_as_it_was_kept(tmp_path) -> None:
    """No table of routers is asked for the name; of a generation such a router may have no pick."""
    facts, matrix, record = study_with_picks()
    votes, generation = record["routers"][0], facts["seen_tasks"][-1]
    older = {**votes, "router": "of_old", "rows": 8, "picks": {**votes["picks"], generation: []},
             "home": dict.fromkeys(facts["seen_tasks"][:-1], 0.0)}
    (tmp_path / FILE).write_text(json.dumps({**record, "routers": [*record["routers"], older]}))
    table = router_comparison({**facts, "seen_tasks": facts["seen_tasks"][:-1]}, matrix,
                              read_picks(tmp_path, facts))
    assert "of_old" not in ROUTERS and routers_content(table)["grid"]["rows"][4][0] == "of_old"
