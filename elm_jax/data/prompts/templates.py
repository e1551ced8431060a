"""Prompt templates in promptsource's format, rendered in Jinja2's sandbox.

Gives the same texts as ``promptsource.templates.Template.apply``, random draws included, but never runs code
from a file: YAML goes through a safe loader, Jinja through a sandbox that limits time and memory.

Source: https://github.com/bigscience-workshop/promptsource (Bach et al., 2022, arXiv 2202.01279).
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes
import yaml
from etils import epath

from elm_jax.data.prompts import sandbox
from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.runtime import records, storage

SEPARATOR = "|||"
"""Separates input from target, and answer choices from each other."""
TRUNCATED_FIELD = 2048
"""Characters that promptsource leaves of each ``{{...}}`` in a prompt (not in the choices)."""
FILE_NAME = "templates.yaml"
MAX_FILE = 5_000_000
"""Characters of a file of templates; promptsource's largest has 16,722."""
SKIPPED, EMPTY_INPUT, EMPTY_TARGET = "skipped by the template", "input is empty", "target is empty"
"""Reasons why a row is dropped."""
_GUARDS = ("defined", "undefined", "default", "d")
"""Tests and filters of Jinja that take a field that is not there."""
_PIPE_PROTECTOR = "3ed2dface8203c4c9dfb1a5dc58e41e0"
"""Replaces the separator inside of a field's own text (promptsource's constant)."""


@dataclasses.dataclass(frozen=True)
class Rendered:
    """One row, rendered as a prompt.

    Attributes:
        inputs: the prompt.
        targets: the text to be produced.
        choices: the rendered answer choices, None if the template has none.
        choices_expression: the template's own expression for the choices, None if it has none.
        scores: credit from 0 to 1 of each choice, None where the target is the one right choice.
        references: all texts that are right, of a row to write; empty where that is the target alone.
    """

    inputs: str
    targets: str
    choices: tuple[str, ...] | None
    choices_expression: str | None
    scores: tuple[float, ...] | None = None
    references: tuple[str, ...] = ()


_ENVIRONMENT = sandbox.make_environment()


@functools.cache
def _draws_when_compiled(source: str) -> bool:
    """Whether Jinja may draw at random while it compiles the template, when it folds constant lists."""
    return re.search(r"\|\s*(choice|random)\b", source) is not None


@functools.lru_cache(maxsize=4096)
def _variables_of(source: str) -> frozenset[str]:
    names = jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(source))
    return frozenset(names - set(_ENVIRONMENT.globals))


@functools.lru_cache(maxsize=4096)
def _guarded_in(source: str) -> frozenset[str]:
    """Names that the template tests for being defined, or gives a default where they are not."""
    found = _ENVIRONMENT.parse(source).find_all((jinja2.nodes.Test, jinja2.nodes.Filter))
    return frozenset(node.node.name for node in found
                     if node.name in _GUARDS and isinstance(node.node, jinja2.nodes.Name))


@functools.cache
def _compile_once(source: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(source)


def _compile(source: str) -> jinja2.Template:
    """Compiles a template; compiles it again for each row if compilation itself draws at random."""
    if _draws_when_compiled(source):
        return _ENVIRONMENT.from_string(source)
    return _compile_once(source)


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """One template of a dataset.

    Attributes:
        name: the template's own name, to the letter (some end in a space).
        jinja: prompt and target, with the separator between them.
        answer_choices: Jinja expression for the choices, None if the task is open-ended.
        metrics: names of metrics after promptsource's metadata.
        original_task: whether it asks for the task that the dataset was made for.
        choices_in_prompt: whether the prompt lists the choices.
        reference: who wrote it.
    """

    name: str
    jinja: str
    answer_choices: str | None
    metrics: tuple[str, ...] = ()
    original_task: bool | None = None
    choices_in_prompt: bool | None = None
    reference: str = ""

    @property
    def kind(self) -> str:
        """``rank`` if choices are given and accuracy measures it, else ``generation``."""
        return "rank" if self.answer_choices and "Accuracy" in self.metrics else "generation"

    @property
    def instruction(self) -> str:
        """The prompt as it is written, with the names of fields; empty where the rows are prompts."""
        return self.jinja.split(SEPARATOR)[0].strip()

    @property
    def digest(self) -> str:
        """Hash of the template's text, with which a card detects that the template has changed."""
        return hashlib.sha256(json.dumps([self.jinja, self.answer_choices]).encode()).hexdigest()[:16]

    def fields(self) -> frozenset[str]:
        """Names of the row fields that the template reads.

        Raises:
            InputError: the template is not valid Jinja.
        """
        self.check_source()
        try:
            names = frozenset.union(*map(_variables_of, filter(None, (self.jinja, self.answer_choices))),
                                    frozenset())
        except jinja2.TemplateSyntaxError as error:
            raise InputError(describe(
                f"Template {self.name!r} is not valid Jinja", where=f"line {error.lineno}",
                got=error.message)) from error
        except RecursionError as error:
            raise InputError(describe(f"Template {self.name!r} is nested too deeply to be read")) from error
        return names - {"answer_choices"}

    def check_source(self, where: str | None = None) -> None:
        """Raises InputError if the template, or its choices' expression, is too large to be compiled."""
        try:
            for source in filter(None, (self.jinja, self.answer_choices)):
                sandbox.check_source(source)
        except sandbox.TemplateLimit as error:
            raise InputError(describe(f"Template {self.name!r} is too large to be compiled", where=where,
                                      got=error)) from error

    def required_fields(self) -> frozenset[str]:
        """Names of the row fields without which the template does not render: those that it does not guard.

        A field that the template asks for by ``is defined``, or gives a ``default``, may be missing.

        Raises:
            InputError: the template is not valid Jinja.
        """
        guarded = frozenset.union(*map(_guarded_in, filter(None, (self.jinja, self.answer_choices))),
                                  frozenset()) if self.fields() else frozenset()
        return self.fields() - guarded

    def check_fields(self, present: Iterable[str], where: str) -> None:
        """Checks that rows have the fields that the template reads.

        Args:
            present: the rows' fields.
            where: the dataset, for the error.

        Raises:
            InputError: names the template, the missing fields, and the fields present.
        """
        present = set(present)
        missing = sorted(self.required_fields() - present)
        if missing:
            raise InputError(describe(
                f"Template {self.name!r} reads a field that the data lacks", where=where,
                got=f"missing {', '.join(missing)}",
                expected=f"fields among {', '.join(sorted(present))}",
                cure="use a template that fits these rows, or rows that have the field"))

    def parts(self, row: Mapping[str, Any], *, seed: int, truncate: bool = True) -> list[str]:
        """Renders a row and splits it at the separator, as ``Template.apply`` does.

        Args:
            row: the fields.
            seed: of the draws that the template makes (filter ``choice``).
            truncate: cut every ``{{...}}`` of the prompt to 2048 characters, as promptsource does.

        Returns:
            The stripped parts: usually input and target.

        Raises:
            InputError: the template fails on this row.
        """
        return self._render(row, seed, truncate)[0]

    def render(
        self, row: Mapping[str, Any], *, seed: int, truncate: bool = True
    ) -> Rendered | None:
        """Renders a row as input, target and choices.

        Returns:
            None if the template skips the row: no target part, or an empty input or target.
        """
        found = self.render_or_drop(row, seed=seed, truncate=truncate)
        return None if isinstance(found, str) else found

    def render_or_drop(
        self, row: Mapping[str, Any], *, seed: int, truncate: bool = True, where: Any = None
    ) -> Rendered | str:
        """Renders a row as input, target and choices, or returns why it is dropped, as T0 drops rows.

        Args:
            row: the fields.
            seed: of the template's draws.
            truncate: see `parts`.
            where: file and line of the row, for the error.

        Raises:
            InputError: the template fails on this row, or wants more time or room than it may have.
        """
        parts, choices = self._render(row, seed, truncate, where)
        if len(parts) != 2 or not any(parts):
            return SKIPPED
        if not all(parts):
            return EMPTY_TARGET if parts[0] else EMPTY_INPUT
        return Rendered(parts[0], parts[1], choices and tuple(choices), self.answer_choices)

    def _render(
        self, row: Mapping[str, Any], seed: int, truncate: bool, where: Any = None
    ) -> tuple[list[str], list[str] | None]:
        if "answer_choices" in row:
            raise InputError(describe("A row has a field with a name that templates reserve",
                                      where=where or f"template {self.name!r}", got="answer_choices"))
        self.check_source(where)
        source = self.jinja
        if truncate:  # promptsource edits the template's source, so the cut depends on the position of }}
            source = source.replace("}}", f" | string | truncate({TRUNCATED_FIELD}) }}}}")
        fields = {key: _protected(value) for key, value in row.items()}
        try:
            with sandbox.one_row(seed):
                # 1. The prompt is compiled before the choices are rendered: the order of the draws.
                compiled = _compile(source)
                choices = None
                if self.answer_choices is not None:
                    choices = _split(sandbox.render(_compile(self.answer_choices), fields))
                # 2. The choices are in scope while the prompt is rendered.
                parts = _split(sandbox.render(compiled, {**fields, "answer_choices": choices}))
        except Exception as error:  # a template can fail in any way that its expressions can
            raise InputError(describe(f"Template {self.name!r} fails on a row",
                                      where=where or f"row with fields {', '.join(sorted(row))}",
                                      got=f"{type(error).__name__}: {error}; {self._read_of(row)}"
                                      )) from error
        return parts, choices

    def _read_of(self, row: Mapping[str, Any]) -> str:
        """The fields that the template reads, with the beginnings of their values, for an error."""
        try:
            names = sorted(self.fields() & row.keys())
        except InputError:  # the template is not valid, which is the error
            names = []
        return "fields: " + (", ".join(f"{name} = {reprlib.repr(row[name])}" for name in names) or "none")


def _protected(value: Any) -> Any:
    """A field's value whose own separators, in lists and objects too, are not taken for the template's."""
    if isinstance(value, str):
        return value.replace(SEPARATOR, _PIPE_PROTECTOR)
    if type(value) in (list, tuple):
        return type(value)(map(_protected, value))
    if type(value) is dict:
        return {key: _protected(own) for key, own in value.items()}
    return value


def _split(text: str) -> list[str]:
    return [part.replace(_PIPE_PROTECTOR, SEPARATOR).strip() for part in text.split(SEPARATOR)]


class _TemplateLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """A safe YAML loader that reads promptsource's two tags as plain mappings."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuses merge keys (``<<``): with them a short file of aliases becomes a list of a billion keys."""
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, "templates have no merge keys (<<)", key.start_mark)


for _tag in ("!Template", "!TemplateMetadata"):
    _TemplateLoader.add_constructor(
        _tag, lambda loader, node: loader.construct_mapping(node, deep=True))


def read_templates(path: storage.PathLike) -> dict[str, PromptTemplate]:
    """Reads a file ``templates.yaml``; returns its templates by name.

    Returns:
        Templates by their own name.

    Raises:
        InputError: not YAML, another tag, not promptsource's layout, or one name twice.
    """
    text = storage.read_text(path)
    if len(text) > MAX_FILE:
        raise InputError(describe("The file of templates is too large", where=path,
                                  got=f"{len(text):,} characters", expected=f"at most {MAX_FILE:,}"))
    try:
        value = yaml.load(text, Loader=_TemplateLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none is a ValueError
        raise InputError(
            describe("The templates are not valid YAML", where=path, got=str(error)[:300])) from error
    if not isinstance(value, dict) or not isinstance(value.get("templates"), dict):
        raise InputError(describe("The file does not hold templates", where=path,
                                  expected="a mapping with the key 'templates'"))
    templates: dict[str, PromptTemplate] = {}
    for key, entry in value["templates"].items():
        template = _template(entry, f"{path}, template {key}")
        template.check_source(f"{path}, template {key}")
        if template.name in templates:
            raise InputError(describe("Two templates have one name", where=path, got=template.name))
        templates[template.name] = template
    return templates


@dataclasses.dataclass(frozen=True)
class StoredMetadata:
    """What is read of a template's metadata."""

    metrics: list[str] | None = None
    original_task: bool | None = None
    choices_in_prompt: bool | None = None


@dataclasses.dataclass(frozen=True)
class StoredTemplate:
    """What is read of a template in promptsource's file."""

    name: str
    jinja: str
    answer_choices: str | None = None
    metadata: StoredMetadata | None = None
    reference: str | None = None


def _template(entry: Any, where: str) -> PromptTemplate:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) \
            or not isinstance(entry.get("jinja"), str):
        raise InputError(describe("A template needs a name and a jinja text", where=where))
    records.check_record(entry, StoredTemplate, kind="template", where=where)
    metadata = entry.get("metadata") or {}
    return PromptTemplate(
        name=entry["name"],
        jinja=entry["jinja"],
        answer_choices=entry.get("answer_choices"),
        metrics=tuple(metadata.get("metrics") or ()),
        original_task=metadata.get("original_task"),
        choices_in_prompt=metadata.get("choices_in_prompt"),
        reference=entry.get("reference") or "",
    )


@functools.cache
def _read_cached(path: str) -> dict[str, PromptTemplate]:
    return read_templates(path)


def installed_folder() -> str | None:
    """Path of the templates in the installed promptsource package, found without importing it."""
    spec = importlib.util.find_spec("promptsource")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folder = os.path.join(location, "templates")
        if os.path.isdir(folder):
            return folder
    return None


def find_templates(
    dataset: str, config: str | None, folders: Sequence[storage.PathLike]
) -> dict[str, PromptTemplate]:
    """Reads the templates of a dataset from all folders; of two templates of one name, the first folder's.

    Args:
        dataset: name of the dataset.
        config: its config, None without one. A config without a file of its own uses that of the
            dataset (``anli/r1``).
        folders: in order of preference, in the layout ``<dataset>[/<config>]/templates.yaml``.

    Raises:
        InputError: no folder has templates of the dataset.
    """
    found: dict[str, PromptTemplate] = {}
    for path in _template_files(dataset, config, folders):
        found = {**_read_cached(str(path)), **found}
    if found:
        return found
    paths = [str(path) for paths in _template_places(dataset, config, folders) for path in paths]
    raise InputError(describe(
        f"There are no templates for {dataset_path(dataset, config)}", expected=f"one of {', '.join(paths)}",
        cure="install promptsource, or set ELM_DATA_DIR to a folder with templates.yaml files"))


def _template_places(dataset: str, config: str | None, folders: Sequence[storage.PathLike]
                     ) -> list[list[epath.Path]]:
    """For each folder the files that may hold the templates; the first of them that exists does."""
    names = [dataset_path(dataset, config), *([dataset] if config else [])]
    return [[storage.as_path(folder) / name / FILE_NAME for name in names] for folder in folders]


def _template_files(dataset: str, config: str | None, folders: Sequence[storage.PathLike]
                    ) -> list[epath.Path]:
    """The files that hold templates of a dataset, at most one of each folder, in the folders' order."""
    found = (next((path for path in paths if path.exists()), None)
             for paths in _template_places(dataset, config, folders))
    return [path for path in found if path is not None]


def find_template(
    dataset: str, config: str | None, name: str, folders: Sequence[storage.PathLike]
) -> PromptTemplate:
    """Returns one template by its own name; an unknown name is an InputError with the three nearest."""
    templates = find_templates(dataset, config, folders)
    if name not in templates:
        files = ", ".join(map(str, _template_files(dataset, config, folders)))
        raise unknown_name("template", name, templates, where=f"{dataset_path(dataset, config)}: {files}")
    return templates[name]


def dataset_name(dataset: str, config: str | None) -> str:
    """Name of a dataset in task names: ``<dataset>[_<config>]`` in lower case, other characters as ``_``.

    >>> dataset_name("super_glue", "wsc.fixed")
    'super_glue_wsc_fixed'
    """
    return _plain(dataset if config is None else f"{dataset}_{config}")


def dataset_path(dataset: str, config: str | None) -> str:
    """Name of a dataset as the hub, the data folder and results write it: ``<dataset>[/<config>]``.

    >>> dataset_path("super_glue", "wsc.fixed"), dataset_path("imdb", None)
    ('super_glue/wsc.fixed', 'imdb')
    """
    return f"{dataset}/{config}" if config else dataset


def task_name(dataset: str, config: str | None, template: str) -> str:
    """Name of a task: ``<dataset>[_<config>]__<template>``.

    >>> task_name("super_glue", "rte", "MNLI crowdsource")
    'super_glue_rte__mnli_crowdsource'
    """
    return f"{dataset_name(dataset, config)}__{_plain(template)}"


def _plain(text: str) -> str:
    return re.sub("[^a-z0-9]+", "_", text.lower())


def check_collisions(dataset: str, config: str | None, templates: Iterable[str]) -> None:
    """Raises InputError if two templates of a dataset have the same task name."""
    owners: dict[str, str] = {}
    for template in templates:
        name = task_name(dataset, config, template)
        if name in owners:
            raise InputError(describe(f"Two templates get the task name {name}",
                                      got=f"{owners[name]!r} and {template!r}"))
        owners[name] = template
