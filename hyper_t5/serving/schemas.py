"""Requests of the HTTP API, as the OpenAI API defines them; unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hyper_t5.serving.lane import TOP_LOGPROBS
from hyper_t5.utils.overrides import SEED_END

MOST_CHARS = 200_000  # of a prompt, an instruction, or an example's part
MOST_ROWS = 64  # prompts times n of a request
Text = Annotated[str, Field(max_length=MOST_CHARS)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Example(_Request):
    """An example of a task."""

    input: Text
    output: Text


class Task(_Request):
    """What the hypermodel reads."""

    instruction: Text = ""
    examples: Annotated[list[Example], Field(max_length=1024)] = []

    def content(self) -> dict[str, Any]:
        """Return the task as `Predictor.adapt` takes it."""
        parts = self.model_dump(include={"instruction", "examples"})
        return {key: value for key, value in parts.items() if value}


class AdapterRequest(Task):
    """``POST /v1/adapters``."""

    name: str = ""


class LoadRequest(_Request):
    """``POST /v1/load_lora_adapter``, as vLLM names its fields."""

    lora_name: str
    lora_path: str


class UnloadRequest(_Request):
    """``POST /v1/unload_lora_adapter``."""

    lora_name: str


class StreamOptions(_Request):
    """Options of a streamed completion."""

    include_usage: bool = False


class CompletionRequest(_Request):
    """``POST /v1/completions``. Fields that T5 cannot honour have one valid value."""

    model: str = ""
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_ROWS)]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=MOST_ROWS)] = 1
    seed: Annotated[int, Field(ge=0, lt=SEED_END)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    task: Task | None = None
    # Of the OpenAI API, and not served.
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Literal[1] | None = None
    presence_penalty: Literal[0] | float | None = None
    frequency_penalty: Literal[0] | float | None = None
    logit_bias: None = None

    @property
    def prompts(self) -> list[str]:
        """The prompts as a list."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def stops(self) -> list[str]:
        """The stop strings that are not empty."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if stop]


def first_problem(error: ValidationError) -> tuple[str, str]:
    """Return (message, field) of the first invalid field, in one sentence."""
    problem = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in problem["loc"] if not str(part).startswith("function"))
    if problem["type"] == "extra_forbidden":
        return f"{field}: unknown field; remove it", field
    return f"{field or 'body'}: {problem['msg'][0].lower()}{problem['msg'][1:]}", field
