"""Packaging and launch/setup.sh: stand-ins for uv, pip and pytest log their arguments."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import hyper_t5

# ---- the package ---------------------------------------------------------------------------------


@pytest.mark.smoke
def test_installed_package() -> None:
    assert importlib.metadata.version("hyper_t5") == hyper_t5.__version__
    [command] = importlib.metadata.entry_points(group="console_scripts", name="hyper-t5")
    assert command.value == "hyper_t5.cli:main"
    for name in ("tasks", "configs"):
        assert importlib.import_module(f"hyper_t5.{name}").__name__ == f"hyper_t5.{name}"


def test_build_holds_every_module_and_asset(repo_root: Path, tmp_path: Path) -> None:
    build = f"egg_info --egg-base {tmp_path} build_py --build-lib {tmp_path}/lib"
    subprocess.run([sys.executable, "setup.py", "-q", *build.split()], cwd=repo_root, check=True)
    built = {
        path.relative_to(tmp_path / "lib").as_posix()
        for path in (tmp_path / "lib").rglob("*")
        if path.is_file()
    }
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing += ["hyper_t5", "tasks", "configs", ":!hyper_t5/experiments"]
    names = subprocess.run(listing, cwd=repo_root, check=True, capture_output=True, text=True)
    expected = {
        name if name.startswith("hyper_t5/") else f"hyper_t5/{name}"
        for name in names.stdout.splitlines()
        if (repo_root / name).is_file()
    }
    assert built == expected


def requirements() -> dict[str, list[Requirement]]:
    """Return the requirements of the installed metadata by extra ('' for always)."""
    by_extra: dict[str, list[Requirement]] = {}
    for line in importlib.metadata.requires("hyper_t5") or []:
        text, _, marker = line.partition(";")
        extra = marker.partition("extra ==")[2].strip(" \"'")
        by_extra.setdefault(extra, []).append(Requirement(text))
    return by_extra


def test_every_requirement_has_both_bounds() -> None:
    for extra, needed in requirements().items():
        for requirement in needed:
            operators = {clause.operator for clause in requirement.specifier}
            assert operators == {">=", "<"}, f"{requirement} of extra {extra!r}"


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_constraints_pin_every_requirement_within_its_bounds(python: str, repo_root: Path) -> None:
    environment = {"python_full_version": f"{python}.1", "sys_platform": "linux"}
    lines = (repo_root / "constraints.txt").read_text().splitlines()
    version: dict[str, str] = {}
    for pin in [Requirement(line) for line in lines if line and not line.startswith("#")]:
        if pin.marker is None or pin.marker.evaluate(environment):
            [clause] = pin.specifier
            assert clause.operator == "=="
            assert pin.name not in version, f"two pins of {pin.name}"
            version[pin.name] = clause.version
    needed = requirements()
    for requirement in needed[""] + needed["test"] + needed["tpu"]:
        pinned = version[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(pinned), f"{requirement}, but {pinned} is pinned"
    assert version["jax"].startswith("0.10." if python == "3.11" else "0.12.")


# ---- launch/ -------------------------------------------------------------------------------------


def test_scripts_are_sound(repo_root: Path) -> None:
    scripts = [*(repo_root / "launch").glob("*.sh"), *(repo_root / ".ci").iterdir()]
    assert len(scripts) >= 8
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck")
    checked = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


UV = """#!/bin/sh
[ "$HAS_UV" = yes ] || exit 127
case "$1" in
  venv)
    case "$*" in *--clear*) clear=--clear ;; esac
    for last; do :; done
    "$REAL" -m venv $clear --without-pip "$last" ;;
  pip) echo "install $*" >>"$LOG"; exit "$INSTALL_EXIT" ;;
esac
"""

# A Python whose new environments have stand-ins for pip and pytest.
PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
  "$REAL" -m venv "$3" --without-pip "$4"
  for name in pip pytest; do cp "$STAND_INS/$name.py" "$4"/lib/python3*/site-packages/; done
else
  [ -z "$CLAIMS" ] || { echo "$CLAIMS"; exit; }
  exec "$REAL" "$@"
fi
"""

PIP = """import os, sys
if sys.argv[1:] != ["--version"]:
    open(os.environ["LOG"], "a").write("install " + " ".join(sys.argv[1:]) + "\\n")
    sys.exit(int(os.environ["INSTALL_EXIT"]))
"""

PYTEST = """import os, sys
print(os.getcwd(), *sys.argv[1:], sep="|")
"""


class Checkout:
    """A copy of launch/ in a repository of its own, with stand-ins for Python, uv and pip."""

    def __init__(self, folder: Path, scripts: Path, tool: str) -> None:
        self.tool = tool
        self.root = folder / "a checkout"  # the space is on purpose
        self.root.mkdir()
        self.log = folder / "log"
        self.venv = self.root / ".venv"
        shutil.copytree(scripts, self.root / "launch")
        for name in ("setup.py", "pyproject.toml", "constraints.txt"):
            (self.root / name).write_text("")
        stand_ins = folder / "bin"
        stand_ins.mkdir()
        for name, text in {"uv": UV, "python": PYTHON, "pip.py": PIP, "pytest.py": PYTEST}.items():
            (stand_ins / name).write_text(text)
            (stand_ins / name).chmod(0o755)
        (stand_ins / "python3").symlink_to("python")
        self.environment = {
            **os.environ,
            "PATH": f"{stand_ins}:{os.environ['PATH']}",
            "HAS_UV": "yes" if tool == "uv" else "no",
            "REAL": sys.executable,
            "STAND_INS": str(stand_ins),
            "LOG": str(self.log),
            "INSTALL_EXIT": "0",
            "CLAIMS": "",
        }
        self.environment.pop("PYTHON", None)
        self.environment.pop("VIRTUAL_ENV", None)

    def run(
        self, *arguments: str, script: str = "setup.sh", cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a script of launch/ in `cwd` (default: a folder outside the checkout)."""
        return subprocess.run(
            ["bash", str(self.root / "launch" / script), *arguments],
            cwd=cwd or self.root.parent,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def installs(self) -> list[str]:
        """Return the extras of each installation so far, as in ``[test]``."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        assert all(f"--constraint {self.root}/constraints.txt" in line for line in lines)
        return [line.partition(f"--editable {self.root}")[2] for line in lines]


@pytest.fixture(params=["uv", "pip"])
def checkout(request: pytest.FixtureRequest, tmp_path: Path, repo_root: Path) -> Checkout:
    return Checkout(tmp_path, repo_root / "launch", request.param)


def test_second_run_installs_nothing(checkout: Checkout) -> None:
    first = checkout.run()
    assert first.returncode == 0, first.stderr
    [line] = first.stderr.splitlines()
    assert line.startswith(f"setup: installing hyper_t5 into {checkout.venv} with {checkout.tool} ")
    second = checkout.run(cwd=checkout.root)
    assert second.returncode == 0
    assert second.stderr == f"setup: {checkout.venv} is up to date\n"
    assert checkout.installs() == [""]


def test_extras_accumulate_and_changed_files_install_again(checkout: Checkout) -> None:
    for extra in ([], ["--extra", "test"], [], ["--extra", "tpu"], ["--extra", "test"]):
        checkout.run(*extra)
    assert checkout.installs() == ["", "[test]", "[test,tpu]"]
    for name in ("setup.py", "pyproject.toml", "constraints.txt"):
        (checkout.root / name).write_text("# changed")
        checkout.run()
        checkout.run()
    assert checkout.installs()[3:] == ["[test,tpu]"] * 3


def test_interrupted_installation_starts_from_an_empty_environment(checkout: Checkout) -> None:
    (checkout.venv / "bin").mkdir(parents=True)
    (checkout.venv / "bin" / "python").symlink_to("missing")  # an incomplete environment
    assert checkout.run().returncode == 0
    (checkout.venv / "hyper_t5-installed").rename(checkout.venv / "hyper_t5-installing")
    (checkout.venv / "incomplete").touch()
    assert checkout.run().returncode == 0
    assert not (checkout.venv / "incomplete").exists()
    checkout.run()
    assert checkout.installs() == ["", ""]


def test_failed_installation_and_foreign_environment_are_continued(checkout: Checkout) -> None:
    checkout.run()
    (checkout.venv / "other").touch()
    failed = checkout.run("--extra", "test", INSTALL_EXIT="3")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("setup: the installation failed")
    assert checkout.run().returncode == 0
    (checkout.venv / "hyper_t5-installed").unlink()
    assert checkout.run().returncode == 0
    assert (checkout.venv / "other").exists()
    assert checkout.installs() == ["", "[test]", "", ""]


def test_invalid_input_is_one_line(checkout: Checkout) -> None:
    old = checkout.run(CLAIMS="3.10")
    assert old.returncode == 1
    assert old.stderr == "setup: python3 is Python 3.10: set PYTHON to a Python 3.11 or later\n"
    missing = checkout.run(PYTHON="no-such-python")
    assert missing.returncode == 1
    assert missing.stderr.startswith("setup: cannot run no-such-python: ")
    for arguments in (["--extra", "everything"], ["--extra"], ["test"]):
        refused = checkout.run(*arguments)
        assert refused.returncode == 1
        assert "usage: bash launch/setup.sh" in refused.stderr
    assert not checkout.venv.exists()
    assert checkout.installs() == []


def test_test_sh_passes_its_arguments_to_pytest(tmp_path: Path, repo_root: Path) -> None:
    checkout = Checkout(tmp_path, repo_root / "launch", "pip")
    ran = checkout.run("-m", "", "-k", "two words", script="test.sh")
    usual = "-n|2|--dist|loadfile|-m|not slow and not soak"
    assert ran.stdout == f"{checkout.root}|{usual}|-m||-k|two words\n"
    assert checkout.installs() == ["[test]"]
