"""Knows how quality against bytes and against seconds is drawn. Knows no statistics beyond means of cells."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from statistics import fmean
from typing import Any

from compactor.evaluate.records import FULL
from compactor.evaluate.results import Cell
from compactor.output import write_atomically

LEAST_KL = 1e-5  # a smaller KL is drawn here: the axis is logarithmic
MARKERS = "osD^vP*X<>hd"


@dataclass(frozen=True)
class Point:
    """A method at one size, the mean over all tasks and lengths; None: not measured."""

    keep_ratio: float | None
    score: float | None
    kl: float | None
    megabytes: float | None
    seconds: float | None  # own and shared, after the prefill


def draw(path: str, cells: Sequence[Cell]) -> None:
    """Draw score and KL (rows, per model) against bytes and seconds (columns), a line per method. Raises OutputError.

    Every point is the mean over the tasks and lengths of the results, each weighing the same; those in which every
    document failed are left out.
    """
    from matplotlib.figure import Figure

    cells = [cell for cell in cells if cell.documents]
    models = list(dict.fromkeys(cell.model for cell in cells))
    figure = Figure(figsize=(11, 4.2 * 2 * max(1, len(models))))
    axes: Any = figure.subplots(2 * max(1, len(models)), 2, squeeze=False)
    for i, model in enumerate(models):
        lines = {
            method: points([cell for cell in cells if cell.model == model and cell.method == method])
            for method in dict.fromkeys(cell.method for cell in cells if cell.model == model)
        }
        rows: list[tuple[str, Callable[[Point], float | None]]] = [
            ("score", lambda point: point.score),
            (
                "KL to the full cache, nats per token",
                lambda point: None if point.kl is None else max(point.kl, LEAST_KL),
            ),
        ]
        columns: list[tuple[str, Callable[[Point], float | None]]] = [
            ("MB per document", lambda point: point.megabytes),
            ("seconds of compaction", lambda point: point.seconds),
        ]
        for row, (y_label, y_of) in enumerate(rows):
            for column, (x_label, x_of) in enumerate(columns):
                _draw_lines(axes[2 * i + row][column], lines, x_of, y_of)
                axes[2 * i + row][column].set(xlabel=x_label, ylabel=y_label)
                axes[2 * i + row][column].set_xscale("log")
            if row == 1:
                axes[2 * i + row][0].set_yscale("log")
                axes[2 * i + row][1].set_yscale("log")
        axes[2 * i][0].set_title(model, loc="left", parse_math=False)
        axes[2 * i][1].legend(fontsize="x-small", ncols=2)
    figure.tight_layout()
    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the font lacks
        figure.savefig(buffer, format=path.lower().rpartition(".")[2], dpi=150)
    write_atomically(path, [buffer.getbuffer()], force=True)


def points(cells: Sequence[Cell]) -> list[Point]:
    """Return a point per size: the mean over tasks and lengths, each weighing the same."""
    ratios = dict.fromkeys(cell.keep_ratio for cell in cells)
    return [_point(ratio, [cell for cell in cells if cell.keep_ratio == ratio]) for ratio in ratios]


def _point(ratio: float | None, cells: Sequence[Cell]) -> Point:
    megabytes = _mean([cell.bytes for cell in cells])
    return Point(
        ratio,
        _mean([None if cell.score is None else cell.score.mean for cell in cells]),
        _mean([None if cell.kl is None else cell.kl.mean for cell in cells]),
        None if megabytes is None else megabytes / 1e6,
        _mean([None if cell.seconds is None else cell.seconds + (cell.shared_seconds or 0.0) for cell in cells]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _draw_lines(
    axes: Any,
    lines: dict[str, list[Point]],
    x_of: Callable[[Point], float | None],
    y_of: Callable[[Point], float | None],
) -> None:
    """Draw a line per method; the full cache is a level that the score is to reach."""
    for place, (method, line) in enumerate(lines.items()):
        known = [(x, y) for point in line if (x := x_of(point)) is not None and (y := y_of(point)) is not None]
        if method == FULL:
            for _, y in known:
                axes.axhline(y, color="grey", linestyle="--", linewidth=1, label="full cache")
        elif known:
            marker = MARKERS[place % len(MARKERS)]
            axes.plot([x for x, _ in known], [y for _, y in known], marker=marker, markersize=4, label=method)
