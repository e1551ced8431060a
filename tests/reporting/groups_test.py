"""Seen tasks by category and data set, and the benchmarks, against means and intervals by hand."""

import io
import json

import numpy as np
import pytest
from matplotlib import image
from rich.console import Console
from synthetic_study import facts_and_matrix, with_groups

from elm_jax.errors import InputError
from elm_jax.reporting import plots, report
from elm_jax.reporting.page_parts import Made
from elm_jax.reporting.samples import samples_table
from elm_jax.reporting.study_report import ReportOutcome, draw, heat_map_grid, oracle_ranks
from elm_jax.reporting.study_table import study_table

COUNT = 40


@pytest.fixture(scope="module")
def made() -> tuple[dict, dict, dict]:
    facts, matrix = with_groups(COUNT)
    return facts, matrix, study_table(facts, matrix)


def by_hand(values: dict[str, np.ndarray]) -> tuple[float, float, float]:
    """(value, low, high) of task -> f64[n]; the prompts of a data set share all of their instances."""
    datasets: dict[str, list[np.ndarray]] = {}
    for task, own in values.items():
        datasets.setdefault(task.split("__")[0], []).append(own.astype(np.float64))
    over_prompts = [np.stack(prompts).mean(axis=0) for prompts in datasets.values()]
    mean = np.mean([own.mean() for own in over_prompts])
    limits = [np.subtract(wilson_by_hand(own), own.mean()) for own in over_prompts]
    low, high = np.sqrt(np.square(limits).sum(axis=0)) / len(over_prompts)
    return mean, mean - low, mean + high


def wilson_by_hand(own: np.ndarray) -> list[float]:
    """The shares p of which own's mean m is 1.96 standard errors away: (m - p)^2 = z^2 p (1 - p) / n."""
    mean, count = own.mean(), len(own)
    if 0 < mean < 1:  # as many rights and wrongs as have this mean's variance
        count = mean * (1 - mean) / (own.var(ddof=1) / count) + 1
    square = 1.959963984540054**2 / count
    return sorted(np.roots([1 + square, -2 * mean - square, mean**2]).real)


def values_of(row: str, facts: dict, matrix: dict, tasks: list[str]) -> dict[str, np.ndarray]:
    """What a row of the table scores on tasks, instance by instance."""
    experts = [expert["id"] for expert in facts["experts"]]
    choose = {
        "base": lambda task: matrix["base", task].values,
        "multitask": lambda task: matrix["multitask", task].values,
        "RoE top-1": lambda task: matrix[facts["decisions"][task]["ranking"][0]["expert"], task].values,
        "RoE top-3 merged": lambda task: matrix[facts["decisions"][task]["merged"], task].values,
        "dataset experts merged": lambda task: matrix["merged_dataset_experts", task].values,
        "oracle": lambda task: max((matrix[expert, task].values for expert in experts),
                                   key=lambda values: values.mean()),
        "random expert": lambda task: np.mean([matrix[expert, task].values for expert in experts], axis=0),
    }[row]
    return {task: choose(task) for task in tasks}


ROWS = ("base", "multitask", "RoE top-1", "RoE top-3 merged", "dataset experts merged", "oracle",
        "random expert")
TWO = ("gpt_3_style", "mnli_crowdsource")


def prompts_of(*datasets: str) -> list[str]:
    return [f"{name}__{prompt}" for name in datasets for prompt in TWO]


EXPECTED = {
    ("topic_classification", "accuracy"): prompts_of("ag_news", "trec"),
    ("multiple_choice_qa", "accuracy"): prompts_of("cosmos_qa", "qasc", "quarel"),
    ("paraphrase_identification", "accuracy"): prompts_of("paws_labeled_final"),
    ("sentiment", "accuracy"): prompts_of("rotten_tomatoes"),
    ("topic_classification", "rouge_l"): prompts_of("common_gen"),
}


@pytest.mark.parametrize("row", ROWS)
def test_categories_are_means_over_their_data_sets(made: tuple[dict, dict, dict], row: str) -> None:
    facts, matrix, table = made
    groups = {(group["label"], group["metric"]): group for group in table["by_category"]}
    assert list(groups) == list(EXPECTED)
    for key, tasks in EXPECTED.items():
        found = groups[key]["values"][row]
        expected = by_hand(values_of(row, facts, matrix, tasks))
        assert (found["value"], found["low"], found["high"]) == pytest.approx(expected, abs=1e-12)
        assert groups[key]["num_datasets"] == len(tasks) / 2
        ranked = key[1] == "accuracy"
        assert groups[key]["chance"] == (0.5 if ranked else None)
        assert groups[key]["majority"] == (pytest.approx(0.6) if ranked else None)


@pytest.mark.parametrize("row", ROWS)
def test_data_sets_and_benchmarks_have_their_own_means(made: tuple[dict, dict, dict], row: str) -> None:
    facts, matrix, table = made
    seen = {group["label"]: group for group in table["by_dataset"]}
    assert list(seen) == ["ag_news", "trec", "common_gen", "cosmos_qa", "qasc", "quarel",
                          "paws_labeled_final", "rotten_tomatoes"]  # category by category
    tested = {group["label"]: group for group in table["benchmarks"]}
    assert {name: (group["category"], group["metric"]) for name, group in tested.items()} == {
        "bigbench_winowhy": ("BIG-bench", "accuracy"), "bbh_navigate": ("BBH", "accuracy"),
        "bbh_dyck_languages": ("BBH", "rouge_l")}
    tasks = {name: prompts_of(name) for name in seen} | {
        "bigbench_winowhy": ["bigbench_winowhy__bigbench"], "bbh_navigate": ["bbh_navigate__bbh"],
        "bbh_dyck_languages": ["bbh_dyck_languages__bbh"]}
    for name, group in (seen | tested).items():
        found = group["values"][row]
        expected = by_hand(values_of(row, facts, matrix, tasks[name]))
        assert (found["value"], found["low"], found["high"]) == pytest.approx(expected, abs=1e-12)


def test_columns_hold_the_benchmarks_means(made: tuple[dict, dict, dict]) -> None:
    _, matrix, table = made
    assert table["columns"][-5:] == ["BIG-bench mean", "BBH mean", "seen ROUGE-L", "ROUGE-L", "BBH ROUGE-L"]
    base = table["rows"][0]["values"]
    for column, task in (("BIG-bench mean", "bigbench_winowhy__bigbench"), ("BBH mean", "bbh_navigate__bbh"),
                         ("BBH ROUGE-L", "bbh_dyck_languages__bbh")):
        assert base[column]["value"] == pytest.approx(matrix["base", task].values.mean(), abs=1e-12)


def render(facts: dict, matrix: dict) -> dict[str, str]:
    table = study_table(facts, matrix)
    extras = report.Extras(Made(), {"bars.png": b"x", "heat_map.png": b"x"}, {}, samples_table([]),
                           heat_map_grid(facts, matrix))
    texts = report.render(facts, table, oracle_ranks(facts, matrix), extras)
    return {kind: text.replace("<wbr>", "") for kind, text in texts.items()}  # where a name may break


def test_pages_hold_every_group_with_its_interval(made: tuple[dict, dict, dict]) -> None:
    facts, matrix, table = made
    for text in render(facts, matrix).values():
        for group in (*table["by_category"], *table["by_dataset"], *table["benchmarks"]):
            for found in group["values"].values():
                low, high = 100 * found["low"], 100 * found["high"]
                assert f"{100 * found['value']:.1f} [{low:.1f}, {high:.1f}]" in text
        assert "Wilson" in text and "paired bootstrap" in text and "±" not in text
        for words in ("multiple choice qa (3)", "topic classification ROUGE-L (1)", "paws_labeled_final",
                      "trained on 16 tasks together"):
            assert words in text


def test_absent_tasks_are_named_with_their_reason(made: tuple[dict, dict, dict]) -> None:
    facts, matrix, table = made
    texts = render(facts, matrix)
    assert "Not scored: bigbench_strategyqa: no data &lt;at all>." in texts["markdown"]
    assert "| bigbench_strategyqa | BIG-bench | absent: no data &lt;at all> | – |" in texts["markdown"]
    assert "absent: no data &lt;at all&gt;" in texts["html"] and "<at all>" not in texts["html"]
    screen = io.StringIO()
    ReportOutcome(None, table).print_table(Console(file=screen, width=200))
    assert "bigbench_strategyqa: no data" in screen.getvalue()
    grid = report.groups_grid(table, "benchmarks", "benchmark", table["absent"])
    assert {len(row) for row in grid["rows"]} == {len(grid["columns"])}


def test_benchmarks_of_which_all_is_absent_are_still_listed() -> None:
    facts, matrix = with_groups(10)
    texts = render({**facts, "bigbench_tasks": [], "bbh_tasks": []}, matrix)
    assert "absent: no data &lt;at all>" in texts["markdown"] and "BBH mean" not in texts["markdown"]


def test_older_studies_are_reported_without_what_they_did_not_keep() -> None:
    facts, matrix = facts_and_matrix(10)
    assert not {"categories", "bigbench_tasks", "bbh_tasks", "absent_tasks"} & set(facts)
    for text in render(facts, matrix).values():
        assert not any(words in text for words in ("By category", "By data set", "BIG-bench", "BBH",
                                                   "Not scored", "together"))


def test_without_any_category_the_data_sets_alone_are_shown() -> None:
    facts, matrix = with_groups(10)
    bare = {**facts, "categories": dict.fromkeys(facts["seen_tasks"])}
    text = render(bare, matrix)["markdown"]
    assert "By category" not in text and "By data set" in text
    some = {**facts, "categories": {**facts["categories"], "ag_news__gpt_3_style": None}}
    assert "no category (1)" in render(some, matrix)["markdown"]


def test_the_table_with_groups_is_json(made: tuple[dict, dict, dict]) -> None:
    assert json.loads(json.dumps(made[2], allow_nan=False)) == made[2]


def test_a_heat_map_of_many_tasks_grows_downwards() -> None:
    rng = np.random.default_rng(0)

    def picture(count: int) -> np.ndarray:
        tasks = [f"a_data_set_with_a_name__prompt_{number}" for number in range(count)]
        found = plots.heat_map(["one", "two"], tasks, rng.random((2, count)), rng.random(count),
                               {"one": tasks[-1:]})
        return image.imread(io.BytesIO(found))

    some, many = picture(plots.MOST_COLUMNS), picture(2 * plots.MOST_COLUMNS)
    assert many.shape[1] == pytest.approx(some.shape[1], rel=0.05)
    assert many.shape[0] > 1.7 * some.shape[0]
    assert len(np.unique(np.round(255 * many[-many.shape[0] // 2:, :, 0]))) > 20  # the lower half is no blank


@pytest.mark.parametrize(("sizes", "expected"), [
    ([5], [5]), ([18, 9, 6, 14, 27], [33, 41]), ([100, 3], [34, 33, 36]), ([0, 4, 0], [4]),
    ([40, 40], [40, 40])])
def test_panels_keep_groups_together_and_every_task_once(sizes: list[int], expected: list[int]) -> None:
    panels = plots.panels_of(sizes)
    assert [len(panel) for panel in panels] == expected
    assert np.concatenate(panels).tolist() == list(range(sum(sizes)))


def test_benchmarks_belong_to_the_matrix_and_to_its_picture(made: tuple[dict, dict, dict]) -> None:
    facts, matrix, table = made
    rest = {key: cell for key, cell in matrix.items() if key != ("base", "bbh_navigate__bbh")}
    for use in (lambda: draw(facts, rest, table), lambda: study_table(facts, rest)):
        with pytest.raises(InputError, match=r"(?s)missing.*expert base, task bbh_navigate__bbh"):
            use()
