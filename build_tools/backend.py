# SPDX-License-Identifier: Apache-2.0
"""The PEP 517 backend: setuptools', building against the torch that is installed already.

pip builds in an isolated environment, where torch is absent; naming torch as a build requirement
would fetch another torch than the one that will load the binary. So the folders of the environment
that pip runs in are appended to the search path when they hold torch, and torch is a requirement
only where there is none.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from typing import Any

from setuptools import build_meta

from build_tools.toolchain import MIN_TORCH, format_version


def expose_installed_torch() -> bool:
    """Makes the environment's own torch importable; returns whether torch can be found at all."""
    if importlib.util.find_spec("torch") is not None:
        return True
    for name in ("purelib", "platlib"):
        folder = sysconfig.get_path(name)
        if folder not in sys.path:
            sys.path.append(folder)
    importlib.invalidate_caches()
    return importlib.util.find_spec("torch") is not None


HAS_TORCH = expose_installed_torch()


def _requirements(found: list[str]) -> list[str]:
    return found if HAS_TORCH else [*found, f"torch>={format_version(MIN_TORCH)}"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Names torch as a build requirement only where none is installed."""
    return _requirements(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """Names torch as a build requirement only where none is installed."""
    return _requirements(build_meta.get_requires_for_build_editable(config_settings))


get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
build_sdist = build_meta.build_sdist
build_wheel = build_meta.build_wheel
build_editable = build_meta.build_editable
