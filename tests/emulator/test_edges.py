# SPDX-License-Identifier: Apache-2.0
"""Corners in which an earlier emulator was wrong: a fault that was none, or one unseen."""

import pytest
import torch

from emulator.harness import SEEDS, KernelError, kernels

by_seed = pytest.mark.parametrize("seed", SEEDS)


@pytest.fixture(scope="module")
def edges():
    return kernels("edges")


@by_seed
def test_knowledge_gained_inside_a_split_cluster_barrier_is_kept(edges, seed):
    out = edges.buffer(torch.zeros(128))
    edges.run("split_barrier", out, seed=seed)
    assert out.tolist() == [float(t ^ 1) for t in range(64)] * 2


def test_a_late_waiter_does_not_learn_of_the_next_phase(edges):
    found = 0
    for seed in SEEDS:
        out = edges.buffer(torch.zeros(2))
        with pytest.raises(KernelError, match=r"race on shared memory .*edges\.cu:\d+"):
            edges.run("late_wait", out, seed=seed)
        found += 1
    assert found == len(SEEDS)


@by_seed
def test_remote_copies_need_an_initialised_mbarrier(edges, seed):
    out = edges.buffer(torch.zeros(32, dtype=torch.int32))
    edges.run("remote_init", out, 1, seed=seed)
    assert out.eq(7).all()
    with pytest.raises(KernelError, match=r"may not have started|initialis"):
        edges.run("remote_init", out, 0, seed=seed)


@by_seed
def test_polling_by_read_modify_write_gives_way(edges, seed):
    lock, count, total = (edges.buffer(torch.zeros(1, dtype=torch.int32)) for _ in range(3))
    edges.run("poll", lock, count, total, seed=seed)
    assert total.item() == sum(range(64))


@by_seed
def test_wait_group_and_mbarrier_may_both_wait_for_a_copy(edges, seed):
    values = torch.randn(64, 4)
    out = edges.buffer(torch.zeros(128, 4))
    edges.run("two_waits", edges.buffer(values), out, seed=seed)
    assert torch.equal(out[:64], values)
    assert torch.equal(out[64:], values.view(32, 2, 4).flip(1).reshape(64, 4))


@by_seed
@pytest.mark.parametrize("threads", [1, 3])
def test_bytes_of_buffers_are_counted_and_no_others(edges, threads, seed):
    blocks = 6
    values = edges.buffer(torch.arange(blocks * 64.0))
    indices = edges.buffer(torch.arange(blocks * 32, dtype=torch.int32))
    out = edges.buffer(torch.zeros(blocks * 64))
    edges.set_threads(threads)
    try:
        edges.traffic()
        edges.run("traffic", values, indices, out, blocks, seed=seed)
    finally:
        edges.set_threads(2)
    assert torch.equal(out[: blocks * 32], 2 * values[::2] + values[1::2])
    # A thread loads 8 bytes, copies 8, loads an index of 4; it writes 4. One bulk store per block.
    assert edges.traffic() == (blocks * 32 * (8 + 8 + 4), blocks * (32 * 4 + 64))
    assert edges.traffic() == (0, 0)


@pytest.mark.parametrize(
    ("edge", "text"),
    [
        (0, r"access to unmapped memory at .*edges\.cu:\d+"),
        (1, r"an asynchronous copy touches unmapped memory at .*edges\.cu:\d+"),
        (2, r"mma\.sync needs all 32 lanes of the warp, but some"),
        (3, r"mbarrier\.init on shared address \d+, which is an mbarrier already"),
        (4, r"missing fence\.proxy\.async: .* is overwritten through the async proxy"),
    ],
    ids=["far_shared", "wild_copy", "lane_exits", "init_twice", "stale_proxy"],
)
@by_seed
def test_wrong(edges, edge, text, seed):
    values, out = edges.buffer(torch.randn(32)), edges.buffer(torch.zeros(32))
    with pytest.raises(KernelError, match=text):
        edges.run("wrong", values, out, edge, seed=seed)


@by_seed
def test_a_copy_counts_from_its_issue_in_a_dependent_launch(edges, seed):
    between, out = (edges.buffer(torch.zeros(32)) for _ in range(2))
    with pytest.raises(KernelError, match=r"previous kernel writes, before griddepcontrol\.wait"):
        edges.run("early_copy", between, out, seed=seed)
