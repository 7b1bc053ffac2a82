# SPDX-License-Identifier: Apache-2.0
"""Builds CUDA sources with the host compiler into a library that runs them on the emulator.

``python tests/emulator/build.py [variant ...]`` builds dilseg's kernels and their torch side; a
test calls `build_library`. Compiling goes through ninja, so that a second call costs nothing.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Variant:
    """How the kernels are compiled, and so what a run can see."""

    name: str
    compile: tuple[str, ...]  # every file
    kernels: tuple[str, ...]  # kernels only
    link: tuple[str, ...] = ()


_HOOKS = (
    "-fsanitize=thread",  # the hooks are the emulator's own, libtsan is not linked
    "--param=tsan-instrument-func-entry-exit=0",
    "--param=tsan-distinguish-volatile=1",
    "-Wno-tsan",
)
VARIANTS = {
    v.name: v
    for v in (
        # Every access of a kernel is observed: races, bounds, alignment, proxies.
        Variant("checked", ("-O2",), _HOOKS),
        # Nothing but the semantics, at full speed.
        Variant("fast", ("-O3",), ()),
        # AddressSanitizer and UndefinedBehaviorSanitizer; loaded with libasan preloaded.
        Variant(
            "sanitized",
            ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
            (),
            ("-fsanitize=address,undefined",),
        ),
    )
}


def _host_features() -> list[str]:
    """Vector instructions that this CPU has; part of the build folder's name."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return []
    return [f"-m{name}" for name in ("avx2", "fma", "f16c") if name in flags]


def compiler() -> str | None:
    """The host compiler, or None; g++ alone has the options of the checked variant."""
    return shutil.which("g++")


def build_library(
    name: str,
    variant: str,
    kernels: Sequence[str],
    *,
    include_dirs: Sequence[Path] = (),
    others: Sequence[tuple[str, Sequence[str]]] = (),
    libraries: Sequence[str] = (),
    jobs: int = 2,
) -> Path:
    """Builds a shared library of kernels, the emulator, and whatever else it needs.

    Args:
        name: Of the library; it and its objects go to ``build/emulator``.
        variant: One of VARIANTS.
        kernels: CUDA sources, relative to the repository.
        include_dirs: Further include folders, searched after the emulator's.
        others: Pairs of a host source, relative to the repository, and its own options.
        libraries: Options for the linker.
        jobs: Compilers at a time.

    Returns:
        The path of the library.

    Raises:
        RuntimeError: A compiler failed; what it printed is in the text.
    """
    from build_tools import ninja

    how = VARIANTS[variant]
    features = _host_features()
    # Libraries of one variant share a folder, and so the emulator's own objects.
    tag = "-".join([variant, platform.machine(), *(f[2:] for f in features)])
    folder = ROOT / "build" / "emulator" / tag
    folder.mkdir(parents=True, exist_ok=True)
    common = [
        *how.compile,
        *features,
        "-g1",
        *(["-mtls-dialect=gnu2"] if platform.machine() == "x86_64" else []),
        "-std=c++20",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        f"-ffile-prefix-map={ROOT}/=",
        f"-fdebug-prefix-map={ROOT}=.",
        *(f"-I{path}" for path in (HERE / "dilseg", HERE, HERE / "include", *include_dirs)),
    ]
    jobs_of: list[tuple[str, list[str]]] = [
        *((path, ["-x", "c++", *how.kernels]) for path in kernels),
        *((path.relative_to(ROOT).as_posix(), []) for path in sorted((HERE / "emu").glob("*.cpp"))),
        *((path, list(options)) for path, options in others),
    ]
    library = folder / f"lib{name}.so"
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {folder}",
        "rule cxx",
        f"  command = {compiler()} {ninja._join(common)} $options -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = emulator $in",
        "rule link",
        f"  command = {compiler()} -shared -o $out $in {ninja._join(how.link)} "
        f"{ninja._join(libraries)} -pthread -ldl",
        "  description = link $out",
    ]
    objects = []
    for source, options in jobs_of:
        target = folder / f"{source}.o"
        objects.append(str(target))
        lines += [f"build {target}: cxx {ROOT / source}", f"  options = {ninja._join(options)}"]
    lines += [f"build {library}: link {' '.join(objects)}", ""]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # xdist's workers all come here
        file = folder / f"{name}.ninja"
        text = "\n".join(lines)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        done = subprocess.run(
            [ninja.find_ninja(), "-f", str(file), "-j", str(jobs), str(library)],
            cwd=ROOT,
            # A sanitizer that is preloaded into the tests has no business in the compiler.
            env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
            capture_output=True,
            text=True,
        )
    if done.returncode != 0:
        raise RuntimeError(f"the emulated kernels do not compile:\n{done.stdout}{done.stderr}")
    return library


def build_operators(variant: str) -> Path:
    """Builds dilseg's kernels with their torch side, torch.ops.dilseg_emulated.*."""
    from build_tools import sources, toolchain

    torch = toolchain.probe_torch()
    system = [*torch.include_dirs]
    prelude = HERE / "dilseg" / "ops_prelude.h"
    glue = [
        "-DDILSEG_WITH_CUDA=1",
        "-fopenmp",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.cxx11_abi)}",
        *(part for folder in system for part in ("-isystem", str(folder))),
    ]
    # Gradients and autocast stay with torch.ops.dilseg, whose CPU kernels these take the place of.
    above = ("_autograd.cpp", "/autocast.cpp")
    operators = [
        s
        for s in sources.find(sources.TORCH_GLOBS)
        if s.startswith("csrc/ops/") and not s.endswith(above)
    ]
    return build_library(
        "dilseg_emulated",
        variant,
        sources.find(sources.CUDA_GLOBS),
        include_dirs=[ROOT / folder for folder in sources.INCLUDE_DIRS],
        others=[
            *((s, [*glue, "-include", str(prelude)]) for s in operators),
            *((s, []) for s in sources.find(sources.CPU_GLOBS)),
            *((f"tests/emulator/dilseg/{s}.cpp", glue) for s in ("torch_side", "gemm")),
        ],
        libraries=[f"-L{torch.library_dir}", "-lc10", "-ltorch_cpu", "-ltorch"],
    )


def main() -> int:
    sys.path.insert(0, str(ROOT))
    for variant in sys.argv[1:] or ["checked"]:
        print(build_operators(variant))
    return 0


if __name__ == "__main__":
    sys.exit(main())
