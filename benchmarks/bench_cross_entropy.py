# SPDX-License-Identifier: Apache-2.0
"""Per-pixel softmax cross-entropy: forward, the logits' gradient, and one training step."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.cases import CrossEntropyCase
from benchmarks.providers import Job

OP = CrossEntropyCase.op


def test_cross_entropy(job: Job, measure: Callable[[Job], None]) -> None:
    """Times one row after checking its result against fp64."""
    measure(job)
