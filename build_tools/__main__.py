# SPDX-License-Identifier: Apache-2.0
"""Builds the extension module in place: ``python -m build_tools [--table] [-v]``.

Needs torch, ninja and a compiler, but no pip and no network; repeating it recompiles what changed.
"""

from __future__ import annotations

import argparse
import sys

from build_tools import ninja, toolchain
from build_tools.sources import ROOT


def main() -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m build_tools", description=__doc__)
    parser.add_argument("--table", action="store_true", help="print the configuration and stop")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every command")
    options = parser.parse_args()
    try:
        config = toolchain.configure()
        if options.table:
            print(config.table())
            return 0
        ninja.build(config, ROOT / "dilseg", ROOT / "build", ["-v"] if options.verbose else [])
    except toolchain.BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
