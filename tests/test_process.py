"""The process set-up, each case in a fresh process: it acts on state that cannot be taken back."""

import os
import pathlib
import platform
import subprocess
import sys

import pytest
from stretchysnake_kernels import process

KERNELS = pathlib.Path(process.__file__).parents[1]
LINUX_GLIBC = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def in_fresh_process(code, **environment):
    """Runs `code` with configure_cpu imported and these variables set; returns what it printed."""
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", process.OPT_OUT)}
    clean |= {"PYTHONPATH": str(KERNELS), "JAX_PLATFORMS": "cpu"} | environment
    code = "import os\nfrom stretchysnake_kernels import configure_cpu\n" + code
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_sets_up_once_and_jax_computes():
    width = 512 if process._has_avx512() else None
    out = in_fresh_process(
        "before = os.environ.get('XLA_FLAGS', '')\n"
        "first = configure_cpu()\n"
        "assert configure_cpu() is first\n"
        "import jax\n"
        "assert jax.jit(lambda v: v + 1)(1) == 2\n"
        "print(repr(before), first.allocator, first.vector_width, first.too_late)\n"
        "print(os.environ.get('XLA_FLAGS', '').count('prefer_vector_width'))"
    )
    assert out == f"'' {LINUX_GLIBC} {width} False\n{int(width is not None)}"


def test_opt_out_changes_nothing():
    out = in_fresh_process(
        "setup = configure_cpu()\n"
        "print(setup.allocator, setup.vector_width, 'XLA_FLAGS' in os.environ, *setup.notes)",
        STRETCHYSNAKE_NO_TUNING="1",
    )
    assert out == "False None False STRETCHYSNAKE_NO_TUNING is set: nothing was tuned."


def test_says_that_it_came_too_late():
    out = in_fresh_process(
        "import jax; jax.devices(); setup = configure_cpu()\n"
        "print(setup.too_late, setup.allocator, setup.vector_width, 'XLA_FLAGS' in os.environ)\n"
        "print(*setup.notes)"
    )
    assert out.startswith("True False None False\nJAX had already started its backend")


@pytest.mark.skipif(not LINUX_GLIBC, reason="the allocator is tuned on Linux with glibc alone")
def test_says_that_threads_came_first():
    out = in_fresh_process(
        "import threading\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "print(*configure_cpu().notes)"
    )
    assert "Other threads run already" in out
    assert "threads" not in in_fresh_process("print(*configure_cpu().notes)")


@pytest.mark.parametrize(
    "flag", ["--xla_cpu_prefer_vector_width=128", "--xla_cpu_enable_fast_math=false"]
)
def test_keeps_the_users_flags(flag):
    out = in_fresh_process("configure_cpu(); print(os.environ['XLA_FLAGS'])", XLA_FLAGS=flag)
    assert out.split()[0] == flag
    assert out.count(process.VECTOR_FLAG) <= 1


def test_import_changes_nothing():
    assert in_fresh_process("print('XLA_FLAGS' in os.environ)") == "False"


def test_other_systems_are_left_alone(monkeypatch):
    notes = []
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(process, "_expects_accelerator", lambda: False)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not process._tune_allocator(notes)
    assert notes == ["No glibc: allocator left alone."]


def test_accelerators_are_left_alone():
    out = in_fresh_process("print(*configure_cpu().notes)", JAX_PLATFORMS="cuda,cpu")
    assert "An accelerator is going to be used: allocator left alone." in out
