"""Set-up of a process that runs JAX on the CPU: for commands to call, never done on import."""

import ctypes
import dataclasses
import os
import pathlib
import platform
import sys
import threading

OPT_OUT = "STRETCHYSNAKE_NO_TUNING"
VECTOR_FLAG = "xla_cpu_prefer_vector_width"

# XLA:CPU takes one block for a program's temporaries at every call. glibc maps and unmaps blocks of
# that size, so each call pays a page fault per 4 KiB of memory; these settings make it keep them.
# All four are needed: XLA's worker threads use arenas capped at 64 MiB (hence one arena), and a
# large positive trim threshold is silently ignored for blocks above 2 GiB (hence -1, never).
_MALLOPT = (
    (-8, 1),  # M_ARENA_MAX
    (-4, 0),  # M_MMAP_MAX
    (-1, -1),  # M_TRIM_THRESHOLD
    (-2, 64 << 20),  # M_TOP_PAD, bytes
)


@dataclasses.dataclass(frozen=True)
class CpuSetup:
    """What `configure_cpu` did.

    Attributes:
      allocator: whether the allocator now keeps freed memory (peak use may grow by a fifth).
      vector_width: bits asked of XLA through XLA_FLAGS; None where nothing was asked.
      too_late: whether JAX had started its backend before the call, so that nothing was changed.
      notes: one sentence for each thing that was left alone, and why.
    """

    allocator: bool = False
    vector_width: int | None = None
    too_late: bool = False
    notes: tuple[str, ...] = ()


_done: CpuSetup | None = None


def configure_cpu() -> CpuSetup:
    """Tunes the memory allocator and XLA's vector width for JAX on the CPU, once per process.

    Call it before JAX computes anything and before any thread is started: with the memory of two
    threads a training step of a small model took 1.4 to 1.7 times as long. It changes nothing where
    STRETCHYSNAKE_NO_TUNING is set to anything but "" or "0", leaves XLA_FLAGS as the user set them,
    and tunes the allocator only on Linux with glibc and where no accelerator is going to be used.

    Returns:
      What was done. Later calls return what the first one did.
    """
    global _done
    if _done is None:
        _done = _configure()
    return _done


def _configure() -> CpuSetup:
    if os.environ.get(OPT_OUT, "") not in ("", "0"):
        return CpuSetup(notes=(f"{OPT_OUT} is set: nothing was tuned.",))
    if _backend_started():
        late = "JAX had already started its backend: too late for XLA_FLAGS and the allocator."
        return CpuSetup(too_late=True, notes=(late,))
    notes: list[str] = []
    width = _ask_vector_width(notes)
    return CpuSetup(allocator=_tune_allocator(notes), vector_width=width, notes=tuple(notes))


def _backend_started() -> bool:
    if "jax" not in sys.modules:
        return False
    try:  # JAX has no public name for this question
        from jax._src import xla_bridge

        return bool(xla_bridge.backends_are_initialized())
    except (ImportError, AttributeError):
        return False


def _ask_vector_width(notes: list[str]) -> int | None:
    flags = os.environ.get("XLA_FLAGS", "")
    if VECTOR_FLAG in flags:
        notes.append(f"XLA_FLAGS already sets {VECTOR_FLAG}: kept.")
        return None
    if not _has_avx512():
        notes.append(f"No AVX-512: {VECTOR_FLAG} left at XLA's default.")
        return None
    os.environ["XLA_FLAGS"] = f"{flags} --{VECTOR_FLAG}=512".strip()
    return 512


def _has_avx512() -> bool:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return "avx512f" in flags.split()


def _tune_allocator(notes: list[str]) -> bool:
    if _expects_accelerator():
        notes.append("An accelerator is going to be used: allocator left alone.")
        return False
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        notes.append("No glibc: allocator left alone.")
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        notes.append("glibc without mallopt: allocator left alone.")
        return False
    if threading.active_count() > 1:  # theirs are arenas that one arena at most can't undo
        notes.append("Other threads run already: the allocator may keep less memory than it could.")
    if not all([mallopt(option, value) for option, value in _MALLOPT]):
        notes.append("mallopt refused a setting: allocator tuned in part.")
        return False
    return True


def _expects_accelerator() -> bool:
    """Guesses, without starting a backend, whether JAX is going to run on something else."""
    chosen = os.environ.get("JAX_PLATFORMS", "")
    if "jax" in sys.modules:
        chosen = getattr(sys.modules["jax"].config, "jax_platforms", None) or chosen
    if chosen:
        return chosen.split(",")[0] != "cpu"
    return any(os.path.exists(node) for node in ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0"))
