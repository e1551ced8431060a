"""Text formats of keys and queries."""

import pytest

from elm_jax.errors import InputError
from elm_jax.routing.text import FORMATS, RoutingInstance, format_text

INSTANCE = RoutingInstance("Who wrote it?", "{{ a }} ||| {{ b }}", ["Ann", "Bob"])


@pytest.mark.parametrize(
    ("text_format", "expected", "without"),
    [
        ("instance", "Who wrote it?", "Q"),
        (
            "choice_instance",
            "Answer Choices: {{ a }} ||| {{ b }}, Instance: Who wrote it?",
            "Answer Choices: None, Instance: Q",
        ),
        (
            "label_instance",
            "Answer Choices: Ann, Bob, Instance: Who wrote it?",
            "Answer Choices: None, Instance: Q",
        ),
        ("choice", "{{ a }} ||| {{ b }}", "None"),
        ("label", "Ann, Bob", "None"),
    ],
)
def test_formats(text_format, expected, without):
    assert format_text(INSTANCE, text_format) == expected
    assert format_text(RoutingInstance("Q"), text_format) == without


def test_every_format_is_tested():
    assert sorted(FORMATS) == sorted(
        ["instance", "choice_instance", "label_instance", "choice", "label"]
    )


def test_unknown_format_names_the_nearest():
    with pytest.raises(InputError, match=r"Unknown text format 'choices_instance'.*\n.*choice_in"):
        format_text(INSTANCE, "choices_instance")


def test_instance_checks_and_normalises():
    assert INSTANCE.labels == ("Ann", "Bob")
    assert RoutingInstance("Q", None, None).labels == ()
    with pytest.raises(InputError, match="not made of texts"):
        RoutingInstance(3)
    assert RoutingInstance("Q", None, "yes").labels == ("yes",), "a string is one label, not its letters"
    with pytest.raises(InputError, match="not made of texts"):
        RoutingInstance("Q", None, (1,))
    for texts in (("half \udc00",), ("Q", "yes \ud800"), ("Q", None, ("no \udfff",))):
        with pytest.raises(InputError, match="half of a surrogate pair"):
            RoutingInstance(*texts)
