"""Builds the selective scan's C++ kernels where there is a compiler; setup.cfg says the rest.

Nothing depends on them: without a compiler the installation goes on, and the scan is plain JAX.
"""

import hashlib
import importlib.util
import pathlib
import platform

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FOLDER = pathlib.Path("kernels/stretchysnake_kernels/selective_scan/native_cpp")
FLAGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-w",
]
AVX2 = ["-mavx2", "-mfma"]
# The kernels are compiled once for each set of instructions; the processor chooses at run time.
INSTRUCTIONS = {
    "x86_64": {
        "plain": [],
        "avx2": AVX2,
        "avx512": [*AVX2, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"],
    }
}


class BuildNative(build_ext):
    def build_extension(self, extension):
        """Compiles scan.cpp for each set of instructions, then ffi.cpp, and links them."""
        jaxlib = importlib.util.find_spec("jaxlib")
        if jaxlib is None:
            raise CompileError("jaxlib, whose headers the C++ kernels need, is not installed")
        sources = sorted(FOLDER.glob("*.[ch]pp"))
        digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]
        extension.define_macros = [("SOURCE_HASH", digest)]
        extension.include_dirs = [str(pathlib.Path(jaxlib.origin).parent / "include"), str(FOLDER)]
        extension.extra_compile_args = FLAGS
        extension.extra_objects = []
        for name, flags in INSTRUCTIONS.get(platform.machine(), {"plain": []}).items():
            extension.extra_objects += self.compiler.compile(
                [str(FOLDER / "scan.cpp")],
                output_dir=str(pathlib.Path(self.build_temp) / name),
                macros=[("ISA", name)],
                extra_postargs=["-fPIC", *FLAGS, *flags],
            )
            extension.define_macros.append((f"HAS_{name.upper()}", "1"))
        super().build_extension(extension)


setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[
        Extension(
            "stretchysnake_kernels.selective_scan._native",
            sources=[str(FOLDER / "ffi.cpp")],
            language="c++",
            optional=True,
        )
    ],
)
