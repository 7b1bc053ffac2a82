# SPDX-License-Identifier: Apache-2.0
"""Options of `pytest benchmarks`, the rows they select, and the runner that measures one row."""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
# Launches that a row needs beside its timed ones: the check, one to plan by, one to measure memory,
# one for pytest-benchmark's table.
_EXTRA_LAUNCHES = 4
# Of a job that is checked and not timed.
_ONE_LAUNCH = timing.Plan(samples=1, launches=1)
# Cold readings of one turn, with one synchronisation.
_COLD_BATCH = 5


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


def _job_of(item: pytest.Item) -> Job | None:
    """None for other tests, and for the placeholder of an op without rows."""
    callspec = getattr(item, "callspec", None)
    job = None if callspec is None else callspec.params.get("job")
    return job if isinstance(job, Job) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Takes the ops in turn, important cases first, so that a short budget still sees every op."""

    def rank(item: pytest.Item) -> int:
        job = _job_of(item)
        if job is None:
            return -1
        case = job.case
        return [other for other in cases.CASES if other.op == case.op].index(case)

    items.sort(key=rank)


class _Refused(Exception):
    """Why a job is not measured, where nothing is wrong with it."""


@dataclass
class _Ready:
    """A job that was found right, and what was measured of it."""

    launch: timing.Launch
    flags: dict[str, object]
    check: providers.Check
    launch_s: float
    peak_bytes: int | None
    workspace_bytes: int | None
    plan: timing.Plan = _ONE_LAUNCH
    hot: timing.Summary | None = None
    cold: timing.Summary | None = None


class Runner:
    """Measures the jobs of a session, keeps their rows, and stops in time."""

    def __init__(self, config: pytest.Config, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._group: dict[Job, _Ready | Exception] = {}
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
        """Records one job, or skips it and says why; the first of a group measures all of it."""
        if self.device.type == "cuda" and not torch.cuda.is_available():
            pytest.skip("--device cuda: PyTorch sees no GPU on this machine")
        if job not in self._group:
            self._group = {}  # frees what the group before holds
            self._begin(job, timed=not benchmark.disabled)
        outcome = self._group[job]
        if isinstance(outcome, _Refused):
            self.skipped.append(
                {"group": job.group, "provider": job.provider.name, "reason": str(outcome)}
            )
            self._write()
            pytest.skip(str(outcome))
        if isinstance(outcome, Exception):
            raise outcome
        benchmark.group = job.group
        launches = outcome.plan.launches
        rounds = 1 if launches == 1 else timing.MIN_SAMPLES  # a slow launch has been timed enough
        with providers.flags(job):
            benchmark.pedantic(outcome.launch, rounds=rounds, iterations=launches)
        if benchmark.disabled:  # --benchmark-disable: the check was the point
            return
        row = self._row(job, outcome)
        benchmark.extra_info.update(row)
        self.rows.append(row)
        self._write()

    def _begin(self, first: Job, *, timed: bool) -> None:
        """Prepares and checks every job of a group, then times those that are right in turns."""
        tensors: providers.Tensors = {}
        for job in self._jobs:
            if job.group != first.group:
                continue
            try:
                self._refuse_in_advance(job)
                self._describe(job, timed=timed)
                tensors = tensors or providers.make_inputs(job)
                self._group[job] = self._prepare(job, tensors)
            except torch.OutOfMemoryError as error:
                text = str(error).splitlines()[0]
                self._group[job] = _Refused(f"not enough memory on {self.device}: {text}")
            except Exception as error:  # raised where its own job has its turn
                self._group[job] = error
        ready = {job: one for job, one in self._group.items() if isinstance(one, _Ready)}
        if timed and ready:
            self._time(ready)

    def _describe(self, job: Job, *, timed: bool) -> None:
        """Measures what the machine reaches, once, and in each precision that is met."""
        if not timed:
            return
        if self._machine is None:
            copy = machine.measure_copy(self.device.type)
            self._machine = machine.describe(self.device.type) | {"copy": copy, "matmul": {}}
        if job.precision not in self._machine["matmul"]:
            dtype = providers.PRECISIONS[job.precision].dtype
            with providers.flags(job):
                rate = machine.measure_matmul(self.device.type, dtype)
            self._machine["matmul"][job.precision] = rate

    def _prepare(self, job: Job, tensors: providers.Tensors) -> _Ready:
        with providers.flags(job) as flags:
            launch = providers.prepare(job, tensors)
            results = launch()
            check = providers.verify(job, tensors, results)
            own_bytes = sum(result.numel() * result.element_size() for result in results)
            del results
            # What a graph works in was allocated when it was captured.
            peak = None if job.provider.graph else timing.peak_memory(launch, self.device)
            return _Ready(launch, flags, check, timing.time_once(launch, self.device), peak,
                          None if peak is None else max(peak - own_bytes, 0))  # fmt: skip

    def _time(self, ready: dict[Job, _Ready]) -> None:
        plans = timing.make_plans([one.launch_s for one in ready.values()], self._seconds)
        hot, cold = [], []
        for (job, one), plan in zip(ready.items(), plans, strict=True):
            one.plan = plan
            hot.append(functools.partial(self._read_hot, job, one))
            cold.append(functools.partial(self._read_cold, job, one))
        rounds = plans[0].samples
        for one, readings in zip(ready.values(), timing.take_turns(hot, rounds), strict=True):
            one.hot = timing.summarise(readings)
        if self.device.type == "cuda":
            taken = timing.take_turns(cold, math.ceil(rounds / _COLD_BATCH))
            for one, readings in zip(ready.values(), taken, strict=True):
                one.cold = timing.summarise(readings)

    def _read_hot(self, job: Job, one: _Ready) -> list[float]:
        with providers.flags(job):
            return [timing.measure_hot(one.launch, self.device, one.plan.launches)]

    def _read_cold(self, job: Job, one: _Ready) -> list[float]:
        with providers.flags(job):
            return timing.measure_cold(one.launch, self.device, _COLD_BATCH)

    def _refuse_in_advance(self, job: Job) -> None:
        if job.provider.graph and self.device.type != "cuda":
            raise _Refused(f"CUDA graphs need a GPU, and the device is {self.device}")
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise _Refused(f"the budget of {self._budget:g} s was spent before its turn")
        itemsize = providers.PRECISIONS[job.precision].dtype.itemsize
        rates = _FLOOR_MODEL_FLOPS if job.case.op == cases.ModelCase.op else _FLOOR_FLOPS
        launch_s = max(
            job.case.flops(job.mode) / rates[self.device.type],
            job.case.bytes(job.mode, itemsize) / _FLOOR_BYTES[self.device.type],
        )
        total_s = launch_s * (_EXTRA_LAUNCHES + timing.MIN_SAMPLES)
        if total_s > self._row_limit:
            raise _Refused(
                f"estimated at {total_s:.0f} s with a straightforward kernel, above the row limit "
                f"of {self._row_limit:g} s (--row-limit)",
            )

    def _row(self, job: Job, one: _Ready) -> dict[str, Any]:
        hot, cold = one.hot, one.cold
        assert hot is not None
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
            "launches_per_sample": one.plan.launches,
            "flops": flops,
            "bytes": moved,
            "gflop_per_s": flops / hot.p50 * 1e-9,
            "gb_per_s": moved / best.p50 * 1e-9,
            "peak_bytes": one.peak_bytes,
            "workspace_bytes": one.workspace_bytes,
            "flags": one.flags,
            "max_error": one.check.max_error,
            "torch_max_error": one.check.torch_max_error,
            "max_value": one.check.max_value,
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
        jobs = [job for job in map(_job_of, request.session.items) if job is not None]
        config.stash[_RUNNER] = Runner(config, jobs)
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
