"""The study's table against brute-force loops, and what it must refuse."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from synthetic_study import facts_and_matrix

from elm_jax.errors import InputError
from elm_jax.reporting import cells
from elm_jax.reporting import study_table as tables
from elm_jax.reporting.cells import Cell


def random_matrix(num_experts: int, num_instances: int, seed: int, rate: float = 0.5) -> dict:
    rng = np.random.default_rng(seed)
    return {(f"e{number}", task): Cell((rng.random(num_instances) < rate).astype(float),
                                       np.arange(num_instances), "accuracy", task[0], 0.5)
            for number in range(num_experts) for task in ("a__1", "a__2", "b__1")}


EXPERTS = [f"e{number}" for number in range(6)]
TASKS = ["a__1", "a__2", "b__1"]


def test_oracle_equals_a_loop() -> None:
    matrix = random_matrix(6, 31, seed=3)
    row = tables.oracle_row(matrix, EXPERTS, TASKS)
    for task in TASKS:
        best = max(float(np.mean(matrix[expert, task].values)) for expert in EXPERTS)
        assert row[task].values.mean() == best


def test_of_equal_experts_the_oracle_takes_the_first() -> None:
    values = [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
    matrix = {(f"e{n}", "a__1"): Cell(np.asarray(v), np.arange(2), "accuracy", "a", 0.5)
              for n, v in enumerate(values)}
    np.testing.assert_array_equal(
        tables.oracle_row(matrix, EXPERTS[:3], ["a__1"])["a__1"].values, [0.0, 1.0])


def test_only_what_one_expert_answered_counts_as_constant() -> None:
    matrix = {name: dataclasses.replace(cell, constant=name[0] == "e1")
              for name, cell in random_matrix(3, 31, seed=5).items()}
    matrix["e1", "a__1"].values[:] = 1  # the best there, and nowhere else
    for name in ("a__2", "b__1"):
        matrix["e1", name].values[:] = 0
    row = tables.oracle_row(matrix, EXPERTS[:3], TASKS)
    assert [cell.constant for cell in row.values()] == [True, False, False]
    assert not cells.always_constant(row) and not cells.always_constant({})
    assert cells.always_constant({"a__1": row["a__1"]})
    for mixed in (tables.split_half_oracle_row, tables.random_expert_row):
        assert not any(cell.constant for cell in mixed(matrix, ["e1", "e0"], TASKS).values())


def test_split_half_oracle_equals_a_loop_over_both_directions() -> None:
    matrix = random_matrix(6, 31, seed=4)
    row = tables.split_half_oracle_row(matrix, EXPERTS, TASKS)
    for task in TASKS:
        order = [int(i) for i in np.random.default_rng(tables.SPLIT_SEED).permutation(31)]
        halves = (order[:15], order[15:])
        expected = [0.0] * 31
        for chooser, scored in (halves, halves[::-1]):
            means = [sum(matrix[expert, task].values[i] for i in chooser) / len(chooser)
                     for expert in EXPERTS]
            winner = EXPERTS[means.index(max(means))]
            for i in scored:
                expected[i] = matrix[winner, task].values[i]
        assert row[task].values.tolist() == expected


def test_on_noise_the_oracle_is_biased_and_the_split_half_one_is_not() -> None:
    oracle, honest = [], []
    for seed in range(60):
        matrix = random_matrix(12, 60, seed)
        names = [f"e{number}" for number in range(12)]
        oracle.append(tables.oracle_row(matrix, names, TASKS)["b__1"].values.mean())
        honest.append(tables.split_half_oracle_row(matrix, names, TASKS)["b__1"].values.mean())
    assert np.mean(oracle) > 0.58
    assert abs(np.mean(honest) - 0.5) < 0.02  # 60 studies of 60 instances: standard error 0.008


def test_split_half_oracle_of_one_instance_chooses_nothing() -> None:
    matrix = {(f"e{n}", "a__1"): Cell(np.asarray([float(n == 1)]), np.arange(1), "accuracy", "a", 0.5)
              for n in range(4)}
    row = tables.split_half_oracle_row(matrix, EXPERTS[:4], ["a__1"])
    assert row["a__1"].values.tolist() == [0.25]


def test_split_half_single_expert_is_not_biased_by_prompts_that_share_instances() -> None:
    """A second prompt repeats the noise of some instances: halves drawn by prompt would leak it."""
    kept = np.flatnonzero(np.random.default_rng(1).random(60) < 0.75)
    values = []
    for seed in range(60):
        matrix = random_matrix(12, 60, seed)
        names = [f"e{number}" for number in range(12)]
        for name in names:
            matrix[name, "a__2"] = dataclasses.replace(
                matrix[name, "a__1"], values=matrix[name, "a__1"].values[kept], indices=kept)
        row = tables.split_half_single_row(matrix, names, TASKS[:2], TASKS)
        values.append(row["a__1"].values.mean())
    assert abs(np.mean(values) - 0.5) < 0.02


def test_split_half_single_expert_finds_a_truly_better_one() -> None:
    matrix = random_matrix(5, 200, seed=0)
    for task in TASKS:
        matrix["e3", task] = dataclasses.replace(matrix["e3", task], values=np.ones(200))
    row = tables.split_half_single_row(matrix, EXPERTS[:5], TASKS[:2], TASKS)
    assert all(row[task].values.mean() == 1.0 for task in TASKS)


def test_random_expert_is_the_exact_mean() -> None:
    matrix = random_matrix(6, 31, seed=5)
    row = tables.random_expert_row(matrix, EXPERTS, TASKS)
    expected = sum(float(matrix[expert, "b__1"].values.mean()) for expert in EXPERTS) / 6
    assert row["b__1"].values.mean() == pytest.approx(expected, abs=1e-12)


def test_macro_mean_is_over_prompts_then_data_sets() -> None:
    row = {name: Cell(np.full(4, value), np.arange(4), "accuracy", name[0], 0.5)
           for name, value in (("a__1", 0.2), ("a__2", 0.4), ("b__1", 0.9))}
    assert cells.macro_mean(row).value == pytest.approx((0.3 + 0.9) / 2)


def shared_prompts(rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """Three prompts of the same 80 instances, which they answer alike."""
    values = rng.random(80) < 0.7
    return [(values, np.arange(80))] * 3


def disjoint_prompts(rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """Two prompts of 40 and 360 instances that they do not share."""
    return [(rng.random(40) < 0.7, np.arange(40)), (rng.random(360) < 0.7, 40 + np.arange(360))]


def overlapping_prompts(rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """All of 300 instances, and 50 of them again, answered alike."""
    values = rng.random(300) < 0.7
    return [(values, np.arange(300)), (values[:50], np.arange(50))]


@pytest.mark.parametrize("prompts", [shared_prompts, disjoint_prompts, overlapping_prompts])
def test_interval_covers_the_truth_about_as_often_as_it_says(prompts: Callable) -> None:
    covered = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        row = {f"a__{number}": Cell(values.astype(float), indices, "accuracy", "a", 0.5)
               for number, (values, indices) in enumerate(prompts(rng))}
        row["b__1"] = Cell((rng.random(400) < 0.5).astype(float), np.arange(400), "accuracy", "b", 0.5)
        estimate = cells.macro_mean(row)
        covered += estimate.low <= 0.6 <= estimate.high
    assert 0.92 < covered / 400 < 0.98  # standard error 0.011


def test_variance_equals_the_textbook_one_for_the_same_and_for_disjoint_instances() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.random(30), rng.random(30)
    same = [Cell(values, np.arange(30), "accuracy", "a") for values in (one, two)]
    assert cells.dataset_variance(same) == pytest.approx(((one + two) / 2).var(ddof=1) / 30)
    short = one[:8]
    disjoint = [Cell(short, 50 + np.arange(8), "accuracy", "a"), same[1]]
    expected = (short.var(ddof=1) / 8 + two.var(ddof=1) / 30) / 4
    assert cells.dataset_variance(disjoint) == pytest.approx(expected)
    single = [Cell(one[:1], np.arange(1), "accuracy", "a"), same[1]]
    assert cells.dataset_variance(single) == pytest.approx((1 + two.var(ddof=1) / 30) / 4)


def test_paired_difference_is_narrower_than_unpaired() -> None:
    rng = np.random.default_rng(0)
    base = (rng.random(300) < 0.5).astype(float)
    better = np.where(rng.random(300) < 0.1, 1.0, base)
    row, other = ({"a__1": Cell(values, np.arange(300), "accuracy", "a", 0.5)}
                  for values in (better, base))
    estimate = cells.paired_difference(row, other)
    assert estimate.value == pytest.approx(float((better - base).mean()))
    half = 1.959963984540054 * (better - base).std(ddof=1) / np.sqrt(300)
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.15)
    assert half < 0.5 * (cells.macro_mean(row).high - cells.macro_mean(row).value)


def test_scores_of_1_and_0_have_intervals_within_0_and_1() -> None:
    facts, matrix = facts_and_matrix(10)
    for number, key in enumerate(list(matrix)):
        matrix[key] = dataclasses.replace(matrix[key], values=np.full(10, float(number % 3 > 0)))
    table = tables.study_table(facts, matrix)
    for row in table["rows"]:
        for found in row["values"].values():
            assert 0 <= found["low"] < found["high"] <= 1
        assert -1 <= row["difference"]["low"] < row["difference"]["high"] <= 1


def test_a_missing_cell_is_named() -> None:
    facts, matrix = facts_and_matrix(10)
    del matrix["trec-de", "super_glue_cb__gpt_3_style"]
    with pytest.raises(InputError, match=r"(?s)missing.*expert trec-de, task super_glue_cb__gpt_3_style"):
        tables.study_table(facts, matrix)


def test_experts_scored_on_other_instances_are_refused() -> None:
    facts, matrix = facts_and_matrix(10)
    key = ("trec-de", "super_glue_cb__gpt_3_style")
    matrix[key] = dataclasses.replace(matrix[key], indices=matrix[key].indices + 1)
    with pytest.raises(InputError, match=r"(?s)same instances.*super_glue_cb__gpt_3_style"):
        tables.study_table(facts, matrix)


def test_a_study_without_unseen_classification_is_refused() -> None:
    facts, matrix = facts_and_matrix(10)
    with pytest.raises(InputError, match="unseen tasks that are classified by rank"):
        tables.study_table({**facts, "unseen_tasks": []}, matrix)


def test_rows_and_columns_are_those_of_the_issue() -> None:
    facts, matrix = facts_and_matrix(10)
    table = tables.study_table(facts, matrix)
    names = [row["name"] for row in table["rows"]]
    assert names[:2] == ["base", "multitask"] and names[2].startswith("best single expert (")
    assert names[3:] == ["split-half best single expert", "RoE top-1", "RoE top-3 merged",
                         "dataset experts merged", "oracle", "split-half oracle", "random expert"]
    assert table["columns"] == ["seen mean", "super_glue_cb", "super_glue_copa", "super_glue_rte",
                                "winogrande_winogrande_xl", "anli_r1", "unseen mean", "seen ROUGE-L",
                                "ROUGE-L"]
    alike = table["rows"][1]["difference"]
    assert alike["low"] < alike["value"] == 0.0 < alike["high"] and alike["n"] == 50  # equal is not certain


def test_roe_rows_follow_the_decisions() -> None:
    facts, matrix = facts_and_matrix(10)
    rows = tables.rows_of_study(facts, matrix)
    for task, decision in facts["decisions"].items():
        assert rows["RoE top-1"][task] is matrix[decision["top_k"][0], task]
        assert rows["RoE top-3 merged"][task] is matrix[decision["merged"], task]


def test_majority_row_is_the_macro_mean_of_the_majority_answers() -> None:
    facts, matrix = facts_and_matrix(10)
    for prompt, right in (("gpt_3_style", 9), ("mnli_crowdsource", 7)):
        key = ("base", f"anli_r1__{prompt}")
        matrix[key] = dataclasses.replace(matrix[key], majority=(np.arange(10) < right).astype(float))
    table = tables.study_table(facts, matrix)
    assert table["majority"]["anli_r1"] == pytest.approx(0.8)
    assert table["majority"]["unseen mean"] == pytest.approx((4 * 0.6 + 0.8) / 5)
    assert table["majority"]["ROUGE-L"] is None
    assert table["majority_by_position"] == ["winogrande_winogrande_xl"]
    base = cells.select(tables.rows_of_study(facts, matrix)["base"], facts["unseen_tasks"], "accuracy")
    expected = cells.paired_difference(base, cells.majority_row(base))
    assert table["rows"][0]["over_majority"] == dataclasses.asdict(expected)


def test_a_majority_answer_that_is_not_known_leaves_its_columns_empty() -> None:
    facts, matrix = facts_and_matrix(10)
    for name, task in list(matrix):
        if task == "anli_r1__gpt_3_style":
            matrix[name, task] = dataclasses.replace(matrix[name, task], majority=None)
    table = tables.study_table(facts, matrix)
    assert table["majority"]["anli_r1"] is None and table["majority"]["unseen mean"] is None
    assert table["majority"]["super_glue_rte"] == pytest.approx(0.6)
    assert {row["over_majority"] for row in table["rows"]} == {None}


def test_an_expert_that_always_gives_the_majority_answer_does_not_beat_it() -> None:
    """Its base is worse than that, so it beats its base: the win that a report must not sell."""
    facts, matrix = facts_and_matrix(100)
    lazy, good = facts["library"][:2]
    majority = (np.arange(100) < 85).astype(float)
    for task, own in ((lazy, majority), (good, np.ones(100))):
        for name, values in (("base", (np.arange(100) < 70).astype(float)), (task, own)):
            matrix[name, task] = dataclasses.replace(
                matrix[name, task], values=values, majority=majority, constant=name == lazy)
    own = {row["expert"]: row for row in tables.study_table(facts, matrix)["own"]}
    assert own[lazy]["beats_base"] and not own[lazy]["beats_majority"]
    assert own[good]["beats_base"] and own[good]["beats_majority"]
    assert own[lazy]["constant"] and not own[good]["constant"]
    assert own[lazy]["majority"] == pytest.approx(0.85)
    rouge = next(row for row in own.values() if row["metric"] == "rouge_l")
    assert rouge["majority"] is None and rouge["beats_majority"] is None


def test_cut_inputs_are_counted_once_a_task() -> None:
    facts, matrix = facts_and_matrix(10)
    inputs = {row["task"]: row for row in tables.study_table(facts, matrix)["inputs"]}
    assert len(inputs) == len({task for _, task in matrix})
    assert inputs["winogrande_winogrande_xl__gpt_3_style"]["num_cut"] == 5
    assert sum(row["num_cut"] for row in inputs.values()) == 10
