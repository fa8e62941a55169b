"""Builds the package; CMakeLists.txt says what is compiled.

Environment variables:
    BACKPACK_CUDA_WITH_CUDA     AUTO (compile the CUDA kernels when nvcc is found, GPU or not), ON or OFF
    BACKPACK_CUDA_ARCHS         CMake's list of CUDA architectures; a plain number embeds its PTX too
    BACKPACK_CUDA_TORCH_TARGET  the oldest torch that must be able to load the library
    MAX_JOBS                    parallel compilations
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "backpack_cuda/_version.py").read_text()).group(1)
OPERATORS = "backpack_cuda._C"
BUILD_INFO = "backpack_cuda._build_info"
OPTIONS = {
    "BACKPACK_CUDA_WITH_CUDA": "AUTO",
    "BACKPACK_CUDA_ARCHS": "80;90a-real",
    "BACKPACK_CUDA_TORCH_TARGET": "2.11",
}


class CMakeBuild(build_ext):
    """One CMake run builds both libraries, in a build folder that persists from call to call."""

    def build_extensions(self):
        try:
            import pybind11
            import torch
        except ModuleNotFoundError as error:
            sys.exit(
                f"Building backpack_cuda needs {error.name}: pip install torch pybind11 cmake ninja "
                "setuptools wheel, then pip install --no-build-isolation ."
            )
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
            sys.exit(f"Building backpack_cuda needs torch 2.11 or later, not {torch.__version__}.")

        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-torch{torch.__version__}"
        definitions = {
            "BACKPACK_CUDA_VERSION": VERSION,
            "BACKPACK_CUDA_TORCH_DIR": Path(torch.__file__).parent,
            "BACKPACK_CUDA_TORCH_BUILT": torch.__version__,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "CMAKE_INSTALL_PREFIX": Path(self.get_ext_fullpath(OPERATORS)).resolve().parent,
            # Always passed: what an earlier call left in the cache must not count.
            **{name: os.environ.get(name) or default for name, default in OPTIONS.items()},
        }
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        # cmake and ninja of this environment first, whether or not it is activated.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        for command in (
            [
                "cmake",
                "-G",
                "Ninja",
                "-S",
                ROOT,
                "-B",
                build,
                *(f"-D{k}={v}" for k, v in definitions.items()),
            ],
            ["cmake", "--build", build, "-j", jobs],
            ["cmake", "--install", build],
        ):
            try:
                subprocess.run(command, check=True, env={**os.environ, "PATH": path})
            except FileNotFoundError:
                sys.exit("Building backpack_cuda needs CMake and ninja: pip install cmake ninja.")
            except subprocess.CalledProcessError:
                sys.exit(f"Building backpack_cuda failed ({command[0]} {command[1]}): see the messages above.")

    def copy_extensions_to_source(self):
        """Replaces the files of an in-place build: a Python that runs may have the old ones mapped."""
        for extension in self.extensions:
            (ROOT / self.get_ext_filename(extension.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def get_ext_filename(self, name):
        """The operators hold no Python symbol: one file serves every Python and needs no tag in its name."""
        if name.rpartition(".")[2] == "_C":
            return os.path.join(*name.split(".")) + ".so"
        return super().get_ext_filename(name)


setup(
    name="backpack_cuda",
    version=VERSION,
    description="Per-sample gradient statistics in one fused pass, behind BackPACK's interface",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    packages=find_packages(include=["backpack_cuda", "backpack_cuda.*"]),
    # No sources: CMake knows them. Every built file is named, as editable installs copy exactly these.
    ext_modules=[Extension(OPERATORS, sources=[]), Extension(BUILD_INFO, sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
    python_requires=">=3.10",
    install_requires=["torch>=2.11"],
    extras_require={
        "test": ["pytest", "hypothesis", "numpy", "ninja"],
        "demo": ["scikit-learn", "matplotlib", "tqdm"],
        "bench": ["backpack-for-pytorch", "opacus", "matplotlib"],
    },
)
