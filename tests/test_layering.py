# SPDX-License-Identifier: Apache-2.0
"""The arrows of docs/design.md: who may include or import whom, and what stays out of the tree."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CXX = (".cpp", ".h", ".cu", ".cuh")


def repository_files() -> list[Path]:
    """Files under version control, or (in an unpacked sdist) everything that is no product."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0 and listed.stdout:
        names = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
        return [ROOT / name for name in names]
    skipped = {".venv", "build", "dist", "runs", "__pycache__"}
    found = (p for p in ROOT.rglob("*") if p.is_file())
    return [p for p in found if not skipped & set(p.relative_to(ROOT).parts)]


FILES = repository_files()


def cxx_files(*folders: str) -> list[Path]:
    found = [
        path
        for path in FILES
        if path.suffix in CXX and path.relative_to(ROOT).as_posix().startswith(folders)
    ]
    assert found, f"no C++ files under {folders}"
    return found


def code(path: Path) -> str:
    """The text of a C++ file without comments; line breaks stay."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), text, flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def breaches(paths: list[Path], pattern: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(code(path).splitlines(), 1)
        if re.search(pattern, line)
    ]


TORCH_INCLUDE = r'#\s*include\s*[<"](torch|ATen|c10|caffe2|pybind11|Python)[/.]'


def test_only_ops_and_the_module_include_torch():
    paths = [
        path
        for path in cxx_files("csrc/")
        if "csrc/ops/" not in path.as_posix() and path != ROOT / "csrc/module.cpp"
    ]
    assert breaches(paths, TORCH_INCLUDE) == []


def test_the_torch_side_uses_device_generic_headers():
    paths = cxx_files("csrc/ops/", "csrc/module.cpp")
    assert breaches(paths, r"#\s*include\s*[<\"](ATen|c10)/(cuda|hip)/") == []


def test_the_torch_side_launches_no_kernel():
    paths = cxx_files("csrc/ops/", "csrc/module.cpp")
    assert breaches(paths, r"__global__|cudaLaunch|launch\.cuh|\bdim3\b") == []


def test_public_headers_need_neither_cuda_nor_torch():
    paths = cxx_files("csrc/include/")
    assert breaches(paths, TORCH_INCLUDE) == []
    assert breaches(paths, r"#\s*include\s*[<\"](cuda|cooperative_groups)") == []


def test_device_code_compiles_with_a_host_compiler_too():
    paths = cxx_files("csrc/")
    assert breaches(paths, r"<<<") == []
    toolbox = ROOT / "csrc/cuda/common"
    outside = [path for path in paths if path != toolbox / "ptx.cuh"]
    assert breaches(outside, r"\basm\b") == []
    outside = [path for path in paths if path != toolbox / "launch.cuh"]
    assert breaches(outside, r"extern\s+__shared__|cudaLaunchKernel") == []


def test_the_emulator_has_every_wrapper_of_inline_ptx():
    def functions(path: str, ignored: set[str]) -> set[str]:
        text = code(ROOT / path).replace("__device__ __forceinline__ ", "")
        # A definition starts its line; macros that define several name them as arguments.
        defined = re.findall(
            r"^(?:(?:inline|constexpr|__host__|__device__) )*\w+ (\w+)\(", text, re.M
        )
        named = re.findall(r"^[A-Z_0-9]+\((wgmma_\w+)", text, re.M)
        return {*defined, *named} - ignored

    real = functions("csrc/cuda/common/ptx.cuh", {"value_or_zero"})
    emulated = functions("tests/emulator/dilseg/cuda/common/ptx.cuh", set())
    assert len(real) > 50
    assert real == emulated


def test_results_do_not_depend_on_the_order_of_threads():
    assert breaches(cxx_files("csrc/"), r"\batomic(Add|Sub|Exch|CAS)\b") == []


# Higher may import lower, never the other way; the facade (dilseg/__init__.py) re-exports.
RANKS = {
    "_build_info": 0,
    "_C": 0,
    "_extension": 1,
    "ops": 2,
    "precision": 3,
    "functional": 3,
    "nn": 4,
    "swap": 5,
    "models": 5,
    "data": 5,
    "engine": 6,
    "cli": 7,
    "__main__": 8,
}
FACADE = {"build_info", "__version__"}


def imported(path: Path) -> Iterator[str]:
    """Names of the top-level parts of dilseg that a module imports; "" for the facade."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "dilseg":
                    yield [*alias.name.split("."), ""][1]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            parts = [*above, *(node.module or "").split(".")]
            if parts[0] != "dilseg":
                continue
            if len(parts) > 1 and parts[1]:
                yield parts[1]
            else:
                yield from ("" if alias.name in FACADE else alias.name for alias in node.names)


def python_modules() -> list[Path]:
    package = ROOT / "dilseg"
    return [
        path
        for path in FILES
        if path.suffix == ".py" and package in path.parents and path != package / "__init__.py"
    ]


@pytest.mark.parametrize("path", python_modules(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_python_imports_point_downwards(path: Path):
    part = path.relative_to(ROOT / "dilseg").parts[0].removesuffix(".py")
    assert part in RANKS, f"{part} has no place among the layers"
    for name in imported(path):
        if name == part:
            continue
        if name == "":
            assert RANKS[part] >= RANKS["engine"], f"{part} imports the facade"
            continue
        assert RANKS[name] < RANKS[part], f"{part} imports {name}"
        assert part != "data", f"data stands by itself, but imports {name}"


def test_every_source_file_names_the_license():
    suffixes = (*CXX, ".py", ".pyi", ".toml", ".sh")
    names = {"Makefile", "CMakeLists.txt", ".clang-format", "run"}
    missing = [
        path.relative_to(ROOT).as_posix()
        for path in FILES
        if (path.suffix in suffixes or path.name in names)
        and "SPDX-License-Identifier: Apache-2.0"
        not in "\n".join(path.read_text(encoding="utf-8").splitlines()[:2])
    ]
    assert missing == []


def test_no_file_names_a_folder_of_the_machine_it_was_written_on():
    pattern = re.compile(r"(?<![\w.])/(work|root|home|opt|Users)/")
    found = []
    for path in FILES:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert found == []
