# SPDX-License-Identifier: Apache-2.0
"""Which results files the documents stand on, and by which command each was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import comparison, goals, training_record
from benchmarks.cases import OPS
from benchmarks.comparison import Comparison
from benchmarks.goals import GoalSet
from benchmarks.results_file import load, read_json

DEVICES = {"cpu": "CPU", "cuda": "GPU"}


@dataclass(frozen=True)
class Source:
    """A results file by its name."""

    name: str
    results: dict[str, Any]

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return str(self.results["machine"].get("device"))

    @property
    def machine(self) -> str:
        """The device by its own name."""
        return str(self.results["machine"]["name"])


@dataclass(frozen=True)
class Subject:
    """What one table shows: some ops on one kind of device, with the goals set for them if any."""

    name: str
    title: str
    device: str
    ops: frozenset[str]
    goal_set: GoalSet | None

    def comparisons(self, source: Source) -> list[Comparison]:
        """The rows of these ops, compared."""
        return [one for one in comparison.of(source.results) if one.own["op"] in self.ops]

    def fits(self, source: Source) -> bool:
        """Whether a complete run measured all that the goals ask for, under their conditions."""
        complete: bool = source.results["status"] == "complete"
        if self.goal_set is None:
            return complete
        return (
            complete
            and comparison.counts(self.goal_set, source.results)
            and all(one.measured for one in comparison.judge(self.goal_set, source.results))
        )

    def newest(self, sources: Iterable[Source]) -> Source | None:
        """The latest `written` among the files that fit; without one, among those with a row."""
        there = [
            source
            for source in sources
            if source.device == self.device and self.comparisons(source)
        ]
        return max(
            there,
            key=lambda source: (self.fits(source), source.results["written"], source.name),
            default=None,
        )


@dataclass(frozen=True)
class Folder:
    """What was measured: results files, and records of whole trainings."""

    files: Sequence[Source] = ()
    trainings: Sequence[Source] = ()


def read(folder: Path) -> Folder:
    """Everything in a folder, by name.

    Raises:
        ValueError: a file is malformed, or of a format that is not known.
    """
    files, trainings = [], []
    for path in sorted(folder.glob("*.json")):
        if read_json(path).get("format") == training_record.FORMAT:
            trainings.append(Source(path.name, training_record.load(path)))
        else:
            files.append(Source(path.name, load(path)))
    return Folder(files, trainings)


def newest_trainings(trainings: Iterable[Source]) -> dict[str, Source]:
    """The latest record of every device, a complete one before a partial one."""
    found: dict[str, Source] = {}
    for source in sorted(
        trainings, key=lambda one: (one.results["status"] == "complete", one.results["written"])
    ):
        found[source.device] = source
    return found


def subjects(sources: Sequence[Source]) -> list[Subject]:
    """One per set of goals; then one per device and op, as far as no goal there speaks of it."""
    found = [
        Subject(
            f"{goal_set.device}-{name.replace('_', '-')}",
            f"{goal_set.title.removeprefix('Goals of the ').capitalize()}, "
            f"{DEVICES[goal_set.device]}",
            goal_set.device,
            frozenset(goal.op for goal in goal_set.goals),
            goal_set,
        )
        for name, goal_set in goals.SETS.items()
    ]
    compared = [one for source in sources for one in comparison.of(source.results)]
    ops = [*OPS, *(one.own["op"] for one in compared)]
    for device, word in DEVICES.items():
        known = {op for subject in found if subject.device == device for op in subject.ops}
        for op in dict.fromkeys(op for op in ops if op not in known):
            name = f"{device}-{op.replace('_', '-')}"
            found.append(Subject(name, f"{op}, {word}", device, frozenset({op}), None))
    return found


def command(source: Source) -> str:
    """The command that measured a file, as far as the file says."""
    if source.results["steps"]:
        return "python3 -m benchmarks.gpu_job"
    machine = source.results["machine"]
    rows = (source.results["benchmarks"] or {}).get("rows", [])
    words = [f"{key}={value}" for key, value in (machine.get("thread_settings") or {}).items()]
    words += ["python -m pytest benchmarks --benchmark-only", f"--device {source.device}"]
    for name in goals.SETS:
        if all(
            goals.is_named(
                name, row["op"], row["case"], row["mode"], row["precision"], row["layout"]
            )
            for row in rows
        ):
            words.append(f"--set {name}")
            break
    if source.device == "cpu" and "threads" in machine:
        words.append(f"--threads {machine['threads']}")
    return " ".join(words)
