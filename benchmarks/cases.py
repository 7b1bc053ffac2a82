# SPDX-License-Identifier: Apache-2.0
"""What is measured: the shapes, where each comes from, and the least work each one can cost.

A case is one layer of a published network, or a whole one, not a size picked to look good. Every
case carries its cost model, so that a time becomes GFLOP/s and GB/s without a second table:

* `flops` counts what a dense kernel executes: taps that fall into the padding count as work, as
  they do for cuDNN.
* `bytes` counts compulsory traffic: each operand read once, each result written once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:  # the cases can be read without torch and without a build
    from dilseg.models import SegmentationModel

Shape = tuple[int, ...]

# Bytes of one label (labels are int64 for every provider, which is what the loss of torch asks for)
# and of one value of the fp32 per-pixel log-sum-exp that a fused loss keeps for its backward pass.
LABEL_BYTES = 8
LOGSUMEXP_BYTES = 4

# Named selections of cases. "cpu" and "gpu" are the defaults of the two devices; "first" is the
# handful of cases per op that fits into one call of the GPU job; "fused", "conv" and "hopper" are
# what the goals of goals.py speak of; "quick" has every op within two minutes on two cores; "smoke"
# checks the benchmark code itself.
SETS = ("cpu", "gpu", "first", "fused", "conv", "hopper", "quick", "smoke")


def _product(values: Iterable[int]) -> int:
    result = 1
    for value in values:
        result *= value
    return result


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measured layer or network. Subclasses add the shape and the cost model."""

    op: ClassVar[str]
    modes: ClassVar[tuple[str, ...]]

    name: str
    source: str
    sets: frozenset[str]

    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor of the case, by argument name."""
        raise NotImplementedError

    def flops(self, mode: str) -> int:
        """Floating-point operations of one launch in `mode`."""
        raise NotImplementedError

    def bytes(self, mode: str, itemsize: int) -> int:
        """Compulsory traffic of one launch in `mode`, with values of `itemsize` bytes."""
        raise NotImplementedError

    def check_mode(self, mode: str) -> None:
        """Refuses a mode that the op does not have."""
        if mode not in self.modes:
            raise ValueError(
                f"{self.op} has no mode {mode!r}; its modes are {', '.join(self.modes)}"
            )


@dataclass(frozen=True, kw_only=True)
class ConvCase(Case):
    """A 2-D convolution, square window, the same stride, padding and dilation on both axes."""

    op: ClassVar[str] = "dilated_conv2d"
    modes: ClassVar[tuple[str, ...]] = ("forward", "grad_input", "grad_weight", "step")

    n: int
    c_in: int
    c_out: int
    h_in: int
    w_in: int
    kernel: int
    dilation: int
    padding: int
    stride: int = 1
    groups: int = 1
    bias: bool = True

    @property
    def output_size(self) -> tuple[int, int]:
        """(h_out, w_out) by the usual convolution formula."""
        reach = self.dilation * (self.kernel - 1) + 1
        h_out = (self.h_in + 2 * self.padding - reach) // self.stride + 1
        w_out = (self.w_in + 2 * self.padding - reach) // self.stride + 1
        return h_out, w_out

    def shapes(self) -> dict[str, Shape]:
        """`input`, `weight`, `bias` where there is one, and `output`."""
        shapes: dict[str, Shape] = {
            "input": (self.n, self.c_in, self.h_in, self.w_in),
            "weight": (self.c_out, self.c_in // self.groups, self.kernel, self.kernel),
        }
        if self.bias:
            shapes["bias"] = (self.c_out,)
        shapes["output"] = (self.n, self.c_out, *self.output_size)
        return shapes

    def flops(self, mode: str) -> int:
        """2 * outputs * taps * c_in / groups forward, and the same for each gradient."""
        self.check_mode(mode)
        outputs = _product(self.shapes()["output"])
        depth = self.c_in // self.groups * self.kernel * self.kernel
        passes = 3 if mode == "step" else 1
        return passes * 2 * outputs * depth

    def bytes(self, mode: str, itemsize: int) -> int:
        """Two operands in, one result out, plus the bias where the pass touches it."""
        self.check_mode(mode)
        if mode == "step":
            return sum(self.bytes(m, itemsize) for m in self.modes if m != "step")
        shapes = self.shapes()
        elements = sum(_product(shapes[k]) for k in ("input", "weight", "output"))
        if self.bias and mode != "grad_input":
            elements += self.c_out
        return elements * itemsize


@dataclass(frozen=True, kw_only=True)
class UpsampleAddCase(Case):
    """Bilinear upsampling by a whole factor, plus a skip map where the layer has one."""

    op: ClassVar[str] = "upsample_add"
    modes: ClassVar[tuple[str, ...]] = ("forward", "grad_input", "step")

    n: int
    c: int
    h_in: int
    w_in: int
    scale: int
    skip: bool = True

    def shapes(self) -> dict[str, Shape]:
        """`input`, `skip` where there is one, and `output`."""
        output = (self.n, self.c, self.h_in * self.scale, self.w_in * self.scale)
        shapes: dict[str, Shape] = {"input": (self.n, self.c, self.h_in, self.w_in)}
        if self.skip:
            shapes["skip"] = output
        shapes["output"] = output
        return shapes

    def flops(self, mode: str) -> int:
        """Per output: 6 products and 3 sums, 1 sum for the skip; going back 4 multiply-adds."""
        self.check_mode(mode)
        outputs = _product(self.shapes()["output"])
        forward = (9 + self.skip) * outputs
        backward = 8 * outputs
        return {"forward": forward, "grad_input": backward, "step": forward + backward}[mode]

    def bytes(self, mode: str, itemsize: int) -> int:
        """Forward: input and skip in, output out. Backward: the output's gradient to the input's.

        The skip's gradient is the output's own and costs nothing.
        """
        self.check_mode(mode)
        shapes = self.shapes()
        backward = _product(shapes["output"]) + _product(shapes["input"])
        forward = backward + (_product(shapes["skip"]) if self.skip else 0)
        elements = {"forward": forward, "grad_input": backward, "step": forward + backward}[mode]
        return elements * itemsize


@dataclass(frozen=True, kw_only=True)
class CrossEntropyCase(Case):
    """Mean softmax cross-entropy over a map of labels, void pixels ignored."""

    op: ClassVar[str] = "cross_entropy"
    modes: ClassVar[tuple[str, ...]] = ("forward", "grad_input", "step")

    n: int
    c: int
    h: int
    w: int
    ignored: float = 0.05  # share of void pixels; VOC's object borders are about 5 % of an image

    def shapes(self) -> dict[str, Shape]:
        """`input` (logits) and `target` (labels)."""
        return {"input": (self.n, self.c, self.h, self.w), "target": (self.n, self.h, self.w)}

    def flops(self, mode: str) -> int:
        """Per logit 4 forward (compare, subtract, exp, add) and 4 back (two of them subtract)."""
        self.check_mode(mode)
        each = 4 * _product(self.shapes()["input"])
        return 2 * each if mode == "step" else each

    def bytes(self, mode: str, itemsize: int) -> int:
        """Forward reads logits and labels and keeps the log-sum-exp.

        Backward reads all three and writes the gradient.
        """
        self.check_mode(mode)
        shapes = self.shapes()
        logits = _product(shapes["input"]) * itemsize
        per_pixel = _product(shapes["target"]) * (LABEL_BYTES + LOGSUMEXP_BYTES)
        forward = logits + per_pixel
        backward = 2 * logits + per_pixel
        return {"forward": forward, "grad_input": backward, "step": forward + backward}[mode]


@dataclass(frozen=True, kw_only=True)
class UpsampledCase(Case):
    """An op that takes scores `input` to a map `scale` times as large, and never stores that map.

    Its traffic is therefore that of the small scores and of the labels, while its arithmetic is
    that of the large map: the bytes below are what an op that stores the map exceeds many times.
    """

    n: int
    c: int
    h_in: int
    w_in: int
    scale: int

    @property
    def label_shape(self) -> Shape:
        """[n, h_out, w_out]."""
        return self.n, self.h_in * self.scale, self.w_in * self.scale

    @property
    def upsampled(self) -> int:
        """Values of the map that is not stored."""
        return self.c * _product(self.label_shape)


@dataclass(frozen=True, kw_only=True)
class UpsampleCrossEntropyCase(UpsampledCase):
    """Mean softmax cross-entropy of bilinearly upsampled scores, void pixels ignored."""

    op: ClassVar[str] = "upsample_cross_entropy"
    modes: ClassVar[tuple[str, ...]] = ("forward", "step")

    ignored: float = 0.05

    def shapes(self) -> dict[str, Shape]:
        """`input` (scores, at low resolution) and `target` (labels, at full resolution)."""
        return {"input": (self.n, self.c, self.h_in, self.w_in), "target": self.label_shape}

    def flops(self, mode: str) -> int:
        """Per upsampled value as for the two ops apart: 9 + 4 forward, 4 + 8 more going back."""
        self.check_mode(mode)
        return {"forward": 13, "step": 25}[mode] * self.upsampled

    def bytes(self, mode: str, itemsize: int) -> int:
        """Scores and labels in, each once; a step also writes the scores' gradient."""
        self.check_mode(mode)
        scores = _product(self.shapes()["input"]) * itemsize
        labels = _product(self.label_shape) * LABEL_BYTES
        return {"forward": scores + labels, "step": 2 * scores + labels}[mode]


@dataclass(frozen=True, kw_only=True)
class UpsampleArgmaxCase(UpsampledCase):
    """The class of every pixel of bilinearly upsampled scores, as int64 labels."""

    op: ClassVar[str] = "upsample_argmax"
    modes: ClassVar[tuple[str, ...]] = ("forward",)

    def shapes(self) -> dict[str, Shape]:
        """`input` (scores) and `output` (labels)."""
        return {"input": (self.n, self.c, self.h_in, self.w_in), "output": self.label_shape}

    def flops(self, mode: str) -> int:
        """Per upsampled value 6 products, 3 sums and a comparison."""
        self.check_mode(mode)
        return 10 * self.upsampled

    def bytes(self, mode: str, itemsize: int) -> int:
        """Scores in, labels out."""
        self.check_mode(mode)
        scores = _product(self.shapes()["input"]) * itemsize
        return scores + _product(self.label_shape) * LABEL_BYTES


@dataclass(frozen=True, kw_only=True)
class ModelCase(Case):
    """A whole network: the labels of images, or one training step.

    A step is forward, loss and backward to every parameter, without an optimiser. Nothing is
    dropped, so that every provider computes the same.
    """

    op: ClassVar[str] = "model"
    modes: ClassVar[tuple[str, ...]] = ("forward", "step")

    model: str  # its name in dilseg.models.MODELS
    num_classes: int
    n: int
    h: int
    w: int
    backbone: str = "vgg16"
    narrowing: int = 1  # divides the width of every layer of the backbone
    options: tuple[tuple[str, object], ...] = ()
    ignored: float = 0.05

    def build(self) -> SegmentationModel:
        """The network, with parameters on the device "meta", which have no values."""
        import torch

        from dilseg import models

        backbone = models.BACKBONES[self.backbone]
        assert isinstance(backbone, models.Backbone)
        stages = tuple(tuple(c // self.narrowing for c in stage) for stage in backbone.stages)
        fc_channels = backbone.fc_channels // self.narrowing
        with torch.device("meta"):
            return models.build(
                self.model,
                self.num_classes,
                backbone=replace(backbone, stages=stages, fc_channels=fc_channels),
                dropout=0.0,
                **dict(self.options),
            )

    def shapes(self) -> dict[str, Shape]:
        """`input` (images), `target` (labels, of a step) and `output` (labels)."""
        labels = (self.n, self.h, self.w)
        return {"input": (self.n, 3, self.h, self.w), "target": labels, "output": labels}

    def parameters(self) -> dict[str, Shape]:
        """Shape of every parameter, by its name in the network."""
        return dict(_parameters(self))

    def flops(self, mode: str) -> int:
        """Those of the convolutions: 2 * outputs * taps * c_in forward and for each gradient.

        The images need no gradient; the rest of the network is left out.
        """
        self.check_mode(mode)
        return _convolution_flops(self, mode)

    def bytes(self, mode: str, itemsize: int) -> int:
        """Images and parameters in, labels out; a step reads labels and writes gradients instead.

        What a layer hands to the next one is no operand: a network that kept it on chip would be
        bound by these bytes, and none does.
        """
        self.check_mode(mode)
        shapes = self.shapes()
        parameters = sum(map(_product, self.parameters().values()))
        values = _product(shapes["input"]) + {"forward": 1, "step": 2}[mode] * parameters
        return values * itemsize + _product(shapes["target"]) * LABEL_BYTES


@functools.cache
def _parameters(case: ModelCase) -> tuple[tuple[str, Shape], ...]:
    return tuple((name, tuple(p.shape)) for name, p in case.build().named_parameters())


@functools.cache
def _convolution_flops(case: ModelCase, mode: str) -> int:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.torch_ops import torch_ops

    images = torch.empty(case.shapes()["input"], device="meta")
    # Torch's counter knows torch's operators.
    with torch_ops(), FlopCounterMode(display=False) as counter:
        logits = case.build().segment(images)
        if mode == "step":
            torch.autograd.backward(logits, torch.empty_like(logits))
    return int(counter.get_total_flops())


def _sets(*names: str) -> frozenset[str]:
    return frozenset(names)


_VGG = "VGG-16 in FCN (Long et al. 2015) and DilatedNet (Yu and Koltun 2016), 512 x 512 input"
_CONTEXT = "DilatedNet context module (Yu and Koltun 2016, table 1), 64 x 64 cells"
_ASPP = "DeepLabv3 ASPP branch (Chen et al. 2017), output stride 16"
_RESNET = "ResNet-50 layer4 at output stride 8 (DRN / DeepLabv3), 513 x 513 input"
_MOBILENET = "MobileNetV2 backbone of DeepLabv3+ (Sandler et al. 2018), dilated depthwise"

# Ordered by importance inside each op: a run that is short of time drops cases from the end.
_CONV_CASES: tuple[ConvCase, ...] = (
    ConvCase(
        name="vgg_conv5_d2",
        source=f"conv5_x of {_VGG}",
        sets=_sets("gpu", "first", "conv"),
        n=1, c_in=512, c_out=512, h_in=64, w_in=64, kernel=3, dilation=2, padding=2,
    ),
    ConvCase(
        name="aspp_d12_33",
        source=_ASPP,
        sets=_sets("gpu", "first"),
        n=1, c_in=2048, c_out=256, h_in=33, w_in=33, kernel=3, dilation=12, padding=12, bias=False,
    ),
    ConvCase(
        name="context_basic_d4",
        source=f"Basic layer 4 of the {_CONTEXT}",
        sets=_sets("quick", "cpu", "gpu", "first", "conv"),
        n=1, c_in=21, c_out=21, h_in=64, w_in=64, kernel=3, dilation=4, padding=4,
    ),
    ConvCase(
        name="depthwise960_d2_65",
        source=_MOBILENET,
        sets=_sets("gpu", "first", "conv"),
        n=1, c_in=960, c_out=960, h_in=65, w_in=65, kernel=3, dilation=2, padding=2,
        groups=960, bias=False,
    ),
    ConvCase(
        name="context_large_l6_d16",
        source=f"Large layer 6 of the {_CONTEXT}",
        sets=_sets("gpu"),
        n=1, c_in=336, c_out=672, h_in=64, w_in=64, kernel=3, dilation=16, padding=16,
    ),
    ConvCase(
        name="context_large_l3_d2",
        source=f"Large layer 3 of the {_CONTEXT}",
        sets=_sets("gpu"),
        n=1, c_in=42, c_out=84, h_in=64, w_in=64, kernel=3, dilation=2, padding=2,
    ),
    ConvCase(
        name="resnet_l4_d4_65",
        source=_RESNET,
        sets=_sets("gpu"),
        n=1, c_in=512, c_out=512, h_in=65, w_in=65, kernel=3, dilation=4, padding=4, bias=False,
    ),
    ConvCase(
        name="resnet_l4_d2_65",
        source=_RESNET,
        sets=_sets("gpu"),
        n=1, c_in=512, c_out=512, h_in=65, w_in=65, kernel=3, dilation=2, padding=2, bias=False,
    ),
    ConvCase(
        name="context_large_l4_d4",
        source=f"Large layer 4 of the {_CONTEXT}",
        sets=_sets("gpu"),
        n=1, c_in=84, c_out=168, h_in=64, w_in=64, kernel=3, dilation=4, padding=4,
    ),
    ConvCase(
        name="context_large_l5_d8",
        source=f"Large layer 5 of the {_CONTEXT}",
        sets=_sets("gpu"),
        n=1, c_in=168, c_out=336, h_in=64, w_in=64, kernel=3, dilation=8, padding=8,
    ),
    ConvCase(
        name="vgg_conv4_d1",
        source=f"conv4_2 and conv4_3 of {_VGG}",
        sets=_sets("gpu"),
        n=1, c_in=512, c_out=512, h_in=64, w_in=64, kernel=3, dilation=1, padding=1,
    ),
    *(
        ConvCase(
            name=f"aspp_d{dilation}_{size}",
            source=_ASPP if size == 33 else f"{_ASPP.split(',')[0]}, output stride 8",
            sets=_sets("gpu"),
            n=1, c_in=2048, c_out=256, h_in=size, w_in=size, kernel=3,
            dilation=dilation, padding=dilation, bias=False,
        )
        for size, dilation in (
            (33, 6), (33, 18), (33, 24), (33, 36), (65, 6), (65, 12), (65, 18), (65, 24), (65, 36),
        )
    ),
    ConvCase(
        name="score_1x1",
        source=f"score_fr of {_VGG}",
        sets=_sets("gpu"),
        n=1, c_in=4096, c_out=21, h_in=64, w_in=64, kernel=1, dilation=1, padding=0,
    ),
    ConvCase(
        name="context_large_l7_d1",
        source=f"Large layer 7 of the {_CONTEXT}",
        sets=_sets("gpu"),
        n=1, c_in=672, c_out=672, h_in=64, w_in=64, kernel=3, dilation=1, padding=1,
    ),
    ConvCase(
        name="fc7_1x1",
        source=f"fc7 of {_VGG}",
        sets=_sets("gpu"),
        n=1, c_in=4096, c_out=4096, h_in=64, w_in=64, kernel=1, dilation=1, padding=0,
    ),
    ConvCase(
        name="fc6_7x7_d4",
        source=f"fc6 of {_VGG}",
        sets=_sets("gpu"),
        n=1, c_in=512, c_out=4096, h_in=64, w_in=64, kernel=7, dilation=4, padding=12,
    ),
    ConvCase(
        name="aspp_small_d12_33",
        source=f"{_ASPP}, 64 channels instead of 2048 and 256 for a CPU",
        sets=_sets("cpu", "conv"),
        n=1, c_in=64, c_out=64, h_in=33, w_in=33, kernel=3, dilation=12, padding=12, bias=False,
    ),
    ConvCase(
        name="depthwise96_d2_65",
        source=f"{_MOBILENET}, 96 of 960 channels for a CPU",
        sets=_sets("quick", "cpu", "conv"),
        n=1, c_in=96, c_out=96, h_in=65, w_in=65, kernel=3, dilation=2, padding=2,
        groups=96, bias=False,
    ),
    ConvCase(
        name="smoke_conv",
        source="odd sizes that check the benchmark code itself",
        sets=_sets("smoke"),
        n=2, c_in=6, c_out=4, h_in=9, w_in=7, kernel=3, dilation=2, padding=3, stride=2, groups=2,
    ),
)  # fmt: skip

# The layers that the kernels for Hopper are made for, as above and in batches of eight.
_HOPPER = ("vgg_conv", "fc6", "resnet_l4", "aspp_d", "context_large")
CONV_CASES: tuple[ConvCase, ...] = (
    *(
        replace(case, sets=case.sets | {"hopper"}) if case.name.startswith(_HOPPER) else case
        for case in _CONV_CASES
    ),
    *(
        replace(
            case,
            name=f"{case.name}_b8",
            source=f"{case.source}, batch 8",
            sets=_sets("hopper"),
            n=8,
        )
        for case in _CONV_CASES
        if case.name.startswith(_HOPPER)
    ),
)

UPSAMPLE_ADD_CASES: tuple[UpsampleAddCase, ...] = (
    UpsampleAddCase(
        name="voc_8x",
        source="x8 upsampling of VOC scores in FCN-8s and DilatedNet, 512 x 512 input, batch 8",
        sets=_sets("gpu", "first"),
        n=8, c=21, h_in=64, w_in=64, scale=8, skip=False,
    ),
    UpsampleAddCase(
        name="fcn_skip4_2x",
        source="pool4 skip of FCN-16s/8s (Long et al. 2015, section 4.2), 512 x 512 input, batch 8",
        sets=_sets("cpu", "gpu", "first"),
        n=8, c=21, h_in=16, w_in=16, scale=2,
    ),
    UpsampleAddCase(
        name="fpn_2x",
        source="top-down path of FPN (Lin et al. 2017), P3 of an 800 x 1333 image, batch 2",
        sets=_sets("gpu", "first"),
        n=2, c=256, h_in=50, w_in=84, scale=2,
    ),
    UpsampleAddCase(
        name="cityscapes_8x",
        source="x8 upsampling of Cityscapes scores in DilatedNet, 1024 x 2048 input, batch 1",
        sets=_sets("gpu", "fused"),
        n=1, c=19, h_in=128, w_in=256, scale=8, skip=False,
    ),
    UpsampleAddCase(
        name="voc_8x_b2",
        source="x8 upsampling of VOC scores in FCN-8s and DilatedNet, 512 x 512 input, batch 2",
        sets=_sets("cpu", "fused"),
        n=2, c=21, h_in=64, w_in=64, scale=8, skip=False,
    ),
    UpsampleAddCase(
        name="fcn_skip3_2x_b2",
        source="pool3 skip of FCN-8s (Long et al. 2015, section 4.2), 1024 x 1024 input, batch 2",
        sets=_sets("quick", "cpu", "fused"),
        n=2, c=21, h_in=64, w_in=64, scale=2,
    ),
    UpsampleAddCase(
        name="voc_8x_b1",
        source="x8 upsampling of VOC scores in FCN-8s and DilatedNet, 512 x 512 input, batch 1",
        sets=_sets("quick", "cpu"),
        n=1, c=21, h_in=64, w_in=64, scale=8, skip=False,
    ),
    UpsampleAddCase(
        name="smoke_upsample",
        source="odd sizes that check the benchmark code itself",
        sets=_sets("smoke"),
        n=2, c=3, h_in=5, w_in=4, scale=3,
    ),
)  # fmt: skip

CROSS_ENTROPY_CASES: tuple[CrossEntropyCase, ...] = (
    CrossEntropyCase(
        name="voc_512_b8",
        source="PASCAL VOC 2012: 21 classes, 512 x 512 crops, batch 8",
        sets=_sets("gpu", "first"),
        n=8, c=21, h=512, w=512,
    ),
    CrossEntropyCase(
        name="ade20k_512_b2",
        source="ADE20K: 150 classes, 512 x 512 crops, batch 2",
        sets=_sets("gpu", "first"),
        n=2, c=150, h=512, w=512,
    ),
    CrossEntropyCase(
        name="cityscapes_b4",
        source="Cityscapes: 19 classes, whole 1024 x 2048 images, batch 4",
        sets=_sets("gpu"),
        n=4, c=19, h=1024, w=2048,
    ),
    CrossEntropyCase(
        name="ade20k_512_b8",
        source="ADE20K: 150 classes, 512 x 512 crops, batch 8",
        sets=_sets("gpu"),
        n=8, c=150, h=512, w=512,
    ),
    CrossEntropyCase(
        name="voc_512_b2",
        source="PASCAL VOC 2012: 21 classes, 512 x 512 crops, batch 2",
        sets=_sets("cpu", "fused"),
        n=2, c=21, h=512, w=512,
    ),
    CrossEntropyCase(
        name="cityscapes_b1",
        source="Cityscapes: 19 classes, one whole 1024 x 2048 image",
        sets=_sets("fused"),
        n=1, c=19, h=1024, w=2048,
    ),
    CrossEntropyCase(
        name="voc_256_b2",
        source="PASCAL VOC 2012: 21 classes, 256 x 256 crops for a CPU, batch 2",
        sets=_sets("quick", "cpu"),
        n=2, c=21, h=256, w=256,
    ),
    CrossEntropyCase(
        name="camvid_360x480",
        source="CamVid: 11 classes, one whole 360 x 480 image",
        sets=_sets("quick", "cpu"),
        n=1, c=11, h=360, w=480,
    ),
    CrossEntropyCase(
        name="smoke_loss",
        source="odd sizes that check the benchmark code itself",
        sets=_sets("smoke"),
        n=2, c=5, h=7, w=3, ignored=0.2,
    ),
)  # fmt: skip

# Both ops on upsampled scores meet the same maps, at the end of the same networks.
_SCORES = (
    (
        "voc_8x_b8",
        "PASCAL VOC 2012 scores of FCN-8s and DilatedNet at stride 8, 512 x 512 input, batch 8",
        _sets("gpu", "first"),
        {"n": 8, "c": 21, "h_in": 64, "w_in": 64, "scale": 8},
    ),
    (
        "ade20k_8x_b2",
        "ADE20K scores at stride 8: 150 classes, 512 x 512 input, batch 2",
        _sets("gpu", "first"),
        {"n": 2, "c": 150, "h_in": 64, "w_in": 64, "scale": 8},
    ),
    (
        "cityscapes_8x_b4",
        "Cityscapes scores of DilatedNet at stride 8: whole 1024 x 2048 images, batch 4",
        _sets("gpu"),
        {"n": 4, "c": 19, "h_in": 128, "w_in": 256, "scale": 8},
    ),
    (
        "voc_8x_b2",
        "PASCAL VOC 2012 scores of FCN-8s and DilatedNet at stride 8, 512 x 512 input, batch 2",
        _sets("quick", "cpu", "fused"),
        {"n": 2, "c": 21, "h_in": 64, "w_in": 64, "scale": 8},
    ),
    (
        "cityscapes_8x",
        "Cityscapes scores of DilatedNet at stride 8: one whole 1024 x 2048 image",
        _sets("fused"),
        {"n": 1, "c": 19, "h_in": 128, "w_in": 256, "scale": 8},
    ),
)

UPSAMPLE_CROSS_ENTROPY_CASES: tuple[UpsampleCrossEntropyCase, ...] = (
    *(
        UpsampleCrossEntropyCase(name=name, source=source, sets=sets, **sizes)
        for name, source, sets, sizes in _SCORES
    ),
    UpsampleCrossEntropyCase(
        name="smoke_upsampled_loss",
        source="odd sizes that check the benchmark code itself",
        sets=_sets("smoke"),
        n=2, c=5, h_in=4, w_in=3, scale=3, ignored=0.2,
    ),
)  # fmt: skip

UPSAMPLE_ARGMAX_CASES: tuple[UpsampleArgmaxCase, ...] = (
    *(
        UpsampleArgmaxCase(name=name, source=source, sets=sets, **sizes)
        for name, source, sets, sizes in _SCORES
    ),
    UpsampleArgmaxCase(
        name="smoke_argmax",
        source="odd sizes that check the benchmark code itself",
        sets=_sets("smoke"),
        n=2, c=5, h_in=4, w_in=3, scale=3,
    ),
)  # fmt: skip

_FCN8S = "FCN-8s on VGG-16 (Long et al. 2015)"
_DILATEDNET = "DilatedNet on VGG-16 (Yu and Koltun 2016)"
_QUARTER = "with a quarter of the channels, a small image for a CPU"

MODEL_CASES: tuple[ModelCase, ...] = (
    ModelCase(
        name="fcn8s_voc",
        source=f"{_FCN8S}, PASCAL VOC: 21 classes, 500 x 500",
        sets=_sets("gpu", "first"),
        model="fcn8s", num_classes=21, n=1, h=500, w=500,
    ),
    ModelCase(
        name="dilatednet_camvid",
        source=f"{_DILATEDNET}, context Basic, CamVid: 11 classes, 640 x 480",
        sets=_sets("gpu", "first"),
        model="dilatednet", num_classes=11, n=1, h=480, w=640,
    ),
    ModelCase(
        name="dilatednet_voc",
        source=f"{_DILATEDNET}, context Large, PASCAL VOC: 21 classes, 500 x 500",
        sets=_sets("gpu"),
        model="dilatednet", num_classes=21, n=1, h=500, w=500,
        options=(("context", "large"), ("padding", "input")),
    ),
    ModelCase(
        name="dilatednet_cityscapes",
        source=f"{_DILATEDNET}, context of ten layers, Cityscapes: 19 classes, 2048 x 1024",
        sets=_sets("gpu"),
        model="dilatednet", num_classes=19, n=1, h=1024, w=2048,
        options=(("dilations", (1, 1, 2, 4, 8, 16, 32, 64, 1)), ("border", "zero")),
    ),
    ModelCase(
        name="fcn8s_quarter",
        source=f"{_FCN8S} {_QUARTER}, 11 classes, 128 x 96",
        sets=_sets("quick", "cpu"),
        model="fcn8s", num_classes=11, n=1, h=96, w=128, narrowing=4,
    ),
    ModelCase(
        name="dilatednet_quarter",
        source=f"{_DILATEDNET} {_QUARTER}, 11 classes, 128 x 96",
        sets=_sets("quick", "cpu"),
        model="dilatednet", num_classes=11, n=1, h=96, w=128, narrowing=4,
    ),
    ModelCase(
        name="smoke_model",
        source="odd sizes that check the benchmark code itself",
        sets=_sets("smoke"),
        model="fcn8s", num_classes=5, n=2, h=29, w=22, backbone="demo", ignored=0.2,
    ),
)  # fmt: skip

CASES: tuple[Case, ...] = (
    *CONV_CASES,
    *UPSAMPLE_ADD_CASES,
    *CROSS_ENTROPY_CASES,
    *UPSAMPLE_CROSS_ENTROPY_CASES,
    *UPSAMPLE_ARGMAX_CASES,
    *MODEL_CASES,
)
OPS: tuple[str, ...] = (
    ConvCase.op,
    UpsampleAddCase.op,
    CrossEntropyCase.op,
    UpsampleCrossEntropyCase.op,
    UpsampleArgmaxCase.op,
    ModelCase.op,
)


def select(op: str, set_name: str) -> list[Case]:
    """The cases of `op` that belong to the set `set_name`, most important first."""
    if op not in OPS:
        raise ValueError(f"no benchmark cases for op {op!r}; the ops are {', '.join(OPS)}")
    if set_name not in SETS:
        raise ValueError(f"no case set {set_name!r}; the sets are {', '.join(SETS)}")
    return [case for case in CASES if case.op == op and set_name in case.sets]
