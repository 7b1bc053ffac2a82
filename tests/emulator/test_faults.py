# SPDX-License-Identifier: Apache-2.0
"""Planted faults: the emulator must find each, and say what it is and where.

Every kernel is first run without a fault, under every schedule: exactly right, and no report.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from emulator.build import HERE, compiler
from emulator.harness import SEEDS, KernelError, Kernels, kernels

pytestmark = pytest.mark.skipif(compiler() is None, reason="no g++")

SYNC, COPIES, PIPELINE = "faults_sync", "faults_copies", "faults_pipeline"
TMA, STORES, COPY_B = range(3)  # Fill of faults_pipeline.cu


def fault_number(file: str, name: str) -> int:
    """The value of a fault in the enum of kernels/<file>.cu."""
    source = (HERE / "kernels" / f"{file}.cu").read_text()
    body = re.search(r"enum Fault \{(.*?)\};", source, re.DOTALL)[1]
    return re.findall(r"^\s*(k\w+),", body, re.MULTILINE).index(name)


# ---- the kernels, each as a function (kernels, fault, seed) -> (result, expected) ----------------

Runner = Callable[[Kernels, int, int], tuple[torch.Tensor, torch.Tensor]]
RUNNERS: dict[str, tuple[str, Runner]] = {}


def runner(file: str) -> Callable[[Runner], Runner]:
    def add(function: Runner) -> Runner:
        RUNNERS[function.__name__] = (file, function)
        return function

    return add


def ints(*shape: int) -> torch.Tensor:
    return torch.randint(-1000, 1000, shape, dtype=torch.int32)


def eighths(*shape: int) -> torch.Tensor:
    """Small multiples of 1/8: every sum of products is exact."""
    return (torch.randint(-8, 9, shape) / 8).to(torch.bfloat16)


@runner(SYNC)
def block_sum(k: Kernels, fault: int, seed: int):
    values = ints(3000)
    out = k.buffer(torch.zeros(4, dtype=torch.int32))
    k.run("sum", k.buffer(values), out, 3000, fault, seed=seed)
    return out.sum(), values.sum()


@runner(SYNC)
def vectors(k: Kernels, fault: int, seed: int):
    values = ints(260)
    out = k.buffer(torch.zeros(256, dtype=torch.int32))
    k.run("vectors", k.buffer(values), out, fault, seed=seed)
    return out.view(64, 4), values[:256].view(64, 4).flip(0)


@runner(SYNC)
def gather(k: Kernels, fault: int, seed: int):
    values = ints(4, 64)
    padded = torch.zeros(4, 1 << 15, dtype=torch.int32)
    padded[:, :64] = values
    out = k.buffer(torch.zeros(4, 32, dtype=torch.int32))
    k.run("gather", k.buffer(padded), out, 1 << 16, 1 << 15, fault, seed=seed)
    return out, values[:, :32]


@runner(SYNC)
def blur(k: Kernels, fault: int, seed: int):
    values = ints(3 * 64 + 2)
    out = k.buffer(torch.zeros(3 * 64, dtype=torch.int32))
    k.run("blur", k.buffer(values), out, fault, seed=seed)
    return out, values[:-2] + values[1:-1] + values[2:]


@runner(SYNC)
def warp_sum(k: Kernels, fault: int, seed: int):
    values = ints(32)
    out = k.buffer(torch.zeros(1, dtype=torch.int32))
    k.run("warp_sum", k.buffer(values), out, fault, seed=seed)
    return out[0], values.sum()


@runner(SYNC)
def handoff(k: Kernels, fault: int, seed: int):
    out = k.buffer(torch.zeros(33, dtype=torch.int32))
    k.run("handoff", k.buffer(torch.zeros(1, dtype=torch.int32)), out, fault, seed=seed)
    return out, torch.tensor([*(3 * i for i in range(32)), 1])


@runner(SYNC)
def ring(k: Kernels, fault: int, seed: int):
    values = ints(2, 4, 32)
    out = k.buffer(torch.zeros(2, 4, 32, dtype=torch.int32))
    k.run("ring", k.buffer(values), out, fault, seed=seed)
    expected = values.roll(1, 1)
    expected[:, 0] = -1
    return out, expected


@runner(SYNC)
def scale_twice(k: Kernels, fault: int, seed: int):
    values = ints(64)
    middle, out = (k.buffer(torch.zeros(64, dtype=torch.int32)) for _ in range(2))
    k.run("scale_twice", k.buffer(values), middle, out, fault, seed=seed)
    return out, 9 * values


def run_gemm(k: Kernels, rows: int, columns: int, depth: int, arguments: tuple, seed: int):
    a, b = eighths(rows, depth), eighths(columns, depth)
    out = k.buffer(torch.full((rows, columns), -1.0))
    k.run("gemm", k.buffer(a), k.buffer(b), out, *arguments, seed=seed)
    return out, a.float() @ b.float().T


@runner(COPIES)
def copies(k: Kernels, fault: int, seed: int):
    return run_gemm(k, 27, 8, 192, (27, 192, fault), seed)


@runner(PIPELINE)
def pipeline(k: Kernels, fault: int, seed: int):
    return run_gemm(k, 64, 16, 8 * 64, (8, TMA, fault), seed)


@runner(PIPELINE)
def pipeline_stores(k: Kernels, fault: int, seed: int):
    return run_gemm(k, 64, 16, 5 * 64, (5, STORES, fault), seed)


@runner(PIPELINE)
def pipeline_copies(k: Kernels, fault: int, seed: int):
    return run_gemm(k, 64, 16, 5 * 64, (5, COPY_B, fault), seed)


@runner(PIPELINE)
def move(k: Kernels, fault: int, seed: int):
    values = ints(2, 8, 32)
    out = k.buffer(torch.zeros(2, 8, 32, dtype=torch.int32))
    k.run("move", k.buffer(values), out, 2, fault, seed=seed)
    return out, values + 1


def execute(name: str, fault: str = "kNone", *, seed: int, variant: str = "checked"):
    file, function = RUNNERS[name]
    torch.manual_seed(0)
    return function(kernels(file, variant), fault_number(file, fault), seed)


def report_of(name: str, fault: str, *, seed: int, variant: str = "checked") -> str:
    """What the emulator says, "" if it finds nothing."""
    try:
        execute(name, fault, seed=seed, variant=variant)
    except KernelError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", RUNNERS)
def test_is_right_without_a_fault(name):
    for seed in SEEDS:
        result, expected = execute(name, seed=seed)
        assert torch.equal(result, expected.to(result.dtype)), f"seed {seed}"


# ---- faults that are reported --------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """A fault under the name it has in the plan, and what its report says under every seed."""

    what: str
    kernel: str
    fault: str
    report: str
    line: bool = True  # the report names a line of the kernel


RACE = "race on shared memory at address"
NEVER = "read of shared memory at address [0-9]+ that was never written"
DEADLOCK = "deadlock: no thread can go on"
PLANTED = [
    Planted("missing barrier", "block_sum", "kMissingBarrier", f"{RACE}|{NEVER}"),
    Planted("missing barrier in a loop", "block_sum", "kMissingLaterBarrier", RACE),
    Planted(
        "unbalanced barrier",
        "block_sum",
        "kUnbalancedBarrier",
        f"{DEADLOCK}(.|\n)*lanes? 0-26: barrier 0 at .*; lanes? 27-31: exited(.|\n)*"
        "barrier 0: 251 of 256 threads have arrived; unbalanced: 5 threads of the block "
        "have exited",
    ),
    Planted(
        "read past a buffer",
        "block_sum",
        "kReadPastBuffer",
        "read outside of a buffer: 4 bytes at 0 bytes behind the end of an allocation of 12000",
    ),
    Planted(
        "write past a buffer",
        "block_sum",
        "kWritePastBuffer",
        "write outside of a buffer: 4 bytes at [0-9]+ bytes behind the end of an allocation of 16",
    ),
    Planted("unwritten shared memory", "block_sum", "kUninitialised", NEVER),
    Planted(
        "misaligned vector load",
        "vectors",
        "kMisalignedGlobal",
        "misaligned read of 16 bytes at .*: expected a multiple of 16",
    ),
    Planted(
        "misaligned shared vector store",
        "vectors",
        "kMisalignedShared",
        "misaligned write of 16 bytes of shared memory at address .*: expected a multiple of 16",
    ),
    Planted(
        "integer overflow of an offset",
        "gather",
        "kOffsetOverflow",
        "access to unmapped memory at|read outside of a buffer",
    ),
    Planted(
        "off-by-one tile, read",
        "blur",
        "kTileReadOffByOne",
        "read of 4 bytes of shared memory at offset 264, but the block has 264 bytes",
    ),
    Planted(
        "off-by-one tile, write",
        "blur",
        "kTileWriteOffByOne",
        "write of 4 bytes of shared memory at offset 264, but the block has 264 bytes",
    ),
    Planted("missing halo", "blur", "kMissingHalo", NEVER),
    Planted(
        "shuffle from a lane outside of the mask",
        "warp_sum",
        "kShuffleFromInactive",
        "__shfl_sync reads a lane that takes no part",
    ),
    Planted(
        "shuffle by a lane outside of the mask",
        "warp_sum",
        "kShuffleOutsideMask",
        "by lane 16, which its mask 0xfffeffff does not name|reads a lane that takes no part",
    ),
    Planted(
        "named barrier with two counts",
        "handoff",
        "kBarrierCounts",
        "barrier 1: thread .* arrives expecting (96|64) threads at .*, others expect (64|96) at",
    ),
    Planted(
        "named barrier for too many",
        "handoff",
        "kBarrierTooMany",
        "(deadlock|livelock)(.|\n)*barrier 1: 64 of 96 threads have arrived",
    ),
    Planted(
        "livelock",
        "handoff",
        "kFlagNeverSet",
        "livelock, all threads that are not blocked only poll(.|\n)*a flag in memory at",
    ),
    Planted(
        "cluster exit while a peer writes",
        "ring",
        "kClusterExit",
        "touches the shared memory of block .* of the cluster, which has exited|"
        "exits without having waited for a peer that can reach its shared memory",
    ),
    Planted(
        "cluster read without a barrier",
        "ring",
        "kClusterReadBeforeBarrier",
        f"{RACE}|{NEVER}",
    ),
    Planted(
        "cluster wait without arrival",
        "ring",
        "kClusterWaitOnly",
        "waits at the cluster barrier without having arrived",
    ),
    Planted(
        "block outside of the cluster",
        "ring",
        "kClusterRank",
        "map_shared of address [0-9]+ to block 4 of a cluster of 4",
    ),
    Planted(
        "missing griddepcontrol.wait",
        "scale_twice",
        "kMissingDependencyWait",
        "read of memory that the previous kernel writes, before griddepcontrol.wait",
    ),
    # cp.async, ldmatrix, mma.sync
    Planted("missing wait for cp.async", "copies", "kMissingWait", NEVER),
    Planted("missing barrier after the wait", "copies", "kMissingBarrier", f"{RACE}|{NEVER}"),
    Planted("missing zero fill", "copies", "kMissingFill", NEVER),
    Planted(
        "rows past the end instead of zero fill",
        "copies",
        "kReadPastRows",
        "read outside of a buffer: 16 bytes at [0-9]+ bytes behind the end of an allocation",
    ),
    Planted("early stage release, cp.async", "copies", "kEarlyRelease", RACE),
    Planted(
        "off-by-one stage",
        "copies",
        "kStageOffByOne",
        "cp.async of 16 bytes of shared memory at offset [0-9]+, but the block has 7680 bytes",
    ),
    Planted(
        "cp.async open at exit",
        "copies",
        "kCopiesLeftOpen",
        "exits with cp.async copies that it has not waited for",
    ),
    # TMA, mbarriers, wgmma
    Planted("early stage release, wgmma", "pipeline", "kEarlyRelease", RACE),
    Planted(
        "wrong parity, consumer",
        "pipeline",
        "kConsumerParity",
        f"{NEVER}|{RACE}|"
        f"{DEADLOCK}(.|\n)*the mbarrier at shared address [0-9]+, parity 1 at .* in consume",
    ),
    Planted(
        "wrong parity, producer",
        "pipeline",
        "kProducerParity",
        f"{DEADLOCK}(.|\n)*the mbarrier at shared address [0-9]+, parity 0 at(.|\n)*"
        "4 of 4 arrivals and 0 transaction bytes outstanding",
    ),
    Planted(
        "wrong expect_tx bytes, too many",
        "pipeline",
        "kExpectTooMany",
        f"{DEADLOCK}(.|\n)*0 of 1 arrivals and 16 transaction bytes outstanding",
    ),
    Planted(
        "wrong expect_tx bytes, too few",
        "pipeline",
        "kExpectTooFew",
        "received 16 bytes more than expect_tx announced in phase 0",
    ),
    Planted(
        "wrong expect_tx bytes, one operand",
        "pipeline",
        "kExpectOneOperand",
        f"bytes more than expect_tx announced|{RACE}|{NEVER}",
    ),
    Planted(
        "missing wgmma fence",
        "pipeline",
        "kMissingWgmmaFence",
        "missing wgmma.fence: the accumulators were never used since the last one",
    ),
    Planted(
        "missing wgmma fence after a write",
        "pipeline",
        "kWrittenWithoutFence",
        "missing wgmma.fence: the accumulators were written since the last one",
    ),
    Planted(
        "accumulators written in flight",
        "pipeline",
        "kWrittenInFlight",
        "the accumulators of a wgmma (were written while it was|in flight were written)",
    ),
    Planted(
        "wgmma not waited for",
        "pipeline",
        "kMissingWgmmaWait",
        "exits without having waited for the wgmma at",
    ),
    Planted(
        "wgmma not committed",
        "pipeline",
        "kMissingCommit",
        "exits without having committed the wgmma at",
    ),
    Planted("wrong descriptor stride", "pipeline", "kStrideTooLarge", f"{NEVER}|{RACE}"),
    Planted(
        "descriptor past the end",
        "pipeline",
        "kDescriptorPastEnd",
        "wgmma operand B of 16 bytes of shared memory at offset [0-9]+, but the block has 30768",
    ),
    Planted(
        "missing proxy fence, stores",
        "pipeline_stores",
        "kMissingProxyFence",
        "missing fence.proxy.async: shared memory at address .* was written by thread [0-9]+ of "
        "block .* at .*:[0-9]+ in .* through the generic proxy and is read through the async proxy",
    ),
    Planted(
        "missing proxy fence, cp.async",
        "pipeline_copies",
        "kMissingProxyFence",
        "missing fence.proxy.async: shared memory at address .* was written by thread [0-9]+ of "
        "block .* at .*:[0-9]+ in .* through the generic proxy and is read through the async proxy",
    ),
    Planted(
        "mbarrier not initialised",
        "pipeline",
        "kMissingInit",
        "on shared address [0-9]+, which is no initialised mbarrier",
    ),
    Planted(
        "mbarrier used before its initialisation",
        "pipeline",
        "kInitUnordered",
        f"which is no initialised mbarrier|{RACE}",
    ),
    Planted(
        "mbarrier overwritten",
        "pipeline",
        "kBarrierOverwritten",
        f"which was an mbarrier until its bytes were overwritten|{RACE}",
    ),
    Planted(
        "too many arrivals, producer",
        "pipeline",
        "kProducerArrivesTwice",
        "too many arrivals at the mbarrier at shared address [0-9]+: all 1 of phase 0 have come, "
        "and 10240 transaction bytes are outstanding",
    ),
    # Those of one stage complete several phases: the producer comes back too early.
    Planted("too many arrivals, consumers", "pipeline", "kTooManyArrivals", RACE),
    Planted(
        "wgmma by part of a warpgroup",
        "pipeline",
        "kPartialWarpgroup",
        "all four warps must execute each|4 of 4 arrivals|1 of 4 arrivals",
    ),
    Planted(
        "tensor map never encoded",
        "move",
        "kUnencodedMap",
        "TMA load: the tensor map was never encoded, or was changed since",
    ),
    Planted(
        "tiled map for im2col",
        "move",
        "kTileMapForIm2col",
        "TMA load: an im2col copy was given a tiled tensor map",
    ),
    Planted(
        "misaligned destination of TMA",
        "move",
        "kMisalignedTile",
        "TMA load: shared address [0-9]+ is not aligned to 128 bytes",
    ),
    Planted(
        "multicast outside of the cluster",
        "move",
        "kMulticastOutside",
        "multicast mask 0x2 names block 1 of a cluster of 1",
    ),
    Planted(
        "missing proxy fence, TMA store", "move", "kStoreWithoutFence", "missing fence.proxy.async"
    ),
    Planted(
        "exit during a TMA store",
        "move",
        "kStoreNotWaited",
        "exits while a bulk store may still read the block's shared memory",
        line=False,
    ),
    Planted("source of a TMA store overwritten", "move", "kStoreSourceOverwritten", RACE),
]


@pytest.mark.parametrize("planted", PLANTED, ids=lambda p: p.what)
def test_reports(planted):
    file = RUNNERS[planted.kernel][0]
    for seed in SEEDS:
        report = report_of(planted.kernel, planted.fault, seed=seed)
        assert re.search(planted.report, report), f"seed {seed}: {report or 'nothing'}"
        if planted.line:
            assert re.search(rf"tests/emulator/kernels/{file}\.cu:\d+ in \w+", report), report


# ---- faults that show in the result --------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "name", "fault"),
    [
        ("swizzle mismatch", "copies", "kSwizzleMismatch"),
        ("swizzle mismatch", "pipeline", "kSwizzleMismatch"),
        ("wrong descriptor stride", "pipeline", "kStrideTooSmall"),
        ("accumulators read in flight", "pipeline", "kReadInFlight"),
    ],
)
def test_changes_the_result(what, name, fault):
    """Addresses that are wrong but written hold legal bytes: only the sums can tell.

    The emulator cannot know which swizzle or stride was meant. Accumulators in flight are
    registers, which it does not watch either, but it keeps nan there.
    """
    for seed in SEEDS:
        result, expected = execute(name, fault, seed=seed)
        wrong = result != expected
        assert wrong.float().mean() > 0.2, f"seed {seed}"
        if fault == "kReadInFlight":
            assert result[wrong].isnan().all()


# ---- other builds, launches ----------------------------------------------------------------------


def test_write_past_a_buffer_shows_without_checks():
    for seed in SEEDS:
        result, expected = execute("block_sum", seed=seed, variant="fast")
        assert result == expected
        report = report_of("block_sum", "kWritePastBuffer", seed=seed, variant="fast")
        assert re.search(
            "write outside of a buffer: 0 bytes behind the end of an allocation of 16 bytes was "
            "overwritten",
            report,
        ), report


def test_trap_repeats_what_was_printed(capfd):
    k = kernels(SYNC)
    labels = torch.arange(500, dtype=torch.int32) % 21
    for seed in SEEDS:
        out = k.buffer(torch.zeros(21, dtype=torch.int32))
        k.run("count", k.buffer(labels), out, 500, 21, seed=seed)
        assert torch.equal(out, labels.bincount().to(torch.int32))
    labels[137] = 255
    for seed in SEEDS:
        out = k.buffer(torch.zeros(21, dtype=torch.int32))
        with pytest.raises(
            KernelError,
            match=r"trap by thread 9 of block \(0,0,0\) at .*faults_sync\.cu:\d+ in .*; it "
            r"printed: label 255 of pixel 137 is not in 0 \.\. 20",
        ):
            k.run("count", k.buffer(labels), out, 500, 21, seed=seed)


@pytest.fixture
def sync() -> Iterator[Kernels]:
    k = kernels(SYNC)
    yield k
    k.set_arch(90)


@dataclass(frozen=True)
class Empty:
    """Arguments of launch_empty."""

    grid_x: int = 1
    grid_y: int = 1
    block: int = 32
    shared_bytes: int = 0
    cluster: int = 1
    cooperative: int = 0
    opt_in: int = 0

    def run(self, k: Kernels) -> None:
        k.run("launch_empty", *vars(self).values())


KB = 1024


@pytest.mark.parametrize(
    ("arch", "launch"),
    [
        (90, Empty(block=1024)),
        (90, Empty(grid_y=65535, block=1)),
        (90, Empty(shared_bytes=48 * KB)),
        (90, Empty(shared_bytes=227 * KB, opt_in=1)),
        (120, Empty(shared_bytes=99 * KB, opt_in=1)),
        (80, Empty(shared_bytes=163 * KB, opt_in=1)),
        (90, Empty(grid_x=16, cluster=8)),
        (90, Empty(grid_x=32, cluster=16, opt_in=1)),
        (90, Empty(grid_x=132, cooperative=1)),
    ],
)
def test_launches_up_to_the_limits(sync, arch, launch):
    sync.set_arch(arch)
    launch.run(sync)


@pytest.mark.parametrize(
    ("arch", "launch", "reason"),
    [
        (90, Empty(block=1025), r"block \(1025,1,1\): expected 1 to 1024 threads"),
        (90, Empty(block=0), r"block \(0,1,1\): expected 1 to 1024 threads"),
        (90, Empty(grid_x=0), r"grid \(0,1,1\): expected x from 1"),
        (90, Empty(grid_y=65536), r"grid \(1,65536,1\): .* y and z from 1 to 65535"),
        (
            90,
            Empty(shared_bytes=48 * KB + 1),
            "49153 bytes of dynamic shared memory: .* 49152; raise",
        ),
        (90, Empty(shared_bytes=227 * KB + 1, opt_in=1), "232449 bytes .*: sm_90 has 232448"),
        (120, Empty(shared_bytes=99 * KB + 1, opt_in=1), "101377 bytes .*: sm_120 has 101376"),
        (80, Empty(shared_bytes=163 * KB + 1, opt_in=1), "166913 bytes .*: sm_80 has 166912"),
        (
            90,
            Empty(grid_x=16, cluster=16),
            "a cluster of 16 blocks: expected at most 8 .*NonPortable",
        ),
        (90, Empty(grid_x=32, cluster=32, opt_in=1), "a cluster of 32 blocks: expected at most 16"),
        (90, Empty(grid_x=6, cluster=4), r"grid \(6,1,1\): expected a multiple of the cluster"),
        (80, Empty(grid_x=4, cluster=2), "a cluster of 2 blocks: sm_80 has no clusters"),
        (
            90,
            Empty(grid_x=132 * 32 + 1, cooperative=1),
            "cooperative grid of 4225 blocks, of which 4224 can be resident",
        ),
        (
            90,
            Empty(grid_x=133, shared_bytes=200 * KB, cooperative=1, opt_in=1),
            "cooperative grid of 133 blocks, of which 132 can be resident",
        ),
    ],
)
def test_refuses_launches(sync, arch, launch, reason):
    sync.set_arch(arch)
    with pytest.raises(KernelError, match=reason):
        launch.run(sync)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((1, 64, 64, 8, 3), "globalAddress .* is not aligned to 16 bytes"),
        ((0, 60, 56, 8, 0), r"globalStrides\[0\] = 120 is not a multiple of 16 bytes"),
        (
            (0, 64, 60, 8, 0),
            r"boxDim\[0\] = 60 elements of 2 bytes are 120 bytes, not a multiple of",
        ),
        ((0, 128, 128, 8, 3), r"boxDim\[0\] = 128 .* 256 bytes, more than the swizzle's 128"),
        ((0, 64, 64, 257, 3), r"boxDim\[1\] = 257 is not in 1\.\.256"),
        ((0, 0, 64, 8, 3), r"globalDim\[0\] = 0 is not in"),
    ],
)
def test_refuses_tensor_maps(arguments, reason):
    k = kernels(PIPELINE)
    data = k.buffer(torch.zeros(4096, dtype=torch.float16))
    k.run("encode_only", data, 0, 64, 64, 8, 3)
    with pytest.raises(KernelError, match=reason):
        k.run("encode_only", data, *arguments)


# ---- the reports themselves ----------------------------------------------------------------------


def replay_seed(report: str) -> int:
    return int(re.search(r"\nreplay with EMULATOR_SEED=(\d+)( EMULATOR_THREADS=1)?$", report)[1])


@pytest.mark.parametrize(
    ("name", "fault"),
    [("pipeline", "kEarlyRelease"), ("copies", "kMissingBarrier"), ("handoff", "kBarrierCounts")],
)
def test_a_report_ends_with_the_seed_that_replays_it(name, fault):
    reports = {seed: report_of(name, fault, seed=seed) for seed in SEEDS}
    for seed, report in reports.items():
        assert replay_seed(report) == seed
        assert report_of(name, fault, seed=replay_seed(report)) == report
    assert len({r.partition("\nreplay")[0] for r in reports.values()}) > 1  # schedules differ


@pytest.mark.parametrize(
    ("name", "fault", "warps"),
    [
        ("block_sum", "kUnbalancedBarrier", 8),
        ("pipeline", "kProducerParity", 8),
        ("pipeline", "kExpectTooMany", 8),
        ("handoff", "kBarrierTooMany", 2),
    ],
)
def test_a_deadlock_says_what_every_warp_waits_for(name, fault, warps):
    for seed in SEEDS:
        named = []
        for line in report_of(name, fault, seed=seed).splitlines():
            if not re.match(r"  block .* - (all lanes|lane)", line):
                continue
            for warps_of in re.findall(r" warps? ([\d, -]+)", line.partition(" - ")[0]):
                for first, last in re.findall(r"(\d+)(?:-(\d+))?", warps_of):
                    named += range(int(first), int(last or first) + 1)
        assert sorted(named) == list(range(warps)), f"seed {seed}"
