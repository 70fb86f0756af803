"""Time and memory of a training step as the work grows: with depth, width, image size and batch: `make scaling`."""

import argparse
import math
import statistics
import sys
from pathlib import Path

from speed import BASE, BenchmarkError, measure, positive, run, write

from resnet_vae.records import code, make_writable

SMALL = BASE.replace(width=0.25, precision="float32")
AXES = {  # what grows → its name in the figure, its values, and the configuration of a value
    "depth": ("depth", (28, 52, 100, 250, 502, 1000), lambda depth: SMALL.replace(resnet_depth=depth)),
    "depth_remat": (
        "depth, REMAT",
        (100, 250, 502, 1000),
        lambda depth: SMALL.replace(resnet_depth=depth, remat=True),
    ),
    "width": ("width", (0.125, 0.25, 0.5, 1.0), lambda width: SMALL.replace(width=width)),
    "side": ("image side, pixels", (16, 32, 64, 128), lambda side: SMALL.replace(image_shape=(side, side, 3))),
    "batch": ("batch", (8, 25, 100, 256), lambda batch: SMALL.replace(batch_size=batch)),
}
COLUMNS = {  # name in the CSV → (heading, format)
    "axis": ("What grows", "{}"),
    "value": ("To", "{:g}"),
    "step_seconds": ("A step, s", "{:.3f}"),
    "build_seconds": ("Import and build, s", "{:.1f}"),
    "first_step_seconds": ("First step, s", "{:.1f}"),
    "peak_megabytes": ("Peak memory, MB", "{:.0f}"),
    "exponent": ("Exponent of time", "{}"),
    "memory_exponent": ("of memory", "{}"),
}


def exponent(values, costs):
    """The slope of log(cost) against log(value) by least squares: 1 where the cost is proportional."""
    return statistics.linear_regression([math.log(value) for value in values], [math.log(cost) for cost in costs]).slope


def grow(axis, values, make_config, rounds, seconds):
    """Rows of the table for one axis; the exponents stand in its last row."""
    rows = []
    for value in values:
        config = make_config(value)
        (measured,) = measure(f"{axis} {value:g}", config, ["resnet_vae float32"], rounds, seconds)
        rows.append(
            {
                "axis": axis,
                "value": value,
                "step_seconds": config.batch_size / measured["images_per_second"],
                **{name: measured[name] for name in ("build_seconds", "first_step_seconds", "peak_megabytes")},
                "exponent": "",
                "memory_exponent": "",
            }
        )
    if len(rows) > 1:
        for name, cost in (("exponent", "step_seconds"), ("memory_exponent", "peak_megabytes")):
            rows[-1][name] = f"{exponent(values, [row[cost] for row in rows]):.2f}"
    return rows


def draw(rows):
    """Two rows of panels: seconds a step and peak memory against each axis, on logarithmic scales."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure = Figure(figsize=(3 * len(axes), 5), layout="constrained")
    grid = figure.subplots(2, len(axes), squeeze=False, sharex="col", sharey="row")
    for column, axis in enumerate(axes):
        own = [row for row in rows if row["axis"] == axis]
        values = [row["value"] for row in own]
        for panel, cost, slope, label in (
            (grid[0, column], "step_seconds", "exponent", "a training step, seconds"),
            (grid[1, column], "peak_megabytes", "memory_exponent", "peak memory, MB"),
        ):
            panel.loglog(values, [row[cost] for row in own], "o-")
            panel.set_title(f"exponent {own[-1][slope] or '–'}", fontsize="medium")
            panel.set_xticks(values, [f"{value:g}" for value in values], fontsize="small")
            panel.minorticks_off()
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            if column == 0:
                panel.set_ylabel(label)
        grid[1, column].set_xlabel(AXES[axis][0])
    return figure


def main(arguments=None):
    """Parse the command line, measure, and write scaling.csv, .md, .png and record.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results/scaling"), help="where the record goes")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="what grows")
    parser.add_argument("--most", type=float, default=math.inf, help="leave out larger values than this")
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each size")
    parser.add_argument("--seconds", type=float, default=5, help="of a round, about; at least three training steps")
    chosen = parser.parse_args(arguments)
    for axis in chosen.axes:
        if chosen.most < (least := AXES[axis][1][0]):
            parser.error(f"--most {chosen.most:g} leaves nothing of {axis}; expected {least:g} or more")
    make_writable(chosen.folder)
    rows, failed, of_code = [], [], code()
    for axis in chosen.axes:
        _, values, make_config = AXES[axis]
        values = [value for value in values if value <= chosen.most]
        try:
            rows += grow(axis, values, make_config, chosen.rounds, chosen.seconds)
            # after each axis, so that an interruption costs one
            write(chosen.folder / "scaling", rows, COLUMNS, draw(rows), of_code)
        except BenchmarkError as error:
            print(f"error: {axis}: {error}; the axis is left out", file=sys.stderr)
            failed.append(axis)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run(main))
