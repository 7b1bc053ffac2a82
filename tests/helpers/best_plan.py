# SPDX-License-Identifier: Apache-2.0
"""The fastest that the models of csrc/cuda/dilated_conv2d know, whatever the plans try."""

import re
import shutil
import subprocess
from pathlib import Path

from emulator.build import compiler

ROOT = Path(__file__).resolve().parents[2]
PLANS = ("gemm.h", "gemm_grad_weight.h", "wgmma.h")


def _widened(text: str) -> str:
    """The header with every number of splits, and every box that fills 3/4 of a tile or more."""

    def boxes(match: re.Match[str]) -> str:
        pixels = 64 if match[1] == "kSmallBoxes" else 128
        every = [
            (h, w)
            for h in range(1, pixels + 1)
            for w in range(1, pixels + 1)
            if 3 * pixels <= 4 * h * w <= 4 * pixels
        ]
        # As many in the lists of both tiles.
        every = [(0, 0), *every, *[(0, 0)] * (400 - len(every))]
        return f"{match[1]}[] = {{{', '.join(f'{{{h}, {w}}}' for h, w in every)}}};"

    text = re.sub(r"(k\w*Boxes)\[\] = \{[^;]*\};", boxes, text)
    return re.sub(r"splits = next_splits\(splits\)", "++splits", text)


def best_microseconds(problems: list[tuple[int, ...]], folder: Path) -> list[list[float]]:
    """Of forward, grad_input and grad_weight; a problem is a line of best_plan.cpp."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    for name in PLANS:
        header = csrc / "cuda" / "dilated_conv2d" / name
        before = header.read_text()
        after = _widened(before)
        assert after != before, f"{name} names its splits and boxes differently now"
        header.write_text(after)
    program = folder / "best_plan"
    source = Path(__file__).with_suffix(".cpp")
    include = [f"-I{csrc}", f"-I{csrc / 'include'}"]
    subprocess.run(
        [compiler(), "-std=c++20", "-O1", *include, str(source), "-o", str(program)], check=True
    )
    lines = "".join(f"{' '.join(map(str, problem))}\n" for problem in problems)
    done = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
    return [[float(value) for value in line.split()] for line in done.stdout.splitlines()]
