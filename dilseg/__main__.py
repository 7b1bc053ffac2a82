# SPDX-License-Identifier: Apache-2.0
"""``python -m dilseg``: the same as the command ``dilseg``."""

import sys

from dilseg.cli import main

if __name__ == "__main__":
    sys.exit(main())
