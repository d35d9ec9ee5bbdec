"""A run and a server in this process, for the tests of serving."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from fastapi.testclient import TestClient

from hyper_t5.serving import server
from hyper_t5.serving.api import create_app
from hyper_t5.serving.service import Limits, Service
from tests.support import tiny_runs

LIMITS = Limits(max_batch=4, max_queue=64, max_adapters=4, max_input=24, max_output=8)


@pytest.fixture(scope="session")
def served_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a backbone, and a run of HyperT5-LoRA on it as if trained."""
    folder = tmp_path_factory.mktemp("served")
    tiny_runs.save_backbone(folder / "t5")
    config = tiny_runs.make_config(
        system="hyper_lora",
        backbone__path=str(folder / "t5"),
        adapter__lora_targets=("enc_self.value", "dec_self.query", "dec_mlp.wo"),
        data__mixture="synthetic",
        data__shots=(0, 4),
        data__input_length=24,
    )
    return tiny_runs.untrained_run(config, folder / "run", noise=0.3)


@pytest.fixture(scope="session")
def service(served_run: Path) -> Iterator[Service]:
    service = server.open_service(str(served_run), "", [], LIMITS)
    service.warm_up()
    service.scheduler.start()
    yield service
    service.scheduler.stop()


@pytest.fixture(scope="session")
def adapter_dir(served_run: Path, service: Service) -> Path:
    """Write adapter folders of this backbone below a folder."""
    folder = served_run.parent / "adapter_dir"
    for name, instruction in {"copy": "copy the letters", "swap": "swap the letters"}.items():
        adapter = service.predictor.adapt_all([{"instruction": instruction}], log=print)[0]
        adapter.save(folder / name)
    return folder


@pytest.fixture(scope="session")
def client(service: Service, adapter_dir: Path) -> Iterator[TestClient]:
    with TestClient(create_app(service, adapter_dir=adapter_dir, log=False)) as client:
        yield client


@pytest.fixture
def post(client: TestClient) -> Any:
    """Return a function that posts JSON and returns (status, body)."""

    def post(path: str, **body: Any) -> tuple[int, Any]:
        response = client.post(path, content=json.dumps(body))
        return response.status_code, response.json()

    return post
