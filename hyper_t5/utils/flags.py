"""Argument parser, argument types, and the flags that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

from hyper_t5.utils.errors import UserError
from hyper_t5.utils.overrides import INT64_END, SEED_END, nearest
from hyper_t5.utils.paths import expand as path

GIN = "--gin."


class Parser(argparse.ArgumentParser):
    """Argument parser that raises UserError and whose flags must be spelled out."""

    def __init__(self, **kwargs: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(**kwargs, formatter_class=formatter, allow_abbrev=False)

    def flags(self) -> list[str]:
        """Return every flag, such as ``--help``."""
        return [flag for action in self._actions for flag in action.option_strings]

    def check_flags(self, words: Sequence[str]) -> None:
        """Raise a UserError that suggests the nearest flag if ``words`` has an unknown one.

        Argparse alone would first report the required flag that is misspelled as missing.
        """
        for flag in [word.partition("=")[0] for word in words if word.startswith("--")]:
            if flag not in self.flags():
                self.error(f"unknown flag {flag}, the nearest is {nearest(flag, self.flags())}")

    def error(self, message: str) -> NoReturn:
        """Raise a UserError that refers to ``--help``."""
        raise UserError(f"{message} (see {self.prog} --help)")


def split_gin(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into its other words and its ``--gin.`` overrides without prefix."""
    gin = [word.removeprefix(GIN) for word in argv if word.startswith(GIN)]
    for override in gin:
        if "=" not in override:
            raise UserError(f"{GIN}{override}: has no value; write {GIN}{override}=VALUE")
    return [word for word in argv if not word.startswith(GIN)], gin


def at_least(minimum: int, end: int = INT64_END) -> Callable[[str], int]:
    """Return an argparse type: an integer of ``minimum`` or more, below ``end``."""

    def parse(text: str) -> int:
        if not text.isdecimal() or len(text) > 19 or not minimum <= int(text) < end:
            bound = (
                f", below 2**{end.bit_length() - 1}" if text.isdecimal() and text.strip("0") else ""
            )
            message = f"expected an integer of {minimum} or more{bound}, got {text[:40]!r}"
            raise argparse.ArgumentTypeError(message)
        return int(text)

    return parse


def step(text: str) -> int | Literal["best"]:
    """Return a step's number, or 'best'."""
    return "best" if text == "best" else at_least(0)(text)


def named_path(text: str) -> str:
    """Expand the path of NAME=PATH."""
    name, equals, folder = text.rpartition("=")
    return f"{name}{equals}{path(folder)}"


seed = at_least(0, SEED_END)

# ------------------------------------------------------------------------------- shared flags

WORKDIR = Parser(add_help=False)
WORKDIR.add_argument(
    "--workdir", type=path, required=True, help="run: config.json, checkpoints/, metrics.jsonl"
)

CONFIG = Parser(add_help=False)
CONFIG.add_argument(
    "--config",
    type=path,
    required=True,
    metavar="FILE.py[:ARG,...]",
    help="config file, on disk or shipped",
)

GIN_FILES = Parser(add_help=False)
GIN_FILES.add_argument(
    "--gin_file",
    type=path,
    action="append",
    default=[],
    help="file of `path.to.field = value` lines that override the config; repeatable. After all "
    "files, --gin.path.to.field=VALUE overrides one field",
)

COMPARE = Parser(add_help=False)
COMPARE.add_argument(
    "--compare",
    type=path,
    action="append",
    default=[],
    help="evaluated run, or metrics.json, to compare with on the tasks of both; repeatable",
)

STEP = Parser(add_help=False)
STEP.add_argument(
    "--step",
    type=step,
    help="step of the checkpoint, or 'best' for the lowest validation loss (default: the newest)",
)

MOVED_BACKBONE = Parser(add_help=False)
MOVED_BACKBONE.add_argument(
    "--backbone", type=path, default="", help="folder of the run's backbone, if it has moved"
)

DTYPE = Parser(add_help=False)
DTYPE.add_argument(
    "--dtype",
    choices=["float32", "bfloat16"],
    default="",
    help="dtype of the output (default: unchanged; float32 for PEFT)",
)

PEFT = Parser(add_help=False, parents=[DTYPE])
PEFT.add_argument(
    "--base-model", type=path, default="", help="name or path to write as PEFT's base model"
)

PROCESSES = Parser(add_help=False, parents=[GIN_FILES])
_group = PROCESSES.add_argument_group(
    "multi-process runs", "TPU pods, SLURM, or JAX's environment variables set the first three."
)
_group.add_argument("--coordinator_address", default="", help="HOST:PORT of process 0")
_group.add_argument("--process_count", type=at_least(1), default=0, help="number of processes")
_group.add_argument("--process_index", type=at_least(0), default=-1, help="this process, from 0")
_group.add_argument(
    "--initialization_timeout",
    type=at_least(1),
    default=300,
    help="seconds to wait for all processes (default: 300)",
)
_group.add_argument(
    "--heartbeat_timeout",
    type=at_least(1),
    default=30,
    help="seconds without a heartbeat after which a process is lost (default: 30)",
)
