# SPDX-License-Identifier: Apache-2.0
"""Exchanges the convolutions of a finished model for dilseg's, and back, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from dilseg.nn import DilatedConv2d

__all__ = ["SwapEntry", "SwapReport", "restore_conv2d", "swap_conv2d"]

_SUPPORTED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class SwapEntry:
    """What became of one convolution.

    Attributes:
        name: Qualified name of the module; ``""`` for the model itself.
        shape: Its size and geometry in a few words.
        swapped: Whether its class was exchanged.
        reason: Why, or why not.
    """

    name: str
    shape: str
    swapped: bool
    reason: str


@dataclass(frozen=True)
class SwapReport:
    """Every 2-D convolution of a model and what became of it; prints as a table.

    Attributes:
        action: The verb of the table's heading, ``"swapped"`` or ``"restored"``.
        entries: One :class:`SwapEntry` per convolution, in the order of ``model.named_modules()``.

    Example:
        >>> import torch, dilseg
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        ... )
        >>> print(dilseg.swap_conv2d(model))
        1 of 2 convolutions swapped
        layer  shape                               result   why
        0      3 -> 8, 3x3                         kept     dilation 1 is below min_dilation 2
        1      8 -> 8, 3x3, padding 2, dilation 2  swapped  dilation 2
    """

    action: str
    entries: tuple[SwapEntry, ...]

    @property
    def swapped(self) -> tuple[SwapEntry, ...]:
        """The convolutions whose class was exchanged."""
        return tuple(e for e in self.entries if e.swapped)

    @property
    def kept(self) -> tuple[SwapEntry, ...]:
        """The convolutions that stayed as they were."""
        return tuple(e for e in self.entries if not e.swapped)

    def __iter__(self) -> Iterator[SwapEntry]:
        """Iterates over the entries."""
        return iter(self.entries)

    def __len__(self) -> int:
        """The number of convolutions looked at."""
        return len(self.entries)

    def __str__(self) -> str:
        """Returns the table."""
        heading = f"{len(self.swapped)} of {len(self)} convolutions {self.action}"
        if not self.entries:
            return f"{heading}: the model has no nn.Conv2d"
        rows = [("layer", "shape", "result", "why")]
        rows += [
            (e.name or "(model)", e.shape, self.action if e.swapped else "kept", e.reason)
            for e in self.entries
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )
        return "\n".join((heading, *lines))


def _number(pair: tuple[int, ...]) -> str:
    """One number where both axes agree."""
    return str(pair[0]) if len(set(pair)) == 1 else str(tuple(pair))


def _shape(conv: nn.Conv2d) -> str:
    parts = [f"{conv.in_channels} -> {conv.out_channels}", "x".join(map(str, conv.kernel_size))]
    if conv.stride != (1, 1):
        parts.append(f"stride {_number(conv.stride)}")
    if isinstance(conv.padding, str):
        parts.append(f"padding {conv.padding}")
    elif any(conv.padding):
        parts.append(f"padding {_number(conv.padding)}")
    if conv.dilation != (1, 1):
        parts.append(f"dilation {_number(conv.dilation)}")
    if conv.groups != 1:
        parts.append(f"groups {conv.groups}")
    return ", ".join(parts)


def _exchange(
    function: str,
    model: nn.Module,
    action: str,
    new_class: type[nn.Conv2d],
    judge: Callable[[nn.Conv2d], tuple[bool, str]],
) -> SwapReport:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"dilseg.{function}: expected model to be a torch.nn.Module, but got "
            f"{type(model).__name__}."
        )
    entries = []
    # named_modules yields a module that is used in several places once, under its first name.
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            wanted, reason = judge(module)
            if wanted:
                # Both classes hold the same attributes, so that parameters, buffers, hooks,
                # references from optimisers and the module's own identity all survive the exchange.
                module.__class__ = new_class
            entries.append(SwapEntry(name, _shape(module), wanted, reason))
    return SwapReport(action, tuple(entries))


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def swap_conv2d(model: nn.Module, *, min_dilation: int = 2) -> SwapReport:
    """Turns the dilated ``nn.Conv2d`` of ``model`` into :class:`dilseg.DilatedConv2d`, in place.

    Only the class of a module changes: parameters, ``state_dict`` keys, hooks, optimisers that hold
    the parameters and ``model`` itself stay as they are, and so do the numbers, within rounding.
    :func:`restore_conv2d` undoes it.

    Left as they are, with the reason in the report: convolutions less dilated than
    ``min_dilation``, subclasses of ``nn.Conv2d`` (which may compute something else; parametrised
    modules are such), modules with a ``forward`` or an attribute ``activation`` of their own, lazy
    modules before their first forward pass, and parameters of a dtype without a kernel.

    Args:
        model: Any module; it may itself be an ``nn.Conv2d``. Swap before ``torch.compile`` or
            ``torch.export``.
        min_dilation: Smallest dilation, along either axis, from which a convolution is swapped; 1
            swaps all.

    Returns:
        A report with one entry per ``nn.Conv2d``; ``print`` it.

    Raises:
        TypeError: ``model`` is no module or ``min_dilation`` no int.
        ValueError: ``min_dilation`` is below 1.

    Difference from torch:
        torch has no counterpart.

    Example:
        >>> import torch, dilseg
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=4, dilation=4))
        >>> report = dilseg.swap_conv2d(model)
        >>> [entry.name for entry in report.swapped]
        ['0']
        >>> type(model[0]).__name__
        'DilatedConv2d'
    """
    if not isinstance(min_dilation, int) or isinstance(min_dilation, bool):
        raise TypeError(
            f"dilseg.swap_conv2d: expected min_dilation to be an int, but got {min_dilation!r}."
        )
    if min_dilation < 1:
        raise ValueError(
            f"dilseg.swap_conv2d: expected min_dilation of at least 1, but got {min_dilation}. "
            "Pass 1 to swap every convolution."
        )

    def judge(conv: nn.Conv2d) -> tuple[bool, str]:
        if type(conv) is DilatedConv2d:
            return False, "already a dilseg.DilatedConv2d"
        if any(is_lazy(p) for p in conv.parameters(recurse=False)):
            return False, "lazy: run one forward pass first"
        if type(conv) is not nn.Conv2d:
            return False, f"subclass {_class_name(conv)}, which may compute something else"
        if "forward" in vars(conv) or "_conv_forward" in vars(conv):
            return False, "has a forward of its own"
        if "activation" in vars(conv):
            return False, "has an attribute `activation`, which dilseg would apply"
        if conv.weight.dtype not in _SUPPORTED_DTYPES:
            return False, f"no kernel for {conv.weight.dtype}"
        if max(conv.dilation) < min_dilation:
            return (
                False,
                f"dilation {_number(conv.dilation)} is below min_dilation {min_dilation}",
            )
        return True, f"dilation {_number(conv.dilation)}"

    return _exchange("swap_conv2d", model, "swapped", DilatedConv2d, judge)


def restore_conv2d(model: nn.Module) -> SwapReport:
    """Turns every :class:`dilseg.DilatedConv2d` back into a plain ``nn.Conv2d``, in place.

    The inverse of :func:`swap_conv2d`. A module with a fused activation stays, since ``nn.Conv2d``
    would drop it.

    Args:
        model: Any module; it may itself be a ``DilatedConv2d``.

    Returns:
        A report with one entry per ``nn.Conv2d``; ``swapped`` are the restored ones.

    Raises:
        TypeError: ``model`` is no module.

    Difference from torch:
        torch has no counterpart.

    Example:
        >>> import torch, dilseg
        >>> model = torch.nn.Sequential(dilseg.DilatedConv2d(8, 8, 3, dilation=4))
        >>> len(dilseg.restore_conv2d(model).swapped)
        1
        >>> type(model[0]) is torch.nn.Conv2d
        True
    """

    def judge(conv: nn.Conv2d) -> tuple[bool, str]:
        if type(conv) is nn.Conv2d:
            return False, "already a plain nn.Conv2d"
        if type(conv) is not DilatedConv2d:
            return False, f"subclass {_class_name(conv)}, which may compute something else"
        if conv.activation is not None:
            return False, f"nn.Conv2d has no place for its fused activation {conv.activation!r}"
        return True, "was a dilseg.DilatedConv2d"

    return _exchange("restore_conv2d", model, "restored", nn.Conv2d, judge)
