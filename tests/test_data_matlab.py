# SPDX-License-Identifier: Apache-2.0
"""MATLAB files of both versions, written by scipy and h5py: what is read, and what is refused."""

import math
import struct
import zlib

import numpy as np
import pytest
from helpers.memory import memory_within

from dilseg.data import matlab
from dilseg.data.matlab import hdf_frame, hdf_frames, hdf_size, open_hdf, read_mat

scipy_io = pytest.importorskip("scipy.io", reason="needs scipy")
h5py = pytest.importorskip("h5py", reason="needs h5py")

LABEL = np.arange(48).reshape(6, 8)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.mat"


# --- v5 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "i4", "f4", "f8"])
def test_read_mat(path, dtype, compressed):
    label = LABEL.astype(dtype)
    scipy_io.savemat(
        path, {"text": "abc", "S": label, "cells": np.array(["a", label], object)},
        do_compression=compressed,
    )  # fmt: skip
    read = read_mat(path, "S")
    assert read.dtype == label.dtype
    np.testing.assert_array_equal(read, label)


@pytest.mark.parametrize("compressed", [False, True])
def test_read_mat_of_a_struct(path, compressed):
    cells = np.empty((3, 1), object)
    cells[:] = [["x"], [LABEL], [{"inner": LABEL}]]
    content = {"Cells": cells, "Segmentation": LABEL.astype(np.uint8), "Name": "2008_000002"}
    scipy_io.savemat(path, {"GTcls": content}, do_compression=compressed)
    np.testing.assert_array_equal(read_mat(path, "GTcls", "Segmentation"), LABEL)


def matlab_file(*elements, order="<"):
    version, endian = struct.pack(f"{order}H", 0x0100), {"<": b"IM", ">": b"MI"}[order]
    return b"MATLAB 5.0 MAT-file".ljust(124) + version + endian + b"".join(elements)


def part(kind, data, order="<"):
    return struct.pack(f"{order}II", kind, len(data)) + data + b"\0" * (-len(data) % 8)


def array(array_class, dims, *content, name=b"S", order="<", flags=0):
    body = part(6, struct.pack(f"{order}II", array_class | flags, 0), order)
    body += part(5, struct.pack(f"{order}{len(dims)}i", *dims), order)
    body += part(1, name, order) + b"".join(content)
    return part(14, body, order)


def compressed(element):
    data = zlib.compress(element)
    return struct.pack("<II", 15, len(data)) + data


DOUBLE, CHAR, CELL, STRUCT, SPARSE, FUNCTION, OPAQUE = 6, 4, 1, 2, 5, 16, 17


@pytest.mark.parametrize("order", ["<", ">"])
def test_read_mat_of_both_byte_orders_and_small_parts(path, order):
    # As MATLAB writes them: whole numbers of class double stored in few bytes, small parts packed.
    small = struct.pack(f"{order}I", 4 << 16 | 2) + bytes([0, 1, 2, 255])
    path.write_bytes(matlab_file(array(DOUBLE, (2, 2), small, order=order), order=order))
    assert read_mat(path, "S").tolist() == [[0, 2], [1, 255]]
    wide = part(4, struct.pack(f"{order}4H", 0, 1, 2, 459), order)
    path.write_bytes(matlab_file(array(DOUBLE, (2, 2), wide, order=order), order=order))
    assert read_mat(path, "S").tolist() == [[0, 2], [1, 459]]


def test_read_mat_passes_over_what_it_does_not_want(path):
    bomb = compressed(array(DOUBLE, (2**15, 2**15), part(2, bytes(2**20)), name=b"T"))
    function = array(FUNCTION, (1, 1), name=b"f")
    opaque = part(14, part(6, struct.pack("<II", OPAQUE, 0)) + part(1, b"containers"))
    wanted = compressed(array(DOUBLE, (1, 2), part(2, b"\3\4")))
    path.write_bytes(matlab_file(bomb, function, opaque, wanted))
    assert read_mat(path, "S").tolist() == [[3, 4]]


def nested(depth):
    element = array(DOUBLE, (1, 1), part(2, b"\1"), name=b"")
    for _ in range(depth):
        element = array(CELL, (1, 1), element, name=b"")
    return array(CELL, (1, 1), element)


FIELDS = part(5, struct.pack("<i", 8)) + part(1, b"a".ljust(8, b"\0"))
BIG = 2**30
EMPTY = struct.pack("<II", 14, 0)

#: Files that ask for gigabytes, or are otherwise made to harm, and what is said of each.
HOSTILE = {
    "matrix": (array(DOUBLE, (BIG, BIG), part(2, b"\1")), "1 numbers for an array of 1073741824 x"),
    "empty matrix": (array(DOUBLE, (BIG, 1), part(2, b"")), "0 numbers for an array of"),
    "cells": (array(CELL, (BIG, 1)), "more cells or fields than bytes"),
    "structs": (array(STRUCT, (BIG, 1), FIELDS), "more cells or fields than bytes"),
    "no fields": (array(STRUCT, (BIG, 1), FIELDS[:16], part(1, b"")), "array without fields"),
    "text": (array(CHAR, (1, 2**31 - 1), part(16, b"")), "a text longer than its bytes"),
    "inner cells": (array(STRUCT, (1, 1), FIELDS, array(CELL, (BIG, BIG))), "more cells or fields"),
    "imaginary": (array(DOUBLE, (1, 1), part(2, b"\1"), part(2, b""), flags=0x800), "0 numbers"),
    "negative": (array(DOUBLE, (-1, -1), part(2, b"\1")), "a negative dimension"),
    "many": (array(CELL, (2**15, 1), EMPTY * 2**15), "more than 16384 arrays"),
    "many inside": (array(CELL, (9, 1), array(CELL, (2000, 1), EMPTY * 2000) * 9), "16384 arrays"),
    "many names": (array(STRUCT, (0, 0), part(5, b"\1\0\0\0"), part(1, bytes(2**15))), "field nam"),
    "deep": (nested(400), "nested more than 16 deep"),
    "function": (array(FUNCTION, (1, 1)), "class 16, which holds no data"),
    "object": (array(3, (1, 1)), "class 3, which holds no data"),
    "dimensions": (array(DOUBLE, (1,) * 40, part(2, b"\1")), r"\(dimensions\)"),
    "nothing": (array(DOUBLE, (0, 0), part(2, b"")), "'S' of size 0 x 0"),
    "cube": (array(DOUBLE, (1, 2, 2), part(2, b"1234")), "no matrix of real numbers"),
    "a text": (array(CHAR, (1, 3), part(16, b"abc")), "no matrix of real numbers"),
    "complex": (array(DOUBLE, (1, 1), part(2, b"\1"), part(2, b"\1"), flags=0x800), "no matrix of"),
    "wrong type": (part(99, b"12345678"), "an element of type 99 in place of an array"),
    "part type": (array(DOUBLE, (1, 1), part(77, b"\1")), "a part of type 77"),
    "long small part": (array(DOUBLE, (1, 5), struct.pack("<I", 5 << 16 | 2), b"1234"), "than 4"),
    "endless part": (array(DOUBLE, (1, 1), struct.pack("<II", 2, 2**32 - 1)), "a truncated file"),
    "endless element": (struct.pack("<II", 14, 2**32 - 8), "a truncated file"),
    "zlib": (struct.pack("<II", 15, 8) + b"12345678", "incorrect header check"),
    "no variable": (b"", "no variable"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_a_sentence(path, name):
    content, message = HOSTILE[name]
    path.write_bytes(matlab_file(content))
    with (
        memory_within(2**22),
        pytest.raises(
            ValueError,
            match=rf"x.mat: expected a MATLAB v5 file with the variable 'S', .*{message}",
        ) as caught,
    ):
        read_mat(path, "S")
    assert "\n" not in str(caught.value)


def test_a_variable_is_inflated_within_the_limit(path):
    size = 2**28
    packer = zlib.compressobj()
    start = array(DOUBLE, (2**14, 2**14), part(2, b""))
    pieces = [packer.compress(start[:4] + struct.pack("<I", size) + start[8:-8])]
    pieces.append(packer.compress(struct.pack("<II", 2, size)))
    pieces += [packer.compress(bytes(2**20)) for _ in range(2**8)]
    data = b"".join([*pieces, packer.flush()])
    path.write_bytes(matlab_file(struct.pack("<II", 15, len(data)) + data))
    with (
        memory_within(2.5 * matlab.MAX_BYTES),
        pytest.raises(ValueError, match=r"x.mat: .* but got 'S' of more than 67108864 bytes"),
    ):
        read_mat(path, "S")


def test_every_truncation_ends_in_a_sentence(path):
    content = {"GTcls": {"Segmentation": LABEL.astype(np.uint8)}, "x": LABEL}
    for compression in (False, True):
        scipy_io.savemat(path, content, do_compression=compression)
        data = path.read_bytes()
        end = 136 + struct.unpack_from("<I", data, 132)[0]  # of the first variable
        for length in range(end):
            path.write_bytes(data[:length])
            with pytest.raises(ValueError, match=r"x.mat: expected a MATLAB v5 file .*Replace the"):
                read_mat(path, "GTcls", "Segmentation")
        path.write_bytes(data[:end])
        np.testing.assert_array_equal(read_mat(path, "GTcls", "Segmentation"), LABEL)


def test_other_files(path, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x.mat: expected an existing .mat file"):
        read_mat(path, "S")
    path.write_text("S = [1 2 3]" * 20)
    with pytest.raises(ValueError, match="a truncated file or none of this kind"):
        read_mat(path, "S")
    with h5py.File(path, "w", userblock_size=512) as file:
        file["S"] = LABEL
    with pytest.raises(ValueError, match=r"but got one of v7.3 \(HDF5\); save it with .*'-v7'"):
        read_mat(path, "S")
    with path.open("wb") as file:
        file.write(matlab_file())
        file.truncate(matlab.MAX_BYTES + 1)
    with pytest.raises(ValueError, match="but got more than 67108864 bytes"):
        read_mat(path, "S")
    scipy_io.savemat(path, {f"name{i}": i for i in range(9)})
    with pytest.raises(ValueError, match=r"got the variables 'name0', .*'name4', \.\.\.\. Replace"):
        read_mat(path, "S")


# --- v7.3 --------------------------------------------------------------------------------------

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 8, 6)).astype(np.uint8)


def frames(path, index=0, types="uint8", inner=(8, 6)):
    with open_hdf(path) as file:
        return hdf_frame(hdf_frames(file, "labels", types, *inner), index)


@pytest.mark.parametrize(
    "storage",
    [
        {},
        {"compression": "gzip"},
        {"compression": "gzip", "chunks": (1, 8, 6)},
        {"compression": "gzip", "chunks": (2, 3, 4), "shuffle": True, "fletcher32": True},
        {"chunks": (3, 1, 1)},
    ],
)
@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2"])
def test_frames(path, storage, dtype):
    with h5py.File(path, "w", userblock_size=512) as file:
        file.create_dataset("labels", data=FRAMES.astype(dtype), **storage)
    for index in range(3):
        frame = frames(path, index, "uint8 uint16", (None, 6))
        np.testing.assert_array_equal(frame, FRAMES[index])
    with open_hdf(path) as file:
        assert hdf_size(file, "labels") == FRAMES.size
        assert hdf_size(file, "names") is None


def test_frames_never_written_are_zero(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("labels", (3, 8, 6), "u1", chunks=(1, 8, 6), compression="gzip")
    assert frames(path).sum() == 0


def other_file(path, **options):
    other = path.with_name("other.h5")
    with h5py.File(other, "w") as file:
        file.create_dataset("labels", data=FRAMES)
    return other


def external_link(file, path):
    file["labels"] = h5py.ExternalLink(other_file(path), "labels")


def soft_link(file, path):
    file["labels"] = h5py.SoftLink("/elsewhere")


def virtual(file, path):
    layout = h5py.VirtualLayout(FRAMES.shape, "u1")
    layout[:] = h5py.VirtualSource(other_file(path), "labels", FRAMES.shape)
    file.create_virtual_dataset("labels", layout)


def external_storage(file, path):
    raw = path.with_name("raw.bin")
    raw.write_bytes(FRAMES.tobytes())
    file.create_dataset("labels", FRAMES.shape, "u1", external=[(raw, 0, FRAMES.nbytes)])


def group(file, path):
    file.create_group("labels")


def huge_frame(file, path):
    file.create_dataset("labels", (3, 2**20, 2**20), "u1", chunks=(1, 64, 64), compression="gzip")


def huge_chunk(file, path):
    file.create_dataset("labels", (2**20, 16, 8), "u1", chunks=(2**20, 16, 8), compression="gzip")


def swollen_chunk(file, path):
    dataset = file.create_dataset("labels", (3, 8, 6), "u1", chunks=(1, 8, 6), compression="gzip")
    dataset.id.write_direct_chunk((0, 0, 0), zlib.compress(bytes(2**27)))


def bomb_chunk(file, path):
    # Small enough when compressed, far too large when not.
    shape = (3, 512, 512)
    dataset = file.create_dataset("labels", shape, "u1", chunks=(1, 512, 512), compression="gzip")
    dataset.id.write_direct_chunk((0, 0, 0), zlib.compress(bytes(2**27)))


def dust(file, path):
    file.create_dataset("labels", (1, 2**10, 2**10), "u1", chunks=(1, 1, 1))


def foreign_filter(file, path):
    file.create_dataset("labels", data=FRAMES, compression="lzf")


def references(file, path):
    file.create_dataset("labels", FRAMES.shape, h5py.ref_dtype)


def reals(file, path):
    file.create_dataset("labels", data=FRAMES.astype(float))


def too_flat(file, path):
    file.create_dataset("labels", data=FRAMES[0])


def elsewhere(file, path):
    file.create_dataset("depths", data=FRAMES)


NOT_STORED = "'labels' that is no array stored in the file"
REFUSED = {
    external_link: NOT_STORED,
    soft_link: NOT_STORED,
    virtual: NOT_STORED,
    external_storage: NOT_STORED,
    group: NOT_STORED,
    huge_frame: "'labels' with frames or chunks of more than 67108864 bytes",
    huge_chunk: "'labels' with frames or chunks of more than 67108864 bytes",
    swollen_chunk: "a chunk that is larger compressed than not",
    bomb_chunk: "a chunk that inflates to more than its size",
    dust: "a frame of more than 65536 chunks",
    foreign_filter: "'labels' with filters other than MATLAB's",
    references: "'labels' of 3 x 8 x 6 object, not of n x n x n uint8 ",
    reals: "'labels' of 3 x 8 x 6 float64, not of n x n x n uint8 ",
    too_flat: "'labels' of 8 x 6 uint8, not of n x n x n",
    elsewhere: "the variables 'depths', not 'labels'",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_hostile_frames_end_in_a_sentence(path, make):
    try:
        with h5py.File(path, "w") as file:
            make(file, path)
    except ValueError as error:
        pytest.skip(f"this h5py cannot write it: {error}")
    message = rf"x.mat: expected a MATLAB v7.3 file \(HDF5\), but got ({REFUSED[make]})"
    with memory_within(2**22), pytest.raises(ValueError, match=message):
        frames(path, inner=(None, None))


def test_other_files_are_no_hdf(path):
    with pytest.raises(FileNotFoundError, match=r"x.mat: expected an existing .mat file"):
        frames(path)
    scipy_io.savemat(path, {"labels": LABEL})
    with pytest.raises(ValueError, match=r"x.mat: expected a MATLAB v7.3 .* another or a damaged"):
        frames(path)


def test_sizes_that_fit_nothing_are_counted_in_whole_numbers(path):
    # 2^32 x 2^32 elements: a product of 64 bits would be 0.
    with h5py.File(path, "w") as file:
        file.create_dataset("labels", (1, 2**31, 2**33), "u1", chunks=(1, 64, 64))
    assert math.prod((2**31, 2**33)) % 2**64 == 0
    with pytest.raises(ValueError, match="with frames or chunks of more than"):
        frames(path, inner=(None, None))
