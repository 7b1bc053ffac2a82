# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel for every architecture and checks what the compiler made of it.

``python -m build_tools.kernels`` needs nvcc but no GPU. It reports registers, spills, stack, static
shared memory, occupancy and the instructions of the main loop, and compares them with the committed
table, ``docs/kernels/resources.md``; ``--update`` rewrites that table. Spilled registers, local
memory and ptxas's performance warnings are errors, whatever the table says.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from build_tools import ninja, sources, toolchain
from build_tools.sources import ROOT
from build_tools.toolchain import Arch, BuildConfig, BuildError, Run, run

#: What the table covers, the architectures that a default build contains.
ARCHS = "8.0;9.0a;10.0;12.0"
TABLE = ROOT / "docs" / "kernels" / "resources.md"
UPDATE = "python -m build_tools.kernels --update"

# --- occupancy -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor can hold at once."""

    warps: int
    blocks: int
    shared_memory: int


#: As in the toolkit's cuda_occupancy.h and the CUDA programming guide.
MULTIPROCESSORS = {
    "80": Multiprocessor(64, 32, 164 * 1024),
    "90a": Multiprocessor(64, 32, 228 * 1024),
    "100": Multiprocessor(64, 32, 228 * 1024),
    "120": Multiprocessor(48, 24, 100 * 1024),
}
_PARTITIONS = 4
_REGISTERS_PER_PARTITION = 16384
_REGISTER_UNIT = 256
_SHARED_UNIT = 128
_SHARED_RESERVED = 1024


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def blocks_per_multiprocessor(sm: Multiprocessor, threads: int, registers: int, shared: int) -> int:
    """Returns how many blocks are resident at once, as cuda_occupancy.h computes it.

    Args:
        sm: The multiprocessor.
        threads: Threads of a block.
        registers: Registers of a thread.
        shared: Bytes of shared memory of a block, without the 1 KB that the system reserves.
    """
    warps = -(-threads // 32)
    per_warp = _round_up(max(registers, 1) * 32, _REGISTER_UNIT)
    if per_warp * _round_up(warps, _PARTITIONS) > _PARTITIONS * _REGISTERS_PER_PARTITION:
        return 0
    by_registers = _REGISTERS_PER_PARTITION // per_warp * _PARTITIONS // warps
    by_memory = sm.shared_memory // (_round_up(shared, _SHARED_UNIT) + _SHARED_RESERVED)
    return min(sm.blocks, sm.warps // warps, by_registers, by_memory)


# --- ptxas ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """What ``ptxas -v`` says of one kernel, the device functions that it calls included."""

    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    stack: int = 0
    shared: int = 0


@dataclass(frozen=True)
class PtxasWarning:
    """A remark that is an error here; ``kernel`` is None where ptxas names none."""

    code: str
    kernel: str | None
    text: str


_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_REMARK = re.compile(r"\((C\d+)\) (.*)$")
#: C7510: wgmma is serialised; C7508: setmaxnreg is ignored.
FATAL_CODES = ("C7508", "C7510")


def parse_ptxas(text: str) -> dict[str, Usage]:
    """Returns the usage of each kernel (by mangled name) from what ``ptxas -v`` prints."""
    usages: dict[str, Usage] = {}
    kernel = ""
    for line in text.splitlines():
        if entry := _ENTRY.search(line):
            kernel = entry[1]
            usages[kernel] = Usage()
        elif kernel and (frame := _FRAME.search(line)):
            stack, stores, loads = map(int, frame.groups())
            usage = usages[kernel]
            usages[kernel] = replace(
                usage,
                stack=max(stack, usage.stack),
                spill_stores=usage.spill_stores + stores,
                spill_loads=usage.spill_loads + loads,
            )
        elif kernel and (used := _USED.search(line)):
            usage = usages[kernel]
            stack_size = re.search(r"(\d+) bytes cumulative stack size", line)
            shared = re.search(r"(\d+) bytes smem", line)
            usages[kernel] = replace(
                usage,
                registers=int(used[1]),
                stack=int(stack_size[1]) if stack_size else usage.stack,
                shared=int(shared[1]) if shared else 0,
            )
    return usages


def parse_warnings(text: str) -> list[PtxasWarning]:
    """Returns ptxas's remarks C7508 and C7510 and all others about a loss of performance."""
    found = []
    for line in text.splitlines():
        remark = _REMARK.search(line)
        if remark and (remark[1] in FATAL_CODES or "Performance Loss" in remark[2]):
            named = re.search(r"function '([^']+)'", remark[2])
            found.append(PtxasWarning(remark[1], named[1] if named else None, remark[2].strip()))
    return list(dict.fromkeys(found))


def kernels_containing(ptx: str, instruction: str) -> list[str]:
    """Returns the kernels (by mangled name) whose PTX contains an instruction."""
    parts = re.split(r"^\s*(?:\.visible\s+|\.weak\s+)?\.entry\s+([\w$]+)", ptx, flags=re.MULTILINE)
    return [
        name for name, body in zip(parts[1::2], parts[2::2], strict=True) if instruction in body
    ]


# --- cubins --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attributes:
    """What a cubin records of one kernel; ``threads`` is None without ``__launch_bounds__``."""

    threads: int | None = None
    prints: bool = False


_EXTERNS, _MAX_THREADS, _REQUIRED_THREADS = 0x0F, 0x05, 0x10
_SIZED = 4


def parse_cubin(data: bytes) -> dict[str, Attributes]:
    """Returns what the ``.nv.info`` sections of a cubin (an ELF file) record of each kernel.

    Raises:
        BuildError: The data is no 64-bit little-endian ELF file.
    """
    if data[:6] != b"\x7fELF\x02\x01":
        raise BuildError("a cubin that nvcc wrote is no 64-bit ELF file; remove build/kernels")
    table = struct.unpack_from("<Q", data, 40)[0]
    entry_size, count, names = struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQII", data, table + i * entry_size) for i in range(count)]

    def string(section: int, offset: int) -> str:
        start = headers[section][4] + offset
        return data[start : data.index(b"\0", start)].decode()

    symbols: list[str] = []
    for _, kind, _, _, offset, size, link, _ in headers:
        if kind == 2:
            starts = range(offset, offset + size, 24)
            symbols = [string(link, struct.unpack_from("<I", data, at)[0]) for at in starts]
    found = {}
    for header in headers:
        name = string(names, header[0])
        if name.startswith(".nv.info."):
            info = data[header[4] : header[4] + header[5]]
            found[name.removeprefix(".nv.info.")] = _parse_info(info, symbols)
    return found


def _parse_info(info: bytes, symbols: Sequence[str]) -> Attributes:
    attributes = Attributes()
    at = 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form != _SIZED:
            continue
        words = struct.unpack_from(f"<{size // 4}I", info, at)
        at += size
        if attribute in (_MAX_THREADS, _REQUIRED_THREADS):
            attributes = replace(attributes, threads=words[0] * words[1] * words[2])
        elif attribute == _EXTERNS and any(symbols[word] == "vprintf" for word in words):
            attributes = replace(attributes, prints=True)
    return attributes


# --- SASS ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: ``@!P0 BRA `(.L_x_1)`` has the guard ``@!P0``."""

    guard: str
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def labels(self) -> list[str]:
        """The labels among the operands."""
        return re.findall(r"\.L_[\w.$]+", self.operands)


@dataclass(frozen=True)
class Function:
    """The code of a kernel; ``subroutines`` are those that the compiler put behind it."""

    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int]
    subroutines: tuple[Instruction, ...] = ()


_TEXT = re.compile(r'\.section\s+"?\.text\.([^",\s]+)')
_TYPE = re.compile(r"\.type\s+(\S+?),@function")
_LABEL = re.compile(r"(\.L_[\w.$]+):")
_CODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


def parse_sass(text: str) -> dict[str, Function]:
    """Returns the code of each kernel (by mangled name) from what ``nvdisasm -c`` prints."""
    functions: dict[str, Function] = {}
    kernel, part = "", ""
    body: list[Instruction] = []
    subroutines: list[Instruction] = []
    labels: dict[str, int] = {}

    def close() -> None:
        if kernel:
            functions[kernel] = Function(tuple(body), dict(labels), tuple(subroutines))
        body.clear()
        subroutines.clear()
        labels.clear()

    for line in text.splitlines():
        stripped = line.strip()
        if stripped.split()[:1] == [".section"]:
            close()
            section = _TEXT.match(stripped)
            kernel = part = section[1] if section else ""
        elif not kernel:
            continue
        elif kind := _TYPE.match(stripped):
            part = kind[1]
        elif label := _LABEL.match(stripped):
            labels[label[1]] = len(body)
        elif code := _CODE.search(stripped):
            instruction = Instruction(code[1] or "", code[2], code[3])
            (body if part == kernel else subroutines).append(instruction)
    close()
    return functions


def _is_branch(instruction: Instruction) -> bool:
    if instruction.base == "CALL":  # `@P0 CALL.REL.NOINC label` is also how loops are left.
        return bool(instruction.labels)
    return instruction.base in ("BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU")


def _falls_through(instruction: Instruction) -> bool:
    if instruction.guard not in ("", "@PT") or instruction.base == "CALL":
        return True
    if instruction.base == "BRA":  # `BRA.U UP0, label` and `BRA P1, label` have a condition.
        return re.match(r"!?U?P|UR|R", instruction.operands) is not None
    return not (
        _is_branch(instruction)
        or instruction.base in ("EXIT", "RET", "KILL")
        or instruction.opcode == "BPT.TRAP"
    )


def find_loops(function: Function) -> list[frozenset[int]]:
    """Returns the loops of a function, each as the set of the indices of its instructions.

    They are the natural loops of the control-flow graph: a branch back to a block that dominates it
    closes a loop, which holds all blocks that reach the branch without passing that block. Plain
    ranges from the target of a backward branch to the branch would also take the returns from code
    that the compiler moved out of line (traps, divergent shuffles) for loops. Loops with the same
    first block are one.
    """
    code, count = function.instructions, len(function.instructions)
    targets = {i: [function.labels[x] for x in code[i].labels if x in function.labels]
               for i in range(count) if _is_branch(code[i])}  # fmt: skip
    starts = {0, *(t for ts in targets.values() for t in ts)}
    ends = {i for i in range(count) if i in targets or not _falls_through(code[i])}
    leaders = sorted(i for i in starts | {i + 1 for i in ends} if i < count)
    block_of = {leader: number for number, leader in enumerate(leaders)}
    limits = [*leaders[1:], count]
    successors: list[list[int]] = []
    for limit in limits:
        last = limit - 1
        following = [t for t in targets.get(last, []) if t < count]
        if _falls_through(code[last]) and limit < count:
            following.append(limit)
        successors.append([block_of[t] for t in following])

    reached, stack = {0} if leaders else set(), [0] if leaders else []
    while stack:
        for successor in successors[stack.pop()]:
            if successor not in reached:
                reached.add(successor)
                stack.append(successor)
    predecessors: dict[int, list[int]] = {block: [] for block in reached}
    for block in reached:
        for successor in successors[block]:
            predecessors[successor].append(block)

    everything = (1 << len(leaders)) - 1  # Sets of blocks as bits.
    dominators = dict.fromkeys(reached, everything)
    dominators[0] = 1
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            common = everything
            for predecessor in predecessors[block]:
                common &= dominators[predecessor]
            if (common := common | 1 << block) != dominators[block]:
                dominators[block], changed = common, True

    bodies: dict[int, set[int]] = {}
    for block in reached:
        for header in successors[block]:
            if dominators[block] >> header & 1:
                body = bodies.setdefault(header, {header})
                stack = [block]
                while stack:
                    if (member := stack.pop()) not in body:
                        body.add(member)
                        stack.extend(predecessors[member])
    return [
        frozenset(i for block in bodies[header] for i in range(leaders[block], limits[block]))
        for header in sorted(bodies)
    ]


#: How instructions are counted, in the order in which the table names them.
CATEGORIES = (
    *("HGMMA", "HMMA", "DMMA", "FFMA", "DFMA", "MUFU", "LDG.128", "LDG", "LD", "LDGSTS", "TMA"),
    *("SYNCS", "STG", "LDS", "STS", "BAR", "LDL", "STL"),
)
_MATH = ("HGMMA", "HMMA", "DMMA", "FFMA", "DFMA", "MUFU")
_SAME = {"FFMA2": "FFMA", "FFMA32I": "FFMA", "LDSM": "LDS", "STSM": "STS", "UTMALDG": "TMA",
         "UBLKCP": "TMA", "UTMASTG": "TMA"}  # fmt: skip


def categorize(instruction: Instruction) -> str | None:
    """Returns the category that an instruction counts in; None for address arithmetic and such."""
    if instruction.base == "LDG" and re.search(r"\.(128|256)\b", instruction.opcode):
        return "LDG.128"
    base = _SAME.get(instruction.base, instruction.base)
    return base if base in CATEGORIES else None


def _is_math(instruction: Instruction) -> bool:
    # Reciprocals do not count: they belong to divisions, mostly those of indices.
    return categorize(instruction) in _MATH and not instruction.opcode.startswith("MUFU.RCP")


@dataclass(frozen=True)
class Mix:
    """The instructions of a stretch of code: how many, and how many per category."""

    total: int
    counts: Mapping[str, int]
    is_loop: bool = True

    def __str__(self) -> str:
        """Returns the counts that are not zero, e.g. ``FFMA 16, LDG.128 2``."""
        return ", ".join(f"{c} {self.counts[c]}" for c in CATEGORIES if self.counts.get(c)) or "-"


def main_loop(function: Function) -> Mix:
    """Returns the instructions of a kernel's main loop; of all its code where it has no loop.

    The main loop is the innermost loop that computes: of the loops with math instructions (matrix
    and fused multiply-adds, MUFU) that contain no smaller such loop, the one with most of them, and
    the longer one of two alike. So an unrolled loop wins against its remainder. Where no loop has
    math instructions, it is the longest innermost loop. Instructions of inner loops count once.
    """
    code = function.instructions
    loops = find_loops(function)
    math = {loop: sum(_is_math(code[i]) for i in loop) for loop in loops}
    candidates = [loop for loop in loops if math[loop]] or loops
    innermost = [c for c in candidates if not any(other < c for other in candidates)]
    best = max(innermost, key=lambda loop: (math[loop], len(loop), -min(loop)), default=None)
    chosen = code if best is None else [code[i] for i in best]
    counts = Counter(c for c in map(categorize, chosen) if c is not None)
    return Mix(len(chosen), counts, is_loop=best is not None)


def local_memory(function: Function, prints: bool) -> str | None:
    """Returns what is wrong with a kernel's accesses to local memory, None where nothing is.

    A kernel that calls printf hands it the arguments on the stack, so it may store there, but not
    inside a loop and without ever reading; no other kernel may touch local memory.
    """
    in_loop = set().union(*find_loops(function))
    outside = [x for i, x in enumerate(function.instructions) if i not in in_loop]
    allowed = sum(x.base == "STL" for x in outside) if prints else 0
    everything = (*function.instructions, *function.subroutines)
    loads = sum(x.base == "LDL" for x in everything)
    stores = sum(x.base == "STL" for x in everything) - allowed
    if not (loads or stores):
        return None
    where = " inside a loop" if prints and stores and not loads else ""
    return f"{loads} loads from and {stores} stores to local memory{where} (LDL, STL)"


# --- kernels and the table -----------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture; ``loop`` is None where no disassembler was found."""

    source: str
    name: str
    arch: Arch
    usage: Usage
    attributes: Attributes
    loop: Mix | None = None

    @property
    def title(self) -> str:
        """The kernel in one phrase, for messages."""
        return f"{self.source}: {self.name} on sm_{self.arch.number}"

    def cells(self) -> tuple[str, ...]:
        """Returns the cells of its row, in the order of `COLUMNS`."""
        usage, threads, sm = self.usage, self.attributes.threads, MULTIPROCESSORS[self.arch.number]
        blocks = warps = "-"
        if threads is not None:
            resident = blocks_per_multiprocessor(sm, threads, usage.registers, usage.shared)
            blocks, warps = str(resident), f"{resident * -(-threads // 32)} of {sm.warps}"
        loop = mix = "?"
        if self.loop is not None:
            loop = f"{self.loop.total}{'' if self.loop.is_loop else ' (no loop)'}"
            mix = str(self.loop)
        return (
            "-" if threads is None else str(threads),
            str(usage.registers),
            f"{usage.spill_stores}/{usage.spill_loads}",
            f"{usage.stack}{' (printf)' if self.attributes.prints else ''}",
            str(usage.shared),
            *(blocks, warps, loop, mix),
        )


COLUMNS = ("threads", "regs", "spills", "stack", "smem", "blocks", "warps", "loop", "instructions")
#: Columns that need the disassembler.
SASS_COLUMNS = ("loop", "instructions")

Key = tuple[str, str, str]
Rows = dict[Key, tuple[str, ...]]

_PREAMBLE = """\
# What the compiler made of the kernels

Written by `{update}` with nvcc {version}; do not edit. `make kernels` compares it with a fresh
compilation, so a change of a kernel shows here what it costs. How fast a kernel is, this page
cannot say; see `benchmarks/results/` for what was measured.

- **threads**: the most that `__launch_bounds__` allows; **regs**: registers of a thread.
- **spills**: bytes of stores/loads; **stack**: bytes of a thread. Both must be 0, except for the
  arguments of a `printf` (marked), which may be stored outside of loops.
- **smem**: bytes of static shared memory of a block.
- **blocks**, **warps**: resident on a multiprocessor at that many threads, before dynamic shared
  memory, which is chosen at launch.
- **loop**: instructions of the main loop, and among them the **instructions** that matter. LDG.128:
  global loads of 16 bytes, LDG: narrower ones, LDGSTS: asynchronous copies to shared memory.
"""


def rows_of(kernels: Iterable[Kernel]) -> Rows:
    """Returns the rows of the table, by (source, kernel, architecture)."""
    return {(k.source, k.name, f"sm_{k.arch.number}"): k.cells() for k in kernels}


def _arch_order(key: Key) -> tuple[str, str, int]:
    return key[0], key[1], int(re.sub(r"\D", "", key[2]))


def render(rows: Rows, version: str) -> str:
    """Returns the text of the table."""
    lines = [_PREAMBLE.format(update=UPDATE, version=version).rstrip()]
    source = None
    for key in sorted(rows, key=_arch_order):
        if key[0] != source:
            source = key[0]
            lines += [
                f"\n## `{source}`\n",
                f"| kernel | arch | {' | '.join(COLUMNS)} |",
                "|---|---|" + "--:|" * (len(COLUMNS) - 1) + "---|",
            ]
        lines.append(f"| `{key[1]}` | {key[2]} | {' | '.join(rows[key])} |")
    return "\n".join(lines) + "\n"


def parse_table(text: str) -> tuple[str, Rows]:
    """Returns the version of nvcc and the rows of a table that `render` wrote.

    Raises:
        BuildError: It is no such table.
    """
    recorded = re.search(r"with nvcc (\d[\d.]*\d)", text)
    rows: Rows = {}
    source = ""
    for line in text.splitlines():
        if heading := re.match(r"## `(.+)`", line):
            source = heading[1]
        elif line.startswith("| `"):
            name, arch, *cells = (cell.strip() for cell in line.strip().strip("|").split(" | "))
            if len(cells) != len(COLUMNS):
                raise BuildError(
                    f"the table of kernels has a malformed row, {line!r}; write it anew: {UPDATE}"
                )
            rows[source, name.strip("`"), arch] = tuple(cells)
    if recorded is None or not rows:
        raise BuildError(f"the table of kernels has no version or no rows; write it anew: {UPDATE}")
    return recorded[1], rows


def difference(
    committed: Rows, fresh: Rows, archs: Iterable[Arch], without: Sequence[str] = ()
) -> list[str]:
    """Returns the differences between two tables, a line per row that differs.

    Args:
        committed: The rows of the committed table.
        fresh: The rows of this compilation.
        archs: Only these architectures are compared.
        without: Columns that are not compared.
    """
    wanted = {f"sm_{arch.number}" for arch in archs}
    lines = []
    for key in sorted({*committed, *fresh}, key=_arch_order):
        source, name, arch = key
        if arch not in wanted:
            continue
        title = f"{source}: {name} on {arch}"
        if key not in fresh:
            lines.append(f"{title}: in the table, but no longer compiled")
        elif key not in committed:
            lines.append(f"{title}: not in the table")
        else:
            pairs = zip(COLUMNS, committed[key], fresh[key], strict=True)
            changes = [f"{c} {a} -> {b}" for c, a, b in pairs if a != b and c not in without]
            if changes:
                lines.append(f"{title}: {'; '.join(changes)}")
    return lines


def violations(kernel: Kernel, function: Function | None) -> list[str]:
    """Returns what no kernel may do and this one does, each in a sentence that names it."""
    usage, prints = kernel.usage, kernel.attributes.prints
    found = []
    if usage.spill_stores or usage.spill_loads:
        found.append(
            f"{kernel.title}: spills registers ({usage.spill_stores} bytes of stores, "
            f"{usage.spill_loads} bytes of loads)"
        )
    if usage.stack and not prints:
        found.append(f"{kernel.title}: uses {usage.stack} bytes of stack without calling printf")
    if function is not None and (problem := local_memory(function, prints)):
        found.append(f"{kernel.title}: {problem}")
    return found


# --- names ---------------------------------------------------------------------------------------


def short_name(demangled: str) -> str:
    """Returns a kernel's name without namespaces: ``f<__half, true>``."""
    return re.sub(r"(?:\(anonymous namespace\)|\b[A-Za-z_]\w*)::", "", demangled)


def demangle(names: Sequence[str], run: Run = run) -> dict[str, str]:
    """Returns short names by mangled names; long ones where short ones would be the same.

    Raises:
        BuildError: ``c++filt`` does not work.
    """
    if not names:
        return {}
    try:
        demangled = run(["c++filt", "-p", *names]).splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(
            f"c++filt, which belongs to g++'s binutils, does not work ({error}); install binutils"
        ) from error
    long = dict(zip(names, demangled, strict=True))
    times = Counter(map(short_name, demangled))
    return {
        name: short_name(text) if times[short_name(text)] == 1 else text
        for name, text in long.items()
    }


# --- compiling -----------------------------------------------------------------------------------


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"


def parse_depfile(text: str) -> list[str]:
    """Returns the files that a depfile of nvcc names after the colon."""
    _, _, names = text.replace("\\\n", " ").partition(" : ")
    return [name.replace("\\ ", " ") for name in re.split(r"(?<!\\)\s+", names.strip()) if name]


@dataclass(frozen=True)
class Unit:
    """One source file compiled for one architecture."""

    source: str
    path: Path
    arch: Arch
    cubin: Path
    command: tuple[str, ...]

    @property
    def record(self) -> Path:
        """Where the command, the digests of all files read, and ptxas's output are kept."""
        return self.cubin.with_suffix(".json")


def make_units(
    config: BuildConfig, files: Mapping[str, Path], out: Path, env: Mapping[str, str] = os.environ
) -> list[Unit]:
    """Returns what is to be compiled: each file for each architecture of the configuration.

    A cubin holds code for one architecture, and nvcc's front end runs once per architecture in any
    case, so each has a command of its own; the flags are those of the build.
    """
    if config.toolkit is None:
        raise BuildError("compiling kernels needs nvcc; install a CUDA toolkit")
    units = []
    for arch in config.archs:
        flags = ninja.cuda_flags(replace(config, archs=(replace(arch, ptx=False),)), env)
        for source, path in files.items():
            cubin = out / f"sm_{arch.number}" / f"{source}.cubin"
            command = (str(config.toolkit.nvcc), *flags, "-Xptxas=-v", "-cubin")
            units.append(Unit(source, path, arch, cubin, command))
    return units


def compile_unit(unit: Unit) -> tuple[str, bool]:
    """Compiles one unit unless all that it was made from is unchanged.

    Returns:
        What ptxas printed, and whether nvcc ran.

    Raises:
        BuildError: nvcc failed.
    """
    try:
        record = json.loads(unit.record.read_text(encoding="utf-8"))
        fresh = (
            unit.cubin.is_file()
            and record["command"] == [*unit.command, str(unit.path)]
            and all(_digest(Path(name)) == digest for name, digest in record["files"].items())
        )
        if fresh:
            return str(record["ptxas"]), False
    except (OSError, ValueError, KeyError):
        pass
    unit.cubin.parent.mkdir(parents=True, exist_ok=True)
    unit.record.unlink(missing_ok=True)
    depfile = unit.cubin.with_suffix(".d")
    command = [*unit.command, "-MD", "-MF", str(depfile), str(unit.path), "-o", str(unit.cubin)]
    try:
        printed = run(command)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = (getattr(error, "output", None) or str(error)).strip()
        raise BuildError(
            f"nvcc could not compile {unit.source} for sm_{unit.arch.number}:\n{detail}"
        ) from error
    names = parse_depfile(depfile.read_text(encoding="utf-8"))
    record = {
        "command": [*unit.command, str(unit.path)],
        "files": {str(Path(name).resolve()): _digest(Path(name).resolve()) for name in names},
        "ptxas": printed,
    }
    unit.record.write_text(json.dumps(record), encoding="utf-8")
    return printed, True


def disassemble(cubin: Path, nvdisasm: Path) -> str:
    """Returns the SASS of a cubin, from the file beside it where that was made from this cubin.

    Raises:
        BuildError: nvdisasm failed.
    """
    kept = cubin.with_suffix(".sass")
    first = f"// {nvdisasm} {_digest(nvdisasm)} {hashlib.sha256(cubin.read_bytes()).hexdigest()}"
    if kept.is_file():
        text = kept.read_text(encoding="utf-8")
        if text.startswith(first):
            return text
    try:
        text = f"{first}\n{run([str(nvdisasm), '-c', str(cubin)])}"
    except (OSError, subprocess.CalledProcessError) as error:
        detail = (getattr(error, "output", None) or str(error)).strip()
        raise BuildError(
            f"{nvdisasm} cannot read {cubin.name} ({detail}); it must not be older than nvcc: "
            f"{sys.executable} -m pip install --upgrade nvidia-cuda-nvdisasm"
        ) from error
    kept.write_text(text, encoding="utf-8")
    return text


def find_nvdisasm(
    home: Path, env: Mapping[str, str] = os.environ, sites: Sequence[Path] | None = None
) -> Path | None:
    """Returns the disassembler: the toolkit's own, else one on PATH, else pip's; None if absent."""
    own = home / "bin" / "nvdisasm"
    on_path = shutil.which("nvdisasm", path=env.get("PATH", ""))
    candidates = [own, *([Path(on_path)] if on_path else [])]
    for site in toolchain.site_dirs() if sites is None else sites:
        candidates += sorted(site.glob("nvidia/*/bin/nvdisasm"), reverse=True)
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def _setmaxnreg_kernels(unit: Unit) -> list[str]:
    command = [a for a in unit.command if a not in ("-cubin", "-Xptxas=-v")]
    command = [re.sub(r"code=sm_", "code=compute_", a) for a in command]
    ptx = unit.cubin.with_suffix(".ptx")
    run([*command, "-ptx", str(unit.path), "-o", str(ptx)])
    return kernels_containing(ptx.read_text(encoding="utf-8"), "setmaxnreg")


@dataclass(frozen=True)
class Report:
    """The kernels, what is wrong with them, and how many units were compiled anew."""

    kernels: tuple[Kernel, ...]
    problems: tuple[str, ...]
    compiled: int


def inspect(units: Sequence[Unit], jobs: int, nvdisasm: Path | None) -> Report:
    """Compiles the units and returns what became of their kernels.

    Raises:
        BuildError: A tool failed.
    """
    kernels: list[Kernel] = []
    problems: list[str] = []

    def make(unit: Unit) -> tuple[str, bool, str | None]:
        printed, compiled = compile_unit(unit)
        return printed, compiled, disassemble(unit.cubin, nvdisasm) if nvdisasm else None

    _digest.cache_clear()
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        made = list(pool.map(make, units))
    for unit, (printed, _, sass) in zip(units, made, strict=True):
        usages = parse_ptxas(printed)
        attributes = parse_cubin(unit.cubin.read_bytes())
        functions = parse_sass(sass) if sass is not None else None
        names = demangle(list(usages))
        for mangled, usage in usages.items():
            function = functions[mangled] if functions is not None else None
            kernel = Kernel(
                source=unit.source,
                name=names[mangled],
                arch=unit.arch,
                usage=usage,
                attributes=attributes.get(mangled, Attributes()),
                loop=main_loop(function) if function is not None else None,
            )
            kernels.append(kernel)
            problems += violations(kernel, function)
        for warning in parse_warnings(printed):
            named = [warning.kernel] if warning.kernel else []
            if not named and "setmaxnreg" in warning.text:
                named = _setmaxnreg_kernels(unit)
            who = " or ".join(names.get(name, name) for name in named) or "a kernel"
            title = f"{unit.source}: {who} on sm_{unit.arch.number}"
            problems.append(f"{title}: ptxas warns ({warning.code}) {warning.text}")
    return Report(tuple(kernels), tuple(problems), sum(compiled for _, compiled, _ in made))


# --- the command ---------------------------------------------------------------------------------


def compare(
    report: Report,
    table: Path,
    version: str,
    archs: Sequence[Arch],
    without: Sequence[str] = (),
) -> list[str]:
    """Compares a report with a table; prints what was not compared, returns the differences.

    Raises:
        BuildError: There is no table.
    """
    if not table.is_file():
        raise BuildError(f"{table.name} does not exist; write it: {UPDATE}")
    recorded, rows = parse_table(table.read_text(encoding="utf-8"))
    if recorded != version:
        print(f"{table.name} not compared: table is from nvcc {recorded}, this is {version}")
        return []
    return difference(rows, rows_of(report.kernels), archs, without)


def check(options: argparse.Namespace, env: Mapping[str, str] = os.environ) -> int:
    """Runs the command with parsed options; returns the exit code.

    Raises:
        BuildError: A tool failed, or there is no table.
    """
    candidates = toolchain.nvcc_candidates(env, toolchain.site_dirs())
    if toolchain.find_nvcc(candidates) is None:
        searched = toolchain.describe_search(candidates)
        print(f"kernels: not checked, since nvcc was not found (searched {searched})")
        return 0
    archs = toolchain.parse_archs(options.archs, "--archs")
    unknown = [arch for arch in archs if arch.number not in MULTIPROCESSORS]
    if unknown:
        raise BuildError(f"--archs {options.archs}: expected some of {ARCHS}, but got {unknown[0]}")
    if options.update and {a.number for a in archs} != set(MULTIPROCESSORS):
        raise BuildError(f"--update writes all architectures, {ARCHS}; leave out --archs")
    config = replace(
        toolchain.configure({**env, "DILSEG_BUILD": "cuda", "DILSEG_CUDA_ARCH_LIST": ARCHS}),
        debug=False,
        archs=tuple(archs),
    )
    if config.toolkit is None:
        raise BuildError("compiling kernels needs nvcc; install a CUDA toolkit")
    version = config.toolkit.version
    nvdisasm = find_nvdisasm(config.toolkit.home, env)
    if nvdisasm is None:
        install = f'{sys.executable} -m pip install "nvidia-cuda-nvdisasm>={version.split(".")[0]}"'
        if options.update:
            raise BuildError(f"--update needs nvdisasm, which was not found; install it: {install}")
        print(f"instructions not compared, since nvdisasm was not found; install it: {install}")
    files = {name: ROOT / name for name in sources.find(sources.CUDA_GLOBS)}
    units = make_units(config, files, ROOT / "build" / "kernels", env)
    report = inspect(units, options.jobs or config.jobs, nvdisasm)
    print(
        f"{len(report.kernels)} kernels in {len(files)} files, nvcc {version}, "
        f"{', '.join(f'sm_{arch.number}' for arch in archs)}; compiled {report.compiled} of "
        f"{len(units)} cubins"
    )
    changes: list[str] = []
    if options.update:
        TABLE.write_text(render(rows_of(report.kernels), version), encoding="utf-8")
        print(f"wrote {TABLE.relative_to(ROOT)}")
    else:
        changes = compare(report, TABLE, version, archs, () if nvdisasm else SASS_COLUMNS)
    for problem in report.problems:
        print(f"error: {problem}", file=sys.stderr)
    if changes:
        print(
            f"error: {len(changes)} kernels differ from {TABLE.relative_to(ROOT)} (table -> this); "
            f"if that is meant, {UPDATE} rewrites it:\n  " + "\n  ".join(changes),
            file=sys.stderr,
        )
    return 1 if report.problems or changes else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m build_tools.kernels", description=__doc__)
    parser.add_argument("--update", action="store_true", help="rewrite the committed table")
    parser.add_argument("--archs", default=ARCHS, help="some of the default, %(default)s")
    parser.add_argument("--jobs", type=int, help="compilers at once (default: MAX_JOBS)")
    try:
        return check(parser.parse_args(arguments))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
