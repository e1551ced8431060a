"""The majority answer and constant answers, read off predictions, against counting by hand."""

import numpy as np
import pytest

from elm_jax.evaluation.answers import read_answers


def ranked(choices: list[list[str]], labels: list[int], given: list[int], old: bool = False) -> list[dict]:
    """Predictions as the evaluator stores them; `old` without the position of the right choice."""
    found = []
    for number, (own, label, choice) in enumerate(zip(choices, labels, given, strict=True)):
        scores = [-9.0 - place for place in range(len(own))]
        scores[choice] = -1.0
        found.append({"index": number, "prediction": own[choice], "target": own[label],
                      "correct": int(choice == label), "scores": scores,
                      **({} if old else {"label": label})})
    return found


YES_NO = [["Yes", "No"]] * 5
STORIES = [[f"end {number}", f"other end {number}", f"third end {number}"] for number in range(5)]


@pytest.mark.parametrize("old", [False, True])
def test_of_choices_that_all_rows_share_the_majority_is_a_text(old: bool) -> None:
    choices = [["Yes", "No"], ["No", "Yes"], ["No", "Yes"], ["Yes", "No"], ["No", "Yes"]]
    answers = read_answers(ranked(choices, [1, 0, 0, 0, 1], [0, 1, 1, 0, 1], old))
    assert not answers.by_position
    np.testing.assert_array_equal(answers.majority, [1, 1, 1, 0, 0])  # No, No, No, Yes, Yes
    assert answers.constant and answers.top_share == (1.0, 5)  # Yes on every row, at unlike positions


def test_of_choices_of_each_row_the_majority_is_a_position() -> None:
    answers = read_answers(ranked(STORIES, [2, 0, 2, 1, 2], [1, 1, 1, 1, 1]))
    assert answers.by_position and answers.constant
    np.testing.assert_array_equal(answers.majority, [1, 0, 1, 0, 1])


def test_an_expert_of_two_answers_is_not_constant() -> None:
    assert not read_answers(ranked(YES_NO, [0, 0, 0, 0, 1], [0, 0, 0, 0, 1])).constant
    assert not read_answers(ranked(STORIES, [2, 0, 2, 1, 2], [1, 1, 1, 1, 0])).constant


def test_one_row_shows_no_constant_expert() -> None:
    assert not read_answers(ranked(YES_NO[:1], [0], [0])).constant


def test_old_results_tell_the_position_of_two_choices_and_not_of_three() -> None:
    pairs = [own[:2] for own in STORIES]
    labels, given = [1, 0, 1, 1, 0], [1, 1, 0, 1, 0]
    np.testing.assert_array_equal(read_answers(ranked(pairs, labels, given, old=True)).majority,
                                  read_answers(ranked(pairs, labels, given)).majority)
    unknown = read_answers(ranked(STORIES, labels, given, old=True))
    assert unknown.by_position and unknown.majority is None


def test_a_generation_has_no_majority_answer_but_may_be_constant() -> None:
    one = [{"index": n, "prediction": "the", "target": f"t{n}", "rouge_l": 0.1} for n in range(3)]
    assert read_answers(one).majority is None and read_answers(one).constant
    assert not read_answers([*one, {**one[0], "prediction": "a"}]).constant
