# SPDX-License-Identifier: Apache-2.0
"""The operators computed by the CUDA kernels themselves, on the CPU (tests/emulator).

While `active`, ``torch.ops.dilseg.*`` on CPU tensors runs csrc/ops as for CUDA tensors, and the
kernels of csrc/cuda in the emulator: under several schedules, whose results must agree bit by bit.
"""

import ctypes
import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from emulator.build import build_operators, compiler

from helpers.closeness import assert_bitwise_equal

#: EMULATOR_VARIANT: checked, fast or sanitized.
VARIANT = os.environ.get("EMULATOR_VARIANT", "checked")
#: A schedule is drawn from its seed; the first is also what EMULATOR_SEED replays.
_FIRST = int(os.environ.get("EMULATOR_SEED", "1"))
_counting = False
SEEDS = range(_FIRST, _FIRST + max(1, int(os.environ.get("EMULATOR_SCHEDULES", "2"))))
OPERATORS = (
    "dilated_conv2d",
    "dilated_conv2d_grad_input",
    "dilated_conv2d_grad_weight",
    "upsample_add",
    "upsample_add_backward",
    "cross_entropy",
    "cross_entropy_backward",
    "upsample_cross_entropy",
    "upsample_cross_entropy_backward",
    "upsample_argmax",
)


def why_no_emulator() -> str | None:
    """Returns why kernels cannot be emulated here, or None if they can."""
    return None if compiler() else "no g++ is on PATH, which compiles the kernels for the emulator"


@functools.cache
def library() -> ctypes.CDLL:
    """Builds and loads the emulated operators, torch.ops.dilseg_emulated.*."""
    loaded = ctypes.CDLL(str(build_operators(VARIANT)))
    loaded.emu_set_seed.argtypes = [ctypes.c_uint64]
    loaded.emu_guard_tensors.argtypes = [ctypes.c_bool]
    loaded.emu_bytes_read.restype = ctypes.c_uint64
    loaded.emu_bytes_written.restype = ctypes.c_uint64
    return loaded


@dataclass
class Traffic:
    """Bytes of global memory that kernels asked for."""

    read: int = 0
    written: int = 0

    @property
    def total(self) -> int:
        return self.read + self.written


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Counts what the kernels read and write inside the block, once: calls run one schedule.

    Counted are tensors allocated while the emulator is `active`, every access anew: a cache would
    spare memory some of it. Complete when the block ends; needs the variant ``checked``.
    """
    global _counting
    if VARIANT != "checked":
        raise RuntimeError(f"bytes are counted in the variant checked, not in {VARIANT}")
    counted = Traffic()
    _counting = True
    library().emu_reset_traffic()
    try:
        yield counted
    finally:
        _counting = False
    counted.read = library().emu_bytes_read()
    counted.written = library().emu_bytes_written()


def run_schedules(name: str, *arguments):
    """Runs an operator once per seed; returns the result, the same bits every time."""
    operator = getattr(torch.ops.dilseg_emulated, name).default
    first = None
    for seed in SEEDS[:1] if _counting else SEEDS:
        library().emu_set_seed(seed)
        result = operator(*arguments)
        tensors = result if isinstance(result, tuple) else (result,)
        if first is None:
            first = result
            continue
        expected = first if isinstance(first, tuple) else (first,)
        for a, b in zip(expected, tensors, strict=True):
            try:
                assert_bitwise_equal(a, b)
            except AssertionError as error:
                raise AssertionError(
                    f"dilseg::{name} under schedules {SEEDS[0]} and {seed}: {error}"
                ) from None
    return first


@contextmanager
def truncated_sums(on: bool) -> Iterator[None]:
    """Tensor cores that truncate when they add, as those of GPUs do; off by default."""
    library().emu_set_truncate(on)
    try:
        yield
    finally:
        library().emu_set_truncate(False)


@contextmanager
def active() -> Iterator[None]:
    """Lets torch.ops.dilseg.* on CPU tensors run in the emulator."""
    library()
    overrides = torch.library.Library("dilseg", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in OPERATORS:
            overrides.impl(name, functools.partial(run_schedules, name), "CPU", allow_override=True)
    library().emu_guard_tensors(True)
    try:
        yield
    finally:
        library().emu_guard_tensors(False)
        overrides._destroy()
