"""Command line: the call of each command, exit codes, one-line errors, ``--help`` without JAX."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyper_t5 import cli
from hyper_t5.t5.decoding import Sampling
from hyper_t5.utils.errors import PreemptedError, UserError

pytestmark = pytest.mark.smoke

MTF = "configs/mtf.py"  # of the package if the working directory has none
FUNCTIONS = {
    "quickstart": "tools.quickstart.main",
    "train": "training.loop.train",
    "evaluate": "evaluation.evaluate.evaluate_workdir",
    "score": "evaluation.evaluate.score_file",
    "report": "evaluation.report.write_report",
    "robustness": "evaluation.robustness.robustness",
    "data": "tools.inspect_data.describe",
    "build": "tools.build_dataset.build",
    "adapt": "inference.predictor.adapt",
    "predict": "inference.predict_files.predict",
    "convert": "weights.convert",
    "export": "export.export",
    "serve": "serving.server.serve",
    "plan": "planning.plan.plan",
    "bench": "bench.main",
}
HAS_SERVE = importlib.util.find_spec("uvicorn") is not None  # the extra, which a wheel lacks
Calls = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Record (command, arguments by parameter name) in place of the functions of commands."""
    recorded: Calls = []

    def recorder(command: str, function: Callable[..., Any]) -> Callable[..., str]:
        def record(*args: Any, **kwargs: Any) -> str:
            arguments = inspect.signature(function).bind(*args, **kwargs).arguments
            recorded.append((command, arguments))
            return f"result of {command}"

        return record

    for command, name in FUNCTIONS.items():
        if command == "serve" and not HAS_SERVE:
            continue
        path, _, attribute = f"hyper_t5.{name}".rpartition(".")
        module = importlib.import_module(path)
        monkeypatch.setattr(module, attribute, recorder(command, getattr(module, attribute)))
    monkeypatch.setattr("hyper_t5.runs.backbone_folder", Path)
    monkeypatch.setattr("hyper_t5.runs.open", lambda path, *rest, **named: Path(path))
    return recorded


def example_of(command: str) -> str:
    return str(cli.COMMANDS.choices[command].epilog).removeprefix("example:\n  ")


def error_of(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """Run a command line that fails; return the one line that it prints."""
    assert cli.main(argv) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("hyper-t5: error: ")
    assert err.count("\n") == 1
    return err


def test_help_and_invalid_flags_load_no_jax() -> None:
    code = (
        "import sys\n"
        "from hyper_t5 import cli\n"
        "for argv in [['--help'], *([name, '--help'] for name in cli.COMMANDS.choices)]:\n"
        "    try: cli.main(argv)\n"
        "    except SystemExit as e: assert e.code == 0\n"
        "    print('----')\n"
        "for name in cli.COMMANDS.choices:\n"
        "    assert cli.main([name, '--nothing']) == 2\n"
        "assert cli.main(['evaluate', '--adapter=a', '--out=o']) == 2\n"
        "assert cli.main(['predict', '--batch=0']) == 2\n"
        "assert not {'jax', 'flax', 'tensorflow', 'seqio', 'numpy'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    top, *helps = run.stdout.split("----\n")[:-1]
    assert cli.COMMANDS.choices.keys() == FUNCTIONS.keys()
    for (name, parser), text in zip(cli.COMMANDS.choices.items(), helps, strict=True):
        assert text.endswith(f"example:\n  {example_of(name)}\n")
        assert f"\n{parser.description}\n" in text
        assert f"    {name}" in top
        assert all(action.help for action in parser._actions)


@pytest.mark.parametrize("command", FUNCTIONS)
def test_the_example_of_help_runs_its_function(
    command: str, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "serve" and not HAS_SERVE:
        pytest.skip("the extra `serve` is not installed")
    monkeypatch.chdir(tmp_path)
    program, *argv = example_of(command).split()
    assert program == "hyper-t5"
    assert cli.main(argv) == 0
    assert [name for name, _ in calls] == [command]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("", "the following arguments are required: COMMAND (see hyper-t5 --help)"),
        ("trian", "unknown command 'trian', the nearest is 'train'; known: quickstart, train"),
        ("--nothing train", "unknown flag --nothing, the nearest is --help"),
        ("train", "required: --config, --workdir (see hyper-t5 train --help)"),
        ("train --confg=x --workdir=y", "unknown flag --confg, the nearest is --config"),
        ("train --work=y", "unknown flag --work, the nearest is --workdir"),
        ("train --config=a.py --workdir=w extra", "unrecognized arguments: extra"),
        ("train --config=a.py --workdir=w --gin.seed 3", "no value; write --gin.seed=VALUE"),
        ("train --config=configs/no.py --workdir=w", "configs/no.py: no such file"),
        (f"train --config={MTF} --workdir=w --gin.sede=3", "the nearest is seed"),
        (f"train --config={MTF} --workdir=w --gin.seed=x", "seed expects an integer"),
        (f"train --config={MTF}:sise=xl --workdir=w", "the nearest is 'size'"),
        (f"train --config={MTF} --workdir=w", "backbone.path is empty"),
        (f"train --config={MTF} --workdir=w --gin_file=no.gin", "cannot read no.gin"),
        ("evaluate --workdir=w --adapter=a", "--adapter: not allowed with argument --workdir"),
        ("evaluate --adapter=a --out=o", "--adapter and --backbone belong together"),
        ("evaluate --adapter=a --backbone=b", "--adapter needs --out"),
        (
            "predict --backbone=b --input=i --output=o --gin.seed=3",
            "--gin.seed=3: predict takes no config",
        ),
        ("adapt --workdir=w --task=t --out=o --format=hf", "invalid choice: 'hf'"),
        ("predict --input=i --output=o", "one of the arguments --backbone --workdir is required"),
        ("predict --input=i --output=o --backbone=b --task=t", "or --workdir and --task"),
        ("predict --input=i --output=o --workdir=w --adapter=a", "pass --backbone and --adapter"),
        (
            "predict --input=i --output=o --backbone=b --top-k=3 --top-p=0.5",
            "top_k and top_p: use",
        ),
        ("predict --temperature=warm", "--temperature: invalid float value: 'warm'"),
        ("predict --batch=0", "--batch: expected an integer of 1 or more, got '0'"),
        ("predict --max_decode_length=8", "the nearest is --max-decode-length"),
        ("robustness --shots=1,x", "--shots: expected an integer of 0 or more, got 'x'"),
        ("data --mixture=sni --text", "--text: not allowed with argument --mixture"),
    ],
)
def test_invalid_input_is_one_line_and_exit_code_2(
    argv: str,
    expected: str,
    calls: Calls,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in error_of(capsys, *argv.split())
    assert calls == []
    assert list(tmp_path.iterdir()) == []


def test_module_and_entry_point_exit_with_the_code() -> None:
    command = [sys.executable, "-m", "hyper_t5", "trian"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert run.stderr.startswith("hyper-t5: error: unknown command 'trian'")
    assert "Traceback" not in run.stderr


def test_train_resumes_only_with_its_own_config(
    calls: Calls, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run, gin = tmp_path / "run", tmp_path / "a.gin"
    gin.write_bytes("\ufefftrain.steps = 5\r\nseed = 2  # why\r\n".encode())
    argv = ["train", "--config", f"{MTF}:size=small", "--workdir", str(run)]
    argv = ["--gin.backbone.path=b", *argv]  # overrides may be anywhere
    assert cli.main([*argv, "--gin.train.steps=6", f"--gin_file={gin}", "--profile"]) == 0
    ((_, arguments),) = calls
    config = arguments["config"]
    assert (config.model.emb_dim, config.seed, config.train.steps) == (512, 2, 6)
    assert (arguments["folder"], arguments["profile"]) == (str(run), True)
    capsys.readouterr()
    (run / "checkpoints" / "5").mkdir(parents=True)

    assert cli.main([*argv, "--gin.seed=2", "--gin.train.steps=7"]) == 0
    assert capsys.readouterr().out == "resume with train.steps: 6 -> 7\n"
    assert "seed: 2 -> 0" in error_of(capsys, *argv)
    assert len(calls) == 2


def test_evaluate_gets_overrides_in_order(calls: Calls, tmp_path: Path) -> None:
    gin = tmp_path / "a.gin"
    gin.write_text("eval.batch = 5\n")
    argv = f"evaluate --workdir=w --gin_file={gin} --gin.eval.batch=6 --mixture=other"
    assert cli.main([*argv.split(), "--compare=a", "--compare=b"]) == 0
    ((_, arguments),) = calls
    assert [(o.field, o.text) for o in arguments.pop("overrides")] == [
        ("eval.batch", "5"),
        ("eval.batch", "6"),
        ("eval.mixture", "other"),
    ]
    assert arguments == {
        "workdir": "w",
        "out": None,
        "compare": ["a", "b"],
        "step": None,
    }


def test_adapt_prints_the_folder(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["adapt", "--workdir=w", "--task=t.json", "--out=o", "--format=peft"]) == 0
    assert capsys.readouterr().out == "result of adapt\n"
    paths = {"run": Path("w"), "task": "t.json", "out": "o"}
    assert calls == [("adapt", {**paths, "format": "peft", "base_model": "", "dtype": ""})]


def test_predict_takes_adapters_or_tasks(calls: Calls) -> None:
    words = "--backbone=b --adapter=x --adapter=y --batch=4 --beam-size 2"
    assert cli.main(["predict", "--input=i", "--output=o", *words.split()]) == 0
    words = "--workdir=w --task=a.json --task=b --temperature=0.7 --top-p=0.9 --seed=3"
    words += " --max-input-length=64 --on-long=refuse"
    assert cli.main(["predict", "--input=i", "--output=o", *words.split()]) == 0
    (_, by_adapter), (_, by_task) = calls
    config = by_adapter["config"]
    assert (config.batch, config.max_decode_length, config.beam_size) == (4, 128, 2)
    assert (config.sampling, config.max_input_length) == (Sampling(), 0)
    assert (by_adapter["backbone"], by_adapter["adapters"]) == ("b", ["x", "y"])
    assert (by_adapter["input"], by_adapter["output"], by_adapter["workdir"]) == ("i", "o", "")
    config = by_task["config"]
    assert (config.sampling, config.on_long) == (Sampling(0.7, 0, 0.9, 3), "refuse")
    assert (config.max_input_length, by_task["tasks"]) == (64, ["a.json", "b"])
    assert (by_task["workdir"], by_task["backbone"]) == ("w", "")


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (FloatingPointError("the loss is nan\nat step 7"), 1, "error: the loss is nan at step 7\n"),
        (PreemptedError("saved at step 7"), 75, "error: saved at step 7\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (UserError("a.json:3: no Definition"), 2, "error: a.json:3: no Definition\n"),
        (IndexError("a bug"), None, ""),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int | None,
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr("hyper_t5.bench.main", fail)
    if code is None:  # a bug keeps its traceback
        with pytest.raises(IndexError):
            cli.main(["bench"])
    else:
        assert error_of(capsys, "bench", code=code).endswith(expected)
