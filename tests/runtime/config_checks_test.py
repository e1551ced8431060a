"""Checks of configs: types of fields, and paths in those that take one."""

import dataclasses
import os
import pathlib

import pytest
from etils import epath

import elm_jax as elm
from elm_jax.errors import InputError
from elm_jax.runtime.config_checks import check_types


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
