# SPDX-License-Identifier: Apache-2.0
"""Plots of a results file: speed-up, roofline, memory, time against dilation.

Colours keep apart for every kind of colour blindness, and a word or a shape says the same. An SVG
has no background and takes its ink from the reader's light or dark mode; equal results give equal
bytes. matplotlib is imported here alone, and only where a plot is asked for.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import comparison
from benchmarks.cases import CONV_CASES
from benchmarks.comparison import Comparison, Row
from benchmarks.results_file import write_bytes, write_text

INK, DARK_INK = "#1f2328", "#e6edf3"
# Okabe and Ito's colours.
COLOURS = {"win": "#0072b2", "tie": "#999999", "loss": "#d55e00"}
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "os^Dvp"
RIVAL = "#999999"
# The least that a count of pages can tell from nothing; log axes have no zero.
LEAST_BYTES = 4096
# Letters of a label, so that the bars keep their place.
LABEL = 64

_STYLE = {
    "svg.hashsalt": "dilseg",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color",
         "ytick.color", "grid.color"), INK,
    ),
    "grid.alpha": 0.2,
}  # fmt: skip

Figure = Any  # of matplotlib, which need not be installed


def require_matplotlib() -> Any:
    """The package, or one sentence that says what to install.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import matplotlib
        import matplotlib.figure
    except ModuleNotFoundError as error:
        raise ImportError(
            "plots need the package matplotlib, which is not installed: run pip install matplotlib"
        ) from error
    return matplotlib


def _figure(height: float) -> tuple[Figure, Any]:
    figure = require_matplotlib().figure.Figure(figsize=(8.0, height), layout="constrained")
    return figure, figure.subplots()


def _names(rows: Sequence[Row]) -> list[str]:
    """A name per row: its case, and whatever tells it from the others."""
    keys = [key for key in ("op", "precision", "layout") if len({row[key] for row in rows}) > 1]
    names = []
    for row in rows:
        front = f"{row['op']} " if "op" in keys else ""
        rest = [str(row[key]) for key in ("precision", "layout") if key in keys]
        graph = ["graph"] if row["provider"].endswith(comparison.GRAPH) else []
        name = f"{front}{row['case']}, " + " ".join([row["mode"], *rest, *graph])
        names.append(name if len(name) <= LABEL else name[: LABEL - 3] + "...")
    return names


def _where(results: dict[str, Any]) -> str:
    return f"{results['machine']['name']}, {results['started'][:10]}"


def _bars(axes: Any, names: Sequence[str]) -> None:
    """The look of horizontal bars, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xscale("log")
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def _ticks(axes: Any, low: float, high: float, form: Callable[[float], str]) -> None:
    """Ticks at 1, 2, 5 of every decade in reach of the data, with room for a label at the end."""
    ticks = [
        step * 10.0**power
        for power in range(-6, 9)
        for step in (1, 2, 5)
        if low <= step * 10.0**power <= high
    ]
    if len(ticks) > 9:
        ticks = [tick for tick in ticks if f"{tick:e}".startswith("1")]
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [form(tick) for tick in ticks])
    axes.minorticks_off()


def _speed_up(results: dict[str, Any], comparisons: Sequence[Comparison]) -> Figure | None:
    """A bar per comparison, to the right of 1 where ours is faster."""
    compared = [one for one in comparisons if one.ratio is not None]
    if not compared:
        return None
    figure, axes = _figure(1.1 + 0.24 * len(compared))
    ratios = [one.ratio or 1.0 for one in compared]
    for place, (one, ratio) in enumerate(zip(compared, ratios, strict=True)):
        axes.barh(place, ratio - 1, left=1, height=0.7, color=COLOURS[one.verdict])
        text = f" {comparison.ratio_text(one)}, {(one.rival or {})['provider']}"
        axes.text(max(ratio, 1.0), place, text, va="center", fontsize=8)
    _bars(axes, _names([one.own for one in compared]))
    axes.axvline(1, color=INK, linewidth=1)
    low, high = min(0.7, *ratios) / 1.1, max(1.5, *ratios)
    _ticks(axes, low, high * (high / low) ** 0.35, lambda tick: f"{tick:g}x")
    axes.set_title(f"Speed-up over the fastest rival. {_where(results)}")
    return figure


def _roofline(results: dict[str, Any], comparisons: Sequence[Comparison]) -> Figure | None:
    """Achieved rate by arithmetic intensity, under what the machine's own copy and products reach.

    Intensity is by compulsory traffic, each operand read once and each result written once.
    """
    roof = comparison.roof(results)
    known = [one for one in comparisons if one.own.get("flops") and one.own.get("bytes")]
    if roof.copy is None or not known:
        return None

    def point(row: Row) -> tuple[float, float]:
        return row["flops"] / row["bytes"], row["flops"] / comparison.seconds(row) * 1e-9

    figure, axes = _figure(4.5)
    intensities = [point(one.own)[0] for one in known]
    low, high = min(intensities) / 2, max(intensities) * 2
    for precision, rate in roof.matmul.items() or {"": float("inf")}.items():
        corner = min(high, rate / roof.copy)
        ends = sorted({low, max(low, corner), high})
        heights = [min(end * roof.copy, rate) for end in ends]
        axes.plot(ends, heights, color=INK, linewidth=1)
        if rate / roof.copy < high:
            label = f"{precision} matmul {comparison.digits(rate)} GFLOP/s"
            axes.annotate(label, (high, rate), (0, 4), textcoords="offset points", ha="right",
                          fontsize=8)  # fmt: skip
    for number, (op, members) in enumerate(comparison.by_op(known).items()):
        marker, colour = MARKERS[number % len(MARKERS)], SERIES[number % len(SERIES)]
        ours = [point(one.own) for one in members]
        theirs = [point(one.rival) for one in members if one.rival is not None]
        axes.plot(*zip(*ours, strict=True), marker, color=colour, label=op)
        if theirs:
            axes.plot(*zip(*theirs, strict=True), marker, color=colour, fillstyle="none")
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("log")
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("FLOP per byte of compulsory traffic")
    axes.set_ylabel("GFLOP/s")
    axes.grid()
    title = (
        "filled: dilseg, hollow: fastest rival, "
        f"sloping line: copy at {comparison.digits(roof.copy)} GB/s"
    )
    figure.legend(loc="outside lower center", fontsize=8, ncols=3, title=title,
                  title_fontsize=8)  # fmt: skip
    axes.set_title(f"Roofline. {_where(results)}")
    return figure


def _memory(results: dict[str, Any], comparisons: Sequence[Comparison]) -> Figure | None:
    """Peak memory of one launch beyond its inputs, ours above the rival's."""
    known = [
        (one.own, one.rival)
        for one in comparisons
        if one.rival is not None and None not in (one.own["peak_bytes"], one.rival["peak_bytes"])
    ]
    if not known:
        return None
    figure, axes = _figure(1.3 + 0.32 * len(known))
    low = LEAST_BYTES / 2**20
    for shift, colour, label, rows in (
        (-0.2, SERIES[0], "dilseg", [own for own, _ in known]),
        (0.2, RIVAL, "fastest rival", [rival for _, rival in known]),
    ):
        places = [place + shift for place in range(len(known))]
        amounts = [max(row["peak_bytes"] / 2**20, low) for row in rows]
        axes.barh(places, [amount - low / 2 for amount in amounts], left=low / 2, height=0.36,
                  color=colour, label=label)  # fmt: skip
        for place, amount, row in zip(places, amounts, rows, strict=True):
            text = comparison.digits(row["peak_bytes"] / 2**20)
            axes.text(amount, place, f" {text}", va="center", fontsize=7)
    _bars(axes, _names([own for own, _ in known]))
    largest = max(row["peak_bytes"] for pair in known for row in pair)
    _ticks(axes, low / 2, max(largest / 2**20, 1.0) * 3, lambda tick: f"{tick:g}")
    axes.set_xlabel("MiB at the peak of one launch, inputs not counted")
    figure.legend(loc="outside lower right", fontsize=8, ncols=2)
    axes.set_title(f"Memory. {_where(results)}")
    return figure


def _by_dilation(results: dict[str, Any], comparisons: Sequence[Comparison]) -> Figure | None:
    """Time against dilation for every layer that a file has with several of them."""
    dilations = {case.name: case.dilation for case in CONV_CASES}
    lines: dict[tuple[str, ...], list[tuple[int, Comparison]]] = defaultdict(list)
    for one in comparisons:
        row = one.own
        if row["op"] == "dilated_conv2d" and row["case"] in dilations and "shapes" in row:
            size = "x".join(map(str, row["shapes"]["input"]))
            weight = "x".join(map(str, row["shapes"]["weight"]))
            layer = f"{size}, weight {weight}"
            lines[layer, one.mode, row["precision"], row["layout"]].append(
                (dilations[row["case"]], one)
            )
    several = {
        key: sorted(members, key=lambda member: member[0])
        for key, members in lines.items()
        if len({dilation for dilation, _ in members}) > 1
    }
    if not several:
        return None
    figure, axes = _figure(3.0 + 0.2 * len(several))
    for number, (key, members) in enumerate(several.items()):
        marker = MARKERS[(number + number // len(SERIES)) % len(MARKERS)]
        style = {"color": SERIES[number % len(SERIES)], "marker": marker}
        ours = [(dilation, comparison.seconds(one.own) * 1e3) for dilation, one in members]
        theirs = [
            (dilation, comparison.seconds(one.rival) * 1e3)
            for dilation, one in members
            if one.rival is not None
        ]
        axes.plot(*zip(*ours, strict=True), label=", ".join(key), **style)
        if theirs:
            axes.plot(*zip(*theirs, strict=True), linestyle="--", fillstyle="none", **style)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("dilation")
    axes.set_ylabel("ms")
    axes.grid()
    figure.legend(loc="outside lower center", fontsize=8,
                  title="solid: dilseg, dashed: fastest rival", title_fontsize=8)  # fmt: skip
    axes.set_title(f"Time against dilation. {_where(results)}")
    return figure


PLOTS: dict[str, Callable[[dict[str, Any], Sequence[Comparison]], Figure | None]] = {
    "speed-up": _speed_up,
    "roofline": _roofline,
    "memory": _memory,
    "dilation": _by_dilation,
}


@contextmanager
def _styled() -> Iterator[None]:
    with require_matplotlib().rc_context(_STYLE):
        yield


def _svg(figure: Figure, source: str) -> str:
    """A figure as SVG text that names its source, with ink that follows the reader's mode."""
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Source": source}
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue().replace(INK, f"var(--ink, {INK})")
    text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    style = (
        f"<style>:root {{ --ink: {INK} }} "
        f"@media (prefers-color-scheme: dark) {{ :root {{ --ink: {DARK_INK} }} }}</style>"
    )
    head = text.index(">", text.index("<svg")) + 1
    return f"{text[:head]}\n {style}{text[head:]}"


def svgs(results: dict[str, Any], comparisons: Sequence[Comparison], source: str) -> dict[str, str]:
    """SVG text by name of plot, for each plot that the rows have something for.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with _styled():
        drawn = {name: draw(results, comparisons) for name, draw in PLOTS.items()}
        return {name: _svg(figure, source) for name, figure in drawn.items() if figure is not None}


def write(results: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Writes `<stem>-<plot>.svg` and `.png` of a results file; returns the paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    comparisons = comparison.of(results)
    written = []
    with _styled():
        for name, draw in PLOTS.items():
            figure = draw(results, comparisons)
            if figure is None:
                continue
            path = folder / f"{stem}-{name}.svg"
            write_text(path, _svg(figure, f"{stem}.json"))
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=150, facecolor="white",
                           metadata={"Software": None})  # fmt: skip
            write_bytes(path.with_suffix(".png"), buffer.getvalue())
            written += [path, path.with_suffix(".png")]
    return written
