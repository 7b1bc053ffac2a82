# SPDX-License-Identifier: Apache-2.0
"""What the checkout says of its speed, written from `results/`: README's tables, pages, plots.

`python -m benchmarks.report --update` writes every document here, and a test compares. Plots are
compared by the source that they name, since their bytes depend on the version of matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import comparison, ledger, markdown, plots, sources, training_record
from benchmarks.comparison import Comparison
from benchmarks.results_file import write_text
from benchmarks.sources import DEVICES, Folder, Subject

ROOT = Path(__file__).resolve().parents[1]
README = "README.md"
LEDGER = "docs/ledger.md"
PAGE = "docs/benchmarks/README.md"
# A larger plot stays out of the repository; its rows are in the tables.
PLOT_BYTES = 60_000


def _shown(subject: Subject, compared: Sequence[Comparison]) -> list[Comparison]:
    """The lines of README by op: what a goal names, every loss, and all where nothing has goals."""
    compared = [one for members in comparison.by_op(compared).values() for one in members]
    if subject.goal_set is None:
        return compared
    named = {
        (goal.op, goal.case, goal.mode, goal.precision, goal.layout)
        for goal in subject.goal_set.goals
    }
    return [
        one
        for one in compared
        if one.verdict == "loss"
        or (one.own["op"], one.own["case"], one.mode, one.own["precision"], one.own["layout"])
        in named
    ]


def _short_table(compared: Sequence[Comparison]) -> str:
    """What decides, a line per row; precision and layout only where they differ."""
    differ = [key for key in ("precision", "layout") if len({one.own[key] for one in compared}) > 1]
    header = ("op", "case", "input", "mode", *differ, "dilseg", "fastest rival", "speed-up",
              "peak MiB, ours / rival")  # fmt: skip
    lines = []
    for one in compared:
        own = one.own
        shape = (own.get("shapes") or {}).get("input")
        size = "-" if shape is None else "x".join(map(str, shape))
        lines.append(
            (f"`{own['op']}`", own["case"], size, one.mode, *(own[key] for key in differ),
             comparison.duration(comparison.seconds(own)), markdown.rival_text(one),
             markdown.ratio(one), markdown.both(one, "peak_bytes"))
        )  # fmt: skip
    return markdown.table(header, lines)


def _same(compared: Sequence[Comparison]) -> str:
    """Precision and layout, where all rows have the same."""
    kinds = [{one.own[key] for one in compared} for key in ("precision", "layout")]
    words = [next(iter(kind)) for kind in kinds if len(kind) == 1]
    return f"All rows: {', '.join(words)}. " if words else ""


def _plot_path(subject: Subject, plot: str) -> str:
    return f"docs/benchmarks/{subject.name}-{plot}.svg"


def _trainings(found: Folder, results: str) -> tuple[dict[str, list[str]], list[str]]:
    """Blocks by title for every device with a record, and titles of what is pending.

    Args:
        found: what was measured.
        results: the folder of it, as the document reaches it.
    """
    newest = sources.newest_trainings(found.trainings)
    told, pending = {}, []
    for device, word in DEVICES.items():
        title = f"Training, {word}"
        source = newest.get(device)
        if source is None:
            pending.append(title)
            continue
        record = source.results
        told[title] = [
            markdown.table(training_record.HEADER, training_record.lines(record)),
            f"{training_record.caption(record)} From [{source.name}]({results}/{source.name}), by "
            f"`{training_record.command(record)}`.",
        ]
    return told, pending


def readme_block(found: Folder, drawn: Sequence[str]) -> str:
    """README's part: per subject a short table with its caption; what is pending, at the end.

    Args:
        found: what was measured.
        drawn: paths of the plots that there are.
    """
    blocks, pending = [], []
    for subject in sources.subjects(found.files):
        source = subject.newest(found.files)
        if source is None:
            count = len(subject.goal_set.goals) if subject.goal_set else 0
            pending.append((subject.title, str(count or "none"), "pending"))
            continue
        compared = subject.comparisons(source)
        shown = _shown(subject, compared)
        where = f"[{source.name}](benchmarks/results/{source.name})"
        blocks += [f"#### {subject.title}", _short_table(shown)]
        blocks.append(f"{comparison.summary(compared)} {_same(compared)}".strip())
        blocks.append(f"{comparison.caption(source.results)} From {where}.")
        plot = _plot_path(subject, "speed-up")
        if plot in drawn:
            blocks.append(f"![Speed-up over the fastest rival: {subject.title}]({plot})")
    trained, untrained = _trainings(found, "benchmarks/results")
    for title, told in trained.items():
        blocks += [f"#### {title}", *told]
    pending += [(title, "none", "pending") for title in untrained]
    if pending:
        blocks += [
            "#### Not measured yet",
            markdown.table(("what", "goals", "measured"), pending),
        ]
    return "\n\n".join(blocks)


def page(found: Folder, drawn: Sequence[str]) -> str:
    """docs/benchmarks/README.md: every row of the newest files, with all plots."""
    blocks = [
        "# What was measured",
        "Written by `make report` from `benchmarks/results/`; do not edit. Per kind of device and "
        "set of goals the newest file "
        "([the rule](../../benchmarks/results/README.md#which-file-is-shown)), whole. "
        "[How to read it](../../benchmarks/README.md#how-to-read-it); against the goals: "
        "[the ledger](../ledger.md).",
    ]
    for subject in sources.subjects(found.files):
        source = subject.newest(found.files)
        blocks.append(f"## {subject.title}")
        if source is None:
            blocks.append(f"Pending: no results file of a {DEVICES[subject.device]} yet.")
            continue
        where = f"[{source.name}](../../benchmarks/results/{source.name})"
        blocks.append(f"{comparison.caption(source.results)} From {where}, by")
        blocks.append(f"    {sources.command(source)}")
        roof = comparison.roof(source.results)
        blocks += markdown.op_tables(subject.comparisons(source), roof)
        for plot in plots.PLOTS:
            path = _plot_path(subject, plot)
            if path in drawn:
                blocks.append(f"![{plot}: {subject.title}]({Path(path).name})")
    trained, untrained = _trainings(found, "../../benchmarks/results")
    for title, told in trained.items():
        blocks += [f"## {title}", *told]
    for title in untrained:
        blocks += [f"## {title}", "Pending: `python -m benchmarks.training` measures it."]
    return "\n\n".join(blocks) + "\n"


def drawings(found: Folder) -> dict[str, str]:
    """SVG text by path, of every plot that is small enough.

    Raises:
        ImportError: matplotlib is not installed.
    """
    drawn = {}
    for subject in sources.subjects(found.files):
        source = subject.newest(found.files)
        if source is None:
            continue
        for name, text in plots.svgs(
            source.results, subject.comparisons(source), source.name
        ).items():
            if len(text.encode("utf-8")) <= PLOT_BYTES:
                drawn[_plot_path(subject, name)] = text
    return drawn


def documents(root: Path, found: Folder, drawn: Sequence[str]) -> dict[str, str]:
    """The text of every document that holds figures, by its path.

    Raises:
        ValueError: README.md lacks its markers.
    """
    readme = (root / README).read_text(encoding="utf-8")
    return {
        README: markdown.insert(readme, readme_block(found, drawn)),
        LEDGER: ledger.render(found),
        PAGE: page(found, drawn),
    }


def update(root: Path = ROOT) -> list[str]:
    """Writes all of it, takes away plots that nothing shows any more; returns the paths.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a results file is malformed, or README.md lacks its markers.
    """
    found = sources.read(root / "benchmarks" / "results")
    drawn = drawings(found)
    written = {**documents(root, found, list(drawn)), **drawn}
    for path, text in written.items():
        write_text(root / path, text)
    for plot in (root / PAGE).parent.glob("*.svg"):
        if plot.relative_to(root).as_posix() not in drawn:
            plot.unlink()
    return sorted(written)
