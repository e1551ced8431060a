"""The workflow behind `elm route` and `elm merge --library`: queries from a task or a file, to a decision."""

import json

import pytest
import tiny_study as tiny

import elm_jax as elm
from elm_jax.cli import main
from elm_jax.errors import InputError
from elm_jax.workflows.merge.in_memory import best_of_library
from elm_jax.workflows.route import task_instances


@pytest.mark.parametrize("prepared", [False, True])
def test_config_and_verb_decide_as_route_does_on_the_drawn_instances(world, capsys, prepared):
    world.data.split(tiny.REVIEW, "validation")
    folder = str(world.folder / "prepared") if prepared else None
    config = elm.RouteConfig(str(world.folder / "library"), task=tiny.REVIEW, num_queries=9, seed=4,
                             modules=tiny.MODULES, prepared_dir=folder)
    decision = elm.route_task(config)
    assert decision == elm.route(world.library, task_instances(config), num_queries=9)
    assert decision.num_queries == 9 and decision.top(1) == [tiny.REVIEW]
    words = ["--module", *tiny.MODULES, *(["--prepared", folder] if folder else [])]
    assert main.main(["route", "--library", config.library, "--task", tiny.REVIEW, "--queries", "9", "--seed",
                      "4", "--json", *words]) == 0
    assert json.loads(capsys.readouterr().out) == decision.to_dict()


def test_the_best_experts_of_a_library_and_their_weights(world):
    config = elm.RouteConfig(str(world.folder / "library"), task=tiny.REVIEW, modules=tiny.MODULES)
    decision = elm.route_task(config)
    folders, weights = best_of_library(config, 2, "votes")
    assert [elm.load_expert(folder).card.id for folder in folders] == decision.top(2)
    assert weights == [line.votes for line in decision.ranking] and sum(weights) == 32
    assert best_of_library(config, 1, "0.5")[1] == "0.5", "numbers are the caller's to read"


@pytest.mark.parametrize("given", [{}, {"task": "a", "examples": "b"}])
def test_queries_come_from_one_place(given):
    with pytest.raises(InputError, match="one of the two"):
        elm.RouteConfig("library", **given)
