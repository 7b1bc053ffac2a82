# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, in one command that always ends and always leaves one results file.

    python3 -m benchmarks.gpu_job [--steps A,B] [--budget 540] [--output DIR] [--resume FILE]

The steps: build in place for the GPU present; run every test; run a short case list under
compute-sanitizer; measure the first cases of each op; measure what the goals speak of; compare
whole trainings; draw plots and a page of all that. No network is needed. The file is rewritten
after each step, so what was done is kept whatever comes after, and --resume goes on with it: steps
that passed, at the same commit, are not repeated. --rehearse runs the same commands on the CPU,
with the smallest settings, so that a mistake in them costs no time on a GPU. Exit code 0: every
step passed (or there is no GPU to run on); 1: a step failed or ran out of time; 2: the job cannot
start; 3: no step failed, but one could not run for want of a tool.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import machine, results_file
from benchmarks.machine import ROOT

PASSED, FAILED, TIMED_OUT, SKIPPED = "passed", "failed", "timed out", "skipped"

SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Only shared-memory tools are narrowed to our kernels: initcheck must also see the writes of
# torch's, or their results would count as uninitialised, and memcheck should see all.
_NARROWED_TOOLS = ("racecheck", "synccheck")
_SANITIZER_PLACES = ("bin", "compute-sanitizer")

# Kept back at the end for writing the file, and per stopped command for its own last words.
_RESERVE_S = 8.0
_GRACE_S = 8.0
_LOG_LINES = 60


# A test's parameters name its backend: test_conv[cuda-float32] is one, test_cuda_build is not.
_CUDA_TEST = re.compile(r"\[(?:[^]]*-)?cuda(?:-[^]]*)?\]")


class MissingToolError(Exception):
    """A step cannot run here; the text says what is missing and how to provide it."""


@dataclass(frozen=True)
class Outcome:
    """How a step ended: status, one line about it, and what it adds to the results file."""

    status: str
    reason: str
    details: dict[str, Any] = field(default_factory=dict)
    section: dict[str, Any] | None = None


@dataclass(frozen=True)
class Finished:
    """How a command ended; `output` is its standard output and errors together."""

    exit_code: int
    timed_out: bool
    wall_s: float
    output: str

    def tail(self, lines: int = _LOG_LINES) -> list[str]:
        """The last lines of the output."""
        return self.output.splitlines()[-lines:]


def run_command(
    command: Sequence[str],
    limit_s: float,
    env: dict[str, str] | None = None,
    grace_s: float = _GRACE_S,
) -> Finished:
    """Runs a command in a process group of its own and ends the whole group at the limit.

    At the limit the command is first interrupted (pytest then writes what it has), and killed
    `grace_s` later.
    """
    start = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        timed_out = False
        try:
            process.wait(timeout=max(limit_s, 0.1))
        except subprocess.TimeoutExpired:
            timed_out = True
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=grace_s)
        finally:
            # Whatever the command left behind (compilers, workers) goes with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        output = log.read().decode("utf-8", errors="replace")
    return Finished(process.returncode, timed_out, time.monotonic() - start, output)


@dataclass
class Context:
    """What a step may use: a scratch folder, its deadline, the GPU's compute capability.

    `device` and what follows is what steps work on; a rehearsal without a GPU says so here and
    nowhere else.
    """

    scratch: Path
    deadline: float
    capability: tuple[int, int]
    device: str = "cuda"
    case_set: str = "first"
    tests: tuple[str, ...] = ()  # all
    training: tuple[str, ...] = ("--data", "shapes", "--size", "gpu")
    path: Path | None = None  # of the results file, beside which other files go

    @property
    def goal_set(self) -> str:
        """The rows that goals speak of, on this GPU."""
        if self.device != "cuda":
            return self.case_set
        return "hopper" if self.capability == (9, 0) else "gpu"

    def remaining(self) -> float:
        """Seconds that the step has left."""
        return self.deadline - time.monotonic()

    def python(self, *arguments: str, limit_s: float | None = None, **env: str) -> Finished:
        """Runs this interpreter from the repository root, within the step's time."""
        limit = self.remaining() if limit_s is None else min(limit_s, self.remaining())
        return run_command([sys.executable, *arguments], limit, env)


@dataclass(frozen=True)
class Step:
    """A named step: `share` is its part of the time still left, `section` its place in the file."""

    name: str
    run: Callable[[Context], Outcome]
    share: float
    section: str | None = None


def require_module(name: str, what: str) -> None:
    """Raises MissingToolError when this interpreter lacks a module."""
    if importlib.util.find_spec(name.replace("-", "_")) is None:
        raise MissingToolError(
            f"{name} is not installed, so {what}; provide it with: "
            f"{sys.executable} -m pip install {name}"
        )


def architecture(capability: tuple[int, int]) -> str:
    """The DILSEG_CUDA_ARCH_LIST entry of one GPU: "8.6"; from 9.0 on with its own set, "9.0a"."""
    major, minor = capability
    return f"{major}.{minor}a" if major >= 9 else f"{major}.{minor}"


def _judge(done: Finished, what: str) -> Outcome:
    log = {"exit_code": done.exit_code, "wall_s": round(done.wall_s, 1), "log": done.tail()}
    if done.timed_out:
        return Outcome(TIMED_OUT, f"{what} was stopped after {done.wall_s:.0f} s", log)
    if done.exit_code != 0:
        last = next((line for line in reversed(done.tail()) if line.strip()), "no output")
        return Outcome(FAILED, f"{what} ended with exit code {done.exit_code}: {last.strip()}", log)
    return Outcome(PASSED, f"{what} took {done.wall_s:.0f} s", log)


def build_step(context: Context) -> Outcome:
    """Compiles every kernel for the GPU present, in place, and loads the result."""
    archs = architecture(context.capability)
    kind = "cuda" if context.device == "cuda" else "auto"
    outcome = _judge(
        context.python("-m", "build_tools", DILSEG_BUILD=kind, DILSEG_CUDA_ARCH_LIST=archs),
        f"the build for {archs}",
    )
    if outcome.status != PASSED:
        return outcome
    loaded = context.python(
        "-c",
        "import json, dilseg; print(json.dumps(dilseg.build_info(), default=str))",
    )
    check = _judge(loaded, "loading the build")
    if check.status != PASSED:
        return check
    return Outcome(
        PASSED,
        outcome.reason,
        {
            **outcome.details,
            "archs": archs,
            "build_info": json.loads(loaded.output.splitlines()[-1]),
        },
    )


def read_junit(path: Path) -> dict[str, Any]:
    """Counts, failures and skip reasons of a pytest junit file."""
    counts = Counter({"passed": 0, "failed": 0, "errors": 0, "skipped": 0})
    on_gpu: Counter[str] = Counter({"passed": 0, "failed": 0})
    failures: list[dict[str, str]] = []
    reasons: Counter[str] = Counter()
    seconds = 0.0
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        seconds += float(case.get("time") or 0.0)
        verdict = "passed"
        for tag, word in (("skipped", "skipped"), ("failure", "failed"), ("error", "errors")):
            found = case.find(tag)
            if found is not None:
                verdict = word
                message = (found.get("message") or found.text or "").strip().splitlines() or [""]
                if word == "skipped":
                    reasons[message[0]] += 1
                else:
                    failures.append({"test": name, "message": message[0][:300]})
        counts[verdict] += 1
        if _CUDA_TEST.search(name) and verdict != "skipped":
            on_gpu["passed" if verdict == "passed" else "failed"] += 1
    return {
        **counts,
        "on_cuda": dict(on_gpu),
        "seconds": round(seconds, 1),
        "failures": failures[:100],
        "skip_reasons": dict(reasons.most_common()),
    }


def test_step(context: Context) -> Outcome:
    """Runs every test that is not marked slow; those for the GPU join in where there is one."""
    require_module("pytest", "no test can run")
    junit = context.scratch / "junit.xml"
    command = [
        "-m",
        "pytest",
        "-m",
        "not slow",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={junit}",
        *context.tests,
    ]
    cores = os.cpu_count() or 1
    workers = max(1, min(8, cores // 2))
    if importlib.util.find_spec("xdist") is not None and workers > 1:
        command += ["-n", str(workers)]
    else:
        workers = 1
    done = context.python(
        *command,
        limit_s=context.remaining() - _GRACE_S,
        OMP_NUM_THREADS=str(max(1, cores // workers)),
    )
    outcome = _judge(done, "the test run")
    if not junit.is_file():
        return Outcome(outcome.status if outcome.status != PASSED else FAILED,
                       f"{outcome.reason}; pytest left no junit file", outcome.details)  # fmt: skip
    tests = read_junit(junit)
    tests["workers"] = workers
    tests["complete"] = not done.timed_out
    counted = (
        f"{tests['passed']} passed, {tests['failed']} failed, {tests['errors']} errors, "
        f"{tests['skipped']} skipped; {tests['on_cuda']['passed']} of them passed on cuda"
    )
    if outcome.status == PASSED and context.device == "cuda" and not tests["on_cuda"]["passed"]:
        return Outcome(FAILED, f"no test ran on the GPU: {counted}", outcome.details, tests)
    reason = counted if outcome.status != TIMED_OUT else f"{outcome.reason}: {counted}"
    return Outcome(outcome.status, reason, outcome.details, tests)


def find_sanitizer() -> str | None:
    """The compute-sanitizer program: on PATH, or in the CUDA toolkit that nvcc belongs to."""
    found = shutil.which("compute-sanitizer")
    if found:
        return found
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        roots.append(str(Path(nvcc).resolve().parents[1]))
    for root in roots:
        for place in _SANITIZER_PLACES:
            candidate = Path(root or "/nonexistent") / place / "compute-sanitizer"
            if candidate.is_file() and os.access(candidate, os.X_OK):
                return str(candidate)
    return None


def read_sanitizer(tool: str, done: Finished) -> dict[str, Any]:
    """The verdict of one tool: passed only with no error and the case list run to its end."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", done.output)
    cases = re.findall(r"^sanitizer cases: (\d+)$", done.output, flags=re.MULTILINE)
    errors = sum(map(int, summary)) if summary else None
    count = int(cases[-1]) if cases else 0
    if done.timed_out:
        status, reason = TIMED_OUT, f"stopped after {done.wall_s:.0f} s"
    elif "Device not supported" in done.output:
        status, reason = SKIPPED, "compute-sanitizer says the device is not supported here"
    elif errors is None or errors or done.exit_code or not count:
        status = FAILED
        reason = (
            f"exit code {done.exit_code}, {'no summary' if errors is None else f'{errors} errors'}"
        )
    else:
        status, reason = PASSED, f"0 errors in {count} cases"
    verdict: dict[str, Any] = {
        "tool": tool,
        "status": status,
        "reason": reason,
        "errors": errors,
        "cases": count,
        "wall_s": round(done.wall_s, 1),
    }
    if status != PASSED:
        verdict["log"] = done.tail()
    return verdict


def sanitizer_step(context: Context) -> Outcome:
    """Runs the case list under each tool of compute-sanitizer, as far as the time goes."""
    program = find_sanitizer()
    if program is None:
        raise MissingToolError(
            "compute-sanitizer was not found on PATH or in the CUDA toolkit; it comes with the "
            "toolkit, so put its folder on PATH or set CUDA_HOME"
        )
    verdicts: dict[str, Any] = {}
    for index, tool in enumerate(SANITIZER_TOOLS):
        # Half of what is left for each but the last: memcheck and racecheck matter most, and
        # starting torch under a tool alone takes a good part of a minute.
        last = index == len(SANITIZER_TOOLS) - 1
        limit = context.remaining() if last else context.remaining() / 2
        if limit < 5.0:
            verdicts[tool] = {
                "tool": tool,
                "status": SKIPPED,
                "reason": "no time was left",
                "errors": None,
            }
            continue
        command = [program, "--tool", tool, "--error-exitcode", "99", "--report-api-errors", "no"]
        if tool in _NARROWED_TOOLS:
            command += ["--kernel-regex", "kns=dilseg"]
        command += [sys.executable, "-m", "benchmarks.sanitizer_cases", context.device]
        # Without the caching allocator every tensor is its own allocation, so that overruns leave
        # it.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = run_command(command, limit - 2.0, environment, grace_s=2.0)
        verdicts[tool] = read_sanitizer(tool, done)
    worst = [status for status in (FAILED, TIMED_OUT, SKIPPED)
             if any(v["status"] == status for v in verdicts.values())]  # fmt: skip
    reason = "; ".join(f"{tool}: {verdict['reason']}" for tool, verdict in verdicts.items())
    return Outcome(worst[0] if worst else PASSED, reason, section=verdicts)


def bench_step(context: Context) -> Outcome:
    """Measures the first cases of each op against torch and cuDNN."""
    return _measure(context, context.case_set, ("--seconds", "0.1", "--row-limit", "15"))


def goals_step(context: Context) -> Outcome:
    """Measures what the goals for this GPU speak of."""
    return _measure(context, context.goal_set, ("--seconds", "0.2", "--row-limit", "600"))


def _measure(context: Context, case_set: str, timing: Sequence[str]) -> Outcome:
    for module in ("pytest", "pytest-benchmark"):
        require_module(module, "nothing can be measured")
    path = context.scratch / "bench.json"
    budget = context.remaining() - _GRACE_S - 15.0  # one row may be under way when the budget ends
    done = context.python(
        "-m", "pytest", "benchmarks", "--benchmark-only", "-q",
        "-p", "no:cacheprovider", "-p", "no:xdist",
        "--device", context.device, "--set", case_set, *timing,
        "--budget", f"{max(budget, 1.0):.0f}", "--results", str(path),
        limit_s=context.remaining() - _GRACE_S,
    )  # fmt: skip
    outcome = _judge(done, "the benchmark run")
    if not path.is_file():
        return Outcome(outcome.status if outcome.status != PASSED else FAILED,
                       f"{outcome.reason}; no row was measured", outcome.details)  # fmt: skip
    measured = results_file.load(path)
    benchmarks = measured["benchmarks"]
    details = {**outcome.details, "machine": measured["machine"]}
    if outcome.status == PASSED:
        details.pop("log")
    rows, skipped = len(benchmarks["rows"]), len(benchmarks["skipped"])
    counted = f"{rows} rows measured, {skipped} skipped"
    if outcome.status == PASSED and not rows:
        return Outcome(FAILED, counted, details, benchmarks)
    reason = counted if outcome.status == PASSED else f"{outcome.reason}; {counted}"
    return Outcome(outcome.status, reason, details, benchmarks)


def training_step(context: Context) -> Outcome:
    """Compares whole trainings on dilseg's operators and on torch's."""
    assert context.path is not None
    out = context.path.with_name(f"{context.path.stem}-training.json")
    done = context.python("-m", "benchmarks.training", *context.training, "--out", str(out))
    return _judge(done, "the comparison of trainings")


def report_step(context: Context) -> Outcome:
    """Draws plots and a page of what has been measured."""
    require_module("matplotlib", "nothing can be drawn")
    assert context.path is not None
    folder = context.path.with_suffix("")
    done = context.python(
        "-m", "benchmarks.report", str(context.path), "--plots", str(folder),
        "--html", str(context.path.with_suffix(".html")),
    )  # fmt: skip
    return _judge(done, "the report")


STEPS: dict[str, Step] = {
    step.name: step
    for step in (
        Step("build", build_step, share=0.5),
        Step("test", test_step, share=0.45, section="tests"),
        Step("sanitizer", sanitizer_step, share=0.55, section="sanitizer"),
        Step("bench", bench_step, share=0.8, section="benchmarks"),
        Step("goals", goals_step, share=0.8, section="benchmarks"),
        Step("training", training_step, share=0.9),
        Step("report", report_step, share=1.0),
    )
}


def run_step(step: Step, context: Context) -> Outcome:
    """Runs one step; whatever goes wrong in it becomes an outcome, never an exception."""
    try:
        return step.run(context)
    except MissingToolError as error:
        return Outcome(SKIPPED, str(error))
    except Exception as error:  # a defect of a step must not cost the results of the others
        return Outcome(FAILED, f"{type(error).__name__}: {error}")


def run_steps(
    steps: Sequence[Step],
    *,
    path: Path,
    described: dict[str, Any],
    capability: tuple[int, int],
    budget_s: float,
    earlier: dict[str, Any] | None = None,
    rehearsal: Mapping[str, Any] | None = None,
) -> int:
    """Runs the steps within the budget, rewrites the file after each, returns the exit code.

    `earlier` are results to go on with; `rehearsal` holds fields of Context that take the GPU's
    place.
    """
    results = earlier or results_file.make_results(
        machine=described, started=results_file.now(), status="partial"
    )
    passed = {step["name"] for step in results["steps"]}
    steps = [step for step in steps if step.name not in passed]
    results["budget_s"] = budget_s
    results_file.save(results, path)
    end = time.monotonic() + budget_s - _RESERVE_S
    broken_build = False
    with tempfile.TemporaryDirectory(prefix="dilseg-gpu-job-") as scratch:
        for step in steps:
            start = time.monotonic()
            left = end - start
            if broken_build:
                outcome = Outcome(SKIPPED, "the build before it did not pass")
            elif left < 5.0:
                outcome = Outcome(
                    TIMED_OUT, f"the budget of {budget_s:g} s was spent before its turn"
                )
            else:
                print(f"{step.name}: started, {left * step.share:.0f} s at most", flush=True)
                context = Context(
                    Path(scratch),
                    start + left * step.share,
                    capability,
                    path=path,
                    **(rehearsal or {}),
                )
                outcome = run_step(step, context)
            broken_build = broken_build or (step.name == "build" and outcome.status != PASSED)
            details = dict(outcome.details)
            results["machine"] |= details.pop("machine", {})
            results["steps"].append(
                {
                    "name": step.name,
                    "status": outcome.status,
                    "reason": outcome.reason,
                    "seconds": round(time.monotonic() - start, 1),
                    **details,
                }
            )
            if step.section == "benchmarks":
                results["benchmarks"] = merge_rows(results["benchmarks"], outcome.section)
            elif step.section is not None:
                results[step.section] = outcome.section
            results["written"] = results_file.now()
            results_file.save(results, path)
            print(f"{step.name}: {outcome.status} - {outcome.reason}", flush=True)
    results["status"] = "complete"
    results_file.save(results, path)
    statuses = {step["status"] for step in results["steps"]}
    if statuses & {FAILED, TIMED_OUT}:
        return 1
    return 3 if SKIPPED in statuses else 0


def earlier_results(path: Path, described: dict[str, Any]) -> dict[str, Any]:
    """The results of an earlier job, without the steps that did not pass.

    Raises:
        OSError, ValueError: no such file, a malformed one, or one of another GPU or commit.
    """
    results = results_file.load(path)
    for key in ("name", "commit"):
        before, now = results["machine"].get(key), described.get(key)
        if before != now:
            raise ValueError(f"{path}: is of the {key} {before}, but here it is {now}")
    results["status"] = "partial"
    results["steps"] = [step for step in results["steps"] if step["status"] == PASSED]
    return results


def merge_rows(
    before: dict[str, Any] | None, measured: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Rows of two runs; of a row that both measured, the later."""
    if before is None or measured is None:
        return measured or before

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(
            row[name] for name in ("op", "case", "mode", "precision", "layout", "provider")
        )

    rows = {key(row): row for row in (*before["rows"], *measured["rows"])}
    return {
        "rows": list(rows.values()),
        "skipped": [*before["skipped"], *measured["skipped"]],
    }


# What a rehearsal works on instead of a GPU: every step's own command, at its smallest.
REHEARSAL: dict[str, Any] = {
    "device": "cpu",
    "case_set": "smoke",
    "tests": ("tests/test_metrics.py",),
    "training": ("--data", "shapes", "--size", "cpu", "--steps", "8"),
}


def results_path(folder: Path, gpu: str, day: date) -> Path:
    """`<gpu>-<date>.json` in `folder`, numbered from the second of a day on."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    path, number = folder / f"{slug}-{day.isoformat()}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{slug}-{day.isoformat()}-{number}.json"
    return path


def find_gpu() -> tuple[tuple[int, int] | None, str]:
    """Compute capability and name of the GPU that torch sees, or None and why there is none.

    Raises:
        MissingToolError: the driver lists a GPU, but torch is not there or cannot use it.
    """
    names = machine.gpu_names()
    if importlib.util.find_spec("torch") is None:
        if names:
            raise MissingToolError(
                f"the driver lists {names[0]}, but {sys.executable} has no torch; run this with a "
                f"Python that has a CUDA build of torch"
            )
        return None, "neither torch nor an NVIDIA driver was found"
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_capability(0), torch.cuda.get_device_name(0)
    if names:
        raise MissingToolError(
            f"the driver lists {names[0]}, but torch {torch.__version__} cannot use it "
            f"(its CUDA is {torch.version.cuda}); install a CUDA build of it that fits the driver"
        )
    return None, f"torch {torch.__version__} sees no CUDA device"


def _steps_option(text: str) -> list[Step]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in STEPS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"no step {unknown[0]!r}; the steps are {', '.join(STEPS)}"
            if unknown
            else "no step is named"
        )
    return [STEPS[name] for name in STEPS if name in names]


def main(arguments: list[str] | None = None) -> int:
    """The command; see the text at the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu_job",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--steps",
        type=_steps_option,
        default=list(STEPS.values()),
        metavar="A,B",
        help=f"of {', '.join(STEPS)} (default: all)",
    )
    parser.add_argument(
        "--budget", type=float, default=540.0, metavar="SECONDS", help="for all steps"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results"),
        metavar="DIR",
        help="where the files go (default: $OUT, or benchmarks/results)",
    )
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on with this file")
    parser.add_argument(
        "--rehearse", action="store_true", help="the same on the CPU, into a temporary folder"
    )
    options = parser.parse_args(arguments)
    if options.rehearse:
        return rehearse(options.steps, options.budget)
    try:
        capability, found = find_gpu()
    except MissingToolError as error:
        print(f"benchmarks.gpu_job: {error}", file=sys.stderr)
        return 2
    if capability is None:
        print(f"No GPU here ({found}): nothing was built, tested or measured.")
        return 0
    described = machine.describe("cuda", package=False)
    try:
        earlier = None if options.resume is None else earlier_results(options.resume, described)
    except (OSError, ValueError) as error:
        print(f"benchmarks.gpu_job: --resume: {error}", file=sys.stderr)
        return 2
    path = options.resume or results_path(options.output, found, date.today())
    code = run_steps(
        options.steps,
        path=path,
        described=described,
        capability=capability,
        budget_s=options.budget,
        earlier=earlier,
    )
    print(f"results: {path}")
    return code


def rehearse(steps: Sequence[Step], budget_s: float) -> int:
    """Runs the steps on the CPU and keeps nothing; the exit code is the job's."""
    with tempfile.TemporaryDirectory(prefix="dilseg-rehearsal-") as folder:
        return run_steps(
            steps,
            path=Path(folder) / "rehearsal.json",
            described=machine.describe("cpu", package=False),
            capability=(9, 0),
            budget_s=budget_s,
            rehearsal=REHEARSAL,
        )


if __name__ == "__main__":
    sys.exit(main())
