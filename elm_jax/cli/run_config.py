"""From the flags of a run to its gin files and bindings: plain flags and gin give one config."""

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from elm_jax.cli import gin_config, gin_files
from elm_jax.cli.run_flags import LENGTHS, RunFlag, given
from elm_jax.data.preparing.task_data import TaskData
from elm_jax.errors import InputError, describe
from elm_jax.formats import detect
from elm_jax.models import families
from elm_jax.models.network import JOINED
from elm_jax.workflows.train import row_lengths
from elm_jax.workflows.train.train_config import TrainConfig

KINDS = {JOINED: "lora", "": "prompt"}
"""Kind of expert where none is given, by the form of the base's batches; "" for all others."""
PIECES, EXTRA_ROWS = "pretrain.vocab_pieces", 192
"""Rows of an embedding that the vocabulary's trained pieces leave free: its extra ids, and some to spare."""
NAME_A_RUN = ("train.kind", "train.model_dir", "train_stack.train", "pretrain.model_dir")
"""Parameters that gin files of whole runs bind, and those of networks, shardings or settings do not."""
OWN_LENGTHS = ("train.task_feature_lengths", "train.task_recipe", "train.few_shot", "train.early_end")
"""Parameters beside which lengths are not taken from the rows."""


def read_train(arguments: argparse.Namespace) -> bool:
    """Reads the flags of `elm train` or `elm farm init` into the parsed config.

    Where the gin files name no run, the file of ``--kind`` comes first, or that of the base's own kind.

    Returns:
        Whether the lengths of inputs and targets are those of that file alone, and may be fitted.

    Raises:
        InputError: as `gin_config.parse`; a flag whose macro the files lack, or that is set twice.
    """
    files, bindings = arguments.gin_file or [], arguments.gin_bindings
    paths = gin_config.paths_of(arguments)
    gin_config.parse(files, [], paths)
    has_run = any(map(gin_config.is_bound, NAME_A_RUN))
    if arguments.kind and has_run:
        raise InputError(describe("The kind of expert is chosen twice", where=", ".join(files),
                                  got=f"--kind {arguments.kind}, and a gin file of a run",
                                  cure="leave one of them out"))
    gin_config.parse(files, bindings, paths)
    is_shipped = not has_run and not gin_config.is_bound("train.model_dir")
    has_lengths = (any(map(gin_config.is_bound, OWN_LENGTHS)) or LENGTHS in gin_config.macros()
                   or len(_parts_of(given(arguments))) == 2)
    if is_shipped:
        kind = arguments.kind or _kind_of_base(arguments)
        files = [_shipped(f"experts/{kind}.gin"), *files]
    _read(arguments, files)
    return is_shipped and not has_lengths and not gin_config.is_bound("train_stack.train")


def read_pretrain(arguments: argparse.Namespace) -> None:
    """Reads the flags of `elm pretrain`; without a run in the gin files, ``runs/pretrain.gin`` comes first.

    Of a network with fewer rows than the file's, the vocabulary has as many pieces less.

    Raises:
        InputError: as `read_train`.
    """
    files = arguments.gin_file or []
    gin_config.parse(files, [], gin_config.paths_of(arguments))
    if gin_config.is_bound("pretrain.model_dir"):
        _read(arguments, files)
        return
    _read(arguments, [_shipped("runs/pretrain.gin"), *files])
    most = gin_config.macros()["VOCAB_SIZE"] - EXTRA_ROWS
    own = {"pretrain.vocabulary", PIECES} & set(map(_name_of, arguments.gin_bindings))
    if not own and most < gin_config.parameter(PIECES):  # a network of fewer rows than the file's
        arguments.gin_bindings.append(f"{PIECES} = {most}")
        gin_config.parse_flags(arguments)


def read_study(arguments: argparse.Namespace) -> None:
    """Reads the flags of `elm study`.

    Raises:
        InputError: there is no gin file; else as `read_train`.
    """
    if not arguments.gin_file:
        studies = gin_files.shipped_files("studies")
        raise InputError(describe("A study is described by a gin file", where="--gin_file",
                                  expected=f"one of {', '.join(studies)}, or your own",
                                  cure="elm study --gin_file gin/studies/p3_small.gin --output p3"))
    _read(arguments, arguments.gin_file)


def read_farm(arguments: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> list[argparse.Namespace]:
    """Reads the flags of `elm farm init` for each row of its table, with the row's own gin file if any.

    Returns:
        `arguments` for each row, with its files and bindings.

    Raises:
        InputError: as `read_train`.
    """
    read: dict[str | None, argparse.Namespace] = {}
    for row in rows:
        file = row.get("gin_file")
        if file not in read:
            read[file] = argparse.Namespace(**vars(arguments))
            if file is not None:
                read[file].gin_file, read[file].kind = [file], None
            read_train(read[file])
    return [read[row.get("gin_file")] for row in rows]


def fit_lengths(arguments: argparse.Namespace, config: TrainConfig) -> tuple[TrainConfig, TaskData]:
    """The config with lengths that its train rows need, at most those that it has, and the rows' task data.

    Lengths that a flag gives stay as they are.

    Raises:
        InputError: as `row_lengths.needed`.
    """
    lengths, data = row_lengths.needed(config, _parts_of(given(arguments)))
    arguments.gin_bindings = [*arguments.gin_bindings, f"{LENGTHS} = {lengths!r}"]
    gin_config.parse_flags(arguments)
    return gin_config.build("train"), data


def _read(arguments: argparse.Namespace, files: Sequence[str]) -> None:
    """Parses files and bindings with what the plain flags set; puts all of it into `arguments`."""
    flags, paths = given(arguments), gin_config.paths_of(arguments)
    _check_once(flags, arguments.gin_bindings)
    gin_config.parse(files, [], paths)
    for flag in flags:
        if flag.macro not in gin_config.macros():
            raise _no_macro(flag, files)
    arguments.gin_file = list(files)
    arguments.gin_bindings = [*_bindings(flags, arguments.gin_bindings), *arguments.gin_bindings]
    gin_config.parse_flags(arguments)


def _bindings(flags: Mapping[RunFlag, Any], others: Sequence[str]) -> list[str]:
    """Gin bindings of plain flags, for the files that are parsed."""
    bound = {flag.macro: value for flag, value in flags.items() if flag.part is None}
    if parts := _parts_of(flags):
        bound[LENGTHS] = {**gin_config.macros()[LENGTHS], **parts}
    for flag in flags:
        if flag.unsets in gin_config.macros():
            bound[flag.unsets] = None
    if "VOCAB_SIZE" in bound and not {PIECES, "pretrain.vocabulary"} & set(map(_name_of, others)):
        bound[PIECES] = bound["VOCAB_SIZE"] - EXTRA_ROWS
    return [f"{name} = {value!r}" for name, value in bound.items()]


def _parts_of(flags: Mapping[RunFlag, Any]) -> dict[str, Any]:
    return {flag.part: value for flag, value in flags.items() if flag.part is not None}


def _check_once(flags: Mapping[RunFlag, Any], bindings: Sequence[str]) -> None:
    """Raises InputError for a macro that two flags set, or a flag and a binding."""
    bound = {_name_of(binding): f"--gin.{binding}" for binding in bindings}
    seen: dict[tuple[str | None, str | None], str] = {}
    for flag, value in flags.items():
        for name in filter(None, (flag.macro, flag.unsets)):
            other = bound.get(name) or seen.get((name, flag.part))
            if other is not None:
                raise InputError(describe("One setting is given twice", where=name,
                                          got=f"{other} and {flag.spelled} {value}",
                                          cure="leave one of them out"))
            seen[name, flag.part] = f"{flag.spelled} {value}"


def _name_of(binding: str) -> str:
    return binding.split("=")[0].strip()


def _no_macro(flag: RunFlag, files: Sequence[str]) -> InputError:
    """The error for a flag that would set nothing: which files have its macro."""
    having = [file for file in gin_files.shipped_files("experts")
              if flag.macro in gin_files.macros_of([file])]
    kinds = ", ".join(pathlib.Path(file).stem for file in having)
    cure = f"--kind {kinds.replace(', ', ' or ')}; or leave it out" if kinds else "leave it out"
    return InputError(describe(
        f"{flag.spelled} sets {flag.macro}, which the gin file does not have", where=", ".join(files),
        expected=f"a macro {flag.macro}" + (f", as that of {kinds} has" if kinds else ""), cure=cure))


def _kind_of_base(arguments: argparse.Namespace) -> str:
    """Kind of expert for the base that the flags name, or for the network whose sizes they give."""
    bound, sizes = gin_config.macros(), gin_config.sized_networks()
    base = arguments.base or bound.get("INITIAL_CHECKPOINT_PATH")
    if isinstance(base, str):
        form = families.network_of(detect.open_model(base).config).batches
    elif sizes:
        form = families.FAMILIES[gin_config.NETWORKS[sizes[0]].family].network.batches
    else:
        lacking = [flag.spelled for flag in arguments.run_flags if flag.name in ("task", "base", "output")
                   and getattr(arguments, flag.name) is None and flag.macro not in bound]
        raise InputError(describe(
            "What is to be trained is not said", got=f"no {', no '.join(lacking)}",
            expected="them, or --kind, or a gin file of a run",
            cure="elm train --task ag_news__classify --base runs/base/base --output runs/ag"))
    return KINDS.get(form, KINDS[""])


def _shipped(file: str) -> str:
    """Path of a gin file that comes with the program."""
    return str(gin_files.gin_folder() / file)
