"""One expert on one task: the same numbers on every mesh, in any order, at any batch size."""

import collections
import dataclasses

import numpy as np
import pytest
from rouge_score import rouge_scorer
from t5_rows import choice_batch
from tiny_model import (
    VOCAB_SIZE,
    generation_rows,
    network,
    parameters,
    rank_rows,
    split_of,
    tokens,
    vocabulary,
)

from elm_jax.data.arrays.batches import padded, trim
from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.errors import InputError, RunError
from elm_jax.evaluation import batch_plan, rank
from elm_jax.evaluation.answers import read_answers
from elm_jax.evaluation.batch_plan import TaskInstances
from elm_jax.evaluation.evaluator import EvaluationSettings, ResultsStore, Scoring, evaluate_task
from elm_jax.evaluation.rank import score_choices
from elm_jax.evaluation.results import TaskResult
from elm_jax.models.decode import greedy
from elm_jax.models.decoder.config import DecoderConfig
from elm_jax.models.decoder.network import DecoderNetwork
from elm_jax.runtime import sharding, trees

SETTINGS = EvaluationSettings(
    source_length=24, max_new_tokens=6, tokens_per_batch=512, source_buckets=(12, 64),
    target_buckets=(4, 8))
ONE_SHAPE = dataclasses.replace(SETTINGS, source_buckets=(24,), target_buckets=(16,))
NETWORK = network()


def evaluate(split: PreparedSplit, settings: EvaluationSettings = SETTINGS, data: int = 1,
             model: int = 1, params: dict | None = None) -> TaskResult:
    mesh = sharding.make_mesh(data, model)
    params = parameters(NETWORK) if params is None else params
    params = sharding.put_tree(params, sharding.tree_shardings(
        NETWORK.logical_axes(), params, mesh))
    scoring = Scoring(settings, vocabulary(), mesh, base="sha256:abc", max_rows=30)
    return evaluate_task(NETWORK, params, split, scoring, "mine")


def assert_same(found: TaskResult, expected: TaskResult) -> None:
    for one, other in zip(found.predictions, expected.predictions, strict=True):
        assert {**one, "scores": None} == {**other, "scores": None}
        if "scores" in one:
            np.testing.assert_allclose(one["scores"], other["scores"], rtol=0, atol=1e-5)
    assert {**found.rows[0], "seconds": 0} == {**expected.rows[0], "seconds": 0}


@pytest.fixture(scope="module")
def ranked() -> TaskResult:
    return evaluate(split_of(rank_rows(), "rank"), ONE_SHAPE)


@pytest.fixture(scope="module")
def generated() -> TaskResult:
    return evaluate(split_of(generation_rows(), "generation"), ONE_SHAPE)


def test_predictions_are_those_of_each_instance_alone(ranked: TaskResult) -> None:
    rows = rank_rows()
    for row, found in list(zip(rows, ranked.predictions, strict=True))[:8]:
        batch = choice_batch([row["inputs"]], [row["choices"]], source_length=24,
                                  target_length=16, num_choices=16, batch_size=1)
        scores = np.asarray(rank.score_choices(
            NETWORK, parameters(NETWORK), padded(batch, "inputs"), padded(batch, "choices")))[0]
        np.testing.assert_allclose(found["scores"], scores[:len(row["choices"])], atol=1e-5, rtol=0)
        best = int(scores[:len(row["choices"])].argmax())
        text = row["text"]
        assert found["index"] == text["index"]
        assert (found["prediction"], found["target"]) == (text["choices"][best], text["targets"])
        assert found["correct"] == int(text["choices"][best] == text["targets"])
        assert text["choices"][found["label"]] == text["targets"]


def test_row_of_a_ranked_task(ranked: TaskResult) -> None:
    correct = [found["correct"] for found in ranked.predictions]
    assert 0 < sum(correct) < len(correct) == 30
    row = dict(ranked.rows[0])
    assert row.pop("seconds") > 0
    assert 0 <= row.pop("ci95_low") < row["value"] < row.pop("ci95_high") <= 1
    places = collections.Counter(found["place"] for found in ranked.predictions)
    assert row.pop("top_answer_share") == max(places.values()) / 30
    assert row == {
        "schema_version": 3, "expert": "mine", "base": "sha256:abc", "task": "toys_small__ask_it",
        "interval": "wilson",
        "dataset": "toys/small", "template": "ask it", "split": "validation", "metric": "accuracy",
        "value": np.mean(correct), "num_instances": 30,
        "chance": pytest.approx(np.mean([1 / len(row["choices"]) for row in rank_rows()])),
        "settings": ONE_SHAPE.digest(30), "max_rows": 30, "source_length": 24,
        "num_cut": sum(len(row["inputs"]) > 24 for row in rank_rows())}
    assert 0 < ranked.rows[0]["num_cut"] < 30


def test_the_prompts_of_the_first_rows_are_kept_in_the_order_of_their_indices() -> None:
    rows = [{**row, "text": {**row["text"], "index": 29 - place}} for place, row in enumerate(rank_rows())]
    wanted = [{"index": row["text"]["index"], "prompt": row["text"]["inputs"]} for row in reversed(rows)]
    assert evaluate(split_of(rows, "rank"), ONE_SHAPE).prompts == wanted


def test_the_mean_of_a_choice_divides_its_sum_by_its_tokens(ranked: TaskResult) -> None:
    settings = dataclasses.replace(ONE_SHAPE, choice_score="mean")
    found = evaluate(split_of(rank_rows(), "rank"), settings)
    changed = 0
    for row, mean, total in zip(rank_rows(), found.predictions, ranked.predictions, strict=True):
        choices = row["choices"]
        expected = [score / len(choice) for score, choice in zip(total["scores"], choices, strict=True)]
        np.testing.assert_allclose(mean["scores"], expected, rtol=0, atol=2e-6)
        assert mean["prediction"] == row["text"]["choices"][int(np.argmax(expected))]
        changed += mean["prediction"] != total["prediction"]
    assert changed  # choices of unlike length change places
    assert found.rows[0]["choice_score"] == "mean" and "choice_score" not in ranked.rows[0]
    assert found.rows[0]["settings"] != ranked.rows[0]["settings"]


def test_more_metrics_divide_a_sum_by_characters_or_tokens(ranked: TaskResult) -> None:
    rows = rank_rows()
    for row in rows:
        names = [name[:3 + number] * (1 + number % 3) for number, name in enumerate(row["text"]["choices"])]
        label = row["text"]["choices"].index(row["text"]["targets"])
        row.update(label=label, text={**row["text"], "choices": names, "targets": names[label]})
    found = evaluate(split_of(rows, "rank"), dataclasses.replace(
        ONE_SHAPE, metrics=("acc_norm", "acc_norm_tokens", "bleu")))
    changed = {"acc_norm": 0, "acc_norm_tokens": 0}
    for row, one, total in zip(rows, found.predictions, ranked.predictions, strict=True):
        assert one["place"] == int(np.argmax(total["scores"])) and one["correct"] == total["correct"]
        lengths = {"acc_norm": map(len, row["text"]["choices"]), "acc_norm_tokens": map(len, row["choices"])}
        for metric, own in lengths.items():
            best = int(np.argmax(np.divide(total["scores"], list(own))))
            assert one[metric] == int(best == row["label"])
            changed[metric] += best != one["place"]
    assert all(changed.values())
    assert [row["metric"] for row in found.rows] == ["accuracy", "acc_norm", "acc_norm_tokens"]
    assert [row["value"] for row in found.rows] == [
        np.mean([one[field] for one in found.predictions]) for field in ("correct", *changed)]


def test_a_prediction_counts_the_score_of_its_choice(ranked: TaskResult) -> None:
    rows, rng = rank_rows(), np.random.default_rng(5)
    for number, row in enumerate(rows):
        scores = rng.choice([0.0, 0.0, 0.5, 1.0], len(row["choices"])) * (number % 5 > 0)
        best = row["text"]["choices"][int(scores.argmax())] if scores.any() else ""
        row["text"] = {**row["text"], "scores": scores.tolist(), "targets": best}
    found = evaluate(split_of(rows, "rank"), ONE_SHAPE)
    credit = [row["text"]["scores"][one["place"]] for row, one in zip(rows, found.predictions, strict=True)]
    assert [one["correct"] for one in found.predictions] == credit and 0.5 in credit
    assert found.rows[0]["value"] == pytest.approx(np.mean(credit))
    assert found.rows[0]["chance"] == pytest.approx(np.mean([np.mean(row["text"]["scores"]) for row in rows]))
    assert [one["prediction"] for one in found.predictions] == [
        one["prediction"] for one in ranked.predictions]
    best = max({name for row in rows for name in row["text"]["choices"]}, key=lambda name: sum(
        dict(zip(row["text"]["choices"], row["text"]["scores"], strict=True)).get(name, 0) for row in rows))
    answers = read_answers(found.predictions)
    assert not answers.by_position
    np.testing.assert_array_equal(answers.majority, [
        dict(zip(row["text"]["choices"], row["text"]["scores"], strict=True)).get(best, 0) for row in rows])


def test_of_several_right_texts_the_best_counts(generated: TaskResult) -> None:
    rows = generation_rows()
    said = [one["prediction"] for one in generated.predictions]
    for row, text in zip(rows, said, strict=True):
        row["text"] = {**row["text"], "references": [row["text"]["targets"], text]}
    found = evaluate(split_of(rows, "generation"), dataclasses.replace(ONE_SHAPE, metrics=("exact_match",)))
    assert [one["exact_match"] for one in found.predictions] == [1.0] * len(rows)
    assert all(one["rouge_l"] == 1.0 for one in found.predictions if one["prediction"].strip())
    assert found.rows[1]["value"] == 1.0 and found.rows[1]["ci95_low"] < 0.9


def test_num_cut_counts_the_inputs_that_lost_their_end() -> None:
    rng = np.random.default_rng(0)
    for source_length, num_cut in ((23, 2), (24, 1), (25, 0)):
        rows = generation_rows(3)
        for row, length in zip(rows, (5, 24, 25), strict=True):
            row["inputs"] = tokens(rng, length, length)
        settings = dataclasses.replace(ONE_SHAPE, source_length=source_length)
        assert evaluate(split_of(rows, "generation"), settings).rows[0]["num_cut"] == num_cut


def test_row_of_a_generation_task(generated: TaskResult) -> None:
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    for found, row in zip(generated.predictions, generation_rows(), strict=True):
        assert found["target"] == row["text"]["targets"]
        assert found["rouge_l"] == scorer.score(found["target"], found["prediction"])["rougeL"].fmeasure
    row = generated.rows[0]
    assert len({found["prediction"] for found in generated.predictions}) > 2
    assert (row["metric"], row["chance"], row["num_instances"]) == ("rouge_l", None, 14)
    assert row["value"] == pytest.approx(np.mean([one["rouge_l"] for one in generated.predictions]))
    assert row["ci95_low"] <= row["value"] <= row["ci95_high"]


@pytest.mark.parametrize(("data", "model"), [
    (4, 2), *(pytest.param(*mesh, marks=pytest.mark.slow) for mesh in ((8, 1), (2, 4)))])
def test_meshes_give_the_same_numbers(
    data: int, model: int, ranked: TaskResult, generated: TaskResult
) -> None:
    """The same as on the mesh 1x1, which the fixtures use."""
    assert_same(evaluate(split_of(rank_rows(), "rank"), ONE_SHAPE, data, model), ranked)
    sources = split_of(generation_rows(), "generation")
    assert_same(evaluate(sources, ONE_SHAPE, data, model), generated)


def test_order_and_buckets_do_not_matter(ranked: TaskResult, generated: TaskResult) -> None:
    order = np.random.default_rng(1).permutation
    rows, sources = rank_rows(), generation_rows()
    assert_same(evaluate(split_of([rows[at] for at in order(30)], "rank")), ranked)
    assert_same(evaluate(split_of([sources[at] for at in order(14)], "generation")), generated)


@pytest.mark.parametrize("budget", [1, 100_000])
def test_budget_does_not_matter(budget: int, ranked: TaskResult, generated: TaskResult) -> None:
    settings = dataclasses.replace(ONE_SHAPE, tokens_per_batch=budget)
    assert_same(evaluate(split_of(rank_rows(), "rank"), settings), ranked)
    assert_same(evaluate(split_of(generation_rows(), "generation"), settings), generated)


def test_choices_longer_than_every_bucket_are_not_cut() -> None:
    rng = np.random.default_rng(3)
    stem = rng.integers(2, 60, 17).astype(np.int32)
    choices = [np.append(stem, [last, 1]).astype(np.int32) for last in range(5, 12)]
    choices.append(np.array([7, 1], np.int32))
    names = [f"n{number}" for number in range(8)]
    rows = [{"inputs": tokens(rng, 5, 9), "targets": choices[0], "choices": choices,
             "text": {"inputs": "q", "targets": "n0", "choices": names, "index": 0}}]
    settings = dataclasses.replace(SETTINGS, target_buckets=(4,))
    scores = evaluate(split_of(rows, "rank"), settings).predictions[0]["scores"]
    # Choices that differ in their last word only: cut, they would be the same.
    assert len(scores) == len(set(scores)) == 8
    batch = choice_batch([rows[0]["inputs"]], [choices], source_length=9, target_length=19,
                              num_choices=8, batch_size=1)
    whole = rank.score_choices(NETWORK, parameters(NETWORK), padded(batch, "inputs"), padded(batch,
                                                                                             "choices"))
    np.testing.assert_allclose(scores, whole[0], rtol=0, atol=1e-5)


def test_inputs_are_cut_to_the_source_length_with_eos(ranked: TaskResult) -> None:
    rows = rank_rows()
    long = [at for at, row in enumerate(rows) if len(row["inputs"]) > 24]
    assert long
    cut = [{**row, "inputs": trim(row["inputs"], 24, 1)} for row in rows]
    found = evaluate(split_of(cut, "rank"), ONE_SHAPE)
    assert (found.rows[0]["num_cut"], ranked.rows[0]["num_cut"]) == (0, len(long))
    found.rows[0]["num_cut"] = len(long)
    assert_same(found, ranked)
    of_left = PreparedSplit.from_rows("toys_small__ask_it", "validation", {
        **split_of(rows, "rank").info, "cut_prompt": "left"}, rows)
    left, ends = evaluate(of_left, ONE_SHAPE), [{**row, "inputs": row["inputs"][-24:]} for row in rows]
    assert left.predictions == evaluate(split_of(ends, "rank"), ONE_SHAPE).predictions != ranked.predictions
    assert (left.rows[0]["num_cut"], left.rows[0]["cut_prompt"]) == (len(long), "left")
    assert left.rows[0]["settings"] == ONE_SHAPE.digest(30, cut_prompt="left") != ranked.rows[0]["settings"]
    longer = evaluate(split_of(rows, "rank"), dataclasses.replace(ONE_SHAPE, source_length=40))
    assert longer.predictions[long[0]]["scores"] != pytest.approx(
        ranked.predictions[long[0]]["scores"], abs=1e-3)


def test_equal_choices_are_a_tie_that_the_first_wins_in_any_batch() -> None:
    rng = np.random.default_rng(0)
    rows = rank_rows(12)
    for row in rows:
        row["choices"] = [tokens(rng, 4, 4)] * len(row["choices"])
    for settings in (SETTINGS, ONE_SHAPE):
        found = evaluate(split_of(rows, "rank"), settings).predictions
        assert {one["prediction"] for one in found} == {"choice 0"}


def large(instances: TaskInstances) -> TaskInstances:
    """The same for a network whose rows of padding are worth saving."""
    return dataclasses.replace(instances, parameters=10**9)


@pytest.mark.parametrize("data_axis", [1, 4])
@pytest.mark.parametrize("kind", ["rank", "generation"])
def test_plan_holds_every_row_once_in_few_shapes(kind: str, data_axis: int) -> None:
    rows = rank_rows(200) if kind == "rank" else generation_rows(200)
    instances = large(TaskInstances.of(split_of(rows, kind), NETWORK, SETTINGS))
    split, choices = instances.split, instances.choices
    batches = list(batch_plan.plan_batches(instances, SETTINGS, data_axis))
    assert sorted(row for _, numbers in batches for row in numbers) == list(range(200))
    shapes = {shape for shape, _ in batches}
    # 2 lengths of inputs; at most 4 numbers (2, 4, 8, 16) and 3 lengths (4, 8, 16) of choices.
    assert len({(shape.source, shape.choices, shape.target) for shape in shapes}) == len(shapes)
    assert len(shapes) <= (24 if kind == "rank" else 2)
    for shape, numbers in batches:
        assert 1 <= len(numbers) <= shape.rows
        assert shape.rows % data_axis == 0
        share = shape.rows // data_axis
        cost = share * max(shape.source, 4 * shape.choices * shape.target)
        assert cost <= SETTINGS.tokens_per_batch or share == 1
        # A batch alone of its shape has at most as many rows of padding as others, or is one of 4.
        assert shape.rows <= max(2 * data_axis * -(-len(numbers) // data_axis), 4 * data_axis) or (
            sum(other == shape for other, _ in batches) > 1)
        for number in numbers:
            assert min(len(split.inputs(number)), SETTINGS.source_length) <= shape.source <= 24
            if choices:
                assert len(choices[number]) <= shape.choices
                assert max(map(len, choices[number])) <= shape.target
    # What is left over of a bucket joins a larger one where there is room.
    alone = sum(-(-count // shape.rows) for shape, count in _counts(instances, data_axis))
    assert len(batches) < alone if kind == "rank" and data_axis == 4 else len(batches) <= alone


def _counts(instances: TaskInstances, data_axis: int) -> list[tuple]:
    return list(collections.Counter(batch_plan.shape_of(instances, at, SETTINGS, data_axis)
                                    for at in range(len(instances.split))).items())


def test_few_rows_make_a_small_batch() -> None:
    """9 rows of 21 that a batch would hold: 16; a batch that is full beside them keeps its shape."""
    settings = dataclasses.replace(SETTINGS, source_buckets=(24,))
    for count, data_axis, sizes in ((3, 1, [4]), (4, 1, [4]), (9, 1, [16]), (9, 4, [16]), (17, 4, [32]),
                                    (22, 1, [21, 21])):
        rows = [{**row, "inputs": tokens(np.random.default_rng(0), 20, 24)} for row in generation_rows(count)]
        instances = TaskInstances.of(split_of(rows, "generation"), NETWORK, settings)
        batches = list(batch_plan.plan_batches(large(instances), settings, data_axis))
        assert [shape.rows for shape, _ in batches] == sizes
        assert len(instances.batch(*batches[-1])["inputs"]) == sizes[-1]
        # Where padding costs less than another program, there is one program for each bucket.
        assert {shape.rows for shape, _ in batch_plan.plan_batches(instances, settings, data_axis)} == {
            21 * data_axis}


def joined_instances(lengths: list[tuple[int, int]], kind: str = "rank", **settings: int) -> TaskInstances:
    """Rows of prompts and of two choices of these numbers of tokens, for a network with a context of 40."""
    rng = np.random.default_rng(0)
    rows = [{"inputs": tokens(rng, size + 1, size + 1), "targets": [3, 1],
             "choices": [tokens(rng, target, target), [4, 1]],
             "text": {"inputs": "q", "targets": "a", "choices": ["a", "b"], "index": index}}
            for index, (size, target) in enumerate(lengths)]
    own = dataclasses.replace(SETTINGS, **{"source_length": 40, **settings})
    return TaskInstances.of(split_of(rows, kind), DecoderNetwork(DecoderConfig(
        VOCAB_SIZE, 8, 1, 1, 8, 8, 1, max_length=40, pad_id=0, eos_id=1)), own)


def test_the_context_holds_rows_whose_padding_it_does_not_hold() -> None:
    settings = dataclasses.replace(SETTINGS, source_length=64)
    instances = joined_instances([(38, 2), (24, 16), (5, 3)], source_length=64)
    shapes = [batch_plan.shape_of(instances, row, settings, 1) for row in range(3)]
    assert [(shape.source, shape.target) for shape in shapes] == [(40, 4), (40, 16), (12, 4)]
    for shape, numbers in batch_plan.plan_batches(instances, settings, 1):
        assert instances.batch(shape, numbers)["inputs"].shape == (shape.rows, shape.source)
    with pytest.raises(InputError, match=r"network's context(.|\n)*validation, row 1\n(.|\n)*"
                                         r"38 \+ 3 tokens(.|\n)*1 more(.|\n)*at most 40"):
        joined_instances([(38, 2), (38, 3), (5, 36)])
    written = joined_instances([(34, 2), (13, 2)], "generation", source_length=64)
    assert [batch_plan.shape_of(written, row, settings, 1).source for row in range(2)] == [34, 34]
    with pytest.raises(InputError, match=r"35 \+ 6 tokens(.|\n)*at most 40"):
        joined_instances([(34, 2), (35, 2)], "generation")


def _compiled_programs() -> int:
    return score_choices._cache_size() + greedy._cache_size()


def test_a_second_model_compiles_nothing(ranked: TaskResult, generated: TaskResult) -> None:
    splits = split_of(rank_rows(), "rank"), split_of(generation_rows(), "generation")
    before = _compiled_programs()
    other = parameters(NETWORK, 1)
    found = [evaluate(split, ONE_SHAPE, params=other) for split in splits]
    assert _compiled_programs() == before
    assert found[0].predictions != ranked.predictions
    assert found[1].predictions != generated.predictions


def test_settings_digest_is_of_what_can_change_a_number() -> None:
    digest = SETTINGS.digest(30)
    assert dataclasses.replace(SETTINGS, tokens_per_batch=1, target_buckets=(2,)).digest(30) == digest
    assert ONE_SHAPE.digest(30) == digest
    others = {SETTINGS.digest(None), SETTINGS.digest(31),
              dataclasses.replace(SETTINGS, source_length=25).digest(30),
              dataclasses.replace(SETTINGS, max_new_tokens=7).digest(30)}
    others |= {dataclasses.replace(SETTINGS, choice_score="mean").digest(30)}
    others |= {SETTINGS.digest(30, cut_prompt="left"), SETTINGS.digest(30, rendering="chat")}
    assert len(others | {digest}) == 8


@pytest.mark.parametrize(("name", "value"), [
    ("source_length", 0), ("max_new_tokens", -1), ("tokens_per_batch", 1.5), ("source_buckets", ()),
    ("target_buckets", (8, 4)), ("target_buckets", (4, 4)), ("source_buckets", (0, 4)),
])
def test_wrong_settings_are_named(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"Evaluation setting is wrong(.|\n)*{name}"):
        EvaluationSettings(**{name: value})


def test_a_choice_score_that_is_unknown_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"choice_score(.|\n)*mean"):
        EvaluationSettings(choice_score="maen")


def test_lists_of_buckets_are_taken() -> None:
    assert EvaluationSettings(source_buckets=[4, 8]) == EvaluationSettings(source_buckets=(4, 8))


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(InputError, match=r"nothing to evaluate(.|\n)*toys_small__ask_it"):
        evaluate(split_of([], "rank"))
    row = rank_rows(1)[0]
    row.update(choices=[], text={**row["text"], "choices": []}, label=-1)
    with pytest.raises(InputError, match=r"no choices(.|\n)*row 0"):
        evaluate(split_of([row], "rank"))


def test_scores_that_are_no_numbers_stop_the_run() -> None:
    flat = dict(trees.flatten(parameters(NETWORK)))
    flat["decoder/decoder_norm/scale"] = np.full_like(flat["decoder/decoder_norm/scale"], np.nan)
    with pytest.raises(RunError, match=r"not finite(.|\n)*toys_small__ask_it"):
        evaluate(split_of(rank_rows(), "rank"), ONE_SHAPE, params=trees.unflatten(flat))


def test_store_keeps_a_real_result(ranked: TaskResult, tmp_path: object) -> None:
    store = ResultsStore(tmp_path)
    store.append(ranked)
    again = ResultsStore(tmp_path)
    assert again.rows() == ranked.rows
    assert again.done("mine", "toys_small__ask_it", "validation", SETTINGS.digest(30))
    values = again.values("mine", "toys_small__ask_it")
    assert values.mean() == ranked.rows[0]["value"]
    assert again.predictions("mine", "toys_small__ask_it") == ranked.predictions
