"""Compiles for GPUs that are not there: kernels, their resources, whole programs, and their runs.

    program = compile_for(step, state, batch, target="9.0")   # memory, HLO, every kernel
    for kernel in kernels_of(f, x, target="8.0"):             # the kernels that f calls
        print(kernel.name, sass.measure(kernel))

Kernels go through the whole of XLA: its LLVM passes change what Triton's compiler gives.
Needs the CUDA plugin of JAX without NVIDIA's libraries, and triton for its assembler; no GPU and no
driver: pip install 'stretchysnake-jax[aot]'. Import this module before JAX looks for devices, or
set JAX_PLATFORMS=cpu, and JAX does not complain about the missing libraries.
"""

import atexit
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import math
import os
import pathlib
import re
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping

# Read by the CUDA plugin of JAX: do not ask for cuDNN and the other libraries.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
from jax.api_util import shaped_abstractify
from jax.experimental import topologies
from jax.extend import core as jax_core
from stretchysnake_bench.ptx_emulator import Kernel
from stretchysnake_kernels.selective_scan import gpu

# Compute capability -> the device whose description is in targets/.
TARGETS = {
    "7.5": "t4",
    "8.0": "a100",
    "8.6": "a10",
    "8.9": "l4",
    "9.0": "h100",
    "10.0": "b200",
    "12.0": "rtx_pro_6000",
}
INSTALL = "pip install 'stretchysnake-jax[aot]'"
# Without a CUDA toolkit, Triton's assembler serves XLA and Triton, but Mosaic GPU wants more of it.
TOOLKIT = shutil.which("ptxas") is not None
LAUNCH = re.compile(
    r"\] (\S+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), (\d+), (\d+)\]\s+"
    r"shared_memory: (\d+)"
)
PALLAS_NAME = re.compile(r'custom_call_target="__gpu\$xla\.gpu\.triton".*?[{ ]name = "([^"]+)"')


class AotUnavailable(RuntimeError):
    """A package that ahead-of-time compilation needs is not installed; says what to install."""


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """One kernel as it will be launched.

    Attributes:
      name: of its entry point in `ptx`.
      ptx: the text.
      grid: programs along x, y and z.
      threads: of a program.
      shared_bytes: dynamic shared memory of a program.
      from_pallas: whether we wrote it; else XLA did.
    """

    name: str
    ptx: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    from_pallas: bool

    @functools.cached_property
    def parsed(self) -> Kernel:
        return Kernel(self.ptx, self.name)


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A jitted function compiled for a GPU.

    Attributes:
      kernels: those of XLA and of Triton, in the order of launch.
      mosaic: name -> PTX of the kernels of Mosaic GPU.
      hlo: the text of the program after fusion.
      temp_bytes, argument_bytes, output_bytes: device memory, as XLA assigned it.
    """

    kernels: list[CompiledKernel]
    mosaic: dict[str, str]
    hlo: str
    temp_bytes: int
    argument_bytes: int
    output_bytes: int

    def pallas_kernels(self) -> list[CompiledKernel]:
        return [kernel for kernel in self.kernels if kernel.from_pallas]


def missing_packages() -> str | None:
    """Returns one sentence that says what to install, or None where all is there."""
    missing = [
        name
        for name, module in (
            ("jax-cuda13-plugin", "jax_cuda13_plugin"),
            ("jax-cuda13-pjrt", "jax_plugins.xla_cuda13"),
            ("triton", "triton"),
        )
        if importlib.util.find_spec(module.split(".")[0]) is None
        or importlib.util.find_spec(module) is None
    ]
    if not missing:
        return None
    return (
        f"ahead-of-time compilation needs {', '.join(missing)}: {INSTALL} (or, without NVIDIA's "
        f"libraries, pip install --no-deps jax-cuda13-plugin=={jax.__version__} "
        f"jax-cuda13-pjrt=={jax.__version__}, then pip install triton)"
    )


@functools.cache
def target_device(target: str):
    """Returns the description of a GPU as a JAX device to compile for.

    Args:
      target: a compute capability such as "9.0", or a name in targets/ such as "h100".

    Raises:
      AotUnavailable: a package is missing.
      ValueError: no such target.
    """
    if reason := missing_packages():
        raise AotUnavailable(reason)
    describe = functools.partial(
        topologies.get_topology_desc,
        platform="cuda",
        topology_name="",
        topology="1x1x1",
        target_config=_description(target),
    )
    jax.devices()  # JAX looks for plugins here
    try:
        return describe().devices[0]
    except NotImplementedError:
        # JAX looked before this module told the plugin not to ask for libraries.
        importlib.import_module("jax_plugins.xla_cuda13").initialize()
        return describe().devices[0]


@functools.cache
def _cuda_options() -> dict[str, str]:
    """Compiler options that give XLA Triton's assembler and library where no CUDA is installed."""
    if TOOLKIT:
        return {}
    (triton,) = importlib.util.find_spec("triton").submodule_search_locations
    source = pathlib.Path(triton, "backends", "nvidia")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="stretchysnake-cuda-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # The one named after Blackwell is newer and takes all targets; XLA knows one name only.
    names = ("ptxas-blackwell", "ptxas")
    assembler = next(path for name in names if (path := source / "bin" / name).exists())
    library = source / "lib" / "libdevice.10.bc"
    for link, path in (("bin/ptxas", assembler), ("nvvm/libdevice/libdevice.10.bc", library)):
        (folder / link).parent.mkdir(parents=True)
        (folder / link).symlink_to(path)
    # JAX's own lowering of Triton calls looks on the path.
    os.environ["PATH"] = os.pathsep.join([str(folder / "bin"), os.environ.get("PATH", "")])
    return {"xla_gpu_cuda_data_dir": str(folder)}


def capability_of(target: str) -> str:
    """Returns the compute capability of a target."""
    names = {name: capability for capability, name in TARGETS.items()}
    if target not in TARGETS and target not in names:
        known = [f"{capability} ({name})" for capability, name in TARGETS.items()]
        raise ValueError(f"target is {target!r}, takes one of {', '.join(known)}")
    return names.get(target, target)


def _description(target: str) -> str:
    name = TARGETS[capability_of(target)]
    return (pathlib.Path(__file__).parent / "targets" / f"{name}.txtpb").read_text()


def device_memory(target: str) -> int:
    """Returns the bytes of memory of the device in targets/."""
    return int(re.search(r"device_memory_size: (\d+)", _description(target))[1])


def find_gpu(target: str) -> gpu.Target:
    """Returns what to trace for, with the multiprocessors of the device in targets/.

    Raises:
      ValueError: no such target.
    """
    capability = tuple(int(part) for part in capability_of(target).split("."))
    return gpu.Target(capability, int(re.search(r"core_count: (\d+)", _description(target))[1]))


def as_if_on(device):
    """A context in which Pallas lowers for `device`. JAX 0.10 lowers alike for every GPU."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    kind = jax.sharding.AbstractDevice(
        device_kind=device.device_kind, num_cores=None, platform="gpu"
    )
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=kind))


def compile_for(
    function: Callable,
    *args,
    target: str = "9.0",
    compiler_options: Mapping[str, object] | None = None,
) -> CompiledProgram:
    """Compiles `function(*args)` for a GPU that is not there.

    Args:
      function: a function of arrays, jitted or not.
      *args: trees of arrays or of `jax.ShapeDtypeStruct`.
      target: a compute capability such as "9.0", or a name in targets/ such as "h100".
      compiler_options: of XLA. {"xla_gpu_fail_ptx_compilation_on_register_spilling": True} makes
        a spill an error.

    Raises:
      AotUnavailable: a package is missing.
      ValueError: no such target.
      jax.errors.JaxRuntimeError: XLA does not compile it.
    """
    lowered = _lower(function, args, target)
    with tempfile.TemporaryDirectory() as folder, _not_cached(), _mosaic_dump(folder):
        # "ptx" makes newer releases write the kernels too; a wider pattern takes seconds more.
        dump = _cuda_options() | {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        # What users get, whatever XLA_FLAGS say here.
        effort = {"xla_backend_optimization_level": 3}
        compiled = lowered.compile(compiler_options=effort | dict(compiler_options or {}) | dump)
        hlo, memory = compiled.as_text(), compiled.memory_analysis()
        ours = set(PALLAS_NAME.findall(hlo))
        kernels, mosaic = _read_dump(pathlib.Path(folder), ours)
    return CompiledProgram(
        kernels,
        mosaic,
        hlo,
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
    )


def _read_dump(folder: pathlib.Path, ours: set[str]):
    """Returns the kernels that XLA launches, and the PTX of Mosaic's."""
    entries = {}
    for path in sorted(folder.rglob("*.ptx")):
        text = path.read_text()
        for name in re.findall(r"\.entry\s+([\w$]+)", text):
            entries[name] = text
    kernels = []
    for path in folder.glob("*thunk_sequence.txt"):
        for name, *numbers in LAUNCH.findall(path.read_text()):
            if name not in entries:
                continue  # of a library
            x, y, z, *threads, shared = map(int, numbers)
            known = name in ours or re.sub(r"_+\d+$", "", name) in ours  # XLA numbers namesakes
            kernels.append(
                CompiledKernel(name, entries[name], (x, y, z), math.prod(threads), shared, known)
            )
    launched = {kernel.name for kernel in kernels}
    return kernels, {name: text for name, text in entries.items() if name not in launched}


@contextlib.contextmanager
def _mosaic_dump(folder):
    """Lets Mosaic write its kernels into `folder`; it takes that from the environment only."""
    names = {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTX": "1"}
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(names)
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _not_cached():
    """Keeps JAX from caching on disk what it could not load without a GPU."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


def _lower(function, args, target, keep_unused=False):
    device = target_device(target)
    sharding = jax.sharding.SingleDeviceSharding(device)

    def place(leaf):
        shape = shaped_abstractify(leaf)
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    with as_if_on(device):
        return jax.jit(function, keep_unused=keep_unused).lower(*jax.tree.map(place, args))


def kernels_of(function: Callable, *args, target: str = "9.0") -> list[CompiledKernel]:
    """Compiles the kernels that `function(*args)` calls, in the order in which they stand there.

    Takes arguments and raises as `emulate`; kernels inside of loops and branches are found too.
    """
    closed = jax.make_jaxpr(function)(*args)
    return [kernel_of(eqn, target)[0] for eqn in find_kernels(closed.jaxpr)]


_KERNELS: dict[tuple[str, str], tuple[CompiledKernel, list]] = {}


def kernel_of(eqn, target) -> tuple[CompiledKernel, list]:
    """Compiles the kernel of one call; returns it and its parameters, None for each array."""
    params = dict(eqn.params)
    if "compute_capability" in params:  # of jax_triton, which compiles when it lowers
        params["compute_capability"] = int(capability_of(target).replace(".", ""))

    def call(*operands):
        return eqn.primitive.bind(*operands, **params)

    operands = tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars)
    lowered = _lower(call, operands, target, keep_unused=True)
    key = lowered.as_text(), target
    if key not in _KERNELS:
        if eqn.primitive.name == "triton_kernel_call":
            _KERNELS[key] = _read_triton_call(lowered.compiler_ir("stablehlo").operation)
        else:
            kernels = compile_for(call, *operands, target=target).pallas_kernels()
            if len(kernels) != 1:
                raise NotImplementedError(
                    f"a pallas_call gave {len(kernels)} Triton kernels, only those are read"
                )
            _KERNELS[key] = kernels[0], [None] * (len(operands) + len(eqn.outvars))
    return _KERNELS[key]


def _read_triton_call(module) -> tuple[CompiledKernel, list]:
    """Reads the PTX that jax_triton put into a custom call (message TritonAnyKernelCall of XLA)."""
    from jax.extend.mlir import ir

    attribute = _find_custom_call(module).attributes
    if "mhlo.backend_config" in attribute:
        config = ir.DictAttr(attribute["mhlo.backend_config"])["opaque"]
    else:
        config = attribute["backend_config"]
    message = _read_message(zlib.decompress(ir.StringAttr(config).value_bytes))
    if 1 not in message:
        raise NotImplementedError("an autotuned Triton kernel cannot be read: give one config")
    call = _read_message(message[1][0])
    kernel = _read_message(call[1][0])
    parameters = []
    for parameter in call.get(5, []):
        ((kind, (value,)),) = _read_message(parameter).items()
        if kind == 1 and any(_read_message(value).get(1, [])):
            raise NotImplementedError("a Triton kernel with zeroed outputs cannot be emulated")
        parameters.append(None if kind == 1 else value)
    name, text = kernel[1][0].decode(), kernel[4][0].decode()
    grid = tuple(call[k][0] for k in (2, 3, 4))
    shared = kernel.get(3, [0])[0]
    return CompiledKernel(name, text, grid, 32 * kernel[2][0], shared, True), parameters


def _find_custom_call(operation):
    for inner in (op.operation for r in operation.regions for b in r.blocks for op in b.operations):
        if inner.name == "stablehlo.custom_call":
            return inner
        if found := _find_custom_call(inner):
            return found
    return None


def _read_message(data: bytes) -> dict[int, list]:
    """Reads the wire format of protocol buffers: field number -> values."""
    fields, at = {}, 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte, at = data[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            value = varint()
            value -= (value >> 63) << 64  # negative numbers take 64 bits
        else:
            size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            value, at = data[at : at + size], at + size
            if kind != 2:
                (value,) = struct.unpack({1: "<d", 5: "<f"}[kind], value)
        fields.setdefault(number, []).append(value)
    return fields


def is_kernel(eqn):
    return eqn.primitive.name in ("pallas_call", "triton_kernel_call")


def inner_jaxprs(eqn):
    """The jaxprs among the parameters of an equation."""
    kinds = jax_core.Jaxpr | jax_core.ClosedJaxpr
    leaves = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: isinstance(x, kinds))
    return [leaf for leaf in leaves if isinstance(leaf, kinds)]


def find_kernels(jaxpr) -> list:
    """The equations that call kernels, those in inner jaxprs too."""
    found = []
    for eqn in jaxpr.eqns:
        found += [eqn] if is_kernel(eqn) else []
        for inner in [] if is_kernel(eqn) else inner_jaxprs(eqn):
            found += find_kernels(inner)
    return found
