# SPDX-License-Identifier: Apache-2.0
"""Dilated convolution: forward, each gradient, and one training step, against cuDNN or oneDNN."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.cases import ConvCase
from benchmarks.providers import Job

OP = ConvCase.op


def test_dilated_conv2d(job: Job, measure: Callable[[Job], None]) -> None:
    """Times one row after checking its result against fp64."""
    measure(job)
