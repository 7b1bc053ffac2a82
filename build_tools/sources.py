# SPDX-License-Identifier: Apache-2.0
"""The one list of C++ and CUDA sources; CMakeLists.txt globs the same patterns."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: Sources that see torch: the operators' torch side and the Python module.
TORCH_GLOBS = ("csrc/module.cpp", "csrc/ops/**/*.cpp")
#: Torch-free host code.
CPU_GLOBS = ("csrc/cpu/**/*.cpp",)
#: Torch-free device code.
CUDA_GLOBS = ("csrc/cuda/**/*.cu",)
#: Include roots, relative to the repository.
INCLUDE_DIRS = ("csrc/include", "csrc")


def find(patterns: tuple[str, ...], root: Path = ROOT) -> list[str]:
    """Returns the files that match, relative to ``root``, sorted, with forward slashes."""
    found = {path.relative_to(root).as_posix() for p in patterns for path in root.glob(p)}
    return sorted(found)


def project_version(root: Path = ROOT) -> str:
    """Returns the version that ``dilseg/__init__.py`` states."""
    for line in (root / "dilseg" / "__init__.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__"):
            return line.split("=")[1].strip().strip("\"'")
    raise RuntimeError("dilseg/__init__.py does not state __version__")
