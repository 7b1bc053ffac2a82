# SPDX-License-Identifier: Apache-2.0
"""Runs test kernels (kernels/*.cu) in the emulator from Python.

A file of kernels has one entry point per kernel, ``EMU_ENTRY int name(...)``, that launches it and
returns the status of the launch. Buffers are torch tensors whose memory lies between guard zones.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from emulator.build import HERE, ROOT, build_library

#: Schedules that a kernel is run under unless a test says otherwise.
SEEDS = range(1, 9)


class KernelError(RuntimeError):
    """A launch failed; the text is the emulator's report."""


class Kernels:
    """The entry points of one file of kernels."""

    def __init__(self, stem: str, variant: str = "checked"):
        source = Path("tests/emulator/kernels") / f"{stem}.cu"
        path = build_library(
            f"kernels_{stem}",
            variant,
            [source.as_posix()],
            include_dirs=[ROOT / "csrc/include", ROOT / "csrc", HERE / "kernels"],
        )
        self._library = ctypes.CDLL(str(path))
        self._library.emu_report.restype = ctypes.c_char_p
        self._library.emu_set_seed.argtypes = [ctypes.c_uint64]
        self._library.emu_set_truncate.argtypes = [ctypes.c_bool]
        self._library.emu_allocate.argtypes = [ctypes.c_size_t]
        self._library.emu_allocate.restype = ctypes.c_void_p
        self._library.emu_release.argtypes = [ctypes.c_void_p]
        self._library.emu_bytes_read.restype = ctypes.c_uint64
        self._library.emu_bytes_written.restype = ctypes.c_uint64

    def set_threads(self, threads: int) -> None:
        """How many threads of the operating system share the blocks."""
        self._library.emu_set_threads(threads)

    def set_arch(self, arch: int) -> None:
        self._library.emu_set_arch(arch)

    def set_truncate(self, on: bool) -> None:
        """Whether tensor cores truncate their sums."""
        self._library.emu_set_truncate(on)

    def buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy whose memory has guard zones."""
        size = max(1, tensor.numel()) * tensor.element_size()
        address = self._library.emu_allocate(size)
        memory = (ctypes.c_char * size).from_address(address)
        copy = torch.frombuffer(memory, dtype=tensor.dtype)[: tensor.numel()].view(tensor.shape)
        copy.copy_(tensor)
        _released_with(copy, self._library, address)
        return copy

    def traffic(self) -> tuple[int, int]:
        """Bytes of buffers read and written by the launches since the last call."""
        counted = (self._library.emu_bytes_read(), self._library.emu_bytes_written())
        self._library.emu_reset_traffic()
        return counted

    def run(self, name: str, *arguments: torch.Tensor | int | float, seed: int = 1) -> None:
        """Launches a kernel under one schedule; tensors are passed as pointers, ints as int.

        Raises:
            KernelError: The launch was refused or the emulator found a fault.
        """
        self._library.emu_set_seed(seed)
        converted = [
            ctypes.c_void_p(a.data_ptr())
            if isinstance(a, torch.Tensor)
            else ctypes.c_float(a)
            if isinstance(a, float)
            else ctypes.c_int(a)
            for a in arguments
        ]
        status = getattr(self._library, name)(*converted)
        if status != 0:
            raise KernelError(f"status {status}: {self._library.emu_report().decode()}")


def _released_with(tensor: torch.Tensor, library: ctypes.CDLL, address: int) -> None:
    import weakref

    weakref.finalize(tensor, library.emu_release, address)


@functools.cache
def kernels(stem: str, variant: str = "checked") -> Kernels:
    """The kernels of ``kernels/<stem>.cu``, built and loaded once."""
    return Kernels(stem, variant)
