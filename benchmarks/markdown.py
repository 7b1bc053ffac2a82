# SPDX-License-Identifier: Apache-2.0
"""Markdown from results files: comparison tables, goals, and what stands between two markers.

Every compared row is shown, lost ones too; the ratio is against the fastest rival in the same
layout and precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import comparison, goals
from benchmarks.comparison import Comparison, Roof, digits, duration, mebibytes
from benchmarks.goals import GoalSet
from benchmarks.results_file import validate

BEGIN_MARKER = "<!-- benchmarks: begin (written by make report) -->"
END_MARKER = "<!-- benchmarks: end -->"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ("---",) * len(header), *lines]
    cells = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def ratio(compared: Comparison) -> str:
    """The speed-up; a win in bold, anything else with its word."""
    text = comparison.ratio_text(compared)
    return f"**{text}**" if compared.verdict == "win" else text


def rival_text(compared: Comparison) -> str:
    """The fastest rival's time and name."""
    rival = compared.rival
    if rival is None:
        return "not measured"
    return f"{duration(comparison.seconds(rival))} ({rival['provider']})"


def both(compared: Comparison, key: str) -> str:
    """A count of bytes of both sides in MiB; files may lack it."""
    rival = compared.rival or {}
    return f"{mebibytes(compared.own.get(key))} / {mebibytes(rival.get(key))}"


def op_tables(comparisons: Iterable[Comparison], roof: Roof) -> list[str]:
    """A heading, a table and a geometric mean per op; what older files lack only where it is."""
    blocks = []
    for op, members in comparison.by_op(comparisons).items():
        columns = {
            "case": [one.own["case"] for one in members],
            "mode": [one.mode for one in members],
            "precision": [one.own["precision"] for one in members],
            "layout": [one.own["layout"] for one in members],
            "dilseg": [duration(comparison.seconds(one.own)) for one in members],
            "fastest rival": [rival_text(one) for one in members],
            "speed-up": [ratio(one) for one in members],
            "GFLOP/s": [digits(one.own["gflop_per_s"]) for one in members],
            "GB/s": [digits(one.own["gb_per_s"]) for one in members],
            "% of copy": [digits(roof.copy_share(one.own)) for one in members],
            "peak MiB, ours / rival": [both(one, "peak_bytes") for one in members],
        }
        if any("workspace_bytes" in one.own for one in members):
            columns["workspace MiB, ours / rival"] = [
                both(one, "workspace_bytes") for one in members
            ]
        if roof.matmul:
            columns["% of roof"] = [digits(roof.share(one.own)) for one in members]
        lines = zip(*columns.values(), strict=True)
        blocks += [f"### {op}", table(tuple(columns), lines)]
        blocks += [text for text in [comparison.summary(members)] if text]
    return blocks


def render(results: dict[str, Any]) -> str:
    """The whole report in Markdown: caption, comparison tables, and the steps of a GPU job.

    Raises:
        ValueError: `results` is malformed.
    """
    validate(results)
    blocks = [comparison.caption(results)]
    benchmarks = results["benchmarks"]
    if benchmarks is not None:
        blocks += op_tables(comparison.compare(benchmarks["rows"]), comparison.roof(results))
        skipped = comparison.reasons(benchmarks["skipped"])
        if skipped:
            text = "; ".join(f"{count} rows, {reason}" for reason, count in skipped.items())
            blocks.append(f"Not measured: {text}.")
    if results["steps"]:
        lines = [(step["name"], step["status"], step["reason"] or "-") for step in results["steps"]]
        blocks += ["### Steps", table(("step", "status", "what it says"), lines)]
    return "\n\n".join(blocks)


@dataclass(frozen=True)
class GoalReport:
    """How a results file stands with the goals: the Markdown, and whether every goal is met."""

    text: str
    met: bool


def other_threads(goal_set: GoalSet, results: dict[str, Any]) -> str:
    """Why a file counts for no goal of a set; empty where it does count."""
    if comparison.counts(goal_set, results):
        return ""
    return (
        f"The goals are set for {goal_set.threads} threads, but this was measured with "
        f"{results['machine'].get('threads')}: it counts for none of them."
    )


def render_goals(results: dict[str, Any], set_name: str = "fused") -> GoalReport:
    """Holds a results file against the goals of a set: a line per goal, those without a row too.

    Raises:
        ValueError: `results` is malformed, or was measured on another device than the goals name.
    """
    validate(results)
    goal_set = goals.SETS[set_name]
    device = results["machine"].get("device")
    if device != goal_set.device:
        raise ValueError(
            f"results.machine.device: expected {goal_set.device!r}, of which the goals speak, but "
            f"got {device!r}"
        )
    roof = comparison.roof(results)
    judged = comparison.judge(goal_set, results)
    lines = []
    for one in judged:
        goal, own = one.goal, one.own
        share = None if own is None or goal.kind == "memory" else roof.copy_share(own)
        lines.append(
            (goal.op, goal.case, goal.mode, goal.precision, goal.layout, goal.kind,
             one.show(one.ours), f"{one.show(one.theirs)} ({goal.rival})", one.wanted, one.value,
             "yes" if one.met else f"**{one.answer}**", digits(share))
        )  # fmt: skip
    header = ("op", "case", "mode", "precision", "layout", "what", "dilseg", "rival", "goal",
              "measured", "met", "% of copy")  # fmt: skip
    count = sum(one.met for one in judged)
    note = other_threads(goal_set, results)
    blocks = [
        comparison.caption(results),
        f"### {goal_set.title}",
        f"> {goal_set.source}",
        table(header, lines),
        f"{count} of {len(judged)} goals met.",
        *([note] if note else []),
    ]
    return GoalReport("\n\n".join(blocks), count == len(judged) and not note)


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
