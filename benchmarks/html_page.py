# SPDX-License-Identifier: Apache-2.0
"""A results file as one HTML page that needs nothing beside it, no network either.

Every text of the file is escaped; plots are inline SVG; a click on a heading sorts its table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from benchmarks import comparison, goals, markdown, plots
from benchmarks.comparison import digits, duration, mebibytes, seconds
from benchmarks.results_file import validate

_STYLE = f"""
:root {{ --ink: {plots.INK}; --paper: #ffffff; --line: #d0d7de; --loss: #b34700; --win: #00619a;
  color-scheme: light dark }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: {plots.DARK_INK}; --paper: #0d1117; --line: #3d444d; --loss: #ff9a52;
    --win: #6cb6ff }} }}
body {{ margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: var(--ink);
  background: var(--paper); font: 15px/1.5 system-ui, sans-serif }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; font-size: 13px;
  font-variant-numeric: tabular-nums }}
th, td {{ border: 1px solid var(--line); padding: .25rem .5rem; text-align: left }}
th button {{ all: unset; cursor: pointer; font-weight: 600 }}
th button:focus-visible {{ outline: 2px solid var(--win) }}
.win, .yes {{ color: var(--win); font-weight: 600 }}
.loss, .no {{ color: var(--loss); font-weight: 600 }}
svg {{ max-width: 100%; height: auto }}
"""

# Sorts by the number that a cell carries, else by its text; a second click turns the order round.
_SCRIPT = """
document.querySelectorAll("th button").forEach(button => button.addEventListener("click", () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0];
  const key = row => {
    const cell = row.cells[head.cellIndex];
    return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
  };
  const sign = head.ariaSort === "ascending" ? -1 : 1;
  for (const other of head.parentElement.cells) other.ariaSort = "none";
  head.ariaSort = sign > 0 ? "ascending" : "descending";
  [...body.rows].sort((a, b) => {
    const x = key(a), y = key(b);
    return sign * (x < y ? -1 : x > y ? 1 : 0);
  }).forEach(row => body.append(row));
}));
"""


class Cell:
    """A table cell: its text, the number that it sorts by, the class that colours it."""

    def __init__(self, text: object, value: float | None = None, mark: str = "") -> None:
        self.text, self.value, self.mark = str(text), value, mark

    def __str__(self) -> str:
        value = "" if self.value is None else f' data-value="{self.value!r}"'
        mark = f' class="{escape(self.mark)}"' if self.mark else ""
        return f"<td{mark}{value}>{escape(self.text)}</td>"


def _number(text: str, value: float | None) -> Cell:
    """A cell that sorts by its number; one that was not measured sorts as the least."""
    return Cell(text, -1.0 if value is None else float(value))


def _table(header: Sequence[str], lines: Iterable[Sequence[Cell | str]]) -> str:
    head = "".join(
        f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in header
    )
    body = "\n".join(
        "<tr>" + "".join(str(cell if isinstance(cell, Cell) else Cell(cell)) for cell in line)
        + "</tr>" for line in lines
    )  # fmt: skip
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _comparisons(results: dict[str, Any]) -> list[str]:
    roof = comparison.roof(results)
    blocks = []
    header = ("case", "mode", "precision", "layout", "dilseg", "p20 to p80", "fastest rival",
              "rival", "speed-up", "GFLOP/s", "GB/s", "% of copy", "% of roof", "peak MiB, ours",
              "peak MiB, rival", "workspace MiB, ours", "source")  # fmt: skip
    for op, members in comparison.by_op(comparison.of(results)).items():
        lines = []
        for one in members:
            own, rival = one.own, one.rival
            theirs = None if rival is None else seconds(rival)
            peak = None if rival is None else rival["peak_bytes"]
            times = own["cold"] or own["hot"]
            workspace = own.get("workspace_bytes")
            lines.append(
                (own["case"], one.mode, own["precision"], own["layout"],
                 _number(duration(seconds(own)), seconds(own)),
                 _number(f"{duration(times['p20'])} to {duration(times['p80'])}", times["p20"]),
                 _number("not measured" if theirs is None else duration(theirs), theirs),
                 "-" if rival is None else rival["provider"],
                 Cell(comparison.ratio_text(one), one.ratio or -1.0, one.verdict),
                 _number(digits(own["gflop_per_s"]), own["gflop_per_s"]),
                 _number(digits(own["gb_per_s"]), own["gb_per_s"]),
                 _number(digits(roof.copy_share(own)), roof.copy_share(own)),
                 _number(digits(roof.share(own)), roof.share(own)),
                 _number(mebibytes(own["peak_bytes"]), own["peak_bytes"]),
                 _number(mebibytes(peak), peak), _number(mebibytes(workspace), workspace),
                 own["source"])
            )  # fmt: skip
        blocks += [f"<h2>{escape(op)}</h2>", _table(header, lines)]
        blocks.append(f"<p>{escape(comparison.summary(members))}</p>")
    return blocks


def _goals(results: dict[str, Any]) -> list[str]:
    """The goals of the file's device of which it has measured any."""
    blocks = []
    header = ("op", "case", "mode", "precision", "layout", "what", "dilseg", "rival's", "rival",
              "goal", "measured", "met")  # fmt: skip
    for goal_set in goals.SETS.values():
        judged = comparison.judge(goal_set, results)
        if goal_set.device != results["machine"].get("device"):
            continue
        if not any(one.measured for one in judged):
            continue
        lines = [
            (one.goal.op, one.goal.case, one.goal.mode, one.goal.precision, one.goal.layout,
             one.goal.kind, _number(one.show(one.ours), one.ours),
             _number(one.show(one.theirs), one.theirs), one.goal.rival, one.wanted, one.value,
             Cell(one.answer, mark=one.answer.split()[0]))
            for one in judged
        ]  # fmt: skip
        met = sum(one.met for one in judged)
        note = markdown.other_threads(goal_set, results)
        blocks += [
            f"<h2>{escape(goal_set.title)}</h2>",
            f"<blockquote>{escape(goal_set.source)}</blockquote>",
            _table(header, lines),
            f"<p>{met} of {len(judged)} goals met. {escape(note)}</p>",
        ]
    return blocks


def _plots(results: dict[str, Any]) -> list[str]:
    drawn = plots.svgs(results, comparison.of(results), "results file")
    if not drawn:
        return []
    figures = [
        f"<figure role='img' aria-label='{escape(name)}'>{text[text.index('<svg') :]}</figure>"
        for name, text in drawn.items()
    ]
    return ["<h2>Plots</h2>", *figures]


def render(results: dict[str, Any]) -> str:
    """The whole page.

    Raises:
        ImportError: matplotlib, which draws the plots, is not installed.
        ValueError: `results` is malformed.
    """
    validate(results)
    title = f"dilseg on {results['machine']['name']}, {results['started'][:10]}"
    blocks = [f"<h1>{escape(title)}</h1>", f"<p>{escape(comparison.caption(results))}</p>"]
    blocks += _comparisons(results) + _goals(results) + _plots(results)
    skipped = (results["benchmarks"] or {}).get("skipped", [])
    if skipped:
        lines = [(skip["group"], skip["provider"], skip["reason"]) for skip in skipped]
        blocks += ["<h2>Not measured</h2>", _table(("row", "provider", "reason"), lines)]
    if results["steps"]:
        lines = [(step["name"], step["status"], step["reason"]) for step in results["steps"]]
        blocks += ["<h2>Steps</h2>", _table(("step", "status", "what it says"), lines)]
    content = "\n".join(blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{content}\n"
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )
