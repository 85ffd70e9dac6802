"""The requests as pydantic models: what is understood, its types and its bounds.

Knows no engine. `routes` parses with them, `openapi` publishes them. Fields nobody knows are let
through, except those that would change what the answer means (`REFUSED`) and likely misspellings.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

MAX_CHOICES: Final = 16
"""Answers one request may ask for."""
REFUSED: Final = {
    "functions": "use `tools`",
    "function_call": "use `tool_choice`",
    "audio": "this model writes text",
    "web_search_options": "this server searches nothing",
    "logit_bias": "it is not supported",
    "suffix": "this model continues text, it does not fill gaps",
    "best_of": "ask for `n` answers and choose",
    "guided_json": "use `response_format`",
    "guided_regex": "use `response_format` with a json_schema",
    "guided_choice": "use `response_format` with a json_schema",
    "guided_grammar": "use `response_format` with a json_schema",
    "structured_outputs": "use `response_format`",
    "grammar": "use `response_format` with a json_schema",
    "json_schema": "use `response_format`",
    "chat_template": "the model's own is used",
    "continue_final_message": "an answer is always a new turn",
    "stop_token_ids": "use `stop`",
    "ignore_eos": "it is not supported",
    "min_tokens": "it is not supported",
    "bad_words": "it is not supported",
    "prompt_logprobs": "it is not supported",
    "typical_p": "use `top_p` or `min_p`",
    "mirostat": "use `top_p` or `min_p`",
    "options": "give `temperature` and the others directly",
    "truncate_prompt_tokens": "nothing is ever cut silently",
}
"""Fields that mean something elsewhere: set or true they are refused, with this reason."""
HARMLESS: Final = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "prediction", "verbosity", "cache_prompt", "keep_alive",
    "id_slot", "timings_per_token", "return_progress", "session_id", "chat_id", "id", "include",
}  # fmt: skip
"""Fields that change nothing about an answer."""

Text = str
Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Loose(BaseModel):
    """A model that lets unknown fields pass."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class Body(Loose):
    """A request's body: refuses what would silently mean something else."""

    @model_validator(mode="after")
    def _nothing_is_silently_ignored(self) -> Body:
        for name, value in (self.model_extra or {}).items():
            if value in (None, False, [], {}, 0, ""):
                continue
            if name == "best_of" and value == 1:
                continue
            if name in REFUSED:
                raise ValueError(f"`{name}` is not supported: {REFUSED[name]}")
            if name in HARMLESS:
                continue
            near = difflib.get_close_matches(name, type(self).model_fields, n=1, cutoff=0.85)
            if near:
                raise ValueError(f"there is no `{name}`: did you mean `{near[0]}`?")
        return self


class TextPart(Loose):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class FunctionCall(Loose):
    """Which function was called, with which arguments (a JSON object as text)."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    arguments: Text = ""


class Call(Loose):
    """A call in an assistant's message."""

    id: Text = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class MessageIn(Loose):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: Text | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: Text | None = None


class Function(Loose):
    """A function the model may call."""

    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Loose):
    """A tool: always a function."""

    type: Literal["function"]
    function: Function


class ChosenFunction(Loose):
    """The name of the function that must be called."""

    name: Name


class ToolChoice(Loose):
    """This function must be called."""

    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(Loose):
    """The schema an answer must fit."""

    name: Text = "answer"
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextFormat(Loose):
    """Plain text."""

    type: Literal["text"]


class ObjectFormat(Loose):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Loose):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class StreamOptions(Loose):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None


class Thinking(Loose):
    """Thinking on or off, in another vendor's words."""

    type: Literal["enabled", "disabled", "adaptive"]


Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


class Sampling(Body):
    """What chats and completions have in common."""

    model: Text | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None


class ChatRequest(Sampling):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[MessageIn], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    thinking: Thinking | bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


Ids = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1)]


class CompletionRequest(Sampling):
    """Body of /v1/completions."""

    prompt: (
        Text | Ids | Annotated[list[Text] | list[Ids], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class TokenizeRequest(Body):
    """Body of /tokenize."""

    content: Text


class DetokenizeRequest(Body):
    """Body of /detokenize."""

    tokens: list[Annotated[int, Field(ge=0, lt=1 << 31)]]
