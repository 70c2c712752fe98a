"""Compiles csrc/ into the package and lists the packages; everything else is in pyproject.toml.

The library has a plain C interface, called through ctypes, so the wheel is py3-none-<platform>. Without a working C++
compiler the package is installed without the CPU engine, and says so when it is used.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# The flags of csrc/Makefile. Each source file chooses its instruction set; the program chooses among them as it runs.
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off"]
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]


class BuildLibrary(build_ext):
    """Builds a plain shared library, cna_kernels/cpu/libcna.so, with OpenMP where the compiler has it."""

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + (".dylib" if sys.platform == "darwin" else ".so")

    def get_export_symbols(self, ext):
        return []

    def build_extension(self, ext):
        compile_one = self.compiler.compile

        def compile_all(sources, **settings):
            """As many sources at a time as there are cores: each takes seconds."""
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda source: compile_one([source], **settings), sources))
            return [name for names in objects for name in names]

        self.compiler.compile = compile_all
        for openmp in dict.fromkeys((tuple(OPENMP), ())):
            ext.extra_compile_args = [*FLAGS, *QUIET, *openmp]
            ext.extra_link_args = list(openmp)
            try:
                return super().build_extension(ext)
            except Exception as error:
                if not openmp:
                    raise
                print(f"csrc: no OpenMP ({error}); building for one thread", file=sys.stderr)


class PlainWheel(bdist_wheel):
    """Tags the wheel for a platform, not for a version of Python: the library does not depend on that version."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


packages = ["cna_kernels", *(f"cna_kernels.{name}" for name in find_packages("cna_kernels"))]
model = find_packages("model", exclude=["demo.checkpoints"])  # demo.checkpoints is another distribution
packages += ["cna_kernels.model", *(f"cna_kernels.model.{name}" for name in model)]
sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
headers = sorted(str(path) for path in Path("csrc").glob("*.h"))
library = Extension("cna_kernels.cpu.libcna", sources, depends=headers, language="c++", optional=True)
setup(
    packages=sorted({*packages}),
    ext_modules=[] if sys.platform == "win32" else [library],  # csrc needs POSIX
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlainWheel},
)
