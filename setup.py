# SPDX-License-Identifier: Apache-2.0
"""Declares the extension module; everything else is in pyproject.toml and build_tools/."""

import sys
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_tools import sources
from build_tools.command import NinjaBuildExt

EVERY_SOURCE = sources.TORCH_GLOBS + sources.CPU_GLOBS + sources.CUDA_GLOBS

setup(
    ext_modules=[Extension("dilseg._C", sources=sources.find(EVERY_SOURCE))],
    cmdclass={"build_ext": NinjaBuildExt},
)
