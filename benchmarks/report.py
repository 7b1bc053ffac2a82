# SPDX-License-Identifier: Apache-2.0
"""Reports on results files: tables, plots, a page, and the documents of this checkout.

    python -m benchmarks.report FILE.json                      # print the tables
    python -m benchmarks.report FILE.json --goals              # against goals.py
    python -m benchmarks.report FILE.json --plots DIR --html PAGE.html
    python -m benchmarks.report FILE.json --insert DOCUMENT    # write between its markers
    python -m benchmarks.report --update                       # this checkout, from its results/

With --goals the exit code is 0 only where every goal is met.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import goals, html_page, plots, publish, training_record
from benchmarks.markdown import insert, render, render_goals
from benchmarks.results_file import load, read_json, write_text


def main(arguments: list[str] | None = None) -> int:
    """The command; exit code 2 and one sentence for a file that cannot be used.

    With --goals, 1 where a goal is not met.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, nargs="?", help="a results file (JSON)")
    parser.add_argument("--insert", type=Path, metavar="DOCUMENT", help="write between its markers")
    parser.add_argument(
        "--goals",
        nargs="?",
        const="fused",
        choices=tuple(goals.SETS),
        help="compare with the goals of goals.py",
    )
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write the plots, SVG and PNG")
    parser.add_argument("--html", type=Path, metavar="OUT", help="write one page with all of it")
    parser.add_argument(
        "--update",
        action="store_true",
        help="write README's tables, docs/benchmarks and docs/ledger.md from benchmarks/results",
    )
    options = parser.parse_args(arguments)
    if options.update == (options.results is not None):
        parser.error("expected either a results file or --update")
    try:
        if options.update:
            print("\n".join(publish.update()))
            return 0
        return _report(options)
    except (ImportError, OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2


def _report(options: argparse.Namespace) -> int:
    content = read_json(options.results)
    if content.get("format") == training_record.FORMAT:
        if options.goals or options.plots or options.html:
            raise ValueError(f"{options.results}: a record of trainings has a table only")
        print(training_record.render(training_record.load(options.results)))
        return 0
    results = load(options.results)
    judged = render_goals(results, options.goals) if options.goals else None
    text = judged.text if judged else render(results)
    if options.insert is None:
        print(text)
    else:
        document = options.insert.read_text(encoding="utf-8")
        write_text(options.insert, insert(document, text))
    if options.plots:
        plots.write(results, options.plots, options.results.stem)
    if options.html:
        write_text(options.html, html_page.render(results))
    return 0 if judged is None or judged.met else 1


if __name__ == "__main__":
    sys.exit(main())
