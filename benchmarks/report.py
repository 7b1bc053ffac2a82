# SPDX-License-Identifier: Apache-2.0
"""The Markdown made from results files.

    python -m benchmarks.report benchmarks/results/FILE.json                  # print the tables
    python -m benchmarks.report benchmarks/results/FILE.json --insert README.md
    python -m benchmarks.report benchmarks/results/FILE.json --goals          # against goals.py

Every compared row is shown, lost ones too; the ratio is against the fastest rival in the same
layout and precision. With --goals the exit code is 0 only where every goal is met.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import goals
from benchmarks.goals import Goal
from benchmarks.results_file import load, validate, write_text

OWN = "dilseg"
# Ratios closer to one than this are a tie: run-to-run medians differ by about as much.
TIE = 1.03
BEGIN_MARKER = "<!-- benchmarks: begin (written by benchmarks/report.py) -->"
END_MARKER = "<!-- benchmarks: end -->"


def _seconds(row: dict[str, Any]) -> float:
    return float((row["cold"] or row["hot"])["p50"])


def _duration(seconds: float) -> str:
    if seconds >= 1.0:
        return f"{seconds:.3g} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} us"


def _ratio(ratio: float) -> str:
    if ratio >= TIE:
        return f"**{ratio:.2f}x**"
    if ratio > 1 / TIE:
        return f"{ratio:.2f}x (tie)"
    return f"{ratio:.2f}x (loss)"


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f}"


def _copy_speed(results: dict[str, Any]) -> float | None:
    """GB/s of the machine's own copy, or None in a file that lacks it."""
    copy = results["machine"].get("copy")
    return None if copy is None else float(copy["gb_per_s"])


def _share(row: dict[str, Any], copy_speed: float | None) -> str:
    """A row's compulsory traffic as a share of what a copy moves in the same time."""
    return "-" if copy_speed is None else f"{100 * row['gb_per_s'] / copy_speed:.3g}"


def caption(results: dict[str, Any]) -> str:
    """One paragraph: device, driver, clocks, versions, commit, when."""
    machine = results["machine"]
    parts = [str(machine["name"])]
    if "capability" in machine:
        parts.append(f"compute capability {machine['capability']}")
    state = machine.get("state") or {}
    if "driver_version" in state:
        parts.append(f"driver {state['driver_version']}")
    if "clocks.max.sm" in state:
        parts.append(f"SM clock {state.get('clocks.sm', '?')} of {state['clocks.max.sm']}")
    if machine.get("device") == "cpu":
        parts.append(f"{machine.get('threads', '?')} threads on {machine.get('cores', '?')} cores")
    copy_speed = _copy_speed(results)
    if copy_speed is not None:
        parts.append(f"copy {copy_speed:.3g} GB/s")
    versions = machine.get("versions") or {}
    parts += [
        f"{key} {value}" for key, value in versions.items() if key in ("torch", "cuda", "cudnn")
    ]
    commit = machine.get("commit")
    parts.append(f"commit {commit[:12]}" if commit else "commit unknown")
    if machine.get("modified"):
        parts[-1] += " with local changes"
    parts.append(results["started"][:10])
    if results["status"] == "partial":
        parts.append("partial run")
    return "Measured on " + ", ".join(parts) + "."


def _compare(
    rows: list[dict[str, Any]], copy_speed: float | None
) -> tuple[list[tuple[str, ...]], list[float]]:
    """Table lines and ratios of one op, one line per group that holds our row."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["case"], row["mode"], row["precision"], row["layout"]].append(row)
    lines, ratios = [], []
    for key, members in groups.items():
        own = next((row for row in members if row["provider"] == OWN), None)
        if own is None:
            continue
        rivals = [row for row in members if row["provider"] != OWN]
        rival = min(rivals, key=_seconds) if rivals else None
        if rival is not None:
            ratios.append(_seconds(rival) / _seconds(own))
        lines.append(
            (
                *key,
                _duration(_seconds(own)),
                f"{_duration(_seconds(rival))} ({rival['provider']})" if rival else "not measured",
                _ratio(ratios[-1]) if rival else "-",
                f"{own['gflop_per_s']:.3g}",
                f"{own['gb_per_s']:.3g}",
                _share(own, copy_speed),
                f"{_megabytes(own['peak_bytes'])} / "
                f"{_megabytes(rival['peak_bytes'] if rival else None)}",
            )
        )
    return lines, ratios


def table(header: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table."""
    rows = [header, ("---",) * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _benchmarks_section(benchmarks: dict[str, Any], copy_speed: float | None) -> list[str]:
    by_op: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in benchmarks["rows"]:
        by_op[row["op"]].append(row)
    blocks = []
    header = ("case", "mode", "precision", "layout", "dilseg", "fastest rival", "speed-up",
              "GFLOP/s", "GB/s", "% of copy", "peak MiB, ours / rival")  # fmt: skip
    for op, rows in by_op.items():
        lines, ratios = _compare(rows, copy_speed)
        if not lines:
            continue
        blocks += [f"### {op}", table(header, lines)]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            wins = sum(ratio >= TIE for ratio in ratios)
            losses = sum(ratio <= 1 / TIE for ratio in ratios)
            blocks.append(
                f"Geometric mean {mean:.2f}x, best {max(ratios):.2f}x, worst {min(ratios):.2f}x "
                f"over {len(ratios)} comparisons: {wins} wins, "
                f"{len(ratios) - wins - losses} ties, {losses} losses."
            )
    reasons: dict[str, int] = defaultdict(int)
    for skip in benchmarks["skipped"]:
        reasons[skip["reason"]] += 1
    if reasons:
        blocks.append(
            "Not measured: "
            + "; ".join(f"{n} rows, {reason}" for reason, n in reasons.items())
            + "."
        )
    return blocks


def render(results: dict[str, Any]) -> str:
    """The whole report in Markdown: caption, comparison tables, and the steps of a GPU job.

    Raises:
        ValueError: `results` is malformed.
    """
    validate(results)
    blocks = [caption(results)]
    if results["benchmarks"] is not None:
        blocks += _benchmarks_section(results["benchmarks"], _copy_speed(results))
    if results["steps"]:
        lines = [
            (step["name"], step["status"], step["reason"].replace("|", "\\|") or "-")
            for step in results["steps"]
        ]
        blocks += ["### Steps", table(("step", "status", "what it says"), lines)]
    return "\n\n".join(blocks)


@dataclass(frozen=True)
class GoalReport:
    """How a results file stands with the goals: the Markdown, and whether every goal is met."""

    text: str
    met: bool


def _amount(goal: Goal, row: dict[str, Any]) -> float | None:
    """What a goal compares of a row: seconds, or bytes at the peak where they were counted."""
    if goal.kind == "time":
        return _seconds(row)
    return None if row["peak_bytes"] is None else float(row["peak_bytes"])


def _judge_goal(
    goal: Goal, rows: list[dict[str, Any]], copy_speed: float | None
) -> tuple[tuple[str, ...], bool]:
    """The table line of one goal, and whether it is met."""
    wanted = (goal.op, goal.case, goal.mode, goal.precision, goal.layout)
    by_provider = {
        row["provider"]: row
        for row in rows
        if (row["op"], row["case"], row["mode"], row["precision"], row["layout"]) == wanted
    }
    own, rival = by_provider.get(OWN), by_provider.get(goal.rival)
    ours = None if own is None else _amount(goal, own)
    theirs = None if rival is None else _amount(goal, rival)

    def show(amount: float | None) -> str:
        if amount is None:
            return "not measured"
        return f"{amount / 2**20:.1f} MiB" if goal.kind == "memory" else _duration(amount)

    met, measured = False, "-"
    if ours is not None and theirs is not None:
        met = theirs >= goal.ratio * ours
        ratio = theirs / ours if ours > 0 else math.inf
        measured = f"1/{ratio:.3g}" if goal.kind == "memory" else f"{ratio:.2f}x"
    line = (
        goal.op,
        goal.case,
        goal.mode,
        goal.precision,
        goal.layout,
        goal.kind,
        show(ours),
        f"{show(theirs)} ({goal.rival})",
        f"1/{goal.ratio:g}" if goal.kind == "memory" else f"{goal.ratio:g}x",
        measured,
        "yes" if met else "**no**" if measured != "-" else "**not measured**",
        "-" if own is None or goal.kind == "memory" else _share(own, copy_speed),
    )
    return line, met


def render_goals(results: dict[str, Any], set_name: str = "fused") -> GoalReport:
    """Holds a results file against the goals of a set: a line per goal, those without a row too.

    Raises:
        ValueError: `results` is malformed, or was measured on another device than the goals name.
    """
    validate(results)
    machine = results["machine"]
    goal_set = goals.SETS[set_name]
    if machine.get("device") != goal_set.device:
        raise ValueError(
            f"results.machine.device: expected {goal_set.device!r}, of which the goals speak, but "
            f"got {machine.get('device')!r}"
        )
    rows = (results["benchmarks"] or {}).get("rows", [])
    judged = [_judge_goal(goal, rows, _copy_speed(results)) for goal in goal_set.goals]
    count = sum(met for _, met in judged)
    header = ("op", "case", "mode", "precision", "layout", "what", "dilseg", "rival", "goal",
              "measured", "met", "% of copy")  # fmt: skip
    blocks = [
        caption(results),
        f"### {goal_set.title}",
        f"> {goal_set.source}",
        table(header, [line for line, _ in judged]),
        f"{count} of {len(judged)} goals met.",
    ]
    threads = machine.get("threads")
    as_set = goal_set.threads in (None, threads)
    if not as_set:
        blocks.append(
            f"The goals are set for {goal_set.threads} threads, but this was measured with "
            f"{threads}: it counts for none of them."
        )
    return GoalReport("\n\n".join(blocks), count == len(judged) and as_set)


def insert(document: str, report: str) -> str:
    """Replaces what stands between the two markers of a document.

    Raises:
        ValueError: the document lacks a marker, or has them in the wrong order.
    """
    begin, end = document.find(BEGIN_MARKER), document.find(END_MARKER)
    if begin < 0 or end < begin:
        raise ValueError(f"expected the lines {BEGIN_MARKER!r} and, after it, {END_MARKER!r}")
    head = document[: begin + len(BEGIN_MARKER)]
    return f"{head}\n\n{report}\n\n{document[end:]}"


def main(arguments: list[str] | None = None) -> int:
    """The command; exit code 2 and one sentence for a file that cannot be used.

    With --goals, 1 where a goal is not met.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, help="a results file (JSON)")
    parser.add_argument("--insert", type=Path, metavar="DOCUMENT", help="write between its markers")
    parser.add_argument(
        "--goals",
        nargs="?",
        const="fused",
        choices=tuple(goals.SETS),
        help="compare with the goals of goals.py",
    )
    options = parser.parse_args(arguments)
    met = True
    try:
        results = load(options.results)
        if options.goals:
            judged = render_goals(results, options.goals)
            report, met = judged.text, judged.met
        else:
            report = render(results)
        if options.insert is None:
            print(report)
        else:
            document = options.insert.read_text(encoding="utf-8")
            write_text(options.insert, insert(document, report))
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
