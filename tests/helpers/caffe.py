# SPDX-License-Identifier: Apache-2.0
"""Caffe nets for tests: their layers as data, a writer of .caffemodel files, a float64 interpreter.

Written from ``caffe.proto`` and the published ``net.py`` files, and sharing nothing with the
package: a mistake in its reader or in its models shows as a difference.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field, replace

import numpy as np


@dataclass
class Layer:
    """A layer as in a prototxt; ``params`` are those of its message, as given, without defaults."""

    name: str
    type: str
    bottoms: tuple[str, ...] = ()
    tops: tuple[str, ...] = ()
    params: dict = field(default_factory=dict)
    blobs: list[np.ndarray] = field(default_factory=list)


# The wire format -------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(field_number: int, value: int) -> bytes:
    return varint(field_number << 3) + varint(value)


def chunk(field_number: int, payload: bytes) -> bytes:
    return varint(field_number << 3 | 2) + varint(len(payload)) + payload


def single(field_number: int, value: float) -> bytes:
    return varint(field_number << 3 | 5) + struct.pack("<f", value)


def blob(array: np.ndarray, style: str = "current") -> bytes:
    """A BlobProto.

    Styles: "current" (shape, packed floats), "legacy" (four sizes, packed floats), "unpacked"
    (shape, a tag before every float), "double" (shape, packed doubles) and "pieces" (the values
    in two packed runs, with the gradient between them).
    """
    values = np.ascontiguousarray(array, "<f8" if style == "double" else "<f4")
    flat = values.tobytes()
    shape = chunk(7, chunk(1, b"".join(varint(size) for size in array.shape)))
    if style == "legacy":
        four = (1,) * (4 - array.ndim) + array.shape
        sizes = b"".join(number(i + 1, size) for i, size in enumerate(four))
        return sizes + chunk(5, flat)
    if style == "unpacked":
        floats = [flat[i : i + 4] for i in range(0, len(flat), 4)]
        return b"".join(varint(5 << 3 | 5) + one for one in floats) + shape
    if style == "double":
        return shape + chunk(8, flat)
    if style == "pieces":
        half = len(flat) // 8 * 4
        return chunk(5, flat[:half]) + chunk(6, flat) + shape + chunk(5, flat[half:])
    return shape + chunk(5, flat)


CONVOLUTION = {"num_output": 1, "bias_term": 2, "pad": 3, "kernel_size": 4, "group": 5,
               "stride": 6, "pad_h": 9, "pad_w": 10, "kernel_h": 11, "kernel_w": 12,
               "dilation": 18}  # fmt: skip
MESSAGES = {  # type -> (field in LayerParameter, in V1LayerParameter, fields of the message)
    "Convolution": (106, 10, CONVOLUTION),
    "Deconvolution": (106, 10, CONVOLUTION),
    "Pooling": (121, 19, {"pool": 1, "kernel_size": 2, "stride": 3, "pad": 4}),
    "InnerProduct": (117, 17, {"num_output": 1, "transpose": 6}),
    "LRN": (118, 18, {"local_size": 1, "alpha": 2, "beta": 3}),
    "Concat": (104, 9, {"axis": 2}),
    "Eltwise": (110, 24, {"operation": 1, "coeff": 2}),
    "Crop": (144, None, {"axis": 1, "offset": 2}),
    "Dropout": (108, 12, {}),
}
FLOATS = ("alpha", "beta", "coeff")
V1_TYPES = {"Concat": 3, "Convolution": 4, "Data": 5, "Dropout": 6, "InnerProduct": 14, "LRN": 15,
            "Pooling": 17, "ReLU": 18, "Softmax": 20, "SoftmaxWithLoss": 21, "Split": 22,
            "Eltwise": 25, "Deconvolution": 39}  # fmt: skip
V0_TYPES = {"Convolution": "conv", "Data": "data", "Dropout": "dropout", "Softmax": "softmax",
            "InnerProduct": "innerproduct", "Pooling": "pool", "ReLU": "relu"}  # fmt: skip


def _settings(layer: Layer, legacy: bool) -> bytes:
    out = b""
    if layer.type in MESSAGES and layer.params:
        current, v1, fields = MESSAGES[layer.type]
        body = b""
        for key, value in layer.params.items():
            if key in FLOATS:
                values = value if isinstance(value, tuple) else (value,)
                body += b"".join(single(fields[key], one) for one in values)
            elif key in fields:
                body += number(fields[key], int(value))
        out += chunk(v1 if legacy else current, body)
    if "negative_slope" in layer.params:
        out += chunk(30 if legacy else 123, single(1, layer.params["negative_slope"]))
    transform = b""
    if "scale" in layer.params:
        transform += single(1, layer.params["scale"])
    if "mean_file" in layer.params:
        transform += chunk(4, layer.params["mean_file"].encode())
    transform += b"".join(single(5, value) for value in layer.params.get("mean_value", ()))
    if transform:
        out += chunk(36 if legacy else 100, transform)
    return out


def encode_layer(layer: Layer, generation: str = "current", style: str = "current") -> bytes:
    """A field of NetParameter; generations "current", "v1" and "v0"."""
    blobs = [blob(array, style) for array in layer.blobs]
    name = layer.name.encode()
    if generation == "current":
        body = chunk(1, name) + chunk(2, layer.type.encode())
        body += b"".join(chunk(3, b.encode()) for b in layer.bottoms)
        body += b"".join(chunk(4, t.encode()) for t in layer.tops)
        body += b"".join(chunk(6, single(3, 1.0)) for _ in layer.blobs)
        body += b"".join(chunk(7, b) for b in blobs) + number(10, 1) + _settings(layer, False)
        return chunk(100, body)
    connections = b"".join(chunk(2, b.encode()) for b in layer.bottoms)
    connections += b"".join(chunk(3, t.encode()) for t in layer.tops)
    if generation == "v1":
        body = connections + chunk(4, name) + number(5, V1_TYPES[layer.type])
        body += b"".join(chunk(6, b) for b in blobs)
        body += b"".join(single(7, 1.0) for _ in layer.blobs) + _settings(layer, True)
        return chunk(2, body)
    inner = chunk(1, name) + chunk(2, V0_TYPES[layer.type].encode())
    inner += number(3, 7) + b"".join(chunk(50, b) for b in blobs)
    return chunk(2, chunk(1, inner) + connections)


def encode(layers: list[Layer], generation: str = "current", style: str = "current") -> bytes:
    head = chunk(1, b"a net") + chunk(3, b"data") + b"".join(number(4, d) for d in (1, 3, 9, 9))
    return head + b"".join(encode_layer(layer, generation, style) for layer in layers)


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    """A few flipped, repeated, removed or overwritten bytes."""
    data = bytearray(content)
    for _ in range(int(random.integers(1, 4))):
        at = int(random.integers(0, len(data)))
        span = int(random.integers(1, 9))
        kind = int(random.integers(0, 6))
        if kind == 0:
            data[at] ^= 1 << int(random.integers(0, 8))
        elif kind == 1:
            data[at : at + span] = random.bytes(span)
        elif kind == 2:
            del data[at : at + span]
        elif kind == 3:
            data[at:at] = data[at : at + span]
        elif kind == 4:
            data[at : at + span] = varint(int(random.integers(0, 2**63)))
        else:
            data = data[: max(1, at)]
        if not data:
            data = bytearray(b"\x00")
    return bytes(data)


# The nets --------------------------------------------------------------------------------------

STAGES = ((3, 2), (3, 4), (4, 3, 5), (5, 6, 4), (3, 4, 5))
FC = 6


class _Spec:
    """Collects layers, with random weights that keep activations of order one."""

    def __init__(self, seed: int) -> None:
        self.layers: list[Layer] = []
        self.random = np.random.default_rng(seed)

    def add(self, name: str, kind: str, *bottoms: str, top: str | None = None, blobs=(), **params):
        tops = (top or name,)
        self.layers.append(Layer(name, kind, bottoms, tops, params, list(blobs)))
        return tops[0]

    def weights(self, *shape: int) -> np.ndarray:
        std = math.sqrt(2 / math.prod(shape[1:]))
        return (self.random.standard_normal(shape) * std).astype(np.float32)

    def conv(self, name, bottom, c_in, c_out, k, *, relu=None, top=None, **params) -> str:
        per_group = c_in // params.get("group", 1)
        blobs = [self.weights(c_out, per_group, k, k), self.weights(c_out, 4)[:, 0].copy()]
        out = self.add(name, "Convolution", bottom, top=top, blobs=blobs, num_output=c_out,
                       kernel_size=k, **params)  # fmt: skip
        if relu:
            self.add(relu, "ReLU", out, top=out)
        return out

    def pool(self, name, bottom, k=2, stride=2, **params) -> str:
        return self.add(name, "Pooling", bottom, pool=0, kernel_size=k, stride=stride, **params)

    def norm(self, name, bottom) -> str:
        return self.add(name, "LRN", bottom, local_size=5, alpha=1e-4, beta=0.75)

    def vgg(self, x, c_in=3, *, first="conv1_1", modality="") -> str:
        """VGG-16 as in the FCNs, from conv1_1 to drop7."""
        for s, widths in enumerate(STAGES, 1):
            for i, c_out in enumerate(widths, 1):
                start = (s, i) == (1, 1)
                name = first if start else f"conv{s}_{i}"
                x = self.conv(f"{name}{modality}", x, c_in, c_out, 3,
                              relu=f"relu{s}_{i}{modality}", pad=100 if start else 1,
                              stride=1)  # fmt: skip
                c_in = c_out
            x = self.pool(f"pool{s}{modality}", x)
        for name, k in (("fc6", 7), ("fc7", 1)):
            relu = f"relu{name[-1]}{modality}"
            x = self.conv(f"{name}{modality}", x, c_in, FC, k, relu=relu, pad=0, stride=1)
            self.add(f"drop{name[-1]}{modality}", "Dropout", x, top=x)
            c_in = FC
        return x

    def head_32s(self, x, classes, k, offset, image="data") -> None:
        """The deconvolution by 32, the crop and the loss."""
        x = self.deconv("upscore", x, classes, k, 32)
        score = self.add("score", "Crop", x, image, axis=2, offset=offset)
        self.add("loss", "SoftmaxWithLoss", score, "label")

    def deconv(self, name, bottom, classes, k, s, *, group=None, **params) -> str:
        weight = np.zeros((classes, 1 if group else classes, k, k), np.float32)
        for c in range(classes):
            weight[c, 0 if group else c] = upsampling_kernel(k)
        if group:
            params["group"] = group
        return self.add(name, "Deconvolution", bottom, blobs=[weight], num_output=classes,
                        bias_term=False, kernel_size=k, stride=s, **params)  # fmt: skip


def upsampling_kernel(k: int) -> np.ndarray:
    """``upsample_filt`` of the published ``surgery.py``."""
    factor = (k + 1) // 2
    centre = factor - 1 if k % 2 == 1 else factor - 0.5
    rows, columns = np.ogrid[:k, :k]
    return (1 - abs(rows - centre) / factor) * (1 - abs(columns - centre) / factor)


def fcn_layers(
    stride: int, classes: int, *, at_once: bool = False, suffix: str = "", seed: int = 0
) -> list[Layer]:
    """voc-fcn32s, voc-fcn16s, voc-fcn8s and voc-fcn8s-atonce, with few channels."""
    net = _Spec(seed)
    net.add("data", "Python")
    net.layers[-1].tops = ("data", "label")
    net.add("data_data_0_split", "Split", "data", top="data_data_0_split_0")
    net.layers[-1].tops = ("data_data_0_split_0", "data_data_0_split_1")
    x = net.vgg("data_data_0_split_0")
    x = net.conv(f"score_fr{suffix}", x, FC, classes, 1, pad=0)
    last = {32: "upscore", 16: "upscore16", 8: "upscore8"}[stride]
    tiers = [("pool4", "upscore2", 5, 0.01), ("pool3", "upscore_pool4", 9, 0.0001)]
    for tap, up, offset, scale in tiers[: {32: 0, 16: 1, 8: 2}[stride]]:
        x = net.deconv(f"{up}{suffix}", x, classes, 4, 2)
        width = STAGES[int(tap[-1]) - 1][-1]
        source = tap
        if at_once:
            factors = [np.full(width, scale, np.float32)]
            source = net.add(f"scale_{tap}", "Scale", tap, blobs=factors)
        score = net.conv(f"score_{tap}{suffix}", source, width, classes, 1, pad=0)
        if at_once:  # so that the scaled map still counts in the sum
            net.layers[-1].blobs[0] /= np.float32(scale)
        cropped = net.add(f"{score}c", "Crop", score, x, axis=2, offset=offset)
        x = net.add(f"fuse_{tap}{suffix}", "Eltwise", x, cropped, operation=1)
    x = net.deconv(f"{last}{suffix}", x, classes, 2 * stride, stride)
    offset = {32: 19, 16: 27, 8: 31}[stride]
    score = net.add(f"score{suffix}", "Crop", x, "data_data_0_split_1", axis=2, offset=offset)
    net.add("loss", "SoftmaxWithLoss", score, "label")
    return net.layers


def two_headed_layers(stride: int, heads: dict[str, int]) -> list[Layer]:
    """siftflow-fcn32s, 16s and 8s: heads of their own on one trunk, classes by suffix."""
    trunk = fcn_layers(stride, 1)
    start = next(i for i, layer in enumerate(trunk) if layer.name == "score_fr")
    layers = trunk[:start]
    for seed, (head, classes) in enumerate(heads.items(), 1):
        layers += fcn_layers(stride, classes, suffix=f"_{head}", seed=seed)[start:-1]
    return layers


def early_fusion_layers(classes: int) -> list[Layer]:
    """nyud-fcn32s-color-d: colour and depth as four channels."""
    net = _Spec(3)
    for name in ("color", "depth"):
        net.add(name, "Python")
    net.add("data", "Concat", "color", "depth", axis=1)
    x = net.vgg("data", 4, first="conv1_1_bgrd")
    net.head_32s(net.conv("score_fr", x, FC, classes, 1, pad=0), classes, 64, 19)
    return net.layers


def late_fusion_layers(classes: int) -> list[Layer]:
    """nyud-fcn32s-color-hha: a trunk for each, their scores averaged."""
    net = _Spec(4)
    scores = []
    for modality in ("color", "hha"):
        net.add(modality, "Python")
    for modality in ("color", "hha"):
        x = net.vgg(modality, modality=modality)
        scores.append(net.conv(f"score_fr{modality}", x, FC, classes, 1, pad=0))
    x = net.add("score_fused", "Eltwise", *scores, operation=1, coeff=(0.5, 0.5))
    net.head_32s(x, classes, 64, 19, "color")
    return net.layers


CAFFENET = {"conv1": 4, "conv2": 6, "conv3": 6, "conv4": 6, "conv5": 4, "fc6": FC, "fc7": FC}
"""Its layers, with few channels."""


def alexnet_layers(classes: int | None = None) -> list[Layer]:
    """voc-fcn-alexnet; without classes CaffeNet, the ILSVRC classifier."""
    net, w = _Spec(6), CAFFENET
    dense = classes is not None
    net.add("data", "Python" if dense else "Data")
    x = net.conv(
        "conv1", "data", 3, w["conv1"], 11, relu="relu1", stride=4, pad=100 if dense else 0
    )
    x = net.norm("norm1", net.pool("pool1", x, 3))
    x = net.conv("conv2", x, w["conv1"], w["conv2"], 5, relu="relu2", pad=2, group=2)
    x = net.norm("norm2", net.pool("pool2", x, 3))
    x = net.conv("conv3", x, w["conv2"], w["conv3"], 3, relu="relu3", pad=1)
    x = net.conv("conv4", x, w["conv3"], w["conv4"], 3, relu="relu4", pad=1, group=2)
    x = net.conv("conv5", x, w["conv4"], w["conv5"], 3, relu="relu5", pad=1, group=2)
    x = net.pool("pool5", x, 3)
    if classes is not None:
        for name, k, c_in in (("fc6", 6, w["conv5"]), ("fc7", 1, FC)):
            x = net.conv(name, x, c_in, FC, k, relu=f"relu{name[-1]}", pad=0)
            net.add(f"drop{name[-1]}", "Dropout", x, top=x)
        net.head_32s(net.conv("score_fr", x, FC, classes, 1, pad=0), classes, 63, 18)
        return net.layers
    for name, inputs, outputs in (("fc6", w["conv5"] * 36, FC), ("fc7", FC, FC), ("fc8", FC, 10)):
        blobs = [net.weights(outputs, inputs), net.weights(outputs, 4)[:, 0].copy()]
        x = net.add(name, "InnerProduct", x, blobs=blobs, num_output=outputs)
        if name != "fc8":
            net.add(f"relu{name[-1]}", "ReLU", x, top=x)
            net.add(f"drop{name[-1]}", "Dropout", x, top=x)
    net.add("prob", "Softmax", x)
    return net.layers


GOOGLENET = ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")
INCEPTION = {"1x1": 2, "3x3_reduce": 3, "3x3": 2, "5x5_reduce": 2, "5x5": 3, "pool_proj": 1}
"""Channels of an inception block's convolutions, few and the same in every block."""


def googlenet_layers(classes: int | None = None) -> list[Layer]:
    """GoogLeNet with the scores of an FCN; without classes the ILSVRC classifier (bvlc_googlenet).

    How the FCN's authors padded theirs is not known; here it is padded by 18.
    """
    net = _Spec(7)
    net.add("data", "Python" if classes else "Data")
    pad = 18 if classes else 3
    x = net.conv("conv1/7x7_s2", "data", 3, 4, 7, relu="conv1/relu_7x7", stride=2, pad=pad)
    x = net.norm("pool1/norm1", net.pool("pool1/3x3_s2", x, 3))
    x = net.conv("conv2/3x3_reduce", x, 4, 3, 1, relu="conv2/relu_3x3_reduce")
    x = net.conv("conv2/3x3", x, 3, 5, 3, relu="conv2/relu_3x3", pad=1)
    x = net.pool("pool2/3x3_s2", net.norm("conv2/norm2", x), 3)
    c_in = 5
    for block in GOOGLENET:
        name, start, w = f"inception_{block}", x, INCEPTION

        def conv(part, x, c_in, k, name=name, w=w):
            return net.conv(f"{name}/{part}", x, c_in, w[part], k, relu=f"{name}/relu_{part}",
                            pad=k // 2)  # fmt: skip

        ends = [conv("1x1", start, c_in, 1)]
        for part, k in (("3x3", 3), ("5x5", 5)):
            reduced = conv(f"{part}_reduce", start, c_in, 1)
            ends.append(conv(part, reduced, w[f"{part}_reduce"], k))
        pooled = net.pool(f"{name}/pool", start, 3, stride=1, pad=1)
        ends.append(conv("pool_proj", pooled, c_in, 1))
        x = net.add(f"{name}/output", "Concat", *ends)
        c_in = sum(w[part] for part in ("1x1", "3x3", "5x5", "pool_proj"))
        if block in ("3b", "4e"):
            x = net.pool(f"pool{int(block[0])}/3x3_s2", x, 3)
    if classes:
        net.head_32s(net.conv("score_fr", x, c_in, classes, 1), classes, 63, 16)
        return net.layers
    x = net.add("pool5/7x7_s1", "Pooling", x, pool=1, kernel_size=7, stride=1)
    for name in ("loss1/classifier", "loss3/classifier"):
        blobs = [net.weights(10, c_in), net.weights(10, 4)[:, 0].copy()]
        net.add(name, "InnerProduct", x, blobs=blobs, num_output=10)
    return net.layers


def vgg_layers(*, inner_product: bool = True) -> list[Layer]:
    """The ILSVRC classifier: fully connected fc6, fc7 and fc8."""
    net = _Spec(5)
    net.add("data", "Data")
    x, c_in = "data", 3
    for s, widths in enumerate(STAGES, 1):
        for i, c_out in enumerate(widths, 1):
            x = net.conv(f"conv{s}_{i}", x, c_in, c_out, 3, relu=f"relu{s}_{i}", pad=1)
            c_in = c_out
        x = net.pool(f"pool{s}", x)
    for name, inputs, outputs in (("fc6", c_in * 49, FC), ("fc7", FC, FC), ("fc8", FC, 10)):
        blobs = [net.weights(outputs, inputs), net.weights(outputs, 4)[:, 0].copy()]
        x = net.add(name, "InnerProduct", x, blobs=blobs, num_output=outputs)
        if name != "fc8":
            net.add(f"relu{name[-1]}", "ReLU", x, top=x)
            net.add(f"drop{name[-1]}", "Dropout", x, top=x)
    net.add("prob", "Softmax", x)
    return net.layers


def dilated_layers(form: str, classes: int, *, context: bool = True) -> list[Layer]:
    """The four published DilatedNets with few channels: "voc", "camvid", "kitti", "cityscapes"."""
    net = _Spec(9)
    net.add("data", "Input")
    x, c_in = "data", 3
    for s, widths in enumerate(STAGES, 1):
        extra = {"dilation": 2} if s == 5 else {}
        for i, c_out in enumerate(widths, 1):
            x = net.conv(f"conv{s}_{i}", x, c_in, c_out, 3, relu=f"relu{s}_{i}", **extra)
            c_in = c_out
        if s <= 3:
            x = net.pool(f"pool{s}", x)
    for name, k, extra in (("fc6", 7, {"dilation": 4}), ("fc7", 1, {})):
        x = net.conv(name, x, c_in, FC, k, relu=f"relu{name[-1]}", **extra)
        net.add(f"drop{name[-1]}", "Dropout", x, top=x)
        c_in = FC
    voc = form == "voc"
    x = net.conv("fc-final" if voc else "final", x, FC, classes, 1)
    if context:
        levels = {"voc": 4, "camvid": 4, "kitti": 3, "cityscapes": 6}[form]
        names = ["conv1_1", "conv1_2", *(f"conv{i}_1" for i in range(2, levels + 2)), "fc1"]
        dilations = [1, 1, *(2**i for i in range(1, levels + 1)), 1]
        prefix, c_in, largest = ("ct_" if voc else "ctx_"), classes, 1
        for i, (name, d) in enumerate(zip(names, dilations, strict=True)):
            largest = max(largest, d)
            c_out = 2 * classes * largest if voc else classes
            pad = (33 if i == 0 else 0) if voc else d
            extra = {"dilation": d} if d > 1 else {}
            relu = f"{prefix}{name}_relu"
            x = net.conv(prefix + name, x, c_in, c_out, 3, relu=relu, pad=pad, **extra)
            c_in = c_out
        x = net.conv(f"{prefix}final", x, c_in, classes, 1)
        if form == "cityscapes":
            x = net.deconv("ctx_upsample", x, classes, 16, 8, group=classes, pad=4)
    net.add("prob", "Softmax", x)
    return net.layers


def changed(layers: list[Layer], name: str, **changes) -> list[Layer]:
    """The layers with one of them changed; ``params`` are merged."""
    assert name in [layer.name for layer in layers]
    changes = dict(changes)
    params = changes.pop("params", {})
    return [
        replace(layer, params=layer.params | params, **changes) if layer.name == name else layer
        for layer in layers
    ]


# The forward pass ------------------------------------------------------------------------------


def _convolve(x, weight, bias, pad, dilation, stride=1, group=1):
    if group > 1:
        parts = zip(
            *(np.split(array, group, axis) for array, axis in ((x, 1), (weight, 0), (bias, 0))),
            strict=True,
        )
        return np.concatenate([_convolve(*part, pad, dilation, stride) for part in parts], axis=1)
    c_out, _, k_h, k_w = weight.shape
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    h = x.shape[2] - dilation * (k_h - 1)
    w = x.shape[3] - dilation * (k_w - 1)
    out = np.zeros((x.shape[0], c_out, -(-h // stride), -(-w // stride)))
    for i in range(k_h):
        for j in range(k_w):
            window = x[:, :, i * dilation : i * dilation + h, j * dilation : j * dilation + w]
            window = window[:, :, ::stride, ::stride]
            out += np.einsum("nchw,oc->nohw", window, weight[:, :, i, j], optimize=True)
    return out + bias[:, None, None]


def _local_response(x, size, alpha, beta):
    """Across channels, as in Caffe's lrn_layer.cpp with k = 1."""
    around = np.pad(x**2, ((0, 0), (size // 2, size // 2), (0, 0), (0, 0)))
    sums = sum(around[:, i : i + x.shape[1]] for i in range(size))
    return x * (1 + alpha / size * sums) ** -beta


def _pool(x, k, s, pad=0):
    """MaxPooling with Caffe's size: rounded up, windows cut off at the border."""
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=-np.inf)
    size = [math.ceil((side - k) / s) + 1 for side in x.shape[2:]]
    out = np.full((*x.shape[:2], *size), -np.inf)
    for i in range(k):
        for j in range(k):
            window = x[:, :, i::s, j::s][:, :, : size[0], : size[1]]
            part = out[:, :, : window.shape[2], : window.shape[3]]
            np.maximum(part, window, out=part)
    return out


def _deconvolve(x, weight, k, s, pad, group):
    n, c, h, w = x.shape
    c_out = weight.shape[1] * group
    out = np.zeros((n, c_out, s * (h - 1) + k, s * (w - 1) + k))
    for i in range(k):
        for j in range(k):
            if group == 1:
                share = np.einsum("nchw,co->nohw", x, weight[:, :, i, j], optimize=True)
            else:
                assert group == c == c_out
                share = x * weight[:, 0, i, j][:, None, None]
            out[:, :, i : i + s * h : s, j : j + s * w : s][:, :, :h, :w] += share
    return out[:, :, pad : out.shape[2] - pad, pad : out.shape[3] - pad]


def run(layers: list[Layer], data: np.ndarray | tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
    """Compute every map of a net in float64.

    ``data`` is ``[n, c, h, w]`` as the net expects it; one array for each source, if several.
    """
    sources = iter(data if isinstance(data, tuple) else (data,))
    maps: dict[str, np.ndarray] = {}
    for layer in layers:
        inputs = [maps[name] for name in layer.bottoms if name in maps]
        blobs = [b.astype(np.float64) for b in layer.blobs]
        p = layer.params
        if layer.type in ("Python", "Data", "Input"):
            outputs = [np.asarray(next(sources), np.float64)]
        elif layer.type == "Split":
            outputs = [inputs[0]] * len(layer.tops)
        elif layer.type == "Convolution":
            options = p.get("dilation", 1), p.get("stride", 1), p.get("group", 1)
            outputs = [_convolve(inputs[0], *blobs, p.get("pad", 0), *options)]
        elif layer.type == "LRN":
            outputs = [_local_response(inputs[0], p["local_size"], p["alpha"], p["beta"])]
        elif layer.type == "Concat":
            outputs = [np.concatenate(inputs, axis=1)]
        elif layer.type == "ReLU":
            outputs = [np.maximum(inputs[0], 0)]
        elif layer.type == "Dropout":
            outputs = [inputs[0]]
        elif layer.type == "InnerProduct":
            outputs = [inputs[0].reshape(len(inputs[0]), -1) @ blobs[0].T + blobs[1]]
        elif layer.type == "Pooling" and p["pool"] == 1:  # averages: here over the whole map
            assert inputs[0].shape[2:] == (p["kernel_size"],) * 2
            outputs = [inputs[0].mean((2, 3), keepdims=True)]
        elif layer.type == "Pooling":
            outputs = [_pool(inputs[0], p["kernel_size"], p["stride"], p.get("pad", 0))]
        elif layer.type == "Scale":
            outputs = [inputs[0] * blobs[0][:, None, None]]
        elif layer.type == "Deconvolution":
            k, s = p["kernel_size"], p["stride"]
            group, pad = p.get("group", 1), p.get("pad", 0)
            outputs = [_deconvolve(inputs[0], blobs[0], k, s, pad, group)]
        elif layer.type == "Crop":
            o, (h, w) = p["offset"], inputs[1].shape[2:]
            outputs = [inputs[0][:, :, o : o + h, o : o + w]]
            assert outputs[0].shape[2:] == (h, w)
        elif layer.type == "Eltwise":
            first, second = p.get("coeff", (1, 1))
            outputs = [first * inputs[0] + second * inputs[1]]
        elif layer.type in ("Softmax", "SoftmaxWithLoss"):
            continue
        else:
            raise NotImplementedError(layer.type)
        maps.update(zip(layer.tops, outputs, strict=False))
    return maps
