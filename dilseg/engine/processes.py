# SPDX-License-Identifier: Apache-2.0
"""One process or several started by torchrun, behind one small interface."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

__all__ = ["Processes", "pick_device", "processes"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Processes:
    """This process among its peers; with one process every collective is the identity."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds `tensor` over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum of `tensor` over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def gather(self, value: _T) -> list[_T]:
        """Every process's `value`, by rank; on other processes than the first an empty list."""
        if self.count == 1:
            return [value]
        values: list[_T] = [value] * self.count
        dist.gather_object(value, values if self.is_first else None)
        return values if self.is_first else []

    def agree(self, error: Exception | None) -> None:
        """Raises on every process what went wrong on the first one, so that none waits for it.

        Args:
            error: What the first process caught; ignored on the others.
        """
        if self.count > 1:
            shared: list[Exception | None] = [error if self.is_first else None]
            dist.broadcast_object_list(shared, src=0)
            error = shared[0]
        if error is not None:
            raise error


def pick_device(name: str) -> torch.device:
    """Turns ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` into a device that is there.

    Raises:
        ValueError: Not a device name, or a device this machine or this torch does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"--device: expected auto, cpu, cuda or cuda:N, but got {name!r}."
        ) from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            reason = (
                "this torch is built without CUDA"
                if torch.version.cuda is None
                else "torch finds no usable GPU"
            )
            raise ValueError(f"--device {name}: {reason}; give --device cpu.")
        found = torch.cuda.device_count()
        if device.index is not None and device.index >= found:
            raise ValueError(f"--device {name}: there are {found} GPUs, numbered from 0.")
    elif device.type != "cpu":
        raise ValueError(f"--device: expected auto, cpu, cuda or cuda:N, but got {name!r}.")
    return device


@contextmanager
def processes(device_name: str) -> Iterator[Processes]:
    """Joins the group torchrun describes in the environment, or stands alone without one.

    Under torchrun each process takes the GPU of its local rank (nccl) or the CPU (gloo). Within
    another call of this function the group is that of the outer one.

    Raises:
        ValueError: A device that is not there; see `pick_device`.
    """
    device = pick_device(device_name)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "RANK" not in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
            torch.cuda.set_device(device)
        yield Processes(0, 1, device)
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    outermost = not dist.is_initialized()
    if device.type == "cuda":
        device = pick_device(f"cuda:{local_rank}")
        torch.cuda.set_device(device)
        if outermost:
            dist.init_process_group("nccl", device_id=device)
    elif outermost:
        dist.init_process_group("gloo")
    try:
        yield Processes(rank, count, device)
        dist.barrier()  # no process takes its end of the group away while another still works
    finally:
        # The model's DistributedDataParallel sits in reference cycles and holds the group. Left to
        # the interpreter's exit, the group's threads may meet an interpreter that is gone: abort.
        gc.collect()
        if outermost:
            dist.destroy_process_group()
