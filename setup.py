"""Builds rlhf_fast._C with CMake and Ninja, and maps kernels/<op> to rlhf_fast.kernels.<op>."""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str:
    """The program `name` beside this Python, or on the PATH."""
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))
    return shutil.which(name, path=path) or name


class CMakeBuild(build_ext):
    """Runs CMake and puts the module where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DRLHF_FAST_OUTPUT={Path(self.get_ext_fullpath(ext.name)).resolve().parent}",
            f"-DRLHF_FAST_CUDA={os.environ.get('RLHF_FAST_CUDA', '')}",
        ]  # fmt: skip
        try:
            pybind11 = importlib.import_module("pybind11")
            configure.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
        except ImportError:
            pass  # CMake looks for a system-wide one
        subprocess.check_call([*configure, *shlex.split(os.environ.get("CMAKE_ARGS", ""))])
        subprocess.check_call([tool("cmake"), "--build", str(build)])


rooms = sorted(init.parent.name for init in (ROOT / "kernels").glob("*/__init__.py"))
os.chdir(ROOT)  # setuptools takes relative paths from the working directory
setup(
    packages=[
        *find_packages(include=["rlhf_fast", "rlhf_fast.*"]),
        *(f"rlhf_fast.kernels.{room}" for room in rooms),
    ],
    package_dir={f"rlhf_fast.kernels.{room}": f"kernels/{room}" for room in rooms},
    ext_modules=[Extension("rlhf_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
