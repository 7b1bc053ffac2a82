# SPDX-License-Identifier: Apache-2.0
"""Whole networks: the labels of an image and one training step, against torch's operators."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.cases import ModelCase
from benchmarks.providers import Job

OP = ModelCase.op


def test_model(job: Job, measure: Callable[[Job], None]) -> None:
    """Times one row after checking its result against fp64."""
    measure(job)
