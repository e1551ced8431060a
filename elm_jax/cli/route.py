"""The verb `elm route`: reads flags, calls one workflow, prints its result."""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from elm_jax.cli.printing import (
    Column,
    print_json,
    print_lines,
    print_sentences,
    print_table,
    shortened,
    terminal_width,
)
from elm_jax.cli.registries import modules_of
from elm_jax.errors import InputError, describe
from elm_jax.routing.router import ROUTERS
from elm_jax.routing.vote import RoutingDecision
from elm_jax.runtime.config_checks import check_range
from elm_jax.workflows.route import RouteConfig
from elm_jax.workflows.route_report import RouteReport, report_route, report_rows
from elm_jax.workflows.row_routes import RowRoute

ALL = "all"
"""In a router's place: all that can decide."""
NO_TEXTS = "The library keeps means, and no training text to show."
FIELDS = ("library", "task", "examples", "split", "encoder_dir", "seed", "instruction", "labelled", "base",
          "dataset", "family", "none_of_these")
"""Flags that are fields of the config."""


def route(arguments: argparse.Namespace) -> None:
    """Runs `elm route`."""
    every = arguments.router == ALL
    if every and arguments.per_row:
        raise InputError(describe("One router decides for each row", where="--per_row", got=f"--router {ALL}",
                                  expected="one router, or none for the library's own"))
    check_range("top_k", arguments.top_k, 1)
    config = RouteConfig(
        router=None if every else arguments.router, num_queries=arguments.queries,
        modules=modules_of(arguments), prepared_dir=arguments.prepared,
        **{name: getattr(arguments, name) for name in FIELDS})
    if arguments.per_row:
        _print_rows(config, arguments)
        return
    report = report_route(config, every=every, top_k=arguments.top_k)
    if arguments.json:
        print_json(report.to_dict())
    elif every:
        _print_all(report, arguments)
    else:
        _print_one(report, arguments)


def _print_one(report: RouteReport, arguments: argparse.Namespace) -> None:
    """Prints one router's ranking with all reasons, and what matched its first experts best."""
    lines, asked = report.decision.ranking, report.decision.num_queries
    nearest = {match.expert: match.nearest for match in report.matches}
    facts = (("score", 1, "{:.3f}", [line.score for line in lines]),
             ("accuracy", 1, "{:.3f}", [line.accuracy for line in lines]),
             ("on rows", 2, "{}", [line.rows for line in lines]),
             ("votes", 1, "{}", [line.votes if asked else None for line in lines]),
             ("similarity", 2, "{:.3f}", [line.mean_similarity for line in lines]),
             ("to centroid", 4, "{:.3f}", [line.centroid_similarity for line in lines]),
             ("prior", 3, "{:.2f}", [line.prior for line in lines]))
    columns = [Column("rank", kind="number"), Column("expert")]
    columns += [_figures(name, rank, form, values) for name, rank, form, values in facts]
    columns += [Column("copy of", 5, where="both" if any(line.copy_of for line in lines) else "scripts"),
                Column("chosen", 3), Column("nearest text", where="scripts")]
    print_table(columns, [
        (rank, line.expert, *(values[rank - 1] for *_, values in facts), line.copy_of,
         rank <= arguments.top_k, nearest.get(line.expert, ""))
        for rank, line in enumerate(lines, start=1)], wide=arguments.wide, title=_title(report.decision),
        notes=_notes(report))
    _print_matches(report)


def _print_all(report: RouteReport, arguments: argparse.Namespace) -> None:
    """Prints the ranks by all routers, a column each, in the order of the usual one."""
    own, names = report.decision.router, list(report.decisions)
    ranks = {name: report.ranks(name) for name in names}
    scores = {name: {line.expert: line.score for line in report.decisions[name].ranking} for name in names}
    columns = [Column("expert")]
    columns += [Column(name.replace("+", " +"), 0 if name == own else 1, "number") for name in names]
    columns += [Column(f"{name} score", where="scripts") for name in names]
    print_table(columns, [
        (line.expert, *(ranks[name][line.expert] for name in names),
         *(scores[name][line.expert] for name in names)) for line in report.decision.ranking],
        wide=arguments.wide, title=f"{_title(report.decision)}; ranks by each router", notes=_notes(report))
    _print_matches(report)


def _print_rows(config: RouteConfig, arguments: argparse.Namespace) -> None:
    """Prints a decision for each of the task's instances."""
    router, instances, routes = report_rows(config)
    has_texts = any(one.nearest is not None for one in routes)
    if arguments.json:
        print_json({"router": router, "rows": [{"inputs": instance.source, **route.to_dict()}
                                               for instance, route in zip(instances, routes, strict=True)]})
        return
    columns = (Column("row", kind="number"), Column("expert"),
               Column("similarity", 1, "number", "{:.3f}".format), Column("next expert", 3),
               Column("next similarity", 4, "number", "{:.3f}".format),
               Column("nearest text", 2, "excerpt", where="both" if has_texts else "scripts"),
               Column("text", where="scripts"),
               Column("any fits", 1, where="both" if config.none_of_these else "scripts"))
    print_table(columns, [
        (number, one.expert, one.similarity, one.next_expert, one.next_similarity, one.nearest, row.source,
         one.is_sure)
        for number, (row, one) in enumerate(zip(instances, routes, strict=True), start=1)],
        wide=arguments.wide, title=f"{len(routes)} rows, each by itself, router {router}",
        notes=[*_count_of_none(routes), *([] if has_texts else [NO_TEXTS])])


def _count_of_none(routes: Sequence[RowRoute]) -> Iterator[str]:
    """Says how many rows no expert fits, if that was asked and there are some."""
    count = sum(one.is_sure is False for one in routes)
    if count:
        yield f"None of the experts fits {count} of the {len(routes)} rows; the base should answer them."


def _title(decision: RoutingDecision) -> str:
    number = decision.num_queries
    queries = {0: "the task's text", 1: "1 query"}.get(number, f"{number} queries")
    return f"{queries}, {decision.text_format}, {decision.encoder}, router {decision.router}"


def _notes(report: RouteReport) -> Iterator[str]:
    """What else is to be known of a decision, a sentence each."""
    name = report.decision.router
    yield f"{name}: {ROUTERS[name].about}."
    if report.decision.is_sure is False:
        yield "The task is far from what the experts learned: none of these; the base should answer."
    if report.decision.is_known:
        yield "The library knows tasks like this: experts with votes come first."
    priors = [line.prior for line in report.decision.ranking if line.prior is not None]
    if priors:
        kin = (("data set", report.dataset), ("family", report.family))
        left_out = [f"{what} {value}" for what, value in kin if value is not None]
        yield (f"Priors leave out {' and '.join(left_out)}." if left_out else
               "Priors leave nothing out: --dataset and --family name what is akin to the task.")
        if not any(priors):
            yield "No other data set tells experts apart: every prior is 0."
    if any(match.nearest is None for match in report.matches):
        yield NO_TEXTS
    for reason in dict.fromkeys(report.unable.values()):
        others = [other for other, why in report.unable.items() if why == reason]
        yield f"Without {', '.join(others)}: {reason}."


def _print_matches(report: RouteReport) -> None:
    """Prints for the first experts the training instance that matched best, a line each, cut at the width."""
    if not any(match.nearest for match in report.matches) or terminal_width() is None:
        return  # scripts have it as a column
    print_sentences("Nearest training text of the first experts:")
    for rank, match in enumerate(report.matches, start=1):
        print_lines(shortened(f"{rank}. {match.similarity:.3f} {match.nearest}", terminal_width()))


def _figures(name: str, rank: int, form: str, values: list[Any]) -> Column:
    """A column of figures; scripts alone get one that is empty."""
    return Column(name, rank, "number", form.format,
                  "both" if any(value is not None for value in values) else "scripts")
