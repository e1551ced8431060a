"""Which text of each template the paper's tasks have: digests of the versions that are known.

``pinned_templates.json`` lists, for every task with a template of promptsource or of our own, the digest of
its text in each version. promptsource's repository at 7dab96a3ee and its package 0.2.3 differ for multi_news
and trec. ``make_pins`` writes the file.
"""

import functools
import os
from collections.abc import Mapping

from elm_jax.runtime import storage

FILE = os.path.join(os.path.dirname(__file__), "pinned_templates.json")
HEAD, PACKAGE, OWN = "promptsource 7dab96a3ee", "promptsource 0.2.3", "elm_jax 1"


@functools.cache
def _read() -> Mapping[str, Mapping[str, str]]:
    return storage.read_json(FILE, kind="list of pinned templates", schema_version=1)["templates"]


def versions_of(task: str) -> dict[str, str]:
    """From the digest of a text of the task's template to the version that has it."""
    return {digest: version for version, digest in reversed(_read().get(task, {}).items())}
