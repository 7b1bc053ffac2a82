# SPDX-License-Identifier: Apache-2.0
"""Options of `pytest benchmarks`, the rows they select, and the runner that measures one row."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, goals, machine, markdown, providers, results_file, timing
from benchmarks.providers import Job

# Pessimistic rates of the straightforward kernels, used only to refuse a row whose first launch
# would already take too long: one thread per output, operands from the caches.
_FLOOR_FLOPS = {"cuda": 2e11, "cpu": 2e10}
_FLOOR_BYTES = {"cuda": 1e11, "cpu": 5e8}
# A network is made of kernels that were tuned, torch's for the most part.
_FLOOR_MODEL_FLOPS = {"cuda": 5e12, "cpu": 2e10}
# Launches that a row needs beside its timed ones: the check, one to plan by, one to measure memory.
_EXTRA_LAUNCHES = 3


def _csv(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _threads(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a count of at least 1, but got {text!r}")
    return int(text)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the selection and budget options."""
    group = parser.getgroup("dilseg benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    group.addoption("--set", dest="case_set", choices=cases.SETS, help="default: the device's own")
    group.addoption(
        "--providers", type=_csv, help=f"comma-separated, of {', '.join(providers.PROVIDERS)}"
    )
    group.addoption(
        "--precisions", type=_csv, help=f"comma-separated, of {', '.join(providers.PRECISIONS)}"
    )
    group.addoption(
        "--layouts", type=_csv, help=f"comma-separated, of {', '.join(providers.LAYOUTS)}"
    )
    group.addoption(
        "--threads", type=_threads, metavar="N", help="CPU threads of torch (default: torch's own)"
    )
    group.addoption(
        "--seconds", type=float, help="timed seconds per row (default: 0.3 CPU, 0.5 GPU)"
    )
    group.addoption(
        "--row-limit", type=float, default=30.0, help="skip rows estimated to take longer"
    )
    group.addoption(
        "--budget", type=float, help="seconds after which the remaining rows are skipped"
    )
    group.addoption("--results", type=Path, help="results file (JSON), rewritten after every row")


def _device(config: pytest.Config) -> str:
    chosen = config.getoption("--device")
    return chosen or ("cuda" if torch.cuda.is_available() else "cpu")


def _jobs(config: pytest.Config, op: str) -> list[Job]:
    device = _device(config)
    case_set = config.getoption("case_set") or {"cuda": "gpu"}.get(device, device)
    names: tuple[str, ...] = providers.DEFAULT_PROVIDERS
    precisions: tuple[str, ...] = ("float32", "bfloat16") if device == "cuda" else ("float32",)
    layouts: tuple[str, ...] = tuple(providers.LAYOUTS)
    if case_set in goals.SETS:
        wanted = goals.SETS[case_set]
        names = wanted.providers
        precisions = tuple(dict.fromkeys(goal.precision for goal in wanted.goals))
        layouts = tuple(dict.fromkeys(goal.layout for goal in wanted.goals))
    try:
        jobs = providers.make_jobs(
            cases.select(op, case_set),
            device,
            providers=config.getoption("--providers") or names,
            precisions=config.getoption("--precisions") or precisions,
            layouts=config.getoption("--layouts") or layouts,
        )
        if case_set in goals.SETS:
            jobs = [
                job
                for job in jobs
                if goals.is_named(case_set, op, job.case.name, job.mode, job.precision, job.layout)
            ]
        return jobs
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_configure(config: pytest.Config) -> None:
    """Lets pytest collect bench_*.py; a plain `pytest` in the checkout does not."""
    patterns = config.getini("python_files")
    if "bench_*.py" not in patterns:
        config.addinivalue_line("python_files", "bench_*.py")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives each benchmark file the jobs of its op."""
    if "job" in metafunc.fixturenames:
        jobs = _jobs(metafunc.config, metafunc.module.OP)
        metafunc.parametrize("job", jobs, ids=[job.id for job in jobs])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Takes the ops in turn, important cases first, so that a short budget still sees every op."""

    def rank(item: pytest.Item) -> int:
        callspec = getattr(item, "callspec", None)
        job = None if callspec is None else callspec.params.get("job")
        if not isinstance(job, Job):  # also the placeholder of an op without rows
            return -1
        case = job.case
        return [other for other in cases.CASES if other.op == case.op].index(case)

    items.sort(key=rank)


class Runner:
    """Measures jobs, keeps their rows, and stops in time."""

    def __init__(self, config: pytest.Config) -> None:
        self.device = torch.device(_device(config))
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self._seconds = config.getoption("--seconds") or {"cuda": 0.5, "cpu": 0.3}[self.device.type]
        self._row_limit: float = config.getoption("--row-limit")
        budget = config.getoption("--budget")
        self._budget: float | None = budget
        self._deadline = None if budget is None else time.monotonic() + budget
        self._path: Path | None = config.getoption("--results")
        self._machine: dict[str, Any] | None = None
        case_set = config.getoption("case_set")
        wanted = goals.SETS.get(case_set)
        self._goals = case_set if wanted is not None and wanted.device == self.device.type else None
        threads: int | None = config.getoption("--threads")
        if threads is not None:
            torch.set_num_threads(threads)
        self._started = results_file.now()

    def run(self, job: Job, benchmark: Any) -> None:  # the fixture of pytest-benchmark
        """Checks, times and records one job, or skips it and says why."""
        self._refuse_in_advance(job)
        if self._machine is None and not benchmark.disabled:
            copy = machine.measure_copy(self.device.type)
            self._machine = machine.describe(self.device.type) | {"copy": copy}
        benchmark.group = job.group
        try:
            with providers.flags(job) as flags:
                tensors = providers.make_inputs(job)
                launch = providers.prepare(job, tensors)
                check = providers.verify(job, tensors, launch())
                row = self._measure(job, launch, benchmark)
        except torch.OutOfMemoryError as error:
            self._skip(job, f"not enough memory on {self.device}: {str(error).splitlines()[0]}")
        if row is None:
            return
        row["flags"] = flags
        row["max_error"] = check.max_error
        row["torch_max_error"] = check.torch_max_error
        row["max_value"] = check.max_value
        benchmark.extra_info.update(row)
        self.rows.append(row)
        self._write()

    def _refuse_in_advance(self, job: Job) -> None:
        if self.device.type == "cuda" and not torch.cuda.is_available():
            pytest.skip("--device cuda: PyTorch sees no GPU on this machine")
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._skip(job, f"the budget of {self._budget:g} s was spent before its turn")
        itemsize = providers.PRECISIONS[job.precision].dtype.itemsize
        rates = _FLOOR_MODEL_FLOPS if job.case.op == cases.ModelCase.op else _FLOOR_FLOPS
        launch_s = max(
            job.case.flops(job.mode) / rates[self.device.type],
            job.case.bytes(job.mode, itemsize) / _FLOOR_BYTES[self.device.type],
        )
        total_s = launch_s * (_EXTRA_LAUNCHES + timing.MIN_SAMPLES)
        if total_s > self._row_limit:
            self._skip(
                job,
                f"estimated at {total_s:.0f} s with a straightforward kernel, above the row limit "
                f"of {self._row_limit:g} s (--row-limit)",
            )

    def _skip(self, job: Job, reason: str) -> None:
        self.skipped.append({"group": job.group, "provider": job.provider.name, "reason": reason})
        self._write()
        pytest.skip(reason)

    def _measure(self, job: Job, launch: timing.Launch, benchmark: Any) -> dict[str, Any] | None:
        if benchmark.disabled:  # --benchmark-disable: the check above was the point
            benchmark.pedantic(launch)
            return None
        plan = timing.make_plan(timing.time_once(launch, self.device), self._seconds)
        peak = timing.peak_memory(launch, self.device)
        sampler = timing.HotSampler(launch, self.device, plan.launches)
        benchmark.pedantic(sampler, rounds=plan.samples, iterations=plan.launches)
        # pytest-benchmark may call once more to return a result; only whole rounds have left a
        # reading.
        hot = timing.summarise(sampler.readings[: plan.samples])
        cold = None
        if self.device.type == "cuda":
            cold_samples = min(plan.samples, max(timing.MIN_SAMPLES, int(self._seconds / hot.p50)))
            cold = timing.summarise(timing.measure_cold(launch, self.device, cold_samples))
        case = job.case
        best = cold or hot
        itemsize = providers.PRECISIONS[job.precision].dtype.itemsize
        flops, moved = case.flops(job.mode), case.bytes(job.mode, itemsize)
        return {
            "op": case.op,
            "case": case.name,
            "source": case.source,
            "shapes": {name: list(shape) for name, shape in case.shapes().items()},
            "mode": job.mode,
            "provider": job.provider.name,
            "precision": job.precision,
            "layout": job.layout,
            "hot": hot.as_dict(),
            "cold": cold.as_dict() if cold else None,
            "launches_per_sample": plan.launches,
            "flops": flops,
            "bytes": moved,
            "gflop_per_s": flops / hot.p50 * 1e-9,
            "gb_per_s": moved / best.p50 * 1e-9,
            "peak_bytes": peak,
        }

    def results(self) -> dict[str, Any]:
        """Everything measured so far, as a results file holds it."""
        if self._machine is None:
            self._machine = machine.describe(self.device.type)
        return results_file.make_results(
            machine=self._machine,
            started=self._started,
            benchmarks={"rows": self.rows, "skipped": self.skipped},
        )

    def summary(self) -> str:
        """The comparison in Markdown; of a set with goals also how it stands with them."""
        results = self.results()
        text = markdown.render(results)
        if self._goals is None:
            return text
        return f"{text}\n\n{markdown.render_goals(results, self._goals).text}"

    def _write(self) -> None:
        if self._path is not None:
            results_file.save(self.results(), self._path)


_RUNNER = pytest.StashKey[Runner]()


@pytest.fixture(scope="session")
def runner(request: pytest.FixtureRequest) -> Runner:
    """The one runner of this session."""
    config = request.config
    if _RUNNER not in config.stash:
        config.stash[_RUNNER] = Runner(config)
    return config.stash[_RUNNER]


@pytest.fixture
def measure(runner: Runner, benchmark: Any) -> Callable[[Job], None]:
    """Measures one job with pytest-benchmark."""
    return lambda job: runner.run(job, benchmark)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Prints the comparison: device times and ratios, which pytest-benchmark's table lacks."""
    runner = config.stash.get(_RUNNER, None)
    if runner is not None and runner.rows:
        terminalreporter.section("dilseg against its rivals")
        terminalreporter.write_line(runner.summary())
