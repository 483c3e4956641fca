"""The one thing pyproject.toml cannot say: two optional C++ libraries (src/linic/kernels/README.md).

Where no compiler is found the install goes on without them and plain torch does the work.
"""

import sys
from glob import glob

from setuptools import Extension, setup

KERNELS = "src/linic/kernels"
# Compiled with OpenMP but linked without: the symbols must come from the OpenMP library torch has loaded.
# A second one would bring a second pool of threads, and the two would spin against each other.
openmp = ["-fopenmp"] if sys.platform == "linux" else []
flags = [] if sys.platform == "win32" else ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi", *openmp]

setup(
    ext_modules=[
        Extension(
            f"linic.kernels.{name}",
            [f"{KERNELS}/{source}"],
            depends=glob(f"{KERNELS}/**/*.inc", recursive=True),
            extra_compile_args=flags,
            optional=True,
        )
        for name, source in (("_native", "native.cpp"), ("_exact", "exact/exact.cpp"))
    ]
)
