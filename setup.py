"""The one thing pyproject.toml cannot say: an optional C++ library (src/linic/kernels/README.md).

Where no compiler is found the install goes on without it and plain torch does the work.
"""

import sys

from setuptools import Extension, setup

KERNELS = "src/linic/kernels"
# Compiled with OpenMP but linked without: the symbols must come from the OpenMP library torch has loaded.
# A second one would bring a second pool of threads, and the two would spin against each other.
openmp = ["-fopenmp"] if sys.platform == "linux" else []
flags = [] if sys.platform == "win32" else ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi", *openmp]

setup(
    ext_modules=[
        Extension(
            "linic.kernels._native",
            [f"{KERNELS}/native.cpp"],
            depends=[f"{KERNELS}/simd.inc", f"{KERNELS}/biwkv/biwkv.inc", f"{KERNELS}/dwconv5/dwconv5.inc"],
            extra_compile_args=flags,
            optional=True,
        )
    ]
)
