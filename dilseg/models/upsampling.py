# SPDX-License-Identifier: Apache-2.0
"""The bilinear deconvolution of the FCN papers, fixed or learned.

Both modules compute a window of the padless transposed convolution of kernel ``2 * stride`` (or one
less, where cells lie on pixels), plus a window of a skip map:

    full = conv_transpose2d(x, weight, stride)                   # stride * (n - 1) + kernel
    y    = full[crop : crop + size] + skip[offset : offset + size]     (on both axes)

Source: Long et al. 2015, section 3.3; ``surgery.py`` (interp) of the published code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilseg import functional
from dilseg.models.scores import Scores

__all__ = ["BilinearUpsampling", "LearnedUpsampling", "bilinear_kernel"]


def bilinear_kernel(
    size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Make the 2-d bilinear kernel of a transposed convolution.

    With ``f = ceil(size / 2)`` and the centre ``c = f - 1`` (odd size) or ``f - 0.5`` (even size),
    the weight at ``(i, j)`` is ``(1 - |i - c| / f) * (1 - |j - c| / f)``. A transposed convolution
    of stride ``f`` with an even kernel interpolates bilinearly between half-pixel centres.

    Args:
        size: Side of the kernel, at least 1.
        dtype: As in ``torch.empty``.
        device: As in ``torch.empty``.

    Returns:
        A tensor ``[size, size]``.

    Raises:
        ValueError: ``size`` is below 1.

    Example:
        >>> bilinear_kernel(4)[0]
        tensor([0.0625, 0.1875, 0.1875, 0.0625])

    Difference from torch: torch has no such function.
    Source: ``surgery.py`` (upsample_filt) of the published FCN code; Caffe's ``BilinearFiller``.
    """
    if size < 1:
        raise ValueError(
            f"dilseg.models.bilinear_kernel: expected size >= 1, but got {size}. "
            "Use 2 * stride for an upsampling by stride."
        )
    factor = math.ceil(size / 2)
    centre = factor - 1 if size % 2 else factor - 0.5
    positions = torch.arange(size, dtype=torch.float64, device="cpu")
    profile = 1 - (positions - centre).abs() / factor
    return torch.outer(profile, profile).to(
        dtype=dtype or torch.get_default_dtype(), device=device or torch.get_default_device()
    )


def _diagonal_kernels(channels: int, size: int) -> Tensor:
    """Make the weight ``[channels, channels, size, size]`` that upsamples each channel alone."""
    weight = torch.zeros(channels, channels, size, size)
    index = torch.arange(channels)
    weight[index, index] = bilinear_kernel(size)
    return weight


class BilinearUpsampling(nn.Module):
    """Fixed bilinear deconvolution, as in every published FCN: no parameters, one fused pass.

    A state dict may carry the deconvolution's weight, as converted Caffe weights do; loading checks
    that it is the bilinear kernel on the diagonal and reports an error otherwise.

    Args:
        channels: Channels of the maps.
        stride: Upsampling factor, even.
        kernel: Side of the kernel: ``2 * stride`` (None), which puts cells between pixels, or
            ``2 * stride - 1``, which puts them on pixels.

    Example:
        >>> up = BilinearUpsampling(1, stride=2)
        >>> up(torch.ones(1, 1, 1, 1), size=(4, 4))[0, 0, 0]
        tensor([0.0625, 0.1875, 0.1875, 0.0625])
        >>> BilinearUpsampling(1, 2, kernel=3)(torch.ones(1, 1, 1, 1), size=(3, 3))[0, 0, 1]
        tensor([0.5000, 1.0000, 0.5000])
    """

    def __init__(self, channels: int, stride: int, kernel: int | None = None) -> None:
        """Store the arguments; see the class."""
        super().__init__()
        self.channels = channels
        self.stride = stride
        self.kernel = kernel or 2 * stride

    def forward(
        self,
        x: Tensor,
        skip: Tensor | None = None,
        *,
        size: tuple[int, int],
        crop: int = 0,
        offset: int = 0,
    ) -> Tensor:
        """Compute the window of the deconvolution plus the window of the skip map.

        Args:
            x: ``[n, channels, h, w]``.
            skip: None, or ``[n, channels, >= offset + size[0], >= offset + size[1]]``.
            size: Height and width of the result.
            crop: First row and column of the deconvolution to keep.
            offset: First row and column of ``skip`` to use.

        Returns:
            ``[n, channels, *size]``.
        """
        padded, rule = self.scores(x, size=size, crop=crop).upsampling(self.stride)
        return functional.upsample_add(padded, skip, size=size, offset=(offset, offset), **rule)

    def scores(self, x: Tensor, *, size: tuple[int, int], crop: int = 0) -> Scores:
        """Describe the window of the deconvolution without computing it.

        Arguments as ``forward``, whose result are the ``logits()`` of this.

        Example:
            >>> up = BilinearUpsampling(1, stride=2)
            >>> up.scores(torch.ones(1, 1, 1, 1), size=(4, 4)).logits()[0, 0, 0]
            tensor([0.0625, 0.1875, 0.1875, 0.0625])
        """
        # Row 0 of the padless deconvolution lies half a stride before the stride * n map that
        # `upsample_add` counts from; an odd kernel's, a stride but one pixel before cell 0.
        on_pixels = self.kernel % 2 == 1
        origin = crop - (self.stride - 1 if on_pixels else self.stride // 2)
        return Scores(x, size, self.stride, "zero", (origin, origin), on_pixels)

    def mismatch(self, weight: Tensor, *, tolerance: float = 2**-8) -> str:
        """Say how a deconvolution's weight differs from the fixed kernel; empty if it does not.

        Args:
            weight: ``[channels, channels, kernel, kernel]``.
            tolerance: Differences below it do not count. Half-precision files round the kernel's
                values (below 1) by at most 2^-9 (bfloat16).
        """
        expected = _diagonal_kernels(self.channels, self.kernel)
        if weight.shape != expected.shape:
            return f"expected shape {tuple(expected.shape)}, but got {tuple(weight.shape)}."
        error = (weight.detach().cpu().float() - expected).abs().max().item()
        if error < tolerance:
            return ""
        return (
            f"expected the fixed bilinear kernel, but got weights up to {error:.3g} away from it. "
            "Build the model with learned_upsampling=True to keep them."
        )

    def extra_repr(self) -> str:
        """Show the arguments in ``repr``."""
        return f"{self.channels}, stride={self.stride}, kernel={self.kernel}"

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}weight"
        weight = state_dict.get(key)
        if weight is None:
            return
        complaint = self.mismatch(weight)
        if complaint:
            error_msgs.append(f"{key}: {complaint}")


class LearnedUpsampling(nn.ConvTranspose2d):
    """Ungrouped deconvolution that starts as bilinear upsampling of each channel.

    A state dict of the fixed variant has no weight for this layer; loading one gives the bilinear
    kernel, that is, the same function.

    Args:
        channels: Channels of the maps.
        stride: Upsampling factor, even.
        kernel: See ``BilinearUpsampling``.

    Example:
        >>> up = LearnedUpsampling(1, stride=2)
        >>> up(torch.ones(1, 1, 1, 1), size=(4, 4))[0, 0, 0].detach()
        tensor([0.0625, 0.1875, 0.1875, 0.0625])
    """

    def __init__(self, channels: int, stride: int, kernel: int | None = None) -> None:
        """Store the arguments; see the class."""
        super().__init__(channels, channels, kernel or 2 * stride, stride=stride, bias=False)

    def reset_parameters(self) -> None:
        """Set the bilinear kernel on the diagonal and zero elsewhere."""
        kernel = _diagonal_kernels(self.in_channels, self.kernel_size[0])
        with torch.no_grad():
            self.weight.copy_(kernel)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        skip: Tensor | None = None,
        *,
        size: tuple[int, int],
        crop: int = 0,
        offset: int = 0,
    ) -> Tensor:
        """Compute the same windows as ``BilinearUpsampling.forward``, with the learned weight."""
        full = F.conv_transpose2d(x, self.weight, stride=self.stride)
        window = full[:, :, crop : crop + size[0], crop : crop + size[1]]
        if skip is None:
            return window
        return window + skip[:, :, offset : offset + size[0], offset : offset + size[1]]

    def scores(self, x: Tensor, *, size: tuple[int, int], crop: int = 0) -> Scores:
        """Compute ``forward`` and return it as scores that are logits already."""
        return Scores(self(x, size=size, crop=crop), size)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if f"{prefix}weight" not in state_dict:
            self.reset_parameters()
            return
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
