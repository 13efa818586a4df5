"""Builds the C++ of the selective scan and of the loader where there is a compiler.

Nothing depends on it: without a compiler the installation goes on, the scan is plain JAX and frames
are resized by OpenCV. setup.cfg says the rest.
"""

import hashlib
import importlib.util
import pathlib
import platform

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FOLDER = pathlib.Path("kernels/stretchysnake_kernels/selective_scan/native_cpp")
AREA_RESIZE = pathlib.Path("stretchysnake_jax/data/area_resize.cpp")
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


def source_hash(paths) -> str:
    """What tells a library of other sources apart when it is loaded."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()[:16]


class BuildNative(build_ext):
    def build_extension(self, extension):
        """Compiles and links an extension."""
        if extension.sources == [str(AREA_RESIZE)]:
            # OpenCV's pixels take OpenCV's rounding: no sum of products in one step.
            extension.extra_compile_args = [*FLAGS, "-ffp-contract=off"]
            extension.define_macros = [("SOURCE_HASH", source_hash([AREA_RESIZE]))]
        else:
            self.prepare_scan(extension)
        super().build_extension(extension)

    def prepare_scan(self, extension):
        """Compiles scan.cpp for each set of instructions, to be linked with ffi.cpp."""
        jaxlib = importlib.util.find_spec("jaxlib")
        if jaxlib is None:
            raise CompileError("jaxlib, whose headers the C++ kernels need, is not installed")
        extension.define_macros = [("SOURCE_HASH", source_hash(sorted(FOLDER.glob("*.[ch]pp"))))]
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


setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[
        Extension(
            "stretchysnake_kernels.selective_scan._native",
            sources=[str(FOLDER / "ffi.cpp")],
            language="c++",
            optional=True,
        ),
        Extension(
            "stretchysnake_jax.data._area_resize",
            sources=[str(AREA_RESIZE)],
            language="c++",
            optional=True,
        ),
    ],
)
