# SPDX-License-Identifier: Apache-2.0
"""Finds torch, the CUDA toolkit and the host compiler, and decides what to build.

Every probe is a function of its arguments (environment, search folders, a runner for commands), so
each outcome is tested without the machine that shows it. A probe that cannot go on raises
`BuildError`, whose text is one sentence with the cause and the command that mends it.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from build_tools import sources

Version = tuple[int, ...]
Run = Callable[[Sequence[str]], str]

MIN_TORCH: Version = (2, 11)
MIN_CUDA: Version = (12, 8)
#: Oldest host compilers with the C++20 that the sources use.
MIN_HOST: dict[str, Version] = {"g++": (11,), "clang++": (14,)}
#: Newest g++ that each toolkit accepts (its crt/host_config.h refuses newer ones).
MAX_GCC: tuple[tuple[Version, int], ...] = (((13, 0), 15), ((12, 8), 14))
#: Default GPU architectures by toolkit, newest toolkit first. Code for 8.0 also runs on 8.6 to 8.9,
#: 10.0 on 10.3, 12.0 on 12.1; Hopper needs its "a" variant for the warp-group instructions; the
#: PTX of the newest one serves GPUs that do not exist yet.
DEFAULT_ARCHS: tuple[tuple[Version, str], ...] = (((12, 8), "8.0;9.0a;10.0;12.0+PTX"),)
MIN_ARCH = (8, 0)
#: Memory that one compiler process may need.
BYTES_PER_JOB = 3 * 2**30


class BuildError(Exception):
    """The build cannot go on; the text says why and what to do, in one sentence."""


def run(command: Sequence[str]) -> str:
    """Runs a command and returns what it prints on both streams.

    Raises:
        OSError: The command cannot be started.
        subprocess.CalledProcessError: It fails.
    """
    done = subprocess.run(
        list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    )
    return done.stdout


def parse_version(text: str) -> Version:
    """Returns the leading release numbers: ``"2.13.0a0+git1"`` becomes ``(2, 13, 0)``.

    Raises:
        ValueError: The text does not start with a number.
    """
    match = re.match(r"\d+(?:\.\d+)*", text.strip())
    if match is None:
        raise ValueError(f"expected a version such as 2.13.0, but got {text!r}")
    return tuple(int(part) for part in match.group().split("."))


def format_version(version: Version) -> str:
    """Returns ``"2.13"`` for ``(2, 13)``."""
    return ".".join(map(str, version))


# --- torch ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Torch:
    """The torch that the extension is compiled and linked against."""

    version: str
    cuda: str | None
    cxx11_abi: bool
    root: Path

    @property
    def include_dirs(self) -> tuple[Path, ...]:
        """Folders with torch's headers."""
        include = self.root / "include"
        return (include, include / "torch" / "csrc" / "api" / "include")

    @property
    def library_dir(self) -> Path:
        """The folder with torch's shared libraries."""
        return self.root / "lib"


def probe_torch(import_module: Callable[[str], object] = importlib.import_module) -> Torch:
    """Returns the torch of this environment.

    Raises:
        BuildError: There is none, it cannot be imported, or it is too old.
    """
    try:
        torch: object = import_module("torch")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise BuildError(
                f"torch is installed but cannot be imported ({error}); reinstall it: "
                f"{sys.executable} -m pip install --force-reinstall torch"
            ) from error
        raise BuildError(
            f"dilseg is compiled against torch, and {sys.executable} has none; install it first: "
            f'{sys.executable} -m pip install "torch>={format_version(MIN_TORCH)}"'
        ) from error
    except (ImportError, OSError) as error:
        raise BuildError(
            f"torch is installed but cannot be imported ({error}); reinstall it: "
            f"{sys.executable} -m pip install --force-reinstall torch"
        ) from error
    version = str(torch.__version__)  # type: ignore[attr-defined]
    if parse_version(version) < MIN_TORCH:
        raise BuildError(
            f"dilseg needs torch >= {format_version(MIN_TORCH)}, but this environment has torch "
            f"{version}; upgrade it: {sys.executable} -m pip install --upgrade "
            f'"torch>={format_version(MIN_TORCH)}"'
        )
    return Torch(
        version=version,
        cuda=torch.version.cuda,  # type: ignore[attr-defined]
        cxx11_abi=bool(torch.compiled_with_cxx11_abi()),  # type: ignore[attr-defined]
        root=Path(torch.__file__).resolve().parent,  # type: ignore[attr-defined]
    )


# --- CUDA toolkit --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit, described by its own nvcc."""

    nvcc: Path
    version: str
    home: Path
    include_dir: Path
    cudart_static: Path


def nvcc_candidates(env: Mapping[str, str], site_dirs: Sequence[Path]) -> list[tuple[str, Path]]:
    """Returns where nvcc is looked for, in order, as (description, path of nvcc)."""
    candidates = []
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if env.get(name):
            candidates.append((name, Path(env[name]) / "bin" / "nvcc"))
    on_path = shutil.which("nvcc", path=env.get("PATH", ""))
    candidates.append(("PATH", Path(on_path) if on_path else Path("nvcc")))
    candidates.append(("/usr/local/cuda", Path("/usr/local/cuda/bin/nvcc")))
    for site in site_dirs:
        for major in (13, 12):
            candidates.append(
                (f"pip package nvidia/cu{major}", site / "nvidia" / f"cu{major}" / "bin" / "nvcc")
            )
    return candidates


def site_dirs() -> list[Path]:
    """Returns the folders of installed packages that this interpreter sees."""
    own = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    seen = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    return [Path(p) for p in dict.fromkeys([*own, *seen])]


def find_nvcc(candidates: Sequence[tuple[str, Path]]) -> Path | None:
    """Returns the first nvcc that exists and may be run."""
    for _, path in candidates:
        if path.is_absolute() and os.access(path, os.X_OK):
            return path
    return None


def describe_search(candidates: Sequence[tuple[str, Path]]) -> str:
    """Returns the places of `nvcc_candidates` in words."""
    return ", ".join(dict.fromkeys(description for description, _ in candidates))


def probe_toolkit(nvcc: Path, run: Run = run) -> Toolkit:
    """Asks ``nvcc`` for its version and its folders.

    The folder is taken from nvcc's own answer, never from its path: on many machines the nvcc on
    PATH is a wrapper script or a compiler cache.

    Raises:
        BuildError: nvcc does not work, is too old, or its toolkit has no static runtime.
    """
    try:
        release = run([str(nvcc), "--version"])
        plan = run([str(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull])
    except (OSError, subprocess.CalledProcessError) as error:
        detail = (getattr(error, "output", None) or str(error)).strip()
        raise BuildError(
            f"{nvcc} does not work ({detail}); point CUDA_HOME at a working toolkit, or build for "
            f"the CPU: DILSEG_BUILD=cpu pip install ."
        ) from error
    number = re.search(r"\bV(\d+\.\d+(?:\.\d+)?)", release)
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    if number is None or top is None:
        raise BuildError(
            f"{nvcc} does not say its version and folder as nvcc does; point CUDA_HOME at a CUDA "
            f"toolkit, or build for the CPU: DILSEG_BUILD=cpu pip install ."
        )
    version = number.group(1)
    if parse_version(version) < MIN_CUDA:
        raise BuildError(
            f"dilseg needs a CUDA toolkit >= {format_version(MIN_CUDA)}, but {nvcc} is {version}; "
            f"point CUDA_HOME at a newer one, or build for the CPU: DILSEG_BUILD=cpu pip install ."
        )
    home = Path(top.group(1).strip()).resolve()
    target = f"targets/{platform.machine()}-linux"
    include = _first(home, (f"{target}/include", "include"), "cuda_runtime_api.h")
    library = _first(
        home, ("lib64", "lib", f"{target}/lib", "targets/sbsa-linux/lib"), "libcudart_static.a"
    )
    if include is None or library is None:
        missing = "cuda_runtime_api.h" if include is None else "libcudart_static.a"
        raise BuildError(
            f"the CUDA toolkit in {home} has no {missing}; install its development package "
            f"(cuda-cudart-dev), or build for the CPU: DILSEG_BUILD=cpu pip install ."
        )
    return Toolkit(nvcc, version, home, include, library / "libcudart_static.a")


def _first(home: Path, folders: Sequence[str], file: str) -> Path | None:
    return next((home / f for f in folders if (home / f / file).is_file()), None)


# --- GPU architectures ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Arch:
    """One GPU architecture, e.g. 9.0a, and whether its PTX is kept."""

    major: int
    minor: int
    suffix: str = ""
    ptx: bool = False

    def __str__(self) -> str:
        """Returns the name as users write it, e.g. ``9.0a+PTX``."""
        return f"{self.major}.{self.minor}{self.suffix}{'+PTX' if self.ptx else ''}"

    @property
    def number(self) -> str:
        """The name in nvcc's options, e.g. ``90a``."""
        return f"{self.major}{self.minor}{self.suffix}"

    @property
    def flags(self) -> list[str]:
        """Options for nvcc."""
        codes = [f"sm_{self.number}"] + ([f"compute_{self.number}"] if self.ptx else [])
        return [f"-gencode=arch=compute_{self.number},code={code}" for code in codes]


def parse_archs(text: str, variable: str) -> list[Arch]:
    """Parses ``"8.0;9.0a+PTX"`` (separated by ``;``, ``,`` or blanks).

    Raises:
        BuildError: An item is no architecture, or one that the kernels do not support.
    """
    archs = []
    for item in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if match is None:
            raise BuildError(
                f'{variable}="{text}": expected GPU architectures such as "8.0;9.0a+PTX", but got '
                f'"{item}"; set DILSEG_CUDA_ARCH_LIST'
            )
        arch = Arch(int(match[1]), int(match[2]), match[3], match[4] is not None)
        if (arch.major, arch.minor) < MIN_ARCH:
            raise BuildError(
                f'{variable}="{text}": the kernels need compute capability >= 8.0, but got {arch}; '
                f"leave it out of DILSEG_CUDA_ARCH_LIST"
            )
        if arch not in archs:
            archs.append(arch)
    return archs


def select_archs(
    env: Mapping[str, str],
    cuda_version: str,
    native: Callable[[], tuple[int, int] | None],
) -> tuple[list[Arch], str]:
    """Returns the architectures to compile for and where the choice comes from.

    `DILSEG_CUDA_ARCH_LIST` is taken as written (``native``: the GPU in this machine). The list in
    `TORCH_CUDA_ARCH_LIST` is meant for many packages, so what dilseg does not support is left out
    of it and Hopper gets its "a" variant. Otherwise a table by toolkit version decides, never the
    GPUs that happen to be present.

    Raises:
        BuildError: A list is malformed or nothing is left of it.
    """
    own = env.get("DILSEG_CUDA_ARCH_LIST", "").strip()
    if own == "native":
        capability = native()
        if capability is None:
            raise BuildError(
                "DILSEG_CUDA_ARCH_LIST=native needs a torch that sees a CUDA GPU; name the "
                'architectures instead, e.g. DILSEG_CUDA_ARCH_LIST="8.0;9.0a"'
            )
        major, minor = capability
        suffix = "a" if major >= 9 else ""
        return parse_archs(f"{major}.{minor}{suffix}", "the GPU"), "the GPU in this machine"
    if own:
        return parse_archs(own, "DILSEG_CUDA_ARCH_LIST"), "DILSEG_CUDA_ARCH_LIST"
    shared = env.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if shared:
        kept = []
        for item in re.split(r"[;,\s]+", shared):
            match = re.match(r"(\d+)\.(\d)", item)
            if match is None or (int(match[1]), int(match[2])) >= MIN_ARCH:
                kept.append("9.0a" if item == "9.0" else item)
        if not kept:
            raise BuildError(
                f'TORCH_CUDA_ARCH_LIST="{shared}" names no architecture >= 8.0, which the kernels '
                f'need; set DILSEG_CUDA_ARCH_LIST, e.g. "8.0;9.0a"'
            )
        return parse_archs(";".join(kept), "TORCH_CUDA_ARCH_LIST"), "TORCH_CUDA_ARCH_LIST"
    version = parse_version(cuda_version)
    table = next(archs for minimum, archs in DEFAULT_ARCHS if version >= minimum)
    return parse_archs(table, "default"), f"default for CUDA {cuda_version}"


# --- host compiler -------------------------------------------------------------------------------


@dataclass(frozen=True)
class HostCompiler:
    """The C++ compiler."""

    path: Path
    family: str
    version: str


def probe_host_compiler(
    env: Mapping[str, str],
    run: Run = run,
    which: Callable[[str], str | None] = shutil.which,
) -> HostCompiler:
    """Returns the compiler that ``CXX`` names, else g++, else clang++.

    Raises:
        BuildError: There is none, it does not work, or it is too old.
    """
    wanted = [env["CXX"].split()[0]] if env.get("CXX", "").strip() else ["g++", "clang++"]
    path = next((found for name in wanted if (found := which(name))), None)
    if path is None:
        raise BuildError(
            f"no C++ compiler was found (looked for {' and '.join(wanted)} on PATH); install one, "
            f"e.g. apt-get install g++, or name it: CXX=/path/to/g++ pip install ."
        )
    try:
        macros = run([path, "-dM", "-E", "-x", "c++", os.devnull])
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(
            f"the C++ compiler {path} does not work ({error}); name another one: "
            f"CXX=/path/to/g++ pip install ."
        ) from error
    defined = dict(re.findall(r"^#define (__\w+__) (\d+)$", macros, re.MULTILINE))
    family, prefix = ("clang++", "clang") if "__clang__" in defined else ("g++", "GNUC")
    names = (
        ("__clang_major__", "__clang_minor__", "__clang_patchlevel__")
        if prefix == "clang"
        else ("__GNUC__", "__GNUC_MINOR__", "__GNUC_PATCHLEVEL__")
    )
    if names[0] not in defined:
        raise BuildError(
            f"the C++ compiler {path} is neither g++ nor clang++; name one of them: "
            f"CXX=/path/to/g++ pip install ."
        )
    version = ".".join(defined.get(name, "0") for name in names)
    if parse_version(version) < MIN_HOST[family]:
        raise BuildError(
            f"dilseg is C++20 and needs {family} >= {format_version(MIN_HOST[family])}, but {path} "
            f"is {version}; name a newer one: CXX=/path/to/{family} pip install ."
        )
    return HostCompiler(Path(path), family, version)


def check_cuda_host(host: HostCompiler, toolkit: Toolkit, env: Mapping[str, str]) -> None:
    """Refuses a g++ that is newer than the toolkit accepts, before nvcc does with 200 lines.

    Raises:
        BuildError: The compiler is too new, and ``NVCC_CCBIN`` does not name another one.
    """
    if host.family != "g++" or env.get("NVCC_CCBIN"):
        return
    version = parse_version(toolkit.version)
    newest = next(gcc for minimum, gcc in MAX_GCC if version >= minimum)
    if version[0] <= MAX_GCC[0][0][0] and parse_version(host.version)[0] > newest:
        raise BuildError(
            f"CUDA {toolkit.version} accepts g++ up to {newest}, but {host.path} is "
            f"{host.version}; name an older one: CXX=g++-{newest} pip install . (or NVCC_CCBIN for "
            f"nvcc alone)"
        )


# --- jobs ----------------------------------------------------------------------------------------


def available_memory() -> int:
    """Returns the bytes of memory that may still be used, 0 when that is not known."""
    free = 0
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
        match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
        free = int(match[1]) * 1024 if match else 0
    except OSError:
        pass
    try:  # A container may be allowed less than the machine has.
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii").strip()
        if limit != "max":
            free = min(free, max(int(limit) - int(used), 1)) if free else int(limit)
    except (OSError, ValueError):
        pass
    return free


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def select_jobs(env: Mapping[str, str], cores: int, memory: int) -> tuple[int, str]:
    """Returns the number of parallel compilers and the reason.

    Raises:
        BuildError: ``MAX_JOBS`` is not a positive number.
    """
    wanted = env.get("MAX_JOBS", "").strip()
    if wanted:
        if not wanted.isdigit() or int(wanted) < 1:
            raise BuildError(f'MAX_JOBS="{wanted}": expected a positive number; try MAX_JOBS=1')
        return int(wanted), "MAX_JOBS"
    gib = f"{memory / 2**30:.1f} GiB free" if memory else "free memory unknown"
    by_memory = max(1, memory // BYTES_PER_JOB) if memory else cores
    return max(1, min(cores, by_memory)), f"{cores} cores, {gib}"


# --- the decision --------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuildConfig:
    """Everything that decides what is compiled and how."""

    kind: str
    reason: str
    debug: bool
    torch: Torch
    host: HostCompiler
    toolkit: Toolkit | None
    archs: tuple[Arch, ...]
    archs_from: str
    jobs: int
    jobs_from: str

    def record(self) -> dict[str, str | bool | None]:
        """Returns the facts that are kept beside the binary, for `dilseg.build_info`."""
        return {
            "version": sources.project_version(),
            "kind": self.kind,
            "reason": self.reason,
            "python": platform.python_version(),
            "platform": sysconfig.get_platform(),
            "torch": self.torch.version,
            "torch_cuda": self.torch.cuda,
            "cxx11_abi": self.torch.cxx11_abi,
            "cuda": self.toolkit.version if self.toolkit else None,
            "cuda_archs": ";".join(map(str, self.archs)) if self.archs else None,
            "compiler": f"{self.host.family} {self.host.version}",
            "debug": self.debug,
        }

    def table(self) -> str:
        """Returns the configuration in a dozen lines."""
        cuda, archs = "not used", "none"
        if self.toolkit:
            cuda = f"{self.toolkit.version}, {self.toolkit.home}"
            archs = f"{';'.join(map(str, self.archs))} ({self.archs_from})"
        counts = [len(sources.find(g)) for g in (sources.TORCH_GLOBS, sources.CPU_GLOBS)]
        cu = len(sources.find(sources.CUDA_GLOBS)) if self.toolkit else 0
        rows = (
            ("version", sources.project_version()),
            ("kind", f"{self.kind} ({self.reason})"),
            ("python", f"{platform.python_version()}, {sysconfig.get_platform()}"),
            ("torch", f"{self.torch.version}, CUDA {self.torch.cuda or 'none'}"),
            ("torch folder", str(self.torch.root)),
            ("C++ ABI", f"cxx11 {'on' if self.torch.cxx11_abi else 'off'}"),
            ("compiler", f"{self.host.family} {self.host.version}, {self.host.path}"),
            ("CUDA toolkit", cuda),
            ("GPU targets", archs),
            ("optimisation", "none, debug symbols (DILSEG_DEBUG)" if self.debug else "-O3"),
            ("sources", f"{counts[0]} torch, {counts[1]} CPU, {cu} CUDA"),
            ("jobs", f"{self.jobs} ({self.jobs_from})"),
        )
        lines = [f"  {name:<13} {value}" for name, value in rows]
        return "\n".join(["dilseg build configuration", *lines])


def select_toolkit(
    env: Mapping[str, str],
    torch: Torch,
    candidates: Sequence[tuple[str, Path]],
    run: Run = run,
) -> tuple[Toolkit | None, str]:
    """Decides between a CUDA and a CPU build; returns the toolkit (or None) and the reason.

    Raises:
        BuildError: ``DILSEG_BUILD`` is unknown, or a CUDA build is not possible here.
    """
    mode = env.get("DILSEG_BUILD", "").strip().lower() or "auto"
    if mode not in ("auto", "cuda", "cpu"):
        raise BuildError(
            f'DILSEG_BUILD="{env["DILSEG_BUILD"]}": expected auto, cuda or cpu; '
            f"try DILSEG_BUILD=auto pip install ."
        )
    if mode == "cpu":
        return None, "DILSEG_BUILD=cpu"
    if mode == "auto" and torch.cuda is None:
        return None, f"DILSEG_BUILD=auto and torch {torch.version} is a CPU-only build"
    nvcc = find_nvcc(candidates)
    if nvcc is None:
        searched = describe_search(candidates)
        if mode == "auto":
            return None, f"DILSEG_BUILD=auto and nvcc was not found (searched {searched})"
        raise BuildError(
            f"DILSEG_BUILD=cuda, but nvcc was not found (searched {searched}); install a CUDA "
            f"toolkit >= {format_version(MIN_CUDA)} or point CUDA_HOME at one, or build for the "
            f"CPU: DILSEG_BUILD=cpu pip install ."
        )
    toolkit = probe_toolkit(nvcc, run)
    if torch.cuda is not None:
        major = parse_version(torch.cuda)[0]
        if major != parse_version(toolkit.version)[0]:
            raise BuildError(
                f"torch {torch.version} was built with CUDA {torch.cuda}, but {nvcc} is CUDA "
                f"{toolkit.version}, another major version; point CUDA_HOME at a CUDA {major} "
                f"toolkit, or build for the CPU: DILSEG_BUILD=cpu pip install ."
            )
    return toolkit, f"DILSEG_BUILD={mode} and nvcc {toolkit.version} was found"


def native_capability() -> tuple[int, int] | None:
    """Returns the compute capability of the GPU in this machine, None when there is none."""
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return int(major), int(minor)


def configure(env: Mapping[str, str] = os.environ) -> BuildConfig:
    """Probes this environment and returns what to build.

    Raises:
        BuildError: The build cannot go on.
    """
    torch = probe_torch()
    host = probe_host_compiler(env)
    toolkit, reason = select_toolkit(env, torch, nvcc_candidates(env, site_dirs()))
    archs: list[Arch] = []
    archs_from = ""
    if toolkit is not None:
        check_cuda_host(host, toolkit, env)
        archs, archs_from = select_archs(env, toolkit.version, native_capability)
    jobs, jobs_from = select_jobs(env, available_cores(), available_memory())
    return BuildConfig(
        kind="cpu" if toolkit is None else "cuda",
        reason=reason,
        debug=env.get("DILSEG_DEBUG", "0").strip() not in ("", "0"),
        torch=torch,
        host=host,
        toolkit=toolkit,
        archs=tuple(archs),
        archs_from=archs_from,
        jobs=jobs,
        jobs_from=jobs_from,
    )
