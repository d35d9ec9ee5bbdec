"""``~`` and environment variables in the paths of flags, config fields and config arguments."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from hyper_t5 import cli
from hyper_t5 import config as config_lib
from hyper_t5.utils import overrides
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.paths import expand

pytestmark = pytest.mark.smoke

# Flags that take a path have one of these names.
PATH_FLAGS = (
    *("--out", "--backbone", "--workdir", "--adapter", "--compare", "--predictions"),
    *("--references", "--gpt2_merges", "--robustness", "--task", "--input", "--output"),
    *("--vocab", "--config", "--gin_file", "--base-model"),
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the home folder, which is also $DATA; the current folder is another."""
    folder = tmp_path / "home"
    folder.mkdir()
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("DATA", str(folder))
    monkeypatch.delenv("UNSET", raising=False)
    return folder


def test_expansion(home: Path) -> None:
    for path in ("~/a", "$DATA/a", "${DATA}/a"):
        assert expand(path) == f"{home}/a"
    for path in ("", "a~b/c", "gs://bucket/a", "tfds:c4"):
        assert expand(path) == path
    with pytest.raises(UserError, match=r"^\$UNSET/a: environment variable \$UNSET is not set"):
        expand("$UNSET/a")
    Path("$UNSET").mkdir()
    assert expand("$UNSET") == "$UNSET"


def test_every_path_flag_is_expanded(home: Path) -> None:
    count = 0
    for name, parser in cli.COMMANDS.choices.items():
        for action in parser._actions:
            if set(action.option_strings) & set(PATH_FLAGS):
                assert callable(action.type), (name, action.option_strings)
                assert str(action.type("~/a")) == f"{home}/a", (name, action.option_strings)
                count += 1
            elif isinstance(action, argparse._StoreAction) and action.option_strings:
                is_text = action.type is None and not action.choices
                assert not is_text or action.dest in {
                    *("coordinator_address", "mixture", "metric", "topology", "systems", "steps"),
                    *("host", "api_key"),
                }, (name, action.option_strings)
    assert count > 40


def test_every_path_field_is_expanded(home: Path) -> None:
    fields = config_lib.path_fields()
    known = config_lib.flatten(config_lib.defaults())
    suspects = [f for f in known if f.endswith(("path", "_dir", ".text", "_files", "_merges"))]
    assert set(suspects) <= set(fields) <= set(known)
    config = config_lib.load("configs/quickstart.py", [f"{name}=~/a" for name in fields])
    values = config_lib.flatten(config)
    assert {values[name] for name in fields} == {f"{home}/a"}


def test_a_config_file_and_its_arguments_are_expanded(home: Path) -> None:
    task = {"instruction": "Do.", "examples": [{"input": "a", "output": "b"}]}
    (home / "t.json").write_text(json.dumps(task))
    (home / "mine.py").write_text(
        "from hyper_t5.config import defaults\n"
        "def get_config(arg):\n"
        "    config = defaults()\n"
        "    config.data.text = '~/a'\n"
        "    return config\n"
    )
    args = cli.parse_args(["train", "--config=~/mine.py", "--workdir=~/w"])
    assert config_lib.load(args.config).data.text == f"{home}/a"
    assert args.workdir == f"{home}/w"
    config = config_lib.load("configs/peft.py:task=~/t.json")
    assert config.data.task_files == f"{home}/t.json"


def test_an_argument_with_a_comma_is_quoted() -> None:
    for text in ("task='a,b=c.json',flag,n=2", 'n=2,task="a,b=c.json", flag'):
        args = overrides.parse_args(text, task="", flag=False, n=1)
        assert (args.task, args.flag, args.n) == ("a,b=c.json", True, 2)
    assert overrides.parse_args("task=it's.json,n=3", task="", n=1).task == "it's.json"
    with pytest.raises(UserError, match="a quote or bracket is open"):
        overrides.parse_args("task='a.json,n=3", task="", n=1)
