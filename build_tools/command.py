# SPDX-License-Identifier: Apache-2.0
"""setuptools' ``build_ext`` on top of the ninja build."""

from __future__ import annotations

from pathlib import Path

from setuptools.command.build_ext import build_ext

from build_tools import ninja, toolchain
from build_tools.sources import ROOT


class NinjaBuildExt(build_ext):
    """Builds ``dilseg._C`` with ninja, into the build tree or (``--inplace``) into the package."""

    def run(self) -> None:
        """Configures, compiles, and ends with one sentence where that is not possible."""
        in_place = self.inplace or self.editable_mode
        package_dir = ROOT / "dilseg" if in_place else Path(self.build_lib).resolve() / "dilseg"
        try:
            ninja.build(toolchain.configure(), package_dir, ROOT / "build")
        except toolchain.BuildError as error:
            raise SystemExit(f"error: {error}") from None
