"""Stacks of the experts of `tiny_run`, which a test can start, kill and start again.

As a script: ``python tiny_stack.py MODEL_DIR SLOTS`` trains the table of `table()` in MODEL_DIR; status 3
says that SIGTERM stopped it.
"""

import dataclasses
import json
import pathlib
import sys

import jax
import tiny_run

from elm_jax.runtime import sharding, storage, trees
from elm_jax.training.loop import FitResult, fit
from elm_jax.training.optimizers import OptimizerConfig
from elm_jax.training.run_settings import RunConfig, StackConfig
from elm_jax.training.stack.slots import Opened, StackedRun
from elm_jax.training.stack.stacked_loop import Ended, StackCallbacks, StackResult, fit_stack
from elm_jax.types import Params

OPTIMIZER = OptimizerConfig("adamw", learning_rate=1.0, schedule="linear_decay", warmup_steps=2,
                            clip_norm=1.0, weight_decay=0.01)


@dataclasses.dataclass(frozen=True)
class Row:
    """One expert of a table."""

    id: str
    train_steps: int
    seed: int = 0
    learning_rate: float = 3e-3
    data: int = 0


def table(scale: int = 1) -> list[Row]:
    """Experts of unlike length, seed, rate and data."""
    rows = [("a", 6, 3, 1e-3), ("b", 9, 1, 3e-3), ("c", 4, 7, 2e-3), ("d", 11, 0, 1e-3), ("e", 5, 2, 5e-4)]
    return [Row(name, steps * scale, seed, rate, data=number)
            for number, (name, steps, seed, rate) in enumerate(rows)]


def overlay_of(row: Row, base: Params) -> Params:
    """Every expert starts from adapters of its own."""
    overlay, _ = trees.split(base, tiny_run.is_prompt_leaf)
    return jax.tree.map(lambda leaf: leaf * (1 + 0.01 * row.data), overlay)


def stream_of(row: Row):
    return tiny_run.stream(seed=row.data, size=40 + row.data)


def solo(row: Row, model_dir: str | None = None, **options) -> FitResult:
    """The same expert alone; `options` are those of `RunConfig`, and network, mesh."""
    net = options.pop("network", tiny_run.network())
    base, mesh = tiny_run.parameters(net), options.pop("mesh", sharding.make_mesh(1, 1))
    optimizer = dataclasses.replace(options.pop("optimizer", OPTIMIZER), learning_rate=row.learning_rate)
    run = RunConfig(**{"train_steps": row.train_steps, "random_seed": row.seed, "model_dir": model_dir,
                       "optimizer": optimizer, "name": None, **options})
    return fit(net, base, overlay_of(row, base), stream_of(row), run, mesh)


def stack(rows: list[Row], size: int, model_dir: str | None = None, **options) -> tuple[dict, StackResult]:
    """(what ended by id, result); `options` of `StackConfig`, and network, mesh, stream_of."""
    net = options.pop("network", tiny_run.network())
    base, folder = tiny_run.parameters(net), model_dir and pathlib.Path(model_dir)
    make_stream = options.pop("stream_of", stream_of)
    mesh = options.pop("mesh", sharding.make_mesh(1, 1, 1))
    validation = options.pop("validation_of", lambda row: [])
    calls = {name: options.pop(name) for name in ("on_fail", "on_start") if name in options}
    ended: dict[str, Ended] = {}

    def open_row(row: Row) -> Opened:
        return Opened(overlay_of(row, base), make_stream(row), row.train_steps, validation(row))

    def on_end(found: Ended) -> None:
        ended[found.run.id] = found
        if folder:
            storage.write_json(folder / found.run.id / "ended.json", {
                "schema_version": 1, "fingerprint": trees.fingerprint(found.overlay), "step": found.step})

    runs = [StackedRun(row.id, row.seed, row.learning_rate, repr(row), lambda row=row: open_row(row),
                       str(folder / row.id) if folder else None)
            for row in rows if not (folder and (folder / row.id / "ended.json").exists())]
    config = StackConfig(**{
        "size": size, "model_dir": str(folder / "stack") if folder else None, "checkpoint_period": 7,
        "optimizer": OPTIMIZER, "name": None, **options})
    return ended, fit_stack(net, base, runs, config, mesh, StackCallbacks(on_end, **calls))


def rows_in(folder: pathlib.Path) -> list[dict]:
    """An expert's rows on disk, without what depends on the clock."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{name: value for name, value in json.loads(line).items() if name != "tokens_per_second"}
            for line in lines]


if __name__ == "__main__":
    sys.exit(3 if stack(table(20), int(sys.argv[2]), sys.argv[1])[1].stopped else 0)
