"""The verb `elm convert`: reads flags, calls one workflow, prints its result."""

import argparse

from elm_jax.cli.printing import print_json, print_lines
from elm_jax.cli.registries import modules_of
from elm_jax.workflows.choices import parse_size
from elm_jax.workflows.convert import convert_model as converting


def convert(arguments: argparse.Namespace) -> int:
    """Runs `elm convert`: prints what was written and the largest difference, or the whole report as JSON."""
    config = converting.ConvertConfig(
        source=arguments.source, source_kind=arguments.source_kind, target=arguments.target,
        target_kind=arguments.target_kind, base=arguments.base, dtype=arguments.dtype,
        max_shard_bytes=parse_size(arguments.max_shard_size), layout=arguments.layout,
        scanned=arguments.scanned, step=arguments.step, experts_per_token=arguments.experts_per_token,
        vocabulary=arguments.vocabulary, verify=arguments.verify, expert_id=arguments.id, kind=arguments.kind,
        modules=modules_of(arguments))
    report = converting.convert(config)
    if arguments.json:
        print_json(report)
        return 0
    print_lines(*converting.summary(report))
    return 0
