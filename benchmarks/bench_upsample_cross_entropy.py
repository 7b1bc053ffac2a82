# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of upsampled scores: forward, and one training step, without the large map."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.cases import UpsampleCrossEntropyCase
from benchmarks.providers import Job

OP = UpsampleCrossEntropyCase.op


def test_upsample_cross_entropy(job: Job, measure: Callable[[Job], None]) -> None:
    """Times one row after checking its result against fp64."""
    measure(job)
