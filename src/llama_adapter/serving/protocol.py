"""OpenAI's requests as they are read: what is not supported is refused by name, never ignored."""

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from llama_adapter.data import Message
from llama_adapter.data.examples import check_encodable
from llama_adapter.errors import DataError

Stops = Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=4)]
Tokens = Annotated[int, Field(ge=1, lt=2**31)]
Text = Annotated[str, Field(max_length=4_000_000)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=4_000_000)]
Several = Field(min_length=1, max_length=64)
KIND = re.compile(r"constrained-\w+|list\[.*\]")
"""What pydantic calls the kinds of a value that may be of several."""
Nothing = Annotated[list[Any] | dict[str, Any] | None, Field(max_length=0)]
"""A field of something that is not supported, and may be there as long as it is empty."""


class Strict(BaseModel):
    """Refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Body(Strict):
    """A whole request."""

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        try:
            check_encodable(value, "the request")
        except DataError as error:
            raise ValueError(str(error)) from None
        return value


class StreamOptions(Strict):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(Strict):
    """`response_format`: text alone."""

    type: Literal["text"]


class Url(Strict):
    """Where a picture or video is: in the request itself, as `data:...;base64,...`."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None

    def content(self) -> bytes:
        """The file's bytes.

        Raises:
            ValueError: it is no `data:` URI in base64.
        """
        head, comma, body = self.url.partition(",")
        if not comma or not re.fullmatch("(?is)data:.*;base64", head):
            raise ValueError("it must be a data: URI in base64; nothing is fetched from elsewhere")
        return decoded(body)


class Audio(Strict):
    """A recording, in base64."""

    data: str
    format: Literal["wav", "mp3", "flac", "ogg"] = "wav"

    def content(self) -> bytes:
        """The file's bytes."""
        return decoded(self.data)


def decoded(body: str) -> bytes:
    """The bytes of a base64 text.

    Raises:
        ValueError: it is none, or empty.
    """
    try:
        content = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("its content is not base64") from None
    if not content:
        raise ValueError("its content is empty")
    return content


class ContentPart(Strict):
    """One part of a message's content."""

    type: Literal["text", "input_text", "output_text", "image_url", "video_url", "input_audio"]
    text: Text | None = None
    image_url: Url | None = None
    video_url: Url | None = None
    input_audio: Audio | None = None
    annotations: Nothing = None
    logprobs: Nothing = None

    @model_validator(mode="after")
    def _has_what_it_says(self) -> "ContentPart":
        wanted = "text" if self.type.endswith("text") else self.type
        fields = ("text", "image_url", "video_url", "input_audio")
        if [name for name in fields if getattr(self, name) is not None] != [wanted]:
            raise ValueError(f"a part of type '{self.type}' has '{wanted}' and nothing else")
        file = self.image_url or self.video_url or self.input_audio
        if file is not None:
            file.content()
        return self


class ChatMessage(Strict):
    """One message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[ContentPart], Field(min_length=1, max_length=256)]
    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    refusal: Literal[""] | None = None
    tool_calls: Nothing = None
    function_call: None = None
    audio: None = None
    annotations: Nothing = None

    def read(self) -> tuple[Message, list[bytes]]:
        """The message as training would read it, parts joined as they are, and its files."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return Message(role, self.content), []
        texts = [part.text for part in self.content if part.text is not None]
        files = [part.image_url or part.video_url or part.input_audio for part in self.content]
        return Message(role, "".join(texts)), [file.content() for file in files if file is not None]


class Common(Body):
    """What all requests for text may say. `user` and its kin, and a message's `name`, have no effect on the answer."""

    model: Annotated[str, Field(max_length=256)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory"] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def streaming(self) -> bool:
        """Whether the answer is wanted as it comes."""
        return bool(self.stream)


class Sampling(Common):
    """What chat and completions share."""

    n: Tokens | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Nothing = None
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2048)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    tools: Nothing = None
    functions: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    function_call: Literal["none", "auto"] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        return self

    @property
    def longest(self) -> int | None:
        """Most tokens that the answer may have."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens are reported; None reports no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampling):
    """`POST /v1/completions`: text, or tokens, as they are, without a template."""

    prompt: Text | Annotated[list[Text], Several] | Ids | Annotated[list[Ids], Several]
    max_tokens: Tokens | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _echoes_text_alone(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported: leave one of them out")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt: a text or its tokens."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @property
    def longest(self) -> int:
        """Most tokens that the answer may have; 16 where nobody says, as OpenAI's."""
        return self.max_tokens or 16

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens are reported."""
        return self.logprobs


class TextSetting(Strict):
    """`text` of a response."""

    format: TextFormat = TextFormat(type="text")
    verbosity: Literal["medium"] | None = None


class ObfuscationOff(Strict):
    """`stream_options` of a response."""

    include_obfuscation: Literal[False] | None = None


class ResponseRequest(Common):
    """`POST /v1/responses`: text in, text out; nothing is stored."""

    input: Text | Annotated[list[ChatMessage], Field(min_length=1, max_length=2048)]
    instructions: Text | None = None
    max_output_tokens: Tokens | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    text: TextSetting | None = None
    truncation: Literal["disabled"] | None = None
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    include: Nothing = None
    background: Literal[False] | None = None
    stream_options: ObfuscationOff | None = None
    previous_response_id: None = None
    reasoning: Nothing = None
    top_logprobs: Literal[0] | None = None

    n: ClassVar[int] = 1
    seed: ClassVar[None] = None
    stop: ClassVar[None] = None
    top: ClassVar[None] = None
    presence_penalty: ClassVar[float] = 0.0
    frequency_penalty: ClassVar[float] = 0.0

    @property
    def messages(self) -> list[ChatMessage]:
        """The conversation that it asks about."""
        opening = [] if self.instructions is None else [ChatMessage(role="system", content=self.instructions)]
        asked = [ChatMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        return [*opening, *asked]

    @property
    def longest(self) -> int | None:
        """Most tokens that the answer may have."""
        return self.max_output_tokens


TextRequest = ChatRequest | CompletionRequest | ResponseRequest
"""Any request for text."""


class LoadRequest(Body):
    """`POST /v1/load_lora_adapter`, vLLM's."""

    lora_name: Annotated[str, Field(min_length=1, max_length=128)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadRequest(Body):
    """`POST /v1/unload_lora_adapter`, vLLM's."""

    lora_name: Annotated[str, Field(min_length=1, max_length=128)]
    lora_int_id: int | None = None


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def first_fault(errors: Sequence[Any]) -> tuple[str, str]:
    """(message, parameter) of pydantic's or FastAPI's list of errors.

    Where a value may be of several kinds, each kind says what it misses: of the faults that are not about kinds, else
    of all, the deepest is that of the one meant.
    """
    first = errors[0]
    where = [part for part in first.get("loc", ()) if part != "body"]
    if first.get("type") == "json_invalid":
        reason = str(first.get("ctx", {}).get("error", ""))[:100]
        return f"The body is no JSON at character {where[0] if where else 0} ({reason}): send one object.", ""
    no_object = first.get("type") in ("model_attributes_type", "missing") or isinstance(first.get("input"), bytes)
    if no_object and not where:
        return "The body must be one JSON object, sent with 'Content-Type: application/json'.", ""
    found = max(errors, key=lambda error: (not _of_another_kind(error), len(error.get("loc", ()))))
    *where, last = [part for part in found.get("loc", ()) if part != "body"] or [""]
    kinds = [part for part in (*where, last) if isinstance(part, str) and KIND.fullmatch(part)]
    if found.get("type") == "extra_forbidden":  # a name of the client's own, whatever it looks like
        kinds = [part for part in kinds if part is not last]
    param = ".".join(str(part) for part in (*where, last) if part not in kinds)
    if found.get("type") == "extra_forbidden":
        return f"'{param[:200]}' is not supported here: leave it out.", param
    bounds, given = found.get("ctx") or {}, found.get("input")
    if found.get("type") == "too_long" and bounds.get("max_length") == 0:  # taken only where it asks for nothing
        return f"'{param[:200]}' is not supported here: leave it out, or leave it empty.", param
    if found.get("type") == "too_short" and not given:
        return f"'{param[:200]}' is empty: give at least one.", param
    message = str(found.get("msg", "is wrong")).removeprefix("Value error, ").replace(" after validation", "")
    return (f"'{param[:200]}': {message}." if param else f"{message}."), param


def _of_another_kind(error: Any) -> bool:
    """Whether a value is not of the kind that was tried, where another may have been meant."""
    return str(error.get("type", "")).endswith(("_type", "_parsing"))
