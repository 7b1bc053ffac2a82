# SPDX-License-Identifier: Apache-2.0
"""Reading MATLAB files, v5 with scipy and v7.3 with h5py, within bounded memory.

Both libraries allocate what a file's headers ask for, so headers are checked before they see them:
a v5 file is taken apart as far as its array headers, and only the wanted variable is handed on,
inflated within a limit; of a v7.3 file the shape, storage and filters of a dataset are checked, and
each compressed chunk is inflated within its nominal size. Nothing in a file is executed.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .files import read_bounded

MAX_BYTES = 2**26
"""Largest v5 file, largest inflated variable, largest frame or chunk of a v7.3 file."""

_MAX_DEPTH = 16
_MAX_ARRAYS = 2**14  # inside one variable, and names of its fields; scipy makes objects of each
_MAX_CHUNKS = 2**16  # of one frame

# Codes of the v5 format: storage types (with their sizes), and classes of arrays.
_COMPRESSED, _MATRIX = 15, 14
_ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 4, 9: 8, 12: 8, 13: 8, 16: 1, 17: 2, 18: 4}
_CELL, _STRUCT, _CHAR, _SPARSE, _NUMERIC, _OPAQUE = 1, 2, 4, 5, range(6, 16), 17
_IS_COMPLEX = 0x0800

# HDF5's numbers of the filters that MATLAB writes: deflate, shuffle, fletcher32.
_DEFLATE, _FILTERS = 1, frozenset({1, 2, 3})


class _Damage(Exception):
    """What is wrong inside a file, in words that fit behind "but got"."""


def _library(name: str, version: str) -> ModuleType:
    """``scipy.io`` or ``h5py``, imported on first use.

    Raises:
        ImportError: If it is not installed; the message says how to install it.
    """
    try:
        if name == "scipy":
            import scipy.io

            return scipy.io  # type: ignore[no-any-return]
        import h5py

        return h5py  # type: ignore[no-any-return]
    except ImportError as error:
        raise ImportError(
            f"dilseg.data reads MATLAB {version} files with {name}, which is not installed. "
            'Run: pip install "dilseg[datasets]"'
        ) from error


# v5 --------------------------------------------------------------------------------------------


def read_mat(
    path: str | os.PathLike[str], variable: str, field: str | None = None
) -> NDArray[np.generic]:
    """Read a matrix of numbers from a MATLAB v5 file.

    Args:
        path: The file, at most :data:`MAX_BYTES` large, as is its inflated variable.
        variable: Name of the variable.
        field: Name of a field of the variable, if that is a 1 x 1 struct.

    Returns:
        ``[rows, columns]``, integers or floating point as stored.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is corrupt or of another version, is too large, has no such
            variable or field, or the variable is no real matrix.
        ImportError: If scipy is not installed.
    """
    library = _library("scipy", "v5")
    wanted = f"a MATLAB v5 file with the variable {variable!r}" + (
        f" and its field {field!r}" if field else ""
    )
    try:
        stream = _variable_alone(_read_v5(path), variable)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged variable fails below
            # Damage shows as whatever scipy's parser stumbles over: no list of types is complete.
            try:
                found = library.loadmat(stream, variable_names=[variable])
            except Exception as error:
                raise _Damage(f"a corrupt file ({error})") from error
        return _matrix(found.get(variable), variable, field)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: expected an existing .mat file, but there is no such file."
        ) from None
    except _Damage as damage:
        raise ValueError(
            f"{path}: expected {wanted}, but got {damage}. Replace the file, or take it off the "
            "list."
        ) from damage


def _read_v5(path: str | os.PathLike[str]) -> bytes:
    data = read_bounded(path, MAX_BYTES)
    if data[:8] == b"\x89HDF\r\n\x1a\n" or data[512:520] == b"\x89HDF\r\n\x1a\n":
        raise _Damage("one of v7.3 (HDF5); save it with MATLAB's option '-v7'")
    if len(data) > MAX_BYTES:
        raise _Damage(f"more than {MAX_BYTES} bytes")
    return data


def _matrix(value: object, variable: str, field: str | None) -> NDArray[np.generic]:
    name = variable
    if field is not None:
        name = f"{variable}.{field}"
        fields = getattr(getattr(value, "dtype", None), "names", None)
        if not isinstance(value, np.ndarray) or not fields or value.size != 1:
            raise _Damage(f"{variable!r} that is no 1 x 1 struct")
        if field not in fields:
            raise _Damage(f"fields {_listed(fields)}")
        value = value.flat[0][field]
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "buif" or value.ndim != 2:
        raise _Damage(f"{name!r} that is no matrix of real numbers")
    if value.size == 0:
        raise _Damage(f"{name!r} of size {' x '.join(map(str, value.shape))}")
    return value


def _listed(names: Any) -> str:  # noqa: ANN401
    shown = ", ".join(repr(str(name)[:40]) for name in list(names)[:5])
    return (shown or "none") + (", ..." if len(names) > 5 else "")


def _variable_alone(data: bytes, variable: str) -> io.BytesIO:
    """A v5 file with one variable of another, not compressed, all its array headers checked."""
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if len(data) < 128 or order is None or data[124:126] not in (b"\0\1", b"\1\0"):
        raise _Damage("a truncated file or none of this kind")
    names = []
    position = 128
    while position < len(data):
        kind, size = _words(data, position, order)
        body = data[position + 8 : position + 8 + size]
        if len(body) < size:
            raise _Damage("a truncated file")
        position += 8 + size
        if kind == _COMPRESSED:
            head = inflate(body, 1024)  # enough for every name that MATLAB allows
            name = _Element(head, order).name
            if name == variable:
                head = inflate(body, MAX_BYTES + 8)
                if len(head) > MAX_BYTES:
                    raise _Damage(f"{variable!r} of more than {MAX_BYTES} bytes")
        else:
            head = data[position - 8 - size : position]
            name = _Element(head, order).name
        if name == variable:
            element = _Element(head, order)
            _check_array(element)
            return io.BytesIO(data[:128] + head[: element.end])
        names.append(name)
    raise _Damage(f"the variables {_listed(names)}" if names else "no variable")


def inflate(data: bytes, limit: int) -> bytes:
    """Decompress a zlib stream, but no more than its first ``limit`` bytes."""
    try:
        return zlib.decompressobj().decompress(data, limit)
    except zlib.error as error:
        raise _Damage(f"a corrupt file ({error})") from error


def _words(data: bytes, position: int, order: str) -> tuple[int, int]:
    try:
        kind, size = struct.unpack_from(f"{order}II", data, position)
    except struct.error as error:
        raise _Damage("a truncated file") from error
    return int(kind), int(size)


class _Element:
    """A matrix element of a v5 file: its header, and a cursor over the parts behind it."""

    def __init__(self, data: bytes, order: str, position: int = 0) -> None:
        self.data, self.order = data, order
        kind, size = _words(data, position, order)
        if kind != _MATRIX:
            raise _Damage(f"a corrupt file (an element of type {kind} in place of an array)")
        self.position, self.end = position + 8, position + 8 + size
        self.is_empty = size == 0  # how an unset cell or field is stored
        self.array_class, self.is_complex, self.shape, self.name = 0, False, (0, 0), ""
        if not self.is_empty:
            flags = self.part(6)
            if len(flags) != 8:
                raise _Damage("a corrupt file (array flags)")
            (word,) = struct.unpack(f"{order}I", flags[:4])
            self.array_class, self.is_complex = word & 0xFF, bool(word & _IS_COMPLEX)
            if self.array_class == _OPAQUE:  # an object, laid out in another way
                return
            dims = self.part(5)
            if len(dims) % 4 or not 8 <= len(dims) <= 4 * 8:
                raise _Damage("a corrupt file (dimensions)")
            self.shape = struct.unpack(f"{order}{len(dims) // 4}i", dims)
            self.name = self.part(1).decode("latin1")

    def part(self, *kinds: int) -> bytes:
        """Bytes of the next part, which must be stored as one of ``kinds`` (none: any)."""
        kind, size = _words(self.data, self.position, self.order)
        start = self.position + 8
        if kind >> 16:  # a small part: its type, its size and at most 4 bytes in one
            kind, size = kind & 0xFFFF, kind >> 16
            start = self.position + 4
            if size > 4:
                raise _Damage("a corrupt file (a small part of more than 4 bytes)")
        if kind not in (kinds or _ITEM_BYTES):
            raise _Damage(f"a corrupt file (a part of type {kind})")
        stop = start + size
        if stop > min(self.end, len(self.data)):
            raise _Damage("a truncated file")
        self.position = start + 4 if start < self.position + 8 else stop + -size % 8
        self.items = size // _ITEM_BYTES[kind]
        return self.data[start:stop]

    def elements(self, count: int) -> Iterator[_Element]:
        """The next ``count`` elements, each behind the one before."""
        for _ in range(count):
            element = _Element(self.data, self.order, self.position)
            if element.end > self.end:
                raise _Damage("a corrupt file (an array that is larger than what holds it)")
            yield element
            self.position = element.end


def _check_array(element: _Element, depth: int = 0) -> int:
    """Refuse an array, or one inside it, that asks for more memory than it has bytes.

    Returns:
        The number of arrays, with those inside it.
    """
    if element.is_empty:
        return 1
    if element.end > len(element.data):
        raise _Damage("a truncated file")
    if depth > _MAX_DEPTH:
        raise _Damage(f"arrays nested more than {_MAX_DEPTH} deep")
    if min(element.shape) < 0:
        raise _Damage("a corrupt file (a negative dimension)")
    count, arrays = math.prod(element.shape), 1
    if element.array_class in (_CELL, _STRUCT):
        if element.array_class == _STRUCT:
            (length,) = struct.unpack(f"{element.order}i", element.part(5)[:4].ljust(4, b"\0"))
            names = element.part(1)
            if length < 1 or len(names) % length or len(names) // length > _MAX_ARRAYS:
                raise _Damage("a corrupt file (field names)")
            if count > 1 and not names:
                raise _Damage("a corrupt file (a struct array without fields)")
            count *= len(names) // length
        if count > (element.end - element.position) // 8:
            raise _Damage("a corrupt file (more cells or fields than bytes)")
        for inner in element.elements(count):
            arrays += _check_array(inner, depth + 1)
            if arrays > _MAX_ARRAYS:
                raise _Damage(f"a variable of more than {_MAX_ARRAYS} arrays")
    elif element.array_class == _SPARSE:
        for kinds in ((5,), (5,), (), *[()] * element.is_complex):
            element.part(*kinds)
    elif element.array_class == _CHAR:
        element.part()
        if count > max(element.items, 1024):
            raise _Damage("a corrupt file (a text longer than its bytes)")
    elif element.array_class in _NUMERIC:
        for _ in range(1 + element.is_complex):
            element.part()
            if element.items != count:
                raise _Damage(
                    f"a corrupt file ({element.items} numbers for an array of "
                    f"{' x '.join(map(str, element.shape))})"
                )
    else:
        raise _Damage(f"an array of class {element.array_class}, which holds no data")
    return arrays


# v7.3 ------------------------------------------------------------------------------------------


@contextmanager
def open_hdf(path: Path) -> Iterator[Any]:
    """Open a MATLAB v7.3 file, an HDF5 file, for reading.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no HDF5 file, or what is done with it fails for damage inside it.
        ImportError: If h5py is not installed.
    """
    library = _library("h5py", "v7.3")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected an existing .mat file, but there is none.")
    wanted = f"{path}: expected a MATLAB v7.3 file (HDF5), but got"
    try:
        with library.File(path, "r") as file:
            yield file
    except _Damage as damage:
        raise ValueError(f"{wanted} {damage}. Fetch it again.") from damage
    # h5py turns what the HDF5 library reports into any of these.
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, MemoryError) as error:
        raise ValueError(f"{wanted} another or a damaged one ({error}). Fetch it again.") from error


def _stored(file: Any, name: str) -> Any:  # noqa: ANN401
    """A dataset whose numbers lie in the file itself; None where ``name`` is something else."""
    library = _library("h5py", "v7.3")
    # Other links and storages lead to other files.
    if not isinstance(file.get(name, getlink=True), library.HardLink):
        return None
    found = file[name]
    if not isinstance(found, library.Dataset) or found.is_virtual or found.external:
        return None
    return found


def hdf_size(file: Any, name: str) -> int | None:  # noqa: ANN401
    """Number of elements of a dataset; None without it."""
    dataset = _stored(file, name)
    return None if dataset is None else int(dataset.size)


def hdf_frames(file: Any, name: str, types: str, *inner: int | None) -> Any:  # noqa: ANN401
    """A dataset of an open file that holds one frame per first index, checked but not read.

    Args:
        file: Of :func:`open_hdf`.
        name: Name of the variable.
        types: Allowed types of its numbers, such as ``"uint8 uint16"``.
        *inner: The size of a frame; None where any will do.
    """
    if name not in file:
        raise _Damage(f"the variables {_listed(list(itertools.islice(file, 6)))}, not {name!r}")
    dataset = _stored(file, name)
    if dataset is None:
        raise _Damage(f"{name!r} that is no array stored in the file")
    shape = dataset.shape
    fits = len(shape) == 1 + len(inner) and all(
        want in (None, got) for want, got in zip(inner, shape[1:], strict=True)
    )
    if not fits or dataset.dtype.name not in types.split():
        sizes = " x ".join("n" if size is None else str(size) for size in (None, *inner))
        raise _Damage(
            f"{name!r} of {' x '.join(map(str, shape))} {dataset.dtype.name}, not of {sizes} "
            f"{types.replace(' ', ' or ')} (axes as HDF5 orders them)"
        )
    item = dataset.dtype.itemsize
    chunk = math.prod(dataset.chunks) if dataset.chunks else 0
    if max(math.prod(shape[1:]), chunk) * item > MAX_BYTES:
        raise _Damage(f"{name!r} with frames or chunks of more than {MAX_BYTES} bytes")
    properties = dataset.id.get_create_plist()
    filters = {properties.get_filter(i)[0] for i in range(properties.get_nfilters())}
    if not filters <= _FILTERS:
        raise _Damage(f"{name!r} with filters other than MATLAB's ({sorted(filters)})")
    return dataset


def hdf_frame(dataset: Any, index: int) -> NDArray[np.generic]:  # noqa: ANN401
    """Frame ``index`` of a dataset of :func:`hdf_frames`."""
    if dataset.chunks:
        _check_chunks(dataset, index)
    frame: NDArray[np.generic] = dataset[index]
    return frame


def _check_chunks(dataset: Any, index: int) -> None:  # noqa: ANN401
    """Refuse compressed chunks that inflate to more than a chunk."""
    chunks, shape = dataset.chunks, dataset.shape
    nominal = math.prod(chunks) * dataset.dtype.itemsize
    properties = dataset.id.get_create_plist()
    numbers = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    starts = [
        range(0, size, step) if axis else range(index - index % step, index + 1, step)
        for axis, (size, step) in enumerate(zip(shape, chunks, strict=True))
    ]
    if math.prod(map(len, starts)) > _MAX_CHUNKS:
        raise _Damage(f"a frame of more than {_MAX_CHUNKS} chunks")
    for start in itertools.product(*starts):
        info = dataset.id.get_chunk_info_by_coord(start)
        if info.byte_offset is None:  # never written: zeros
            continue
        if info.size > nominal + nominal // 64 + 1024:
            raise _Damage("a chunk that is larger compressed than not")
        deflated = _DEFLATE in numbers and not info.filter_mask >> numbers.index(_DEFLATE) & 1
        if deflated:
            _, data = dataset.id.read_direct_chunk(start)
            # With fletcher32 in front of deflate, 4 bytes more.
            if len(inflate(data, nominal + 8)) > nominal + 4:
                raise _Damage("a chunk that inflates to more than its size")
