"""Assembles PTX without a GPU and reads the machine code (SASS): registers, spills, loops.

    print(measure(kernel.ptx))

The assembler and the disassembler come in the triton wheel.
"""

import collections
import dataclasses
import importlib.util
import pathlib
import re
import subprocess
import tempfile

from stretchysnake_bench.aot import INSTALL, AotUnavailable, CompiledKernel


@dataclasses.dataclass(frozen=True)
class Loop:
    """An innermost loop of the machine code, which the assembler may have unrolled.

    To compare loops, divide by what a token needs once, such as the stores of an output (STG).

    Attributes:
      opcodes: instruction with its modifiers (LDG.E.U16, MUFU.EX2) -> how often it stands in the
        body.
    """

    opcodes: collections.Counter

    @property
    def instructions(self) -> collections.Counter:
        """Mnemonic (FFMA, MUFU, SHFL, BAR, LDS, ...) -> how often it stands in the body."""
        counts = collections.Counter()
        for opcode, count in self.opcodes.items():
            counts[opcode.split(".")[0]] += count
        return counts

    @property
    def total(self) -> int:
        return self.opcodes.total()


@dataclasses.dataclass(frozen=True)
class Resources:
    """What the assembler gives a kernel.

    Attributes:
      registers: of a thread.
      spill_stores, spill_loads, stack: bytes of a thread.
      static_shared: bytes of a program, the dynamic ones not counted.
      loops: innermost loops in the order of the machine code.
      sass: the machine code.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    static_shared: int
    loops: list[Loop]
    sass: str = dataclasses.field(repr=False)

    @property
    def main_loop(self) -> Loop:
        """The longest innermost loop; an empty one for a kernel without loops."""
        return max(self.loops, key=lambda loop: loop.total, default=Loop(collections.Counter()))


def measure(kernel: CompiledKernel | str) -> Resources:
    """Assembles a kernel (or a PTX text) and reads registers, spills and loops.

    Raises:
      AotUnavailable: triton, which brings the assembler, is missing.
      RuntimeError: the assembler refuses the text.
    """
    ptx = kernel if isinstance(kernel, str) else kernel.ptx
    architecture = re.search(r"\.target\s+(\w+)", ptx)
    if architecture is None:
        raise ValueError("measure: the PTX has no .target line")
    # The folder has two assemblers; the one named after Blackwell is newer and takes all targets.
    assembler = next(p for n in ("ptxas-blackwell", "ptxas") if (p := _tools() / n).exists())
    with tempfile.TemporaryDirectory() as folder:
        source, binary = pathlib.Path(folder, "k.ptx"), pathlib.Path(folder, "k.cubin")
        source.write_text(ptx)
        log = _call(assembler, "-v", f"-arch={architecture[1]}", source, "-o", binary)
        sass = _call(_tools() / "nvdisasm", "-c", binary)

    def number(pattern):
        match = re.search(pattern, log)
        return int(match[1]) if match else 0

    return Resources(
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes spill stores"),
        number(r"(\d+) bytes spill loads"),
        number(r"(\d+) bytes stack frame"),
        number(r"(\d+) bytes smem"),
        _loops(sass),
        sass,
    )


def _tools() -> pathlib.Path:
    spec = importlib.util.find_spec("triton")
    if spec is None:
        raise AotUnavailable(f"the assembler comes with triton: {INSTALL}")
    return pathlib.Path(spec.submodule_search_locations[0], "backends", "nvidia", "bin")


def _call(*command) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0].name}: {(done.stderr or done.stdout).strip()}")
    return done.stdout + done.stderr


def _loops(sass: str) -> list[Loop]:
    """Finds the backward branches; a loop that holds another one is left out."""
    code, labels, spans = [], {}, []
    for line in sass.splitlines():
        if match := re.match(r"\s*(\.L_x_\d+):", line):
            labels[match[1]] = len(code)
        elif match := re.match(
            r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*[\w.]*)\s*([^;]*);", line
        ):
            target = re.search(r"\.L_x_\d+", match[2]) if match[1].startswith("BRA") else None
            if target and labels.get(target[0], len(code)) < len(code):
                spans.append((labels[target[0]], len(code)))
            code.append(match[1])
    inner = [
        (a, b)
        for a, b in sorted(set(spans))
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)
    ]
    return [Loop(collections.Counter(code[a : b + 1])) for a, b in inner]
