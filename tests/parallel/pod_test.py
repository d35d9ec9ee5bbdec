"""Commands of two processes of four devices each, which stand in for a pod.

They must compute what one process of eight devices does, and no failure may lose a saved step.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from hyper_t5.checkpoints import checkpoint
from hyper_t5.training import replay as replay_lib
from tests.support import processes, tiny_runs

HYPER_T5 = ["-m", "hyper_t5"]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ConfigDict]:
    """Make configs for eight devices, with one task per device unless a test sets `mesh.model`."""
    folder = tmp_path_factory.mktemp("inputs")
    backbone = tiny_runs.save_backbone(folder / "t5")
    sni = tiny_runs.save_sni(folder / "official")

    def make_config(**fields: Any) -> ConfigDict:
        common: dict[str, Any] = {"backbone__path": str(backbone), "data__sni_dir": str(sni)}
        common |= {"mesh__data": -1, "data__tasks_per_batch": 8, "train__keep": 0}
        common |= {"adapter__lora_targets": ("enc_self.query", "dec_cross.value", "dec_mlp.wo")}
        common |= {"model__dropout_rate": 0.1}
        return tiny_runs.make_config(**common | fields)

    return make_config


def run(argv: Sequence[str], count: int = 2, code: int = 0) -> list[processes.Result]:
    """Run a command on all processes to its end, with one exit code."""
    results = processes.run_processes([*HYPER_T5, *argv], count, 8 // count, timeout=300)
    assert [r.code for r in results] == [code] * count, results
    return results


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in tiny_runs.lines(folder)]


@pytest.mark.slow
def test_two_processes_compute_what_one_does(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both stages and evaluation, with the model sharded over the devices of each process."""
    # Compiled as for users: rounding decides the predictions of a model that has hardly learned.
    monkeypatch.setattr(processes, "cpu_flags", "--xla_force_host_platform_device_count={}".format)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    mesh: dict[str, Any] = {"mesh__data": 2, "mesh__model": 4, "system": "hyper_lora"}
    outputs: dict[int, Any] = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        first = make(stage="hyperpretrain", **mesh)
        second = make(hypermodel__path=str(folder / "first"), **mesh)
        results = run(tiny_runs.command(first, folder / "first"), count)
        run(tiny_runs.command(second, folder / "second"), count)
        run(["evaluate", "--workdir", str(folder / "second")], count)
        out = folder / "second" / "eval" / "4"
        report = json.loads((out / "metrics.json").read_text())["splits"]
        rows = (out / "predictions.jsonl").read_text()
        outputs[count] = losses(folder / "first"), losses(folder / "second"), report, rows
        # Process 0 alone logs, and writes the metrics.
        assert ["step 2/4" in r.stdout for r in results] == [True, False][:count]
        assert [line["step"] for line in tiny_runs.lines(folder / "first")] == [2, 4]
    np.testing.assert_allclose(outputs[2][0], outputs[1][0], rtol=1e-5)
    np.testing.assert_allclose(outputs[2][1], outputs[1][1], rtol=1e-5)
    assert outputs[2][2:] == outputs[1][2:]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(8, 1), (1, 8)])
def test_other_meshes_of_two_processes(make: Any, tmp_path: Path, mesh: tuple[int, int]) -> None:
    fields = {"mesh__data": mesh[0], "mesh__model": mesh[1], "system": "shared_lora"}
    for count in (1, 2):
        run(tiny_runs.command(make(**fields), tmp_path / str(count)), count)
    np.testing.assert_allclose(losses(tmp_path / "2"), losses(tmp_path / "1"), rtol=1e-5)


@pytest.mark.slow
def test_sigterm_to_one_process_saves_one_step_and_other_process_counts_resume(
    make: Any, tmp_path: Path
) -> None:
    config = make(system="shared_lora", train__steps=400, train__save_every=1000)
    argv = tiny_runs.command(config, tmp_path / "run")
    with processes.start_processes([*HYPER_T5, *argv]) as started:
        processes.wait_for(started[0], "step 2/400")
        started[1].send_signal(signal.SIGTERM)
        results = processes.join(started)
    assert [r.code for r in results] == [75, 75], results
    line = "hyper-t5: error: preempted; saved at step "
    assert [r.stderr.count(line) for r in results] == [1, 1], results
    step = checkpoint.latest_step(tmp_path / "run")
    assert step is not None
    assert 2 <= step < 400
    assert all(f"{line}{step} in" in r.stderr for r in results)
    for count in (2, 1):
        more = tiny_runs.command(config, tmp_path / "run", f"--gin.train.steps={step + 5 - count}")
        results = run(more, count)
        assert f"steps {step}" in results[0].stdout or f"steps {step + 3}" in results[0].stdout
    assert checkpoint.latest_step(tmp_path / "run") == step + 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "number"), [("steps 0 to", signal.SIGTERM), ("step 2/5000", signal.SIGKILL)]
)
def test_a_lost_process_ends_the_other(
    make: Any, tmp_path: Path, line: str, number: signal.Signals
) -> None:
    """By SIGTERM before the first step, as there is nothing to save, or by SIGKILL."""
    config = make(system="shared_lora", train__steps=5000, train__save_every=5000)
    argv = [*tiny_runs.command(config, tmp_path / "run"), "--heartbeat_timeout=4"]
    with processes.start_processes([*HYPER_T5, *argv]) as started:
        processes.wait_for(started[0], line)
        started[1].send_signal(number)
        [lost] = processes.join(started[1:], 2)
        [other] = processes.join(started[:1], 4 + 15)
    assert lost.code == -number
    assert other.code not in (0, 2, 75), other


def test_a_batch_over_interleaved_processes() -> None:
    """On a torus the devices of a process may not be adjacent in the mesh."""
    code = """
from hyper_t5.parallel import distributed
distributed.initialize()
import jax
import numpy as np
from jax.sharding import Mesh
from hyper_t5.parallel import sharding
devices = np.array(jax.devices())[[0, 4, 5, 1, 2, 6, 7, 3]].reshape(1, 8, 1)
placement = sharding.Placement(Mesh(devices, sharding.AXES), ())
index, count = sharding.batch_share(placement)
assert (index, count) == (jax.process_index(), 2)
share = np.arange(16)[index * 8 : index * 8 + 8]
share = {"tasks": share, "ids": 10 * share[:, None] + np.arange(3)}
batch = sharding.fetch(sharding.device_put_batch(share, placement))
assert sorted(batch["tasks"]) == list(range(16)), batch
assert batch["tasks"].tolist() != list(range(16)), batch
np.testing.assert_array_equal(batch["ids"], 10 * batch["tasks"][:, None] + np.arange(3))
"""
    for result in processes.run_processes(code):
        assert result.code == 0, result


def test_invalid_input_on_one_process_ends_both(make: Any, tmp_path: Path) -> None:
    config = make(system="shared_lora")
    argv = tiny_runs.command(config, tmp_path / "run")
    argvs = [[*argv], [*argv, "--gin.seed=1"]]
    code = f"import os, sys; from hyper_t5 import cli; argvs = {argvs!r}\n"
    code += "sys.exit(cli.main(argvs[int(os.environ['JAX_PROCESS_ID'])]))"
    results = processes.run_processes(code)
    assert [r.code for r in results] == [2, 2], results
    for result in results:
        assert result.stderr.startswith("hyper-t5: error: the config differs: "), results
        assert result.stderr.count("\n") == 1, results
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_bad_step_is_saved_by_all_processes(make: Any, tmp_path: Path) -> None:
    config = make(system="shared_lora", optimizer__learning_rate=1e38, train__steps=8)
    results = run(tiny_runs.command(config, tmp_path / "run"), code=1)
    assert all(" at step 2 on task" in r.stderr for r in results), results
    replay = replay_lib.load_replay(tmp_path / "run" / "replay" / "2")
    assert len(replay.tasks) == len(replay.batch["inputs"]) == 8
    assert replay.state is not None
    assert checkpoint.latest_step(Path(replay.state)) == 1


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["hyperpretrain", "mtf"])
def test_kills_at_any_moment_change_nothing(make: Any, tmp_path: Path, stage: str) -> None:
    """Kill -9 both processes at random moments, also while a checkpoint is written."""
    steps = 40
    fields = {"stage": stage, "system": "hyper_prefix", "train__steps": steps, "train__keep": 2}
    config = make(**fields, train__save_every=2, train__log_every=1)
    run(tiny_runs.command(config, tmp_path / "whole"))
    broken, rng, kills = tmp_path / "broken", random.Random(stage), 0
    argv = [*HYPER_T5, *tiny_runs.command(config, broken)]
    for _ in range(3):
        with processes.start_processes(argv) as started:
            before = checkpoint.latest_step(broken) or 0
            processes.wait_for(started[0], f"step {before + rng.randint(2, 9)}/{steps}", 300)
            time.sleep(rng.random() * 0.2)
            for process in rng.sample(started, 2):
                process.send_signal(signal.SIGKILL)
            results = processes.join(started)
        kills += sum(r.code == -signal.SIGKILL for r in results)
        after = checkpoint.latest_step(broken) or 0
        assert after >= before
    assert kills >= 4
    run(tiny_runs.command(config, broken))
    assert tiny_runs.leaves(broken, steps) == tiny_runs.leaves(tmp_path / "whole", steps)
    logged = [line["step"] for line in tiny_runs.lines(broken)]
    assert logged == sorted(set(logged))


@pytest.mark.slow
def test_two_processes_rank_options_as_one_does(make: Any, tmp_path: Path) -> None:
    folder = tmp_path / "MetaICL"
    names = {"train": ["copy"], "test": ["first", "last"]}
    (folder / "config" / "tasks").mkdir(parents=True)
    (folder / "config" / "hr_to_lr.json").write_text(json.dumps(names))
    options = ["a b", "a", "z y x"]
    for name in names["test"]:
        task = folder / "data" / name
        task.mkdir(parents=True)
        for part in ("train", "test"):
            rows = [
                {"task": name, "input": f"{x} {part}", "output": options[i % 3], "options": options}
                for i, x in enumerate("abcdefghijklmnop")
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (task / f"{name}_16_100_{part}.jsonl").write_text(text)
    config = make(data__metaicl_dir=str(folder), mesh__data=4, mesh__model=2, system="hyper_lora")
    workdir = tiny_runs.untrained_run(config, tmp_path / "run")
    predictions = []
    for count in (1, 2):
        out = tmp_path / str(count)
        flags = ["--mixture=metaicl", "--gin.eval.split=test_100", "--gin.eval.shots=2"]
        flags += ["--gin.data.use_instruction=False", f"--out={out}"]
        run(["evaluate", "--workdir", str(workdir), *flags], count)
        lines = (out / "predictions.jsonl").read_text().splitlines()
        predictions.append([json.loads(line) for line in lines])
    assert len(predictions[0]) == 32
    for row, expected in zip(*reversed(predictions), strict=True):
        scores = (row.pop("option_log_probs"), expected.pop("option_log_probs"))
        np.testing.assert_allclose(*scores, rtol=1e-5)
        assert row == expected


@pytest.mark.soak
def test_a_killed_evaluation_resumes(make: Any, tmp_path: Path) -> None:
    """Kill -9 both processes after a task or more, then a single one, then run both to the end."""
    folder = tiny_runs.save_sni(tmp_path / "official", rows=24)
    # Three tasks, and outputs so long that a kill comes between them.
    fields = {"eval__split": "train", "eval__batch": 4, "eval__max_decode_length": 64}
    fields |= {"mesh__data": 4, "mesh__model": 2, "system": "hyper_lora"}
    config = make(data__sni_dir=str(folder), **fields)
    workdir = tiny_runs.untrained_run(config, tmp_path / "run")
    argv = ["evaluate", "--workdir", str(workdir), "--out"]
    run([*argv, str(tmp_path / "whole")])
    out = tmp_path / "broken"
    for count, least in ((2, 1), (1, 2)):
        with processes.start_processes([*HYPER_T5, *argv, str(out)], count, 8 // count) as started:
            deadline = time.monotonic() + 300
            while len(cached := list(out.glob("answers/*.jsonl"))) < least:
                assert time.monotonic() < deadline, "no task was evaluated"
                assert started[0].popen.poll() is None, "it ended first"
                time.sleep(0.01)
            for process in started:
                process.send_signal(signal.SIGKILL)
            processes.join(started)
        assert not (out / "metrics.json").exists()
    cached[0].write_bytes(cached[0].read_bytes()[:-5])
    results = run([*argv, str(out)])
    assert "of 3 tasks are complete" in results[0].stdout
    assert f"{cached[0]} is damaged" in results[0].stdout
    assert results[1].stdout.count("evaluate") == 0
    files = [folder / "predictions.jsonl" for folder in (out, tmp_path / "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (out / "prediction_cache").exists()
