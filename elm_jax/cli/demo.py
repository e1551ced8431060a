"""What `elm demo` does: the study of ``gin/studies/demo.gin`` in a folder of its own."""

import argparse

from elm_jax.cli.study import run


def demo(arguments: argparse.Namespace) -> int:
    """`elm demo`."""
    return run(["studies/demo.gin"], [f"WORKDIR={arguments.workdir!r}"], [])
