# SPDX-License-Identifier: Apache-2.0
"""How many bytes the kernels of upsample_cross_entropy and upsample_argmax ask memory for."""

import pytest
import torch
from helpers import emulation
from helpers.samples import randn

RULE = ([8.0, 8.0], False, "clamp", [0, 0])
LOSS = ("mean", 255, 0.0)
C, H, W = 21, 32, 32

pytestmark = pytest.mark.skipif(
    emulation.why_no_emulator() is not None or emulation.VARIANT != "checked",
    reason="bytes are counted by the emulator's variant checked",
)


def size(tensor):
    return tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_and_gradient_stay_near_the_floor(dtype):
    with emulation.active():
        x = randn((1, C, H, W), dtype, "cpu")
        target = torch.randint(C, (1, 8 * H, 8 * W))
        with emulation.traffic() as forward:
            loss, total, grad = torch.ops.dilseg.upsample_cross_entropy(
                x, target, None, *RULE, *LOSS, True
            )
        with emulation.traffic() as backward:
            torch.ops.dilseg.upsample_cross_entropy_backward(
                torch.ones_like(loss), x, target, None, total, *RULE, *LOSS
            )
        with emulation.traffic() as without_gradient:
            torch.ops.dilseg.upsample_cross_entropy(x, target, None, *RULE, *LOSS, False)
    floor = size(target) + size(x)
    assert floor + size(grad) <= forward.total <= 1.5 * (floor + size(grad))
    assert floor + size(x) <= backward.total <= 1.5 * (floor + size(x))
    assert floor <= without_gradient.total <= 1.2 * floor
    # The logits at full resolution alone would be this much more.
    assert forward.total < C * target.numel()


@pytest.mark.parametrize("labels", [torch.int64, torch.uint8], ids=str)
def test_labels_are_written_once(labels):
    with emulation.active():
        x = randn((1, C, H, W), torch.float32, "cpu")
        with emulation.traffic() as counted:
            label, _ = torch.ops.dilseg.upsample_argmax(x, [8 * H, 8 * W], *RULE, labels, False)
    assert counted.written == size(label)
    # Neighbouring tiles share their rims: 45 of 32 rows and columns.
    assert size(x) <= counted.read <= 2 * size(x)
