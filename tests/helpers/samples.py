# SPDX-License-Identifier: Apache-2.0
"""Sample problems of every operator. The name of a case is its reason."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def randn(shape, dtype, device, *, seed=0) -> Tensor:
    """Normal values, drawn in float64 on the CPU: the same on every device, in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tuple(shape), dtype=torch.float64, generator=generator)
    return values.to(dtype).to(device)


@dataclass(frozen=True)
class ConvCase:
    name: str
    n: int = 2
    c_in: int = 5
    h_in: int = 13
    w_in: int = 17
    c_out: int = 7
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = True

    @property
    def geometry(self):
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def output_shape(self):
        size = [
            (length + 2 * p - d * (k - 1) - 1) // s + 1
            for length, k, s, p, d in zip(
                (self.h_in, self.w_in),
                self.kernel,
                self.stride,
                self.padding,
                self.dilation,
                strict=True,
            )
        ]
        return (self.n, self.c_out, *size)

    @property
    def depth(self):
        """Terms in the sum behind one output."""
        return self.c_in // self.groups * self.kernel[0] * self.kernel[1]

    def tensors(self, dtype, device):
        """Returns input, weight and bias or None; outputs are of size one or so."""
        shape = (self.c_out, self.c_in // self.groups, *self.kernel)
        x = randn((self.n, self.c_in, self.h_in, self.w_in), dtype, device, seed=1)
        w = (randn(shape, torch.float64, device, seed=2) / self.depth**0.5).to(dtype)
        return x, w, randn((self.c_out,), dtype, device, seed=3) if self.bias else None

    def grad_output(self, dtype, device):
        return randn(self.output_shape, dtype, device, seed=4)


CONV_CASES = [
    ConvCase("one_pixel_1x1", h_in=1, w_in=1, kernel=(1, 1)),
    ConvCase("one_pixel_padded", h_in=1, w_in=1, padding=(1, 1)),
    ConvCase("prime_sizes_dilated", padding=(2, 2), dilation=(2, 2)),
    ConvCase("dilation_larger_than_map", h_in=5, w_in=7, padding=(8, 8), dilation=(8, 8)),
    ConvCase("context_dilation_16", n=1, h_in=19, w_in=33, padding=(16, 16), dilation=(16, 16)),
    ConvCase("wide_map", h_in=3, w_in=67, kernel=(3, 5), padding=(1, 2)),
    ConvCase("tall_map", h_in=61, w_in=2, kernel=(5, 1), padding=(2, 0), dilation=(3, 1)),
    ConvCase("tile_minus_one", n=1, c_in=3, h_in=15, w_in=31, c_out=4, padding=(1, 1)),
    ConvCase("tile_plus_one", n=1, c_in=3, h_in=17, w_in=33, c_out=4, padding=(1, 1)),
    ConvCase("stride_leaves_a_rest", h_in=14, w_in=18, stride=(2, 3), padding=(1, 1)),
    ConvCase("stride_and_dilation", stride=(2, 2), padding=(3, 3), dilation=(3, 3)),
    ConvCase(
        "every_axis_differs",
        kernel=(3, 2),
        stride=(1, 2),
        padding=(4, 1),
        dilation=(2, 3),
    ),
    ConvCase("stride_skips_inputs", kernel=(1, 1), stride=(3, 2)),
    ConvCase("groups", c_in=6, c_out=9, groups=3, padding=(2, 2), dilation=(2, 2)),
    ConvCase("depthwise", c_in=8, c_out=8, groups=8, padding=(4, 4), dilation=(4, 4)),
    ConvCase("depthwise_multiplier", c_in=4, c_out=12, groups=4, padding=(1, 1), bias=False),
    ConvCase("five_by_five", kernel=(5, 5), padding=(4, 4), dilation=(2, 2)),
    ConvCase("fc6_7x7_dilation_4", n=1, h_in=27, w_in=25, kernel=(7, 7), dilation=(4, 4)),
    ConvCase("even_window", kernel=(2, 4), padding=(1, 2), dilation=(2, 1)),
    ConvCase("window_equals_padded_map", h_in=3, w_in=5, kernel=(3, 5), bias=False),
    ConvCase("padding_beyond_the_window", h_in=4, w_in=3, kernel=(1, 1), padding=(3, 2)),
    ConvCase("voc_channels", n=1, c_in=21, h_in=9, w_in=11, c_out=21, padding=(1, 1)),
    ConvCase("long_sum", n=1, c_in=131, h_in=6, w_in=5, c_out=3, padding=(1, 1)),
    ConvCase("batch_0", n=0),
    ConvCase("batch_33", n=33, c_in=2, h_in=5, w_in=4, c_out=3, padding=(1, 1)),
]
CONV = {case.name: case for case in CONV_CASES}


def _depthwise(name, c, h, w, *, fan=1, n=1, **geometry) -> ConvCase:
    return ConvCase(name, n=n, c_in=c, h_in=h, w_in=w, c_out=fan * c, groups=c, **geometry)


# One input channel per group; what a name says is a branch of csrc/cuda/dilated_conv2d/depthwise.h.
DEPTHWISE_CASES = [
    _depthwise("one_pixel", 5, 1, 1, padding=(1, 1)),
    _depthwise("one_pixel_of_many_channels", 264, 1, 1, n=3, padding=(1, 1)),
    _depthwise("one_channel", 1, 9, 11, n=3, fan=3, padding=(1, 1)),
    _depthwise("three_channels", 3, 11, 13, n=3, padding=(2, 2), dilation=(2, 2)),
    _depthwise("voc_channels", 21, 9, 7, padding=(1, 1)),
    _depthwise("first_channel_beyond_a_run", 33, 9, 5, padding=(1, 1)),
    _depthwise("odd_channels", 65, 5, 6, padding=(1, 1)),
    _depthwise("vectors", 16, 11, 13, padding=(2, 2), dilation=(2, 2)),
    _depthwise("vectors_off_packets", 12, 9, 7, n=2, padding=(1, 1)),
    _depthwise("rows_of_a_thread_minus_one", 8, 3, 16, padding=(1, 1)),
    _depthwise("rows_of_a_thread_plus_one", 8, 9, 17, padding=(1, 1)),
    _depthwise("dilation_larger_than_map", 4, 5, 7, padding=(8, 8), dilation=(8, 8)),
    _depthwise("rows_in_phases", 32, 31, 6, padding=(5, 3), dilation=(5, 3)),
    _depthwise("several_tiles", 8, 37, 67, padding=(1, 1), bias=False),
    _depthwise("stride_2", 8, 12, 15, stride=(2, 2), padding=(1, 1)),
    _depthwise("stride_3_with_a_rest", 5, 17, 14, stride=(3, 3), padding=(2, 1)),
    _depthwise("stride_and_dilation", 4, 17, 19, stride=(2, 2), padding=(4, 4), dilation=(4, 4)),
    _depthwise("axes_differ", 4, 11, 18, kernel=(3, 2), stride=(1, 2), dilation=(3, 2)),
    _depthwise("stride_skips_inputs", 6, 10, 9, kernel=(1, 1), stride=(3, 2)),
    _depthwise("no_taps_slide", 8, 9, 10, kernel=(2, 4), padding=(1, 2)),
    _depthwise("five_by_five", 8, 13, 9, kernel=(5, 5), padding=(4, 4), dilation=(2, 2)),
    _depthwise("five_by_five_stride_2", 8, 13, 11, kernel=(5, 5), stride=(2, 2), padding=(2, 2)),
    _depthwise("seven_by_seven", 8, 11, 9, kernel=(7, 7), padding=(3, 3)),
    _depthwise("nine_by_one", 3, 21, 5, kernel=(9, 1), padding=(4, 0)),
    _depthwise("padding_beyond_the_window", 4, 4, 3, kernel=(1, 3), padding=(3, 4)),
    _depthwise("multiplier_2", 8, 9, 7, fan=2, n=2, padding=(1, 1)),
    _depthwise("multiplier_3_stride_2", 5, 9, 8, fan=3, stride=(2, 1), padding=(1, 1), bias=False),
    _depthwise("batch_0", 8, 5, 5, n=0, padding=(1, 1)),
]  # fmt: skip
DEPTHWISE = {case.name: case for case in DEPTHWISE_CASES}


@dataclass(frozen=True)
class UpsampleCase:
    name: str
    input: tuple[int, int, int, int] = (2, 3, 5, 7)
    scale: tuple[float, float] | None = None
    size: tuple[int, int] | None = None
    align_corners: bool = False
    border: str = "clamp"
    skip: bool = True
    skip_margin: tuple[int, int] = (0, 0)
    offset: tuple[int, int] = (0, 0)
    origin: tuple[int, int] = (0, 0)

    @property
    def output_size(self):
        if self.size is not None:
            return self.size
        return tuple(int(n * s) for n, s in zip(self.input[2:], self.scale, strict=True))

    @property
    def rule(self):
        """The arguments of the slow reference after its output size."""
        return self.scale, self.align_corners, self.border, self.origin

    @property
    def options(self):
        """The keyword arguments of dilseg.functional.upsample_add."""
        return {
            "scale_factor": self.scale,
            "size": self.size,
            "align_corners": self.align_corners,
            "border": self.border,
            "offset": self.offset,
            "origin": self.origin,
        }

    def tensors(self, dtype, device):
        """Returns input and skip or None."""
        x = randn(self.input, dtype, device, seed=5)
        if not self.skip:
            return x, None
        size = [
            o + n + m
            for o, n, m in zip(self.offset, self.output_size, self.skip_margin, strict=True)
        ]
        return x, randn((*self.input[:2], *size), dtype, device, seed=6)

    def crop(self, skip):
        """The part of ``skip`` that is added."""
        (top, left), (h, w) = self.offset, self.output_size
        return skip[:, :, top : top + h, left : left + w]

    def grad_output(self, dtype, device):
        return randn((*self.input[:2], *self.output_size), dtype, device, seed=7)


UPSAMPLE_CASES = [
    UpsampleCase("one_pixel", input=(1, 1, 1, 1), scale=(2.0, 2.0)),
    UpsampleCase("twice", scale=(2.0, 2.0)),
    UpsampleCase("twice_aligned", scale=(2.0, 2.0), align_corners=True),
    UpsampleCase("twice_without_skip", scale=(2.0, 2.0), skip=False),
    UpsampleCase("eight_times", input=(1, 21, 3, 4), scale=(8.0, 8.0)),
    UpsampleCase("axes_differ", scale=(3.0, 1.0)),
    UpsampleCase("fractional_scale", scale=(1.5, 2.3)),
    UpsampleCase("shrinking_scale", input=(1, 2, 9, 13), scale=(0.5, 0.7)),
    UpsampleCase("by_size", size=(11, 13)),
    UpsampleCase("by_size_aligned", size=(11, 13), align_corners=True),
    UpsampleCase("size_unchanged", size=(5, 7)),
    UpsampleCase("shrinking_size", input=(1, 2, 11, 13), size=(4, 3)),
    UpsampleCase("shrinking_size_aligned", input=(1, 2, 11, 13), size=(4, 3), align_corners=True),
    UpsampleCase("to_one_pixel", size=(1, 1)),
    UpsampleCase("to_one_pixel_aligned", size=(1, 1), align_corners=True),
    UpsampleCase("single_row", input=(2, 3, 1, 31), scale=(4.0, 2.0)),
    UpsampleCase("prime_channels_batch_33", input=(33, 2, 2, 3), scale=(2.0, 2.0)),
    UpsampleCase("cropped_skip", scale=(2.0, 2.0), offset=(5, 3), skip_margin=(2, 4)),
    UpsampleCase("zero_border", scale=(2.0, 2.0), border="zero"),
    UpsampleCase("zero_border_odd_scale", scale=(3.0, 3.0), border="zero"),
    UpsampleCase(
        "full_deconvolution_window", scale=(2.0, 2.0), size=(12, 16), border="zero", origin=(-1, -1)
    ),
    UpsampleCase(
        "deconvolution_crop_32",
        input=(1, 2, 3, 2),
        scale=(32.0, 32.0),
        size=(70, 45),
        border="zero",
        origin=(3, 3),
        skip=False,
    ),
    UpsampleCase("window_inside", scale=(4.0, 4.0), size=(7, 9), origin=(3, 5), offset=(1, 2)),
    UpsampleCase("window_beyond_the_edge", scale=(2.0, 2.0), size=(15, 19), origin=(-2, -3)),
    UpsampleCase("batch_0", input=(0, 3, 5, 7), scale=(2.0, 2.0)),
    # What follows names a branch of the fast kernels (csrc/cuda/upsample_add/select.h).
    UpsampleCase("rows_of_vectors", input=(2, 3, 6, 8), scale=(2.0, 2.0)),
    UpsampleCase("rows_of_vectors_without_skip", input=(2, 3, 6, 8), scale=(2.0, 2.0), skip=False),
    UpsampleCase("batch_0_of_vectors", input=(0, 8, 6, 8), scale=(2.0, 2.0)),
    UpsampleCase("vectors_at_a_fraction", input=(1, 3, 8, 16), scale=(2.5, 2.5)),
    UpsampleCase("vectors_aligned", input=(1, 3, 5, 9), size=(9, 24), align_corners=True),
    UpsampleCase("vectors_at_scale_one", input=(1, 2, 9, 16), scale=(1.0, 1.0)),
    UpsampleCase("vectors_at_half_scale", input=(1, 2, 8, 16), scale=(0.5, 0.5)),
    UpsampleCase("eight_times_in_vectors", input=(1, 2, 5, 6), scale=(8.0, 8.0)),
    UpsampleCase(
        "crop_at_a_vector",
        input=(1, 3, 6, 8),
        scale=(2.0, 2.0),
        offset=(1, 8),
        skip_margin=(2, 8),
    ),
    UpsampleCase(
        "crop_beside_a_vector",
        input=(1, 3, 6, 8),
        scale=(2.0, 2.0),
        offset=(1, 1),
        skip_margin=(2, 7),
    ),
    UpsampleCase(
        "crop_of_an_odd_skip",
        input=(1, 3, 6, 8),
        scale=(2.0, 2.0),
        skip_margin=(2, 1),
    ),
    UpsampleCase("channels_of_vectors", input=(2, 16, 3, 5), scale=(2.0, 2.0)),
    UpsampleCase("channels_in_tiles", input=(1, 40, 3, 4), scale=(2.0, 2.0)),
    UpsampleCase("odd_channels_in_tiles", input=(1, 37, 2, 3), scale=(2.0, 2.0)),
    UpsampleCase("odd_width_and_channels", input=(1, 21, 3, 7), size=(9, 23), align_corners=True),
    UpsampleCase("row_tile_minus_one", input=(1, 2, 9, 64), size=(15, 127)),
    UpsampleCase("row_tile", input=(1, 2, 9, 64), size=(16, 128)),
    UpsampleCase("row_tile_plus_one", input=(1, 2, 9, 64), size=(17, 129)),
    UpsampleCase("row_tile_plus_a_vector", input=(1, 1, 9, 64), size=(17, 136)),
    UpsampleCase("several_segments", input=(1, 2, 33, 4), scale=(2.0, 2.0)),
    UpsampleCase("several_strips_of_vectors", input=(1, 1, 2, 260), scale=(4.0, 4.0)),
    UpsampleCase("strips_of_one_pixel", input=(1, 1, 1, 3), scale=(1.0, 400.0)),
    UpsampleCase("tiles_of_cells", input=(1, 3, 17, 19), scale=(2.0, 2.0)),
    UpsampleCase("tiles_of_cells_in_vectors", input=(1, 8, 9, 11), scale=(2.0, 2.0)),
    UpsampleCase("more_values_than_threads", input=(1, 21, 2, 8), scale=(2.0, 2.0)),
    UpsampleCase("longer_than_the_held_rows", input=(1, 2, 1, 2), scale=(150.0, 2.0)),
    UpsampleCase(
        "zero_border_in_vectors",
        input=(1, 8, 4, 7),
        scale=(2.0, 2.0),
        size=(10, 16),
        border="zero",
        origin=(-1, -1),
    ),
    UpsampleCase(
        "zero_border_far_outside",
        input=(1, 8, 3, 4),
        scale=(2.0, 2.0),
        size=(18, 24),
        border="zero",
        origin=(-5, -7),
    ),
]
UPSAMPLE = {case.name: case for case in UPSAMPLE_CASES}


@dataclass(frozen=True)
class LossCase:
    name: str
    shape: tuple[int, int, int, int] = (2, 5, 7, 3)
    weight: bool = False
    ignore_index: int = 255
    ignored: float = 0.2
    reduction: str = "mean"
    label_smoothing: float = 0.0
    target_dtype: torch.dtype = torch.int64
    spread: float = 2.0
    options: tuple = field(init=False)

    def __post_init__(self):
        options = (self.reduction, self.ignore_index, self.label_smoothing)
        object.__setattr__(self, "options", options)

    @property
    def keywords(self):
        """The keyword arguments of cross_entropy, torch's and ours."""
        return {
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
        }

    def tensors(self, dtype, device):
        """Returns logits, labels and class weights or None; weights have the loss's dtype."""
        n, c, h, w = self.shape
        logits = randn(self.shape, torch.float64, device, seed=8) * self.spread
        generator = torch.Generator().manual_seed(9)
        target = torch.randint(c, (n, h, w), generator=generator)
        if self.ignored:
            chance = torch.rand(n, h, w, generator=generator)
            target[chance < self.ignored] = self.ignore_index
        weight = None
        if self.weight:
            weight = torch.rand(c, generator=generator, dtype=torch.float64) + 0.25
            weight = weight.to(torch.float64 if dtype == torch.float64 else torch.float32)
            weight = weight.to(device)
        return logits.to(dtype), target.to(self.target_dtype).to(device), weight

    def grad_output(self, dtype, device):
        n, _, h, w = self.shape
        shape = (n, h, w) if self.reduction == "none" else ()
        return randn(
            shape, torch.float64 if dtype == torch.float64 else torch.float32, device, seed=10
        )


LOSS_CASES = [
    LossCase("mean"),
    LossCase("sum", reduction="sum"),
    LossCase("none", reduction="none"),
    LossCase("weighted_mean", weight=True),
    LossCase("weighted_sum", weight=True, reduction="sum"),
    LossCase("weighted_none", weight=True, reduction="none"),
    LossCase("smoothed", label_smoothing=0.1),
    LossCase("smoothed_weighted_mean", label_smoothing=0.3, weight=True),
    LossCase("smoothed_weighted_sum", label_smoothing=0.3, weight=True, reduction="sum"),
    LossCase("smoothed_weighted_none", label_smoothing=0.3, weight=True, reduction="none"),
    LossCase("fully_smoothed", label_smoothing=1.0),
    LossCase("negative_ignore_index", ignore_index=-100),
    LossCase("ignored_class", ignore_index=2),
    LossCase("nothing_ignored", ignored=0.0),
    LossCase("all_ignored_mean", ignored=2.0),
    LossCase("all_ignored_sum", ignored=2.0, reduction="sum"),
    LossCase("all_ignored_none", ignored=2.0, reduction="none"),
    LossCase("int32_labels", target_dtype=torch.int32),
    LossCase("uint8_labels", target_dtype=torch.uint8),
    LossCase(
        "uint8_labels_default_ignore", target_dtype=torch.uint8, ignore_index=-100, ignored=0.0
    ),
    LossCase("one_class", shape=(2, 1, 3, 4)),
    LossCase("two_classes", shape=(1, 2, 5, 5)),
    LossCase("voc_classes", shape=(1, 21, 11, 13)),
    LossCase("many_classes", shape=(1, 151, 3, 5)),
    LossCase("one_pixel", shape=(1, 5, 1, 1), ignored=0.0),
    LossCase("long_row", shape=(1, 3, 1, 131)),
    LossCase("batch_33", shape=(33, 3, 2, 2)),
    LossCase("batch_0", shape=(0, 5, 7, 3), reduction="sum"),
    LossCase("batch_0_none", shape=(0, 5, 7, 3), reduction="none"),
    LossCase("huge_logits", spread=300.0),
    # What the kernels tell apart: pixels per vector, classes per thread, warps per pixel.
    LossCase("four_pixel_vectors", shape=(2, 21, 4, 6), target_dtype=torch.uint8),
    LossCase("four_pixel_vectors_of_few_classes", shape=(2, 11, 4, 5), reduction="none"),
    LossCase("full_twelve_classes", shape=(1, 12, 2, 6), target_dtype=torch.int32),
    LossCase("full_twenty_four_classes", shape=(1, 24, 3, 4), reduction="sum"),
    LossCase("two_pixel_vectors", shape=(1, 19, 3, 6)),
    LossCase("full_thirty_two_classes", shape=(1, 32, 3, 4), reduction="none"),
    LossCase("second_tile_of_pixels", shape=(1, 4, 16, 19)),
    LossCase("two_warps_per_pixel", shape=(1, 33, 9, 10)),
    LossCase("even_classes_in_five_warps", shape=(1, 150, 3, 2), reduction="none"),
    LossCase("most_classes_in_warps", shape=(1, 384, 1, 2)),
    LossCase("more_classes_than_warps_hold", shape=(1, 1000, 1, 3), ignored=0.0),
    LossCase("smoothed_weighted_vectors", (2, 21, 4, 4), True, 255, 0.2, "none", 0.3),
    LossCase("smoothed_weighted_warps", (1, 40, 3, 4), True, 255, 0.2, "mean", 0.3),
    LossCase("huge_logits_in_vectors", shape=(1, 5, 4, 6), spread=1e4, reduction="none"),
    LossCase("huge_logits_in_warps", shape=(1, 40, 3, 4), spread=1e4, reduction="none"),
    LossCase("one_pixel_per_image", shape=(7, 21, 1, 1)),
    LossCase("one_column", shape=(2, 11, 6, 1), reduction="none"),
    LossCase("few_labelled_pixels", shape=(1, 21, 4, 8), ignored=0.9),
]
LOSS = {case.name: case for case in LOSS_CASES}


@dataclass(frozen=True)
class UpsampleLossCase:
    """A loss over upsampled logits: ``loss.shape`` is derived from ``upsample``."""

    name: str
    upsample: UpsampleCase
    loss: LossCase = LossCase("mean")

    def __post_init__(self):
        shape = (*self.upsample.input[:2], *self.upsample.output_size)
        object.__setattr__(self, "loss", replace(self.loss, shape=shape))

    @property
    def rule(self):
        """The arguments of the operator that describe the upsampling."""
        u = self.upsample
        scales = None if u.scale is None else list(u.scale)
        return (scales, u.align_corners, u.border, list(u.origin))

    @property
    def keywords(self):
        """The keyword arguments of dilseg.functional.upsample_cross_entropy."""
        u = self.upsample
        return {
            "scale_factor": u.scale,
            "align_corners": u.align_corners,
            "border": u.border,
            "origin": u.origin,
            **self.loss.keywords,
        }

    def tensors(self, dtype, device):
        """Returns logits, labels and class weights or None."""
        _, target, weight = self.loss.tensors(dtype, device)
        x, _ = self.upsample.tensors(torch.float64, device)
        return (x * self.loss.spread).to(dtype), target, weight

    def grad_output(self, dtype, device):
        return self.loss.grad_output(dtype, device)


def _upsample_loss(
    name, input, scale=None, size=None, *, rule=None, **loss_options
) -> UpsampleLossCase:
    upsample = UpsampleCase(name, input=input, scale=scale, size=size, skip=False, **(rule or {}))
    return UpsampleLossCase(name, upsample, LossCase(name, **loss_options))


_DECONVOLUTION = {"border": "zero", "origin": (-1, -2)}

UPSAMPLE_LOSS_CASES = [
    _upsample_loss("mean", (2, 5, 3, 4), (2.0, 2.0)),
    _upsample_loss("sum", (2, 5, 3, 4), (2.0, 2.0), reduction="sum"),
    _upsample_loss("none", (2, 5, 3, 4), (2.0, 2.0), reduction="none"),
    _upsample_loss(
        "smoothed_weighted_mean", (2, 5, 3, 4), (2.0, 3.0), weight=True, label_smoothing=0.3
    ),
    _upsample_loss(
        "smoothed_weighted_none",
        (2, 5, 3, 4),
        (2.0, 3.0),
        weight=True,
        label_smoothing=0.3,
        reduction="none",
    ),
    _upsample_loss("weighted_sum", (1, 5, 3, 4), (3.0, 2.0), weight=True, reduction="sum"),
    _upsample_loss("voc_eight_times", (1, 21, 2, 3), (8.0, 8.0)),
    _upsample_loss("voc_eight_times_none", (1, 21, 2, 3), (8.0, 8.0), reduction="none"),
    _upsample_loss("cityscapes_wider_than_a_tile", (1, 19, 2, 35), (4.0, 8.0)),
    _upsample_loss("camvid_taller_than_a_band", (1, 11, 9, 2), (8.0, 2.0)),
    _upsample_loss("thirty_two_times", (1, 3, 2, 2), (32.0, 32.0)),
    _upsample_loss("fractional_scale", (1, 4, 5, 7), (1.5, 2.3), weight=True),
    _upsample_loss("shrinking_scale", (1, 3, 9, 13), (0.5, 0.7)),
    _upsample_loss("by_size", (1, 3, 5, 7), size=(11, 13)),
    _upsample_loss("size_unchanged", (1, 3, 5, 7), size=(5, 7)),
    _upsample_loss("to_one_pixel", (1, 3, 5, 7), size=(1, 1), ignored=0.0),
    _upsample_loss("from_one_pixel", (2, 3, 1, 1), size=(5, 9)),
    _upsample_loss("aligned", (1, 4, 4, 5), (3.0, 2.0), rule={"align_corners": True}),
    _upsample_loss("aligned_shrinking", (1, 4, 9, 8), size=(4, 3), rule={"align_corners": True}),
    _upsample_loss(
        "deconvolution", (1, 4, 4, 5), (4.0, 4.0), size=(19, 23), rule=_DECONVOLUTION
    ),
    _upsample_loss(
        "deconvolution_none",
        (1, 4, 4, 5),
        (4.0, 4.0),
        size=(19, 23),
        rule=_DECONVOLUTION,
        reduction="none",
    ),
    _upsample_loss(
        "window_beyond_the_edge", (1, 3, 3, 4), (2.0, 2.0), size=(9, 13), rule={"origin": (-2, -3)}
    ),
    _upsample_loss("one_class", (2, 1, 3, 2), (2.0, 2.0)),
    _upsample_loss("two_classes", (1, 2, 3, 5), (2.0, 2.0)),
    _upsample_loss("last_class_of_the_registers", (1, 32, 2, 2), (3.0, 3.0)),
    _upsample_loss("first_class_beyond_the_registers", (1, 33, 2, 2), (3.0, 3.0)),
    _upsample_loss("ade20k_classes", (1, 150, 2, 2), (2.0, 3.0), label_smoothing=0.1),
    _upsample_loss("imagenet_classes", (1, 1000, 1, 2), (2.0, 2.0)),
    _upsample_loss("imagenet_classes_none", (1, 1000, 1, 2), (2.0, 2.0), reduction="none"),
    _upsample_loss("all_ignored_mean", (1, 4, 3, 3), (2.0, 2.0), ignored=2.0),
    _upsample_loss("all_ignored_none", (1, 4, 3, 3), (2.0, 2.0), ignored=2.0, reduction="none"),
    _upsample_loss("one_valid_pixel", (1, 4, 3, 3), (2.0, 2.0), ignored=0.93),
    _upsample_loss("huge_logits", (1, 5, 3, 4), (2.0, 2.0), spread=5000.0),
    _upsample_loss("int32_labels", (1, 5, 3, 4), (2.0, 2.0), target_dtype=torch.int32),
    _upsample_loss("uint8_labels", (1, 5, 3, 4), (2.0, 2.0), target_dtype=torch.uint8),
    _upsample_loss("batch_0", (0, 5, 3, 4), (2.0, 2.0), reduction="sum"),
    _upsample_loss("batch_0_none", (0, 5, 3, 4), (2.0, 2.0), reduction="none"),
    _upsample_loss("batch_17", (17, 3, 2, 2), (2.0, 2.0)),
]  # fmt: skip
UPSAMPLE_LOSS = {case.name: case for case in UPSAMPLE_LOSS_CASES}
