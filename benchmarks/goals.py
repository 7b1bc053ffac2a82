# SPDX-License-Identifier: Apache-2.0
"""The speed and memory that the fused CPU kernels are held to, as data, beside where it is said.

`python -m benchmarks.report FILE --goals` reads a results file against them; the case set "fused"
measures exactly the rows that they name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

SOURCE = (
    "CPU, 2 threads, fp32, ratios in one run (benchmarks, median): cross_entropy fwd+bwd "
    "21x512x512 batch 2 at least 5x torch eager and 2x torch.compile; upsample_cross_entropy x8 "
    "to 21x512x512 batch 2 at least 8x eager and 3x compile, and at most 1/20 of eager's peak "
    "extra memory; upsample_add forward x8 to 512x512 at least 5x eager, x2 to 128x128 at least "
    "3x, backward at least 3x; upsample + argmax at least 5x. 19x1024x2048 (Cityscapes) keeps "
    "those ratios. Each also reported against the machine's measured copy bandwidth."
)

# The conditions of that sentence; a row under any other does not count.
DEVICE = "cpu"
THREADS = 2
PRECISION = "float32"
LAYOUT = "nchw"

EAGER, COMPILE = "torch", "torch_compile"
# Measured for every row, so that a rival which no goal names still shows where it is faster.
PROVIDERS = ("dilseg", EAGER, COMPILE)


@dataclass(frozen=True)
class Goal:
    """Of `rival`'s median time, or its peak memory, ours is to be at most 1/`ratio`."""

    op: str
    case: str
    mode: str
    rival: str
    ratio: float
    kind: Literal["time", "memory"] = "time"


def _goals() -> Iterator[Goal]:
    for case in ("voc_512_b2", "cityscapes_b1"):
        yield Goal("cross_entropy", case, "step", EAGER, 5.0)
        yield Goal("cross_entropy", case, "step", COMPILE, 2.0)
    for case in ("voc_8x_b2", "cityscapes_8x"):
        yield Goal("upsample_cross_entropy", case, "step", EAGER, 8.0)
        yield Goal("upsample_cross_entropy", case, "step", COMPILE, 3.0)
        yield Goal("upsample_cross_entropy", case, "step", EAGER, 20.0, kind="memory")
    for case, forward in (("voc_8x_b2", 5.0), ("fcn_skip3_2x_b2", 3.0), ("cityscapes_8x", 5.0)):
        yield Goal("upsample_add", case, "forward", EAGER, forward)
        yield Goal("upsample_add", case, "grad_input", EAGER, 3.0)
    for case in ("voc_8x_b2", "cityscapes_8x"):
        yield Goal("upsample_argmax", case, "forward", EAGER, 5.0)


GOALS: tuple[Goal, ...] = tuple(_goals())


def is_named(op: str, case: str, mode: str) -> bool:
    """Whether a goal speaks of this row."""
    return any((goal.op, goal.case, goal.mode) == (op, case, mode) for goal in GOALS)
