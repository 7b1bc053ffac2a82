# SPDX-License-Identifier: Apache-2.0
"""The build: what is probed and decided, what is said when it cannot go on, what is packaged."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import dilseg
from build_tools import ninja, sources, toolchain
from build_tools.toolchain import BuildError
from dilseg import _extension

ROOT = Path(__file__).resolve().parent.parent
NVCC_VERSION = "Cuda compilation tools, release {0}, V{0}.88\n"
GXX_MACROS = "#define __GNUC__ {}\n#define __GNUC_MINOR__ 2\n#define __GNUC_PATCHLEVEL__ 0\n"


def make_torch(version: str = "2.13.0", cuda: str | None = None) -> toolchain.Torch:
    return toolchain.Torch(version, cuda, True, Path("/torch"))


def make_toolkit(version: str = "13.0.88") -> toolchain.Toolkit:
    home = Path("/toolkit")
    return toolchain.Toolkit(
        home / "bin/nvcc", version, home, home / "include", home / "lib64/libcudart_static.a"
    )


def make_config(kind: str = "cuda", debug: bool = False) -> toolchain.BuildConfig:
    return toolchain.BuildConfig(
        kind=kind,
        reason="because",
        debug=debug,
        torch=make_torch(),
        host=toolchain.HostCompiler(Path("/usr/bin/g++"), "g++", "12.2.0"),
        toolkit=make_toolkit() if kind == "cuda" else None,
        archs=tuple(toolchain.parse_archs("8.0;9.0a", "test")) if kind == "cuda" else (),
        archs_from="test",
        jobs=2,
        jobs_from="2 cores",
    )


def fails(function, *arguments) -> str:
    """Calls a probe that must refuse; returns its sentence after checking its form."""
    with pytest.raises(BuildError) as caught:
        function(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def documented(text: str) -> bool:
    """Whether the README's troubleshooting quotes this message (`...` stands for what varies)."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)`", readme.partition("## Troubleshooting")[2], re.MULTILINE)
    patterns = [".*".join(map(re.escape, quote.split("..."))) for quote in quoted]
    return any(re.search(pattern, text) for pattern in patterns)


# --- versions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2.13.0+cpu", (2, 13, 0)),
        ("2.14.0a0+git1234", (2, 14, 0)),
        ("2.12.0.dev20260101+cu130", (2, 12, 0)),
        ("13.0", (13, 0)),
        ("8", (8,)),
    ],
)
def test_parse_version(text, expected):
    assert toolchain.parse_version(text) == expected


def test_versions_are_numbers_not_strings():
    assert toolchain.parse_version("2.10.1") > toolchain.parse_version("2.6")
    assert toolchain.parse_version("12.10") > toolchain.MIN_CUDA


def test_parse_version_refuses_what_is_none():
    with pytest.raises(ValueError, match=r"expected a version such as 2\.13\.0, but got 'git'"):
        toolchain.parse_version("git")


# --- torch ---------------------------------------------------------------------------------------


def fake_torch(version: str):
    return SimpleNamespace(
        __version__=version,
        __file__="/env/torch/__init__.py",
        version=SimpleNamespace(cuda="13.0"),
        compiled_with_cxx11_abi=lambda: True,
    )


def test_probe_torch_reads_what_the_build_needs():
    torch = toolchain.probe_torch(lambda name: fake_torch("2.11.0+cu130"))
    assert (torch.version, torch.cuda, torch.cxx11_abi) == ("2.11.0+cu130", "13.0", True)
    assert torch.root == Path("/env/torch")


def test_torch_absent():
    def absent(name):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    text = fails(toolchain.probe_torch, absent)
    assert "compiled against torch" in text
    assert documented(text)
    assert f'{sys.executable} -m pip install "torch>=2.11"' in text


@pytest.mark.parametrize(
    "error", [ImportError("libcudart.so.13: no such file"), OSError("bad ELF header")]
)
def test_torch_broken(error):
    def broken(name):
        raise error

    text = fails(toolchain.probe_torch, broken)
    assert str(error) in text
    assert "pip install --force-reinstall torch" in text


def test_a_missing_dependency_of_torch_is_not_taken_for_a_missing_torch():
    def incomplete(name):
        raise ModuleNotFoundError("No module named 'sympy'", name="sympy")

    assert "installed but cannot be imported (No module named 'sympy')" in fails(
        toolchain.probe_torch, incomplete
    )


@pytest.mark.parametrize("version", ["2.10.1", "2.9.0+cpu", "1.13.1"])
def test_torch_too_old(version):
    text = fails(toolchain.probe_torch, lambda name: fake_torch(version))
    assert f"needs torch >= 2.11, but this environment has torch {version}" in text
    assert documented(text)
    assert "pip install --upgrade" in text


# --- CUDA or not ---------------------------------------------------------------------------------


@pytest.fixture
def toolkit_dir(tmp_path):
    """A toolkit's skeleton, and apart from it a wrapper script as its nvcc on PATH."""
    home = tmp_path / "cuda"
    for file in ("bin/nvcc", "include/cuda_runtime_api.h", "lib64/libcudart_static.a"):
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).touch()
    wrapper = tmp_path / "path" / "nvcc"
    wrapper.parent.mkdir()
    for program in (home / "bin/nvcc", wrapper):
        program.touch()
        program.chmod(0o755)
    return SimpleNamespace(home=home, wrapper=wrapper)


def nvcc_answers(home: Path, version: str = "13.0"):
    def run(command):
        if "--version" in command:
            return NVCC_VERSION.format(version)
        return f"#$ _SPACE_=\n#$ TOP={home}/bin/..\n#$ PATH=/somewhere\n"

    return run


def test_toolkit_folder_is_what_nvcc_says_not_where_it_lies(toolkit_dir):
    found = toolchain.probe_toolkit(toolkit_dir.wrapper, nvcc_answers(toolkit_dir.home))
    assert found.home == toolkit_dir.home
    assert found.version == "13.0.88"
    assert found.include_dir == toolkit_dir.home / "include"
    assert found.cudart_static == toolkit_dir.home / "lib64/libcudart_static.a"


@pytest.mark.parametrize("version", ["12.6", "11.8", "9.2"])
def test_toolkit_too_old(toolkit_dir, version):
    text = fails(
        toolchain.probe_toolkit, toolkit_dir.wrapper, nvcc_answers(toolkit_dir.home, version)
    )
    assert f"needs a CUDA toolkit >= 12.8, but {toolkit_dir.wrapper} is {version}.88" in text
    assert documented(text)
    assert "DILSEG_BUILD=cpu pip install ." in text


@pytest.mark.parametrize("file", ["include/cuda_runtime_api.h", "lib64/libcudart_static.a"])
def test_toolkit_incomplete(toolkit_dir, file):
    (toolkit_dir.home / file).unlink()
    text = fails(toolchain.probe_toolkit, toolkit_dir.wrapper, nvcc_answers(toolkit_dir.home))
    assert f"has no {Path(file).name}" in text
    assert "cuda-cudart-dev" in text


def test_nvcc_that_does_not_run(toolkit_dir):
    def broken(command):
        raise subprocess.CalledProcessError(126, command, output="gcc: not found")

    text = fails(toolchain.probe_toolkit, toolkit_dir.wrapper, broken)
    assert "does not work (gcc: not found)" in text
    assert "CUDA_HOME" in text


def test_nvcc_is_searched_in_the_documented_order(toolkit_dir, tmp_path):
    env = {"CUDA_HOME": str(toolkit_dir.home), "PATH": str(toolkit_dir.wrapper.parent)}
    site = tmp_path / "site-packages"
    pip_nvcc = site / "nvidia/cu13/bin/nvcc"
    candidates = toolchain.nvcc_candidates(env, [site])
    assert toolchain.find_nvcc(candidates) == toolkit_dir.home / "bin/nvcc"
    assert toolchain.describe_search(candidates) == (
        "CUDA_HOME, PATH, /usr/local/cuda, pip package nvidia/cu13, pip package nvidia/cu12"
    )
    del env["CUDA_HOME"]
    assert toolchain.find_nvcc(toolchain.nvcc_candidates(env, [site])) == toolkit_dir.wrapper
    pip_nvcc.parent.mkdir(parents=True)
    pip_nvcc.touch()
    pip_nvcc.chmod(0o755)
    packaged = [c for c in candidates if c[0].startswith("pip")]
    assert toolchain.find_nvcc(packaged) == pip_nvcc


def test_auto_without_a_cuda_torch_is_a_cpu_build():
    toolkit, reason = toolchain.select_toolkit({}, make_torch("2.13.0+cpu"), [])
    assert toolkit is None
    assert reason == "DILSEG_BUILD=auto and torch 2.13.0+cpu is a CPU-only build"


def test_auto_without_nvcc_is_a_cpu_build_that_says_where_it_looked():
    nowhere = [("PATH", Path("nvcc"))]
    toolkit, reason = toolchain.select_toolkit({}, make_torch(cuda="13.0"), nowhere)
    assert toolkit is None
    assert reason == "DILSEG_BUILD=auto and nvcc was not found (searched PATH)"


def test_auto_with_a_cuda_torch_and_nvcc_is_a_cuda_build(toolkit_dir):
    candidates = [("PATH", toolkit_dir.wrapper)]
    toolkit, reason = toolchain.select_toolkit(
        {"DILSEG_BUILD": "auto"},
        make_torch(cuda="13.2"),
        candidates,
        nvcc_answers(toolkit_dir.home),
    )
    assert toolkit is not None
    assert reason == "DILSEG_BUILD=auto and nvcc 13.0.88 was found"


def test_cuda_build_against_a_cpu_only_torch(toolkit_dir):
    toolkit, _ = toolchain.select_toolkit(
        {"DILSEG_BUILD": "cuda"},
        make_torch(),
        [("PATH", toolkit_dir.wrapper)],
        nvcc_answers(toolkit_dir.home),
    )
    assert toolkit is not None


def test_cuda_build_without_nvcc():
    candidates = [("CUDA_HOME", Path("/nowhere/bin/nvcc")), ("PATH", Path("nvcc"))]
    text = fails(
        toolchain.select_toolkit, {"DILSEG_BUILD": "cuda"}, make_torch(cuda="13.0"), candidates
    )
    assert "DILSEG_BUILD=cuda, but nvcc was not found (searched CUDA_HOME, PATH)" in text
    assert documented(text)
    assert "DILSEG_BUILD=cpu pip install ." in text


@pytest.mark.parametrize("mode", ["auto", "cuda"])
def test_torch_and_toolkit_of_different_cuda_majors(toolkit_dir, mode):
    text = fails(
        toolchain.select_toolkit,
        {"DILSEG_BUILD": mode},
        make_torch(cuda="12.8"),
        [("PATH", toolkit_dir.wrapper)],
        nvcc_answers(toolkit_dir.home),
    )
    assert "built with CUDA 12.8" in text
    assert "is CUDA 13.0.88, another major version" in text
    assert documented(text)
    assert "point CUDA_HOME at a CUDA 12 toolkit" in text


def test_cpu_build_asks_for_no_toolkit():
    toolkit, reason = toolchain.select_toolkit({"DILSEG_BUILD": "CPU"}, make_torch(cuda="13.0"), [])
    assert toolkit is None
    assert reason == "DILSEG_BUILD=cpu"


def test_unknown_build_mode():
    text = fails(toolchain.select_toolkit, {"DILSEG_BUILD": "gpu"}, make_torch(), [])
    assert 'DILSEG_BUILD="gpu": expected auto, cuda or cpu' in text


# --- architectures -------------------------------------------------------------------------------


def no_gpu():
    return None


def test_arch_list_becomes_nvcc_options():
    archs = toolchain.parse_archs("8.0; 9.0a,12.0+PTX", "DILSEG_CUDA_ARCH_LIST")
    assert [flag for arch in archs for flag in arch.flags] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    assert ";".join(map(str, archs)) == "8.0;9.0a;12.0+PTX"


@pytest.mark.parametrize("text", ["Hopper", "90", "sm_90", "9.0b", "9.0+ptx", "8.0;;x"])
def test_arch_list_malformed(text):
    message = fails(toolchain.parse_archs, text, "DILSEG_CUDA_ARCH_LIST")
    assert f'DILSEG_CUDA_ARCH_LIST="{text}": expected GPU architectures such as' in message


def test_arch_list_below_the_floor():
    message = fails(toolchain.parse_archs, "7.5;8.0", "DILSEG_CUDA_ARCH_LIST")
    assert "need compute capability >= 8.0, but got 7.5" in message


def test_arch_list_precedence():
    env = {"DILSEG_CUDA_ARCH_LIST": "8.0", "TORCH_CUDA_ARCH_LIST": "8.6"}
    archs, origin = toolchain.select_archs(env, "13.0", no_gpu)
    assert (list(map(str, archs)), origin) == (["8.0"], "DILSEG_CUDA_ARCH_LIST")
    del env["DILSEG_CUDA_ARCH_LIST"]
    assert toolchain.select_archs(env, "13.0", no_gpu)[1] == "TORCH_CUDA_ARCH_LIST"
    archs, origin = toolchain.select_archs({}, "13.0.88", no_gpu)
    assert origin == "default for CUDA 13.0.88"
    assert {"8.0", "9.0a"} <= set(map(str, archs))
    assert archs[-1].ptx


def test_a_list_for_many_packages_is_fitted_to_this_one():
    env = {"TORCH_CUDA_ARCH_LIST": "7.5 8.0 9.0 10.0+PTX"}
    archs, _ = toolchain.select_archs(env, "13.0", no_gpu)
    assert list(map(str, archs)) == ["8.0", "9.0a", "10.0+PTX"]
    message = fails(toolchain.select_archs, {"TORCH_CUDA_ARCH_LIST": "7.0 7.5"}, "13.0", no_gpu)
    assert "names no architecture >= 8.0" in message


@pytest.mark.parametrize(("capability", "name"), [((8, 6), "8.6"), ((9, 0), "9.0a")])
def test_native_architecture(capability, name):
    env = {"DILSEG_CUDA_ARCH_LIST": "native"}
    archs, origin = toolchain.select_archs(env, "13.0", lambda: capability)
    assert (list(map(str, archs)), origin) == ([name], "the GPU in this machine")
    assert "needs a torch that sees a CUDA GPU" in fails(
        toolchain.select_archs, env, "13.0", no_gpu
    )


# --- host compiler and jobs ----------------------------------------------------------------------


def test_host_compiler_is_recognised():
    host = toolchain.probe_host_compiler(
        {}, run=lambda _: GXX_MACROS.format(12), which=lambda name: f"/bin/{name}"
    )
    assert host == toolchain.HostCompiler(Path("/bin/g++"), "g++", "12.2.0")
    clang = "#define __GNUC__ 4\n#define __clang__ 1\n#define __clang_major__ 18\n"
    host = toolchain.probe_host_compiler(
        {"CXX": "clang++-18 -v"}, run=lambda _: clang, which=lambda name: f"/bin/{name}"
    )
    assert host == toolchain.HostCompiler(Path("/bin/clang++-18"), "clang++", "18.0.0")


def test_host_compiler_missing():
    text = fails(toolchain.probe_host_compiler, {}, None, lambda name: None)
    assert "no C++ compiler was found (looked for g++ and clang++ on PATH)" in text
    text = fails(toolchain.probe_host_compiler, {"CXX": "icpc"}, None, lambda name: None)
    assert "looked for icpc on PATH" in text


def test_host_compiler_too_old():
    def answer(_):
        return GXX_MACROS.format(9)

    text = fails(toolchain.probe_host_compiler, {}, answer, lambda name: f"/bin/{name}")
    assert "needs g++ >= 11, but /bin/g++ is 9.2.0" in text


def test_host_compiler_too_new_for_the_toolkit():
    host = toolchain.HostCompiler(Path("/bin/g++"), "g++", "15.1.0")
    text = fails(toolchain.check_cuda_host, host, make_toolkit("12.8.93"), {})
    assert "CUDA 12.8.93 accepts g++ up to 14, but /bin/g++ is 15.1.0" in text
    assert documented(text)
    assert "CXX=g++-14 pip install ." in text
    toolchain.check_cuda_host(host, make_toolkit("12.8.93"), {"NVCC_CCBIN": "/bin/g++-14"})
    toolchain.check_cuda_host(host, make_toolkit("13.0.88"), {})
    toolchain.check_cuda_host(host, make_toolkit("14.1.20"), {})  # unknown: nvcc decides


@pytest.mark.parametrize(
    ("env", "cores", "gib", "jobs"),
    [({}, 16, 100, 16), ({}, 16, 7, 2), ({}, 4, 1, 1), ({}, 4, 0, 4), ({"MAX_JOBS": "3"}, 1, 1, 3)],
)
def test_jobs_are_bounded_by_cores_and_memory(env, cores, gib, jobs):
    assert toolchain.select_jobs(env, cores, gib * 2**30)[0] == jobs


@pytest.mark.parametrize("value", ["0", "-2", "many"])
def test_max_jobs_malformed(value):
    text = fails(toolchain.select_jobs, {"MAX_JOBS": value}, 4, 0)
    assert f'MAX_JOBS="{value}": expected a positive number' in text


# --- the ninja file ------------------------------------------------------------------------------


def rules(config: toolchain.BuildConfig) -> dict[str, str]:
    text = ninja.ninja_file(config, Path("/build"), env={})
    return dict(re.findall(r"^rule (\w+)\n  command = (.*)$", text, re.MULTILINE))


def test_only_the_torch_side_is_compiled_with_torch():
    commands = rules(make_config())
    assert "-isystem /torch/include " in commands["torch"]
    for torch_free in ("cpu", "cuda"):
        assert "/torch" not in commands[torch_free]
    for language in ("torch", "cpu"):
        assert "-std=c++20" in commands[language]
        assert "-march" not in commands[language]
        assert "fast-math" not in commands[language]
    assert "-fopenmp" in commands["torch"]
    assert "-fopenmp" not in commands["link"]


def test_cuda_rule_and_link():
    commands = rules(make_config())
    assert "-gencode=arch=compute_90a,code=sm_90a" in commands["cuda"]
    assert "-ccbin /usr/bin/g++" in commands["cuda"]
    assert "-DDILSEG_WITH_CUDA=1" in commands["torch"]
    assert "/toolkit/lib64/libcudart_static.a" in commands["link"]
    assert "-ltorch_cuda" not in commands["link"]
    assert "-G" in rules(make_config(debug=True))["cuda"].split()


@pytest.mark.parametrize(
    ("archs", "debug", "expected"),
    [
        ("8.0;9.0a", False, True),
        ("9.0", False, False),
        ("9.0;9.0a", False, False),  # the driver may take either
        ("9.0a", True, False),
    ],
)
def test_the_binary_knows_whether_it_has_code_for_wgmma(archs, debug, expected):
    config = replace(make_config(debug=debug), archs=tuple(toolchain.parse_archs(archs, "test")))
    assert ("-DDILSEG_WITH_SM90A=1" in rules(config)["cuda"]) == expected


def test_cpu_rules_carry_the_reason():
    commands = rules(make_config("cpu"))
    assert "cuda" not in commands
    assert "cudart" not in commands["link"]
    assert """'-DDILSEG_CPU_REASON="because"'""" in commands["torch"]


def test_every_source_is_compiled_once():
    text = ninja.ninja_file(make_config(), Path("/build"), env={})
    built = re.findall(rf"^build \S+: (?:torch|cpu|cuda) {re.escape(str(ROOT))}/(\S+)$", text, re.M)
    globs = sources.TORCH_GLOBS + sources.CPU_GLOBS + sources.CUDA_GLOBS
    assert sorted(built) == sources.find(globs)
    on_disk = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.c*")}
    compiled = {p for p in on_disk if p.endswith((".cpp", ".cu")) and "/smoke/" not in p}
    assert set(built) == compiled


def test_ninja_of_this_environment_comes_first(tmp_path, monkeypatch):
    own, other = tmp_path / "own", tmp_path / "other"
    for folder in (own, other):
        folder.mkdir()
        (folder / "ninja").touch(0o755)
    monkeypatch.setattr(ninja.sysconfig, "get_path", lambda name: str(own))
    assert ninja.find_ninja({"PATH": str(other)}) == str(own / "ninja")
    (own / "ninja").unlink()
    assert ninja.find_ninja({"PATH": str(other)}) == str(other / "ninja")
    assert "pip install ninja" in fails(ninja.find_ninja, {"PATH": str(own)})


def test_quoting_survives_the_shell_and_ninja():
    assert ninja._quote("plain-1.0") == "plain-1.0"
    awkward = """-DX="it's $5" (a b)"""
    shown = subprocess.run(
        ["sh", "-c", f"printf %s {ninja._quote(awkward).replace('$$', '$')}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == awkward


# --- the record and the loader -------------------------------------------------------------------


def test_table_and_record_tell_the_same():
    config = make_config()
    lines = config.table().splitlines()
    assert len(lines) == 13
    for value in ("13.0.88", "8.0;9.0a", "because", "g++ 12.2.0"):
        assert any(value in line for line in lines)
    scope: dict = {}
    exec(ninja.record_file(config), scope)
    assert scope["BUILD"] == config.record()
    assert scope["BUILD"]["cuda_archs"] == "8.0;9.0a"
    assert make_config("cpu").record()["cuda"] is None


def test_build_info_describes_this_binary():
    info = dilseg.build_info()
    compiled = _extension._C.build_info()
    assert info["version"] == dilseg.__version__
    assert info["kind"] == compiled["kind"]
    assert toolchain.parse_version(str(compiled["torch"])) == toolchain.parse_version(
        str(info["torch"])
    )
    assert compiled["cxx_standard"] == 202002
    assert info["running_torch"] == str(__import__("torch").__version__)
    info["kind"] = "changed"
    assert dilseg.build_info()["kind"] != "changed"


RECORD: _extension.BuildRecord = {
    "python": "3.11.7",
    "torch": "2.13.0+cu130",
    "cxx11_abi": True,
    "cuda": "13.0.88",
}


@pytest.mark.parametrize(
    ("version", "cuda", "abi", "expected"),
    [
        ("2.13.1+cu132", "13.2", True, None),
        ("2.13.0+cpu", None, True, None),
        ("2.14.0a0+git12", "13.0", True, "built for torch 2.13.0+cu130, but torch 2.14.0a0"),
        ("2.1.0", "13.0", True, "but torch 2.1.0 is running"),
        ("2.13.0", "13.0", False, "built with the C++11 ABI on, but torch 2.13.0 is running with"),
        ("2.13.0", "12.8", True, "built with CUDA 13.0.88, but torch 2.13.0 runs with CUDA 12.8"),
    ],
)
def test_a_binary_for_another_torch_is_explained(version, cuda, abi, expected):
    text = _extension.explain_mismatch(RECORD, version, cuda, abi)
    if expected is None:
        assert text is None
        return
    assert text is not None
    assert expected in text
    assert documented(text) == ("was built for torch" in text)
    assert _extension.REBUILD in text
    assert "\n" not in text


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable empty package in which a binary may be planted."""
    folder = tmp_path / "planted"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "planted"]:
        del sys.modules[name]


def test_import_without_a_build(package):
    with pytest.raises(ImportError, match=r"has no compiled extension in .*: pip install \.") as e:
        _extension.load_record("planted")
    assert "\n" not in str(e.value)


def test_import_of_a_build_for_another_python(package):
    record = {**_extension._RECORD, "python": "3.9.1"}
    expected = r"no compiled extension for Python .*\(the build was for Python 3\.9\.1\); rebuild"
    with pytest.raises(ImportError, match=expected):
        _extension.load(record, "planted")


def test_import_of_a_broken_binary(package):
    (package / ninja.binary_name()).write_bytes(b"not a library")
    with pytest.raises(ImportError, match=r"could not be loaded .*; rebuild it"):
        _extension.load(_extension._RECORD, "planted")


def test_a_binary_for_another_torch_is_not_even_loaded(package):
    (package / ninja.binary_name()).write_bytes(b"would be 'could not be loaded'")
    with pytest.raises(ImportError, match=r"was built for torch 2\.9\.1"):
        _extension.load({**_extension._RECORD, "torch": "2.9.1"}, "planted")


def test_import_without_torch_is_one_sentence():
    program = (
        "import sys; sys.modules['torch'] = None\n"  # what `import torch` meets where there is none
        "try: import dilseg\nexcept ImportError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(
        r"dilseg needs torch, and \S+ has none; install it \(pip install torch\), .*\.\n",
        run.stdout,
    )


# --- the PEP 517 backend -------------------------------------------------------------------------


@pytest.fixture
def backend():
    pytest.importorskip("setuptools", minversion="77")
    return importlib.import_module("build_tools.backend")


@pytest.fixture
def isolated(backend, monkeypatch, tmp_path):
    """As in pip's isolated build: torch is only found in `site`, the environment's own folder."""
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name: str(site))

    def find_spec(name):
        folders = [Path(p) for p in sys.path if Path(p) == site]
        return object() if any((p / "torch").is_dir() for p in folders) else None

    monkeypatch.setattr(backend.importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(backend.build_meta, "get_requires_for_build_wheel", lambda _: ["a"])
    monkeypatch.setattr(backend.build_meta, "get_requires_for_build_editable", lambda _: ["b"])
    return site


def test_the_installed_torch_is_used(backend, isolated):
    (isolated / "torch").mkdir()
    assert backend.get_requires_for_build_wheel() == ["a"]
    assert backend.get_requires_for_build_editable() == ["b"]
    assert sys.path[-1] == str(isolated)
    assert sys.path.count(str(isolated)) == 1


def test_torch_is_required_only_where_there_is_none(backend, isolated):
    assert backend.get_requires_for_build_wheel() == ["a", "torch>=2.11"]
    assert backend.get_requires_for_build_editable() == ["b", "torch>=2.11"]


@pytest.mark.parametrize(
    "hook",
    [
        "prepare_metadata_for_build_wheel",
        "prepare_metadata_for_build_editable",
        "build_wheel",
        "build_editable",
    ],
)
def test_without_isolation_a_missing_torch_is_one_sentence(backend, isolated, hook):
    with pytest.raises(SystemExit, match=r"compiled against torch, and .* pip install \"torch>="):
        getattr(backend, hook)("anywhere")


def test_without_isolation_an_old_setuptools_is_one_sentence(backend, isolated, monkeypatch):
    (isolated / "torch").mkdir()
    monkeypatch.setattr(backend.setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match=r"needs setuptools >= 77, but .* has 65\.5\.0"):
        backend.build_wheel("anywhere")


# --- packages ------------------------------------------------------------------------------------

# Answers the probe as g++ does, and "compiles" by writing an empty object and dependency file.
COMPILER = """#!/bin/sh
case "$*" in *-dM*) exec g++ "$@" ;; *fail_to_compile*) echo "error: no such luck"; exit 1 ;; esac
while [ $# -gt 0 ]; do
  case "$1" in -o) out=$2 ;; -MF) echo "x:" > "$2" ;; esac
  shift
done
echo object > "$out"
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of the files that make a package, and a compiler that takes no time."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "runs", "*.so", "_build_info.py", "__pycache__",
        "*.egg-info", ".*_cache", "results",
    )  # fmt: skip
    shutil.copytree(ROOT, copy, ignore=ignored)
    (copy / "README.md").touch()
    compiler = tmp_path / "g++"
    compiler.write_text(COMPILER)
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    env = {**os.environ, "CXX": str(compiler), "DILSEG_BUILD": "cpu", "PYTHONPATH": ""}
    return SimpleNamespace(path=copy, env=env)


def call_hook(checkout, hook: str, out: Path) -> subprocess.CompletedProcess[str]:
    out.mkdir(exist_ok=True)
    script = f"from build_tools import backend; print(backend.{hook}({str(out)!r}))"
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=checkout.path,
        env=checkout.env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_wheel(backend, checkout, tmp_path):
    (checkout.path / "dilseg" / "_C.stale.so").touch()
    done = call_hook(checkout, "build_wheel", tmp_path / "wheel")
    assert done.returncode == 0, done.stderr
    assert "dilseg build configuration" in done.stdout
    wheel = next((tmp_path / "wheel").iterdir())
    assert wheel.name.startswith(f"dilseg-{dilseg.__version__}-cp")
    assert "-any" not in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        record = archive.read("dilseg/_build_info.py").decode()
        meta = next(n for n in names if n.endswith(".dist-info/METADATA"))
        metadata = archive.read(meta).decode()
        entry_points = archive.read(meta.replace("METADATA", "entry_points.txt")).decode()
    modules = {
        p.relative_to(checkout.path).as_posix() for p in (checkout.path / "dilseg").rglob("*.py")
    }
    binary = f"dilseg/{ninja.binary_name()}"
    assert modules | {binary, "dilseg/py.typed", "dilseg/_C.pyi"} <= names
    assert {n for n in names if n.endswith(".so")} == {binary}
    assert {n.split("/")[0] for n in names} == {"dilseg", meta.split("/")[0]}
    scope: dict = {}
    exec(record, scope)
    assert scope["BUILD"]["kind"] == "cpu"
    assert scope["BUILD"]["reason"] == "DILSEG_BUILD=cpu"
    assert "dilseg = dilseg.cli:main" in entry_points
    needed = re.findall(r"^Requires-Dist: (\S+)$", metadata, re.MULTILINE)
    assert needed == ["torch>=2.11", "numpy"]
    assert not (checkout.path / "dilseg" / "_build_info.py").exists()


def test_editable(backend, checkout, tmp_path):
    done = call_hook(checkout, "build_editable", tmp_path / "wheel")
    assert done.returncode == 0, done.stderr
    package = checkout.path / "dilseg"
    assert (package / ninja.binary_name()).exists()
    assert "BUILD" in (package / "_build_info.py").read_text()


def test_sdist_holds_what_a_build_needs(backend, checkout, tmp_path):
    (checkout.path / "dilseg" / "_C.stale.so").touch()
    done = call_hook(checkout, "build_sdist", tmp_path / "sdist")
    assert done.returncode == 0, done.stderr
    archive = next((tmp_path / "sdist").iterdir())
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    tracked = [*(ROOT / "csrc").rglob("*"), *(ROOT / "build_tools").glob("*.py")]
    needed = {p.relative_to(ROOT).as_posix() for p in tracked if p.is_file()}
    needed |= {"setup.py", "pyproject.toml", "CMakeLists.txt", "Makefile", "LICENSE", ".ci/run"}
    needed |= {"dilseg/__init__.py", "dilseg/py.typed", "dilseg/_C.pyi", "tests/test_build.py"}
    assert needed <= names
    assert not [n for n in names if n.endswith((".so", ".pyc", "_build_info.py"))]


def test_a_failing_compiler_ends_with_a_sentence_and_no_traceback(checkout):
    (checkout.path / "csrc/ops/fail_to_compile.cpp").touch()
    done = subprocess.run(
        [sys.executable, "-m", "build_tools"],
        cwd=checkout.path,
        env=checkout.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "no such luck" in done.stdout
    assert re.fullmatch(r"error: compiling dilseg failed .*MAX_JOBS=1 .*\n", done.stderr)


def test_setup_py_ends_with_a_sentence_and_no_traceback(backend, checkout):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=checkout.path,
        env={**checkout.env, "DILSEG_BUILD": "gpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert 'error: DILSEG_BUILD="gpu": expected auto, cuda or cpu' in done.stderr
    assert "Traceback" not in done.stderr


def test_repeating_a_build_compiles_nothing(checkout):
    def build() -> str:
        return subprocess.run(
            [sys.executable, "-m", "build_tools"],
            cwd=checkout.path,
            env=checkout.env,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert "link" in build()
    binary = checkout.path / "dilseg" / ninja.binary_name()
    before = binary.stat()
    assert "no work to do" in build()
    assert binary.stat().st_mtime_ns == before.st_mtime_ns
    assert binary.stat().st_ino == before.st_ino


# --- C++ users -----------------------------------------------------------------------------------


def test_cmake_globs_the_same_sources():
    text = (ROOT / "CMakeLists.txt").read_text()
    globs = dict(
        re.findall(r"file\(GLOB_RECURSE (\w+) CONFIGURE_DEPENDS (\S+)\)", text, re.MULTILINE)
    )
    assert globs == {
        "DILSEG_CPU_SOURCES": sources.CPU_GLOBS[0].replace("**/", ""),
        "DILSEG_CUDA_SOURCES": sources.CUDA_GLOBS[0].replace("**/", ""),
    }


def test_cmake_configures_with_the_same_sources(tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    done = subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DDILSEG_BUILD=cpu"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    listed = [Path(line) for line in (tmp_path / "sources.txt").read_text().split()]
    assert sorted(p.relative_to(ROOT).as_posix() for p in listed) == sources.find(
        sources.CPU_GLOBS + sources.CUDA_GLOBS
    )
    commands = (tmp_path / "compile_commands.json").read_text()
    assert "csrc/cpu/cross_entropy.cpp" in commands
    assert sysconfig.get_path("purelib") not in commands  # no torch


def test_smoke_program_runs_without_torch(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    program = tmp_path / "smoke"
    flags = "-std=c++20 -O1 -Wall -Wextra -Werror -Icsrc/include -Icsrc"
    files = [*sources.find(sources.CPU_GLOBS), "csrc/smoke/smoke.cpp"]
    subprocess.run(
        [compiler, *flags.split(), *files, "-o", str(program)],
        cwd=ROOT,
        check=True,
    )
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(" ok\n") >= 4


def test_the_project_file_and_the_build_agree():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'dependencies = ["torch>={toolchain.format_version(toolchain.MIN_TORCH)}"' in text
    assert sources.project_version() == dilseg.__version__
    tree = ast.parse((ROOT / "setup.py").read_text())
    assert "NinjaBuildExt" in ast.unparse(tree)
