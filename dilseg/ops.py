# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: ANN401  (torch hands out what it knows of a vmap, and takes operators, of no public type)
"""The operators ``torch.ops.dilseg.*``, and their vmap rules.

The binary defines the schemas and, per dispatch key, the CPU, CUDA, Meta, Autocast and Autograd
kernels; the gradients are in ``csrc/ops/*_autograd.cpp``. What is left is added here: how each
operator is vectorised, from registered operators and differentiable ATen operators only.

A mapped dimension is folded into the batch where the operator treats images alike, into groups
where it carries its own weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Loading the binary is what defines torch.ops.dilseg.
from dilseg import _extension as _extension

dilated_conv2d = torch.ops.dilseg.dilated_conv2d.default
dilated_conv2d_grad_input = torch.ops.dilseg.dilated_conv2d_grad_input.default
dilated_conv2d_grad_weight = torch.ops.dilseg.dilated_conv2d_grad_weight.default
upsample_add = torch.ops.dilseg.upsample_add.default
upsample_add_backward = torch.ops.dilseg.upsample_add_backward.default
cross_entropy = torch.ops.dilseg.cross_entropy.default
cross_entropy_backward = torch.ops.dilseg.cross_entropy_backward.default
upsample_cross_entropy = torch.ops.dilseg.upsample_cross_entropy.default
upsample_cross_entropy_backward = torch.ops.dilseg.upsample_cross_entropy_backward.default
upsample_argmax = torch.ops.dilseg.upsample_argmax.default


def _front(x: Tensor, dim: int | None, batch: int) -> Tensor:
    """Moves the mapped dimension of ``x`` to the front, or expands an unmapped ``x``."""
    return x.expand(batch, *x.shape) if dim is None else x.movedim(dim, 0)


def _fold_batch(x: Tensor, dim: int | None, batch: int) -> Tensor:
    """[batch, n, ...] -> [batch * n, ...]."""
    return _front(x, dim, batch).flatten(0, 1)


def _unfold_batch(x: Tensor, batch: int) -> Tensor:
    """[batch * n, ...] -> [batch, n, ...]."""
    return x.reshape(batch, x.shape[0] // batch, *x.shape[1:])


def _fold_channels(x: Tensor, dim: int | None, batch: int) -> Tensor:
    """[batch, n, c, ...] -> [n, batch * c, ...]."""
    return _front(x, dim, batch).transpose(0, 1).flatten(1, 2)


def _unfold_channels(x: Tensor, batch: int) -> Tensor:
    """[n, batch * c, ...] -> [n, batch, c, ...]."""
    return x.reshape(x.shape[0], batch, x.shape[1] // batch, *x.shape[2:])


def _conv_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
) -> tuple[Tensor, int]:
    batch = info.batch_size
    input_dim, weight_dim, bias_dim = in_dims[:3]
    geometry = (stride, padding, dilation)
    if weight_dim is None and bias_dim is None:
        folded = _fold_batch(input, input_dim, batch)
        out = dilated_conv2d(folded, weight, bias, *geometry, groups, activation)
        return _unfold_batch(out, batch), 0

    weight = _front(weight, weight_dim, batch)
    c_out = weight.shape[1]
    bias = None if bias is None else _front(bias, bias_dim, batch)
    if input_dim is not None:
        out = dilated_conv2d(
            _fold_channels(input, input_dim, batch),
            weight.flatten(0, 1),
            None if bias is None else bias.flatten(0, 1),
            *geometry,
            batch * groups,
            activation,
        )
        return _unfold_channels(out, batch), 1

    # One input under many weights: a single convolution with more output channels per group.
    def by_group(x: Tensor) -> Tensor:
        c = x.shape[1] // groups
        return x.reshape(batch, groups, c, *x.shape[2:]).transpose(0, 1).flatten(0, 2)

    bias = None if bias is None else by_group(bias)
    out = dilated_conv2d(input, by_group(weight), bias, *geometry, groups, activation)
    out = out.reshape(out.shape[0], groups, batch, c_out // groups, *out.shape[2:])
    return out.movedim(2, 0).flatten(2, 3), 0


def _conv_grad_input_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, int]:
    batch = info.batch_size
    grad_output_dim, weight_dim = in_dims[:2]
    geometry = (input_size, stride, padding, dilation)
    if weight_dim is None:
        folded = _fold_batch(grad_output, grad_output_dim, batch)
        out = dilated_conv2d_grad_input(folded, weight, *geometry, groups)
        return _unfold_batch(out, batch), 0
    out = dilated_conv2d_grad_input(
        _fold_channels(grad_output, grad_output_dim, batch),
        _front(weight, weight_dim, batch).flatten(0, 1),
        *geometry,
        batch * groups,
    )
    return _unfold_channels(out, batch), 1


def _conv_grad_weight_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
    batch = info.batch_size
    grad_weight, grad_bias = dilated_conv2d_grad_weight(
        _fold_channels(grad_output, in_dims[0], batch),
        _fold_channels(input, in_dims[1], batch),
        kernel_size,
        stride,
        padding,
        dilation,
        batch * groups,
        bias,
    )
    grad_weight = _unfold_batch(grad_weight, batch)
    if not bias:
        return (grad_weight, grad_bias), (0, None)
    return (grad_weight, _unfold_batch(grad_bias, batch)), (0, 0)


def _upsample_add_vmap(
    info: Any, in_dims: tuple[Any, ...], input: Tensor, skip: Tensor | None, *options: Any
) -> tuple[Tensor, int]:
    batch = info.batch_size
    folded_skip = None if skip is None else _fold_batch(skip, in_dims[1], batch)
    out = upsample_add(_fold_batch(input, in_dims[0], batch), folded_skip, *options)
    return _unfold_batch(out, batch), 0


def _upsample_add_backward_vmap(
    info: Any, in_dims: tuple[Any, ...], grad_output: Tensor, *options: Any
) -> tuple[Tensor, int]:
    batch = info.batch_size
    out = upsample_add_backward(_fold_batch(grad_output, in_dims[0], batch), *options)
    return _unfold_batch(out, batch), 0


def _map_serially(op: Any, info: Any, in_dims: tuple[Any, ...], args: Sequence[Any]) -> list[Any]:
    """Calls ``op`` once per mapped index; for the rare case that folds into no single call."""
    return [
        op(
            *(
                a.select(d, i) if isinstance(a, Tensor) and d is not None else a
                for a, d in zip(args, in_dims, strict=True)
            )
        )
        for i in range(info.batch_size)
    ]


def _valid_target(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Returns the mask of valid pixels and int64 labels that are safe to index with."""
    # Widened before the comparison: an ignore_index of -100 would wrap around in uint8.
    target = target.long()
    valid = target != ignore_index
    return valid, torch.where(valid, target, 0)


def _cross_entropy_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    if in_dims[2] is not None:
        args = (input, target, weight, reduction, ignore_index, label_smoothing)
        results = _map_serially(cross_entropy, info, in_dims, args)
        return tuple(torch.stack(r) for r in zip(*results, strict=True)), (0, 0, 0)

    batch = info.batch_size
    target = _front(target, in_dims[1], batch)
    loss, logsumexp, _ = cross_entropy(
        _fold_batch(input, in_dims[0], batch),
        target.flatten(0, 1),
        weight,
        "none",
        ignore_index,
        label_smoothing,
    )
    # The operator's totals would span the mapped dimension; here each index has its own.
    valid, label = _valid_target(target, ignore_index)
    pixel_weight = valid.double() if weight is None else weight.double()[label] * valid
    total_weight = pixel_weight.sum((1, 2, 3))
    loss = _unfold_batch(loss, batch)
    if reduction != "none":
        total = loss.sum((1, 2, 3), dtype=torch.float64)
        loss = (total / total_weight if reduction == "mean" else total).to(loss.dtype)
    return (loss, _unfold_batch(logsumexp, batch), total_weight.to(loss.dtype)), (0, 0, 0)


def _cross_entropy_backward_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    logsumexp: Tensor,
    total_weight: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, int]:
    if in_dims[3] is not None:
        options = (reduction, ignore_index, label_smoothing)
        args = (grad_output, input, target, weight, logsumexp, total_weight, *options)
        results = _map_serially(cross_entropy_backward, info, in_dims, args)
        return torch.stack(results), 0

    batch = info.batch_size
    target = _front(target, in_dims[2], batch)
    grad_output = _front(grad_output, in_dims[0], batch)
    if reduction == "mean":
        grad_output = grad_output / _front(total_weight, in_dims[5], batch)
    if reduction != "none":
        grad_output = grad_output.view(-1, 1, 1, 1).expand(target.shape)
    grad_input = cross_entropy_backward(
        grad_output.flatten(0, 1),
        _fold_batch(input, in_dims[1], batch),
        target.flatten(0, 1),
        weight,
        _fold_batch(logsumexp, in_dims[4], batch),
        total_weight.new_zeros(()),
        "none",
        ignore_index,
        label_smoothing,
    )
    return _unfold_batch(grad_input, batch), 0


def _upsample_cross_entropy_vmap(
    info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    results = _map_serially(upsample_cross_entropy, info, in_dims, args)
    return tuple(torch.stack(r) for r in zip(*results, strict=True)), (0, 0, 0)


def _upsample_cross_entropy_backward_vmap(
    info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Tensor, int]:
    results = _map_serially(upsample_cross_entropy_backward, info, in_dims, args)
    return torch.stack(results), 0


def _upsample_argmax_vmap(
    info: Any, in_dims: tuple[Any, ...], input: Tensor, *options: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
    batch = info.batch_size
    label, confidence = upsample_argmax(_fold_batch(input, in_dims[0], batch), *options)
    if not options[-1]:
        return (_unfold_batch(label, batch), confidence), (0, None)
    return (_unfold_batch(label, batch), _unfold_batch(confidence, batch)), (0, 0)


_RULES: dict[str, Callable[..., Any]] = {
    "dilated_conv2d": _conv_vmap,
    "dilated_conv2d_grad_input": _conv_grad_input_vmap,
    "dilated_conv2d_grad_weight": _conv_grad_weight_vmap,
    "upsample_add": _upsample_add_vmap,
    "upsample_add_backward": _upsample_add_backward_vmap,
    "cross_entropy": _cross_entropy_vmap,
    "cross_entropy_backward": _cross_entropy_backward_vmap,
    "upsample_cross_entropy": _upsample_cross_entropy_vmap,
    "upsample_cross_entropy_backward": _upsample_cross_entropy_backward_vmap,
    "upsample_argmax": _upsample_argmax_vmap,
}

for _name, _vmap in _RULES.items():
    torch.library.register_vmap(f"dilseg::{_name}", _vmap)
