"""What is known of how general experts are, as a file that may hold anything."""

import json

import pytest
from etils import epath

from elm_jax.errors import InputError
from elm_jax.experts.generality import generality_file, read_generality

SET = {"dataset": "a", "family": "f", "tasks": 1}
OTHER = {**SET, "dataset": "b"}


def written(folder, datasets, scores):
    """A library's folder with this generality of one expert."""
    path = generality_file(epath.Path(folder))
    path.parent.mkdir()
    path.write_text(json.dumps({"schema_version": 1, "datasets": datasets, "experts": {
        "e": {"created": "c", "fingerprint": None, "scores": scores}}}))
    return epath.Path(folder)


@pytest.mark.parametrize(("datasets", "scores", "fault"), [
    ([SET, {**SET, "family": "g"}], [0.5, 0.5], r"(?s)stands twice.*datasets/1/dataset.*got: a"),
    ([SET, {**OTHER, "tasks": 0}], [0.5, 0.5], "(?s)no tasks.*datasets/1/tasks"),
    ([SET, OTHER], [0.5, 1e300], r"(?s)experts/e/scores.*1e\+300.*2 normal scores"),
    ([SET, OTHER], [0.5, -11.0], "normal scores"), ([SET, OTHER], [0.5], "2 normal scores"),
    ([SET], [float("nan")], "generality.json"), ([SET], [10 ** 400], "generality.json")])
def test_what_no_calibration_writes_is_one_error(tmp_path, datasets, scores, fault):
    with pytest.raises(InputError, match=fault):
        read_generality(written(tmp_path, datasets, scores), {})


def test_normal_scores_of_different_data_sets_are_read(tmp_path):
    known = read_generality(written(tmp_path, [SET, OTHER], [-2.5, None]), {})
    assert [one.dataset for one in known.datasets] == ["a", "b"] and known.priors(["e"]) is None
