"""Builds the compiled core: one archive of kernels per instruction set, each with its own flags, and the bindings.

Everything about the distribution that is not compilation stands in pyproject.toml. All instruction sets of the
architecture are always compiled; which one runs is chosen at run time (native/README.md).
"""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_namespace_packages, setup
from setuptools.command.build_clib import build_clib

# -ffp-contract=off: the compiler must not fuse a product and a sum on its own, or the same kernel would round
# differently from one inlined copy to the next.
COMMON = ["-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra"]
KERNELS = [*COMMON, "-fno-exceptions", "-fno-rtti", "-fno-math-errno"]
ISA_FLAGS = {"scalar": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avxvnni"] = [*ISA_FLAGS["avx2"], "-mavxvnni"]
    # GCC 12's own AVX-512 header warns about the registers that it leaves undefined on purpose.
    ISA_FLAGS["avx512"] = [
        *ISA_FLAGS["avx2"],
        *["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"],
        *["-Wno-maybe-uninitialized", "-Wno-uninitialized"],
    ]
    ISA_FLAGS["avx512bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]

INCLUDES = ["native/include"]
# Extra flags for every file, such as -fsanitize=address (scripts/press/check_asan.sh).
EXTRA = os.environ.get("ROPEWALK_CFLAGS", "").split()

SOURCES = ("attention", "cache", "experts", "layer", "linear", "packed", "probe", "rows", "runtime")
HEADERS = [
    *(
        f"native/include/ropewalk/{name}.hpp"
        for name in ("cache", "kernels", "layer", "limits", "operations", "runtime", "tables")
    ),
    *(
        f"native/cpu/generic/{name}.inl.hpp"
        for name in (
            *("append", "attention", "attention_codes", "attention_floats", "attention_pairs", "attention_tile"),
            *("feed_forward", "functions", "hadamard", "kv_codes", "kv_pages", "layer_norm", "linear", "load"),
            *("low_rank", "pack", "prepare", "probe", "round", "rows", "softmax", "table"),
        )
    ),
    *(f"native/cpu/{isa}/verbs.inl.hpp" for isa in ("avx2", "avx512")),
    *(f"native/bindings/{name}.hpp" for name in ("caches", "checks", "computing", "experts", "layers", "linears")),
]


def kernel_library(isa: str, flags: list[str]) -> tuple[str, dict]:
    """One instruction set: its directory is its flags and its namespace."""
    return (
        f"ropewalk_{isa}",
        {
            "sources": [f"native/cpu/{isa}/table.cpp"],
            "include_dirs": INCLUDES,
            "cflags": [*KERNELS, *flags, *EXTRA],
            "obj_deps": {"": HEADERS},
        },
    )


class BuildLibraries(build_clib):
    """All instruction sets at the same time."""

    def build_libraries(self, libraries: list[tuple[str, dict]]) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(super().build_libraries, ([library] for library in libraries)))


core = Pybind11Extension(
    "ropewalk._core",
    sources=["native/bindings/core.cpp", *(f"native/cpu/{name}.cpp" for name in SOURCES)],
    include_dirs=INCLUDES,
    extra_compile_args=[*COMMON, *EXTRA],
    extra_link_args=["-pthread", *EXTRA],
    depends=HEADERS,
)

# The demo page lies at the top of the tree, and is a part of the package once it is installed.
PACKAGES = find_namespace_packages("loader_plugin", exclude=["ropewalk.gradio_demo*"])
DEMO = ["ropewalk.gradio_demo", *(f"ropewalk.gradio_demo.{name}" for name in find_namespace_packages("gradio_demo"))]

with ParallelCompile():
    setup(
        package_dir={"": "loader_plugin", "ropewalk.gradio_demo": "gradio_demo"},
        packages=[*PACKAGES, *DEMO],
        libraries=[kernel_library(isa, flags) for isa, flags in ISA_FLAGS.items()],
        ext_modules=[core],
        cmdclass={"build_clib": BuildLibraries},
    )
