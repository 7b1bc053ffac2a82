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
    "Eltwise": (110, 24, {"operation": 1}),
    "Crop": (144, None, {"axis": 1, "offset": 2}),
    "Dropout": (108, 12, {}),
}
V1_TYPES = {"Convolution": 4, "Data": 5, "Dropout": 6, "InnerProduct": 14, "LRN": 15,
            "Pooling": 17, "ReLU": 18, "Softmax": 20, "SoftmaxWithLoss": 21, "Split": 22,
            "Eltwise": 25, "Deconvolution": 39}  # fmt: skip
V0_TYPES = {"Convolution": "conv", "Data": "data", "Dropout": "dropout", "Softmax": "softmax",
            "InnerProduct": "innerproduct", "Pooling": "pool", "ReLU": "relu"}  # fmt: skip


def _settings(layer: Layer, legacy: bool) -> bytes:
    out = b""
    if layer.type in MESSAGES and layer.params:
        current, v1, fields = MESSAGES[layer.type]
        body = b"".join(number(fields[k], int(v)) for k, v in layer.params.items() if k in fields)
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
        blobs = [self.weights(c_out, c_in, k, k), self.weights(c_out, 4)[:, 0].copy()]
        out = self.add(name, "Convolution", bottom, top=top, blobs=blobs, num_output=c_out,
                       kernel_size=k, **params)  # fmt: skip
        if relu:
            self.add(relu, "ReLU", out, top=out)
        return out

    def pool(self, name, bottom) -> str:
        return self.add(name, "Pooling", bottom, pool=0, kernel_size=2, stride=2)

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
    x, c_in = "data_data_0_split_0", 3
    for s, widths in enumerate(STAGES, 1):
        for i, c_out in enumerate(widths, 1):
            pad = 100 if (s, i) == (1, 1) else 1
            x = net.conv(f"conv{s}_{i}", x, c_in, c_out, 3, relu=f"relu{s}_{i}", pad=pad, stride=1)
            c_in = c_out
        x = net.pool(f"pool{s}", x)
    for name, k in (("fc6", 7), ("fc7", 1)):
        x = net.conv(name, x, c_in, FC, k, relu=f"relu{name[-1]}", pad=0, stride=1)
        net.add(f"drop{name[-1]}", "Dropout", x, top=x)
        c_in = FC
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


def _convolve(x, weight, bias, pad, dilation):
    c_out, _, k_h, k_w = weight.shape
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    h = x.shape[2] - dilation * (k_h - 1)
    w = x.shape[3] - dilation * (k_w - 1)
    out = np.zeros((x.shape[0], c_out, h, w))
    for i in range(k_h):
        for j in range(k_w):
            window = x[:, :, i * dilation : i * dilation + h, j * dilation : j * dilation + w]
            out += np.einsum("nchw,oc->nohw", window, weight[:, :, i, j], optimize=True)
    return out + bias[:, None, None]


def _pool(x, k, s):
    """MaxPooling with Caffe's size: rounded up, windows cut off at the border."""
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


def run(layers: list[Layer], data: np.ndarray) -> dict[str, np.ndarray]:
    """Compute every map of a net in float64; ``data`` is ``[n, 3, h, w]`` as the net expects it."""
    maps: dict[str, np.ndarray] = {}
    for layer in layers:
        inputs = [maps[name] for name in layer.bottoms if name in maps]
        blobs = [b.astype(np.float64) for b in layer.blobs]
        p = layer.params
        if layer.type in ("Python", "Data", "Input"):
            outputs = [np.asarray(data, np.float64)]
        elif layer.type == "Split":
            outputs = [inputs[0]] * len(layer.tops)
        elif layer.type == "Convolution":
            outputs = [_convolve(inputs[0], *blobs, p.get("pad", 0), p.get("dilation", 1))]
        elif layer.type == "ReLU":
            outputs = [np.maximum(inputs[0], 0)]
        elif layer.type == "Dropout":
            outputs = [inputs[0]]
        elif layer.type == "Pooling":
            outputs = [_pool(inputs[0], p["kernel_size"], p["stride"])]
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
            outputs = [inputs[0] + inputs[1]]
        elif layer.type in ("Softmax", "SoftmaxWithLoss"):
            continue
        else:
            raise NotImplementedError(layer.type)
        maps.update(zip(layer.tops, outputs, strict=False))
    return maps
