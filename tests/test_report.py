# SPDX-License-Identifier: Apache-2.0
"""What is written from results files: README's tables, the ledger, plots, the page."""

from __future__ import annotations

import ast
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers.results import results, row

from benchmarks import (
    cases,
    goals,
    html_page,
    ledger,
    plots,
    publish,
    report,
    results_file,
    sources,
    training_record,
)
from benchmarks.goals import Goal
from benchmarks.sources import Folder, Source

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = "<script>alert('$x$ & \"y\"')</script>|</svg>"


def goal_rows(wanted: tuple[Goal, ...], factor: float = 1.5) -> list[dict[str, Any]]:
    """Rows of both sides that meet goals of time `factor` times over, with equal peaks."""
    made: dict[tuple[str, ...], dict[str, Any]] = {}
    for goal in wanted:
        place = {"op": goal.op, "case": goal.case, "mode": goal.mode}
        place |= {"precision": goal.precision, "layout": goal.layout}
        for provider, time in (("dilseg", 1e-3), (goal.rival, goal.ratio * factor * 1e-3)):
            made.setdefault((*place.values(), provider), row(provider, time, **place))
    return list(made.values())


def source(
    name: str, rows: list[dict[str, Any]], *, device: str = "cpu", day: int = 2, **changes: Any
) -> Source:
    """A file of two CPU threads, or of a GPU, written on a day of January 2030."""
    made = results(*rows, written=f"2030-01-{day:02d}T00:00:00+00:00", **changes)
    made["machine"] |= {"device": device, "name": f"Test {device}"}
    if device == "cpu":
        made["machine"]["threads"] = 2
    return Source(name, results_file.validate(made))


def test_documents_say_what_the_results_files_say() -> None:
    """What `make report` would write; after it, nothing changes."""
    found = sources.read(ROOT / "benchmarks" / "results")
    folder = ROOT / "docs" / "benchmarks"
    drawn = [path.relative_to(ROOT).as_posix() for path in sorted(folder.glob("*.svg"))]
    for path, text in publish.documents(ROOT, found, drawn).items():
        assert (ROOT / path).read_text(encoding="utf-8") == text, f"{path}: run make report"


def test_committed_plots_are_those_of_the_newest_files() -> None:
    pytest.importorskip("matplotlib")
    drawn = publish.drawings(sources.read(ROOT / "benchmarks" / "results"))
    folder = ROOT / "docs" / "benchmarks"
    assert {path.name for path in folder.glob("*.svg")} == {Path(path).name for path in drawn}

    def origin(text: str) -> str:
        return text.split("<dc:source>", 1)[1].split("</dc:source>", 1)[0]

    for path, text in drawn.items():
        committed = (ROOT / path).read_text(encoding="utf-8")
        assert len(committed) <= publish.PLOT_BYTES, path
        assert origin(committed) == origin(text), f"{path}: run make report"


def test_the_newest_file_that_fits_is_shown() -> None:
    rows = goal_rows(goals.CONV_GOALS)
    (subject,) = (one for one in sources.subjects([]) if one.goal_set is goals.CONVOLUTION_ON_CPU)
    old, new = source("a", rows, day=2), source("b", rows, day=3)
    assert subject.newest([new, old]) is new
    partial = source("c", rows, day=4, status="partial")
    some = source("d", rows[:-1], day=5)
    gpu = source("e", rows, device="cuda", day=6)
    other_threads = source("f", rows, day=7)
    other_threads.results["machine"]["threads"] = 8
    others = [partial, some, gpu, other_threads, source("g", [], day=8)]
    assert subject.newest([*others, old, new]) is new
    assert subject.newest(others) is other_threads  # none fits, and this is the latest with a row
    assert subject.newest([gpu]) is None


def test_readme_shows_goals_and_losses_and_what_is_pending() -> None:
    place = {"precision": "float32", "case": "unnamed"}
    lost = [row("dilseg", 3e-3, **place), row("torch", 1e-3, **place)]
    won = [row("dilseg", 1e-3, mode="step", **place), row("torch", 3e-3, mode="step", **place)]
    rows = [*goal_rows(goals.CONV_GOALS), *lost, *won]
    plot = "docs/benchmarks/cpu-conv-speed-up.svg"
    text = publish.readme_block(Folder([source("a.json", rows)]), [plot])
    table = text[text.index("#### Convolution, CPU") :]
    lines = [line for line in table.splitlines() if line.startswith("| `dilated_conv2d`")]
    assert len(lines) == len(goals.CONV_GOALS) + 1
    assert (
        "| `dilated_conv2d` | unnamed | - | forward | 3 ms | 1 ms (torch) | 0.33x (loss) |"
        in (lines[-1])
    )
    assert f"over {len(goals.CONV_GOALS) + 2} comparisons" in table
    assert "1 losses. All rows: float32, nchw." in table
    assert "Measured on Test cpu" in table
    assert "(benchmarks/results/a.json)" in table
    assert f"]({plot})" in table
    assert "cpu-conv-memory" not in text
    count = len(goals.CONVOLUTION_ON_GPU.goals)
    assert f"| Convolution, GPU | {count} | pending |" in text
    assert "| Fused operators, CPU | 18 | pending |" in text


def test_a_file_of_a_gpu_takes_the_place_of_pending() -> None:
    assert "| Convolution, GPU |" in publish.readme_block(Folder(), [])
    gpu = source("gpu.json", goal_rows(goals.CONVOLUTION_ON_GPU.goals), device="cuda")
    text = publish.readme_block(Folder([gpu]), [])
    assert "| Convolution, GPU |" not in text
    assert "#### Convolution, GPU" in text
    assert "| input | mode | precision | layout | dilseg |" in text
    page = publish.page(Folder([gpu]), [])
    assert "Pending: no results file of a CPU yet." in page
    assert "### dilated_conv2d" in page
    assert "pending" in ledger.render(Folder())
    lines = ledger.render(Folder([gpu])).splitlines()
    start = "| `dilated_conv2d` | fc6_7x7_d4 | forward | bfloat16 | nchw |"
    assert f"{start} time | torch | 1.2x | 1.80x |" in lines
    assert f"{start} time | torch | 1.5x | 1.80x |" in lines  # of the goals for Hopper


def test_an_op_without_goals_is_shown_whole() -> None:
    rows = [row("dilseg", 1e-3, op="model"), row("torch", 1.01e-3, op="model")]
    text = publish.readme_block(Folder([source("a.json", rows)]), [])
    assert "#### model, CPU" in text
    assert "1.01x (tie)" in text
    assert "| model, GPU | none | pending |" in text


def training(name: str = "t.json", *, day: int = 2, **changes: Any) -> Source:
    """A record of one network, trained once on torch's operators and twice on dilseg's."""
    rows = [
        {"model": "fcn8s", "ops": ops, "mean_iou": 0.5, "images_per_s": speed, "peak_bytes": 2**20}
        for ops, speed in (("torch", 2.0), ("dilseg", 3.0), ("dilseg", 9.0))
    ]
    said = {"model": "fcn8s", "loss_difference": 1e-4, "bitwise_equal": True}
    made = results() | {
        "format": training_record.FORMAT, "data": "camvid", "rows": rows, "comparisons": [said],
        "written": f"2030-01-{day:02d}T00:00:00+00:00", "command": ["python", "-m", "x"],
    }  # fmt: skip
    made["machine"]["device"] = "cuda"
    return Source(name, training_record.validate(made | changes, name))


def test_trainings_are_told_in_a_line_per_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "| fcn8s | 3 / 2 | **1.50x** | 50.00 / 50.00 | 1.0 / 1.0 | 0.01 % | yes |"
    old, new, cut = training(), training("u.json", day=3), training(day=4, status="partial")
    text = publish.readme_block(Folder(trainings=[cut, new, old]), [])
    assert line in text
    assert "Data: camvid. From [u.json](benchmarks/results/u.json), by `python -m x`." in text
    assert "| Training, CPU | none | pending |" in text
    assert "| Training, GPU |" not in text
    said = {"model": "fcn8s", "loss_difference": 1e-4, "bitwise_equal": False}
    page = ledger.render(Folder(trainings=[training(comparisons=[said])]))
    assert f"| Test GPU {line[:-8]} | **no** | [t.json](../benchmarks/results/t.json) |" in page
    assert "| CPU | pending |" in page
    path = tmp_path / "t.json"
    results_file.write_text(path, json.dumps(old.results))
    assert sources.read(tmp_path) == Folder([], [old])
    assert report.main([str(path)]) == 0
    assert line in capsys.readouterr().out
    assert report.main([str(path), "--goals"]) == 2
    assert "has a table only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, r"t\.version: expected 1, but got 2"),
        ({"machine": {}}, r"t\.machine\.name: expected a device name"),
        ({"data": None}, r"t\.data: expected a text, but got None"),
        ({"rows": None}, r"t\.rows: expected a list"),
        ({"rows": [{"model": "x"}]}, r"t\.rows\[0\]\.ops: expected it"),
        ({"rows": []}, r"t\.comparisons\[0\]\.model: expected a network with rows of dilseg and"),
    ],
)
def test_malformed_trainings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training("t", **changes)


def test_the_ledger_tells_what_was_missed_and_what_does_not_count() -> None:
    text = ledger.render(Folder([source("a.json", goal_rows(goals.GOALS, 0.9))]))
    assert "| step | time | torch | 5x | **4.50x, missed** |" in text
    assert "0 of 18 goals met in [a.json](../benchmarks/results/a.json)" in text
    assert "--device cpu --set fused --threads 2`" in text
    other = source("b.json", goal_rows(goals.GOALS))
    other.results["machine"]["threads"] = 8
    assert "set for 2 threads, but this was measured with 8" in ledger.render(Folder([other]))


@pytest.mark.parametrize(
    ("failures", "status", "word"),
    [
        ([], "passed", "passed"),
        ([], "timed out", "none failed, the run: timed out"),
        (["tests.test_cuda::test_never_waits_for_the_device[x]"], "failed", "**failed**"),
        (["tests.test_cuda::test_another[x]"], "failed", "none failed, the run: failed"),
    ],
)
def test_the_ledger_tells_what_the_tests_said_on_a_gpu(
    failures: list[str], status: str, word: str
) -> None:
    ran = source(
        "gpu.json", [], device="cuda",
        steps=[{"name": "test", "status": status, "reason": ""}],
        tests={"failures": [{"test": name, "message": "no"} for name in failures]},
    )  # fmt: skip
    (line,) = (line for line in ledger.render(Folder([ran])).splitlines() if "host synch" in line)
    assert line.endswith(f"| - | {word} ([gpu.json](../benchmarks/results/gpu.json)) |")
    (line,) = (line for line in ledger.render(Folder()).splitlines() if "host synch" in line)
    assert line.endswith("| - | pending |")


def test_the_ledger_quotes_documents_and_names_tests_that_exist() -> None:
    for one in (*ledger.PROMISES, *ledger.STATEMENTS):
        document = " ".join((ROOT / one.made_in).read_text(encoding="utf-8").split())
        assert one.text in document, f"{one.made_in} no longer says {one.text!r}"
    for promise in ledger.PROMISES:
        assert promise.cpu or promise.cuda
        for test in promise.tests:
            path, name = test.split("::")
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def layers(*cases: str) -> list[dict[str, Any]]:
    """Rows of convolutions with what plots need: work, traffic, shapes."""
    made = []
    for case in cases:
        work = {"case": case, "flops": 10**10, "bytes": 10**7}
        work["shapes"] = {"input": [1, 2, 3, 4], "weight": [2, 2, 3, 3]}
        made += [row("dilseg", 2e-3, **work), row("torch", 1e-3, peak_bytes=0, **work)]
    return made


def test_plots_are_written_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    measured = results(*layers("vgg_conv5_d2", HOSTILE))
    measured["machine"] |= {"name": HOSTILE, "copy": {"gb_per_s": 20.0}}
    measured["machine"]["matmul"] = {"bfloat16": {"tflop_per_s": 0.5}}
    written = plots.write(measured, tmp_path, "r")
    assert sorted(path.name for path in written) == sorted(
        f"r-{name}.{ending}"
        for name in ("speed-up", "roofline", "memory")
        for ending in ("svg", "png")
    )
    first = {path: path.read_bytes() for path in written}
    plots.write(measured, tmp_path, "r")
    for path, content in first.items():
        assert path.read_bytes() == content
        if path.suffix == ".png":
            assert content.startswith(b"\x89PNG")
            continue
        texts = {element.text for element in ElementTree.fromstring(content).iter()}
        assert any(HOSTILE in (text or "") for text in texts)
        assert b"prefers-color-scheme: dark" in content
        assert b"<dc:date>" not in content
    speed_up = (tmp_path / "r-speed-up.svg").read_text(encoding="utf-8")
    assert plots.COLOURS["loss"] in speed_up
    assert plots.COLOURS["win"] not in speed_up
    assert "0.50x (loss), torch" in speed_up
    roofline = (tmp_path / "r-roofline.svg").read_text(encoding="utf-8")
    assert "bfloat16 matmul 500 GFLOP/s" in roofline


def test_time_against_dilation_needs_several_dilations_of_one_layer() -> None:
    pytest.importorskip("matplotlib")

    def names(*cases: str) -> set[str]:
        measured = results(*layers(*cases))
        return set(plots.svgs(measured, sources.comparison.of(measured), "r.json"))

    assert "dilation" in names("aspp_d12_33", "aspp_d18_33")
    assert "dilation" not in names("aspp_d12_33")
    assert names() == set()


class Tags(HTMLParser):
    """Every tag with its attributes, and the text of cells."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts = 0
        self.links: list[str | None] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_escapes_everything() -> None:
    pytest.importorskip("matplotlib")
    rows = [
        *goal_rows(goals.CONV_GOALS[:3], 0.9),
        row(HOSTILE, 1e-3, op=HOSTILE, case=HOSTILE, mode=HOSTILE, source=HOSTILE),
        row("dilseg", 2e-3, op=HOSTILE, case=HOSTILE, mode=HOSTILE, source=HOSTILE),
    ]
    made = source("a.json", rows, steps=[{"name": HOSTILE, "status": HOSTILE, "reason": HOSTILE}])
    made.results["machine"] |= {"name": HOSTILE, "commit": HOSTILE}
    made.results["benchmarks"]["skipped"] = [
        {"group": HOSTILE, "provider": HOSTILE, "reason": "no time"}
    ]
    page = html_page.render(made.results)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.scripts == 1
    assert tags.links == []
    assert page.count("<svg") == 2
    assert HOSTILE in tags.text
    for part in ("0.50x (loss)", "0 of 10 goals met.", "no time", "not measured"):
        assert part in tags.text
    assert "Goals of the fused operators" not in tags.text  # nothing of them was measured


def test_report_writes_plots_and_page_beside_its_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    path, page, folder = tmp_path / "r.json", tmp_path / "new" / "r.html", tmp_path / "plots"
    results_file.save(results(*layers("vgg_conv5_d2")), path)
    arguments = [str(path), "--plots", str(folder), "--html", str(page)]
    assert report.main(arguments) == 0
    assert "0.50x (loss)" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert (folder / "r-speed-up.png").is_file()
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    assert report.main(arguments) == 2
    assert "plots need the package matplotlib" in capsys.readouterr().err
    assert report.main([str(path)]) == 0  # tables need none


def test_report_takes_a_file_or_updates(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["r.json", "--update"]):
        with pytest.raises(SystemExit):
            report.main(arguments)
        assert "expected either a results file or --update" in capsys.readouterr().err


def test_make_bench_measures_a_set_that_there_is() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (name,) = re.findall(r"^BENCH_SET \?= (\w+)$", makefile, re.MULTILINE)
    assert name in cases.SETS


def test_update_writes_everything_and_drops_plots_of_yesterday(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = source("a.json", goal_rows(goals.CONV_GOALS))
    results_file.save(made.results, tmp_path / "benchmarks" / "results" / "a.json")
    begin, end = "<!-- benchmarks: begin (written by make report) -->", "<!-- benchmarks: end -->"
    (tmp_path / "README.md").write_text(f"head\n{begin}\n{end}\ntail\n", encoding="utf-8")
    stale = tmp_path / "docs" / "benchmarks" / "cpu-fused-speed-up.svg"
    results_file.write_text(stale, "yesterday's")
    written = publish.update(tmp_path)
    plot = "docs/benchmarks/cpu-conv-speed-up.svg"
    assert {"README.md", "docs/ledger.md", "docs/benchmarks/README.md", plot} <= set(written)
    assert not stale.exists()
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert readme.startswith(f"head\n{begin}\n")
    assert f"]({plot})" in readme
    before = {path: (tmp_path / path).read_bytes() for path in written}
    assert publish.update(tmp_path) == written
    assert before == {path: (tmp_path / path).read_bytes() for path in written}
