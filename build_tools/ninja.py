# SPDX-License-Identifier: Apache-2.0
"""Writes the ninja file of a configuration and runs it.

Three kinds of object files: the operators' torch side sees torch's headers; the CPU code and the
CUDA code are compiled without them, so that a torch include there is a compile error.
"""

from __future__ import annotations

import fcntl
import os
import pprint
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from build_tools import sources
from build_tools.toolchain import BuildConfig, BuildError

ROOT = sources.ROOT


def binary_name() -> str:
    """Returns the file name of the extension module for this interpreter."""
    return f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def find_ninja(env: Mapping[str, str] = os.environ) -> str:
    """Returns the ninja to run: this environment's own, else one on PATH.

    In this order, since another version of ninja would not trust the log of the last build.

    Raises:
        BuildError: There is none.
    """
    folders = os.pathsep.join([sysconfig.get_path("scripts"), env.get("PATH", "")])
    found = shutil.which("ninja", path=folders) or shutil.which("ninja-build", path=folders)
    if found is None:
        raise BuildError(
            f"ninja, which runs the compilers, was not found; install it: "
            f"{sys.executable} -m pip install ninja"
        )
    return found


def _quote(text: str) -> str:
    """Quotes one argument for the shell that ninja starts, and `$` for ninja itself."""
    if not all(c.isalnum() or c in "-_=+/.,:@%" for c in text):
        text = "'" + text.replace("'", "'\\''") + "'"
    return text.replace("$", "$$")


def _escape(path: str | Path) -> str:
    """Escapes a path in a build line of the ninja file."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _join(arguments: Iterable[str]) -> str:
    return " ".join(_quote(a) for a in arguments)


def c_string(text: str) -> str:
    """Returns ``text`` as a C string literal."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _host_flags(config: BuildConfig) -> list[str]:
    level = ["-O0", "-g"] if config.debug else ["-O3"]
    return [*level, "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]


def _include_flags(config: BuildConfig) -> list[str]:
    flags = [f"-I{ROOT / folder}" for folder in sources.INCLUDE_DIRS]
    if config.toolkit:
        flags += ["-isystem", str(config.toolkit.include_dir)]
    return flags


def _defines(config: BuildConfig) -> list[str]:
    return ["-DDILSEG_WITH_CUDA=1"] if config.kind == "cuda" else []


def torch_flags(config: BuildConfig) -> list[str]:
    """Compiler options of the sources that see torch.

    They are compiled for OpenMP but linked without it: the runtime is then the one that torch has
    loaded already, and never a second thread pool.
    """
    system = [*config.torch.include_dirs, Path(sysconfig.get_path("include"))]
    isystem = [part for folder in system for part in ("-isystem", str(folder))]
    return [
        *_host_flags(config),
        "-fopenmp",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(config.torch.cxx11_abi)}",
        *_defines(config),
        *([] if config.toolkit else [f"-DDILSEG_CPU_REASON={c_string(config.reason)}"]),
        *_include_flags(config),
        *isystem,
    ]


def cpu_flags(config: BuildConfig) -> list[str]:
    """Compiler options of the torch-free CPU code."""
    return [*_host_flags(config), *_defines(config), *_include_flags(config)]


def _runs_wgmma(config: BuildConfig) -> bool:
    """Whether a GPU of capability 9.0 surely finds code for sm_90a, without which it has none.

    Beside code for sm_90 the driver may choose that. Unoptimised, accumulators lie in memory, which
    wgmma cannot wait for.
    """
    numbers = {arch.number for arch in config.archs}
    return "90a" in numbers and "90" not in numbers and not config.debug


def cuda_flags(config: BuildConfig, env: Mapping[str, str]) -> list[str]:
    """Compiler options of the CUDA sources."""
    level = ["-O0", "-g", "-G"] if config.debug else ["-O3", "-lineinfo"]
    host = [] if env.get("NVCC_CCBIN") else ["-ccbin", str(config.host.path)]
    return [
        *level,
        "-std=c++20",
        "--expt-relaxed-constexpr",
        "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
        "-Xptxas=--warn-on-spills",
        *host,
        *_defines(config),
        *(["-DDILSEG_WITH_SM90A=1"] if _runs_wgmma(config) else []),
        *[f"-I{ROOT / folder}" for folder in sources.INCLUDE_DIRS],
        *[flag for arch in config.archs for flag in arch.flags],
    ]


def link_flags(config: BuildConfig) -> list[str]:
    """The linker's options, after the object files."""
    flags = [f"-L{config.torch.library_dir}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    if config.toolkit:
        flags += [str(config.toolkit.cudart_static), "-ldl", "-lpthread", "-lrt"]
    return [*flags, "-Wl,--exclude-libs,ALL"]


def ninja_file(config: BuildConfig, build_dir: Path, env: Mapping[str, str] = os.environ) -> str:
    """Returns the text of the ninja file; object files and the binary land in ``build_dir``."""
    compile_rules: list[tuple[str, str, tuple[str, ...]]] = []
    host = _quote(str(config.host.path))
    depfile = "-MD -MF $out.d -c $in -o $out"
    compile_rules.append(
        ("torch", f"{host} {_join(torch_flags(config))} {depfile}", sources.TORCH_GLOBS)
    )
    compile_rules.append(("cpu", f"{host} {_join(cpu_flags(config))} {depfile}", sources.CPU_GLOBS))
    if config.toolkit:
        nvcc = _quote(str(config.toolkit.nvcc))
        command = f"{nvcc} {_join(cuda_flags(config, env))} {depfile}"
        compile_rules.append(("cuda", command, sources.CUDA_GLOBS))

    lines = ["ninja_required_version = 1.5", f"builddir = {_escape(build_dir)}", ""]
    for name, command, _ in compile_rules:
        lines += [
            f"rule {name}",
            f"  command = {command}",
            "  depfile = $out.d",
            "  deps = gcc",
            f"  description = {name} $in",
            "",
        ]
    lines += [
        "rule link",
        f"  command = {host} -shared -o $out $in {_join(link_flags(config))}",
        "  description = link $out",
        "",
    ]
    objects = []
    for name, _, patterns in compile_rules:
        for source in sources.find(patterns):
            target = build_dir / f"{source}.o"
            objects.append(_escape(target))
            lines.append(f"build {objects[-1]}: {name} {_escape(ROOT / source)}")
    binary = _escape(build_dir / binary_name())
    lines += [f"build {binary}: link {' '.join(objects)}", f"default {binary}", ""]
    return "\n".join(lines)


def record_file(config: BuildConfig) -> str:
    """Returns the text of ``dilseg/_build_info.py``."""
    record = pprint.pformat(config.record(), sort_dicts=False)
    return (
        "# SPDX-License-Identifier: Apache-2.0\n"
        '"""How the extension module beside this file was built; written by the build."""\n\n'
        f"BUILD: dict[str, str | bool | None] = {record}\n"
    )


def _update(path: Path, data: bytes) -> None:
    """Writes a file that differs, at once: running processes keep the binary they have loaded."""
    if path.exists() and path.read_bytes() == data:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def build(
    config: BuildConfig, package_dir: Path, build_root: Path, arguments: Sequence[str] = ()
) -> Path:
    """Compiles what changed, and puts the binary and its record into ``package_dir``.

    Args:
        config: What to build.
        package_dir: The ``dilseg`` folder that receives the binary and ``_build_info.py``.
        build_root: Object files go to a folder of their own per configuration below it.
        arguments: Further arguments for ninja, e.g. ``-v``.

    Returns:
        The path of the binary.

    Raises:
        BuildError: ninja is missing or a compiler failed (its messages have been printed).
    """
    ninja = find_ninja()
    tag = sysconfig.get_config_var("SOABI")
    build_dir = build_root.resolve() / f"{config.kind}{'-debug' if config.debug else ''}-{tag}"
    build_dir.mkdir(parents=True, exist_ok=True)
    print(config.table(), flush=True)
    package_dir.mkdir(parents=True, exist_ok=True)
    binary = package_dir / binary_name()
    with open(build_dir / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Two builds at once would overwrite each other's objects.
        file = build_dir / "build.ninja"
        _update(file, ninja_file(config, build_dir).encode())
        command = [ninja, "-f", str(file), "-j", str(config.jobs), *arguments]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            raise BuildError(
                f"compiling dilseg failed (the compiler's messages are above); repeat one command "
                f"at a time with: MAX_JOBS=1 {sys.executable} -m build_tools -v"
            )
        _update(binary, (build_dir / binary_name()).read_bytes())
        _update(package_dir / "_build_info.py", record_file(config).encode())
    return binary
