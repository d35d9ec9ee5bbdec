"""Messages of TensorFlow: its start-up noise is dropped, everything else is shown."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def test_tensorflow_prints_nothing() -> None:
    code = (
        "import sys\n"
        "from hyper_t5.tasks.seqio_tasks import tf\n"
        "print(tf.constant(1).numpy(), tf.config.get_visible_devices('GPU'))\n"
        "print('kept', file=sys.stderr)\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("TF_")}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120
    )
    assert (run.stdout, run.stderr) == ("1 []\n", "kept\n")


def test_other_output_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    from hyper_t5.tasks import seqio_tasks

    noise = "I0000 00:00:1795263331.93 6406 cudart_stub.cc:31] Could not find cuda drivers\n"
    with seqio_tasks._without_noise():
        os.write(2, (noise + "a library's complaint\n").encode())
    assert capfd.readouterr().err == "a library's complaint\n"

    def fail() -> None:
        with seqio_tasks._without_noise():
            os.write(2, noise.encode())
            raise ImportError

    with pytest.raises(ImportError):
        fail()
    assert capfd.readouterr().err == noise
