"""Builds kernels for the CUDA-on-CPU harness: shared libraries for ctypes, cached under build/harness.

A library is named by a hash of all that went into it, so a second run compiles nothing. Of several threads or processes
that want the same file one makes it, and the others wait.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import rewrite_ptx

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "harness"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fno-gnu-unique"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]
SANITIZERS = {
    "": [],
    "thread": ["-fsanitize=thread"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-sanitize=vptr"],
}


def find_nvcc():
    """Path of nvcc, or None: from CUDACXX, PATH, CUDA_HOME or the usual place."""
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    candidates += [Path(home) / "bin" / "nvcc" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return next((Path(path) for path in candidates if path and Path(path).is_file()), None)


@functools.cache
def cuda_include_folders():
    """Folders of NVIDIA's headers, from nvcc's toolkit or from pip packages; empty when there are none."""
    groups = []
    if nvcc := find_nvcc():  # it may be a wrapper somewhere else: ask for its toolkit
        commands = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        groups += [[Path(top) / "include"] for top in re.findall(r"^#\$ TOP=(.*)$", commands.stderr, re.M)]
    groups += [sorted((Path(entry) / "nvidia").glob("*/include")) for entry in sys.path]
    needed = ("cuda.h", "cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h", "crt/host_defines.h")
    for folders in groups:
        if all(any((folder / header).is_file() for folder in folders) for header in needed):
            return folders
    return []


@functools.cache
def cutlass_include_folder():
    """Folder of CUTLASS' headers, which the nvidia-cutlass wheel carries, or None."""
    spec = importlib.util.find_spec("cutlass_library")
    return Path(spec.origin).parent / "source/include" if spec else None


def run_compiler(arguments):
    """Runs the compiler; raises RuntimeError with its output when it fails or warns."""
    done = subprocess.run([COMPILER, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode or done.stderr:
        raise RuntimeError(f"{COMPILER} {' '.join(map(str, arguments))}\n{done.stderr[:8000]}")


@functools.cache
def compiler_version():
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def rewrite(text):
    return rewrite_ptx.rewrite(text)


@contextlib.contextmanager
def locked(path):
    """One thread of one process at a time; the system frees the lock of a process that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:  # it stays: removed, it could be locked twice
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cached(key_parts, suffix, make):
    """The file in the cache for these parts; `make(path)` writes it when it is not there."""
    key = hashlib.sha256(repr([compiler_version(), *key_parts]).encode()).hexdigest()[:24]
    path = CACHE / (key + suffix)
    if path.exists():
        return path
    with locked(CACHE / "locks" / key):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                made = Path(folder) / path.name
                make(made)
                os.replace(made, path)
    return path


def include_flags(first=()):
    folders = [*first, CSRC]
    return [f"-I{folder}" for folder in folders] + [f"-isystem{folder}" for folder in cuda_include_folders()]


def runtime_objects():
    """The harness itself, compiled without sanitizers: it finds them by weak symbols."""
    sources = sorted((CSRC / "harness").glob("*.cpp"))
    headers = [path.read_text() for path in sorted((CSRC / "harness").glob("*.h"))]

    def compile_one(source):
        flags = [*FLAGS, "-O3", "-Wno-restrict"]  # of which g++ 12 warns in its own std::string
        return cached(
            [source.name, source.read_text(), headers, flags],
            ".o",
            lambda path: run_compiler([*flags, *include_flags(), "-c", source, "-o", path]),
        )

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def kernel_tree(patches):
    """{path below csrc: text} of all kernel sources: patched, then with their inline PTX rewritten.

    `patches` are (path, old, new); `old` must occur exactly once.
    """
    paths = [path for path in (CSRC / "cuda").rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp")]
    paths += (CSRC / "harness" / "tests").glob("*.cu")
    tree = {str(path.relative_to(CSRC)): path.read_text() for path in sorted(paths)}
    for path, old, new in patches:
        if tree[path].count(old) != 1:
            raise ValueError(f"{path}: the text to replace occurs {tree[path].count(old)} times: {old!r}")
        tree[path] = tree[path].replace(old, new)
    return {path: f'#line 1 "csrc/{path}"\n' + rewrite(text) for path, text in tree.items()}


def plain_sources():
    """{path below csrc: text} of all other C++ files."""
    paths = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp") and CSRC / "cuda" not in path.parents]
    return {str(path.relative_to(CSRC)): path.read_text() for path in sorted(paths)}


def with_includes(source, texts):
    """{path: text} of a source and of everything in `texts` that it includes, directly or not."""
    found, waiting = {}, [source]
    while waiting:
        path = waiting.pop()
        if path in texts and path not in found:
            found[path] = texts[path]
            waiting += re.findall(r'^\s*#\s*include\s+"([^"]+)"', texts[path], re.M)
    return dict(sorted(found.items()))


def cutlass_flags():
    """For sources that include CuTe: its headers with their inline PTX rewritten come first, then the others.

    The definitions stand for what nvcc defines for sm_90a, and for conditions of CuTe that ask for nvcc itself. Where
    one is missing, CuTe takes a branch for the host, which does nothing and says nothing.
    """
    original = cutlass_include_folder()
    sources = sorted(original.glob("cute/arch/*.hpp")) + [original / "cutlass/cutlass.h"]
    names = ("config", "barrier", "reg_reconfig", "grid_dependency_control")
    sources += [original / f"cutlass/arch/{name}.h" for name in names]
    texts = {str(path.relative_to(original)): path.read_text() for path in sources}

    def make(folder):
        for name, text in texts.items():
            copy = folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(rewrite(text))

    rewriter = (CSRC / "harness/rewrite_ptx.py").read_text()
    folders = [cached([rewriter, texts], "", make), original]
    folders += [folder / "cccl" for folder in cuda_include_folders() if (folder / "cccl").is_dir()]
    definitions = ["__CUDACC_VER_MAJOR__=13", "__CUDACC_VER_MINOR__=0", "__CUDA_ARCH_FEAT_SM90_ALL"]
    definitions += ["CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED=1", "CUTE_ARCH_LDSM_SM75_ACTIVATED=1"]
    return [f"-isystem{folder}" for folder in folders] + [f"-D{definition}" for definition in definitions]


def torch_flags():
    """(compiler's, linker's) flags of sources that include torch's headers."""
    import torch

    folder = Path(torch.__file__).parent
    target = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
    compiler = [f"-isystem{folder / 'include'}", *target, "-Wno-psabi", "-fvisibility=hidden"]
    return compiler, [f"-L{folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]


def build(sources, *, sanitizer="", defines=(), patches=(), operators=(), cutlass=False):
    """Compiles kernel sources and C++ files (paths below csrc) with the harness; returns the library's path.

    sanitizer: "", "thread" or "address" (which includes undefined behaviour); for the kernels only.
    operators: further C++ files, which include torch's headers and are compiled with `defines` alone.
    cutlass: the sources include CuTe, and are compiled as if for sm_90a.
    """
    if not cuda_include_folders():
        raise RuntimeError("NVIDIA's CUDA headers are missing")
    tree = kernel_tree(patches)
    texts = {**plain_sources(), **tree}
    flags = [*FLAGS, f"-DCUDA_ON_CPU_ARCH={900 if cutlass else 800}", *SANITIZERS[sanitizer]]
    flags += cutlass_flags() if cutlass else []
    flags += ["-w"] if patches else []  # what a planted fault leaves unused is no news
    jobs = [(source, flags if operators else [*flags, *defines]) for source in sources]
    link = ["-shared", "-Wl,-Bsymbolic", *SANITIZERS[sanitizer]]
    libraries = []
    if operators:
        compiler, libraries = torch_flags()
        jobs += [(source, [*FLAGS, *compiler, "-O0", "-g0", *defines]) for source in operators]
    objects = runtime_objects()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        for name, text in tree.items():
            copy = Path(folder) / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)

        def compile_one(job):
            source, flags = job
            file = Path(folder) / source if source in tree else CSRC / source
            return cached(
                [source, with_includes(source, texts), flags],
                ".o",
                lambda path: run_compiler([*flags, *include_flags([folder]), "-c", "-x", "c++", file, "-o", path]),
            )

        objects += pool.map(compile_one, jobs)
    command = [*link, *objects, *libraries]
    key = [link, [path.name for path in objects], libraries]
    return cached(key, ".so", lambda path: run_compiler([*command, "-o", path]))
