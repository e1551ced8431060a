"""Checks of configs: types of fields, and paths in those that take one."""

import dataclasses
import os
import pathlib

import numpy as np
import pytest
import tiny_study as tiny
from etils import epath

import elm_jax as elm
from elm_jax.data.registry import registry
from elm_jax.errors import InputError
from elm_jax.runtime.config_checks import check_types
from elm_jax.runtime.differences import differences
from elm_jax.workflows.merge.merge_plan import MergeOptions


@dataclasses.dataclass(frozen=True)
class Config:
    """Of a run; as configs of workflows are."""

    folder: str | os.PathLike | None
    others: tuple[str | os.PathLike, ...] = ()
    name: str = "a"

    def __post_init__(self):
        check_types(self)


@pytest.mark.parametrize("kind", [pathlib.Path, epath.Path])
def test_a_path_is_its_text(kind):
    assert Config(kind("a/b"), (kind("c"), "d")) == Config("a/b", ("c", "d"))
    assert Config(None) == Config(None, ())
    assert Config("a", [kind("c")]).others == ["c"]


@pytest.mark.parametrize("fields", [{"folder": 1}, {"folder": "a", "others": (1,)}, {"folder": b"a"},
                                    {"folder": "a", "name": pathlib.Path("a")}])
def test_what_is_no_path_is_refused_where_a_string_alone_was_before(fields):
    with pytest.raises(InputError, match="wrong type") as error:
        Config(**fields)
    assert "a string in quotes" in str(error.value) and "PathLike" not in str(error.value)


PUBLIC = {
    elm.EvaluateConfig: ({"base": "b", "output": "o", "experts": ("e",), "prepared_dir": "p"},
                         {"tasks": ("t",)}),
    elm.RouteConfig: ({"library": "l", "examples": "e", "encoder_dir": "d", "prepared_dir": "p"}, {}),
    elm.SearchConfig: ({"experts": ("a", "b"), "base": "b", "prepared_dir": "p"}, {"task": "t"}),
    elm.TrainConfig: ({"model_dir": "m", "initial_checkpoint_path": "b", "prepared_dir": "p"},
                      {"task": "t", "train_steps": 1}),
    elm.PretrainConfig: ({"model_dir": "m", "vocabulary": "v"},
                         {"network": elm.T5Config(32, 8, 1, 8, 8, 1, 1), "passages": ("a.txt",)}),
    elm.ConvertConfig: ({"source": "s", "target": "t", "base": "b", "vocabulary": "v"},
                        {"source_kind": "hf", "target_kind": "elm"}),
}


@pytest.mark.parametrize("config", PUBLIC, ids=lambda config: config.__name__)
def test_public_configs_take_paths_where_they_take_folders(config):
    folders, others = PUBLIC[config]
    paths = {name: tuple(map(pathlib.Path, value)) if isinstance(value, tuple) else pathlib.Path(value)
             for name, value in folders.items()}
    found, wanted = config(**paths, **others), config(**folders, **others)
    assert found == wanted
    if hasattr(config, "digest"):
        assert found.digest() == wanted.digest()


def test_a_string_where_several_are_asked_for_is_one_item(world):
    assert Config("a", "c").others == ("c",) and Config("a", pathlib.Path("c")).others == ("c",)
    config = elm.EvaluateConfig(base="b", output="o", tasks="t", experts="e", modules="my_tasks")
    assert (config.tasks, config.experts, config.modules) == (("t",), ("e",), ("my_tasks",))
    assert elm.TrainConfig("m", "t", "b", train_steps=1, modules="my").modules == ("my",)
    assert elm.TrainConfig("m", "t", "b", epochs=1, lora_rank=2, lora_targets="all").lora_targets == "all"
    assert elm.TaskData(world.base.vocabulary, "my_tasks").modules == ("my_tasks",)
    with pytest.raises(InputError, match="difference to allow 'abc'"):
        MergeOptions(allow="abc")
    with pytest.raises(InputError, match="task registry my_tasks_that_are_not"):
        registry.import_tasks("my_tasks_that_are_not")


def test_a_text_or_task_alone_is_routed_and_scored_as_a_list_of_one(world):
    text = "A storm is coming to the coast."
    one, several = (elm.route(world.library, texts, num_queries=8) for texts in (text, [text]))
    assert one == several and one.num_queries == 1
    np.testing.assert_array_equal(world.library.encoder.embed(text), world.library.encoder.embed([text]))
    rows = elm.evaluate(world.base, None, tiny.TOPIC, data=world.data, max_rows=8)
    assert [(row["task"], row["num_instances"]) for row in rows] == [(tiny.TOPIC, 8)]


def test_what_is_printed_of_large_things_is_a_line(world):
    split = world.data.split(tiny.TOPIC, "validation")
    for thing in (world.base, world.topic, split, world.library, world.library.index):
        assert len(repr(thing)) < 300 and type(thing).__name__ in repr(thing)
    assert world.base.fingerprint in repr(world.base)


def test_differences_name_each_setting_with_both_values():
    assert differences({"a": (1, 2), "b": {"c": 1}, "d": 0}, {"a": [1, 2], "b": {"c": 2}, "e": None}) == [
        "b.c: 1 there, 2 here", "d: 0 there, not set here", "e: not set there, None here"]
