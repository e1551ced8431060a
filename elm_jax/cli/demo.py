"""The verb `elm demo`: runs the study of ``gin/studies/demo.gin`` in its own folder."""

import argparse

from elm_jax.cli.study import run


def demo(arguments: argparse.Namespace) -> int:
    """Runs `elm demo`; returns the exit status."""
    return run(["studies/demo.gin"], [f"WORKDIR={arguments.workdir!r}"], [], arguments.command)
