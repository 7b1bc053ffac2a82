# SPDX-License-Identifier: Apache-2.0
"""Labels of upsampled scores, without the large map."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.cases import UpsampleArgmaxCase
from benchmarks.providers import Job

OP = UpsampleArgmaxCase.op


def test_upsample_argmax(job: Job, measure: Callable[[Job], None]) -> None:
    """Times one row after checking its result against fp64."""
    measure(job)
