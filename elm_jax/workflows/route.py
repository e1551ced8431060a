"""`elm route`: which expert of a library suits a task that nobody trained on."""

from collections.abc import Sequence

from elm_jax.data.sources import row_files
from elm_jax.errors import InputError, describe
from elm_jax.experts.library import ExpertLibrary
from elm_jax.routing.text import RoutingInstance, format_text
from elm_jax.routing.vote import RoutingDecision, decide
from elm_jax.runtime import storage


def route(library: ExpertLibrary, texts: Sequence[str | RoutingInstance], *, num_queries: int = 32,
          ) -> RoutingDecision:
    """Routes one task: its first `num_queries` instances vote for the expert of their nearest key.

    Args:
        library: an open library.
        texts: instances of ONE task; plain strings are taken as inputs without answer choices.
        num_queries: Q, at most so many instances are used; fewer instances mean fewer votes.

    Returns:
        The ranking of all experts, with votes and similarities.
    """
    if not texts:
        raise InputError(describe("Routing needs at least one instance of the task"))
    if num_queries < 1:
        raise InputError(describe("Config value is out of range", where="num_queries", got=num_queries,
                                  expected="1 or more"))
    instances = [RoutingInstance(text) if isinstance(text, str) else text for text in texts[:num_queries]]
    queries = library.encoder.embed([format_text(instance, library.text_format) for instance in instances])
    return decide(queries, library.index)


def read_examples(path: storage.PathLike) -> list[RoutingInstance]:
    """Instances from JSON lines: ``{"inputs": str, "choices": [str], "choices_expression": str}``.

    Raises:
        InputError: a line that is not JSON or has no ``inputs`` (file and line are named).
    """
    instances = []
    for number, row in enumerate(row_files.read_lines(path), start=1):
        if not isinstance(row.get("inputs"), str):
            raise InputError(describe("An instance has no text", where=f"{path}, line {number}",
                                      got=sorted(row), expected='a field "inputs" with a string'))
        instances.append(RoutingInstance(row["inputs"], row.get("choices_expression"),
                                         tuple(row.get("choices") or ())))
    return instances
