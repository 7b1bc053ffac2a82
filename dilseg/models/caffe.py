# SPDX-License-Identifier: Apache-2.0
"""Reading .caffemodel files: layers, their weights, and the geometry that they state.

A .caffemodel is a NetParameter in protobuf's wire format. The few messages that matter are decoded
here, by tables of field numbers; nothing in a file is ever executed. All three generations of
layers are understood: the current ones, V1 (before 2015) and V0 inside V1.

Bounds, so that no file can cost more than it weighs: every declared length is held against the
bytes that are there, every shape against the values that are there; weights are views of the mapped
file; messages nest as deep as the format needs (net, layer, V0 layer, blob, shape) and no deeper,
since anything else is skipped unread; and a file may have ``MAX_FIELDS`` fields.

Source: ``caffe.proto``, ``blob.cpp`` (shapes) and ``upgrade_proto.cpp`` (names of types) of Caffe.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

__all__ = ["CaffeLayer", "CaffeModelError", "CaffeNet", "read_caffemodel"]

MAX_FIELDS = 50_000
"""Fields per file. Published nets have a few thousand; values of a blob count as one."""

_MAX_TEXT = 256  # bytes of a name; they are shown in messages and reports
_MAX_AXES = 32  # of a blob, as in Caffe


class CaffeModelError(ValueError):
    """A file is no .caffemodel, or a damaged one; the message names file, layer and damage."""


@dataclass(frozen=True)
class CaffeLayer:
    """A layer of a .caffemodel.

    Attributes:
        name: Its name, "" where the file has none.
        type: Its type as current Caffe spells it, such as "Convolution"; "" where unknown.
        inputs: How many maps it takes; 0 for a source of data.
        blobs: Its weights, float32 or float64, as stored: weight, then bias. Read-only views of
            the file, unless it holds the values of a blob in pieces.
        settings: What the file states about its geometry, such as ``{"pad": (1, 1)}`` with the
            defaults of Caffe filled in. Empty where it states nothing.
    """

    name: str
    type: str
    inputs: int = 0
    blobs: tuple[NDArray[np.floating[Any]], ...] = ()
    settings: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class CaffeNet:
    """The content of a .caffemodel.

    Attributes:
        source: The file.
        name: The name that the net gives itself.
        layers: All layers, in the order of the file.
    """

    source: str
    name: str
    layers: tuple[CaffeLayer, ...]


def read_caffemodel(path: str | os.PathLike[str]) -> CaffeNet:
    """Read a .caffemodel.

    Args:
        path: The file, as Caffe writes it (binary protobuf; not HDF5, not a prototxt). It is
            mapped, so it must not be changed while the result is in use.

    Returns:
        The layers, with weights as views of the file: blob shapes are those stored, legacy blobs
        have four dimensions.

    Raises:
        FileNotFoundError: There is no such file.
        CaffeModelError: The file is no .caffemodel or a damaged one: a length or a shape without
            the bytes for it, an unexpected wire type, more than ``MAX_FIELDS`` fields, no layers.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "tiny.caffemodel"
        >>> _ = path.write_bytes(bytes.fromhex("a20609 0a017a 1204 52654c55"))
        >>> read_caffemodel(path).layers
        (CaffeLayer(name='z', type='ReLU', inputs=0, blobs=(), settings={}),)

    Source: NetParameter of ``caffe.proto``.
    """
    where = os.fspath(path)
    if not os.path.isfile(where):
        raise FileNotFoundError(f"{where}: expected a .caffemodel file, but there is no such file.")
    with open(where, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if size == 0:
            raise CaffeModelError(
                f"{where}: expected a .caffemodel, but the file is empty. Fetch it again."
            )
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    if data[:8] == b"\x89HDF\r\n\x1a\n":
        raise CaffeModelError(
            f"{where}: expected a binary .caffemodel, but found an HDF5 snapshot. "
            "Write it as binary from Caffe (Net.save)."
        )
    file = _File(where, memoryview(data))
    name, generations = "", set()
    layers: list[CaffeLayer] = []
    net = _Message(file, 0, len(data), "the net")
    for entry in net.fields():
        if entry.number == _NET_NAME:
            name = net.text(entry)
        elif entry.number in (_NET_LAYER, _NET_LAYERS_V1):
            generations.add(entry.number)
            message = net.inner(entry, f"layer {len(layers)}")
            layers.append(_layer(message, _GENERATIONS[entry.number]))
    if len(generations) > 1:
        net.fail("layers of one generation", "both `layer` and legacy `layers`")
    if not layers:
        net.fail("layers", "none")
    return CaffeNet(where, name, tuple(layers))


# The wire format -------------------------------------------------------------------------------

_VARINT, _I64, _BYTES, _I32 = 0, 1, 2, 5
_WIRE_NAMES = {
    _VARINT: "a number",
    _I64: "8 bytes",
    _BYTES: "bytes with a length",
    3: "a group",
    4: "the end of a group",
    _I32: "4 bytes",
}


class _Field(NamedTuple):
    """A field of a message: where its tag is, and its value or where that is."""

    number: int
    wire: int
    at: int
    start: int
    value: int  # of a varint; otherwise the length in bytes


class _File:
    """The bytes of a file, and how many fields were read of them."""

    def __init__(self, path: str, data: memoryview) -> None:
        self.path = path
        self.data = data
        self.fields = 0


class _Message:
    """A message in a file: the bytes from ``at`` to ``end``, taken field by field."""

    def __init__(self, file: _File, start: int, end: int, place: str) -> None:
        self.file = file
        self.at = start
        self.end = end
        self.place = place

    def fail(self, expected: str, found: str) -> NoReturn:
        raise CaffeModelError(
            f"{self.file.path}: {self.place}: expected {expected}, but found {found} at byte "
            f"{self.at}. The file is damaged or no binary .caffemodel; fetch it again."
        )

    def fields(self) -> Iterator[_Field]:
        """The fields in order; what the reader skips over by moving ``at`` is left out."""
        while self.at < self.end:
            self.file.fields += 1
            if self.file.fields > MAX_FIELDS:
                self.fail(f"at most {MAX_FIELDS} fields in the file", "more")
            at = self.at
            tag = self._varint()
            number, wire = tag >> 3, tag & 7
            if not 1 <= number < 2**29:
                self.fail("a field number from 1 to 2^29 - 1", str(number))
            if wire == _VARINT:
                value = self._varint()
                yield _Field(number, wire, at, self.at, value)
                continue
            if wire == _BYTES:
                length = self._varint()
            elif wire in (_I32, _I64):
                length = 4 if wire == _I32 else 8
            else:
                self.fail("a field", _WIRE_NAMES.get(wire, f"the unknown wire type {wire}"))
            start = self.at
            if length > self.end - start:
                self.fail(f"{length} bytes of field {number}", f"{self.end - start}")
            self.at = start + length
            yield _Field(number, wire, at, start, length)

    def inner(self, entry: _Field, place: str) -> _Message:
        """The message in a field."""
        self._require(entry, _BYTES)
        return _Message(self.file, entry.start, entry.start + entry.value, place)

    def text(self, entry: _Field) -> str:
        """The printable text in a field; other characters come as escapes."""
        self._require(entry, _BYTES)
        if entry.value > _MAX_TEXT:
            self.fail(f"a text of at most {_MAX_TEXT} bytes", f"one of {entry.value}")
        raw = bytes(self.file.data[entry.start : entry.start + entry.value])
        text = raw.decode("utf-8", "backslashreplace")
        return text if text.isprintable() else ascii(text)[1:-1]

    def integers(self, entry: _Field) -> list[int]:
        """The signed numbers in a field, packed or single."""
        if entry.wire != _BYTES:
            self._require(entry, _VARINT)
            return [_signed(entry.value)]
        packed = self.inner(entry, self.place)
        values = []
        while packed.at < packed.end:
            self.file.fields += 1
            if self.file.fields > MAX_FIELDS:
                self.fail(f"at most {MAX_FIELDS} fields in the file", "more")
            values.append(_signed(packed._varint()))
        return values

    def floats(self, entry: _Field, dtype: str) -> NDArray[np.floating[Any]]:
        """The floating-point numbers in a field, packed or single, as a view.

        A run of single ones, each with its tag, is taken as a whole.
        """
        kind = np.dtype(dtype)
        if entry.wire == _BYTES:
            if entry.value % kind.itemsize:
                self.fail(f"a multiple of {kind.itemsize} bytes of numbers", f"{entry.value}")
            count = entry.value // kind.itemsize
            return np.frombuffer(self.file.data, kind, count, entry.start)
        self._require(entry, _I32 if kind.itemsize == 4 else _I64)
        if entry.start != entry.at + 1:  # a tag of several bytes, which no known writer makes
            return np.frombuffer(self.file.data, kind, 1, entry.start)
        record = np.dtype([("tag", np.uint8), ("value", kind)])
        most = (self.end - entry.at) // record.itemsize
        records = np.frombuffer(self.file.data, record, most, entry.at)
        tags, run, step = records["tag"], 1, 64
        while run < most:
            same = tags[run : run + step] == tags[0]
            if not same.all():
                run += int(same.argmin())
                break
            run += len(same)
            step *= 2
        self.at = entry.at + run * record.itemsize
        values: NDArray[np.floating[Any]] = records["value"][:run]
        return values

    def _require(self, entry: _Field, wire: int) -> None:
        if entry.wire != wire:
            self.fail(f"{_WIRE_NAMES[wire]} in field {entry.number}", _WIRE_NAMES[entry.wire])

    def _varint(self) -> int:
        data, at, end = self.file.data, self.at, self.end
        value = shift = 0
        while True:
            if at >= end:
                self.fail("the rest of a number", "the end of the data")
            if shift > 63:
                self.fail("a number of at most 10 bytes", "a longer one")
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                self.at = at
                return value & (2**64 - 1)
            shift += 7


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


# Caffe's messages ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Generation:
    """Field numbers of a generation of layers."""

    name: int
    type: int
    inputs: int
    blobs: int
    nested: int | None = None  # the V0 layer inside a V1 layer
    settings: Mapping[int, str] = field(default_factory=dict)


_NET_NAME, _NET_LAYERS_V1, _NET_LAYER = 1, 2, 100
_V0 = _Generation(name=1, type=2, inputs=0, blobs=50)
_GENERATIONS = {
    _NET_LAYER: _Generation(
        name=1,
        type=2,
        inputs=3,
        blobs=7,
        settings={
            100: "transform",
            104: "concat",
            106: "convolution",
            110: "eltwise",
            117: "inner_product",
            118: "lrn",
            121: "pooling",
            123: "relu",
            144: "crop",
        },
    ),
    _NET_LAYERS_V1: _Generation(
        name=4,
        type=5,
        inputs=2,
        blobs=6,
        nested=1,
        settings={
            9: "concat",
            10: "convolution",
            17: "inner_product",
            18: "lrn",
            19: "pooling",
            24: "eltwise",
            30: "relu",
            36: "transform",
        },
    ),
}

# Per message of settings: field number -> name, of numbers; those in _FLOATS are floats.
_SETTINGS: dict[str, dict[int, str]] = {
    "transform": {1: "scale", 4: "mean_file", 5: "mean"},
    "convolution": {
        3: "pad",
        4: "kernel",
        5: "group",
        6: "stride",
        9: "pad_h",
        10: "pad_w",
        11: "kernel_h",
        12: "kernel_w",
        13: "stride_h",
        14: "stride_w",
        18: "dilation",
    },
    "concat": {1: "concat_dim", 2: "axis"},
    "eltwise": {1: "operation", 2: "coefficients"},
    "inner_product": {6: "transpose"},
    "lrn": {1: "local_size", 2: "alpha", 3: "beta", 4: "region", 5: "k"},
    "pooling": {
        1: "method",
        2: "kernel",
        3: "stride",
        4: "pad",
        5: "kernel_h",
        6: "kernel_w",
        7: "stride_h",
        8: "stride_w",
        9: "pad_h",
        10: "pad_w",
        12: "global",
        13: "rounding",
    },
    "relu": {1: "negative_slope"},
    "crop": {1: "axis", 2: "offset"},
}
_FLOATS = {"scale", "mean", "coefficients", "negative_slope", "alpha", "beta", "k"}
_PRESENCE = {"mean_file"}  # a path on another machine: that there is one is all that matters
# What Caffe takes where a message leaves a setting out; a pair counts for height and width.
_DEFAULTS: dict[str, dict[str, tuple[float, ...]]] = {
    "transform": {"scale": (1.0,)},
    "convolution": {"pad": (0, 0), "stride": (1, 1), "dilation": (1, 1), "group": (1,)},
    "concat": {"concat_dim": (1,), "axis": (1,)},
    "eltwise": {"operation": (1,), "coefficients": (1.0, 1.0)},
    "inner_product": {"transpose": (0,)},
    "lrn": {
        "local_size": (5,), "alpha": (1.0,), "beta": (0.75,), "region": (0,), "k": (1.0,),
    },
    "pooling": {
        "method": (0,), "stride": (1, 1), "pad": (0, 0), "global": (0,), "rounding": (0,),
    },
    "relu": {"negative_slope": (0.0,)},
    "crop": {"axis": (2,), "offset": (0, 0)},
}  # fmt: skip
_PAIRS = ("pad", "kernel", "stride", "dilation", "offset")

_V1_TYPES = {
    1: "Accuracy",
    2: "BNLL",
    3: "Concat",
    4: "Convolution",
    5: "Data",
    6: "Dropout",
    7: "EuclideanLoss",
    8: "Flatten",
    9: "HDF5Data",
    10: "HDF5Output",
    11: "Im2col",
    12: "ImageData",
    13: "InfogainLoss",
    14: "InnerProduct",
    15: "LRN",
    16: "MultinomialLogisticLoss",
    17: "Pooling",
    18: "ReLU",
    19: "Sigmoid",
    20: "Softmax",
    21: "SoftmaxWithLoss",
    22: "Split",
    23: "TanH",
    24: "WindowData",
    25: "Eltwise",
    26: "Power",
    27: "SigmoidCrossEntropyLoss",
    28: "HingeLoss",
    29: "MemoryData",
    30: "ArgMax",
    31: "Threshold",
    32: "DummyData",
    33: "Slice",
    34: "MVN",
    35: "AbsVal",
    36: "Silence",
    37: "ContrastiveLoss",
    38: "Exp",
    39: "Deconvolution",
}
_V0_TYPES = {
    "accuracy": "Accuracy",
    "conv": "Convolution",
    "data": "Data",
    "dropout": "Dropout",
    "images": "ImageData",
    "innerproduct": "InnerProduct",
    "lrn": "LRN",
    "pool": "Pooling",
    "relu": "ReLU",
    "softmax": "Softmax",
    "softmax_loss": "SoftmaxWithLoss",
    "split": "Split",
}


def _layer(message: _Message, numbers: _Generation) -> CaffeLayer:
    name, kind, inputs = "", "", 0
    blobs: list[NDArray[np.floating[Any]]] = []
    stated: dict[str, dict[str, list[float]]] = {}
    for entry in message.fields():
        if entry.number == numbers.name:
            name = message.text(entry)
            message.place = _place(name)
        elif entry.number == numbers.type and numbers.nested is None:
            kind = message.text(entry)
        elif entry.number == numbers.type:
            value = message.integers(entry)[-1:]
            kind = _V1_TYPES.get(value[0], f"type {value[0]}") if value else ""
        elif entry.number == numbers.inputs:
            inputs += 1
        elif entry.number == numbers.blobs:
            place = f"{message.place}, blob {len(blobs)}"
            blobs.append(_blob(message.inner(entry, place)))
        elif entry.number in numbers.settings:
            part = numbers.settings[entry.number]
            inner = message.inner(entry, f"{message.place}, {part} settings")
            _collect(inner, _SETTINGS[part], stated.setdefault(part, {}))
        elif numbers.nested is not None and entry.number == numbers.nested:
            oldest = _layer(message.inner(entry, message.place), _V0)
            name, kind = oldest.name, _V0_TYPES.get(oldest.type, oldest.type)
            message.place = _place(name)
            blobs.extend(oldest.blobs)
    settings: dict[str, tuple[float, ...]] = {}
    for part, values in stated.items():
        settings |= _DEFAULTS[part] | _complete(values)
    return CaffeLayer(name, kind, inputs, tuple(blobs), settings)


def _place(name: str) -> str:
    return f"layer {name!r}" if len(name) <= 80 else f"layer {name[:80]!r}..."


def _collect(message: _Message, names: Mapping[int, str], found: dict[str, list[float]]) -> None:
    for entry in message.fields():
        name = names.get(entry.number)
        if name is None:
            continue
        if name in _PRESENCE:
            found[name] = [1]
            continue
        values = found.setdefault(name, [])
        new = message.floats(entry, "<f4") if name in _FLOATS else message.integers(entry)
        if len(values) + len(new) > _MAX_AXES:
            message.fail(f"at most {_MAX_AXES} values of {name}", f"{len(values) + len(new)}")
        values.extend(map(float if name in _FLOATS else int, new))


def _complete(found: Mapping[str, list[float]]) -> dict[str, tuple[float, ...]]:
    """Spell sizes out as height and width, and take the last of what may occur once."""
    settings: dict[str, tuple[float, ...]] = {}
    for name, values in found.items():
        base, _, side = name.rpartition("_")
        if side in ("h", "w"):
            default = 0 if base == "pad" else 1
            settings[base] = tuple(
                found.get(f"{base}_{axis}", [default])[-1] for axis in ("h", "w")
            )
        elif name in _PAIRS:
            if f"{name}_h" not in found and f"{name}_w" not in found and values:
                settings[name] = tuple(values) * 2 if len(values) == 1 else tuple(values)
        elif name in ("mean", "coefficients"):
            settings[name] = tuple(values)
        elif values:
            settings[name] = (values[-1],)
    return settings


def _blob(message: _Message) -> NDArray[np.floating[Any]]:
    legacy: dict[int, int] = {}
    axes: list[int] = []
    singles: list[NDArray[np.floating[Any]]] = []
    doubles: list[NDArray[np.floating[Any]]] = []
    for entry in message.fields():
        if entry.number in (1, 2, 3, 4):  # num, channels, height, width
            legacy[entry.number] = (message.integers(entry) or [0])[-1]
        elif entry.number == 5:
            singles.append(message.floats(entry, "<f4"))
        elif entry.number == 7:
            shape_message = message.inner(entry, message.place)
            for axis in shape_message.fields():
                if axis.number == 1:
                    axes += shape_message.integers(axis)
        elif entry.number == 8:
            doubles.append(message.floats(entry, "<f8"))
    shape = tuple(legacy.get(number, 0) for number in (1, 2, 3, 4)) if legacy else tuple(axes)
    parts = doubles or singles
    count = sum(map(len, parts))
    if len(shape) > _MAX_AXES:
        message.fail(f"at most {_MAX_AXES} dimensions", f"{len(shape)}")
    if any(size < 1 for size in shape):
        message.fail("a shape of positive sizes", f"{shape}")
    if math.prod(shape) != count:
        message.fail(f"{_short(math.prod(shape))} values for the shape {shape}", f"{count}")
    values = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return values.reshape(shape)


def _short(number: int) -> str:
    return str(number) if number < 10**18 else "more than 10^18"
