"""What a library knows of its experts beside their cards: which are copies, and how general each is."""

import numpy as np
import pytest
from etils import epath

from elm_jax.errors import InputError
from elm_jax.experts import generality
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.copies import copies_among
from elm_jax.experts.generality import CalibratedDataset, CalibratedExpert, Generality

NAMES = [f"e{number}" for number in range(6)]


def instance(expert: str, text: str, labels: tuple[str, ...] = ()) -> dict:
    return {"expert": expert, "source": text, "choices_expression": None, "labels": list(labels)}


def test_equal_weights_and_equal_rows_are_copies_of_the_oldest():
    """Rows in any order; an expert may be a copy by way of another; equal lengths alone are no copies."""
    rows = {"e0": ["a", "bc"], "e1": ["x"], "e2": ["bc", "a"], "e3": ["y"], "e4": ["ab", "c"],
            "e5": ["x", "x"]}
    instances = [instance(name, text) for name, texts in rows.items() for text in texts]
    of = dict(zip(NAMES, "pqrstu", strict=True))
    assert copies_among(NAMES, of, instances).tolist() == [0, 1, 0, 3, 4, 5]
    assert copies_among(NAMES, {**of, "e3": "r", "e5": "q"}, instances).tolist() == [0, 1, 0, 0, 4, 1]
    assert copies_among(NAMES[:2], {"e0": None, "e1": None}, instances[:3]) is None
    labelled = [instance("e0", "a", ("yes",)), instance("e1", "a", ("no",))]
    assert copies_among(NAMES[:2], {}, labelled) is None
    keys = {"e0": np.eye(2, dtype=np.float32), "e1": np.ones((2, 2), np.float32), "e2": np.eye(2)[::-1],
            "e3": np.zeros((1, 2)), "e4": np.zeros((1, 2)), "e5": np.eye(2, dtype=np.float32)[:1]}
    keys = {name: rows.astype(np.float32) for name, rows in keys.items()}
    assert copies_among(NAMES, {}, [], keys).tolist() == [0, 1, 0, 3, 4, 5]


def card_of(name: str, created: str = "then") -> ExpertCard:
    return ExpertCard(name, "prompt", "adapter", {"name": "b", "fingerprint": "f"}, {}, created=created)


def test_generality_is_read_for_the_experts_that_it_is_of(tmp_path):
    """Not for one that has taken an id since; experts without have NaN; a library without has no priors."""
    folder, cards = epath.Path(tmp_path), {name: card_of(name) for name in NAMES[:3]}
    assert generality.read_generality(folder, cards).priors(NAMES) is None
    known = Generality([CalibratedDataset("a", "x", 2), CalibratedDataset("b", "y", 1)], {
        name: CalibratedExpert("then", name, [number / 8, -1.5 if name == "e1" else None])
        for number, name in enumerate(NAMES[:3])})
    generality.write_generality(folder, known)
    assert generality.read_generality(folder, cards) == known
    cards["e2"] = card_of("e2", "later")
    found = generality.read_generality(folder, cards)
    priors = found.priors(["e2", "e1", "e0"])
    np.testing.assert_array_equal(priors.generality, [[np.nan] * 2, [0.125, -1.5], [0, np.nan]])
    assert (priors.datasets, priors.families) == (("a", "b"), ("x", "y"))
    assert found.prior_means() == {"e0": 0.0, "e1": -0.6875}
    assert found.to_dict()["e0"] == {"a": {"score": 0.0, "family": "x", "tasks": 2}}
    generality.forget_experts(folder, found, ["e0"])
    assert list(generality.read_generality(folder, cards).experts) == ["e1"]
    path = generality.generality_file(folder)
    for spoilt, place in (('"much"', "scores/1"), ("0, 0", "scores"), ("1e999", "scores")):
        path.write_text(path.read_text().replace("-1.5", spoilt))
        with pytest.raises(InputError, match=rf"generality\.json: experts/e1/{place}"):
            generality.read_generality(folder, cards)
        path.write_text(path.read_text().replace(spoilt, "-1.5"))
