# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: ANN401  (torch hands out contexts, and takes operators, of no public type)
"""Autograd formulas and vmap rules of the operators in ``torch.ops.dilseg``.

The binary defines the schemas and, per dispatch key, the CPU, CUDA, Meta and Autocast kernels. What
is left is added here, from registered operators and differentiable ATen operators only, so that
every formula can be traced, differentiated again and vectorised:

* ``dilated_conv2d``, ``dilated_conv2d_grad_input`` and ``dilated_conv2d_grad_weight`` are the three
  partial maps of one trilinear form, hence closed under differentiation: each gradient is another
  of the three.
* ``upsample_add`` is linear, ``upsample_add_backward`` is its transpose, and the gradient of either
  is the other.
* ``cross_entropy_backward`` and ``upsample_cross_entropy_backward`` are differentiated by a
  composite formula (:func:`_loss_second_order`).

A formula never computes a gradient nobody asked for, and saves only what the gradients that were
asked for need. Output gradients may be ``None``, expanded or of any layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Loading the binary is what defines torch.ops.dilseg.
from dilseg import _extension as _extension

_aten = torch.ops.aten
_dilated_conv2d = torch.ops.dilseg.dilated_conv2d.default
_dilated_conv2d_grad_input = torch.ops.dilseg.dilated_conv2d_grad_input.default
_dilated_conv2d_grad_weight = torch.ops.dilseg.dilated_conv2d_grad_weight.default
_upsample_add = torch.ops.dilseg.upsample_add.default
_upsample_add_backward = torch.ops.dilseg.upsample_add_backward.default
_cross_entropy = torch.ops.dilseg.cross_entropy.default
_cross_entropy_backward = torch.ops.dilseg.cross_entropy_backward.default
_upsample_cross_entropy = torch.ops.dilseg.upsample_cross_entropy.default
_upsample_cross_entropy_backward = torch.ops.dilseg.upsample_cross_entropy_backward.default
_upsample_argmax = torch.ops.dilseg.upsample_argmax.default

Grad = Tensor | None


# --------------------------------------------------------------------------------------------------
# Dilated convolution: autograd
# --------------------------------------------------------------------------------------------------


def _conv_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, stride, padding, dilation, groups, activation = inputs
    needs_input, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(
        input if needs_weight else None,
        weight if needs_input else None,
        output if activation is not None else None,
    )
    ctx.set_materialize_grads(False)
    ctx.input_size = input.shape[-2:]
    ctx.kernel_size = weight.shape[-2:]
    ctx.geometry = (stride, padding, dilation, groups)


def _conv_backward(ctx: Any, grad_output: Grad) -> tuple[Grad | None, ...]:
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_input: Grad = None
    grad_weight: Grad = None
    grad_bias: Grad = None
    if grad_output is not None:
        input, weight, output = ctx.saved_tensors
        if output is not None:
            # The ReLU's mask is piecewise constant: detached, it sends no zero gradients around the
            # graph again when this formula is itself differentiated.
            grad_output = _aten.threshold_backward(grad_output, output.detach(), 0)
        if needs_input:
            grad_input = _dilated_conv2d_grad_input(
                grad_output, weight, ctx.input_size, *ctx.geometry
            )
        if needs_weight:
            grad_weight, grad_bias = _dilated_conv2d_grad_weight(
                grad_output, input, ctx.kernel_size, *ctx.geometry, needs_bias
            )
        elif needs_bias:
            grad_bias = grad_output.sum((0, 2, 3))
    return (grad_input, grad_weight, grad_bias if needs_bias else None, *(None,) * 5)


def _conv_grad_input_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, weight, _, stride, padding, dilation, groups = inputs
    needs_grad_output, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(
        grad_output if needs_weight else None, weight if needs_grad_output else None
    )
    ctx.set_materialize_grads(False)
    ctx.kernel_size = weight.shape[-2:]
    ctx.geometry = (stride, padding, dilation, groups)


def _conv_grad_input_backward(ctx: Any, grad: Grad) -> tuple[Grad | None, ...]:
    needs_grad_output, needs_weight = ctx.needs_input_grad[:2]
    grad_grad_output: Grad = None
    grad_weight: Grad = None
    if grad is not None:
        grad_output, weight = ctx.saved_tensors
        if needs_grad_output:
            grad_grad_output = _dilated_conv2d(grad, weight, None, *ctx.geometry, None)
        if needs_weight:
            grad_weight, _ = _dilated_conv2d_grad_weight(
                grad_output, grad, ctx.kernel_size, *ctx.geometry, False
            )
    return (grad_grad_output, grad_weight, *(None,) * 5)


def _conv_grad_weight_setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    grad_output, input, _, stride, padding, dilation, groups, bias = inputs
    needs_grad_output, needs_input = ctx.needs_input_grad[:2]
    ctx.save_for_backward(
        grad_output if needs_input else None, input if needs_grad_output else None
    )
    ctx.set_materialize_grads(False)
    if not bias:
        ctx.mark_non_differentiable(output[1])
    ctx.input_size = input.shape[-2:]
    ctx.grad_output_shape = grad_output.shape
    ctx.geometry = (stride, padding, dilation, groups)


def _conv_grad_weight_backward(
    ctx: Any, grad_grad_weight: Grad, grad_grad_bias: Grad
) -> tuple[Grad | None, ...]:
    needs_grad_output, needs_input = ctx.needs_input_grad[:2]
    grad_output, input = ctx.saved_tensors
    grad_grad_output: Grad = None
    grad_input: Grad = None
    if needs_grad_output:
        if grad_grad_weight is not None:
            grad_grad_output = _dilated_conv2d(
                input, grad_grad_weight, grad_grad_bias, *ctx.geometry, None
            )
        elif grad_grad_bias is not None:
            grad_grad_output = grad_grad_bias.view(1, -1, 1, 1).expand(ctx.grad_output_shape)
    if needs_input and grad_grad_weight is not None:
        grad_input = _dilated_conv2d_grad_input(
            grad_output, grad_grad_weight, ctx.input_size, *ctx.geometry
        )
    return (grad_grad_output, grad_input, *(None,) * 6)


# --------------------------------------------------------------------------------------------------
# Upsample and add: autograd
# --------------------------------------------------------------------------------------------------


def _upsample_add_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, skip, output_size, scale_factors, align_corners, border, offset, origin = inputs
    ctx.set_materialize_grads(False)
    ctx.input_size = input.shape[-2:]
    ctx.skip_size = None if skip is None else skip.shape[-2:]
    ctx.output_size = output_size
    ctx.offset = offset
    ctx.rule = (scale_factors, align_corners, border, origin)


def _upsample_add_backward_formula(ctx: Any, grad_output: Grad) -> tuple[Grad | None, ...]:
    needs_input, needs_skip = ctx.needs_input_grad[:2]
    grad_input: Grad = None
    grad_skip: Grad = None
    if grad_output is not None:
        if needs_input:
            grad_input = _upsample_add_backward(grad_output, ctx.input_size, *ctx.rule)
        if needs_skip:
            grad_skip = _pad_to_skip(grad_output, ctx.skip_size, ctx.output_size, ctx.offset)
    return (grad_input, grad_skip, *(None,) * 6)


def _pad_to_skip(
    grad_output: Tensor, skip_size: Sequence[int], output_size: Sequence[int], offset: Sequence[int]
) -> Tensor:
    """Surrounds ``grad_output`` by the zeros that the uncropped part of the skip receives."""
    top, left = offset
    bottom = skip_size[0] - output_size[0] - top
    right = skip_size[1] - output_size[1] - left
    if top == 0 and left == 0 and bottom == 0 and right == 0:
        return grad_output
    return torch.nn.functional.pad(grad_output, (left, right, top, bottom))


def _upsample_add_backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, _, scale_factors, align_corners, border, origin = inputs
    ctx.set_materialize_grads(False)
    ctx.output_size = grad_output.shape[-2:]
    ctx.rule = (scale_factors, align_corners, border)
    ctx.origin = origin


def _upsample_add_backward_backward(ctx: Any, grad: Grad) -> tuple[Grad | None, ...]:
    grad_grad_output: Grad = None
    if grad is not None and ctx.needs_input_grad[0]:
        grad_grad_output = _upsample_add(grad, None, ctx.output_size, *ctx.rule, (0, 0), ctx.origin)
    return (grad_grad_output, *(None,) * 5)


# --------------------------------------------------------------------------------------------------
# Cross entropy: autograd
# --------------------------------------------------------------------------------------------------


def _cross_entropy_setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    input, target, weight, reduction, ignore_index, label_smoothing = inputs
    if ctx.needs_input_grad[2]:
        raise NotImplementedError(
            "dilseg::cross_entropy: expected weight without requires_grad, but got a weight that "
            "requires a gradient. The loss is not differentiable with respect to its class "
            "weights; pass weight.detach()."
        )
    _, logsumexp, total_weight = output
    ctx.mark_non_differentiable(logsumexp, total_weight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, target, weight, logsumexp, total_weight)
    ctx.options = (reduction, ignore_index, label_smoothing)


def _cross_entropy_backward_formula(
    ctx: Any, grad_loss: Grad, _logsumexp: Grad, _total_weight: Grad
) -> tuple[Grad | None, ...]:
    grad_input: Grad = None
    if grad_loss is not None and ctx.needs_input_grad[0]:
        grad_input = _cross_entropy_backward(grad_loss, *ctx.saved_tensors, *ctx.options)
    return (grad_input, *(None,) * 5)


def _cross_entropy_backward_setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: Tensor
) -> None:
    grad_output, input, target, weight, _, total_weight, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_output, input, target, weight, total_weight)
    ctx.options = options


def _valid_target(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Returns the mask of valid pixels and int64 labels that are safe to index with."""
    # Widened before the comparison: an ignore_index of -100 would wrap around in uint8.
    target = target.long()
    valid = target != ignore_index
    return valid, torch.where(valid, target, 0)


def _cross_entropy_backward_backward(ctx: Any, grad: Grad) -> tuple[Grad | None, ...]:
    needs_grad_output, needs_input = ctx.needs_input_grad[:2]
    grad_grad_output: Grad = None
    grad_input: Grad = None
    if grad is not None and (needs_grad_output or needs_input):
        grad_grad_output, grad_input = _loss_second_order(grad, *ctx.saved_tensors, *ctx.options)
        grad_input = grad_input.to(ctx.saved_tensors[1].dtype)
    return (
        grad_grad_output if needs_grad_output else None,
        grad_input if needs_input else None,
        *(None,) * 7,
    )


def _loss_second_order(
    grad: Tensor,
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total_weight: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of a loss's gradient with respect to ``grad_output`` (g) and ``input``.

    With class weights v, V = sum_c v_c, smoothing s over C classes, p = softmax(input) and label y,
    a valid pixel of the backward operator holds

        g * (a * p_c - b_c),  a = (1 - s) v_y + (s / C) V,  b_c = (1 - s) v_y [c = y] + (s / C) v_c

    so that, for an incoming G_c, the gradients are

        grad_g = sum_c G_c (a p_c - b_c)        grad_input_c = g a p_c (G_c - sum_k p_k G_k).

    p is recomputed from ``input`` rather than from the saved logsumexp, which carries no gradient:
    derivatives of any order are right. Both results have the dtype of ``grad_output``.
    """
    classes = input.shape[1]
    dtype = grad_output.dtype
    # Over no valid pixel the operator's result is 0, and so are its derivatives.
    total_weight = torch.where(total_weight == 0, 1, total_weight)

    valid, label = _valid_target(target, ignore_index)
    mask = valid.unsqueeze(1)
    # Ignored pixels may hold anything, nan included; zeros in their place keep every product below
    # finite.
    prob = torch.softmax(torch.where(mask, input, 0).to(dtype), 1)
    grad = torch.where(mask, grad, 0).to(dtype)
    weight = (
        torch.ones(classes, dtype=dtype, device=input.device)
        if weight is None
        else weight.to(dtype)
    )

    hard = (1 - label_smoothing) * weight[label].unsqueeze(1)
    soft = label_smoothing / classes * weight.view(1, -1, 1, 1)
    a = hard + soft.sum()

    weighted_grad = (grad * (a * prob - soft)).sum(1)
    picked = (grad.gather(1, label.unsqueeze(1)) * hard).squeeze(1)
    grad_grad_output = torch.where(valid, weighted_grad - picked, 0)
    if reduction != "none":
        grad_grad_output = grad_grad_output.sum()
    if reduction == "mean":
        grad_grad_output = grad_grad_output / total_weight
    scale = grad_output.unsqueeze(1) if reduction == "none" else grad_output
    if reduction == "mean":
        scale = scale / total_weight
    centred = grad - (prob * grad).sum(1, keepdim=True)
    grad_input = torch.where(mask, scale * a * prob * centred, 0)
    return grad_grad_output, grad_input


# --------------------------------------------------------------------------------------------------
# Upsample and cross entropy: autograd
# --------------------------------------------------------------------------------------------------


def _upsample_cross_entropy_setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    input, target, weight, *options, gradient = inputs
    if ctx.needs_input_grad[2]:
        raise NotImplementedError(
            "dilseg::upsample_cross_entropy: expected weight without requires_grad, but got a "
            "weight that requires a gradient. The loss is not differentiable with respect to its "
            "class weights; pass weight.detach()."
        )
    _, total_weight, sum_grad = output
    ctx.mark_non_differentiable(total_weight, sum_grad)
    ctx.set_materialize_grads(False)
    ctx.options = options
    ctx.has_sum_grad = gradient and ctx.options[4] != "none"
    ctx.save_for_backward(input, target, weight, total_weight, sum_grad)


def _upsample_cross_entropy_backward_formula(
    ctx: Any, grad_loss: Grad, _total_weight: Grad, _sum_grad: Grad
) -> tuple[Grad | None, ...]:
    grad_input: Grad = None
    if grad_loss is not None and ctx.needs_input_grad[0]:
        input, target, weight, total_weight, sum_grad = ctx.saved_tensors
        if ctx.has_sum_grad and not torch.is_grad_enabled():
            if ctx.options[4] == "mean":
                # Nothing labelled: the gradient is 0, not 0 * inf.
                grad_loss = torch.where(total_weight == 0, 0, grad_loss / total_weight)
            grad_input = (sum_grad * grad_loss).to(input.dtype)
        else:
            # With create_graph, and for losses of single pixels: an operator that can be
            # differentiated again. It gives the same bits.
            grad_input = _upsample_cross_entropy_backward(
                grad_loss, input, target, weight, total_weight, *ctx.options
            )
    return (grad_input, *(None,) * 10)


def _upsample_cross_entropy_backward_setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: Tensor
) -> None:
    grad_output, input, target, weight, total_weight, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_output, input, target, weight, total_weight)
    ctx.options = options


def _upsample_cross_entropy_backward_backward(ctx: Any, grad: Grad) -> tuple[Grad | None, ...]:
    """The backward operator is U^T B(g, U x), U the upsampling, B that of ``cross_entropy``."""
    needs_grad_output, needs_input = ctx.needs_input_grad[:2]
    grad_grad_output: Grad = None
    grad_input: Grad = None
    if grad is not None and (needs_grad_output or needs_input):
        grad_output, input, target, weight, total_weight = ctx.saved_tensors
        scale_factors, align_corners, border, origin, *loss_options = ctx.options
        rule = (scale_factors, align_corners, border)

        def upsample(x: Tensor) -> Any:
            x = x.to(grad_output.dtype)
            return _upsample_add(x, None, target.shape[-2:], *rule, (0, 0), origin)

        grad_grad_output, grad_logits = _loss_second_order(
            upsample(grad),
            grad_output,
            upsample(input),
            target,
            weight,
            total_weight,
            *loss_options,
        )
        if needs_input:
            grad_input = _upsample_add_backward(grad_logits, input.shape[-2:], *rule, origin)
            grad_input = grad_input.to(input.dtype)
    return (
        grad_grad_output if needs_grad_output else None,
        grad_input,
        *(None,) * 10,
    )


def _upsample_argmax_setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    ctx.mark_non_differentiable(*output)


def _upsample_argmax_backward_formula(
    ctx: Any, _label: Grad, _confidence: Grad
) -> tuple[Grad | None, ...]:
    return (None,) * 8


# --------------------------------------------------------------------------------------------------
# vmap: a mapped dimension is folded into the batch where the operator treats images alike, into
# groups where it carries its own weights.
# --------------------------------------------------------------------------------------------------


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
        out = _dilated_conv2d(folded, weight, bias, *geometry, groups, activation)
        return _unfold_batch(out, batch), 0

    weight = _front(weight, weight_dim, batch)
    c_out = weight.shape[1]
    bias = None if bias is None else _front(bias, bias_dim, batch)
    if input_dim is not None:
        out = _dilated_conv2d(
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
    out = _dilated_conv2d(input, by_group(weight), bias, *geometry, groups, activation)
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
        out = _dilated_conv2d_grad_input(folded, weight, *geometry, groups)
        return _unfold_batch(out, batch), 0
    out = _dilated_conv2d_grad_input(
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
    grad_weight, grad_bias = _dilated_conv2d_grad_weight(
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
    out = _upsample_add(_fold_batch(input, in_dims[0], batch), folded_skip, *options)
    return _unfold_batch(out, batch), 0


def _upsample_add_backward_vmap(
    info: Any, in_dims: tuple[Any, ...], grad_output: Tensor, *options: Any
) -> tuple[Tensor, int]:
    batch = info.batch_size
    out = _upsample_add_backward(_fold_batch(grad_output, in_dims[0], batch), *options)
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
        results = _map_serially(_cross_entropy, info, in_dims, args)
        return tuple(torch.stack(r) for r in zip(*results, strict=True)), (0, 0, 0)

    batch = info.batch_size
    target = _front(target, in_dims[1], batch)
    loss, logsumexp, _ = _cross_entropy(
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
        results = _map_serially(_cross_entropy_backward, info, in_dims, args)
        return torch.stack(results), 0

    batch = info.batch_size
    target = _front(target, in_dims[2], batch)
    grad_output = _front(grad_output, in_dims[0], batch)
    if reduction == "mean":
        grad_output = grad_output / _front(total_weight, in_dims[5], batch)
    if reduction != "none":
        grad_output = grad_output.view(-1, 1, 1, 1).expand(target.shape)
    grad_input = _cross_entropy_backward(
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
    results = _map_serially(_upsample_cross_entropy, info, in_dims, args)
    return tuple(torch.stack(r) for r in zip(*results, strict=True)), (0, 0, 0)


def _upsample_cross_entropy_backward_vmap(
    info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Tensor, int]:
    results = _map_serially(_upsample_cross_entropy_backward, info, in_dims, args)
    return torch.stack(results), 0


def _upsample_argmax_vmap(
    info: Any, in_dims: tuple[Any, ...], input: Tensor, *options: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
    batch = info.batch_size
    label, confidence = _upsample_argmax(_fold_batch(input, in_dims[0], batch), *options)
    if not options[-1]:
        return (_unfold_batch(label, batch), confidence), (0, None)
    return (_unfold_batch(label, batch), _unfold_batch(confidence, batch)), (0, 0)


# --------------------------------------------------------------------------------------------------
# Registration
# --------------------------------------------------------------------------------------------------

_RULES: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "dilated_conv2d": (_conv_setup_context, _conv_backward, _conv_vmap),
    "dilated_conv2d_grad_input": (
        _conv_grad_input_setup_context,
        _conv_grad_input_backward,
        _conv_grad_input_vmap,
    ),
    "dilated_conv2d_grad_weight": (
        _conv_grad_weight_setup_context,
        _conv_grad_weight_backward,
        _conv_grad_weight_vmap,
    ),
    "upsample_add": (
        _upsample_add_setup_context,
        _upsample_add_backward_formula,
        _upsample_add_vmap,
    ),
    "upsample_add_backward": (
        _upsample_add_backward_setup_context,
        _upsample_add_backward_backward,
        _upsample_add_backward_vmap,
    ),
    "cross_entropy": (
        _cross_entropy_setup_context,
        _cross_entropy_backward_formula,
        _cross_entropy_vmap,
    ),
    "cross_entropy_backward": (
        _cross_entropy_backward_setup_context,
        _cross_entropy_backward_backward,
        _cross_entropy_backward_vmap,
    ),
    "upsample_cross_entropy": (
        _upsample_cross_entropy_setup_context,
        _upsample_cross_entropy_backward_formula,
        _upsample_cross_entropy_vmap,
    ),
    "upsample_cross_entropy_backward": (
        _upsample_cross_entropy_backward_setup_context,
        _upsample_cross_entropy_backward_backward,
        _upsample_cross_entropy_backward_vmap,
    ),
    "upsample_argmax": (
        _upsample_argmax_setup_context,
        _upsample_argmax_backward_formula,
        _upsample_argmax_vmap,
    ),
}

for _name, (_setup_context, _backward, _vmap) in _RULES.items():
    torch.library.register_autograd(f"dilseg::{_name}", _backward, setup_context=_setup_context)
    torch.library.register_vmap(f"dilseg::{_name}", _vmap)
