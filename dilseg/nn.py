# SPDX-License-Identifier: Apache-2.0
"""The operators as modules, with torch's constructors, ``state_dict`` keys and ``isinstance``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dilseg import functional

__all__ = ["CrossEntropyLoss", "DilatedConv2d", "UpsampleAdd", "UpsampleCrossEntropyLoss"]


class DilatedConv2d(nn.Conv2d):
    """An :class:`torch.nn.Conv2d` that runs on dilseg's kernels, with an optional fused ReLU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Size of the window; one int or (height, width).
        stride: Step of the window; one int or (vertical, horizontal).
        padding: One int, (vertical, horizontal), ``"valid"`` or ``"same"``.
        dilation: Distance of neighbouring window taps; one int or (vertical, horizontal).
        groups: Number of channel groups.
        bias: Whether to add a learned bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        activation: ``"relu"`` fuses a ReLU into the convolution; None leaves it out.

    Shapes, dtypes, layouts and errors are those of :func:`dilseg.functional.dilated_conv2d`.
    Parameters, their names and their initialisation are those of ``nn.Conv2d``: a ``state_dict`` of
    either loads into the other.

    Difference from torch:
        None with ``activation=None``.

    Source:
        Yu and Koltun, "Multi-Scale Context Aggregation by Dilated Convolutions", ICLR 2016, section
        2.

    Example:
        >>> import torch, dilseg
        >>> conv = dilseg.DilatedConv2d(8, 16, 3, padding=6, dilation=6, activation="relu")
        >>> conv(torch.randn(2, 8, 33, 33)).shape
        torch.Size([2, 16, 33, 33])
        >>> isinstance(conv, torch.nn.Conv2d)
        True
    """

    # On the class, so that an nn.Conv2d whose class is exchanged in place (dilseg.swap_conv2d) has
    # it too.
    activation: Literal["relu"] | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Literal["relu"] | None = None,
    ) -> None:
        """Creates the parameters; see the class for the arguments."""
        if activation not in (None, "relu"):
            raise ValueError(
                "dilseg.DilatedConv2d: expected activation None or 'relu', but got "
                f"{activation!r}. Apply other activations as a module of their own."
            )
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        if activation is not None:
            self.activation = activation

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: int | tuple[int, ...] | str = self.padding
        if self.padding_mode != "zeros":
            pads = self._reversed_padding_repeated_twice
            input = nn.functional.pad(input, pads, mode=self.padding_mode)
            padding = 0
        return functional.dilated_conv2d(
            input,
            weight,
            bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        """Returns ``nn.Conv2d``'s text and the activation, if there is one."""
        text: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return text if self.activation is None else f"{text}, activation={self.activation!r}"


class UpsampleAdd(nn.Module):
    """Bilinear upsampling of a coarse map plus a skip connection, in one pass over memory.

    Args:
        scale_factor: Output pixels per input pixel; one number or (vertical, horizontal).
        align_corners: Whether the centres of the corner pixels coincide, as in torch.
        border: ``"clamp"`` as :func:`torch.nn.functional.interpolate`, ``"zero"`` as the bilinear
            deconvolution of the FCN and DilatedNet papers.

    ``forward(coarse, skip)`` takes ``coarse`` [n, c, h, w] and ``skip`` [n, c, >= h * s, >= w * s]
    or None, and returns [n, c, h * s, w * s]. Dtypes, layouts and errors are those of
    :func:`dilseg.functional.upsample_add`, which also offers sizes and crops.

    Difference from torch:
        torch has no such module; ``nn.UpsamplingBilinear2d`` has ``align_corners=True``.

    Source:
        Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR
        2015, section 4.2.

    Example:
        >>> import torch, dilseg
        >>> up = dilseg.UpsampleAdd(2)
        >>> up(torch.randn(1, 21, 16, 16), torch.randn(1, 21, 32, 32)).shape
        torch.Size([1, 21, 32, 32])
    """

    def __init__(
        self,
        scale_factor: float | Sequence[float] = 2,
        *,
        align_corners: bool = False,
        border: Literal["clamp", "zero"] = "clamp",
    ) -> None:
        """Stores the arguments; see the class."""
        super().__init__()
        if border not in ("clamp", "zero"):
            raise ValueError(
                f"dilseg.UpsampleAdd: expected border 'clamp' or 'zero', but got {border!r}."
            )
        self.scale_factor = scale_factor
        self.align_corners = align_corners
        self.border: Literal["clamp", "zero"] = border

    def forward(self, coarse: Tensor, skip: Tensor | None = None) -> Tensor:
        """Returns ``coarse``, upsampled, plus the top left part of ``skip``."""
        return functional.upsample_add(
            coarse,
            skip,
            scale_factor=self.scale_factor,
            align_corners=self.align_corners,
            border=self.border,
        )

    def extra_repr(self) -> str:
        """Returns the constructor's arguments."""
        return (
            f"scale_factor={self.scale_factor}, align_corners={self.align_corners}, "
            f"border={self.border!r}"
        )


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """Softmax cross entropy of per-pixel logits and labels, without storing probabilities.

    Args:
        weight: ``[c]`` weight per class, kept as the buffer ``weight``; None for ones.
        ignore_index: Label of pixels to leave out.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1].

    ``forward(input, target)`` takes logits [n, c, ...] and int64, int32 or uint8 labels [n, ...].
    Values, dtypes and errors are those of :func:`dilseg.functional.cross_entropy`.

    Difference from torch:
        ``ignore_index`` and ``reduction`` come directly after ``weight`` (torch's long deprecated
        ``size_average`` and ``reduce`` are left out); float16 and bfloat16 logits give a float32
        loss; no class probabilities.

    Source:
        Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR
        2015, section 3.

    Example:
        >>> import torch, dilseg
        >>> loss = dilseg.CrossEntropyLoss(ignore_index=255)
        >>> labels = torch.full((2, 8, 8), 3, dtype=torch.uint8)
        >>> round(loss(torch.zeros(2, 21, 8, 8), labels).item(), 4)  # log(21)
        3.0445
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Literal["mean", "sum", "none"] = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        """Stores the arguments; see the class."""
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(
                f"dilseg.{type(self).__name__}: expected reduction 'mean', 'sum' or 'none', but "
                f"got {reduction!r}."
            )
        super().__init__(
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )

    def _options(self) -> dict[str, Any]:
        return {
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
        }

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Returns the loss: a scalar or, for ``reduction="none"``, one value per label."""
        return functional.cross_entropy(input, target, self.weight, **self._options())

    def extra_repr(self) -> str:
        """Returns the arguments that differ between losses."""
        classes = "" if self.weight is None else f"classes={self.weight.numel()}, "
        return (
            f"{classes}ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"label_smoothing={self.label_smoothing}"
        )


class UpsampleCrossEntropyLoss(CrossEntropyLoss):
    """Softmax cross entropy of bilinearly upsampled logits, without the upsampled logits.

    Args:
        weight: ``[c]`` weight per class, kept as the buffer ``weight``; None for ones.
        ignore_index: Label of pixels to leave out.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1].
        scale_factor: Labels per logit along each axis; one number or (vertical, horizontal); None
            takes the ratio of the sizes.
        align_corners: Whether the centres of the corner pixels coincide, as in torch.
        border: ``"clamp"`` as :func:`torch.nn.functional.interpolate`, ``"zero"`` as the bilinear
            deconvolution of the FCN and DilatedNet papers.

    ``forward(input, target)`` takes logits [n, c, h_in, w_in] and int64, int32 or uint8 labels
    [n, h_out, w_out]. Values, dtypes and errors are those of
    :func:`dilseg.functional.upsample_cross_entropy`, which also offers an origin.

    Difference from torch:
        torch has no such module. Its value is that of ``nn.CrossEntropyLoss`` after
        ``F.interpolate(..., mode="bilinear")``.

    Source:
        Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR
        2015, sections 3.3 and 4.3.

    Example:
        >>> import torch, dilseg
        >>> loss = dilseg.UpsampleCrossEntropyLoss(ignore_index=255)
        >>> labels = torch.full((2, 64, 64), 3, dtype=torch.uint8)
        >>> round(loss(torch.zeros(2, 21, 8, 8), labels).item(), 4)  # log(21)
        3.0445
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Literal["mean", "sum", "none"] = "mean",
        label_smoothing: float = 0.0,
        *,
        scale_factor: float | Sequence[float] | None = None,
        align_corners: bool = False,
        border: Literal["clamp", "zero"] = "clamp",
    ) -> None:
        """Stores the arguments; see the class."""
        super().__init__(weight, ignore_index, reduction, label_smoothing)
        if border not in ("clamp", "zero"):
            raise ValueError(
                "dilseg.UpsampleCrossEntropyLoss: expected border 'clamp' or 'zero', but got "
                f"{border!r}."
            )
        self.scale_factor = scale_factor
        self.align_corners = align_corners
        self.border: Literal["clamp", "zero"] = border

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Returns the loss: a scalar or, for ``reduction="none"``, one value per label."""
        return functional.upsample_cross_entropy(
            input,
            target,
            self.weight,
            scale_factor=self.scale_factor,
            align_corners=self.align_corners,
            border=self.border,
            **self._options(),
        )

    def extra_repr(self) -> str:
        """Returns the arguments that differ between losses."""
        return (
            f"{super().extra_repr()}, scale_factor={self.scale_factor}, "
            f"align_corners={self.align_corners}, border={self.border!r}"
        )
