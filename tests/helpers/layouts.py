# SPDX-License-Identifier: Apache-2.0
"""Memory layouts a tensor can arrive in.

Each function takes contiguous values of rank 4 and returns a tensor in its layout. All but
``expanded`` keep the values.
"""

import torch
from torch import Tensor


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def channel_slice(x: Tensor) -> Tensor:
    """Some channels of a wider buffer, as in a concatenation; what surrounds them is nan."""
    n, c, h, w = x.shape
    wide = x.new_full((n, c + 5, h, w), float("nan"))
    wide[:, 2 : 2 + c] = x
    return wide[:, 2 : 2 + c]


def transposed(x: Tensor) -> Tensor:
    """Height and width exchanged in memory."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def expanded(x: Tensor) -> Tensor:
    """One image and one row, repeated by strides of zero. Changes the values."""
    return x[:1, :, :1].expand(x.shape) if x.numel() else x


def misaligned(x: Tensor) -> Tensor:
    """Contiguous, but starting one element after an aligned address."""
    buffer = x.new_full((x.numel() + 1,), float("nan"))
    buffer[1:] = x.flatten()
    return buffer[1:].view(x.shape)


def broadcast_scalar(x: Tensor) -> Tensor:
    """One number everywhere, as the gradient of ``sum()``. Changes the values."""
    return x.flatten()[:1].view(1, 1, 1, 1).expand(x.shape) if x.numel() else x


LAYOUTS = {
    f.__name__: f
    for f in (contiguous, channels_last, channel_slice, transposed, expanded, misaligned)
}
GRAD_LAYOUTS = LAYOUTS | {"broadcast_scalar": broadcast_scalar}
