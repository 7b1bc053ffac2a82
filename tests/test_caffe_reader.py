# SPDX-License-Identifier: Apache-2.0
"""Reading .caffemodel files: every generation and form of blob, and files that mean harm."""

import numpy as np
import pytest
from helpers import caffe
from helpers.caffe import Layer, chunk, mutated, number, single, varint
from helpers.memory import memory_within

from dilseg.models import CaffeModelError, CaffeNet, read_caffemodel
from dilseg.models import caffe as reader

SMALL = [
    Layer("data", "Data"),
    Layer(
        "conv1_1",
        "Convolution",
        ("data",),
        ("conv1_1",),
        {"num_output": 2, "pad": 1, "kernel_size": 3},
        [np.arange(54, dtype=np.float32).reshape(2, 3, 3, 3), np.float32([0.5, -0.5])],
    ),
    Layer("relu1_1", "ReLU", ("conv1_1",), ("conv1_1",)),
    Layer("fc", "InnerProduct", ("conv1_1",), ("fc",), {}, [np.ones((4, 6), np.float32)]),
]


@pytest.fixture
def write(tmp_path):
    def write(content: bytes):
        path = tmp_path / "net.caffemodel"
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize("style", ["current", "legacy", "unpacked", "double", "pieces"])
@pytest.mark.parametrize("generation", ["current", "v1", "v0"])
def test_layers_and_values(write, generation, style):
    path = write(caffe.encode(SMALL, generation, style))
    net = read_caffemodel(path)
    assert (net.source, net.name) == (str(path), "a net")
    assert [(layer.name, layer.type, layer.inputs) for layer in net.layers] == [
        (layer.name, layer.type, len(layer.bottoms)) for layer in SMALL
    ]
    for layer, expected in zip(net.layers, SMALL, strict=True):
        assert len(layer.blobs) == len(expected.blobs)
        for array, values in zip(layer.blobs, expected.blobs, strict=True):
            assert array.dtype == (np.float64 if style == "double" else np.float32)
            four = (1,) * (4 - values.ndim) + values.shape
            assert array.shape == (four if style == "legacy" else values.shape)
            assert np.array_equal(array.reshape(values.shape), values)
            assert array.flags.writeable == (style == "pieces" and values.size > 1)


def test_of_two_shapes_and_two_precisions_the_ones_that_caffe_takes(write):
    sizes = number(1, 1) + number(2, 1) + number(3, 2) + number(4, 3)
    single_zeros = chunk(5, bytes(24))
    doubles = chunk(8, np.arange(6, dtype="<f8").tobytes())
    shape = chunk(7, chunk(1, b"\x06"))
    for parts in ([sizes, single_zeros, doubles, shape], [shape, doubles, single_zeros, sizes]):
        path = write(chunk(100, chunk(1, b"fc") + chunk(7, b"".join(parts))))
        array = read_caffemodel(path).layers[0].blobs[0]
        assert array.dtype == np.float64
        assert np.array_equal(array, np.arange(6.0).reshape(1, 1, 2, 3))


def test_values_are_views_of_the_file(write):
    """A file of 40 MB in one blob costs no memory to read."""
    blob = caffe.blob(np.zeros(10_000_000, np.float32))
    path = write(chunk(100, chunk(1, b"big") + chunk(7, blob)))
    with memory_within(1_000_000):
        array = read_caffemodel(path).layers[0].blobs[0]
    assert array.shape == (10_000_000,)


@pytest.mark.parametrize("generation", ["current", "v1"])
def test_settings_are_completed_with_defaults(write, generation):
    params = {"pad": 1, "kernel_h": 3, "kernel_w": 5, "dilation": 2}
    layers = [
        Layer("conv", "Convolution", ("x",), ("y",), params),
        Layer("pool", "Pooling", ("y",), ("z",), {"pool": 1, "kernel_size": 3, "stride": 2}),
        Layer("data", "Data", params={"mean_value": (1.0, 2.0, 3.0), "scale": 0.5}),
    ]
    conv, pool, data = read_caffemodel(write(caffe.encode(layers, generation))).layers
    assert conv.settings == {
        "pad": (1, 1), "kernel": (3, 5), "stride": (1, 1), "dilation": (2, 2), "group": (1,),
    }  # fmt: skip
    assert pool.settings == {
        "method": (1,), "kernel": (3, 3), "stride": (2, 2), "pad": (0, 0), "global": (0,),
        "rounding": (0,),
    }  # fmt: skip
    assert data.settings == {"mean": (1.0, 2.0, 3.0), "scale": (0.5,)}
    bare = read_caffemodel(write(caffe.encode([Layer("conv", "Convolution")], generation)))
    assert bare.layers[0].settings == {}


def test_crop_offsets(write):
    layers = [Layer("score", "Crop", ("a", "b"), ("c",), {"axis": 2, "offset": 19})]
    assert read_caffemodel(write(caffe.encode(layers))).layers[0].settings == {
        "axis": (2,),
        "offset": (19, 19),
    }


def test_names_from_a_file_cannot_write_to_the_terminal(write):
    path = write(chunk(100, chunk(1, b"\x1b[31mred\n") + chunk(2, b"\xff")))
    layer = read_caffemodel(path).layers[0]
    assert layer.name == r"\x1b[31mred\n"
    assert layer.type == r"\xff"


# Damage and hostility --------------------------------------------------------------------------


def fails(path, *texts) -> str:
    """The one sentence, or line, with which a file is refused."""
    with pytest.raises(CaffeModelError) as caught:
        read_caffemodel(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 400
    for text in texts:
        assert text in message
    return message


@pytest.mark.parametrize("generation", ["current", "v1", "v0"])
def test_truncation_at_every_length(write, generation):
    """The layers before the cut, or an error; a cut between layers cannot be told from an end."""
    content = caffe.encode(SMALL, generation)
    whole = read_caffemodel(write(content)).layers
    head = content[: -sum(len(caffe.encode_layer(layer, generation)) for layer in SMALL)]
    ends, at = {}, len(head)
    for count, layer in enumerate(SMALL, 1):
        at += len(caffe.encode_layer(layer, generation))
        ends[at] = count
    assert at == len(content)
    for length in range(len(content)):
        path = write(content[:length])
        if length not in ends:
            fails(path)
            continue
        layers = read_caffemodel(path).layers
        assert [layer.name for layer in layers] == [layer.name for layer in whole[: ends[length]]]


def layer_with(blob: bytes) -> bytes:
    return chunk(100, chunk(1, b"fc6") + chunk(7, blob))


HUGE = 2**62
HOSTILE = {
    "empty": (b"", ["the file is empty"]),
    "text": (b"<html>404 Not Found</html>", ["the end of a group"]),
    "prototxt": (b'name: "VGG"\nlayer {\n}\n', ["unknown wire type 6"]),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(64), ["HDF5 snapshot"]),
    "no layers": (chunk(1, b"net"), ["expected layers, but found none"]),
    "both generations": (chunk(100, b"") + chunk(2, b""), ["layers of one generation"]),
    "layer longer than the file": (varint(100 << 3 | 2) + varint(HUGE), [f"{HUGE} bytes of field"]),
    "blob longer than its layer": (
        chunk(100, chunk(1, b"fc6") + varint(7 << 3 | 2) + varint(2**40) + b"abc"),
        ["layer 'fc6'", f"{2**40} bytes of field 7", "found 3"],
    ),
    "shape without values": (
        layer_with(chunk(7, chunk(1, varint(2**31) * 4))),
        ["layer 'fc6', blob 0", "more than 10^18 values", "found 0"],
    ),
    "legacy shape without values": (
        layer_with(number(1, 2**31 - 1) + number(2, 2**31 - 1) + number(3, 1) + number(4, 1)),
        ["layer 'fc6', blob 0", "more than 10^18 values"],
    ),
    "product that wraps to the count": (
        layer_with(chunk(7, chunk(1, varint(2**32) * 2)) + chunk(5, b"")),
        ["more than 10^18 values"],
    ),
    "negative size": (
        layer_with(chunk(7, chunk(1, varint(-2) + varint(-2))) + chunk(5, bytes(16))),
        ["positive sizes", "(-2, -2)"],
    ),
    "size of zero": (layer_with(chunk(7, chunk(1, b"\x00"))), ["positive sizes"]),
    "sixty dimensions": (
        layer_with(chunk(7, chunk(1, b"\x01" * 60)) + chunk(5, bytes(4))),
        ["at most 32 dimensions", "60"],
    ),
    "no shape": (layer_with(chunk(5, bytes(8))), ["expected 1 values for the shape ()", "found 2"]),
    "half a float": (layer_with(chunk(5, bytes(6))), ["multiple of 4 bytes"]),
    "half a double": (layer_with(chunk(8, bytes(12))), ["multiple of 8 bytes"]),
    "floats as varints": (layer_with(number(5, 1)), ["4 bytes in field 5", "found a number"]),
    "doubles as floats": (layer_with(single(8, 1.0)), ["8 bytes in field 8", "found 4 bytes"]),
    "layer as a number": (number(100, 1), ["bytes with a length in field 100"]),
    "blob as a number": (
        chunk(100, chunk(1, b"fc6") + number(7, 1)),
        ["layer 'fc6'", "bytes with a length in field 7", "found a number"],
    ),
    "name as a float": (chunk(100, single(1, 1.0)), ["layer 0", "in field 1"]),
    "name of a megabyte": (chunk(100, chunk(1, b"x" * 2**20)), ["at most 256 bytes"]),
    "group": (varint(9 << 3 | 3), ["found a group"]),
    "groups, nested": (varint(9 << 3 | 3) * 100_000, ["found a group"]),
    "number without an end": (b"\xff" * 64, ["at most 10 bytes"]),
    "number cut off": (b"\xa2", ["the rest of a number"]),
    "field number zero": (b"\x00\x00", ["a field number from 1"]),
    "field number too large": (varint(2**40 << 3), ["a field number from 1"]),
    "a million empty layers": (chunk(100, b"") * 1_000_000, ["at most 50000 fields"]),
    "a million empty blobs": (
        chunk(100, chunk(7, caffe.blob(np.float32([1]))) * 100_000),
        ["at most 50000 fields"],
    ),
    "a shape of a million ones": (
        layer_with(chunk(7, chunk(1, b"\x01" * 1_000_000))),
        ["at most 50000 fields"],
    ),
    "a mean of a million values": (
        chunk(100, chunk(100, chunk(5, bytes(4_000_000)))),
        ["at most 32 values of mean"],
    ),
    "floats and sizes in turn": (
        layer_with((single(5, 1.0) + number(1, 1)) * 100_000),
        ["at most 50000 fields"],
    ),
}


@pytest.mark.parametrize(("content", "texts"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_end_in_one_sentence_and_little_memory(write, content, texts):
    path = write(content)
    with memory_within(100_000_000):
        fails(path, *texts)


def test_unknown_messages_are_skipped_however_deep(write):
    deep = b""
    for _ in range(20_000):
        deep = chunk(9, deep)
    path = write(chunk(9, deep) + chunk(100, chunk(1, b"a") + chunk(99, deep)))
    assert [layer.name for layer in read_caffemodel(path).layers] == ["a"]


def test_layers_do_not_nest(write):
    """A V0 layer lies in a V1 layer; one that claims to hold another is read no deeper."""
    inner = chunk(1, b"conv1") + chunk(2, b"conv")
    for _ in range(5_000):
        inner = chunk(1, inner)
    with pytest.raises(CaffeModelError, match="at most 256 bytes"):
        read_caffemodel(write(chunk(2, inner)))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.caffemodel: expected a \.caffemodel file"):
        read_caffemodel(tmp_path / "no.caffemodel")
    with pytest.raises(FileNotFoundError):
        read_caffemodel("/dev/zero")


@pytest.mark.parametrize("generation", ["current", "v1", "v0"])
def test_fuzz(write, generation):
    """Whatever the bytes: a net whose blobs have the values they claim, or the one error."""
    random = np.random.default_rng(len(generation))
    seeds = [caffe.encode(SMALL, generation, style) for style in ("current", "legacy", "unpacked")]
    refused = 0
    for round_ in range(600):
        content = mutated(seeds[round_ % len(seeds)], random)
        path = write(content)
        try:
            net = read_caffemodel(path)
        except CaffeModelError:
            fails(path)
            refused += 1
            continue
        assert isinstance(net, CaffeNet)
        held = sum(blob.nbytes for layer in net.layers for blob in layer.blobs)
        assert held <= len(content)
    assert 100 < refused < 600


def test_limits_leave_room_for_published_nets(write):
    """Hundreds of layers with all their settings use a small part of the allowed fields."""
    layers = caffe.fcn_layers(8, 3, at_once=True)
    path = write(caffe.encode(layers))
    file = reader._File(str(path), memoryview(path.read_bytes()))
    net = reader._Message(file, 0, len(file.data), "the net")
    for entry in net.fields():
        if entry.number == 100:
            reader._layer(net.inner(entry, "layer"), reader._GENERATIONS[100])
    assert file.fields < reader.MAX_FIELDS / 20
