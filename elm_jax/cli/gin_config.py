"""Reads gin files and bindings: search paths, configurables, and checks that gin itself does not make.

The workflows do not import gin. This module registers their config dataclasses under short names, reads
the user's files and bindings, builds a config without arguments in Python (which would override gin
silently), and refuses unused bindings.
"""

import argparse
import functools
import os
import re
import tokenize
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gin
from elm_jax.cli.gin_files import gin_folder as gin_folder
from elm_jax.cli.gin_files import nearest_files, search_paths, strip_root
from elm_jax.cli.run_flags import flag_hint
from elm_jax.errors import InputError, describe, nearest_names, unknown_name
from elm_jax.models import families
from elm_jax.models.adapters.config import AdapterConfig, settings_of_kinds
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.models.losses import LossConfig
from elm_jax.runtime import storage
from elm_jax.training.early_end import EarlyEnd
from elm_jax.training.optimizers import OptimizerConfig
from elm_jax.workflows.arms.arm_settings import ArmSettings
from elm_jax.workflows.arms.flan_config import FlanStudyConfig
from elm_jax.workflows.arms.task_moe_config import TaskStudyConfig
from elm_jax.workflows.study.study_config import StageSettings, StudyConfig
from elm_jax.workflows.train.pretrain import PretrainConfig
from elm_jax.workflows.train.train_config import TrainConfig
from elm_jax.workflows.train.train_stack import TrainStackConfig

NETWORKS: dict[str, type] = {
    family.config.__name__: family.config for family in families.FAMILIES.values()}
"""Config classes of networks, by their names in gin files."""
CONFIGURABLES: dict[str, Callable[..., Any]] = {
    **NETWORKS,
    "AdapterConfig": AdapterConfig,
    "OptimizerConfig": OptimizerConfig,
    "LossConfig": LossConfig,
    "SparseConfig": SparseConfig,
    "StageSettings": StageSettings,
    "train": TrainConfig,
    "train_stack": TrainStackConfig,
    "EarlyEnd": EarlyEnd,
    "pretrain": PretrainConfig,
    "study": StudyConfig,
    "Arm": ArmSettings,
    "flan_study": FlanStudyConfig,
    "task_study": TaskStudyConfig,
}
# Gin's own reader of files would take a byte order mark, which other programs write, for a wrong first line.
gin.config._FILE_READERS[0] = (functools.partial(open, encoding="utf-8-sig"), os.path.isfile)
_BUILDERS = {name: gin.external_configurable(built, name=name) for name, built in CONFIGURABLES.items()}
# gin also looks for `models/tiny.gin` inside a Python package `models`, and fails if any folder of that
# name can be imported: only plain files are read here.
gin.config._FILE_READERS[:] = gin.config._FILE_READERS[:1]
DEFAULT_NETWORK = "runs/_network.gin"
"""The gin file of the network that `elm pretrain` trains where no other is given."""
_REQUIRED_LINE = re.compile(r"^([A-Za-z_][A-Za-z0-9_]*) = %(?:gin\.)?REQUIRED$", re.MULTILINE)
_MACRO = "gin.macro"
Binding = tuple[str, str, str]
"""Scope (``prompt``, or none), selector of the configurable, parameter; a macro is its own scope."""


def parse(files: Sequence[str], bindings: Sequence[str], paths: Sequence[str] = ()) -> None:
    """Reads gin files, then single bindings (``NAME=VALUE``); later ones win.

    A pretraining without a network gets that of which the files give the sizes, or else `DEFAULT_NETWORK`.

    Raises:
        InputError: a file that is not found, a line that gin refuses, an unknown configurable.
    """
    _read(files, bindings, paths)
    if is_bound("pretrain.model_dir") and not is_bound("pretrain.network"):
        sized = sized_networks()
        if len(sized) > 1:
            raise InputError(describe("The sizes of several networks are given", where="gin config",
                                      got=", ".join(sized), expected="those of one",
                                      cure="give one file of gin/models/, or say pretrain.network"))
        _read([DEFAULT_NETWORK], [], paths)
        others = [name for name in sized if name not in sized_networks()]
        chosen = [f"pretrain.network=@{name}()" for name in others]
        _read([*([] if others else [DEFAULT_NETWORK]), *files], [*chosen, *bindings], paths)


def sized_networks() -> list[str]:
    """Names of the network configs of which the parsed config gives the sizes."""
    return [name for name in NETWORKS if is_bound(f"{name}.vocab_size")]


def _read(files: Sequence[str], bindings: Sequence[str], paths: Sequence[str]) -> None:
    """Reads gin files and bindings into an empty config."""
    gin.clear_config()
    for path in reversed(search_paths(paths)):
        if path:
            gin.add_config_file_search_path(path)
    try:
        gin.parse_config_files_and_bindings(
            [strip_root(file) for file in files], list(bindings), finalize_config=False)
    except OSError as error:
        raise InputError(describe(
            "A gin file cannot be opened", where=", ".join(files), got=str(error).strip()[:1000],
            cure=f"the nearest that come with elm_jax: {', '.join(nearest_files(files))}")) from error
    except RecursionError as error:
        raise InputError(describe(
            "The gin config has no end", where=", ".join([*files, *bindings]),
            got="a file that includes itself, through others perhaps, or a value nested without end",
            cure="take the include out")) from error
    except (ValueError, SyntaxError, KeyError, ImportError, AttributeError, TypeError,
            tokenize.TokenError, MemoryError) as error:
        raise InputError(describe(
            "Gin refuses the config", where=", ".join([*files, *bindings]), got=str(error).strip()[:1000],
            cure="strings need their own quotes: --gin.MODEL_DIR=\"'runs/a'\" (a flag's, --output runs/a, do "
            "not)")) from error


def missing_macros() -> list[str]:
    """Names of the macros that the parsed config requires and that have no value."""
    return _REQUIRED_LINE.findall(gin.config_str())


def is_bound(name: str) -> bool:
    """Whether the parsed config binds the parameter `name`, e.g. ``pretrain.model_dir``."""
    return any(_spelled(binding) == name for binding in _given())


def parameter(name: str) -> Any:
    """The value that the parsed config binds to a parameter."""
    return gin.query_parameter(name)


def macros() -> dict[str, Any]:
    """The macros of the parsed config with their values; what is required has a value of gin's own."""
    return {scope: values["value"] for (scope, selector), values in gin.config._CONFIG.items()
            if selector == _MACRO}


def build(name: str) -> Any:
    """Builds one config from the parsed files and bindings; refuses unused bindings.

    Raises:
        InputError: a required macro is missing, a value is out of range, a binding is not used.
    """
    missing = sorted(missing_macros())
    if missing:
        raise InputError(describe("The config leaves out what it requires", where="gin config",
                                  got=f"no {', no '.join(missing)}",
                                  cure=flag_hint(missing)))
    try:
        config = _BUILDERS[name]()
    except InputError:
        raise
    except (ValueError, RuntimeError, TypeError) as error:
        raise InputError(describe("The config is not complete or not valid", where=name,
                                  got=str(error).strip().split("\n")[0])) from error
    check_bindings()
    return config


def check_bindings() -> None:
    """Raises InputError if a macro or a parameter is bound that nothing used: gin would ignore it silently.

    Unused are: a macro that no value refers to; a parameter of a configurable that was not built (another
    verb's config, a misspelt scope); and a parameter that every scope in use overrides.
    """
    used = set(_used())
    for binding in sorted(set(_given()) - used, key=lambda binding: (binding[1] != _MACRO, binding)):
        if _spelled(binding).startswith("AdapterConfig.") and binding[2] not in settings_of_kinds():
            raise unknown_name("parameter of AdapterConfig", binding[2], settings_of_kinds(), "gin config")
        is_macro = binding[1] == _MACRO
        names = {_spelled(other) for other in used if (other[1] == _MACRO) == is_macro}
        near = nearest_names(_spelled(binding), names)
        raise InputError(describe(
            f"{_spelled(binding)} is set but nothing uses it", where="gin config",
            expected=f"a {'macro' if is_macro else 'parameter'} that the config reads; "
            f"nearest: {', '.join(near)}",
            cure=f"Did you mean {near[0]}?" if near else None))


def _given() -> Iterator[Binding]:
    """All parsed bindings."""
    for (scope, selector), values in gin.config._CONFIG.items():
        yield from ((scope, selector, name) for name in values)


def _used() -> Iterator[Binding]:
    """The bindings whose values went into the built config; among nested scopes the innermost one counts."""
    given = set(_given())
    for (scope, selector), values in gin.config._OPERATIVE_CONFIG.items():
        parts = scope.split("/") if scope else []
        scopes = ["/".join(parts[:count]) for count in range(len(parts), -1, -1)]
        for name in values:
            candidates = ((outer, selector, name) for outer in scopes)
            winner = next((binding for binding in candidates if binding in given), None)
            if winner is not None:
                yield winner


def _spelled(binding: Binding) -> str:
    """A binding's name as a user writes it: ``MACRO``, or ``scope/configurable.parameter``."""
    scope, selector, name = binding
    if selector == _MACRO:
        return scope
    short = gin.config._REGISTRY.minimal_selector(selector)
    return f"{scope}/{short}.{name}" if scope else f"{short}.{name}"


def operative() -> str:
    """The operative config as gin text, for ``config.gin`` in the run folder."""
    return gin.operative_config_str()


def config_writer(folder: str) -> Callable[[], None]:
    """Returns a function that writes the operative config, for a workflow to call when its run starts."""
    text = operative()
    return lambda: storage.write_text(storage.as_path(folder) / "config.gin", text)


def parse_flags(arguments: argparse.Namespace) -> None:
    """Parses what ``--gin_file``, ``--gin.NAME`` and ``--gin_search_paths`` give.

    Raises:
        InputError: as `parse`.
    """
    parse(arguments.gin_file, arguments.gin_bindings, paths_of(arguments))


def paths_of(arguments: argparse.Namespace) -> list[str]:
    """The folders of ``--gin_search_paths``."""
    return [path for path in arguments.gin_search_paths.split(",") if path]
