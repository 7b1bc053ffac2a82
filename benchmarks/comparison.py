# SPDX-License-Identifier: Apache-2.0
"""Which rows of a results file are compared, what decides between them, and the words for it.

Tables, pages, plots and the ledger all stand on this room, so that they cannot disagree.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.goals import Goal, GoalSet

Row = dict[str, Any]

OWN = "dilseg"
# Ratios closer to one than this are a tie: run-to-run medians differ by about as much.
TIE = 1.03
# Providers that replay a captured graph are compared with each other only.
GRAPH = "_graph"


def seconds(row: Row) -> float:
    """The time that decides: the cold median where there is one, else the hot one."""
    return float((row["cold"] or row["hot"])["p50"])


@dataclass(frozen=True)
class Comparison:
    """One row of ours and the fastest rival in the same mode, layout and precision, if any."""

    own: Row
    rival: Row | None

    @property
    def mode(self) -> str:
        """The row's mode, and whether a captured graph was replayed."""
        mode = str(self.own["mode"])
        return f"{mode} (graph)" if self.own["provider"].endswith(GRAPH) else mode

    @property
    def ratio(self) -> float | None:
        """How many times as fast ours is; None without a rival."""
        return None if self.rival is None else seconds(self.rival) / seconds(self.own)

    @property
    def verdict(self) -> str:
        """`win`, `tie` or `loss`; `not compared` without a rival."""
        if self.ratio is None:
            return "not compared"
        return "win" if self.ratio >= TIE else "loss" if self.ratio <= 1 / TIE else "tie"


def compare(rows: Iterable[Row]) -> list[Comparison]:
    """Every row of ours with its fastest rival, in the order of the rows."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        graph = row["provider"].endswith(GRAPH)
        place = (row["op"], row["case"], row["mode"], row["precision"], row["layout"], graph)
        groups[place].append(row)
    compared = []
    for members in groups.values():
        own = next((row for row in members if row["provider"].removesuffix(GRAPH) == OWN), None)
        rivals = [row for row in members if row["provider"].removesuffix(GRAPH) != OWN]
        if own is not None:
            compared.append(Comparison(own, min(rivals, key=seconds, default=None)))
    return compared


def of(results: dict[str, Any]) -> list[Comparison]:
    """The comparisons of a results file."""
    return compare((results["benchmarks"] or {}).get("rows", []))


def by_op(comparisons: Iterable[Comparison]) -> dict[str, list[Comparison]]:
    """Comparisons by their op, in the order of the first of each."""
    grouped: dict[str, list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        grouped[comparison.own["op"]].append(comparison)
    return grouped


def summary(comparisons: Iterable[Comparison]) -> str:
    """The geometric mean over all rows that have a rival; empty where none has."""
    compared = [comparison for comparison in comparisons if comparison.ratio is not None]
    ratios = [comparison.ratio for comparison in compared if comparison.ratio is not None]
    if not ratios:
        return ""
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    wins, ties, losses = (
        sum(comparison.verdict == verdict for comparison in compared)
        for verdict in ("win", "tie", "loss")
    )
    return (
        f"Geometric mean {mean:.2f}x, best {max(ratios):.2f}x, worst {min(ratios):.2f}x "
        f"over {len(ratios)} comparisons: {wins} wins, {ties} ties, {losses} losses."
    )


def reasons(skipped: Sequence[dict[str, str]]) -> dict[str, int]:
    """Why rows were not measured, with the count of rows of each reason."""
    counts: dict[str, int] = defaultdict(int)
    for skip in skipped:
        counts[skip["reason"]] += 1
    return counts


@dataclass(frozen=True)
class Roof:
    """What the machine itself reaches: its copy (GB/s) and its matrix products (GFLOP/s)."""

    copy: float | None
    matmul: dict[str, float]

    def copy_share(self, row: Row) -> float | None:
        """A row's compulsory traffic as a percentage of what a copy moves in the same time."""
        return None if self.copy is None else 100 * float(row["gb_per_s"]) / self.copy

    def share(self, row: Row) -> float | None:
        """Percentage of the roof over the row's intensity; None where either rate is unknown."""
        rate = self.matmul.get(row["precision"])
        if self.copy is None or rate is None or not row.get("flops") or not row.get("bytes"):
            return None
        least = 1e-9 * max(float(row["bytes"]) / self.copy, float(row["flops"]) / rate)
        return 100 * least / seconds(row)


def roof(results: dict[str, Any]) -> Roof:
    """The measured rates of a results file; files may lack either."""
    machine = results["machine"]
    copy, matmul = machine.get("copy"), machine.get("matmul") or {}
    return Roof(
        None if copy is None else float(copy["gb_per_s"]),
        {precision: 1e3 * float(rate["tflop_per_s"]) for precision, rate in matmul.items()},
    )


@dataclass(frozen=True)
class Judgement:
    """One goal beside the rows that speak of it; an amount is seconds, or bytes at the peak."""

    goal: Goal
    own: Row | None
    ours: float | None
    theirs: float | None

    @property
    def measured(self) -> bool:
        """Whether both sides of the goal were."""
        return self.ours is not None and self.theirs is not None

    @property
    def met(self) -> bool:
        """Whether ours is at most 1/ratio of the rival's."""
        if self.ours is None or self.theirs is None:
            return False
        return self.theirs >= self.goal.ratio * self.ours

    @property
    def answer(self) -> str:
        """`yes`, `no` or `not measured`."""
        return "yes" if self.met else "no" if self.measured else "not measured"

    @property
    def wanted(self) -> str:
        """The goal as a text: `8x` as fast, `1/20` of the memory."""
        forms = {"memory": "1/{:g}", "time": "{:g}x", "rate": "{:g} TFLOP/s"}
        return forms[self.goal.kind].format(self.goal.ratio)

    @property
    def value(self) -> str:
        """What was measured, in the form of `wanted`; a dash where nothing was."""
        if self.ours is None or self.theirs is None:
            return "-"
        ratio = self.theirs / self.ours if self.ours > 0 else math.inf
        forms = {"memory": "1/{:.3g}", "time": "{:.2f}x", "rate": "{:.0f} TFLOP/s"}
        return forms[self.goal.kind].format(ratio)

    def show(self, amount: float | None) -> str:
        """One of the two amounts in words."""
        if amount is None:
            return "not measured"
        if self.goal.kind == "memory":
            return f"{mebibytes(amount)} MiB"
        return duration(amount) if self.goal.kind == "time" else "-"


def judge(goal_set: GoalSet, results: dict[str, Any]) -> list[Judgement]:
    """Every goal of a set beside the rows of a results file, whatever its device and threads."""
    rows = (results["benchmarks"] or {}).get("rows", [])
    by_place = {
        (row["op"], row["case"], row["mode"], row["precision"], row["layout"], row["provider"]): row
        for row in rows
    }

    def amount(goal: Goal, row: Row | None) -> float | None:
        if row is None:
            return None
        if goal.kind == "rate":
            return 1e3 / row["gflop_per_s"]  # against one: a rate has no rival
        peak = row["peak_bytes"]
        return seconds(row) if goal.kind == "time" else None if peak is None else float(peak)

    judged = []
    for goal in goal_set.goals:
        place = (goal.op, goal.case, goal.mode, goal.precision, goal.layout)
        own, rival = by_place.get((*place, OWN)), by_place.get((*place, goal.rival))
        theirs = 1.0 if goal.kind == "rate" else amount(goal, rival)
        judged.append(Judgement(goal, own, amount(goal, own), theirs))
    return judged


def counts(goal_set: GoalSet, results: dict[str, Any]) -> bool:
    """Whether a file was measured with the threads that the goals are set for."""
    return goal_set.threads in (None, results["machine"].get("threads"))


def duration(time: float) -> str:
    """Seconds in the unit that reads best, three digits."""
    if time >= 1.0:
        return f"{time:.3g} s"
    return f"{time * 1e3:.3g} ms" if time >= 1e-3 else f"{time * 1e6:.3g} us"


def mebibytes(count: float | None) -> str:
    """Bytes in MiB without the unit; a dash where they were not counted."""
    return "-" if count is None else f"{count / 2**20:.1f}"


def digits(value: float | None) -> str:
    """Three digits, or all of a whole number that has more; a dash for None."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def ratio_text(comparison: Comparison) -> str:
    """The speed-up, with the word beside it unless it is a win."""
    if comparison.ratio is None:
        return "-"
    word = "" if comparison.verdict == "win" else f" ({comparison.verdict})"
    return f"{comparison.ratio:.2f}x{word}"


def caption(results: dict[str, Any]) -> str:
    """One sentence: device, driver, clocks, threads, versions, commit, when."""
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
        threads, cores = machine.get("threads", "?"), machine.get("cores", "?")
        parts.append(f"{threads} thread{'' if threads == 1 else 's'} on {cores} cores")
        instructions = (machine.get("build_info") or {}).get("cpu_instruction_set")
        parts += [] if instructions is None else [str(instructions)]
    rates = roof(results)
    if rates.copy is not None:
        parts.append(f"copy {digits(rates.copy)} GB/s")
    parts += [
        f"{precision} matmul {digits(rate / 1e3)} TFLOP/s"
        for precision, rate in rates.matmul.items()
    ]
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
