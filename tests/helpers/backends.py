# SPDX-License-Identifier: Apache-2.0
"""The implementations of the operators that tests run on.

A test takes the ``backend`` fixture and puts its tensors on ``backend.device``. A further
implementation joins by one more entry in BACKENDS.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

import dilseg
from helpers import emulation


@dataclass(frozen=True)
class Backend:
    name: str
    device: str
    why_unavailable: Callable[[], str | None]
    active: Callable[[], AbstractContextManager] = nullcontext


def why_no_cuda() -> str | None:
    """Returns why operators cannot run on a GPU here, or None if they can."""
    if not torch.cuda.is_available():
        return "no CUDA GPU is available"
    if dilseg.build_info()["kind"] != "cuda":
        return "dilseg is a CPU-only build"
    return None


BACKENDS = (
    Backend("cpu", "cpu", lambda: None),
    Backend("cuda", "cuda", why_no_cuda),
    Backend("emulated", "cpu", emulation.why_no_emulator, emulation.active),
)
