"""The rules of the binaries: what they may need, what they say of themselves, where they load."""

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from backpack_cuda import _lib

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "backpack_cuda/_C.so"
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-torch{torch.__version__}"
# Of the compiler's start-up code; weak, and null in most programs.
START_UP = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}


def run(*command, **kwargs):
    """Runs a command and returns its standard output; on failure the test fails with both outputs."""
    if shutil.which(str(command[0])) is None:
        pytest.fail(f"{command[0]} is missing: install binutils, which g++ needs anyway")
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@cache
def undefined_symbols():
    """What _C.so needs of torch and Python: {name: whether it is weak, that is may be missing}."""
    lines = [line.split() for line in run("nm", "-D", "--undefined-only", LIBRARY).splitlines()]
    # Symbols of libc, libstdc++ and libgcc carry a version: memcpy@GLIBC_2.14.
    return {name: kind in "wv" for kind, name in lines if "@" not in name and name not in START_UP}


@cache
def dynamic_section():
    return run("readelf", "-d", LIBRARY)


@cache
def torch_2_11_symbols():
    text = (ROOT / "python_tests/torch_2_11_symbols.txt").read_text()
    cpu, cuda = text.split("[libtorch_cpu]\n")[1].split("[libtorch_cuda]\n")
    return set(cpu.split()), set(cuda.split())


def test_needs_nothing_newer_than_torch_2_11():
    cpu, cuda = torch_2_11_symbols()
    required = {name for name, weak in undefined_symbols().items() if not weak}
    optional = {name for name, weak in undefined_symbols().items() if weak}
    assert required, "nm listed no undefined symbol at all"
    assert required <= cpu, f"not in libtorch_cpu 2.11: {sorted(required - cpu)}"
    assert optional <= cpu | cuda, f"not in torch 2.11: {sorted(optional - cpu - cuda)}"


def test_binds_no_python_symbol():
    assert not [name for name in undefined_symbols() if name.startswith(("Py", "_Py"))]


def test_links_only_libtorch_and_the_system():
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\.so", dynamic_section())
    assert {"libtorch", "libtorch_cpu"} <= set(needed)
    assert set(needed) <= {
        "libtorch",
        "libtorch_cpu",
        "libstdc++",
        "libgcc_s",
        "libm",
        "libc",
        "ld-linux-x86-64",
    }


def test_has_no_search_path():
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic_section())


def test_exports_no_symbol():
    """Nothing can clash with another library: operators register themselves when this one is loaded."""
    assert run("nm", "-D", "--defined-only", LIBRARY) == ""


@pytest.mark.skipif(not BUILD.exists(), reason="the library was not built here with this Python and torch")
def test_vector_code_stays_in_its_files():
    """A weak function compiled with AVX flags could be the copy that the linker keeps for every machine."""
    sources = sorted((ROOT / "csrc/cpu").glob("*_avx*.cpp"))
    assert sources
    for source in sources:
        symbols = run("nm", "-C", "--defined-only", BUILD / f"CMakeFiles/_C.dir/csrc/cpu/{source.name}.o")
        weak = [line for line in symbols.splitlines() if re.match(r"[0-9a-f]+ [VWu] ", line)]
        assert not weak, f"{source.name} defines what other files may share: {weak}"


def test_build_info_tells_what_was_compiled():
    _build_info = pytest.importorskip("backpack_cuda._build_info", reason="built for another Python")
    assert re.fullmatch(r"\d+\.\d+", _build_info.torch_target)
    assert _build_info.torch_built
    assert _build_info.torch_target in _build_info.summary()
    assert _build_info.with_cuda == _lib.has_kernel("outer_norm", "cuda")
    assert bool(_build_info.cuda_archs) == bool(_build_info.cuda_version) == _build_info.with_cuda


def configure(build, with_cuda):
    """Configures a build in the folder `build` and returns the text of its build_info.h."""
    pybind11 = pytest.importorskip("pybind11")
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert cmake, "cmake is missing: pip install cmake"
    command = [cmake, "-G", "Ninja", "-S", ROOT, "-B", build]
    definitions = {
        "BACKPACK_CUDA_WITH_CUDA": with_cuda,
        "BACKPACK_CUDA_TORCH_DIR": Path(torch.__file__).parent,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run(
        *command,
        *(f"-D{name}={value}" for name, value in definitions.items()),
        env={**os.environ, "PATH": path},
    )
    return (build / "build_info.h").read_text()


def test_configures_without_nvcc(tmp_path):
    info = configure(tmp_path, "OFF")
    assert "#define BACKPACK_CUDA_BUILT_WITH_CUDA 0" in info
    assert '#define BACKPACK_CUDA_ARCHS ""' in info
    assert ".cu" not in (tmp_path / "build.ninja").read_text()


PROBE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import backpack_cuda as bp
norms = bp._lib.operators().outer_norm(torch.ones(3, 4), torch.full((3, 2), 2.0))
print(torch.__version__, norms.tolist())
"""


def test_loads_in_torch_2_11():
    """The library built here, in the torch of the Python that BACKPACK_CUDA_TORCH_211_PYTHON names."""
    python = os.environ.get("BACKPACK_CUDA_TORCH_211_PYTHON")
    if not python:
        pytest.skip("BACKPACK_CUDA_TORCH_211_PYTHON is not set")
    version, result = run(python, "-c", PROBE, ROOT).split(" ", 1)
    assert version.startswith("2.11.")
    assert result.strip() == "[32.0, 32.0, 32.0]"  # 3 samples: 4 * 1^2 times 2 * 2^2


def test_import_works_without_the_library(tmp_path):
    """Only the first use fails, with one sentence that says what to do."""
    shutil.copytree(ROOT / "backpack_cuda", tmp_path / "backpack_cuda", ignore=shutil.ignore_patterns("*.so"))
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import backpack_cuda as bp\n"
        "try: bp.ops.outer_norm(torch.ones(3, 4), torch.ones(3, 2))\n"
        "except RuntimeError as error: print(error)\n"
    )
    message = run(sys.executable, "-c", code, tmp_path, cwd=tmp_path)
    assert re.fullmatch(
        r"backpack_cuda is not built \(_C\.so .*\): run `pip install .*` in the source tree\.\n", message
    )
