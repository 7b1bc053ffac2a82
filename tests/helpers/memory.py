# SPDX-License-Identifier: Apache-2.0
"""A bound on what Python and numpy hold at once."""

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def memory_within(size: float) -> Iterator[None]:
    """Fails where the block holds more than ``size`` bytes at once, with what it imports."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size
