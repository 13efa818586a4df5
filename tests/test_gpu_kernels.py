"""What `stretchysnake bench kernels` proves of the compiled GPU kernels, as tests.

The PTX runs in the emulator; nothing here needs a GPU, only the packages of the extra [aot].
"""

import functools
import json
import pathlib
import subprocess
import sys

import jax
import jax.export
import pytest
from stretchysnake_bench import aot, kernels_table, proof
from stretchysnake_kernels.selective_scan import api, gpu

needs_compiler = pytest.mark.skipif(
    aot.missing_packages() is not None, reason=str(aot.missing_packages())
)
# A few in every run: implementation and GPU.
FAST = {("pallas", "9.0")}


def cases(items, fast, title):
    """Test parameters: every item for every implementation and GPU, slow but for some."""
    return [
        pytest.param(
            implementation,
            item,
            target,
            id=f"{implementation}-{target}-{title(item)}",
            marks=[] if fast(implementation, item, target) else pytest.mark.slow,
        )
        for implementation, found in items.items()
        for item in found
        for target in kernels_table.WHOLE
        if implementation != "mosaic_gpu" or target == "9.0"
    ]


@needs_compiler
@pytest.mark.parametrize(
    "implementation, case, target",
    cases(
        dict.fromkeys(proof.EMULATED, proof.CASES),
        lambda i, case, target: (i, target) in FAST and case.title == "length 37, both",
        lambda case: case.title,
    ),
)
def test_ptx_computes_the_reference(implementation, case, target):
    assert proof.check_case(implementation, case, target)["misses"] == []


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    "implementation, launch, target",
    cases(
        # Mosaic's are compiled in test_mosaic_scan.py, in a process for each.
        {name: proof.launches(name) for name in proof.EMULATED},
        lambda i, launch, target: (
            (i, target) in FAST and launch.title in ("forward, keeping checkpoints", "backward")
        ),
        lambda launch: launch.title,
    ),
)
def test_resources(implementation, launch, target):
    row = proof.measure_launch(implementation, launch, target)
    assert row["misses"] == []
    assert row["registers"] > 32 and row["mufu"] >= launch.states / 2  # something was measured


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("target", ["8.6", "8.9", "10.0", "12.0"])
@pytest.mark.parametrize("implementation", proof.EMULATED)
def test_resources_of_the_forward_kernels_on_other_gpus(implementation, target):
    for launch in proof.launches(implementation, backward=False):
        row = proof.measure_launch(implementation, launch, target)
        # At even lengths the kernels take more than on 8.0 and 9.0, within the other gate.
        assert set(row["misses"]) <= {f"registers <= {proof.EVEN_REGISTERS}"}
        assert row["registers"] <= proof.FORWARD_REGISTERS


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    "implementation, target",
    [
        ("pallas", "9.0"),
        pytest.param("pallas", "8.0", marks=pytest.mark.slow),
        pytest.param("triton", "8.0", marks=pytest.mark.slow),
        pytest.param("triton", "9.0", marks=pytest.mark.slow),
    ],
)
def test_traffic(implementation, target):
    rows = proof.measure_traffic(implementation, target)
    assert [row["misses"] for row in rows] == [[], []]
    assert all(row["times_least"] > 0.9 for row in rows)  # something was counted


@needs_compiler
@pytest.mark.parametrize("implementation", proof.EMULATED)
def test_export_without_the_gpu(implementation):
    case = proof.Case("", 8)
    shapes = jax.tree.map(
        lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype), proof.draw(case)
    )

    @jax.jit
    def gradients(args, cotangents):
        with gpu.compile_for(aot.find_gpu("9.0")):
            remat = jax.checkpoint(functools.partial(proof.run, case, implementation))
            return remat(args, cotangents)

    with aot.as_if_on(aot.target_device("9.0")):
        exported = jax.export.export(
            gradients, platforms=["cuda"], disabled_checks=api.export_checks()
        )(*shapes)
    assert exported.platforms == ("cuda",)
    assert exported.mlir_module().count("stablehlo.custom_call @") >= 2


# The command


def command(*argv):
    code = "import sys; from stretchysnake_jax.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, "bench", "kernels", *argv], capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--targets", "9.1"], "--targets has 9.1, takes some of 7.5, 8.0"),
        (["--implementations", "cuda"], "--implementations has cuda, takes some of pallas"),
        (["--json", "no/folder/x.json"], "but there is no folder no/folder"),
    ],
)
def test_bad_options(argv, message):
    done = command(*argv)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.skipif(aot.missing_packages() is None, reason="[aot] is installed")
def test_says_what_to_install():
    done = command()
    assert done.returncode == 1
    assert "pip install 'stretchysnake-jax[aot]'" in done.stderr


def test_a_row_that_misses_says_so():
    row = {"implementation": "pallas", "target": "9.0", "case": "length 1", "outputs": 1e-3}
    text = kernels_table.format_table("parity", [row | {"misses": ["outputs <= 2e-06"]}])
    assert text.splitlines()[-1] == (
        "| pallas | 9.0 | length 1 | 1.0e-03 | - | - | outputs <= 2e-06 |"
    )


@needs_compiler
@pytest.mark.slow
def test_the_command_writes_table_and_json(tmp_path):
    path = pathlib.Path(tmp_path, "proof.json")
    done = command("--quick", "--targets", "9.0", "--implementations", "pallas", "--json", path)
    assert done.returncode == 0, done.stderr
    assert "| pallas | 9.0 | backward |" in done.stdout
    result = json.loads(path.read_text())
    assert [row["case"] for row in result["parity"]] == list(proof.QUICK)
