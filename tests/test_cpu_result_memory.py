# SPDX-License-Identifier: Apache-2.0
"""Where large results on the CPU live: aligned blocks of pages, kept for the next result."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from dilseg.functional import cross_entropy, upsample_add, upsample_argmax

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="blocks of pages are taken on Linux only"
)
HUGE_PAGE = 2 << 20
SMALL = torch.randn(1, 3, 64, 64)


def large() -> torch.Tensor:
    return upsample_add(SMALL, None, scale_factor=8)  # 3 MiB


def test_a_large_result_begins_at_a_huge_page():
    assert large().data_ptr() % HUGE_PAGE == 0
    logits = torch.randn(1, 21, 256, 256, requires_grad=True)
    target = torch.zeros(1, 256, 256, dtype=torch.long)
    (grad,) = torch.autograd.grad(cross_entropy(logits, target), logits)
    assert grad.data_ptr() % HUGE_PAGE == 0


def test_memory_comes_back_and_results_alive_keep_theirs():
    first = large()
    copy, place = first.clone(), first.data_ptr()
    second = large()
    assert second.data_ptr() != place
    second.fill_(7.0)
    assert torch.equal(first, copy)
    view = first[0, 1]
    del first
    assert large().data_ptr() != place, "a view of a result keeps its memory"
    del view
    assert large().data_ptr() == place


def test_a_result_is_an_ordinary_tensor():
    result = large()
    expected = result.clone()
    result.resize_(1, 3, 1024, 1024)
    assert result.untyped_storage().nbytes() >= 12 << 20
    assert torch.equal(result.flatten()[: expected.numel()], expected.flatten())
    assert torch.equal(large().share_memory_(), expected)
    assert torch.equal(torch.from_numpy(large().numpy()), expected)
    with torch.inference_mode():
        assert large().is_inference()


def test_a_half_and_an_integer_result():
    assert upsample_add(SMALL.half(), None, scale_factor=16).dtype == torch.float16
    labels = upsample_argmax(SMALL, scale_factor=16)
    assert labels.dtype == torch.int64
    assert labels.shape == (1, 1024, 1024)


def test_threads_take_and_give_at_once():
    expected = large()
    wrong = []

    def work():
        for _ in range(20):
            if not torch.equal(large(), expected):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


PROGRAM = """
import os, torch
torch.set_num_threads(1)  # a pool of threads does not survive a fork
from dilseg.functional import upsample_add
def mapped():
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") >> 20
small = torch.randn(1, 4, 256, 256)
run = lambda: upsample_add(small, None, scale_factor=8)  # 64 MiB
run()
before = mapped()
held = [run() for _ in range(3)]
del held
print(mapped() - before)
if (child := os.fork()) == 0:
    os._exit(0 if torch.equal(run(), run()) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize(
    ("limit", "least", "most"), [("0", -1, 8), ("64", -1, 8), ("128", 56, 72), (None, 120, 136)]
)
def test_the_limit_holds(limit, least, most):
    env = {k: v for k, v in os.environ.items() if k != "DILSEG_CPU_RESULT_CACHE"}
    if limit is not None:
        env["DILSEG_CPU_RESULT_CACHE"] = limit
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert least <= int(done.stdout) <= most
