"""OpenAI's replies: whole ones, and the events of a stream."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from llama_adapter.inference.choice import Choice
from llama_adapter.serving.answers import Answering, Delta
from llama_adapter.serving.protocol import ChatRequest, CompletionRequest, ResponseRequest

Event = dict[str, Any]
Say = Callable[[int], bytes]
"""Token -> its text in UTF-8, perhaps half a character."""


def event(data: Event | str, name: str | None = None) -> str:
    """One server-sent event."""
    body = data if isinstance(data, str) else json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return f"event: {name}\ndata: {body}\n\n" if name else f"data: {body}\n\n"


def usage(answering: Answering) -> Event:
    """Tokens of a chat or completion."""
    prompt, new = answering.prompt_tokens, answering.new_tokens
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _head(kind: str, prefix: str, answering: Answering) -> Event:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": answering.name}


def _token(say: Say, token: int, logprob: float) -> Event:
    said = say(token)
    return {"token": said.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(said)}


def chat_logprobs(choices: Sequence[Choice], say: Say) -> Event:
    """`logprobs` of a chat's choice."""
    content = [
        {**_token(say, c.token, c.logprob), "top_logprobs": [_token(say, token, value) for token, value in c.top]}
        for c in choices
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(choices: Sequence[Choice], starts: Sequence[int], say: Say) -> Event:
    """`logprobs` of a completion's choice; `starts` is where in its text each token's begins."""
    return {
        "tokens": [_legible(say(c.token)) for c in choices],
        "token_logprobs": [max(c.logprob, -9999.0) for c in choices],
        "top_logprobs": [{_legible(say(token)): max(value, -9999.0) for token, value in c.top} for c in choices],
        "text_offset": list(starts),
    }


def _legible(said: bytes) -> str:
    """A token as text; half a character by its bytes, as OpenAI writes it, so that no two tokens look alike."""
    try:
        return said.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in said)


def chat_reply(request: ChatRequest, answering: Answering, say: Say) -> Event:
    """The whole answer to a chat request."""
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": written.text, "refusal": None},
            "logprobs": None if request.top is None else chat_logprobs(answering.choices[i], say),
            "finish_reason": written.reason,
        }
        for i, written in enumerate(answering.writers)
    ]
    return {**_head("chat.completion", "chatcmpl", answering), "choices": choices, "usage": usage(answering)}


def completion_reply(request: CompletionRequest, answering: Answering, say: Say) -> Event:
    """The whole answer to a completion request."""
    choices = [
        {
            "index": i,
            "text": answering.echoes[i] + written.text,
            "logprobs": None if request.top is None else completion_logprobs(answering.choices[i], written.starts, say),
            "finish_reason": written.reason,
        }
        for i, written in enumerate(answering.writers)
    ]
    return {**_head("text_completion", "cmpl", answering), "choices": choices, "usage": usage(answering)}


async def chat_events(request: ChatRequest, answering: Answering, say: Say) -> AsyncIterator[str]:
    """A chat's answer as it comes."""
    head, tail = _head("chat.completion.chunk", "chatcmpl", answering), _usage_field(request, None)

    def chunk(number: int, delta: Event, logprobs: Event | None = None, reason: str | None = None) -> str:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return event({**head, "choices": [choice], **tail})

    for number in range(len(answering.rows)):
        yield chunk(number, {"role": "assistant", "content": ""})
    waiting: dict[int, list[Choice]] = {}
    async for piece in answering.pieces():
        choices = _collected(waiting, piece)
        if piece.text or (piece.ended and choices):
            logprobs = None if request.top is None else chat_logprobs(choices, say)
            waiting[piece.number] = []
            yield chunk(piece.number, {"content": piece.text}, logprobs)
        if piece.ended:
            yield chunk(piece.number, {}, None, answering.writers[piece.number].reason)
    if _wants_usage(request):
        yield event({**head, "choices": [], "usage": usage(answering)})
    yield event("[DONE]")


async def completion_events(request: CompletionRequest, answering: Answering, say: Say) -> AsyncIterator[str]:
    """A completion's answer as it comes."""
    head, tail = _head("text_completion", "cmpl", answering), _usage_field(request, None)
    waiting: dict[int, list[Choice]] = {}
    reported = [0] * len(answering.rows)

    def chunk(number: int, text: str, logprobs: Event | None = None, reason: str | None = None) -> str:
        choice = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return event({**head, "choices": [choice], **tail})

    for number, echo in enumerate(answering.echoes):
        if echo:
            yield chunk(number, echo)
    async for piece in answering.pieces():
        choices = _collected(waiting, piece)
        if not (piece.text or piece.ended):
            continue
        first, last = reported[piece.number], reported[piece.number] + len(choices)
        starts = answering.writers[piece.number].starts[first:last]
        logprobs = None if request.top is None else completion_logprobs(choices, starts, say)
        waiting[piece.number], reported[piece.number] = [], last
        reason = answering.writers[piece.number].reason if piece.ended else None
        yield chunk(piece.number, piece.text, logprobs, reason)
    if _wants_usage(request):
        yield event({**head, "choices": [], "usage": usage(answering)})
    yield event("[DONE]")


def _collected(waiting: dict[int, list[Choice]], piece: Delta) -> list[Choice]:
    """The tokens whose text is in this piece: some are held back until it is known how they are written."""
    choices = waiting.setdefault(piece.number, [])
    if piece.choice is not None:
        choices.append(piece.choice)
    return choices


def _wants_usage(request: ChatRequest | CompletionRequest) -> bool:
    return bool(request.stream_options and request.stream_options.include_usage)


def _usage_field(request: ChatRequest | CompletionRequest, value: Event | None) -> Event:
    return {"usage": value} if _wants_usage(request) else {}


class ResponseReply:
    """A response, whole or event by event."""

    def __init__(self, request: ResponseRequest, answering: Answering) -> None:
        self.request, self.answering = request, answering
        self.id, self.item, self.created = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}", int(time.time())

    def body(self, status: str | None = None, error: Event | None = None) -> Event:
        """The response object; while it is being written, with `status` "in_progress"."""
        request, answering = self.request, self.answering
        cut = answering.writers[0].reason == "length"
        whole = status is None
        status = status or ("incomplete" if cut else "completed")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": answering.name,
            "output": [self.message(status)] if whole else [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": self._usage() if whole else None,
            "user": request.user,
            "metadata": request.metadata or {},
        }

    def message(self, status: str, empty: bool = False) -> Event:
        """The one item of the output."""
        content = [] if empty else [self.part()]
        return {"type": "message", "id": self.item, "status": status, "role": "assistant", "content": content}

    def part(self, text: str | None = None) -> Event:
        """The one part of that item."""
        text = self.answering.writers[0].text if text is None else text
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _usage(self) -> Event:
        prompt, new = self.answering.prompt_tokens, self.answering.new_tokens
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": new,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + new,
        }

    async def events(self) -> AsyncIterator[str]:
        """The response as it comes."""
        count = 0

        def say(kind: str, **fields: Any) -> str:
            nonlocal count
            count += 1
            return event({"type": kind, "sequence_number": count - 1, **fields}, kind)

        at: Event = {"item_id": self.item, "output_index": 0, "content_index": 0}
        yield say("response.created", response=self.body("in_progress"))
        yield say("response.in_progress", response=self.body("in_progress"))
        yield say("response.output_item.added", output_index=0, item=self.message("in_progress", empty=True))
        yield say("response.content_part.added", **at, part=self.part(""))
        async for piece in self.answering.pieces():
            if piece.text:
                yield say("response.output_text.delta", **at, delta=piece.text, logprobs=[])
        body = self.body()
        yield say("response.output_text.done", **at, text=self.answering.writers[0].text, logprobs=[])
        yield say("response.content_part.done", **at, part=self.part())
        yield say("response.output_item.done", output_index=0, item=body["output"][0])
        yield say(f"response.{body['status']}", response=body)
