"""Adds the comparison of routers to a finished study that has none, or one of other results."""

import dataclasses
import logging
from typing import Any

from etils import epath

from elm_jax.data.preparing.task_data import TaskData
from elm_jax.data.registry import registry
from elm_jax.errors import InputError
from elm_jax.evaluation.results import ResultsStore, kept_results
from elm_jax.experts.base import load_vocabulary
from elm_jax.experts.library import ExpertLibrary
from elm_jax.reporting.router_comparison import FILE, read_picks, results_digest
from elm_jax.reporting.study_facts import read_facts
from elm_jax.runtime import records, storage
from elm_jax.workflows.study.study_routers import compare_routers, compared_tasks

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SettingsKept:
    """Settings of a study, as its facts keep them, on which the comparison of its routers depends."""

    modules: list[str]
    prompt_tasks: list[str]
    unseen_tasks: list[str]
    heldout_prompts: list[str]
    generative_tasks: list[str]
    num_queries: int
    max_eval_rows: int
    random_seed: int
    initial_checkpoint_path: str | None = None
    bigbench_tasks: list[str] = dataclasses.field(default_factory=list)
    bbh_tasks: list[str] = dataclasses.field(default_factory=list)


def add_comparison(results: storage.PathLike) -> bool:
    """Compares the routers of a study by its results, and the library and arrays that stand beside them.

    Nothing is done where there is a comparison of these results (an older one, which does not say of which it
    is, counts as such), or results alone. What keeps it from being made, such as an encoder that is not
    there, is a warning: the rest of the report needs none of it, and an older comparison stays.

    Returns:
        Whether there is a comparison now.

    Raises:
        InputError: the study's facts or results are damaged.
    """
    results = storage.as_path(results)
    root = storage.absolute(results).parent
    facts, store = read_facts(results), ResultsStore(results)
    there = read_picks(results, facts)
    made_of = "" if there is None else there.get("results", "")
    if there is not None and made_of in ("", results_digest(store, there["experts"])):
        return True
    if there is not None:
        logger.warning("the table of routers was made of other results than these: %s", results / FILE)
    if not ((root / "library" / "library.json").exists() and (root / "prepared").exists()):
        return there is not None
    try:
        record = _compared(facts["config"], root, store)
    except InputError as error:
        logger.warning("the report has %s table of routers: %s", "no" if there is None else "an older", error)
        return there is not None
    with kept_results(results):
        storage.write_json(results / FILE, record)
    return True


def _compared(settings: dict[str, Any], root: epath.Path, store: ResultsStore) -> dict[str, Any]:
    records.check_record(settings, SettingsKept, kind="study's facts", where="study.json: config")
    registry.import_tasks(settings["modules"])  # families of tasks come from there
    base = settings.get("initial_checkpoint_path") or root / "base" / "base"
    data = TaskData(load_vocabulary(base)[0], settings["modules"], root / "prepared")
    return compare_routers(ExpertLibrary.open(root / "library"), store, compared_tasks(settings, data))
