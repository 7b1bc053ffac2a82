# SPDX-License-Identifier: Apache-2.0
"""Bilinear upsampling plus skip: forward, the input's gradient, and one training step."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.cases import UpsampleAddCase
from benchmarks.providers import Job

OP = UpsampleAddCase.op


def test_upsample_add(job: Job, measure: Callable[[Job], None]) -> None:
    """Times one row after checking its result against fp64."""
    measure(job)
