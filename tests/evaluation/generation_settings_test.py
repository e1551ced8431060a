"""Settings of generation: each value out of range and each without effect is one clear error."""

import pytest

from elm_jax.errors import InputError
from elm_jax.evaluation.generation_settings import GenerationSettings


@pytest.mark.parametrize(("values", "named"), [
    ({"max_new_tokens": 0}, "max_new_tokens"), ({"max_new_tokens": 2.5}, "max_new_tokens"),
    ({"temperature": -0.1}, "temperature"), ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"), ({"temperature": 101}, "temperature"),
    ({"temperature": 1.0, "top_k": 0}, "top_k"), ({"temperature": 1.0, "top_k": True}, "top_k"),
    ({"temperature": 1.0, "top_p": 0.0}, "top_p"), ({"temperature": 1.0, "top_p": 1.1}, "top_p"),
    ({"temperature": 1.0, "seed": -1}, "seed"), ({"temperature": 1.0, "seed": 2**32}, "seed"),
    ({"stop": ("",)}, "stop"), ({"stop": (3,)}, "stop"),
    ({"top_k": 5}, "top_k"), ({"top_p": 0.5, "seed": 1}, "top_p, seed"),
])
def test_a_wrong_setting_is_named(values, named):
    with pytest.raises(InputError, match=f"where: {named}\n"):
        GenerationSettings(**values)


def test_settings_are_told_without_those_that_have_no_effect():
    told = GenerationSettings(stop="a").to_dict()
    assert told == {"max_new_tokens": 128, "temperature": 0.0, "stop": ["a"]}
    assert GenerationSettings(temperature=1).to_dict()["seed"] == 0
