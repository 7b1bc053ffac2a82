# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the compiled extension, or says in one sentence why that is not possible.

Importing this module registers ``torch.ops.dilseg.*``. What the build recorded about torch and CUDA
is compared with the running torch *before* the binary is loaded, since a binary made for another
torch may crash instead of failing to load.
"""

from __future__ import annotations

import importlib
import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

REBUILD = "pip install --force-reinstall --no-deps ."

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(
        f"dilseg needs torch, and {sys.executable} has none; install it (pip install torch), then "
        f"rebuild dilseg in its checkout: {REBUILD}"
    ) from None

BuildRecord: TypeAlias = dict[str, str | bool | None]


def _release(version: str, parts: int) -> tuple[int, ...]:
    """Returns the leading numbers of a version: ``("2.13.0+cpu", 2)`` gives ``(2, 13)``."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:parts])


def explain_mismatch(build: BuildRecord, version: str, cuda: str | None, abi: bool) -> str | None:
    """Returns why a binary does not fit the running torch, or None when it does.

    Args:
        build: What was recorded when the binary was made.
        version: Version of the running torch.
        cuda: CUDA version that the running torch was built with; None for a CPU-only torch, which
            any build fits.
        abi: Whether the running torch uses the C++11 ABI of the standard library.
    """
    mend = f"rebuild it in the dilseg checkout: {REBUILD}"
    built_for = str(build["torch"])
    if _release(built_for, 2) != _release(version, 2):
        return f"dilseg was built for torch {built_for}, but torch {version} is running; {mend}"
    if build["cxx11_abi"] != abi:
        return (
            f"dilseg was built with the C++11 ABI {'on' if build['cxx11_abi'] else 'off'}, but "
            f"torch {version} is running with it {'on' if abi else 'off'}; {mend}"
        )
    if build["cuda"] is not None and cuda is not None:
        toolkit = str(build["cuda"])
        if _release(toolkit, 1) != _release(cuda, 1):
            return (
                f"dilseg was built with CUDA {toolkit}, but torch {version} runs with CUDA {cuda}, "
                f"another major version; point CUDA_HOME at a CUDA {_release(cuda, 1)[0]} toolkit "
                f"and {mend}"
            )
    return None


def load_record(package: str = __package__) -> BuildRecord:
    """Returns what the build recorded beside the binary.

    Raises:
        ImportError: Nothing has been built here.
    """
    try:
        record: BuildRecord = importlib.import_module(f"{package}._build_info").BUILD
    except ModuleNotFoundError as error:
        raise ImportError(
            f"dilseg has no compiled extension in {Path(__file__).parent}; build it in the dilseg "
            f"checkout: pip install . (or in place: python -m build_tools)"
        ) from error
    return record


def load(record: BuildRecord, package: str = __package__) -> ModuleType:
    """Loads the binary after comparing its record with the running torch.

    Raises:
        ImportError: The binary was made for another torch, is missing, or cannot be loaded.
    """
    problem = explain_mismatch(
        record, torch.__version__, torch.version.cuda, torch.compiled_with_cxx11_abi()
    )
    if problem is not None:
        raise ImportError(problem)
    try:
        return importlib.import_module(f"{package}._C")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"dilseg has no compiled extension for Python {platform.python_version()} in "
            f"{Path(__file__).parent} (the build was for Python {record['python']}); rebuild it in "
            f"the dilseg checkout: {REBUILD}"
        ) from error
    except ImportError as error:
        raise ImportError(
            f"dilseg's compiled extension could not be loaded ({error}); rebuild it in the dilseg "
            f"checkout: {REBUILD}"
        ) from error


_RECORD = load_record()
_C = load(_RECORD)


def build_info() -> dict[str, str | int | bool | None]:
    """Returns how this dilseg was built and what it runs with.

    Returns:
        A new dictionary with plain values. ``version`` is dilseg's; ``kind`` is ``"cuda"`` or
        ``"cpu"`` and ``reason`` why; ``python``, ``platform``, ``torch``, ``torch_cuda``,
        ``cxx11_abi``, ``cuda`` (the toolkit), ``cuda_archs``, ``compiler`` and ``debug`` were
        recorded when it was built, with None where they do not apply; ``running_python``,
        ``running_torch`` and ``running_torch_cuda`` describe this process;
        ``cpu_instruction_set`` is the one that its CPU kernels use.

    Example:
        >>> import dilseg
        >>> dilseg.build_info()["kind"] in ("cpu", "cuda")
        True
    """
    return {
        **_RECORD,
        "running_python": platform.python_version(),
        "running_torch": str(torch.__version__),
        "running_torch_cuda": torch.version.cuda,
        "cpu_instruction_set": _C.build_info()["cpu_instruction_set"],
    }
