"""Writes ``pinned_templates.json``: the digests of every template's text in the versions that are known.

    python -m elm_jax.tasks.make_pins --head PROMPTSOURCE_CLONE/promptsource/templates \\
        --package SITE_PACKAGES/promptsource/templates
"""

import argparse
import os

from elm_jax.tasks import facts, pins

from elm_jax.data.prompts import templates
from elm_jax.data.registry import registry
from elm_jax.runtime import storage


def main() -> None:
    """Writes the file anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", required=True, metavar="DIR", help="templates of the repository's head")
    parser.add_argument("--package", required=True, metavar="DIR", help="templates of the package")
    arguments = parser.parse_args()
    folders = {pins.HEAD: arguments.head, pins.PACKAGE: arguments.package, pins.OWN: facts.TEMPLATE_FOLDER}
    found = {}
    for task in map(registry.get_task, registry.task_names()):
        if task.prompt is None:
            digests = {version: templates.find_templates(task.dataset, task.config, [folder])
                       for version, folder in folders.items() if _has(task, folder)}
            found[task.name] = {version: known[task.template].digest for version, known in digests.items()
                                if task.template in known}
    storage.write_json(pins.FILE, {"schema_version": 1, "templates": found})
    print(f"{len(found)} templates in {pins.FILE}")


def _has(task: registry.PromptedTask, folder: str) -> bool:
    names = ([f"{task.dataset}/{task.config}"] if task.config else []) + [task.dataset]
    return any(os.path.exists(os.path.join(folder, name, templates.FILE_NAME)) for name in names)


if __name__ == "__main__":
    main()
