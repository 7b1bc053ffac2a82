# SPDX-License-Identifier: Apache-2.0
"""Where the cells of a feature map lie on the image: strides, centres, receptive fields, crops.

Both model families need numbers that look like magic: crops of 19, 27, 31, 5 and 9, a margin of
186, receptive fields of 404 and 380. All of them follow from one rule per layer, kept here, so no
model hardcodes any. The rule is Caffe's ``coord_map.py``, which produced the published crops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

__all__ = ["PIXELS", "Grid", "leading_cells"]


@dataclass(frozen=True)
class Grid:
    """The positions of a feature map's cells along one image axis.

    Cell ``i`` is centred on pixel coordinate ``start + stride * i`` (pixel 0 is centred on 0) and
    depends on ``receptive_field`` pixels.

    Attributes:
        stride: Distance of neighbouring cells in pixels.
        start: Centre of cell 0 in pixels; negative where padding was added.
        receptive_field: Pixels (padding included) that one cell can see.

    Example:
        >>> grid = PIXELS.window(3, padding=1).window(2, stride=2)  # convolution, then pooling
        >>> grid.stride, grid.start, grid.receptive_field
        (Fraction(2, 1), Fraction(1, 2), 4)
    """

    stride: Fraction
    start: Fraction
    receptive_field: int

    def window(self, kernel: int, *, stride: int = 1, padding: int = 0, dilation: int = 1) -> Grid:
        """Grid after a convolution or a pooling of this size."""
        reach = dilation * (kernel - 1)
        return Grid(
            stride=self.stride * stride,
            start=self.start + self.stride * (Fraction(reach, 2) - padding),
            receptive_field=self.receptive_field + math.ceil(reach * self.stride),
        )

    def upsampled(self, kernel: int, stride: int, padding: int = 0) -> Grid:
        """Grid after a transposed convolution of this size."""
        step = self.stride / stride
        cells_seen = math.ceil(kernel / stride)
        return Grid(
            stride=step,
            start=self.start - step * (Fraction(kernel - 1, 2) - padding),
            receptive_field=self.receptive_field + math.ceil((cells_seen - 1) * self.stride),
        )


PIXELS = Grid(stride=Fraction(1), start=Fraction(0), receptive_field=1)
"""The grid of the image itself."""


def leading_cells(grid: Grid, reference: Grid) -> int:
    """Count the cells of ``grid`` that come before cell 0 of ``reference``.

    This is the crop offset that aligns a map with a reference; negative when ``grid`` starts later.

    Args:
        grid: The map to be cropped.
        reference: The map to align with; of equal stride.

    Returns:
        The signed number of cells.

    Raises:
        ValueError: The strides differ, or the two grids are apart by a fraction of a cell.

    Example:
        >>> leading_cells(PIXELS.window(3, padding=5), PIXELS)  # 5 - 1 positions hang over
        4
    """
    if grid.stride != reference.stride:
        raise ValueError(
            f"dilseg.models.leading_cells: expected maps of equal stride, but got {grid.stride} "
            f"and {reference.stride}. Upsample the coarser one first."
        )
    offset = (reference.start - grid.start) / grid.stride
    if offset.denominator != 1:
        raise ValueError(
            f"dilseg.models.leading_cells: expected maps a whole number of cells apart, but got "
            f"{offset} cells. Change a padding or a kernel by one."
        )
    return int(offset)
