"""Figures of runs over their updates, as pictures."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.evaluation.metrics import Events, series

MANY = 200  # points; a line of more is smoothed over a window of 1 / WINDOWS of them
WINDOWS = 50
COLUMNS = 3  # panels side by side
WIDTH, HEIGHT, DPI = 5.2, 3.4, 110  # inches a panel, dots an inch

Points = tuple[np.ndarray, np.ndarray]  # updates, values: float64 [n]


@dataclass(frozen=True)
class Line:
    """One figure of one run.

    Args:
        label: in the legend.
        colour: number of a colour of matplotlib's "tab10"; the eleventh is the first again.
        train: drawn as a line, and smoothed where there are many points.
        val: drawn as dots.
    """

    label: str
    colour: int
    train: Points
    val: Points


@dataclass(frozen=True)
class Panel:
    """Lines over the same axes; on a logarithmic one only what is above 0 is seen."""

    title: str
    lines: tuple[Line, ...]
    log: bool = False


@dataclass(frozen=True)
class HeatMap:
    """A value of each residual block over the updates.

    Args:
        title: of the panel.
        steps: [n], rising.
        blocks: [m] names.
        values: [m, n].
    """

    title: str
    steps: np.ndarray
    blocks: list[str]
    values: np.ndarray


def line(events: Events, name: str, label: str, colour: int) -> Line:
    """A figure of a run, from its events."""
    train = series(events, name, "train", "speed", "machine")
    return Line(label, colour, train, series(events, name, "val"))


def smoothed(values: np.ndarray) -> np.ndarray:
    """Means over windows around each point, narrower at both ends; few points stay as they are.

    Args:
        values: finite, float64 [n].
    """
    n = len(values)
    if n <= MANY:
        return values
    half = n // WINDOWS // 2
    # from the first value on, so that what does not change stays as it is
    sums = np.concatenate([[0.0], np.cumsum(values - values[0])])
    places = np.arange(n)
    # as far to one side as to the other: a window that leans would shift a slope
    reach = np.minimum(half, np.minimum(places, n - 1 - places))
    return values[0] + (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def draw(panels: list[Panel | HeatMap]) -> bytes:
    """A PNG of all panels, ``COLUMNS`` in a row."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH * columns, HEIGHT * rows), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, panel in zip(axes.flat, panels, strict=False):
        if isinstance(panel, HeatMap):
            _draw_heat_map(axis, panel)
        else:
            _draw_lines(axis, panel)
        axis.set_title(panel.title)
        axis.set_xlabel("update")
        axis.xaxis.get_major_locator().set_params(integer=True)
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def _draw_lines(axis: Any, panel: Panel) -> None:
    is_bad = False
    for one in panel.lines:
        colour, label = f"C{one.colour % 10}", one.label
        (steps, values), bad = _finite(one.train)
        if len(values):
            even = smoothed(values)
            if even is not values:
                axis.plot(steps, values, color=colour, lw=0.6, alpha=0.25)
            # a line of one point is none
            axis.plot(steps, even, "-" if len(values) > 1 else "_", color=colour, lw=1, label=label)
            label = f"{one.label}, held out"
        (steps, values), bad_val = _finite(one.val)
        if len(values):
            axis.plot(steps, values, "o", color=colour, ms=4, label=label)
        bad = np.concatenate([bad, bad_val])
        if len(bad):
            top = np.full(len(bad), 0.97)
            axis.plot(bad, top, "x", color=colour, ms=4, transform=axis.get_xaxis_transform())
            is_bad = True
    if is_bad:
        axis.plot([], [], "x", color="black", ms=4, label="not finite")
    if panel.log:
        axis.set_yscale("log", nonpositive="mask")
    else:
        axis.ticklabel_format(axis="y", useOffset=False)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def _finite(points: Points) -> tuple[Points, np.ndarray]:
    """(points that are numbers, updates of those that are none)."""
    steps, values = points
    good = np.isfinite(values)
    return (steps[good], values[good]), steps[~good]


def _draw_heat_map(axis: Any, panel: HeatMap) -> None:
    # a column reaches from one validation to the next
    edges = np.append(panel.steps, panel.steps[-1] + np.diff(panel.steps, prepend=0)[-1])
    mesh = axis.pcolormesh(edges, np.arange(len(panel.blocks) + 1), panel.values, cmap="viridis")
    shown = np.unique(np.linspace(0, len(panel.blocks) - 1, 8).astype(int))
    axis.set_yticks(shown + 0.5, [panel.blocks[i] for i in shown], fontsize=7)
    axis.figure.colorbar(mesh, ax=axis)
