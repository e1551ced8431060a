"""What promptsource itself renders of the data folder's rows, as hashes.

Makes ``golden_renders.json`` again, with the real package (it is slow: promptsource compiles each template
for each row):

    ELM_DATA_DIR=data PYTHONPATH=. python tests/helpers/golden_renders.py

In an environment that cannot take the package's own dependencies, install it beside the rest and name it:
``pip install --no-deps --ignore-requires-python --target ps promptsource==0.2.3``, ``PYTHONPATH=.:ps``.
"""

import hashlib
import importlib
import importlib.util
import itertools
import json
import pathlib
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from elm_jax.tasks import facts

from elm_jax.data.prompts import templates
from elm_jax.data.prompts.templates import PromptTemplate
from elm_jax.data.registry import registry
from elm_jax.data.sources import row_files

FILE = pathlib.Path(__file__).with_suffix(".json")
ROWS, FEW = 200, 10
"""Rows of each template that are compared, and how many of them in the short test."""
Render = Callable[[dict[str, Any], int], tuple[list[str], list[str] | None]]
"""From a row and a seed to the parts of the prompt and the answer choices."""


def load_promptsource() -> types.ModuleType | None:
    """promptsource's own templates module, None without the package; what its web page needs is stubbed."""
    if importlib.util.find_spec("promptsource") is None:
        return None
    stubs = []
    for name in ("pandas", "pkg_resources"):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].resource_filename = lambda package, path: path
            stubs.append(name)
    module = importlib.import_module("promptsource.templates")
    for name in stubs:
        del sys.modules[name]
    return module


def rows_of(dataset: str, config: str | None) -> list[dict[str, Any]]:
    """`ROWS` rows, of validation first, then of train."""
    files = [row_files.find_file(dataset, config, split) for split in ("validation", "train")]
    lines = itertools.chain.from_iterable(row_files.read_lines(path) for path in files if path is not None)
    return list(itertools.islice(lines, ROWS))


def served() -> Iterator[tuple[str, pathlib.Path, str, str | None, list[str]]]:
    """Every set of templates that the data folder's rows serve, ours too.

    Yields:
        A name, the file of the templates, data set and config of the rows, the templates' names.
    """
    for entry in row_files.read_index().values():
        dataset, config = entry["name"], entry["config"]
        if entry["templates"]:
            folder = row_files.data_dir() / dataset
            path = next(path for path in (folder / str(config) / templates.FILE_NAME,
                                          folder / templates.FILE_NAME) if path.exists())
            usable = sorted(set(templates.read_templates(path)) - set(entry.get("unusable_templates", ())))
            yield templates.dataset_name(dataset, config), path, dataset, config, usable
    own = {task.dataset_name: task for task in map(registry.get_task, registry.task_names(role="generative"))
           if task.why_unavailable() is None}
    for name, task in own.items():
        path = pathlib.Path(facts.TEMPLATE_FOLDER) / task.dataset / templates.FILE_NAME
        if path.exists():
            yield name, path, *task.row_source, sorted(templates.read_templates(path))


def ours(template: PromptTemplate) -> Render:
    """This program's rendering."""
    return lambda row, seed: template._render(row, seed, True)


def theirs(module: types.ModuleType, path: pathlib.Path, name: str) -> Render:
    """promptsource's rendering, of the template as promptsource itself reads it, drawing by the same seed."""
    known = yaml.load(path.read_text(), Loader=yaml.FullLoader)["templates"].values()
    template, = [template for template in known if template.name == name]
    assert isinstance(template, module.Template)

    def render(row: dict[str, Any], seed: int) -> tuple[list[str], list[str] | None]:
        random.seed(seed)
        parts = template.apply(dict(row))
        return parts, template.get_answer_choices_list(dict(row))

    return render


def digest(rendered: list[tuple[list[str], list[str] | None]]) -> str:
    """Hash of prompts, targets and choices."""
    return hashlib.sha256(json.dumps([list(row) for row in rendered]).encode()).hexdigest()[:16]


def main() -> None:
    """Writes the file."""
    module, golden = load_promptsource(), {}
    assert module is not None, "promptsource is not installed"
    for name, path, dataset, config, names in served():
        rows = rows_of(dataset, config)
        for own in names:
            render = theirs(module, path, own)
            rendered = [render(row, seed) for seed, row in enumerate(rows)]
            golden[f"{name}: {own}"] = [len(rows), digest(rendered[:FEW]), digest(rendered)]
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items())
    FILE.write_text("{\n" + lines + "\n}\n")
    print(f"{len(golden)} templates, {sum(value[0] for value in golden.values())} renders in {FILE}")


if __name__ == "__main__":
    registry.import_tasks(["elm_jax.tasks"])
    main()
