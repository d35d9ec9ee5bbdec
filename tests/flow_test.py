"""Import order of packages, read from the source with `ast`: imports inside functions count.

The flow is one way: text -> hypermodel -> adapters -> T5 -> loss, checkpoint, export.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent

# A package imports only from the rows below its own. Top-level modules are packages of one file.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["experiments"],
    ["serving"],
    ["tools", "bench"],
    ["planning"],
    ["configs"],
    ["training"],
    ["evaluation"],
    ["inference"],
    ["flops"],
    ["export"],
    ["runs"],
    ["model"],
    ["checkpoints"],
    ["config"],
    ["pipeline"],
    ["tasks"],
    ["hypermodels"],
    ["weights"],
    ["t5"],
    ["parallel"],
    ["adapters"],
    ["data"],
    ["scoring"],
    ["utils"],
    ["hyper_t5"],
][::-1]
TENSORFLOW = {"tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio"}
TORCH = {"torch", "transformers", "peft", "accelerate"}
# Seconds or hundreds of MB each: only ever imported inside the function that needs it.
LAZY = {*TENSORFLOW, *TORCH, "matplotlib", "tensorstore", "rouge_score", "scipy", "tensorboardX"}
HEAVY = {*LAZY, "jax", "jaxlib", "flax", "optax", "orbax", "numpy"}


def sources() -> dict[str, Path]:
    """Return the name of each module, as installed -> its file."""
    modules = {}
    for folder, package in {"hyper_t5": "", "tasks": "hyper_t5.", "configs": "hyper_t5."}.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            path = file.relative_to(ROOT).with_suffix("")
            modules[(package + ".".join(path.parts)).removesuffix(".__init__")] = file
    return modules


SOURCES = sources()


def names_of(node: ast.AST) -> Iterator[str]:
    """Yield the modules of an import statement, or of a call of `importlib.import_module`."""
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
    """Return all imports of a module; not `everywhere`: only those outside of functions."""
    tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else tree.body
    return frozenset(name for node in nodes for name in names_of(node))


def package_of(module: str) -> str:
    """Return the package of a module; a top-level module is its own."""
    return module.split(".")[1] if "." in module else module


def third_party(module: str, everywhere: bool = True) -> set[str]:
    """Return the top-level names of the third-party imports of a module."""
    return {name.split(".")[0] for name in imports(module, everywhere)} - {"hyper_t5"}


def loaded_with(module: str) -> set[str]:
    """Return our modules that are loaded with this one, itself and its packages included."""
    result: set[str] = set()
    waiting = {module}
    while waiting:
        name = waiting.pop()
        result.add(name)
        parents = {name.rpartition(".")[0]} & SOURCES.keys()
        waiting |= ((imports(name, everywhere=False) & SOURCES.keys()) | parents) - result
    return result


def test_sources_and_imports_are_complete() -> None:
    assert {
        "hyper_t5.t5",
        "hyper_t5.hypermodels.parts.heads",
        "hyper_t5.tasks.rows",
    } <= SOURCES.keys()
    assert "hyper_t5.configs.mtf" in SOURCES
    assert "hyper_t5.inference.predictor" in imports("hyper_t5.cli")
    assert "hyper_t5.inference.predictor" not in imports("hyper_t5.cli", everywhere=False)
    assert "hyper_t5.tasks.text" in imports("hyper_t5.pipeline")
    assert "hyper_t5.t5" in loaded_with("hyper_t5.inference.predictor")


@pytest.mark.parametrize("module", SOURCES)
def test_no_import_points_upstream(module: str) -> None:
    layer = {name: i for i, names in enumerate(LAYERS) for name in names}
    assert package_of(module) in layer, "a new module: add its package to LAYERS"
    everywhere = module != "hyper_t5"  # the package's own exports are imported lazily
    upstream = {
        name
        for name in imports(module, everywhere) & SOURCES.keys()
        if package_of(name) != package_of(module)
        and layer[package_of(name)] >= layer[package_of(module)]
    }
    assert not upstream


def test_tensorflow_is_for_reading_data_alone() -> None:
    users = {module for module in SOURCES if third_party(module) & TENSORFLOW}
    readers = {name for name in SOURCES if package_of(name) in ("data", "pipeline", "tasks")}
    assert users <= {*readers, "hyper_t5.tools.build_dataset"}


def test_torch_is_for_the_bench_alone() -> None:
    users = {module for module in SOURCES if third_party(module) & TORCH}
    assert users <= {name for name in SOURCES if package_of(name) == "bench"}


def test_heavy_packages_are_imported_in_functions() -> None:
    for module in SOURCES:
        assert not third_party(module, everywhere=False) & LAZY, module


@pytest.mark.parametrize("module", ["hyper_t5.__main__", "hyper_t5.utils.overrides"])
def test_the_command_line_is_parsed_without_jax(module: str) -> None:
    for name in loaded_with(module):
        assert not third_party(name, everywhere=False) & HEAVY, f"{module} imports {name}"


def test_adapters_import_utils_alone() -> None:
    ours = imports("hyper_t5.adapters") & SOURCES.keys()
    assert ours <= {
        "hyper_t5.utils.errors",
        "hyper_t5.utils.files",
        "hyper_t5.utils.safetensors_io",
    }


def test_no_folder_of_tests_is_on_the_import_path() -> None:
    """`import t5x` inside pytest is T5X or nothing, never a folder of tests."""
    tests = ROOT / "tests"
    folders = [Path(entry).resolve() for entry in sys.path]
    assert not [folder for folder in folders if tests in (folder, *folder.parents)]
    for name in ("t5x", *(folder.name for folder in tests.iterdir() if folder.is_dir())):
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else Path("/")
        ours = {ROOT / "hyper_t5", tests} & set(origin.parents)
        assert not ours, f"import {name} imports {origin}"


def requirements() -> set[str]:
    """Return the distributions that setup.py requires, with the extra 'test'."""
    names: set[str] = set()
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("REQUIRES", "EXTRAS"):
            value = ast.literal_eval(node.value)
            lines = value if isinstance(value, list) else value["test"]
            names |= {Requirement(line).name.lower().replace("_", "-") for line in lines}
    return names


def test_every_imported_package_is_required() -> None:
    listed, owners_of = requirements(), importlib.metadata.packages_distributions()
    assert {"jax", "torch"} <= listed
    for module in SOURCES:
        for name in third_party(module) - sys.stdlib_module_names:
            # Several distributions share `google`; of them we use protobuf.
            names = owners_of.get(name, [name]) if name != "google" else ["protobuf"]
            owners = {owner.lower().replace("_", "-") for owner in names}
            assert owners & listed, f"{module} imports {name}: list {owners} in setup.py"


def test_no_file_has_a_path_of_this_machine() -> None:
    # In parts, so that this file does not match. libtpu's lock is the same on every TPU machine.
    pattern = re.compile(
        "/wo" + r"rk\b|/tm" + r"p\b(?!/libtpu_lockfile)|/ro" + r"ot\b|/ho" + r"me/|\.\./sha" + "red"
    )
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True)
    files = [ROOT / name for name in run.stdout.splitlines()]
    assert Path(__file__).resolve() in files
    matches = []
    for file in files:
        if file.is_symlink() or not file.is_file() or b"\0" in file.read_bytes():
            continue
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
            if pattern.search(line):
                matches.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not matches
