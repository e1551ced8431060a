"""Pictures of the studies of arms: gain against the number of tuning tasks."""

from collections.abc import Callable, Mapping, Sequence

from elm_jax.reporting.arms.arm_cells import ACCURACY, METRICS, TITLES, UNITS
from elm_jax.reporting.arms.verdicts import Verdict
from elm_jax.reporting.plots import png_of, short_name

SHIFT = 0.03
"""Share of a step by which the arms' marks stand apart."""


def gain_curves(counts: Sequence[int], gains: Callable[[str], Mapping[str, Sequence[Verdict]]]) -> bytes:
    """Draws the gain of each arm against the number of tuning tasks as PNG, a panel a metric.

    Args:
        counts: numbers of tasks.
        gains: by metric: by arm, the gain at each count.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, metric in zip(figure.subplots(1, len(METRICS)), METRICS, strict=True):
        unit = 100 if metric == ACCURACY else 1
        for number, (arm, found) in enumerate(gains(metric).items()):
            middle = [unit * one.estimate.value for one in found]
            below = [unit * (one.estimate.value - one.estimate.low) for one in found]
            above = [unit * (one.estimate.high - one.estimate.value) for one in found]
            places = [count * (1 + SHIFT * number) for count in counts]
            axes.errorbar(places, middle, yerr=[below, above], marker="o", ms=4, lw=1.2, capsize=2,
                          label=short_name(arm, 30))
        axes.axhline(0, lw=0.8, color="black")
        axes.set_xscale("log")
        axes.set_xticks(list(counts), [str(count) for count in counts])
        axes.set_xlabel("tuning tasks", fontsize=8)
        axes.set_ylabel(f"gain, {UNITS[metric]}", fontsize=8)
        axes.set_title(TITLES[metric], fontsize=9)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=7)
    return png_of(figure)
