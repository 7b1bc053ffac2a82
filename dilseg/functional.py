# SPDX-License-Identifier: Apache-2.0
"""The operators as functions, in the argument order of :mod:`torch.nn.functional`.

Every function takes float64, float32, float16 and bfloat16 tensors of any strides, keeps the memory
format of its input, gives the same bits on every run, never waits for the GPU, and works under
autograd, ``torch.compile``, ``torch.export``, ``torch.fx``, autocast, ``torch.vmap`` and the
reverse mode of ``torch.func`` (``grad``, ``vjp``, ``jacrev``). Forward-mode differentiation
(``jvp``, ``jacfwd``, ``hessian``) raises. What torch's counterpart lacks is keyword-only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from dilseg import ops

__all__ = [
    "DilatedConv2dPlan",
    "cross_entropy",
    "dilated_conv2d",
    "dilated_conv2d_plan",
    "upsample_add",
    "upsample_argmax",
    "upsample_cross_entropy",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _overridable(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Hands calls with arguments that define ``__torch_function__`` to them, as torch's own do.

    This makes each function one node of a ``torch.fx`` graph, and open to tensor subclasses.
    """

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        values = (*args, *kwargs.values())
        if has_torch_function(values):
            return handle_torch_function(call, values, *args, **kwargs)
        return function(*args, **kwargs)

    return call


def _check_tensor(
    op: str, name: str, value: object, input: Tensor | None = None, *, optional: bool = False
) -> None:
    """Raises unless ``value`` is a tensor on the device of ``input``, where that is given.

    Devices are compared as in the binary, here so that the text is the same under fake tensors,
    whose devices torch itself compares before it calls an operator.
    """
    if value is None and optional:
        return
    if not isinstance(value, Tensor):
        wanted = "a Tensor or None" if optional else "a Tensor"
        raise TypeError(
            f"dilseg::{op}: expected {name} to be {wanted}, but got {type(value).__name__}."
        )
    if input is not None and value.device != input.device:
        raise RuntimeError(
            f"dilseg::{op}: expected {name} on the device of input, {input.device}, but got {name} "
            f"on {value.device}. Move it with {name}.to(input.device)."
        )


_INT = (int, torch.SymInt)
_NUMBER = (int, float, torch.SymInt, torch.SymFloat)


def _check_option(
    op: str, name: str, value: object, kind: type | tuple[type, ...], wanted: str
) -> None:
    """Raises for an option of another type, which torch would answer with the whole schema."""
    if not isinstance(value, kind):
        raise TypeError(f"dilseg::{op}: expected {name} to be {wanted}, but got {value!r}.")


def _check_rank(op: str, name: str, tensor: Tensor, layout: str) -> None:
    """Raises what the binary raises, before the tensor's last two sizes are looked at here."""
    if tensor.dim() != 4:
        raise ValueError(
            f"dilseg::{op}: expected {name} of rank 4 {layout}, but got rank {tensor.dim()} with "
            f"shape {list(tensor.shape)}."
        )


def _pair(op: str, name: str, value: int | Sequence[int]) -> tuple[int, int]:
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value  # what modules pass
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    if not all(isinstance(v, _INT) for v in values):
        raise TypeError(
            f"dilseg::{op}: expected {name} to be an int or a pair of ints, but got {value!r}."
        )
    if len(values) == 1:
        return values[0], values[0]
    if len(values) != 2:
        raise ValueError(
            f"dilseg::{op}: expected {name} to be an int or a pair (vertical, horizontal), but got "
            f"{len(values)} values, {values}."
        )
    return values[0], values[1]


def _same_padding(
    kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> list[int]:
    if stride != (1, 1):
        raise ValueError(
            "dilseg::dilated_conv2d: expected stride 1 with padding='same', which torch does not "
            f"support for strided convolutions, but got stride {stride}. Pass padding as numbers."
        )
    padding = []
    for k, d in zip(kernel_size, dilation, strict=True):
        total = d * (k - 1)
        padding += [total // 2, total - total // 2]
    return padding


def _resolve_padding(
    op: str,
    padding: int | Sequence[int] | str,
    weight: Tensor,
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> list[int]:
    """Returns padding as [top, bottom, left, right]."""
    if isinstance(padding, str):
        if padding == "valid":
            return [0, 0, 0, 0]
        if padding == "same":
            _check_rank(op, "weight", weight, "[c_out, c_in/groups, k_h, k_w]")
            return _same_padding((weight.shape[-2], weight.shape[-1]), stride, dilation)
        raise ValueError(
            "dilseg::dilated_conv2d: expected padding to be an int, a pair of ints, 'same' or "
            f"'valid', but got {padding!r}."
        )
    vertical, horizontal = _pair("dilated_conv2d", "padding", padding)
    return [vertical, vertical, horizontal, horizontal]


@_overridable
def dilated_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: Literal["relu"] | None = None,
) -> Tensor:
    r"""Dilated (atrous) 2-D cross-correlation, with an optional fused bias and ReLU.

    .. math::
        y_{n,o,y,x} = \mathrm{act}\Big(b_o + \sum_{c,i,j} w_{o,c,i,j} \,
        x_{n,\,c,\,s_h y + d_h i - p_h,\,s_w x + d_w j - p_w}\Big)

    with zeros outside the input and, for ``groups`` > 1, channels `c` of the group of `o` only.

    Args:
        input: ``[n, c_in, h_in, w_in]`` or, unbatched, ``[c_in, h_in, w_in]``; float64, float32,
            float16 or bfloat16; any strides, contiguous and channels_last without a copy.
        weight: ``[c_out, c_in / groups, k_h, k_w]``, dtype of ``input``.
        bias: ``[c_out]``, dtype of ``input``, or None.
        stride: Step of the window, >= 1; one int or (vertical, horizontal).
        padding: Zeros on both sides, >= 0; one int, (vertical, horizontal), ``"valid"`` (none) or
            ``"same"`` (output as large as the input; stride 1 only; an odd total puts the larger
            half at the bottom and right, as torch does).
        dilation: Distance of neighbouring window taps, >= 1; one int or (vertical, horizontal).
        groups: Number of channel groups, a divisor of ``c_in`` and ``c_out``.
        activation: ``"relu"`` applies ``max(y, 0)`` before the one rounding to the output dtype;
            None does nothing.

    Returns:
        ``[n, c_out, h_out, w_out]`` with ``h_out = (h_in + p_top + p_bottom - dil_h * (k_h - 1) -
        1) // stride_h + 1`` and alike for the width (no ``n`` if the input had none), dtype and
        memory format of ``input``.

    Raises:
        ValueError: A shape, ``stride``, ``padding``, ``dilation``, ``groups`` or ``activation`` is
            wrong, the window exceeds the padded input, or ``padding="same"`` is combined with a
            stride.
        TypeError: Dtypes differ or are unsupported.
        RuntimeError: Tensors are on different devices, or on a GPU that the binary was not built
            for.

    Note:
        Sums of float16 and bfloat16 are accumulated in float32. The result is the same on every
        run, and differentiable any number of times. For the backward pass the input and the weight
        are saved, as needed, and with ``activation`` the output.

    Difference from torch:
        None with ``activation=None``: equals :func:`torch.nn.functional.conv2d` argument for
        argument.

    Source:
        Yu and Koltun, "Multi-Scale Context Aggregation by Dilated Convolutions", ICLR 2016, section
        2.

    Example:
        >>> import torch, dilseg
        >>> x = torch.ones(1, 1, 5, 5)
        >>> w = torch.ones(1, 1, 3, 3)
        >>> dilseg.functional.dilated_conv2d(x, w, padding="same", dilation=2)[0, 0, 0]
        tensor([4., 4., 6., 4., 4.])
        >>> dilseg.functional.dilated_conv2d(x, -w, dilation=2, activation="relu").item()
        0.0
    """
    op = "dilated_conv2d"
    _check_tensor(op, "input", input)
    _check_tensor(op, "weight", weight, input)
    _check_tensor(op, "bias", bias, input, optional=True)
    _check_option(op, "groups", groups, _INT, "an int")
    _check_option(op, "activation", activation, (str, type(None)), '"relu" or None')
    stride = _pair(op, "stride", stride)
    dilation = _pair(op, "dilation", dilation)
    pads = _resolve_padding(op, padding, weight, stride, dilation)
    unbatched = input.dim() == 3
    output = ops.dilated_conv2d(
        input.unsqueeze(0) if unbatched else input,
        weight,
        bias,
        stride,
        pads,
        dilation,
        groups,
        activation,
    )
    return cast(Tensor, output.squeeze(0) if unbatched else output)


@dataclass(frozen=True)
class DilatedConv2dPlan:
    """What runs a convolution on a GPU; see :func:`dilated_conv2d_plan`.

    Attributes:
        kernel: The family of kernels: ``"direct"``, ``"gemm"`` and ``"patch"`` (tensor cores; the
            latter for few channels), ``"wgmma"`` (those of compute capability 9.0) or
            ``"depthwise"``.
        description: Tiles, splits and passes, in words.
        workspace_bytes: Temporary memory of the call.
        microseconds: Modelled time, by which kernels are compared: not a measurement.
    """

    kernel: str
    description: str
    workspace_bytes: int
    microseconds: float

    def __str__(self) -> str:
        """Returns the plan as one line."""
        workspace = f", {self.workspace_bytes:,} bytes of workspace" if self.workspace_bytes else ""
        return f"{self.kernel}: {self.description}{workspace}; modelled {self.microseconds:.1f} us"


def dilated_conv2d_plan(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    operation: Literal["forward", "grad_input", "grad_weight"] = "forward",
    compute_capability: tuple[int, int] | None = None,
    multiprocessors: int | None = None,
) -> DilatedConv2dPlan:
    """Explains which CUDA kernels run :func:`dilated_conv2d` on such tensors, and why.

    The plan is a pure function of sizes, dtype, strides, the alignment of the tensors' memory, the
    GPU, and the precision of float32 products (:func:`dilseg.set_float32_conv_precision`). Nothing
    is computed and no GPU is needed.

    Args:
        input: As for :func:`dilated_conv2d`, on any device; a meta tensor is taken as aligned.
        weight: Likewise.
        bias: Likewise.
        stride: Likewise.
        padding: Likewise.
        dilation: Likewise.
        groups: Likewise.
        operation: ``"forward"``, or the gradient whose kernels are asked for; the gradient of the
            output is taken to be dense, in the memory format of ``input``.
        compute_capability: Of the GPU, as (9, 0). Default: that of ``input``'s device, or (9, 0)
            if that is no GPU.
        multiprocessors: Of the GPU. Default: those of ``input``'s device, or an H100's 132.

    Returns:
        The kernels, their tiles in words, the workspace in bytes and the modelled time.

    Raises:
        ValueError: As :func:`dilated_conv2d`; ``operation`` is none of the three; the GPU's numbers
            are out of range.
        TypeError: As :func:`dilated_conv2d`.

    Difference from torch:
        torch has no counterpart; cuDNN chooses by measuring, or by a heuristic that it keeps to
        itself.

    Example:
        >>> import torch, dilseg
        >>> x = torch.empty(1, 21, 64, 64, device="meta")
        >>> w = torch.empty(21, 21, 3, 3, device="meta")
        >>> plan = dilseg.functional.dilated_conv2d_plan(x, w, padding=16, dilation=16)
        >>> plan.kernel
        'patch'
        >>> plan.workspace_bytes
        0
    """
    op = "dilated_conv2d_plan"
    _check_tensor(op, "input", input)
    _check_tensor(op, "weight", weight, input)
    _check_tensor(op, "bias", bias, input, optional=True)
    _check_option(op, "groups", groups, _INT, "an int")
    _check_option(op, "operation", operation, str, "a str")
    if input.is_cuda and (compute_capability is None or multiprocessors is None):
        gpu = torch.cuda.get_device_properties(input.device)
        if compute_capability is None:
            compute_capability = gpu.major, gpu.minor
        if multiprocessors is None:
            multiprocessors = gpu.multi_processor_count
    if multiprocessors is None:
        multiprocessors = 132
    _check_option(op, "multiprocessors", multiprocessors, int, "an int")
    major, minor = _pair(op, "compute_capability", compute_capability or (9, 0))
    if not (major >= 1 and 0 <= minor <= 9):
        raise ValueError(
            f"dilseg::{op}: expected compute_capability (major, minor) as (9, 0), but got "
            f"{compute_capability}."
        )
    stride = _pair(op, "stride", stride)
    dilation = _pair(op, "dilation", dilation)
    return DilatedConv2dPlan(
        *torch.ops.dilseg.dilated_conv2d_plan(
            input.unsqueeze(0) if input.dim() == 3 else input,
            weight,
            bias,
            stride,
            _resolve_padding(op, padding, weight, stride, dilation),
            dilation,
            groups,
            operation,
            10 * major + minor,
            multiprocessors,
        )
    )


def _scale_pair(op: str, scale_factor: float | Sequence[float]) -> tuple[float, float]:
    values = scale_factor if isinstance(scale_factor, Sequence) else (scale_factor, scale_factor)
    if not (
        len(values) == 2
        and isinstance(values[0], (int, float))
        and isinstance(values[1], (int, float))
    ):
        raise TypeError(
            f"dilseg::{op}: expected scale_factor to be a number or a pair of numbers (vertical, "
            f"horizontal), but got {scale_factor!r}."
        )
    if not (0 < values[0] < math.inf and 0 < values[1] < math.inf):
        raise ValueError(
            f"dilseg::{op}: expected scale_factor greater than 0 and finite, but got "
            f"{scale_factor!r}."
        )
    return values[0], values[1]


def _scaled(length: int, scale: float) -> int:
    """The floor of ``length * scale``, in integers where it can be: symbolic sizes stay simple."""
    return length * int(scale) if float(scale).is_integer() else math.floor(length * scale)


def _output_size(
    op: str,
    input: Tensor,
    scales: tuple[float, float] | None,
    size: int | Sequence[int] | None,
    purpose: str,
) -> tuple[int, int]:
    if size is not None:
        return _pair(op, "size", size)
    if scales is not None:
        height, width = input.shape[-2:]
        return _scaled(height, scales[0]), _scaled(width, scales[1])
    raise ValueError(
        f"dilseg::{op}: expected scale_factor or size to be given, but got neither. Pass "
        f"scale_factor=2, or {purpose}."
    )


@_overridable
def upsample_add(
    input: Tensor,
    skip: Tensor | None,
    *,
    scale_factor: float | Sequence[float] | None = None,
    size: int | Sequence[int] | None = None,
    align_corners: bool = False,
    border: Literal["clamp", "zero"] = "clamp",
    offset: Sequence[int] = (0, 0),
    origin: Sequence[int] = (0, 0),
) -> Tensor:
    r"""Bilinear upsampling of ``input`` plus a crop of ``skip``, in one pass over memory.

    .. math::
        y_{n,c,y,x} = \mathrm{bilinear}(input_{n,c})(y + origin_h,\; x + origin_w)
        + skip_{n,\,c,\,y + offset_h,\,x + offset_w}

    Output row `y` looks at input row ``(y + 0.5) / s - 0.5``, or at ``y * (h_in - 1) / (h_full -
    1)`` with ``align_corners``; rows between two samples mix both linearly, columns alike. In
    downsampling no smoothing is applied, as in torch.

    Args:
        input: ``[n, c, h_in, w_in]``; float64, float32, float16 or bfloat16; any strides.
        skip: ``[n, c, h_skip, w_skip]`` with ``h_skip >= offset_h + h_out`` and likewise for the
            width, dtype of ``input``; None for plain upsampling.
        scale_factor: Output pixels per input pixel, > 0; one number or (vertical, horizontal). It
            sets the step and, without ``size``, the output size ``floor(h_in * s)``.
        size: Output size; one int or (height, width). Alone it also sets the step, ``h_in /
            h_out``; together with ``scale_factor`` it only chooses how much of the upsampled map is
            computed.
        align_corners: Whether the centres of the corner pixels coincide, as in torch.
        border: What lies beyond the map's edge. ``"clamp"`` repeats the edge, as
            :func:`torch.nn.functional.interpolate`. ``"zero"`` is zero there, which makes the
            result equal to a transposed convolution with the fixed bilinear kernel of the FCN and
            DilatedNet papers.
        offset: (vertical, horizontal) position in ``skip`` of the output's first pixel, >= 0: the
            FCN crop without a copy.
        origin: (vertical, horizontal) position in the upsampled map of the output's first pixel;
            may be negative. Other than (0, 0) only together with ``scale_factor``.

    Returns:
        ``[n, c, h_out, w_out]``, dtype and memory format of ``input``.

    Raises:
        ValueError: A shape, ``size``, ``scale_factor``, ``border``, ``offset`` or ``origin`` is
            wrong, or neither ``size`` nor ``scale_factor`` is given.
        TypeError: Dtypes differ or are unsupported.
        RuntimeError: Tensors are on different devices, or on a GPU that the binary was not built
            for.

    Note:
        float16 and bfloat16 are interpolated and added in float32 and rounded once. The backward
        pass gathers: it is deterministic, unlike torch's on a GPU. No tensor is saved for it.

    Difference from torch:
        With ``border="clamp"`` and ``origin=(0, 0)`` the value equals
        ``F.interpolate(input, ..., mode="bilinear") + skip[..., oy:oy + h, ox:ox + w]`` (which
        rounds twice).

    Source:
        Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR
        2015, sections 3.3 and 4.2.

    Example:
        >>> import torch, dilseg
        >>> coarse = torch.tensor([[[[0.0, 4.0]]]])
        >>> skip = torch.full((1, 1, 2, 4), 10.0)
        >>> dilseg.functional.upsample_add(coarse, skip, scale_factor=2)[0, 0]
        tensor([[10., 11., 13., 14.],
                [10., 11., 13., 14.]])
        >>> dilseg.functional.upsample_add(coarse, None, scale_factor=2, border="zero")[0, 0, 0]
        tensor([0.0000, 0.7500, 2.2500, 2.2500])
    """
    op = "upsample_add"
    _check_tensor(op, "input", input)
    _check_tensor(op, "skip", skip, input, optional=True)
    _check_rank(op, "input", input, "[n, c, h_in, w_in]")
    _check_option(op, "align_corners", align_corners, bool, "True or False")
    _check_option(op, "border", border, str, '"clamp" or "zero"')
    scales = None if scale_factor is None else _scale_pair(op, scale_factor)
    output_size = _output_size(
        op, input, scales, size, "size=skip.shape[-2:] to match a skip connection"
    )
    output = ops.upsample_add(
        input,
        skip,
        output_size,
        scales,
        align_corners,
        border,
        _pair(op, "offset", offset),
        _pair(op, "origin", origin),
    )
    return cast(Tensor, output)


def _as_images(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Views logits and labels of any rank as [n, c, h, w] and [n, h, w]."""
    rank = input.dim()
    if rank == 4:
        return input, target
    if rank == 1:
        return input.view(1, -1, 1, 1), target.view(1, 1, 1)
    if rank == 2:
        return input[:, :, None, None], target[:, None, None]
    if rank == 3:
        return input.unsqueeze(2), target.unsqueeze(1)
    return input.flatten(3), target.flatten(2)


def _check_loss(
    op: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> None:
    _check_tensor(op, "input", input)
    _check_tensor(op, "target", target, input)
    _check_tensor(op, "weight", weight, input, optional=True)
    _check_option(op, "reduction", reduction, str, '"none", "mean" or "sum"')
    _check_option(op, "ignore_index", ignore_index, _INT, "an int")
    _check_option(op, "label_smoothing", label_smoothing, _NUMBER, "a number")
    if target.is_floating_point():
        raise NotImplementedError(
            f"dilseg::{op}: expected target of dtype int64, int32 or uint8, but got "
            f"{target.dtype}. Class probabilities as target are not implemented; use "
            "torch.nn.functional.cross_entropy for them."
        )


@_overridable
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Softmax cross entropy of logits against class labels, without storing probabilities.

    .. math::
        \ell = (1 - \epsilon)\, v_y \,(\mathrm{lse}(z) - z_y) + \frac{\epsilon}{C} \sum_c v_c
        (\mathrm{lse}(z) - z_c)

    for a pixel with logits `z`, label `y`, class weights `v` (ones by default) and `C` classes; 0
    for an ignored pixel. ``"mean"`` divides the sum over all pixels by the sum of `v_y` over the
    valid ones.

    Args:
        input: Logits ``[n, c, d_1, ..., d_k]`` with any k >= 0, or ``[c]``; float64, float32,
            float16 or bfloat16; any strides.
        target: Labels ``[n, d_1, ..., d_k]``, or ``[]`` for logits ``[c]``; int64, int32 or uint8;
            each is ``ignore_index`` or in ``[0, c)``.
        weight: ``[c]`` weight per class, or None for ones; carries no gradient.
        ignore_index: Label of pixels to leave out; their logits are not used.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1].

    Returns:
        A scalar or, for ``"none"``, the loss per pixel in the shape of ``target``; float64 for
        float64 logits, float32 for every other dtype. "mean" over no valid pixel is nan.

    Raises:
        ValueError: A shape, ``reduction`` or ``label_smoothing`` is wrong or, on the CPU, a label
            is out of range. On a GPU such a label prints one line and traps: nothing waits for the
            device to check it.
        TypeError: A dtype is unsupported.
        NotImplementedError: ``target`` holds class probabilities, or ``weight`` requires a
            gradient.
        RuntimeError: Tensors are on different devices, or on a GPU that the binary was not built
            for.

    Note:
        Losses are computed in float32 (float64 for float64) and summed in float64 in a fixed order.
        Gradients of ignored pixels are exactly 0. Memory: one number per pixel besides the
        gradient.

    Difference from torch:
        Computes in and returns float32 for float16 and bfloat16 logits (torch: dtype of the
        logits); also takes int32 labels; takes no class probabilities.

    Source:
        Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR
        2015, section 3: a loss summed over the spatial dimensions of the final layer.

    Example:
        >>> import torch, dilseg
        >>> logits = torch.zeros(1, 4, 2, 2, requires_grad=True)
        >>> labels = torch.tensor([[[0, 1], [3, 255]]])
        >>> loss = dilseg.functional.cross_entropy(logits, labels, ignore_index=255)
        >>> round(loss.item(), 4)  # log(4)
        1.3863
        >>> loss.backward()
        >>> logits.grad[0, :, 1, 1]
        tensor([0., 0., 0., 0.])
    """
    op = "cross_entropy"
    _check_loss(op, input, target, weight, ignore_index, reduction, label_smoothing)
    shape = input.shape
    if not shape:
        raise ValueError(
            "dilseg::cross_entropy: expected input of shape [c] or [n, c, ...], but got a scalar."
        )
    wanted = shape[:1] + shape[2:] if len(shape) > 1 else shape[:0]
    if target.shape != wanted:
        raise ValueError(
            f"dilseg::cross_entropy: expected target of shape {list(wanted)}, input's without its "
            f"class dimension, but got {list(target.shape)} for input {list(input.shape)}."
        )
    loss, _, _ = ops.cross_entropy(
        *_as_images(input, target), weight, reduction, ignore_index, label_smoothing
    )
    return cast(Tensor, loss.reshape(target.shape) if reduction == "none" else loss)


@_overridable
def upsample_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    scale_factor: float | Sequence[float] | None = None,
    align_corners: bool = False,
    border: Literal["clamp", "zero"] = "clamp",
    origin: Sequence[int] = (0, 0),
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Softmax cross entropy of bilinearly upsampled logits, without the upsampled logits.

    .. math::
        \ell_{n,y,x} = \mathrm{cross\_entropy}\big(\mathrm{bilinear}(input_n)(y + origin_h,\;
        x + origin_w),\; target_{n,y,x}\big)

    Every pixel's logits are interpolated, used and dropped on chip; the gradient is summed at the
    resolution of ``input``. Of full-resolution tensors, only ``target`` is read.

    Args:
        input: Logits ``[n, c, h_in, w_in]``; float64, float32, float16 or bfloat16; any strides.
        target: Labels ``[n, h_out, w_out]``; int64, int32 or uint8; each is ``ignore_index`` or in
            ``[0, c)``. Its size is the size upsampled to.
        weight: ``[c]`` weight per class, or None for ones; carries no gradient.
        scale_factor: Output pixels per input pixel, > 0; one number or (vertical, horizontal). None
            takes ``h_out / h_in`` and ``w_out / w_in``.
        align_corners: As in :func:`upsample_add`.
        border: As in :func:`upsample_add`: ``"clamp"`` equals
            :func:`torch.nn.functional.interpolate`, ``"zero"`` the papers' bilinear deconvolution.
        origin: (vertical, horizontal) position in the upsampled map of the first label; may be
            negative. Other than (0, 0) only together with ``scale_factor``.
        ignore_index: Label of pixels to leave out.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1].

    Returns:
        A scalar or, for ``"none"``, the loss per pixel ``[n, h_out, w_out]``; float64 for float64
        logits, float32 for every other dtype. "mean" over no valid pixel is nan.

    Raises:
        ValueError: A shape or an option is wrong or, on the CPU, a label is out of range. On a GPU
            such a label prints one line and traps.
        TypeError: A dtype is unsupported.
        NotImplementedError: ``target`` holds class probabilities, or ``weight`` requires a
            gradient.
        RuntimeError: Tensors are on different devices, or on a GPU that the binary was not built
            for.

    Note:
        float16 and bfloat16 logits are interpolated in float32, never rounded in between. For
        ``"mean"`` and ``"sum"`` the gradient is computed with the loss, when ``input`` requires
        one; memory beyond the arguments is then one float per element of ``input``, and up to a
        few more while the loss is computed. An ignored pixel sends no gradient to the logits around
        it, whatever they hold. "mean" over a total weight of 0 has gradient 0.

    Difference from torch:
        With ``border="clamp"`` and ``origin=(0, 0)`` the value equals
        ``F.cross_entropy(F.interpolate(input, target.shape[-2:], mode="bilinear"), target)``, which
        stores and reads the upsampled logits several times; the other differences are those of
        :func:`cross_entropy`.

    Source:
        Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR
        2015, sections 3.3 and 4.3: a loss over scores upsampled inside the network.

    Example:
        >>> import torch, dilseg
        >>> scores = torch.zeros(1, 4, 2, 2, requires_grad=True)
        >>> labels = torch.zeros(1, 16, 16, dtype=torch.uint8)
        >>> loss = dilseg.functional.upsample_cross_entropy(scores, labels)
        >>> round(loss.item(), 4)  # log(4)
        1.3863
        >>> loss.backward()
        >>> scores.grad[0, :, 0, 0]
        tensor([-0.1875,  0.0625,  0.0625,  0.0625])
    """
    op = "upsample_cross_entropy"
    _check_loss(op, input, target, weight, ignore_index, reduction, label_smoothing)
    _check_option(op, "align_corners", align_corners, bool, "True or False")
    _check_option(op, "border", border, str, '"clamp" or "zero"')
    loss, _, _ = ops.upsample_cross_entropy(
        input,
        target,
        weight,
        None if scale_factor is None else _scale_pair(op, scale_factor),
        align_corners,
        border,
        _pair(op, "origin", origin),
        reduction,
        ignore_index,
        label_smoothing,
        input.requires_grad and torch.is_grad_enabled(),
    )
    return cast(Tensor, loss)


@_overridable
def upsample_argmax(
    input: Tensor,
    *,
    scale_factor: float | Sequence[float] | None = None,
    size: int | Sequence[int] | None = None,
    align_corners: bool = False,
    border: Literal["clamp", "zero"] = "clamp",
    origin: Sequence[int] = (0, 0),
    dtype: torch.dtype = torch.int64,
    confidence: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Class of every pixel of bilinearly upsampled logits, without the upsampled logits.

    .. math::
        label_{n,y,x} = \mathrm{argmax}_c\, z_c, \qquad
        confidence_{n,y,x} = \mathrm{softmax}(z)_{label}, \qquad
        z_c = \mathrm{bilinear}(input_{n,c})(y + origin_h,\; x + origin_w)

    Args:
        input: Logits ``[n, c, h_in, w_in]``; float64, float32, float16 or bfloat16; any strides.
        scale_factor: As in :func:`upsample_add`.
        size: As in :func:`upsample_add`.
        align_corners: As in :func:`upsample_add`.
        border: As in :func:`upsample_add`.
        origin: As in :func:`upsample_add`.
        dtype: Of the labels: torch.int64, torch.int32 or, for at most 256 classes, torch.uint8.
        confidence: Whether to return the probabilities too.

    Returns:
        Labels ``[n, h_out, w_out]``; with ``confidence`` the pair of them and the probabilities
        ``[n, h_out, w_out]`` in [0, 1], float64 for float64 logits, float32 for every other dtype.
        Of equal logits the first class wins, and a nan wins over everything. Neither carries a
        gradient.

    Raises:
        ValueError: A shape or an option is wrong, or uint8 cannot hold every class.
        TypeError: A dtype is unsupported.
        RuntimeError: The tensor is on a GPU that the binary was not built for.

    Difference from torch:
        Equals ``F.interpolate(input, ..., mode="bilinear").argmax(1)`` and
        ``.softmax(1).amax(1)``, except that float16 and bfloat16 logits are interpolated in float32
        and not rounded before they are compared.

    Source:
        Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR
        2015, section 3.3.

    Example:
        >>> import torch, dilseg
        >>> scores = torch.tensor([[[[2.0, 0.0]], [[0.0, 1.0]]]])
        >>> dilseg.functional.upsample_argmax(scores, scale_factor=(1, 4))
        tensor([[[0, 0, 0, 0, 0, 1, 1, 1]]])
    """
    op = "upsample_argmax"
    _check_tensor(op, "input", input)
    _check_rank(op, "input", input, "[n, c, h_in, w_in]")
    _check_option(op, "align_corners", align_corners, bool, "True or False")
    _check_option(op, "border", border, str, '"clamp" or "zero"')
    _check_option(op, "dtype", dtype, torch.dtype, "a torch.dtype")
    _check_option(op, "confidence", confidence, bool, "True or False")
    scales = None if scale_factor is None else _scale_pair(op, scale_factor)
    output_size = _output_size(
        op, input, scales, size, "size=image.shape[-2:] for the labels of an image"
    )
    label, share = ops.upsample_argmax(
        input,
        output_size,
        scales,
        align_corners,
        border,
        _pair(op, "origin", origin),
        dtype,
        confidence,
    )
    return (label, share) if confidence else cast(Tensor, label)
