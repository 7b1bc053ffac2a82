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

import setuptools
from setuptools import build_meta

from build_tools.toolchain import MIN_TORCH, format_version, parse_version

MIN_SETUPTOOLS = (77,)
TORCH_REQUIREMENT = f"torch>={format_version(MIN_TORCH)}"


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


def check_environment() -> None:
    """Ends the build with one sentence where it cannot work.

    That is only so with ``--no-build-isolation``: otherwise pip provides what is asked for.

    Raises:
        SystemExit: torch is missing or setuptools is too old.
    """
    if not expose_installed_torch():
        raise SystemExit(
            f"error: dilseg is compiled against torch, and {sys.executable} has none; install it "
            f'first: {sys.executable} -m pip install "{TORCH_REQUIREMENT}"'
        )
    if parse_version(setuptools.__version__) < MIN_SETUPTOOLS:
        raise SystemExit(
            f"error: building dilseg needs setuptools >= {format_version(MIN_SETUPTOOLS)}, but "
            f"{sys.executable} has {setuptools.__version__}; upgrade it, or drop "
            f"--no-build-isolation: {sys.executable} -m pip install --upgrade setuptools"
        )


def _with_torch(requirements: list[str]) -> list[str]:
    return requirements if expose_installed_torch() else [*requirements, TORCH_REQUIREMENT]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Names torch as a build requirement only where none is installed."""
    return _with_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """Names torch as a build requirement only where none is installed."""
    return _with_torch(build_meta.get_requires_for_build_editable(config_settings))


def prepare_metadata_for_build_wheel(directory: str, config_settings: Any = None) -> str:
    """As setuptools does, after a look at the environment."""
    check_environment()
    return build_meta.prepare_metadata_for_build_wheel(directory, config_settings)


def prepare_metadata_for_build_editable(directory: str, config_settings: Any = None) -> str:
    """As setuptools does, after a look at the environment."""
    check_environment()
    return build_meta.prepare_metadata_for_build_editable(directory, config_settings)


def build_wheel(directory: str, config_settings: Any = None, metadata: str | None = None) -> str:
    """As setuptools does, after a look at the environment."""
    check_environment()
    return build_meta.build_wheel(directory, config_settings, metadata)


def build_editable(directory: str, config_settings: Any = None, metadata: str | None = None) -> str:
    """As setuptools does, after a look at the environment."""
    check_environment()
    return build_meta.build_editable(directory, config_settings, metadata)


get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
build_sdist = build_meta.build_sdist
