# SPDX-License-Identifier: Apache-2.0
"""The static checks of the kernels: what is read from the compiler's output, and what fails."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from build_tools import kernels, sources, toolchain
from build_tools.kernels import Attributes, Kernel, Mix, Usage
from build_tools.toolchain import BuildError

PTXAS = """\
ptxas warning : Registers are spilled to local memory in function '_Z5spillPf', 16 bytes spill st
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5cleanPf' for 'sm_90a'
ptxas info    : Function properties for _Z5cleanPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 2048 bytes smem, 396 bytes cmem[0]
ptxas info    : Compile time = 35.258 ms
ptxas info    : Compiling entry function '_Z5spillPf' for 'sm_90a'
ptxas info    : Function properties for _Z5spillPf
    24 bytes stack frame, 16 bytes spill stores, 32 bytes spill loads
ptxas info    : Function properties for _Z6calleePf
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 32 bytes cumulative stack size
"""
C7510 = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
    "serialized due to non wgmma instructions in the function '_Z5cleanPf'\n"
)
C7508 = (
    "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine "
    "register count at entry.\n"
)
# An outer loop around an unrolled loop and its remainder, a divergent shuffle and a trap that lie
# out of line, and a subroutine. Loops are left by BRA and, as ptxas also does it, by CALL.
SASS = """\
\t.section\t.text._Z1kPf,"ax",@progbits
\t.sectioninfo\t@"SHI_REGISTERS=48"
.text._Z1kPf:
        .type           _Z1kPf,@function
_Z1kPf:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_outer:
        /*0010*/                   LDS.128 R4, [R2] ;
.L_x_unrolled:
        /*0020*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0030*/                   LDG.E.U16 R5, [R2.64+0x10] ;
        /*0040*/              @!P1 FFMA R0, R4, R5, R0 ;
        /*0050*/                   FFMA R0, R6, R5.reuse, R0 ;
        /*0060*/               @P0 BRA `(.L_x_unrolled) ;
        /*0070*/                   BRA.U !UP0, `(.L_x_after) ;
.L_x_rest:
        /*0080*/                   FFMA R0, R4, R5, R0 ;
        /*0090*/                   MUFU.EX2 R3, R0 ;
        /*00a0*/              @!P0 BRA `(.L_x_rest) ;
.L_x_after:
        /*00b0*/              @!P3 BRA `(.L_x_trap) ;
        /*00c0*/                   BRA.DIV UR4, `(.L_x_shuffle) ;
.L_x_back:
        /*00d0*/               @P2 CALL.REL.NOINC `(.L_x_end) ;
        /*00e0*/                   BRA `(.L_x_outer) ;
.L_x_end:
        /*00f0*/                   EXIT ;
.L_x_shuffle:
        /*0100*/                   FFMA R0, R4, R5, R0 ;
        /*0110*/                   BRA `(.L_x_back) ;
.L_x_trap:
        /*0120*/                   STL.64 [R1], R2 ;
        /*0130*/                   CALL.ABS.NOINC R8 ;
        /*0140*/                   BPT.TRAP 0x1 ;
        .weak           $__internal_0_$__cuda_sm20_div_s64
        .type           $__internal_0_$__cuda_sm20_div_s64,@function
$__internal_0_$__cuda_sm20_div_s64:
        /*0150*/                   DFMA R2, R4, R6, R2 ;
        /*0160*/                   RET.REL.NODEC R4 `(_Z1kPf) ;
.L_x_pad:
        /*0170*/                   BRA `(.L_x_pad) ;
"""
ARCH_90A, ARCH_80 = toolchain.parse_archs("9.0a;8.0", "test")


def make_kernel(**changes) -> Kernel:
    kernel = Kernel(
        source="csrc/cuda/op/forward.cu",
        name="op_kernel<float, true>",
        arch=ARCH_90A,
        usage=Usage(registers=64, shared=4096),
        attributes=Attributes(threads=256),
        loop=Mix(20, {"FFMA": 16, "LDG.128": 2}),
    )
    return replace(kernel, **changes)


def test_usage_is_read_from_ptxas():
    assert kernels.parse_ptxas(PTXAS) == {
        "_Z5cleanPf": Usage(registers=30, shared=2048),
        "_Z5spillPf": Usage(registers=32, spill_stores=20, spill_loads=36, stack=32),
    }


def test_only_warnings_about_performance_are_read_from_ptxas():
    assert kernels.parse_warnings(PTXAS) == []
    injected = "ptxas info    : (C7519) warpgroup.arrive is injected in function '_Z5cleanPf'\n"
    found = kernels.parse_warnings(C7510 + injected + C7508 + C7510)
    assert [(w.code, w.kernel) for w in found] == [("C7510", "_Z5cleanPf"), ("C7508", None)]


def test_the_kernels_that_contain_an_instruction_are_found_in_ptx():
    ptx = ".visible .entry _Z1aPf(\n)\n{ ret; }\n.entry _Z1b()\n{ setmaxnreg.inc.sync 232; }\n"
    assert kernels.kernels_containing(ptx, "setmaxnreg") == ["_Z1b"]


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [
        ("80", 256, 32, 0, 8),  # 64 warps
        ("80", 256, 33, 0, 6),  # 40 registers are allocated
        ("90a", 256, 64, 0, 4),
        ("90a", 1024, 64, 0, 1),
        ("90a", 1024, 65, 0, 0),  # cannot be launched
        ("90a", 384, 168, 0, 1),
        ("80", 96, 255, 0, 2),  # 8 warps by registers, 3 a block
        ("80", 32, 16, 0, 32),
        ("120", 32, 16, 0, 24),
        ("120", 256, 32, 0, 6),
        ("80", 128, 32, 48 * 1024, 3),  # 49 of 164 KB
        ("90a", 128, 32, 113 * 1024, 2),  # 114 of 228 KB
        ("90a", 128, 32, 113 * 1024 + 1, 1),
        ("120", 128, 32, 99 * 1024, 1),
    ],
)
def test_resident_blocks(arch, threads, registers, shared, blocks):
    sm = kernels.MULTIPROCESSORS[arch]
    assert kernels.blocks_per_multiprocessor(sm, threads, registers, shared) == blocks


def test_the_default_build_is_what_the_table_covers():
    default = toolchain.parse_archs(toolchain.DEFAULT_ARCHS[0][1], "test")
    assert [arch.number for arch in default] == list(kernels.MULTIPROCESSORS)
    assert [a.number for a in toolchain.parse_archs(kernels.ARCHS, "t")] == [
        a.number for a in default
    ]


def test_sass_is_split_into_code_labels_and_subroutines():
    (name, function), *others = kernels.parse_sass(SASS).items()
    assert (name, others) == ("_Z1kPf", [])
    assert len(function.instructions) == 21
    assert [x.opcode for x in function.subroutines] == ["DFMA", "RET.REL.NODEC", "BRA"]
    guarded = function.instructions[4]
    assert (guarded.guard, guarded.opcode, guarded.base) == ("@!P1", "FFMA", "FFMA")
    assert function.instructions[6].labels == [".L_x_unrolled"]


def test_loops_are_those_of_the_control_flow():
    function = kernels.parse_sass(SASS)["_Z1kPf"]
    loops = kernels.find_loops(function)
    # The way back from the shuffle is inside the outer loop, but no loop by itself; the trap and
    # the exit are in none.
    assert loops == [
        frozenset({*range(1, 15), 16, 17}),
        frozenset(range(2, 7)),
        frozenset((8, 9, 10)),
    ]


def test_the_main_loop_is_the_innermost_one_that_computes_most():
    mix = kernels.main_loop(kernels.parse_sass(SASS)["_Z1kPf"])
    # Both inner loops have two math instructions; the longer one is taken.
    assert (mix.total, str(mix)) == (5, "FFMA 2, LDG.128 1, LDG 1")


def test_an_inner_loop_without_math_is_not_the_main_loop():
    text = SASS.replace("FFMA", "IADD3").replace("MUFU.EX2", "MUFU.RCP")
    text = text.replace("LDS.128 R4, [R2]", "HMMA.16816.F32 R4, R4, R6, R4")
    mix = kernels.main_loop(kernels.parse_sass(text)["_Z1kPf"])
    assert (mix.total, mix.counts["HMMA"]) == (16, 1)


def test_code_without_loops_counts_whole():
    text = '\t.section\t.text.k,"ax"\n.type k,@function\n/*0000*/ EXIT ;\n'
    mix = kernels.main_loop(kernels.parse_sass(text)["k"])
    assert (mix.total, mix.is_loop, str(mix)) == (1, False, "-")


def test_local_memory_is_for_the_arguments_of_printf_outside_of_loops():
    def problem(text: str, prints: bool) -> str | None:
        return kernels.local_memory(kernels.parse_sass(text)["_Z1kPf"], prints)

    assert problem(SASS, prints=True) is None
    assert "1 stores" in problem(SASS, prints=False)
    assert "inside a loop" in problem(SASS.replace("LDS.128 R4, [R2]", "STL [R1], R2"), True)
    assert "1 loads" in problem(SASS.replace("LDS.128", "LDL"), prints=True)
    assert "1 loads" in problem(SASS.replace("DFMA R2", "LDL R2"), prints=True)


def test_spills_and_stack_fail_and_name_the_kernel():
    assert kernels.violations(make_kernel(), None) == []
    title = "csrc/cuda/op/forward.cu: op_kernel<float, true> on sm_90a"
    spilling = make_kernel(usage=Usage(spill_stores=8, spill_loads=16, stack=8))
    found = kernels.violations(spilling, None)
    assert len(found) == 2
    assert all(line.startswith(title) for line in found)
    assert "8 bytes of stores, 16 bytes of loads" in found[0]
    printing = Attributes(threads=256, prints=True)
    assert kernels.violations(make_kernel(usage=Usage(stack=56), attributes=printing), None) == []


def test_the_table_survives_writing_and_reading():
    printing = Attributes(threads=None, prints=True)
    rows = kernels.rows_of(
        [make_kernel(), make_kernel(arch=ARCH_80, attributes=printing, loop=None)]
    )
    text = kernels.render(rows, "13.0.88")
    assert kernels.parse_table(text) == ("13.0.88", rows)
    assert (
        "| `op_kernel<float, true>` | sm_90a | 256 | 64 | 0/0 | 0 | 4096 | 4 | 32 of 64 | 20 | "
        "FFMA 16, LDG.128 2 |" in text
    )
    with pytest.raises(BuildError, match="no version or no rows"):
        kernels.parse_table("nothing")
    with pytest.raises(BuildError, match="malformed row"):
        kernels.parse_table(text.replace(" | 64 |", " |"))


def test_a_difference_names_kernel_and_column():
    before = kernels.rows_of([make_kernel(), make_kernel(name="gone"), make_kernel(arch=ARCH_80)])
    slower = make_kernel(usage=Usage(registers=65, shared=4096), loop=Mix(30, {"FFMA": 16}))
    after = kernels.rows_of([slower, make_kernel(name="new")])
    prefix = "csrc/cuda/op/forward.cu:"
    assert kernels.difference(before, before, [ARCH_90A, ARCH_80]) == []
    assert kernels.difference(before, after, [ARCH_90A]) == [
        f"{prefix} gone on sm_90a: in the table, but no longer compiled",
        f"{prefix} new on sm_90a: not in the table",
        f"{prefix} op_kernel<float, true> on sm_90a: regs 64 -> 65; blocks 4 -> 3; "
        f"warps 32 of 64 -> 24 of 64; loop 20 -> 30; "
        f"instructions FFMA 16, LDG.128 2 -> FFMA 16",
    ]
    without = kernels.difference(before, after, [ARCH_90A], kernels.SASS_COLUMNS)
    assert "loop" not in without[-1]


def test_a_table_of_another_nvcc_is_not_compared(tmp_path, capsys):
    table = tmp_path / "resources.md"
    table.write_text(kernels.render(kernels.rows_of([make_kernel(name="old")]), "13.0.88"))
    report = kernels.Report((make_kernel(),), (), 1)
    assert len(kernels.compare(report, table, "13.0.88", [ARCH_90A])) == 2
    assert kernels.compare(report, table, "13.1.20", [ARCH_90A]) == []
    assert "not compared: table is from nvcc 13.0.88, this is 13.1.20" in capsys.readouterr().out
    with pytest.raises(BuildError, match="--update"):
        kernels.compare(report, tmp_path / "none.md", "13.0.88", [ARCH_90A])


def test_serialised_wgmma_fails_and_names_the_kernel(tmp_path, monkeypatch):
    unit = kernels.Unit("a.cu", tmp_path / "a.cu", ARCH_90A, tmp_path / "a.cubin", ("nvcc",))
    unit.cubin.write_bytes(b"")
    clean = "\n".join(PTXAS.splitlines()[1:7])
    monkeypatch.setattr(kernels, "compile_unit", lambda unit: (C7510 + clean, False))
    monkeypatch.setattr(kernels, "parse_cubin", lambda data: {})
    monkeypatch.setattr(kernels, "demangle", lambda names: {"_Z5cleanPf": "clean"})
    (problem,) = kernels.inspect([unit], 1, None).problems
    assert problem.startswith("a.cu: clean on sm_90a: ptxas warns (C7510)")


def test_names_are_short_unless_that_is_ambiguous():
    def run(command):
        names = {
            "a": "n::(anonymous namespace)::k<float, true>",
            "b": "m::j<__half>",
            "c": "o::j<__half>",
        }
        return "\n".join(names[mangled] for mangled in command[2:])

    assert kernels.demangle(["a", "b"], run) == {"a": "k<float, true>", "b": "j<__half>"}
    assert kernels.demangle(["b", "c"], run) == {"b": "m::j<__half>", "c": "o::j<__half>"}


def test_dependencies_are_read():
    text = "out dir/x.cubin : a.cu \\\n    /usr/include/b.h \\\n    with\\ blank.h\n"
    assert kernels.parse_depfile(text) == ["a.cu", "/usr/include/b.h", "with blank.h"]


def test_the_disassembler_is_looked_for(tmp_path):
    assert kernels.find_nvdisasm(tmp_path, {"PATH": ""}, [tmp_path]) is None
    tool = tmp_path / "nvidia" / "cu13" / "bin" / "nvdisasm"
    tool.parent.mkdir(parents=True)
    tool.write_text("")
    tool.chmod(0o755)
    assert kernels.find_nvdisasm(tmp_path, {"PATH": ""}, [tmp_path]) == tool


def test_without_nvcc_nothing_is_checked(monkeypatch, capsys):
    monkeypatch.setattr(toolchain, "find_nvcc", lambda candidates: None)
    assert kernels.main([]) == 0
    assert "nvcc was not found" in capsys.readouterr().out


def test_the_committed_table_names_every_kernel_file():
    _, rows = kernels.parse_table(kernels.TABLE.read_text(encoding="utf-8"))
    files = [
        name
        for name in sources.find(sources.CUDA_GLOBS)
        if "__global__" in (sources.ROOT / name).read_text(encoding="utf-8")
    ]
    assert sorted({source for source, _, _ in rows}) == files
    assert {arch for _, _, arch in rows} == {f"sm_{n}" for n in kernels.MULTIPROCESSORS}


# --- with nvcc -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config() -> toolchain.BuildConfig:
    candidates = toolchain.nvcc_candidates(os.environ, toolchain.site_dirs())
    if toolchain.find_nvcc(candidates) is None:
        pytest.skip("no nvcc, so no kernel can be compiled")
    env = {**os.environ, "DILSEG_BUILD": "cuda", "DILSEG_CUDA_ARCH_LIST": "9.0a"}
    return toolchain.configure(env)


def inspect(config, path: Path, out: Path) -> kernels.Report:
    units = kernels.make_units(config, {path.name: path}, out)
    return kernels.inspect(units, 1, kernels.find_nvdisasm(config.toolkit.home))


def test_a_clean_kernel_passes_and_is_compiled_once(config, tmp_path):
    path = tmp_path / "clean.cu"
    path.write_text(
        "namespace n { template <typename T> __global__ void __launch_bounds__(128) scale(T* x) {\n"
        "  __shared__ T s[32]; s[threadIdx.x % 32] = x[threadIdx.x]; __syncthreads();\n"
        "  x[threadIdx.x] = s[0] * T(2); }\n"
        "template __global__ void scale<float>(float*); }\n"
    )
    report = inspect(config, path, tmp_path / "out")
    assert report.problems == ()
    (kernel,) = report.kernels
    assert kernel.name == "scale<float>"
    assert kernel.attributes == Attributes(threads=128)
    assert (kernel.usage.shared, kernel.usage.stack) == (128, 0)
    if kernel.loop is not None:
        assert kernel.loop.counts["BAR"] == 1
    assert report.compiled == 1
    assert inspect(config, path, tmp_path / "out").compiled == 0
    path.write_text(path.read_text() + "\n")
    assert inspect(config, path, tmp_path / "out").compiled == 1


def test_kernels_that_spill_print_or_misuse_setmaxnreg_are_told_apart(config, tmp_path):
    path = tmp_path / "planted.cu"
    path.write_text(
        "#include <cstdio>\n"
        "__global__ void __launch_bounds__(1024, 2) spill(const float* x, float* y, int n) {\n"
        "  float a[48];\n"
        '  _Pragma("unroll") for (int i = 0; i < 48; ++i) a[i] = x[i * n];\n'
        '  _Pragma("unroll") for (int i = 0; i < 48; ++i)\n'
        "    for (int j = 0; j < i; ++j) a[i] += a[j] * a[(i + j) % 48];\n"
        '  _Pragma("unroll") for (int i = 0; i < 48; ++i) y[i * n + threadIdx.x] = a[i];\n'
        "}\n"
        "__global__ void __launch_bounds__(64) print(const int* x) {\n"
        '  if (x[threadIdx.x] < 0) { printf("%d\\n", x[threadIdx.x]); __trap(); }\n'
        "}\n"
        "__global__ void ask(float* x) {\n"
        '  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); x[threadIdx.x] = 1.f;\n'
        "}\n"
    )
    report = inspect(config, path, tmp_path / "out")
    by_name = {kernel.name: kernel for kernel in report.kernels}
    assert set(by_name) == {"spill", "print", "ask"}
    assert by_name["print"].attributes == Attributes(threads=64, prints=True)
    assert by_name["print"].usage.stack > 0
    assert any(
        p.startswith("planted.cu: spill on sm_90a: spills registers") for p in report.problems
    )
    assert any(
        p.startswith("planted.cu: ask on sm_90a: ptxas warns (C7508)") for p in report.problems
    )
    assert not any("print on" in p for p in report.problems)


def test_a_source_that_does_not_compile_is_named(config, tmp_path):
    path = tmp_path / "broken.cu"
    path.write_text("__global__ void f() { nothing; }\n")
    with pytest.raises(BuildError, match=r"broken\.cu for sm_90a"):
        inspect(config, path, tmp_path / "out")
