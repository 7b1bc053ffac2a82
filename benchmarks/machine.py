# SPDX-License-Identifier: Apache-2.0
"""Where it was measured: hardware, driver, clocks, versions, commit, as far as known."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the machine can be described before there is a torch
    import torch

    from benchmarks import timing

ROOT = Path(__file__).resolve().parents[1]

_PACKAGES = ("torch", "triton", "numpy", "pytest", "pytest-benchmark", "ninja")
_SMI_FIELDS = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
    "ecc.mode.current",
)

_COPY_BYTES = 256 * 2**20
_RATE_SAMPLES = 9
_MATMUL_ROWS = {"cpu": 1024, "cuda": 8192}
# What decides how torch's threads wait for each other and where they run.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY",
                     "KMP_AFFINITY", "KMP_BLOCKTIME")  # fmt: skip


def _output(*command: str) -> str | None:
    """Standard output of a short command, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> dict[str, Any]:
    """The checkout's commit and whether tracked files differ from it; None without git."""
    head = _output("git", "rev-parse", "HEAD")
    if head is None:
        return {"commit": None, "modified": None}
    status = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {"commit": head, "modified": bool(status) if status is not None else None}


def gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs that the driver lists; empty without a driver."""
    listing = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return [line.strip() for line in (listing or "").splitlines() if line.strip()]


def gpu_state() -> dict[str, str]:
    """Driver, clocks, power limit and temperature of the first GPU, as nvidia-smi words them."""
    listing = _output("nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader")
    if not listing:
        return {}
    values = [value.strip() for value in listing.splitlines()[0].split(",")]
    return dict(zip(_SMI_FIELDS, values, strict=False))


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _last_level_cache_bytes() -> int:
    """Size of the largest cache that the kernel lists for the first core; 0 where it lists none."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = path.read_text(encoding="ascii").strip()
            sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[text[-1]])
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return max(sizes)


def _rate(launch: timing.Launch, place: torch.device) -> timing.Summary:
    """Seconds of a launch that was launched before, within half a second unless it is slow."""
    from benchmarks import timing

    (plan,) = timing.make_plans([timing.time_once(launch, place)], limit_s=0.5)
    samples = max(plan.samples, _RATE_SAMPLES)
    return timing.summarise(
        [timing.measure_hot(launch, place, plan.launches) for _ in range(samples)]
    )


def measure_matmul(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """How fast torch multiplies square matrices of `n` rows, under the switches that are set."""
    import torch

    place = torch.device(device)
    n = _MATMUL_ROWS[place.type]
    left, right, product = (torch.randn(n, n, device=place).to(dtype) for _ in range(3))

    def multiply() -> tuple[torch.Tensor, ...]:
        return (torch.mm(left, right, out=product),)

    multiply()
    summary = _rate(multiply, place)
    return {
        "tflop_per_s": 2 * n**3 / summary.p50 * 1e-12,
        "n": n,
        "seconds": summary.as_dict(),
    }


def measure_copy(device: str) -> dict[str, Any]:
    """How fast this machine copies memory, with the threads that torch is set to.

    One buffer to another that exists already, each well above the last-level cache. `gb_per_s`
    counts what is read and what is written, by the median copy; `bytes` is one buffer's size.
    """
    import torch

    from benchmarks import timing

    place = torch.device(device)
    if place.type == "cuda":
        cache = torch.cuda.get_device_properties(place).L2_cache_size
        free, _ = torch.cuda.mem_get_info(place)
    else:
        cache = _last_level_cache_bytes()
        free = timing.proc_bytes(Path("/proc/meminfo"), "MemAvailable")
    size = min(max(4 * cache, _COPY_BYTES), free // 4)
    source = torch.ones(size // 4, device=place)
    target = torch.zeros(size // 4, device=place)

    def copy() -> tuple[torch.Tensor, ...]:
        return (target.copy_(source),)

    copy()
    summary = _rate(copy, place)
    moved = 2 * source.numel() * source.element_size()
    return {
        "gb_per_s": moved / summary.p50 * 1e-9,
        "bytes": moved // 2,
        "threads": torch.get_num_threads(),
        "seconds": summary.as_dict(),
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    nvcc = _output("nvcc", "--version")
    if nvcc:
        versions["nvcc"] = nvcc.splitlines()[-1].strip()
    return versions


def describe(device: str, *, package: bool = True) -> dict[str, Any]:
    """Everything that the caption of a table needs, for `device` "cpu" or "cuda".

    `package=False` leaves dilseg's own version and build out, for a caller yet to build it.
    """
    import torch

    versions = _versions()
    described: dict[str, Any] = {
        "device": device,
        "name": _cpu_name(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "thread_settings": {
            name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ
        },
        "load_average": list(os.getloadavg()),
        "platform": platform.platform(),
        "versions": versions,
        **commit(),
    }
    if package:
        import dilseg

        versions["dilseg"] = dilseg.__version__
        described["build_info"] = {key: str(value) for key, value in dilseg.build_info().items()}
    if device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        cudnn: Any = torch.backends.cudnn
        versions["cuda"] = str(torch.version.cuda)
        versions["cudnn"] = str(cudnn.version())
        described |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "state": gpu_state(),
        }
    return described
