# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of strides, centres and crops."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from dilseg.models.backbones import Layer, grids, output_size
from dilseg.models.geometry import PIXELS, leading_cells


def test_grid_of_a_convolution_and_of_its_transpose_cancel():
    grid = PIXELS.window(4, stride=2, padding=1)
    back = grid.upsampled(4, stride=2, padding=1)
    assert (back.stride, back.start) == (PIXELS.stride, PIXELS.start)
    assert grid.start == Fraction(1, 2)


def test_leading_cells_counts_both_ways():
    padded = PIXELS.window(3, padding=4)
    assert leading_cells(padded, PIXELS) == 3
    assert leading_cells(PIXELS, padded) == -3


def test_leading_cells_wants_comparable_maps():
    with pytest.raises(ValueError, match="equal stride, but got 2 and 1"):
        leading_cells(PIXELS.window(2, stride=2), PIXELS)
    with pytest.raises(ValueError, match="whole number of cells apart, but got -1/2 cells"):
        leading_cells(PIXELS.window(2), PIXELS)


@pytest.mark.parametrize(
    "layers",
    [
        [Layer("a", 3, 1, padding=1), Layer("p", 2, stride=2)],
        [Layer("a", 5, 1, padding=3, stride=2), Layer("b", 3, 1, dilation=3)],
        [Layer("p", 3, stride=2), Layer("q", 2, stride=2), Layer("a", 1, 1)],
    ],
    ids=["same", "dilated", "pools"],
)
def test_output_size_is_what_torch_gives(layers):
    for size in range(1, 40):
        x = torch.zeros(1, 1, size, size)
        try:
            for layer in layers:
                if layer.channels is None:
                    x = F.max_pool2d(x, layer.kernel, layer.stride, ceil_mode=True)
                else:
                    weight = torch.zeros(1, 1, layer.kernel, layer.kernel)
                    x = F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)
            expected = x.shape[-1]
        except RuntimeError:
            expected = 0
        assert max(0, output_size(layers, size)) == expected, size


def test_grids_follow_the_layers():
    table = [Layer("a", 3, 1, padding=1), Layer("p", 2, stride=2), Layer("b", 3, 1, dilation=2)]
    found = grids(table)
    assert list(found) == ["a", "p", "b"]
    assert [grid.receptive_field for grid in found.values()] == [3, 4, 12]
    assert [grid.start for grid in found.values()] == [0, Fraction(1, 2), Fraction(9, 2)]
