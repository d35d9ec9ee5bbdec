"""The command line: what reaches each command, exit codes, one line for a mistake, fast help."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import hyper_t5
from hyper_t5 import cli
from hyper_t5.decoding import Sampling
from hyper_t5.errors import UserError

pytestmark = pytest.mark.smoke

MTF = str(Path(__file__).resolve().parents[1] / "configs" / "mtf.py")


def fails(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    assert cli.main(argv) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("hyper-t5: error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """The modules that do the work, replaced; what they were called with."""
    seen: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    for name in [
        "train.train",
        "evaluate.evaluate_workdir",
        "evaluate.score_file",
        "report.write_report",
        "robustness.robustness",
        "serve.adapt",
        "predict.predict",
        "serve.Options",
        "export.export",
        "weights.convert",
        "model.backbone_folder",
        "bench.main",
        "plan.plan",
        "describe.describe",
        "build.build",
        "quickstart.main",
    ]:
        module, function = name.split(".")

        def record(*args: Any, name: str = name, **kwargs: Any) -> str:
            seen.append((name, args, kwargs))
            return f"result of {name}"

        full = f"hyper_t5.{module}"
        fake = sys.modules.get(full)
        if not getattr(fake, "is_fake", False):
            fake = types.ModuleType(full)
            fake.is_fake = True  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, full, fake)
            monkeypatch.setattr(hyper_t5, module, fake, raising=False)
        setattr(fake, function, record)
    return seen


def test_help_imports_nothing_heavy_and_ends_in_an_example() -> None:
    code = (
        "import sys\n"
        "from hyper_t5 import cli\n"
        "for argv in [['--help'], *([name, '--help'] for name in cli.COMMANDS)]:\n"
        "    try: cli.main(argv)\n"
        "    except SystemExit as e: assert e.code == 0\n"
        "    print('----')\n"
        "assert not {'jax', 'flax', 'tensorflow', 'seqio', 'numpy'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    top, *helps = run.stdout.split("----\n")[:-1]
    assert list(cli.COMMANDS) == [
        "quickstart",
        "train",
        "evaluate",
        "score",
        "report",
        "robustness",
        "data",
        "build",
        "adapt",
        "predict",
        "convert",
        "export",
        "plan",
        "bench",
    ]
    for name, text in zip(cli.COMMANDS, helps, strict=True):
        assert f"example:\n  hyper-t5 {name} " in text
        assert cli.COMMANDS[name].summary in text
        assert f"  {name}" in top


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_example_of_help_is_accepted(
    command: str, calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    program, *argv = cli.COMMANDS[command].example.split()
    assert program == "hyper-t5"
    if command in ("train", "plan"):
        argv[argv.index("--config") + 1] = f"{MTF}:system=hyper_lora,size=base"
    assert cli.main(argv) == 0
    helpers = ("serve.Options", "model.backbone_folder")
    assert len([name for name, _, _ in calls if name not in helpers]) == 1


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "give a command: quickstart, train"),
        (["trian"], "unknown command 'trian', the nearest is 'train'"),
        (["--nothing"], "unrecognized arguments: --nothing"),
        (["train"], "required: --config, --workdir (see hyper-t5 train --help)"),
        (["train", "--confg=x", "--workdir=y"], "unknown flag --confg, the nearest is --config"),
        (["train", "--work=y"], "unknown flag --work, the nearest is --workdir"),
        (["train", "--config=a.py", "--workdir=w", "extra"], "unrecognized arguments: extra"),
        (["train", "--config=a.py", "--workdir=w", "--gin.seed", "3"], "--gin.seed=VALUE"),
        (["train", "--config=configs/no.py", "--workdir=w"], "configs/no.py: no such file"),
        (["train", "--config", MTF, "--workdir=w", "--gin.sede=3"], "the nearest is seed"),
        (["train", "--config", MTF, "--workdir=w", "--gin.seed=x"], "seed expects an integer"),
        (["train", "--config", f"{MTF}:sise=xl", "--workdir=w"], "the nearest is 'size'"),
        (["train", "--config", MTF, "--workdir=w"], "backbone.path is empty"),
        (["train", "--config", MTF, "--workdir=w", "--gin_file=no.gin"], "cannot read no.gin"),
        (["adapt", "--gin.seed=3"], "--gin.seed=3: adapt takes no config"),
        (["adapt", "--workdir=w", "--task=t", "--out=o", "--format=hf"], "invalid choice: 'hf'"),
        (["predict", "--input=i", "--output=o"], "give --backbone and --adapter, or --workdir"),
        (["predict", "--input=i", "--output=o", "--backbone=b", "--task=t"], "--task goes with"),
        (
            ["predict", "--input=i", "--output=o", "--backbone=b", "--top-k=3", "--top-p=0.5"],
            "top_k and top_p: give one",
        ),
        (["predict", "--temperature=warm"], "--temperature: expected a number, got 'warm'"),
        (["predict", "--batch=0"], "--batch: expected a whole number of 1 or more, got '0'"),
        (["evaluate", "--workdir=w", "--gin.eval.batch"], "needs its value in the same word"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(
    argv: list[str],
    expected: str,
    calls: list[Any],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in fails(capsys, *argv)
    assert calls == []
    assert list(tmp_path.iterdir()) == []


def test_module_and_entry_point_exit_with_the_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hyper_t5", "trian"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert run.stderr.startswith("hyper-t5: error: unknown command 'trian'")
    assert "Traceback" not in run.stderr


def test_train_resumes_only_with_its_own_config(
    calls: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    argv = [
        "train",
        "--config",
        f"{MTF}:size=small",
        "--workdir",
        str(run),
        "--gin.backbone.path=b",
    ]
    gin = tmp_path / "a.gin"
    gin.write_text("train.steps = 5\nseed = 2\n")
    assert cli.main([*argv, f"--gin_file={gin}", "--gin.train.steps=6"]) == 0
    ((name, (config, workdir), _),) = calls
    assert (name, workdir) == ("train.train", run)
    assert (config.model.emb_dim, config.seed, config.train.steps) == (512, 2, 6)
    capsys.readouterr()
    (run / "checkpoints" / "5").mkdir(parents=True)

    assert cli.main([*argv, "--gin.seed=2", "--gin.train.steps=7"]) == 0
    assert capsys.readouterr().out == "resume with train.steps: 6 -> 7\n"
    assert "seed: 2 -> 0" in fails(capsys, *argv)
    assert len(calls) == 2


def test_evaluate_gets_overrides_in_order(calls: list[Any], tmp_path: Path) -> None:
    gin = tmp_path / "a.gin"
    gin.write_text("eval.batch = 5\n")
    assert (
        cli.main(
            [
                "evaluate",
                "--workdir=w",
                f"--gin_file={gin}",
                "--gin.eval.batch=6",
                "--mixture=other",
                "--compare=a",
                "--compare=b",
            ]
        )
        == 0
    )
    ((_, (workdir, overrides), named),) = calls
    assert workdir == Path("w")
    assert [(o.field, o.text) for o in overrides] == [
        ("eval.batch", "5"),
        ("eval.batch", "6"),
        ("eval.mixture", "other"),
    ]
    assert named == {"out": None, "compare": [Path("a"), Path("b")]}


def test_adapt_prints_the_path(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["adapt", "--workdir=w", "--task=t.json", "--out=o", "--format=peft"]) == 0
    assert capsys.readouterr().out == "result of serve.adapt\n"
    assert calls == [("serve.adapt", (Path("w"), Path("t.json"), Path("o"), "peft", "", ""), {})]


def test_predict_takes_several_adapters(calls: list[Any]) -> None:
    argv = "predict --backbone=b --adapter=x --adapter=y --input=i --output=o --batch=4"
    assert cli.main([*argv.split(), "--beam-size", "2"]) == 0
    (_, options, _), (name, arguments, named) = calls
    assert options == (4, 128, 2, Sampling(), 0, "truncate")
    assert (name, arguments[:2]) == ("predict.predict", (Path("i"), Path("o")))
    assert named == {
        "backbone": Path("b"),
        "adapters": [Path("x"), Path("y")],
        "workdir": "",
        "tasks": [],
    }


def test_predict_draws_and_makes_adapters_of_tasks(calls: list[Any]) -> None:
    argv = "predict --workdir=w --task=a.json --task=b --input=i --output=o --temperature=0.7"
    argv += " --top-p=0.9 --seed=3 --max-input-length=64 --on-long=refuse"
    assert cli.main(argv.split()) == 0
    (_, options, _), (_, _, named) = calls
    assert options == (32, 128, 1, Sampling(0.7, 0, 0.9, 3), 64, "refuse")
    assert named["tasks"] == [Path("a.json"), Path("b")]
    assert named["workdir"] == Path("w")


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (FloatingPointError("the loss is nan\nat step 7"), 1, "error: the loss is nan at step 7\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (UserError("a.json:3: no Definition"), 2, "error: a.json:3: no Definition\n"),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    expected: str,
    calls: list[Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(hyper_t5.bench, "main", fail)
    assert fails(capsys, "bench", code=code).endswith(expected)


def test_a_bug_keeps_its_traceback(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise IndexError

    monkeypatch.setattr(hyper_t5.bench, "main", fail)
    with pytest.raises(IndexError):
        cli.main(["bench"])
