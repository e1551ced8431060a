"""Scoring against one full forward pass a choice."""

import jax
import numpy as np
import pytest
from t5_rows import choice_batch, rows, shift_right
from tiny_model import network, parameters, rank_rows

from elm_jax.data.arrays.batches import pad, padded
from elm_jax.evaluation import rank
from elm_jax.models.t5.network import T5Network


def full_pass_scores(
    net: T5Network, params: dict, inputs: np.ndarray, choices: list[np.ndarray]
) -> list[float]:
    """Sums of log-probabilities by plain forward passes, each choice with inputs of its own."""
    targets = pad(choices, 12, 0)
    logits = jax.jit(net.logits)(params, {
        "encoder_input_tokens": np.repeat(inputs[None], len(choices), axis=0),
        "decoder_input_tokens": shift_right(targets)})
    log_probs = np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)
    return [log_probs[number, np.arange(len(one)), one].sum() for number, one in enumerate(choices)]


@pytest.mark.parametrize("adapter", [False, True])
def test_scores_equal_a_full_forward_pass_a_choice(adapter: bool) -> None:
    net = network(adapter)
    params = parameters(net)
    found = rank_rows(2)
    batch = choice_batch([row["inputs"] for row in found], [row["choices"] for row in found],
                              source_length=48, target_length=16, num_choices=16, batch_size=4)
    scores = np.asarray(rank.score_choices(net, params, padded(batch, "inputs"), padded(batch, "choices")))
    assert scores.shape == (4, 16)
    for number, row in enumerate(found):
        expected = full_pass_scores(net, params, row["inputs"], row["choices"])
        np.testing.assert_allclose(scores[number, :len(expected)], expected, rtol=0, atol=1e-4)


def test_networks_of_equal_config_share_a_program() -> None:
    inputs, choices = rows(np.full((2, 7), 5, np.int32)), rows(np.full((2, 3, 5), 6, np.int32))
    before = rank.score_choices._cache_size()
    rank.score_choices(network(), parameters(network(), 0), inputs, choices)
    rank.score_choices(network(), parameters(network(), 1), inputs, choices)
    assert rank.score_choices._cache_size() == before + 1


def test_prediction_takes_the_first_of_equals_and_no_padding() -> None:
    scores = np.array([[-5.0, -2.0, 0.0], [-3.0, -3.0, -3.0], [-40.00002, -40.0, -50.0],
                       [-40.1, -40.0, -50.0], [-9.0, 0.0, 0.0]], np.float32)
    found = rank.predict(scores, np.array([2, 3, 3, 3, 1]))
    assert found.tolist() == [1, 0, 0, 1, 0]
    assert found.dtype == np.int32


def scored(rows: list[tuple[int, list[float], int]]) -> tuple[list[dict], list[float]]:
    """Targets and scores as SeqIO hands them on, rows of (index, scores, right place)."""
    targets = [{"index": index, "place": place, "credit": float(place == right), "length": 2,
                "num_choices": len(scores), "choice": "x"}
               for index, scores, right in rows for place in range(len(scores))]
    return targets, [score for _, scores, _ in rows for score in scores]


def test_accuracy_of_scores_counts_rows() -> None:
    targets, scores = scored([(7, [-3.0, -1.0, -2.0], 1), (2, [-1.0, -5.0], 1), (4, [-2.0, -9.0], 0)])
    order = np.random.default_rng(0).permutation(len(scores))
    found = rank.accuracy_of_scores([targets[place] for place in order], [scores[place] for place in order])
    assert found == {"accuracy": pytest.approx(200 / 3), "rows": 3}


def test_a_row_that_was_cut_off_does_not_count() -> None:
    targets, scores = scored([(0, [-1.0, -2.0], 0), (1, [-1.0, -2.0, -3.0], 2)])
    assert rank.accuracy_of_scores(targets[:4], scores[:4]) == {"accuracy": 100.0, "rows": 1}
    none = rank.accuracy_of_scores(targets[2:4], scores[2:4])
    assert none["rows"] == 0
    assert np.isnan(none["accuracy"])


def test_accuracy_of_scores_is_the_mean_credit() -> None:
    targets, scores = scored([(0, [-3.0, -1.0, -2.0], 1), (1, [-3.0, -4.0, -9.0], 1)])
    targets[3]["credit"] = 0.25
    assert rank.accuracy_of_scores(targets, scores)["accuracy"] == 62.5


def test_a_tie_is_what_float32_cannot_tell_apart_at_that_length() -> None:
    counts = np.array([2])
    for lengths, score, same, other in ((1500, -5650.0, 0.003, 0.05), (4, -12.0, 2e-5, 2e-4),
                                        (400, -1500.0, 5e-4, 5e-3)):
        for gap, place in ((same, 0), (other, 1)):
            scores = np.array([[score - gap, score]])
            for own in (np.full((1, 2), lengths), None):  # about the same where the length is not known
                assert rank.predict(scores, counts, rank.score_errors(scores, own))[0] == place, (score, gap)


def test_errors_of_both_scores_make_a_tie() -> None:
    """Each of two scores may be off by 0.1: 0.15 apart they may be equal, 0.25 apart they are not."""
    errors = np.full((2, 2), 0.1)
    found = rank.predict(np.asarray([[0.0, 0.15], [0.0, 0.25]]), np.asarray([2, 2]), errors)
    np.testing.assert_array_equal(found, [0, 1])


def test_of_equal_scores_the_first_choice_counts() -> None:
    targets, scores = scored([(0, [-40.0, -40.0 + 1e-5], 0), (1, [-40.0, -40.0 + 1e-5], 1)])
    assert rank.accuracy_of_scores(targets, scores)["accuracy"] == 50.0
