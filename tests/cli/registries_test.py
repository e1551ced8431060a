"""Python and the command line import the same task registries where none is named."""

import argparse
import dataclasses

import pytest

import elm_jax as elm
from elm_jax.cli.registries import modules_of


@pytest.mark.parametrize("config", [elm.EvaluateConfig, elm.RouteConfig, elm.SearchConfig, elm.ConvertConfig,
                                    elm.TaskData], ids=lambda config: config.__name__)
def test_the_default_registries_are_those_of_the_verbs(config):
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    assert defaults["modules"] == modules_of(argparse.Namespace(module=None))
    assert "elm_jax.tasks.embedded" in defaults["modules"], "its tasks need no data"
