"""Plots of the training of experts: the loss by step, a panel an expert."""

from collections.abc import Mapping, Sequence

import numpy as np

from elm_jax.reporting.plots import png_of, short_name

COLUMNS, MOST_PANELS = 3, 60


def learning_curves(losses: Mapping[str, Sequence[tuple[int, float]]]) -> bytes:
    """Draws the loss by step of each expert as PNG: small panels of one scale, at most `MOST_PANELS`.

    Args:
        losses: expert -> (step, loss) in order, at least one of each.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(losses)[:MOST_PANELS]
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.5 * columns + 0.3, 1.45 * rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=False, sharey=True).ravel()
    for axes, name in zip(panels, names, strict=False):
        step, loss = np.asarray(losses[name], np.float64).T
        axes.plot(step, loss, lw=1.3, color="#3d6f9e", marker="o" if len(step) == 1 else None)
        axes.set_title(short_name(name, 34), fontsize=7.5, pad=3)
        axes.set_yscale("log" if min(min(value for _, value in own) for own in losses.values()) > 0
                        else "linear")
        axes.tick_params(labelsize=6.5, length=2)
        axes.grid(alpha=0.3, lw=0.5, which="both", axis="y")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(names):]:
        axes.set_visible(False)
    figure.supylabel("loss", fontsize=8)
    figure.supxlabel("step", fontsize=8)
    return png_of(figure)
