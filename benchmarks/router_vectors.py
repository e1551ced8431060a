"""Embedded texts of the reference's tasks, as elm_jax's routers take them: keys, queries, template texts.

What a task is embedded from is kept in a folder, under a name that depends on its rows, its template and the
encoder, so that a second run embeds nothing.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from elm_jax.data.draw import draw_rows
from elm_jax.data.registry import registry
from elm_jax.routing.encoders import make_encoder
from elm_jax.routing.text import RoutingInstance, format_text
from elm_jax.runtime.config_checks import DEFAULT_MODULES

FORMAT = "choice_instance"


class TaskVectors:
    """Unit vectors f32[n, K] of rows and templates of registered tasks.

    Args:
        cache: folder for what was embedded; None keeps nothing.
    """

    def __init__(self, cache: pathlib.Path | None) -> None:
        registry.import_tasks(DEFAULT_MODULES)
        self.encoder, self.cache = make_encoder("minilm", texts=()), cache
        names = [*registry.task_names(role="train"), *registry.task_names(role="unseen")]
        self.names = {name: _slug(name.split("__", 1)[1]) for name in names}
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)

    def task_of(self, canonical: str) -> str:
        """The registered task of a canonical name ``data set@prompt``."""
        dataset, prompt = (_slug(part) for part in canonical.split("@", 1))
        found = [name for name, slug in self.names.items() if slug == prompt and name.startswith(dataset)]
        if not found:  # a name that the ranking files cut off
            found = [name for name, slug in self.names.items()
                     if slug.startswith(prompt) and name.startswith(dataset)]
        if len(found) != 1:
            raise ValueError(f"{canonical}: one registered task is expected, got {found}")
        return found[0]

    def rows(self, canonical: str, split: str, count: int) -> np.ndarray | None:
        """At most `count` rows of a split, f32[n, K], drawn by seed 0; None if there are no rows here."""
        task = registry.get_task(self.task_of(canonical))
        if task.why_unavailable() is not None:
            return None
        kept = self._kept_as(task.name, split, count, task.source_digest(split))
        if kept is not None and kept.exists():
            return np.load(kept)
        rows = [row for _, row in task.render_rows(split)]
        drawn = [rows[place] for place in draw_rows(len(rows), count, 0)]
        return self._embedded(kept, [format_text(
            RoutingInstance(row.inputs, row.choices_expression, row.choices or ()), FORMAT) for row in drawn])

    def templates(self, canonical: Iterable[str]) -> np.ndarray:
        """The templates of tasks as they are written, f32[n, K]: what is known of a task without a row."""
        texts = []
        for name in canonical:
            template = registry.get_task(self.task_of(name)).load_template()
            texts.append(format_text(RoutingInstance(
                template.instruction, template.answer_choices), FORMAT))
        return self._embedded(self._kept_as("templates", *texts), texts)

    def _kept_as(self, *facts: str | int) -> pathlib.Path | None:
        words = json.dumps([FORMAT, self.encoder.fingerprint, *facts]).encode()
        return None if self.cache is None else self.cache / f"{hashlib.sha256(words).hexdigest()[:24]}.npy"

    def _embedded(self, kept: pathlib.Path | None, texts: Sequence[str]) -> np.ndarray:
        if kept is not None and kept.exists():
            return np.load(kept)
        vectors = self.encoder.embed(texts)
        if kept is not None:
            np.save(kept, vectors)
        return vectors


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
