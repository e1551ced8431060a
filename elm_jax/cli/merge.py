"""The verb `elm merge`: reads flags, calls one workflow, prints its result."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from elm_jax.cli import merge_search_flags
from elm_jax.cli.printing import Column, print_json, print_lines, print_table, say
from elm_jax.errors import InputError, describe
from elm_jax.merging.methods.method_table import PARAMETERS, get_method
from elm_jax.merging.recipes.mergekit_yaml import MergeConfig, read_config
from elm_jax.merging.recipes.recipe import MergeRecipe, Scope, parse_patterns
from elm_jax.workflows.choices import parse_size
from elm_jax.workflows.merge import merge_folders
from elm_jax.workflows.merge.merge_plan import MergeOptions

_BESIDE = {"seed": "draws nothing", "divisor": "divides by no sum of weights"}
"""Parameters that mergekit's schema lacks, which may be given beside a config: why a method takes none."""


def merge(arguments: argparse.Namespace) -> None:
    """Runs `elm merge` on folders (from flags or a config file), or on a library's experts for a task."""
    if arguments.search:
        _search(arguments)
        return
    if merge_search_flags.given_flags(arguments):
        raise InputError(describe("These belong to a search for weights", got=", ".join(
            f"--{flag}" for flag in merge_search_flags.given_flags(arguments)), cure="give --search too"))
    config = _config(arguments)
    options = MergeOptions(
        allow=tuple(arguments.allow), max_shard_bytes=parse_size(arguments.max_shard_size),
        workers=arguments.workers, quiet=arguments.json, target=arguments.target, expert_id=arguments.id,
        rank=arguments.lora_rank)
    if arguments.wide and not arguments.dry_run:
        raise InputError(describe("Only the plan of a merge is a table", got="--wide without --dry_run"))
    if arguments.dry_run:
        plan = merge_folders.plan_merge(config, options).summary(options.workers)
        print_json(plan) if arguments.json else _print_plan(plan, arguments.wide)
        return
    if arguments.output is None:
        raise InputError(describe("There is no folder to write to", cure="give --output DIR, or --dry-run"))
    report = merge_folders.merge_folders(config, arguments.output, options)
    if arguments.json:
        print_json(report)
        return
    for note in report.get("notes", ()):  # a card that an older version left has none
        print_lines(f"note: {note}")
    for parent in report["parents"]:
        share = "by leaf" if parent["weight"] is None else f"{parent['weight']:.4f}"
        print_lines(f"{share}  {parent.get('id', parent['path'])}")
    print_lines(f"{report['num_leaves']} leaves, {report['num_parameters']:,} parameters by "
                f"{report['method']} in {report['seconds']:.1f} s", report["output"])


def _config(arguments: argparse.Namespace) -> MergeConfig:
    """The merge that the flags ask for: from a config file, from a library, or from folders."""
    given = {name: getattr(arguments, name) for name in PARAMETERS if getattr(arguments, name) is not None}
    if arguments.config:
        return _from_file(arguments, given)
    method = arguments.method or "mean"
    models, weights = list(arguments.models), arguments.weights
    if arguments.library:
        models, weights = _from_library(arguments)
    if len(models) < 2:
        raise InputError(describe("Merging needs two or more folders", got=len(models),
                                  expected="experts or checkpoints, or --library with --task, or --config"))
    weights = _numbers(weights, "--weights") if isinstance(weights, str) else weights
    values = {name: _value(name, text) for name, text in given.items()}
    return plain_config(method, models, weights, arguments.base, values, arguments.pattern, arguments.dtype)


def _from_file(arguments: argparse.Namespace, given: dict[str, str]) -> MergeConfig:
    """Reads a merge from a config file; ``--seed``, ``--divisor`` and ``--dtype`` may be given beside it."""
    flags = ("method", "weights", "base", "pattern", "library", "task", "lora_rank")
    extra = [*arguments.models, *(f"--{name}" for name in flags if getattr(arguments, name)),
             *(f"--{name}" for name in given if name not in _BESIDE)]
    if extra:
        raise InputError(describe("A config says what is merged, and how", where=arguments.config,
                                  got=f"beside it: {', '.join(extra)}", cure="give one or the other"))
    config = read_config(arguments.config)
    if arguments.dtype:
        config = dataclasses.replace(config, out_dtype=arguments.dtype)
    for name, text in given.items():
        spec = next((each for each in get_method(config.method).parameters if each.name == name), None)
        if spec is None:
            raise InputError(describe(f"Method {config.method} {_BESIDE[name]}", got=f"--{name}"))
        recipe = config.recipe
        config = dataclasses.replace(config, recipe=dataclasses.replace(
            recipe, parameters=(*recipe.parameters, spec),
            scopes=(Scope({name: _value(name, text)}, f"--{name}"), *recipe.scopes)))
    return config


def _from_library(arguments: argparse.Namespace) -> tuple[list[str], Any]:
    from elm_jax.cli import library  # late: encoders and networks, which no other merge needs

    return library.best_of_library(arguments)


def _search(arguments: argparse.Namespace) -> None:
    from elm_jax.cli import merge_search  # late: training and scoring, which no other merge needs

    merge_search.merge_search(arguments, *_searched(arguments))


def _searched(arguments: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """The experts and the method's parameters of a weight search."""
    refused = ("config", "weights", "pattern", "dtype", "target", "allow", "lora_rank", "dry_run", "wide")
    given = [flag for flag in refused if getattr(arguments, flag)]
    if given:
        raise InputError(describe("A search for weights has no use for these", got=", ".join(
            "--to" if flag == "target" else f"--{flag}" for flag in given)))
    models = _from_library(arguments)[0] if arguments.library else list(arguments.models)
    return models, {name: _value(name, getattr(arguments, name)) for name in PARAMETERS
                    if getattr(arguments, name) is not None}


def plain_config(method: str, models: Sequence[str], weights: Sequence[float] | None, base: str | None,
                 parameters: dict[str, Any], patterns: Sequence[str] = (),
                 dtype: str | None = None) -> MergeConfig:
    """Builds the config of a merge from the values of flags.

    Args:
        method: a key of `METHODS`.
        models: folders.
        weights: one a folder; None for the method's own.
        base: folder of the base, for methods on task vectors and for PEFT adapters.
        parameters: of the method; a tuple has one for each folder.
        patterns: weights of parts of the leaves, such as ``SelfAttention=0.7,0.3``.
        dtype: of the result.
    """
    row = get_method(method)
    if base is not None and not row.needs_base and not any(map(merge_folders.is_adapter, models)):
        raise InputError(describe(f"Method {method} takes no base", got=f"--base {base}",
                                  cure="leave it out, or give the folder as one of those to merge"))
    settings = parse_patterns(patterns, weights) if patterns else weights
    recipe = MergeRecipe.simple(method, settings, parameters, experts=models, specs=row.parameters)
    donor = base or models[0]
    return MergeConfig(method, tuple(models), base, recipe, None, dtype, donor, donor, (), "", "")


def _numbers(text: str, flag: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise InputError(describe(f"{flag} are not numbers", got=text,
                                  expected="numbers separated by commas")) from error


def _value(name: str, text: str) -> Any:
    """Parses a flag's value; commas separate the values of a parameter that each expert has."""
    each = PARAMETERS[name]
    if each.kind == "choice":
        return text
    if each.kind == "bool":
        if text not in ("true", "false"):
            raise InputError(describe(f"--{name} is not true or false", got=text))
        return text == "true"
    numbers = _numbers(text, f"--{name}")
    if each.kind == "int":
        numbers = tuple(int(number) if number.is_integer() else number for number in numbers)
    if each.per_expert and len(numbers) > 1:
        return numbers
    if len(numbers) > 1:
        raise InputError(describe(f"--{name} is one for all", got=text, expected=each.range))
    return numbers[0]


def _print_plan(plan: dict[str, Any], wide: bool) -> None:
    columns = (Column("leaf"), Column("shape", 1), Column("dtype", 2),
               Column("MB", 3, "number", "{:.2f}".format, "people"), Column("bytes", where="scripts"))
    print_table(columns, [
        (leaf["leaf"], "x".join(map(str, leaf["shape"])), leaf["dtype"], leaf["bytes"] / 1e6, leaf["bytes"])
        for leaf in plan["leaves"]], wide=wide, title=f"{plan['method']} of {len(plan['models'])}")
    say(*(f"note: {note}" for note in plan["notes"]))
    say(f"{plan['num_leaves']} leaves, {plan['num_parameters']:,} parameters; reads "
          f"{plan['bytes_to_read'] / 1e9:.2f} GB, writes {plan['bytes_to_write'] / 1e9:.2f} GB; needs about "
          f"{plan['memory_bytes'] / 1e6:.0f} MB with {plan['workers']} workers")
