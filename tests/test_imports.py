"""Who may import whom, read from the source; and every module can be imported."""

import ast
import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "stretchysnake_jax"
KERNELS = ROOT / "kernels" / "stretchysnake_kernels"
COMMANDS = {"train", "evaluate", "predict", "inspect", "demo", "bench", "cli", "compare"}
COMMANDS |= {
    "features",
    "retrieve",
    "probe_command",
    "ablate",
    "export",
    "report",
    "study",
    "finetune",
}
# module (or folder) -> what it may import of ours; modules that aren't listed may import anything
# but commands.
ALLOWED = {
    "whole_file": set(),
    "config": {"whole_file"},
    "validation": {"config"},
    "buckets": {"config"},
    "interpolation": set(),
    "sharding": {"config"},
    "compile": set(),
    "models": {"config", "models", "interpolation", "sharding"},
    "data": {"config", "buckets", "data", "clock", "whole_file", "cli"},
    "optim": {"config"},
    "flops": {"config", "buckets"},
    "mix": {"config", "sharding"},
    "step": {
        "config",
        "buckets",
        "compile",
        "distill",
        "interpolation",
        "mix",
        "models",
        "optim",
        "sharding",
    },
    "clock": set(),
    "metrics": {"config", "whole_file"},
    "cluster": {"config"},
    "distributed": {"cluster"},
    "checkpoint": {"clock", "config"},
}
# A command may use the words of another's command line, and the demo runs them all.
SHARED = {("predict", "evaluate"), ("inspect", "evaluate"), ("train", "cli"), ("inspect", "cli")}
SHARED |= {("demo", "train"), ("demo", "evaluate"), ("data", "cli"), ("compare", "evaluate")}
SHARED |= {(name, "evaluate") for name in ("features", "retrieve", "probe_command")}
SHARED |= {("probe_command", "cli"), ("export", "retrieve")}
SHARED |= {("finetune", name) for name in ("cli", "evaluate", "train", "probe_command")}
SHARED |= {("ablate", name) for name in ("cli", "evaluate", "train")}
SHARED |= {("efficiency_bench", "evaluate")}
SHARED |= {("study", "ablate")}
SHARED |= {("study_cell", "ablate"), ("study_cell", "train")}


def files():
    return sorted(PACKAGE.rglob("*.py"))


def imported(path):
    """The modules of ours that a file imports, by their name below the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def top(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_rules(path):
    ours = {name for name in imported(path) if name.split(".")[0] == "stretchysnake_jax"}
    modules = {p.relative_to(PACKAGE).with_suffix("").parts[0] for p in files()}
    used = {name.split(".")[1] for name in ours if "." in name} & modules
    name = top(path)
    if name in ALLOWED:
        assert used <= ALLOWED[name], f"{path} imports {used - ALLOWED[name]}"
    for command in used & COMMANDS - {name}:
        assert (name, command) in SHARED, f"{path} imports the command {command}"


def test_data_never_imports_jax_at_the_top():
    for path in (PACKAGE / "data").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in tree.body:
            if isinstance(node, ast.Import):
                assert not any(a.name.split(".")[0] == "jax" for a in node.names), path


def test_kernels_never_import_the_library():
    for path in [*KERNELS.rglob("*.py"), *(ROOT / "kernels" / "benchmarks").glob("*.py")]:
        names = {name.split(".")[0] for name in imported(path) if name}
        assert "stretchysnake_jax" not in names, path


def test_launch_holds_no_python():
    assert not list((ROOT / "launch").rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_can_be_imported(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    importlib.import_module(name.removesuffix(".__init__"))
