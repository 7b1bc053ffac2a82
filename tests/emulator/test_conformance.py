# SPDX-License-Identifier: Apache-2.0
"""Each emulated instruction against what kernels.md says of it, sections 2 to 4: exactly.

What is expected comes from the formulas, written here once more in numpy, never from the emulator.
Every kernel runs under several schedules, which must agree in every bit.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from emulator.build import ROOT, compiler
from emulator.harness import SEEDS, KernelError, kernels

KERNELS = ROOT / "tests/emulator/kernels"
FILES = ["warp", "matrix", "async", "tma", "wgmma", "cluster", "grid"]
FEW = (1, 2, 3)  # schedules for what is slow or has only one thread

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs g++")


@dataclass
class Out:
    """An argument that the kernel changes, with its value before."""

    before: np.ndarray


def outcome(stem: str, name: str, *arguments, seeds: Sequence[int] = SEEDS):
    """Runs a kernel under each schedule and returns the arrays that it leaves, one or a list."""
    library = kernels(stem)
    first: list[np.ndarray] | None = None
    for seed in seeds:
        buffers = []
        for a in arguments:
            array = a.before if isinstance(a, Out) else a
            if isinstance(array, np.ndarray):
                data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                array = library.buffer(torch.from_numpy(data.copy()))
            buffers.append(array)
        library.run(name, *buffers, seed=seed)
        after = [
            b.numpy().copy().view(a.before.dtype).reshape(a.before.shape)
            for a, b in zip(arguments, buffers, strict=True)
            if isinstance(a, Out)
        ]
        if first is None:
            first = after
        for one, other in zip(first, after, strict=True):
            assert one.tobytes() == other.tobytes(), f"seed {seed} changes the result"
    assert first is not None
    return first[0] if len(first) == 1 else first


def equal(actual: np.ndarray, expected: np.ndarray) -> None:
    """Asserts the same values in every element."""
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    wrong = np.argwhere(actual != expected)
    assert len(wrong) == 0, (
        f"{len(wrong)} of {actual.size} differ, first at {wrong[0]}: "
        f"{actual[tuple(wrong[0])]}, expected {expected[tuple(wrong[0])]}"
    )


def ints(*values) -> np.ndarray:
    return np.array(list(itertools.chain(*values)), dtype=np.int32)


def signed(mask: int) -> int:
    return mask - (1 << 32) if mask >> 31 else mask


@pytest.fixture
def rng(request) -> np.random.Generator:
    return np.random.default_rng(list(request.node.name.encode()))


def words(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 1 << 32, shape, dtype=np.uint32)


# --- blocks and warps ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "block"), [((1, 1, 1), (1, 1, 1)), ((3, 2, 4), (5, 3, 2)), ((2, 3, 1), (33, 1, 3))]
)
def test_indices(grid, block):
    count = math.prod(grid) * math.prod(block)
    out = outcome("warp", "indices", *grid, *block, Out(np.zeros((count, 12), np.int32)))
    expected = [
        [bx, by, bz, x, y, z, *grid, *block]
        for bz in range(grid[2])
        for by in range(grid[1])
        for bx in range(grid[0])
        for z in range(block[2])
        for y in range(block[1])
        for x in range(block[0])
    ]
    equal(out, np.array(expected))


@pytest.mark.parametrize("values", ["random", "all", "none"])
@pytest.mark.parametrize("threads", [32, 100, 256])
def test_syncthreads_count_or_and(rng, threads, values):
    given = {
        "random": rng.integers(0, 2, threads) * rng.integers(1, 99, threads),
        "all": rng.integers(1, 99, threads),
        "none": np.zeros(threads),
    }[values].astype(np.int32)
    out = outcome("warp", "block_barrier", threads, given, Out(np.zeros((threads, 4), np.int32)))
    equal(out[:, 0], np.roll(given, -1))
    equal(out[:, 1], np.full(threads, np.count_nonzero(given)))
    equal(out[:, 2] != 0, np.full(threads, given.any()))
    equal(out[:, 3] != 0, np.full(threads, given.all()))


def test_named_barriers(rng):
    given = rng.integers(0, 1 << 30, (9, 64), dtype=np.int32)
    out = outcome("warp", "named_barrier", given, Out(np.zeros_like(given)), len(given))
    equal(out, given[:, (np.arange(64) * 7 + 1) % 64])


def test_syncwarp(rng):
    given = rng.integers(0, 1 << 30, 64, dtype=np.int32)
    out = outcome("warp", "warp_barrier", given, Out(np.zeros_like(given)))
    equal(out, given[np.arange(64) ^ 31])


SHUFFLES = ["idx", "up", "down", "xor"]


def shuffle_source(kind: str, lane: int, argument: int, width: int) -> int:
    first = lane // width * width
    if kind == "idx":
        return first + argument % width
    source = {"up": lane - argument, "down": lane + argument, "xor": lane ^ argument}[kind]
    outside = source < first if kind == "up" else source >= first + width
    return lane if outside else source


# A mask, a width, and what the arguments may be so that no lane reads one outside of its half.
SHUFFLE_CASES = [
    *((kind, 0xFFFFFFFF, width, 32) for kind in SHUFFLES for width in (2, 4, 8, 16, 32)),
    ("idx", 0x00FF00FF, 8, 32),
    ("up", 0x0000FFFF, 16, 16),
    ("down", 0xFF0000FF, 8, 8),
    ("xor", 0x0F0F0F0F, 32, 4),
    ("xor", 0xF00FF0F0, 4, 4),
]


@pytest.mark.parametrize("wide", [0, 1], ids=["int", "double"])
@pytest.mark.parametrize(("kind", "mask", "width", "limit"), SHUFFLE_CASES)
def test_shuffle(rng, kind, mask, width, limit, wide):
    values = rng.standard_normal(64) if wide else rng.integers(-(1 << 31), 1 << 31, 64, np.int32)
    # The distance of up and down is one for the warp, the others are each lane's own.
    one = rng.integers(0, limit)
    own = rng.integers(0, limit, 64)
    arguments = np.full(64, one) if kind in ("up", "down") else own
    if kind == "xor":
        arguments = np.full(64, one)
    out = outcome(
        "warp",
        "shuffle",
        wide,
        SHUFFLES.index(kind),
        signed(mask),
        width,
        arguments.astype(np.int32),
        values,
        Out(np.zeros_like(values)),
        seeds=FEW,
    )
    sources = [
        t // 32 * 32 + shuffle_source(kind, t % 32, int(arguments[t]), width) for t in range(64)
    ]
    equal(out, values[sources])


VOTES = (
    "ballot any all match_any match_all match_all.pred add min max min.u32 max.u32 and or xor"
    " add.u32"
)


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x0000FFFF, 0x12345678, 0x80000001])
@pytest.mark.parametrize("span", [2, 8, 1 << 31])
def test_vote_match_reduce(rng, mask, span):
    values = rng.integers(-span if span > 8 else 0, span, 64).astype(np.int32)
    out = outcome("warp", "votes", signed(mask), values, Out(np.zeros((64, 15), np.uint32)))
    names = VOTES.split()
    for t in range(64):
        group = mask if mask >> (t % 32) & 1 else ~mask & 0xFFFFFFFF
        lanes = [lane for lane in range(32) if group >> lane & 1]
        of = {lane: int(values[t // 32 * 32 + lane]) for lane in lanes}
        bits = {lane: v & 0xFFFFFFFF for lane, v in of.items()}
        alike = len({v & 4 for v in of.values()}) == 1

        def gather(pick, lanes=lanes):
            return sum(1 << lane for lane in lanes if pick(lane))

        def fold(function, bits=bits):
            total, *rest = bits.values()
            for v in rest:
                total = function(total, v)
            return total

        expected = [
            gather(lambda lane, of=of: of[lane] & 1),
            any(v & 2 for v in of.values()),
            all(v & 4 for v in of.values()),
            gather(lambda lane, of=of, own=of[t % 32]: of[lane] & 3 == own & 3),
            group if alike else 0,
            alike,
            sum(of.values()) & 0xFFFFFFFF,
            min(of.values()) & 0xFFFFFFFF,
            max(of.values()) & 0xFFFFFFFF,
            min(bits.values()),
            max(bits.values()),
            fold(lambda a, b: a & b),
            fold(lambda a, b: a | b),
            fold(lambda a, b: a ^ b),
            sum(of.values()) & 0xFFFFFFFF,
        ]
        for name, got, want in zip(names, out[t].tolist(), expected, strict=True):
            # Predicates are promised to be zero or not.
            same = bool(got) == want if isinstance(want, bool) else got == want
            assert same, f"{name}, thread {t}: {got:#x}, expected {int(want):#x}"


ATOMICS = {
    "add": lambda old, v, c: old + v,
    "min": lambda old, v, c: min(old, v),
    "max": lambda old, v, c: max(old, v),
    "and": lambda old, v, c: old & v,
    "or": lambda old, v, c: old | v,
    "xor": lambda old, v, c: old ^ v,
    "exch": lambda old, v, c: v,
    "cas": lambda old, v, c: v if old == c else old,
}
ATOMIC_TYPES = {"s32": np.int32, "u32": np.uint32, "u64": np.uint64, "s64": np.int64}


@pytest.mark.parametrize("shared", [0, 1], ids=["global", "shared"])
@pytest.mark.parametrize(
    ("kind", "op"),
    [
        (kind, op)
        for kind in ATOMIC_TYPES
        for op in ATOMICS
        if kind != "s64" or op in ("min", "max")
    ],
)
def test_atomic(rng, kind, op, shared):
    dtype = np.dtype(ATOMIC_TYPES[kind])
    limits = np.iinfo(dtype)
    blocks = 1 if shared else 2

    def wrapped(value: int) -> int:
        value &= (1 << limits.bits) - 1
        return (
            value - (1 << limits.bits) if limits.min < 0 and value >> (limits.bits - 1) else value
        )

    def run(cells, values, compares):
        return outcome(
            "warp",
            "atomic",
            list(ATOMIC_TYPES).index(kind),
            list(ATOMICS).index(op),
            shared,
            len(cells),
            blocks,
            len(values) // blocks,
            Out(cells),
            values,
            compares,
            Out(np.zeros_like(values)),
            seeds=FEW,
        )

    def random(n):
        return rng.integers(limits.min, limits.max, n, dtype=dtype, endpoint=True)

    # A cell per thread: the value before and the value after.
    cells, values = random(64), random(64)
    compares = np.where(rng.integers(0, 2, 64) == 1, cells, random(64))
    after, before = run(cells, values, compares)
    equal(before, cells)
    operands = zip(cells.tolist(), values.tolist(), compares.tolist(), strict=True)
    equal(after, np.array([wrapped(ATOMICS[op](*o)) for o in operands], dtype=dtype))
    if op in ("exch", "cas"):
        return
    # Three cells that all threads fight for. What each saw depends on the schedule.
    cells, values = random(3), random(64)
    expected = cells.tolist()
    for i, v in enumerate(values.tolist()):
        expected[i % 3] = wrapped(ATOMICS[op](expected[i % 3], v, 0))
    for seed in SEEDS:
        library = kernels("warp")
        changed = library.buffer(torch.from_numpy(cells.view(np.uint8).copy()))
        other = [library.buffer(torch.from_numpy(values.view(np.uint8).copy())) for _ in range(3)]
        library.run(
            "atomic",
            list(ATOMIC_TYPES).index(kind),
            list(ATOMICS).index(op),
            shared,
            3,
            blocks,
            64 // blocks,
            changed,
            *other,
            seed=seed,
        )
        equal(changed.numpy().view(dtype), np.array(expected, dtype=dtype))


def test_atomic_cas_loop():
    out = outcome("warp", "compare_and_swap_loop", Out(np.array([7], np.uint32)))
    expected = 7
    for _ in range(80):
        expected = (3 * expected + 1) & 0xFFFFFFFF
    equal(out, [expected])


VECTORS = {
    "float4": (np.float32, 4),
    "uint4": (np.uint32, 4),
    "int2": (np.int32, 2),
    "double2": (np.float64, 2),
    "ushort4": (np.uint16, 4),
    "uchar4": (np.uint8, 4),
}


@pytest.mark.parametrize("name", VECTORS)
def test_vector_access(rng, name):
    dtype, components = VECTORS[name]
    given = rng.integers(0, 200, (48, components)).astype(dtype)
    out = outcome(
        "warp", "vector_access", list(VECTORS).index(name), given, Out(np.zeros_like(given)), 48
    )
    equal(out, given[::-1, ::-1])


def toward_zero(values: np.ndarray, rounded: np.ndarray) -> np.ndarray:
    """16-bit patterns whose magnitude was rounded up, taken back by one."""
    if rounded.dtype == np.float16:
        as_float = rounded.astype(np.float64)
        bits = rounded.view(np.uint16)
    else:
        bits = rounded
        as_float = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    above = (np.abs(as_float) > np.abs(values.astype(np.float64))) & np.isfinite(values)
    return bits - above.astype(np.uint16)


def test_conversions(rng):
    n = 128 * 16
    x = (rng.standard_normal(n) * 2.0 ** rng.integers(-32, 24, n)).astype(np.float32)
    x[: n // 4] = words(rng, n // 4).view(np.float32)
    x[np.isnan(x)] = 1
    x[-1024:] = (  # ties and their neighbours
        (words(rng, 1024) & 0x3FF) << 13 | 0x3F800000 | 0x1000 | (np.arange(1024) % 3 == 0)
    ).view(np.float32)
    x[-512:] = ((words(rng, 512) & 0x807F0000) | 0x3F808000).view(np.float32)
    special = [0.0, -0.0, np.inf, -np.inf, 65504, 65519, 65520, -65520, 3.3895e38, 3.4028235e38]
    special += [2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 2.0**-14 * (1 - 2.0**-11), 1e-45]
    x[: len(special)] = special
    u16, f32 = np.zeros(n, np.uint16), np.zeros(n, np.float32)
    half, half_rz, half_back, bf, bf_rz, bf_back, tf32 = outcome(
        "warp",
        "convert",
        x,
        *(Out(a) for a in (u16, u16, f32, u16, u16, f32, np.zeros(n, np.uint32))),
        n // 128,
        seeds=FEW,
    )
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    equal(half, expected.view(np.uint16))
    equal(half_rz, toward_zero(x, expected))
    equal(half_back.view(np.uint32), expected.astype(np.float32).view(np.uint32))
    as_bf = torch.from_numpy(x.copy()).bfloat16()
    expected = as_bf.view(torch.int16).numpy().view(np.uint16)
    equal(bf, expected)
    equal(bf_rz, (x.view(np.uint32) >> 16).astype(np.uint16))
    equal(bf_back.view(np.uint32), as_bf.float().numpy().view(np.uint32))
    bits = x.view(np.uint32)
    finite = np.isfinite(x)
    equal(tf32[finite], ((bits + 0x1000) & ~np.uint32(0x1FFF))[finite])
    equal(tf32[~finite], bits[~finite])


# --- ldmatrix, stmatrix, mma ---------------------------------------------------------------------


@pytest.mark.parametrize("trans", [0, 1], ids=["plain", "trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("store", [0, 1], ids=["ldmatrix", "stmatrix"])
def test_matrix_move(rng, store, count, trans):
    slots = 48  # rows of 16 bytes, of which the lanes name some, in any order
    image = rng.integers(0, 1 << 16, (slots, 8), dtype=np.uint16)
    rows = rng.permutation(slots)[:32]
    registers = rng.integers(0, 1 << 16, (32, count, 2), dtype=np.uint16)
    position = {}  # lane, register, half -> row slot, column
    for lane, i, h in itertools.product(range(32), range(count), range(2)):
        if trans:
            row, column = 2 * (lane % 4) + h, lane // 4
        else:
            row, column = lane // 4, 2 * (lane % 4) + h
        position[lane, i, h] = rows[8 * i + row], column
    out = outcome(
        "matrix",
        "move_matrices",
        count,
        store,
        trans,
        Out(image) if store else image,
        4 * slots,
        (16 * rows).astype(np.int32),
        registers if store else Out(np.zeros_like(registers)),
    )
    expected = image.copy() if store else np.zeros_like(registers)
    for register, place in position.items():
        if store:
            expected[place] = registers[register]
        else:
            expected[register] = image[place]
    equal(out, expected)


TYPES = ["bf16", "f16", "tf32"]


def eighths(rng, *shape) -> np.ndarray:
    """Small multiples of 1/8, so that every sum is exact."""
    return rng.integers(-16, 17, shape).astype(np.float32) / 8


def encode(kind: str, values: np.ndarray) -> np.ndarray:
    """Bit patterns, uint16 or uint32, of values that the format holds exactly."""
    if kind == "tf32":
        return values.astype(np.float32).view(np.uint32)
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def fragment(kind: str, matrix: np.ndarray, places) -> np.ndarray:
    """Registers [lane][register] of an operand; places(lane, r, h) says which element."""
    lanes, count = places.shape[:2]
    picked = encode(kind, matrix)[places[..., 0], places[..., 1]]
    assert picked.shape[:2] == (lanes, count)
    return np.ascontiguousarray(picked).view(np.uint32).reshape(lanes, count)


def a_places(kind: str, lanes: int) -> np.ndarray:
    """Row and k of the A fragment's elements, [lane][register][half][2]; warps follow in m."""
    halves = 1 if kind == "tf32" else 2
    out = np.zeros((lanes, 4, halves, 2), int)
    for t, r, h in itertools.product(range(lanes), range(4), range(halves)):
        g, q = t % 32 >> 2, t & 3
        k = q + 4 * (r >> 1) if kind == "tf32" else 2 * q + h + 8 * (r >> 1)
        out[t, r, h] = 16 * (t // 32) + g + 8 * (r & 1), k
    return out


def b_places(kind: str) -> np.ndarray:
    halves = 1 if kind == "tf32" else 2
    out = np.zeros((32, 2, halves, 2), int)
    for t, r, h in itertools.product(range(32), range(2), range(halves)):
        g, q = t >> 2, t & 3
        out[t, r, h] = q + 4 * r if kind == "tf32" else 2 * q + h + 8 * r, g
    return out


MMA_ROWS = np.array([[(t >> 2) + 8 * (v >> 1) for v in range(4)] for t in range(32)])
MMA_COLUMNS = np.array([[2 * (t & 3) + (v & 1) for v in range(4)] for t in range(32)])


def run_mma(kind, a, b, c, seeds=FEW):
    """C + sum of A[i] B[i], as the matrix."""
    fragments_a = np.stack([fragment(kind, m, a_places(kind, 32)) for m in a])
    fragments_b = np.stack([fragment(kind, m, b_places(kind)) for m in b])
    d = c[MMA_ROWS, MMA_COLUMNS].astype(np.float32)
    out = outcome(
        "matrix", "mma", TYPES.index(kind), fragments_a, fragments_b, Out(d), len(a), seeds=seeds
    )
    matrix = np.zeros((16, 8), np.float32)
    matrix[MMA_ROWS, MMA_COLUMNS] = out
    return matrix


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", TYPES)
def test_mma(rng, kind, steps):
    depth = 8 if kind == "tf32" else 16
    a, b, c = eighths(rng, steps, 16, depth), eighths(rng, steps, depth, 8), eighths(rng, 16, 8)
    equal(run_mma(kind, a, b, c), c + (a.astype(np.float64) @ b).sum(0))


def test_mma_tf32_truncates_inputs(rng):
    a, b = rng.standard_normal((1, 16, 8)).astype(np.float32), np.zeros((1, 8, 8), np.float32)
    b[0] = np.eye(8)
    out = run_mma("tf32", a, b, np.zeros((16, 8)))
    equal(out.view(np.uint32), a[0].view(np.uint32) & ~np.uint32(0x1FFF))


def float_toward_zero(value: Fraction) -> np.float32:
    nearest = np.float32(float(value))  # float() rounds to double first, which is exact here
    assert Fraction(float(value)) == value
    if abs(Fraction(float(nearest))) > abs(value):
        nearest = np.nextafter(nearest, np.float32(0))
    return nearest


def wide_values(rng, kind, *shape) -> np.ndarray:
    """Values whose sums float cannot hold but double can."""
    bits = 7 if kind == "bf16" else 10
    return rng.integers(-(1 << bits) + 1, 1 << bits, shape) * 2.0 ** rng.integers(-8, 1, shape)


@pytest.fixture
def truncating():
    """Truncated sums for the libraries that ask; rounded ones afterwards."""
    used = []

    def switch(stem: str) -> None:
        used.append(stem)
        kernels(stem).set_truncate(True)

    yield switch
    for stem in used:
        kernels(stem).set_truncate(False)


def truncated_sums(a, b, c) -> np.ndarray:
    """Each step's products summed exactly, added to the accumulator and cut to float."""
    sums = c.astype(np.float32)
    for x, y in zip(a, b, strict=True):
        exact = x @ y  # of few bits: exact in double
        sums = np.array(
            [
                float_toward_zero(Fraction(float(s)) + Fraction(float(e)))
                for s, e in zip(sums.flat, exact.flat, strict=True)
            ],
            np.float32,
        ).reshape(sums.shape)
    return sums


@pytest.mark.parametrize("kind", TYPES)
def test_mma_truncated(rng, kind, truncating):
    depth = 8 if kind == "tf32" else 16
    a, b = wide_values(rng, kind, 4, 16, depth), wide_values(rng, kind, 4, depth, 8)
    c = wide_values(rng, kind, 16, 8)
    rounded = run_mma(kind, a, b, c)
    truncating("matrix")
    truncated = run_mma(kind, a, b, c)
    expected = truncated_sums(a, b, c)
    equal(truncated, expected)
    assert (rounded != truncated).any()


# --- cp.async, mbarrier, bulk copies -------------------------------------------------------------


@pytest.mark.parametrize("late", [0, 1], ids=["wait_group", "wait_all"])
@pytest.mark.parametrize(("bytes_", "cg"), [(4, 0), (8, 0), (16, 0), (16, 1)])
def test_cp_async(rng, bytes_, cg, late):
    threads = 96
    given = rng.integers(1, 256, 4096, dtype=np.uint8)
    sources = rng.integers(0, 4096 // bytes_, threads, dtype=np.int32) * bytes_
    sizes = rng.integers(0, bytes_ + 1, threads, dtype=np.int32)
    sizes[:32] = bytes_
    sizes[32:48] = 0
    out = outcome(
        "async",
        "cp_async",
        bytes_,
        cg,
        late,
        threads,
        given,
        sources,
        sizes,
        Out(np.zeros((threads, bytes_), np.uint8)),
    )
    expected = given[sources[:, None] + np.arange(bytes_)]
    expected[np.arange(bytes_) >= sizes[:, None]] = 0
    equal(out, expected)


@pytest.mark.parametrize("steps", [1, 3, 11])
def test_cp_async_groups(rng, steps):
    given = rng.integers(0, 1 << 20, (steps, 64, 4), dtype=np.int32)
    out = outcome("async", "cp_async_groups", given, Out(np.zeros((steps, 64), np.int32)), steps)
    equal(out, np.roll(given, -1, axis=1) @ np.array([1, 2, 3, 4]))


def test_cp_async_mbarrier_arrive(rng):
    given = words(rng, 7, 32, 4)
    out = outcome("async", "cp_async_mbarrier", given, Out(np.zeros_like(given)), len(given))
    equal(out, given[:, np.arange(32) ^ 5])


def test_mbarrier_phases(rng):
    given = rng.integers(0, 256, 48, dtype=np.uint8)
    out = outcome("async", "mbarrier_phases", given, Out(np.full(31, -1, np.int32)))
    # A poll of parity p succeeds once the phase of that parity is over: phase 0 running lets 1
    # through, phase 1 running lets 0 through.
    in_phase = [[0, 1], [1, 0]]
    expected = [in_phase[0]]
    for phase in range(3):
        expected += [in_phase[phase % 2]] * 2 + [in_phase[(phase + 1) % 2]]
    expected += [in_phase[1], in_phase[0], [int(given[47])], in_phase[0], in_phase[1]]
    equal(out[: len(ints(*expected))], ints(*expected))


@pytest.mark.parametrize("poll", [0, 1], ids=["wait", "try_wait"])
@pytest.mark.parametrize("steps", [2, 3, 10])
def test_mbarrier_pipeline(rng, steps, poll):
    given = rng.integers(0, 1 << 30, (steps, 64), dtype=np.int32)
    out = outcome("async", "pipeline", given, Out(np.zeros_like(given)), steps, poll)
    expected = [given[i][(5 * np.arange(64) + i) % 64] for i in range(steps)]
    equal(out, np.array(expected))


@pytest.mark.parametrize("add", [0, 1], ids=["store", "reduce_add"])
@pytest.mark.parametrize("count", [4, 100, 1024])
def test_bulk_store(rng, count, add):
    given, before = eighths(rng, 2, count), eighths(rng, 2, count)
    out = outcome("async", "bulk_store", add, given, Out(before), count)
    equal(out, before + given if add else given)


# --- TMA -----------------------------------------------------------------------------------------

ELEMENTS = {  # CUtensorMapDataType and how numpy sees the bytes
    "u8": (0, np.uint8),
    "u16": (1, np.uint16),
    "s32": (3, np.int32),
    "f16": (6, np.float16),
    "f32": (7, np.float32),
    "bf16": (9, np.uint16),
}
NONE, SWIZZLE_32, SWIZZLE_64, SWIZZLE_128 = range(4)
SWIZZLE_NAMES = ["none", "32B", "64B", "128B"]


def swizzled(address: np.ndarray, mode: int) -> np.ndarray:
    """128B: a ^= ((a >> 7) & 7) << 4; 64B with 3, 32B with 1."""
    return address ^ ((address >> 7) & [0, 1, 3, 7][mode]) << 4


def shared_order(where: int, count: int, mode: int) -> np.ndarray:
    """For each byte of an unswizzled box at `where` its offset in the swizzled one."""
    return swizzled(where + np.arange(count), mode) - where


@dataclass
class Tensor:
    """A global tensor with dimensions innermost first and padded pitches."""

    kind: str
    dims: tuple[int, ...]
    memory: np.ndarray  # outermost first, innermost padded to 16 bytes

    @classmethod
    def random(cls, rng, kind: str, dims: Sequence[int]) -> Tensor:
        dtype = np.dtype(ELEMENTS[kind][1])
        unit = 16 // dtype.itemsize
        pitch = (dims[0] + unit - 1) // unit * unit + (unit if len(dims) > 1 else 0)
        shape = (*reversed(dims[1:]), pitch)
        if dtype.kind == "f":
            memory = eighths(rng, *shape).astype(dtype)
        elif kind == "bf16":
            memory = encode("bf16", eighths(rng, *shape))
        else:
            memory = rng.integers(1, 200, shape).astype(dtype)
        return cls(kind, tuple(dims), memory)

    def header(self, swizzle: int, steps: Sequence[int]) -> list[int]:
        strides = list(reversed(self.memory.strides))[1:]
        return [ELEMENTS[self.kind][0], len(self.dims), swizzle, *self.dims, *strides, *steps]

    def gather(self, positions: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Elements at broadcast positions, innermost first, zero outside; and what is inside."""
        positions = np.broadcast_arrays(*positions)
        inside = np.ones(positions[0].shape, bool)
        index = []
        for p, size in zip(positions, self.dims, strict=True):
            inside &= (p >= 0) & (p < size)
            index.append(np.clip(p, 0, size - 1))
        values = self.memory[tuple(reversed(index))]
        return np.where(inside, values, np.zeros((), values.dtype)), inside


def box_positions(at: Sequence[int], box: Sequence[int], steps: Sequence[int]) -> list[np.ndarray]:
    """Positions of a tile's elements: ceil(box / step) along each dimension, outermost first."""
    rank = len(at)
    out = []
    for d in range(rank):
        step = steps[d] if d > 0 else 1
        line = at[d] + np.arange(-(-box[d] // step)) * step
        shape = [1] * rank
        shape[rank - 1 - d] = len(line)
        out.append(line.reshape(shape))
    return out


def load(tensor, spec, at, where, count, im2col=0, seeds=FEW) -> np.ndarray:
    """The bytes that a load leaves at offset `where`."""
    return outcome(
        "tma",
        "load",
        tensor.memory,
        ints(spec),
        im2col,
        ints(at),
        where,
        count,
        Out(np.zeros(count, np.uint8)),
        seeds=seeds,
    )


TILES = [  # element, dims, box, start: inside, in front, behind, far outside
    ("f32", (50,), (16,), (3,)),
    ("u8", (100,), (64,), (-20,)),
    ("u16", (40,), (24,), (30,)),
    ("bf16", (20, 9), (16, 4), (-3, 7)),
    ("f32", (10, 12), (8, 5), (4, -2)),
    ("u8", (40, 6), (48, 3), (-100, 1)),
    ("bf16", (16, 7, 5), (8, 4, 3), (2, -2, 3)),
    ("f32", (6, 5, 4), (4, 8, 2), (-1, -1, -1)),
    ("bf16", (12, 6, 5, 3), (16, 3, 2, 2), (0, 4, -1, 1)),
    ("u16", (9, 4, 3, 4), (8, 2, 5, 2), (-4, 3, -1, 2)),
    ("bf16", (8, 4, 3, 3, 3), (8, 3, 2, 2, 2), (0, -1, 2, -1, 2)),
    ("f32", (7, 3, 2, 2, 4), (4, 2, 3, 1, 2), (5, 2, -1, 1, 3)),
]


@pytest.mark.parametrize(("kind", "dims", "box", "at"), TILES)
def test_tma_tile(rng, kind, dims, box, at):
    tensor = Tensor.random(rng, kind, dims)
    steps = [1] * len(dims)
    expected, _ = tensor.gather(box_positions(at, box, steps))
    spec = [*tensor.header(NONE, steps), *box]
    out = load(tensor, spec, at, 128, expected.nbytes)
    equal(out.view(expected.dtype).reshape(expected.shape), expected)


SWIZZLED = [
    (mode, kind, where)
    for mode, period in ((SWIZZLE_32, 256), (SWIZZLE_64, 512), (SWIZZLE_128, 1024))
    for kind, where in (("bf16", 1024), ("f32", 2 * 1024 + period))
]


@pytest.mark.parametrize(
    ("mode", "kind", "where"), SWIZZLED, ids=[f"{SWIZZLE_NAMES[m]}-{k}-{w}" for m, k, w in SWIZZLED]
)
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_tma_tile_swizzle(rng, rank, mode, kind, where):
    inner = (16 << mode) // np.dtype(ELEMENTS[kind][1]).itemsize
    dims = (inner + 5, 9, 4, 3)[:rank]
    box = (inner, 11, 2, 2)[:rank]
    at = (3, -1, 2, -1)[:rank]
    tensor = Tensor.random(rng, kind, dims)
    steps = [1] * rank
    expected, _ = tensor.gather(box_positions(at, box, steps))
    image = load(tensor, [*tensor.header(mode, steps), *box], at, where, expected.nbytes)
    order = shared_order(where, expected.nbytes, mode)
    if rank > 2:  # the walk continues the pattern from row to row
        assert not np.array_equal(order, np.arange(len(order)))
    equal(image[order].view(expected.dtype).reshape(expected.shape), expected)


@pytest.mark.parametrize("steps", [(1, 2), (1, 2, 2), (1, 1, 2, 3)])
@pytest.mark.parametrize("mode", [NONE, SWIZZLE_64], ids=["none", "64B"])
def test_tma_tile_element_strides(rng, steps, mode):
    rank = len(steps)
    dims, box, at = (32, 12, 9, 5)[:rank], (32, 9, 4, 4)[:rank], (0, -3, 6, 1)[:rank]
    tensor = Tensor.random(rng, "bf16", dims)
    expected, _ = tensor.gather(box_positions(at, box, steps))
    assert expected.shape[-2] == -(-9 // steps[1])
    image = load(tensor, [*tensor.header(mode, steps), *box], at, 1024, expected.nbytes)
    order = shared_order(1024, expected.nbytes, mode)
    equal(image[order].view(expected.dtype).reshape(expected.shape), expected)


def im2col_positions(tensor, lower, upper, at, offsets, channels, pixels, steps):
    """Channel and pixel positions of a walk over W, then H, then D, then images."""
    spatial = len(lower)
    walk = []
    start = list(at[1 : spatial + 1])
    image = at[-1]
    for _ in range(pixels):
        walk.append([*(p + o for p, o in zip(start, offsets, strict=True)), image])
        for s in range(spatial):
            start[s] += steps[1 + s]
            if start[s] <= tensor.dims[1 + s] - 1 + upper[s]:
                break
            start[s] = lower[s]
        else:
            image += 1
    columns = np.array(walk).T[:, :, None]
    return [at[0] + np.arange(channels)[None, :], *columns]


IM2COL = [  # dims (C, W, H, D, N), lower, upper, start, offsets, channels, pixels, steps
    ((20, 11, 4), (-2,), (-2,), (0, -2, 0), (2,), 8, 30, (1, 1, 1)),
    ((16, 40, 2), (-130,), (200,), (8, 170, 0), (300,), 16, 150, (1, 1, 1)),
    ((16, 7, 6, 3), (-1, -1), (-1, -1), (0, -1, -1, 0), (0, 0), 16, 64, (1, 1, 1, 1)),
    ((16, 7, 6, 3), (-1, -1), (-1, -1), (8, 3, 2, 1), (2, 1), 8, 50, (1, 1, 1, 1)),
    ((24, 9, 8, 2), (-3, -4), (-3, -4), (16, 2, -4, 1), (6, 8), 16, 40, (1, 1, 1, 1)),
    ((8, 9, 8, 2), (-1, -1), (-1, -1), (0, 1, 3, 0), (1, 2), 8, 20, (1, 2, 2, 1)),
    ((8, 5, 4, 3, 2), (-1, -1, -1), (-1, -1, -1), (0, 2, 1, 0, 0), (2, 0, 1), 8, 70, (1,) * 5),
]


@pytest.mark.parametrize("mode", [NONE, SWIZZLE_32], ids=["none", "32B"])
@pytest.mark.parametrize("case", IM2COL, ids=[f"rank{len(c[0])}-{c[5]}x{c[6]}" for c in IM2COL])
def test_tma_im2col(rng, case, mode):
    dims, lower, upper, at, offsets, channels, pixels, steps = case
    if mode == SWIZZLE_32:
        channels = 16
    tensor = Tensor.random(rng, "bf16", dims)
    positions = im2col_positions(tensor, lower, upper, at, offsets, channels, pixels, steps)
    expected, _ = tensor.gather(positions)
    spec = [*tensor.header(mode, steps), *lower, *upper, channels, pixels]
    image = load(tensor, spec, [*at, *offsets], 1024, expected.nbytes, im2col=1)
    order = shared_order(1024, expected.nbytes, mode)
    equal(image[order].view(expected.dtype).reshape(expected.shape), expected)


@pytest.mark.parametrize(("dilation", "pad"), [(1, 1), (2, 2), (5, 5), (3, 1), (2, 0)])
def test_tma_im2col_taps(rng, dilation, pad):
    """The recipe for a 3x3 convolution's operand, against the padded image itself."""
    channels, width, height, images, pixels = 8, 13, 11, 2, 32
    tensor = Tensor.random(rng, "f32", (channels, width, height, images))
    image = tensor.memory[..., :channels]
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    q, p = width + 2 * pad - 2 * dilation, height + 2 * pad - 2 * dilation
    corner = pad - 2 * dilation
    spec = [*tensor.header(NONE, [1] * 4), -pad, -pad, corner, corner, channels, pixels]
    for r, s, m in [(0, 0, 0), (1, 2, q * p - 7), (2, 1, 17), (2, 2, images * q * p - 5)]:
        n, y, x = m // (p * q), m // q % p, m % q
        shifted = padded[:, r * dilation :][:, :p, s * dilation :][:, :, :q]
        rows = shifted.reshape(-1, channels)[m : m + pixels]
        expected = np.zeros((pixels, channels), np.float32)
        expected[: len(rows)] = rows
        at = [0, x - pad, y - pad, n, s * dilation, r * dilation]
        out = load(tensor, spec, at, 256, expected.nbytes, im2col=1, seeds=(r + s + 1,))
        equal(out.view(np.float32).reshape(expected.shape), expected)


STORES = [
    *((NONE, *tile) for tile in TILES),
    (SWIZZLE_32, "bf16", (20, 9), (16, 12), (3, -1)),
    (SWIZZLE_64, "f32", (20, 9, 2), (16, 5, 2), (-2, 6, 1)),
    (SWIZZLE_128, "bf16", (70, 7, 2, 2), (64, 9, 1, 2), (8, -1, 0, -1)),
]


@pytest.mark.parametrize("add", [0, 1], ids=["store", "reduce_add"])
@pytest.mark.parametrize(("mode", "kind", "dims", "box", "at"), STORES)
def test_tma_store(rng, mode, kind, dims, box, at, add):
    if add:
        kind = {"u8": "s32", "u16": "f16"}.get(kind, kind)
    tensor = Tensor.random(rng, kind, dims)
    if kind == "s32" and add:
        box = (box[0] // 4, *box[1:])
    steps = [1] * len(dims)
    positions = np.broadcast_arrays(*box_positions(at, box, steps))
    _, inside = tensor.gather(positions)
    values = Tensor.random(rng, kind, tuple(reversed(inside.shape))).memory
    values = np.ascontiguousarray(values[..., : inside.shape[-1]])
    where = 1024
    image = np.zeros(values.nbytes, np.uint8)
    image[shared_order(where, values.nbytes, mode)] = values.reshape(-1).view(np.uint8)
    out = outcome(
        "tma",
        "store",
        Out(tensor.memory),
        ints([*tensor.header(mode, steps), *box]),
        add,
        ints(at),
        where,
        values.nbytes,
        image,
        seeds=FEW,
    )
    expected = tensor.memory.copy()
    index = tuple(p[inside] for p in reversed(positions))
    if not add:
        expected[index] = values[inside]
    elif kind == "bf16":
        floats = [(v[...].astype(np.uint32) << 16).view(np.float32) for v in (expected, values)]
        expected[index] = encode("bf16", floats[0][index] + floats[1][inside])
    else:
        expected[index] = expected[index] + values[inside]
    equal(out, expected)


# --- wgmma ---------------------------------------------------------------------------------------


@dataclass
class Operand:
    """An operand laid out in shared memory."""

    image: np.ndarray
    starts: list[int]
    leading: int
    stride: int
    layout: int


LAYOUT = {NONE: 0, SWIZZLE_128: 1, SWIZZLE_64: 2, SWIZZLE_32: 3}  # of a descriptor


def lay_out(kind: str, matrix: np.ndarray, mn_major: bool, mode: int, turned: bool) -> Operand:
    """An operand [mn][k] in the layouts of the table, garbage between its parts.

    turned: without a swizzle, the core matrices run along mn first rather than along k.
    """
    elements = encode(kind, matrix)
    size = elements.itemsize
    count, depth = elements.shape
    mn, k = np.meshgrid(np.arange(count), np.arange(depth), indexing="ij")
    step = 32 // size  # along k, of one instruction
    steps = depth // step
    width = 16 << mode  # bytes of a row
    per = width // size
    if mode == NONE:
        # Core matrices of eight rows of 16 bytes, 128 bytes each, with a gap between the lines.
        along_mn, along_k = (
            (128, count // 8 * 128 + 128)
            if turned
            else (
                depth * size // 16 * 128 + 256 if not mn_major else depth // 8 * 128 + 256,
                128,
            )
        )
        if mn_major:
            address = mn // 8 * along_mn + k // 8 * along_k + k % 8 * 16 + mn % 8 * 2
            starts = [i * 2 * along_k for i in range(steps)]
        else:
            chunk = k * size // 16
            address = mn // 8 * along_mn + chunk * along_k + mn % 8 * 16 + k * size % 16
            starts = [i * 2 * along_k for i in range(steps)]
        leading, stride = along_k, along_mn
    elif mn_major:
        # Boxes of `per` channels by all the pixels.
        stride = 8 * width
        leading = depth * width
        address = mn // per * leading + k * width + mn % per * 2
        starts = [i * 2 * stride for i in range(steps)]
    else:
        # Tiles of one swizzle width of k; eight rows follow each other at the stride.
        stride = 8 * width
        leading = 16  # not used
        tile = count // 8 * stride
        tile += -tile % 1024
        address = k // per * tile + mn // 8 * stride + mn % 8 * width + k % per * size
        starts = [i * step // per * tile + i * step % per * size for i in range(steps)]
    address = swizzled(address, mode)
    total = int(address.max()) + size
    total += -total % 1024
    image = np.full(total, 0xFF, np.uint8)  # nan wherever nothing belongs
    for byte in range(size):
        image[address + byte] = elements.view(np.uint8).reshape(count, depth, size)[..., byte]
    return Operand(image, starts, leading, stride, LAYOUT[mode])


def accumulator_places(n: int) -> tuple[np.ndarray, np.ndarray]:
    t, v = np.arange(128)[:, None], np.arange(n // 2)[None, :]
    lane = t % 32
    return 16 * (t // 32) + (lane >> 2) + 8 * (v >> 1 & 1), 8 * (v >> 2) + 2 * (lane & 3) + (v & 1)


def run_wgmma(kind, a, b, c, a_major, b_major, modes, *, scale_d, registers, turned, seeds):
    """[C +] A B^T for A [64][k] and B [n][k]."""
    n, depth = b.shape
    step = 8 if kind == "tf32" else 16
    steps = depth // step
    laid_b = lay_out(kind, b, b_major, modes[1], turned)
    fragments = np.zeros(4, np.uint32)
    if registers:
        places = a_places(kind, 128)
        fragments = np.stack(
            [fragment(kind, a[:, i * step : (i + 1) * step], places) for i in range(steps)]
        )
        laid_a = Operand(np.zeros(0, np.uint8), [0] * steps, 0, 0, 0)
    else:
        laid_a = lay_out(kind, a, a_major, modes[0], turned)
    rows, columns = accumulator_places(n)
    image = np.concatenate([laid_a.image, laid_b.image])
    starts = [*laid_a.starts, *(len(laid_a.image) + s for s in laid_b.starts)]
    out = outcome(
        "wgmma",
        "wgmma",
        TYPES.index(kind),
        n,
        int(a_major),
        int(b_major),
        image,
        len(image),
        fragments,
        ints([laid_a.leading, laid_a.stride, laid_a.layout]),
        ints([laid_b.leading, laid_b.stride, laid_b.layout]),
        ints(starts),
        steps,
        int(scale_d),
        Out(c[rows, columns].astype(np.float32)),
        int(registers),
        seeds=seeds,
    )
    matrix = np.full((64, n), np.nan, np.float32)
    matrix[rows, columns] = out
    return matrix


MODES = [NONE, SWIZZLE_32, SWIZZLE_64, SWIZZLE_128]
WGMMA = [  # type, N, A and B MN-major, their swizzles, A from registers, steps along k
    *(("bf16", 64, 0, 0, m, m, 0, 4) for m in MODES),
    *(("bf16", n, 0, 0, SWIZZLE_128, SWIZZLE_128, 0, 4) for n in (8, 24, 128, 256)),
    *(("bf16", n, 0, 0, NONE, SWIZZLE_64, 0, 2) for n in (8, 24)),
    ("bf16", 64, 0, 0, SWIZZLE_128, SWIZZLE_32, 0, 8),
    *(("bf16", 64, 1, 1, m, m, 0, 3) for m in MODES),
    ("bf16", 64, 1, 1, SWIZZLE_128, SWIZZLE_32, 0, 4),
    *(("bf16", 64, 1, 0, m, SWIZZLE_128, 0, 2) for m in MODES),
    *(("bf16", 64, 0, 1, SWIZZLE_64, m, 0, 2) for m in MODES),
    ("bf16", 24, 0, 1, SWIZZLE_128, NONE, 0, 2),
    ("bf16", 256, 1, 1, SWIZZLE_128, SWIZZLE_128, 0, 2),
    ("f16", 8, 0, 0, SWIZZLE_128, SWIZZLE_128, 0, 4),
    ("f16", 128, 0, 0, SWIZZLE_64, SWIZZLE_32, 0, 2),
    ("f16", 64, 1, 1, SWIZZLE_64, SWIZZLE_128, 0, 2),
    *(("tf32", 64, 0, 0, m, m, 0, 4) for m in MODES),
    *(("tf32", n, 0, 0, SWIZZLE_128, SWIZZLE_128, 0, 4) for n in (8, 24, 256)),
    ("bf16", 64, 0, 0, NONE, SWIZZLE_128, 1, 4),
    *(("bf16", 64, 0, 1, NONE, m, 1, 2) for m in MODES),
    ("f16", 24, 0, 0, NONE, SWIZZLE_64, 1, 2),
    ("f16", 64, 0, 1, NONE, SWIZZLE_128, 1, 3),
    ("tf32", 64, 0, 0, NONE, SWIZZLE_128, 1, 4),
]


def wgmma_name(case) -> str:
    kind, n, a_major, b_major, a_mode, b_mode, registers, steps = case
    major = ("K", "MN")
    a = "registers" if registers else f"{major[a_major]}-{SWIZZLE_NAMES[a_mode]}"
    return f"{kind}-n{n}-{a}-{major[b_major]}-{SWIZZLE_NAMES[b_mode]}-{steps}"


@pytest.mark.parametrize("case", WGMMA, ids=wgmma_name)
def test_wgmma(rng, case):
    kind, n, a_major, b_major, a_mode, b_mode, registers, steps = case
    depth = steps * (8 if kind == "tf32" else 16)
    a, b, c = eighths(rng, 64, depth), eighths(rng, n, depth), eighths(rng, 64, n)
    product = a.astype(np.float64) @ b.T
    # Large shapes are slow: each schedule of theirs goes to another case.
    pick = WGMMA.index(case) % len(SEEDS)
    seeds = (1, 2, 5) if case[:4] == ("bf16", 64, 0, 0) else (SEEDS[pick],)
    for scale_d in (False, True):
        out = run_wgmma(
            kind,
            a,
            b,
            c,
            a_major,
            b_major,
            (a_mode, b_mode),
            scale_d=scale_d,
            registers=registers,
            turned=scale_d,  # both ways of core matrices
            seeds=seeds,
        )
        equal(out, product + c if scale_d else product)


@pytest.mark.parametrize("kind", TYPES)
def test_wgmma_truncated(rng, kind, truncating):
    step = 8 if kind == "tf32" else 16
    a, b = wide_values(rng, kind, 64, 4 * step), wide_values(rng, kind, 8, 4 * step)
    c = wide_values(rng, kind, 64, 8)
    run = {"scale_d": True, "registers": False, "turned": False, "seeds": (1,)}
    modes = (SWIZZLE_128, SWIZZLE_128)
    rounded = run_wgmma(kind, a, b, c, 0, 0, modes, **run)
    truncating("wgmma")
    truncated = run_wgmma(kind, a, b, c, 0, 0, modes, **run)
    split_a = a.reshape(64, 4, step).transpose(1, 0, 2)
    split_b = b.reshape(8, 4, step).transpose(1, 2, 0)
    equal(truncated, truncated_sums(split_a, split_b, c))
    assert (rounded != truncated).any()


# --- clusters ------------------------------------------------------------------------------------

CLUSTERS = pytest.mark.parametrize("size", [2, 4])


def neighbour(blocks: int, size: int, distance: int) -> list[int]:
    return [b // size * size + (b + distance) % size for b in range(blocks)]


@CLUSTERS
def test_cluster_map_shared(rng, size):
    blocks = 2 * size
    given = words(rng, blocks, 64)
    out = outcome(
        "cluster", "remote", blocks, size, given, Out(np.zeros((blocks, 64, 6), np.uint32))
    )
    ranks = np.repeat(np.arange(blocks) % size, 64).reshape(blocks, 64)
    for column, expected in enumerate([ranks, np.full_like(ranks, size)] * 2):
        equal(out[..., column], expected)
    equal(out[..., 4], given[neighbour(blocks, size, 1)])
    equal(out[..., 5], given[neighbour(blocks, size, -2)][:, ::-1] ^ 0x55555555)


@CLUSTERS
def test_cluster_store_async(rng, size):
    given = words(rng, 2 * size, 64)
    out = outcome("cluster", "store_async", 2 * size, size, given, Out(np.zeros_like(given)))
    equal(out, given[neighbour(2 * size, size, -1)])


@CLUSTERS
def test_cluster_remote_arrive(size):
    out = outcome(
        "cluster", "remote_arrive", size, size, Out(np.zeros((size, 64), np.int32)), 3, seeds=FEW
    )
    equal(out, np.full((size, 64), 3))


@CLUSTERS
def test_bulk_copy_cluster(rng, size):
    given = words(rng, 2 * size, 1024)
    out = outcome(
        "cluster", "bulk_copy", 2 * size, size, given, Out(np.zeros_like(given)), seeds=FEW
    )
    equal(out, given[neighbour(2 * size, size, 1)])


@pytest.mark.parametrize(("size", "mask"), [(2, 0b11), (4, 0b1111), (4, 0b1010), (4, 0b0001)])
@pytest.mark.parametrize("mode", ["bulk", "tiled", "im2col"])
def test_multicast(rng, mode, size, mask):
    blocks = 2 * size
    at, spec = [0], [0]
    if mode == "bulk":
        memory = words(rng, 2, 128)
        expected = [memory[0], memory[1]]
    elif mode == "tiled":
        tensor = Tensor.random(rng, "f32", (20, 9))
        memory, at, box = tensor.memory, [-3, 2], (16, 5)
        spec = [*tensor.header(NONE, (1, 1)), *box]
        expected = [
            tensor.gather(box_positions([at[0], at[1] + c], box, (1, 1)))[0] for c in range(2)
        ]
    else:
        tensor = Tensor.random(rng, "f32", (8, 9, 3))
        memory, at = tensor.memory, [0, -1, 1, 2]
        spec = [*tensor.header(NONE, (1, 1, 1)), -1, -1, 8, 15]
        expected = [
            tensor.gather(
                im2col_positions(tensor, [-1], [-1], [0, c - 1, 1], [2], 8, 15, (1, 1, 1))
            )[0]
            for c in range(2)
        ]
    count = expected[0].nbytes
    out = outcome(
        "cluster",
        "multicast",
        ["bulk", "tiled", "im2col"].index(mode),
        blocks,
        size,
        memory,
        ints(spec),
        ints(at),
        count,
        mask,
        Out(np.full((blocks, count // 4), 0xEEEEEEEE, np.uint32)),
    )
    for b in range(blocks):
        received = np.ascontiguousarray(expected[b // size]).view(np.uint32).reshape(-1)
        equal(out[b], received if mask >> b % size & 1 else np.full(count // 4, 0xEEEEEEEE))


# --- grids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [0, 1], ids=["add_acq_rel", "cooperative_groups"])
@pytest.mark.parametrize("blocks", [1, 5])
def test_grid_barrier(rng, blocks, groups):
    rounds = 4
    given = words(rng, 2, blocks * 64)
    out, arrived = outcome(
        "grid", "grid_barrier", blocks, Out(given), Out(np.zeros(1, np.int32)), rounds, groups
    )
    expected = given.copy()
    for i in range(rounds):
        expected[(i + 1) % 2] = expected[i % 2] + 3 * np.roll(expected[i % 2], -64)
    equal(out, expected)
    equal(arrived, [0 if groups else rounds * blocks])


def test_load_acquire_store_release():
    zeros = np.zeros(9, np.int32)
    flags, _, out = outcome("grid", "release_chain", 9, Out(zeros), Out(zeros), Out(zeros))
    equal(flags, np.ones(9))
    equal(out, np.cumsum(np.arange(1, 10)))


def test_cooperative_thread_block(rng):
    given = rng.integers(0, 1 << 30, 96, dtype=np.int32)
    equal(outcome("grid", "block_group", given, Out(np.zeros_like(given))), given[::-1])


def test_dependent_launch(rng):
    given = rng.integers(0, 1 << 20, 192, dtype=np.int32)
    empty = Out(np.zeros_like(given))
    between, out = outcome("grid", "dependent", given, empty, empty, 1)
    equal(between, 2 * given + 1)
    equal(out, between[::-1])


def test_dependent_launch_needs_its_wait(rng):
    given = Out(np.zeros(192, np.int32))
    with pytest.raises(KernelError, match=r"griddepcontrol\.wait"):
        outcome("grid", "dependent", given, given, given, 0)


# --- one source for both compilers ---------------------------------------------------------------


def included(path: Path) -> list[Path]:
    """A kernel file and all of ours that it may include."""
    return [path, *sorted(KERNELS.glob("*.h")), *sorted((ROOT / "csrc/cuda/common").glob("*.cuh"))]


@pytest.mark.parametrize("stem", FILES)
def test_nvcc_compiles(stem):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on the PATH")
    source = KERNELS / f"{stem}.cu"
    folder = ROOT / "build/emulator/nvcc"
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        *(
            nvcc,
            "-c",
            "-std=c++20",
            "--expt-relaxed-constexpr",
            "-gencode=arch=compute_90a,code=sm_90a",
        ),
        *("-Xcompiler=-Wall", f"-I{ROOT / 'csrc'}", f"-I{KERNELS}"),
        *("-o", str(folder / f"{stem}.o"), str(source)),
    ]
    digest = hashlib.sha256("\0".join(command).encode())
    for path in included(source):
        digest.update(path.read_bytes())
    stamp = folder / f"{stem}.compiled"
    if stamp.exists() and stamp.read_text() == digest.hexdigest():
        return  # it did, and nothing has changed since
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "C7510" not in said, said  # wgmma serialised
    stamp.write_text(digest.hexdigest())
