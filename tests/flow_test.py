"""Who may import whom: read from the source with `ast`, so that an import inside a function counts.

The flow of design is one way: text -> hypermodel -> adapters -> T5 -> loss, checkpoint, export.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent

# A module imports from lines above its own, or from its own package. A new module goes into the
# highest line that has all it needs above it.
LAYERS = [
    ["hyper_t5", "quiet", "relay"],
    ["errors"],
    ["distributed"],
    ["overrides"],
    ["chips", "files", "tensors"],
    [
        "hosts",
        "vocab",
        "optim",
        "metrics",
        "guard",
        "watch",
        "scores",
        "checkpoint",
        "plots",
        "losses",
        "hlo",
        "bpe",
        "submission",
        "intervals",
        "documents",
        "kits",
    ],
    ["adapters", "taskfile", "protocols"],
    ["prompts", "packing", "records", "sharding", "adapter_stats", "changes"],
    ["t5", "text", "episodes"],
    ["judged"],
    ["hypermodels", "decoding", "names", "tasks", "answers"],
    ["engine"],
    ["weights", "config"],
    ["workdir", "data"],
    ["model"],
    ["cost", "export", "tuning", "ranking"],
    ["given"],
    ["configs", "train", "evaluate", "serve"],
    ["predict", "robustness"],
    ["report"],
    ["describe_show", "plan"],
    ["describe", "build", "plan_tables", "flops_tables"],
    ["reproduce"],
    ["seqio_tasks"],
    ["quickstart", "bench"],
    ["learning_curves", "study"],
    ["cli"],
    ["__main__"],
]
TENSORFLOW = {"tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio"}
TORCH = {"torch", "transformers", "peft", "accelerate"}
# Seconds or hundreds of MB each: only ever imported inside the function that needs it.
LAZY = {*TENSORFLOW, *TORCH, "matplotlib", "tensorstore", "rouge_score", "tensorboardX"}
HEAVY = {*LAZY, "jax", "jaxlib", "flax", "optax", "orbax", "numpy"}


def sources() -> dict[str, Path]:
    """Installed name of each module -> its file."""
    found = {}
    for folder, package in {"hyper_t5": "", "tasks": "hyper_t5.", "configs": "hyper_t5."}.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            path = file.relative_to(ROOT).with_suffix("")
            found[(package + ".".join(path.parts)).removesuffix(".__init__")] = file
    return found


SOURCES = sources()


def names_of(node: ast.AST) -> Iterator[str]:
    """What one import statement, or a call of `importlib.import_module`, imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "a relative import"
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            yield full if full in SOURCES else str(node.module)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        yield from (str(x.value) for x in node.args if isinstance(x, ast.Constant))


@functools.cache
def imports(module: str, everywhere: bool = True) -> frozenset[str]:
    """What a module imports; not `everywhere`: only what importing it imports."""
    tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else tree.body
    return frozenset(name for node in nodes for name in names_of(node))


def room(module: str) -> str:
    """The part of the program that a module belongs to: a file, or a package."""
    return module.split(".")[1] if "." in module else module


def outside(module: str, everywhere: bool = True) -> set[str]:
    """Top-level names of what a module imports that is not ours."""
    return {name.split(".")[0] for name in imports(module, everywhere)} - {"hyper_t5"}


def reached(module: str) -> set[str]:
    """Our modules that importing this one imports, itself and its packages included."""
    found: set[str] = set()
    waiting = {module}
    while waiting:
        name = waiting.pop()
        found.add(name)
        parents = {name.rpartition(".")[0]} & SOURCES.keys()
        waiting |= ((imports(name, everywhere=False) & SOURCES.keys()) | parents) - found
    return found


def test_the_walk_sees_what_there_is() -> None:
    assert {"hyper_t5.t5", "hyper_t5.hypermodels.heads", "hyper_t5.tasks.common"} <= SOURCES.keys()
    assert "hyper_t5.configs.mtf" in SOURCES
    assert "hyper_t5.serve" in imports("hyper_t5.cli")
    assert "hyper_t5.serve" not in imports("hyper_t5.cli", everywhere=False)
    assert "hyper_t5.tasks.text" in imports("hyper_t5.data")
    assert "hyper_t5.t5" in reached("hyper_t5.serve")


@pytest.mark.parametrize("module", SOURCES)
def test_no_import_points_upstream(module: str) -> None:
    layer = {name: i for i, names in enumerate(LAYERS) for name in names}
    assert room(module) in layer, "a new module: say in LAYERS where it stands"
    everywhere = module != "hyper_t5"  # what the package offers by name it imports when asked for
    upstream = {
        name
        for name in imports(module, everywhere) & SOURCES.keys()
        if room(name) != room(module) and layer[room(name)] >= layer[room(module)]
    }
    assert not upstream


def test_tensorflow_is_for_reading_data_alone() -> None:
    users = {module for module in SOURCES if outside(module) & TENSORFLOW}
    assert users <= {name for name in SOURCES if room(name) in ("data", "tasks")}


def test_torch_is_for_the_bench_alone() -> None:
    users = {module for module in SOURCES if outside(module) & TORCH}
    assert users <= {name for name in SOURCES if room(name) == "bench"}


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    for module in SOURCES:
        assert not outside(module, everywhere=False) & LAZY, module


@pytest.mark.parametrize("module", ["hyper_t5.__main__", "hyper_t5.overrides"])
def test_a_command_line_is_read_before_jax_is_loaded(module: str) -> None:
    for name in reached(module):
        assert not outside(name, everywhere=False) & HEAVY, f"{module} imports {name}"


def test_adapters_know_nobody() -> None:
    ours = imports("hyper_t5.adapters") & SOURCES.keys()
    assert ours <= {"hyper_t5.errors", "hyper_t5.files", "hyper_t5.tensors"}


def requirements() -> set[str]:
    """Distributions that setup.py asks for, always or in the extra 'test'."""
    names: set[str] = set()
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("REQUIRES", "EXTRAS"):
            value = ast.literal_eval(node.value)
            lines = value if isinstance(value, list) else value["test"]
            names |= {Requirement(line).name.lower().replace("_", "-") for line in lines}
    return names


def test_every_package_imported_is_asked_for_by_name() -> None:
    listed, found = requirements(), importlib.metadata.packages_distributions()
    assert {"jax", "torch"} <= listed
    for module in SOURCES:
        for name in outside(module) - sys.stdlib_module_names:
            # Several distributions share `google`; of them we use protobuf.
            names = found.get(name, [name]) if name != "google" else ["protobuf"]
            owners = {owner.lower().replace("_", "-") for owner in names}
            assert owners & listed, f"{module} imports {name}: list {owners} in setup.py"


def test_no_file_names_a_place_of_the_machine_it_was_written_on() -> None:
    # In parts, so that this file does not find itself.
    # Where libtpu has its lock is a place of every TPU machine.
    places = re.compile(
        "/wo" + r"rk\b|/tm" + r"p\b(?!/libtpu_lockfile)|/ro" + r"ot\b|/ho" + r"me/|\.\./sha" + "red"
    )
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True)
    files = [ROOT / name for name in run.stdout.splitlines()]
    assert Path(__file__).resolve() in files
    named = []
    for file in files:
        if file.is_symlink() or not file.is_file() or b"\0" in file.read_bytes():
            continue
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
            if places.search(line):
                named.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not named
