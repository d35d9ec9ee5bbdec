"""The HTTP API: answers equal `predict`'s, OpenAI's fields and errors, adapters, faults."""

from __future__ import annotations

import io
import json
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from fastapi.testclient import TestClient

from hyper_t5.serving import server
from hyper_t5.serving.api import create_app
from hyper_t5.serving.service import Service

pytest.importorskip("fastapi")

TASK = {"instruction": "reverse the letters", "examples": [{"input": "a b", "output": "b a"}]}
PROMPTS = ["a b c", "d e", "f g h i", "z", "p q r s t"]


def adapter_of(post: Any, name: str, instruction: str) -> str:
    status, body = post("/v1/adapters", name=name, instruction=instruction)
    assert status == 200
    assert body["name"] == name
    return name


# ------------------------------------------------------------------------------- completions


def test_answers_equal_those_of_predict(service: Service, post: Any) -> None:
    names = [adapter_of(post, f"equal{i}", text) for i, text in enumerate(["copy", "swap"])]
    for model in (service.name, *names):
        adapter = None if model == service.name else service.store.get(model)
        expected = service.predictor.predict(PROMPTS, adapter, max_decode_length=8)
        status, body = post("/v1/completions", model=model, prompt=PROMPTS, max_tokens=8)
        assert status == 200
        assert [choice["text"] for choice in body["choices"]] == expected
        assert [choice["index"] for choice in body["choices"]] == list(range(len(PROMPTS)))
        ids = [service.vocab.encode(prompt) for prompt in PROMPTS]
        assert body["usage"]["prompt_tokens"] == sum(len(x) + 1 for x in ids)


def test_a_task_in_the_request_is_generated_once(service: Service, post: Any) -> None:
    answers = [post("/v1/completions", prompt="a b c", max_tokens=8, task=TASK) for _ in range(2)]
    assert answers[0][1]["choices"] == answers[1][1]["choices"]
    status, body = post("/v1/adapters", **TASK)
    assert status == 200
    assert body["cached"]
    assert body["name"] == answers[0][1]["model"]
    expected = service.predictor.predict(
        ["a b c"], service.predictor.adapt(TASK), max_decode_length=8
    )
    assert answers[0][1]["choices"][0]["text"] == expected[0]


def test_stop_strings_and_length_end_a_row(service: Service, post: Any) -> None:
    [whole] = service.predictor.predict(["a b c"], None, max_decode_length=8)
    _, body = post("/v1/completions", model=service.name, prompt="a b c", max_tokens=2)
    [choice] = body["choices"]
    assert choice["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 2
    assert whole.startswith(choice["text"])
    stop = whole[len(whole) // 2 :][:2]
    _, body = post("/v1/completions", model=service.name, prompt="a b c", max_tokens=8, stop=stop)
    [choice] = body["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == whole[: whole.find(stop)]


def test_a_stream_has_the_same_text(service: Service, client: TestClient, post: Any) -> None:
    body = {"model": service.name, "prompt": PROMPTS[:2], "max_tokens": 8, "logprobs": 2}
    _, whole = post("/v1/completions", **body)
    text: dict[int, str] = {0: "", 1: ""}
    tokens: dict[int, list[float]] = {0: [], 1: []}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", "/v1/completions", json=body | options) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert events[-1]["usage"] == whole["usage"]
    for event in events[:-1]:
        [choice] = event["choices"]
        text[choice["index"]] += choice["text"]
        tokens[choice["index"]] += choice["logprobs"]["token_logprobs"]
    for choice in whole["choices"]:
        assert text[choice["index"]] == choice["text"]
        assert tokens[choice["index"]] == pytest.approx(choice["logprobs"]["token_logprobs"])
        assert all(len(top) == 2 for top in choice["logprobs"]["top_logprobs"])


def test_samples_differ_by_seed_and_repeat(service: Service, post: Any) -> None:
    body = {"model": service.name, "prompt": "a b c", "max_tokens": 8, "temperature": 2.0}
    first = [
        choice["text"] for choice in post("/v1/completions", n=4, seed=3, **body)[1]["choices"]
    ]
    again = [
        choice["text"] for choice in post("/v1/completions", n=4, seed=3, **body)[1]["choices"]
    ]
    assert first == again
    assert len(set(first)) > 1


def test_the_official_client(service: Service, client: TestClient) -> None:
    openai = pytest.importorskip("openai")
    api = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client)
    models = [model.id for model in api.models.list().data]
    assert models[0] == service.name
    answer = api.completions.create(model=service.name, prompt="a b c", max_tokens=8)
    [expected] = service.predictor.predict(["a b c"], None, max_decode_length=8)
    assert answer.choices[0].text == expected
    stream = api.completions.create(model=service.name, prompt="a b c", max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected
    with pytest.raises(openai.NotFoundError, match="The model `gpt-5` does not exist"):
        api.completions.create(model="gpt-5", prompt="a")
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        api.completions.create(model=service.name, prompt="a", logit_bias={"1": 2})


def test_many_requests_at_once_compile_nothing_and_are_not_mixed(
    service: Service, post: Any
) -> None:
    names = [adapter_of(post, f"many{i}", f"do task {i}") for i in range(3)]
    models = [service.name, *names]
    rng = np.random.default_rng(0)
    requests = []
    for i in range(200):
        prompt = " ".join(rng.choice(list("abcdefgh"), rng.integers(1, 20)))
        requests.append((models[i % 4], prompt, int(rng.integers(1, 9))))
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    try:
        with ThreadPoolExecutor(32) as pool:
            bodies = list(
                pool.map(
                    lambda r: post("/v1/completions", model=r[0], prompt=r[1], max_tokens=r[2]),
                    requests,
                )
            )
    finally:
        jax.monitoring.clear_event_listeners()
    assert not compiled
    assert {status for status, _ in bodies} == {200}
    for model in models:
        mine = [(r, body) for r, (_, body) in zip(requests, bodies, strict=True) if r[0] == model]
        adapter = None if model == service.name else service.store.get(model)
        for length in range(1, 9):
            rows = [(r[1], body) for r, body in mine if r[2] == length]
            expected = service.predictor.predict(
                [prompt for prompt, _ in rows], adapter, max_decode_length=length
            )
            assert [body["choices"][0]["text"] for _, body in rows] == expected


# ------------------------------------------------------------------------------- adapters


def test_an_adapter_is_described_exported_and_deleted(
    service: Service, client: TestClient, post: Any, tmp_path: Path
) -> None:
    name = adapter_of(post, "described", "copy the first letter")
    described = client.get(f"/v1/adapters/{name}").json()
    assert described["kind"] == "lora"
    assert described["parameters"] > 0
    layers = service.predictor.backbone.sizes
    count = layers.num_encoder_layers + layers.num_decoder_layers
    assert len(described["layer_norms"]) == count
    listed = [adapter["name"] for adapter in client.get("/v1/adapters").json()["data"]]
    assert name in listed
    archive = zipfile.ZipFile(io.BytesIO(client.get(f"/v1/adapters/{name}/peft").content))
    names = {Path(entry).name for entry in archive.namelist()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert client.delete(f"/v1/adapters/{name}").json() == {"name": name, "deleted": True}
    assert client.get(f"/v1/adapters/{name}").status_code == 404


def test_a_restart_finds_the_adapters_again(service: Service, post: Any) -> None:
    from hyper_t5.serving.store import AdapterStore

    for instruction in ("keep that", "keep this"):  # the second replaces the first
        name = adapter_of(post, "kept", instruction)
    assert service.store.describe(name)["instruction"] == "keep this"
    again = AdapterStore(service.predictor, service.store._folder, 4)
    assert name in again.names()
    for leaf, other in zip(
        jax.tree.leaves(again.get(name).adapters.tree),  # type: ignore[union-attr]
        jax.tree.leaves(service.store.get(name).adapters.tree),  # type: ignore[union-attr]
        strict=True,
    ):
        np.testing.assert_array_equal(leaf, other)


def test_adapters_beyond_the_limit_are_read_again(service: Service, post: Any) -> None:
    names = [adapter_of(post, f"lru{i}", f"instruction {i}") for i in range(6)]
    assert len(service.store._loaded) <= service.limits.max_adapters
    for name in names:
        status, _ = post("/v1/completions", model=name, prompt="a", max_tokens=1)
        assert status == 200


def test_vllm_style_load_and_unload(client: TestClient, post: Any) -> None:
    assert post("/v1/load_lora_adapter", lora_name="copied", lora_path="copy")[0] == 200
    assert post("/v1/completions", model="copied", prompt="a", max_tokens=1)[0] == 200
    assert post("/v1/unload_lora_adapter", lora_name="copied")[0] == 200
    assert post("/v1/completions", model="copied", prompt="a", max_tokens=1)[0] == 404


# ------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/completions", "{", 400, "body: invalid JSON"),
        ("/v1/completions", "[]", 400, "body: "),
        ("/v1/completions", "{}", 400, "prompt: field required"),
        ("/v1/completions", '{"model":"run","prompt":1}', 400, "prompt"),
        ("/v1/completions", '{"model":"run","prompt":"a","promt":"b"}', 400, "promt: unknown"),
        ("/v1/completions", '{"model":"run","prompt":"a","echo":true}', 400, "echo"),
        ("/v1/completions", '{"model":"run","prompt":"a","best_of":3}', 400, "best_of"),
        ("/v1/completions", '{"model":"run","prompt":"a","presence_penalty":1}', 400, "presence"),
        ("/v1/completions", '{"model":"run","prompt":"a","max_tokens":99}', 400, "at most 8"),
        ("/v1/completions", '{"model":"run","prompt":"a","max_tokens":0}', 400, "max_tokens"),
        ("/v1/completions", '{"model":"run","prompt":"a","temperature":NaN}', 400, "temperature"),
        ("/v1/completions", '{"model":"../run","prompt":"a"}', 404, "does not exist"),
        ("/nothing", "{}", 404, "POST /nothing: not found"),
        ("/v1/models", "{}", 405, "POST /v1/models: method not allowed"),
        ("/v1/adapters", "{}", 400, "an instruction or examples are required"),
        ("/v1/adapters", '{"name":"../x","instruction":"a"}', 400, "adapter name '../x'"),
        ("/v1/adapters", '{"name":"run","instruction":"a"}', 409, "name of the base model"),
        ("/v1/adapters", '{"instruction":"a","examples":[{"input":"a"}]}', 400, "output"),
        ("/v1/load_lora_adapter", '{"lora_name":"a","lora_path":"../run"}', 403, "inside"),
        ("/v1/load_lora_adapter", '{"lora_name":"a","lora_path":"/etc"}', 403, "inside"),
        ("/v1/load_lora_adapter", '{"lora_name":"a","lora_path":"none"}', 400, "none"),
    ],
)
def test_invalid_requests_are_one_sentence(
    client: TestClient, path: str, body: str, status: int, message: str
) -> None:
    response = client.post(path, content=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert message.lower() in error["message"].lower()
    assert error.keys() == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]


def test_large_bodies_and_prompts_are_refused(client: TestClient, post: Any) -> None:
    assert client.post("/v1/completions", content=b" " * 10_000_000).status_code == 413
    status, body = post("/v1/completions", model="run", prompt="a " * 90_000, max_tokens=4)
    assert status == 400
    assert "longer than 24 tokens" in body["error"]["message"]
    assert client.get("/health").json() == {"status": "ok"}


def test_damaged_adapters_change_nothing(
    service: Service, adapter_dir: Path, client: TestClient, post: Any
) -> None:
    from tests.support import tiny_runs

    adapter = service.predictor.load_adapter(adapter_dir / "copy")
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), adapter.adapters)
    type(adapter)(broken, adapter.meta).save(adapter_dir / "nan")
    status, body = post("/v1/load_lora_adapter", lora_name="nan", lora_path="nan")
    assert status == 400
    assert "non-finite values" in body["error"]["message"]
    other = tiny_runs.save_backbone(adapter_dir.parent / "other_t5", seed=5)
    meta = {**adapter.meta, "backbone": {**adapter.meta["backbone"], "digest": "0" * 64}}
    assert other.exists()
    type(adapter)(adapter.adapters, meta).save(adapter_dir / "other")
    assert post("/v1/load_lora_adapter", lora_name="other", lora_path="other")[0] == 400
    assert not {"nan", "other"} & set(service.store.names())


def test_a_full_queue_is_429_with_retry_after(client: TestClient, service: Service) -> None:
    body = {"model": service.name, "prompt": ["a"] * 64, "max_tokens": 8, "n": 1}
    limit, service.scheduler._max_queue = service.scheduler._max_queue, 10
    try:
        response = client.post("/v1/completions", json=body)
    finally:
        service.scheduler._max_queue = limit
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert client.post("/v1/completions", json=body).status_code == 200


def test_a_cancelled_row_frees_its_slot(service: Service, client: TestClient) -> None:
    body = {"model": service.name, "prompt": ["a b"] * 8, "max_tokens": 8, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())  # and leave
    answer = client.post("/v1/completions", json=body | {"stream": False}).json()
    assert len(answer["choices"]) == 8
    assert service.scheduler.queued == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failed_scheduler_ends_every_request(served_run: Path, service: Service) -> None:
    service = server.open_service(str(served_run), "", [], service.limits)
    lane = next(iter(service.lanes.values()))
    service.scheduler.start()

    def fail() -> Any:
        raise MemoryError("out of memory")

    lane.step = fail  # type: ignore[method-assign]
    body = {"model": service.name, "prompt": ["a"] * 10, "max_tokens": 4}
    with TestClient(create_app(service, log=False)) as client:
        response = client.post("/v1/completions", json=body)
        service.scheduler._thread.join()
        assert response.status_code == 503
        assert "must be restarted" in response.json()["error"]["message"]
        assert client.post("/v1/completions", json=body).status_code == 503
        assert client.get("/health").status_code == 503


def test_a_key_is_required_where_one_is_set(service: Service) -> None:
    with TestClient(create_app(service, "secret", log=False)) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret2"}):
            response = client.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "authentication_error"
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).is_success
        assert client.get("/health").is_success
        assert "access-control-allow-origin" not in client.get("/health").headers


def test_metrics_are_counted(client: TestClient, service: Service) -> None:
    client.post("/v1/completions", json={"model": service.name, "prompt": "a", "max_tokens": 2})
    text = client.get("/metrics").text
    [count] = re.findall(r'requests_total\{path="/v1/completions",status="200"\} (\S+)', text)
    assert float(count) >= 1
    assert re.search(r"hyper_t5_generated_tokens_total [1-9]", text)


# ------------------------------------------------------------------------------- the page


def test_the_page_is_one_file_without_others(client: TestClient) -> None:
    response = client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert not re.findall(r'(?:src|href)="(?!data:)[^"]', response.text)
    assert "http" not in re.sub(r"http://www\.w3\.org/2000/svg", "", response.text)
    tasks = client.get("/v1/tasks").json()["data"]
    assert tasks
    assert tasks[0].keys() == {"name", "instruction", "examples", "inputs"}
