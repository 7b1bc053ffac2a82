# SPDX-License-Identifier: Apache-2.0
"""The operators again, slowly, in float64 and from their definitions; for comparison only.

Nothing here uses autograd or a torch function that computes the operator itself.
"""

import math

import torch
from torch import Tensor


def conv2d(input, weight, bias, stride, padding, dilation, groups) -> Tensor:
    """Convolution as a sum over window taps; padding = (vertical, horizontal)."""
    x, w = input.double(), weight.double()
    n, c_in, h_in, w_in = x.shape
    c_out, c_group, k_h, k_w = w.shape
    h_out = (h_in + 2 * padding[0] - dilation[0] * (k_h - 1) - 1) // stride[0] + 1
    w_out = (w_in + 2 * padding[1] - dilation[1] * (k_w - 1) - 1) // stride[1] + 1
    padded = x.new_zeros(n, c_in, h_in + 2 * padding[0], w_in + 2 * padding[1])
    padded[:, :, padding[0] : padding[0] + h_in, padding[1] : padding[1] + w_in] = x
    out = x.new_zeros(n, c_out, h_out, w_out)
    o_group = c_out // groups
    for g in range(groups):
        for i in range(k_h):
            for j in range(k_w):
                seen = _tap(padded, i, j, h_out, w_out, stride, dilation)
                seen = seen[:, g * c_group : (g + 1) * c_group]
                taps = w[g * o_group : (g + 1) * o_group, :, i, j]
                out[:, g * o_group : (g + 1) * o_group] += torch.einsum("oc,nchw->nohw", taps, seen)
    return out if bias is None else out + bias.double().view(1, -1, 1, 1)


def _tap(padded, i, j, h_out, w_out, stride, dilation) -> Tensor:
    """The pixels that window tap (i, j) meets, one per output pixel; a view."""
    top, left = i * dilation[0], j * dilation[1]
    return padded[
        :,
        :,
        top : top + (h_out - 1) * stride[0] + 1 : stride[0],
        left : left + (w_out - 1) * stride[1] + 1 : stride[1],
    ]


def conv2d_grad_input(grad_output, weight, input_size, stride, padding, dilation, groups) -> Tensor:
    """Every output gradient scattered to the inputs that made the output."""
    g, w = grad_output.double(), weight.double()
    n, c_out, h_out, w_out = g.shape
    _, c_group, k_h, k_w = w.shape
    h_in, w_in = input_size
    padded = g.new_zeros(n, c_group * groups, h_in + 2 * padding[0], w_in + 2 * padding[1])
    o_group = c_out // groups
    for k in range(groups):
        for i in range(k_h):
            for j in range(k_w):
                taps = w[k * o_group : (k + 1) * o_group, :, i, j]
                part = torch.einsum("oc,nohw->nchw", taps, g[:, k * o_group : (k + 1) * o_group])
                seen = _tap(padded, i, j, h_out, w_out, stride, dilation)
                seen[:, k * c_group : (k + 1) * c_group] += part
    return padded[:, :, padding[0] : padding[0] + h_in, padding[1] : padding[1] + w_in]


def conv2d_grad_weight(
    grad_output, input, kernel_size, stride, padding, dilation, groups
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias, one window tap at a time."""
    g, x = grad_output.double(), input.double()
    n, c_in, h_in, w_in = x.shape
    c_out, h_out, w_out = g.shape[1:]
    padded = x.new_zeros(n, c_in, h_in + 2 * padding[0], w_in + 2 * padding[1])
    padded[:, :, padding[0] : padding[0] + h_in, padding[1] : padding[1] + w_in] = x
    c_group, o_group = c_in // groups, c_out // groups
    grad_weight = g.new_zeros(c_out, c_group, *kernel_size)
    for k in range(groups):
        for i in range(kernel_size[0]):
            for j in range(kernel_size[1]):
                seen = _tap(padded, i, j, h_out, w_out, stride, dilation)
                grad_weight[k * o_group : (k + 1) * o_group, :, i, j] = torch.einsum(
                    "nohw,nchw->oc",
                    g[:, k * o_group : (k + 1) * o_group],
                    seen[:, k * c_group : (k + 1) * c_group],
                )
    return grad_weight, g.sum((0, 2, 3))


def interpolation_matrix(
    length, out_length, scale, align_corners, border, origin=0, device="cpu"
) -> Tensor:
    """[out_length, length] matrix that resamples one axis linearly."""
    full = math.floor(length * scale) if scale else out_length
    if align_corners:
        ratio = (length - 1) / (full - 1) if full > 1 else 0.0
    else:
        ratio = 1 / scale if scale else length / out_length
    matrix = torch.zeros(out_length, length, dtype=torch.float64)
    for y in range(out_length):
        position = (y + origin) * ratio if align_corners else (y + origin + 0.5) * ratio - 0.5
        low = math.floor(position)
        for tap, share in ((low, 1 - (position - low)), (low + 1, position - low)):
            if border == "clamp":
                matrix[y, min(max(tap, 0), length - 1)] += share
            elif 0 <= tap < length:
                matrix[y, tap] += share
    return matrix.to(device)


def upsample(input, output_size, scales, align_corners, border, origin=(0, 0)) -> Tensor:
    """Bilinear resampling as a product with one matrix per axis."""
    rows, columns = _axes(input, output_size, scales, align_corners, border, origin)
    return rows @ input.double() @ columns.T


def upsample_grad(grad_output, input_size, scales, align_corners, border, origin=(0, 0)) -> Tensor:
    """The transposed product."""
    blank = grad_output.new_empty(0, 0, *input_size)
    size = tuple(grad_output.shape[-2:])
    rows, columns = _axes(blank, size, scales, align_corners, border, origin)
    return rows.T @ grad_output.double() @ columns


def _axes(input, output_size, scales, align_corners, border, origin) -> list[Tensor]:
    scales = scales or (None, None)
    return [
        interpolation_matrix(
            input.shape[2 + a],
            output_size[a],
            scales[a],
            align_corners,
            border,
            origin[a],
            input.device,
        )
        for a in range(2)
    ]


def cross_entropy(
    input, target, weight, ignore_index, reduction, label_smoothing, grad_output=None
) -> tuple[Tensor, Tensor]:
    """Loss and its gradient with respect to ``input``, pixel by pixel in Python numbers."""
    n, c, h, w = input.shape
    class_weight = [1.0] * c if weight is None else weight.double().tolist()
    labels = target.tolist()
    logits = input.detach().double().permute(0, 2, 3, 1).tolist()
    losses = torch.zeros(n, h, w, dtype=torch.float64)
    grads = torch.zeros(n, h, w, c, dtype=torch.float64)
    total_weight = 0.0
    soft = [label_smoothing / c * v for v in class_weight]
    for i, y, x in ((i, y, x) for i in range(n) for y in range(h) for x in range(w)):
        label = labels[i][y][x]
        if label == ignore_index:
            continue
        z = logits[i][y][x]
        top = max(z)
        lse = top + math.log(math.fsum(math.exp(v - top) for v in z))
        wanted = list(soft)
        wanted[label] += (1 - label_smoothing) * class_weight[label]
        total = math.fsum(wanted)
        losses[i, y, x] = math.fsum(t * (lse - v) for t, v in zip(wanted, z, strict=True))
        grads[i, y, x] = torch.tensor(
            [total * math.exp(v - lse) - t for t, v in zip(wanted, z, strict=True)],
            dtype=torch.float64,
        )
        total_weight += class_weight[label]
    scale = torch.ones(()) if grad_output is None else grad_output.double().cpu()
    loss = losses
    if reduction != "none":
        loss = losses.sum()
    if reduction == "mean":
        loss = loss / total_weight if total_weight else loss * float("nan")
        scale = scale / total_weight if total_weight else scale * 0
    scale = scale.unsqueeze(-1) if scale.dim() else scale
    grad = (grads * scale).permute(0, 3, 1, 2)
    return loss.to(input.device), grad.to(input.device)
