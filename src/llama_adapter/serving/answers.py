"""From a request to its answer: rows for the engine, and text as it comes."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from llama_adapter.errors import ConfigError, DataError, TooLongError
from llama_adapter.inference.choice import Choice, Row
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.inference.session import Prompt, Session
from llama_adapter.serving.config import ServeConfig
from llama_adapter.serving.experts import Experts
from llama_adapter.serving.metrics import Metrics
from llama_adapter.serving.protocol import ChatMessage, ChatRequest, CompletionRequest, ResponseRequest, TextRequest
from llama_adapter.serving.scheduler import Scheduler, Ticket
from llama_adapter.serving.text import Written


@dataclass(frozen=True)
class Delta:
    """What one step brought to one answer."""

    number: int
    text: str
    choice: Choice | None
    ended: bool


@dataclass(eq=False)
class Answering:
    """A request that is being answered; leave it by `close`, whatever happens.

    Attributes:
        name: the model that was asked for.
        writers: the text of each answer.
        choices: the tokens of each, where log-probabilities were asked for.
        prompt_tokens: of every prompt, once.
        echoes: what each answer's text begins with: its prompt, where that was asked for.
    """

    name: str
    rows: list[Row]
    writers: list[Written]
    prompt_tokens: int
    scheduler: Scheduler
    metrics: Metrics
    leave: Callable[[], None]
    deadline: float
    echoes: list[str] = field(init=False)
    choices: list[list[Choice]] = field(init=False)
    began: float = field(default_factory=time.monotonic)
    _pieces: "asyncio.Queue[Delta | Exception | None]" = field(default_factory=asyncio.Queue)
    _ticket: Ticket | None = None
    _done: bool = False
    _first: float | None = None

    def __post_init__(self) -> None:
        self.choices = [[] for _ in self.rows]
        self.echoes = ["" for _ in self.rows]

    @property
    def new_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(writer.tokens for writer in self.writers)

    def start(self) -> None:
        """Put it in line.

        Raises:
            BusyError, ClosingError: see `Scheduler.submit`.
        """
        loop = asyncio.get_running_loop()
        sent = [0] * len(self.rows)

        def put(event: Delta | Exception | None) -> None:
            loop.call_soon_threadsafe(self._pieces.put_nowait, event)

        def on_token(number: int, choice: Choice) -> bool:
            if self._first is None:
                self._first = time.monotonic() - self.began
            writer = self.writers[number]
            enough = writer.add(choice)
            ended = enough or writer.tokens >= self.rows[number].max_new_tokens
            if ended:
                writer.finish()
            of_text = self.rows[number].logprobs is not None and choice.token not in writer.ends
            if of_text:
                self.choices[number].append(choice)
            text, sent[number] = writer.text[sent[number] :], len(writer.text)
            put(Delta(number, text, choice if of_text else None, ended))
            return enough

        self._ticket = Ticket(self.rows, on_token, put, self.deadline)
        self.scheduler.submit(self._ticket)

    async def pieces(self) -> AsyncIterator[Delta]:
        """Text as it comes, of all answers by turns.

        Raises:
            Exception: what ended the request before its time.
        """
        while True:
            event = await self._pieces.get()
            if isinstance(event, Exception):
                self._done = True
                raise event
            if event is None:
                self._done = True
                return
            yield event

    async def finish(self) -> None:
        """Wait for the whole answer."""
        async for _ in self.pieces():
            pass

    def close(self) -> None:
        """Let it go, finished or not."""
        if self._ticket is not None and not self._done:
            self.scheduler.cancel(self._ticket)
        self.metrics.answered(
            self.name, self._done, self.prompt_tokens, self.new_tokens, self._first, time.monotonic() - self.began
        )
        self.leave()


class Answerer:
    """Turns requests into rows. Threads may share it: one prepares at a time, as tokenizers and towers are shared."""

    def __init__(
        self, session: Session, experts: Experts, scheduler: Scheduler, config: ServeConfig, metrics: Metrics
    ) -> None:
        self.session, self.experts, self.scheduler = session, experts, scheduler
        self.config, self.metrics = config, metrics
        self._lock = threading.Lock()

    def chat(self, request: ChatRequest | ResponseRequest) -> Answering:
        """A chat or response request, written by the template of its adapter. Blocks; not for the event loop."""
        prompt = self._prompt(request.messages)
        return self._prepare(request, 1, lambda key, config: self._rows([prompt], key, config, request.n or 1))

    def complete(self, request: CompletionRequest) -> Answering:
        """A completion request: text, or tokens, as they are."""
        count = request.n or 1

        def rows(key: str | None, config: GenerateConfig) -> list[Row]:
            return self._rows([as_it_is(prompt) for prompt in request.prompts], key, config, count)

        answering = self._prepare(request, len(request.prompts), rows, strip=False)
        if request.echo:
            texts = [
                prompt if isinstance(prompt, str) else str(self.session.tokenizer.decode(prompt))
                for prompt in request.prompts
            ]
            answering.echoes = [text for text in texts for _ in range(count)]
        return answering

    def _prompt(self, messages: list[ChatMessage]) -> Prompt:
        read = [message.read() for message in messages]
        files = [file for _, found in read for file in found]
        if len(files) > self.config.max_files:
            raise DataError(f"The request has {len(files)} files; at most {self.config.max_files} are read.")
        # As in records, a system message of nothing is none: it takes no template's own one away
        asked = (message for message, _ in read if message.role != "system" or message.content.strip())
        return Prompt(tuple(asked), media=tuple(files))

    def _rows(self, prompts: list[Prompt], key: str | None, config: GenerateConfig, choices: int) -> list[Row]:
        asked = [prompt for prompt in prompts for _ in range(choices)]
        return self.session.rows(asked, [key] * len(asked), config)

    def _prepare(
        self, request: TextRequest, prompts: int, rows_of: Callable[[str | None, GenerateConfig], list[Row]],
        strip: bool = True,
    ) -> Answering:  # fmt: skip
        limits = self.config
        longest = request.longest
        if longest is not None and longest > limits.max_tokens:
            raise DataError(
                f"An answer of {longest} tokens was asked for; this server writes at most {limits.max_tokens}: "
                "ask for fewer, or start it with a larger --max-tokens."
            )
        if (request.n or 1) > limits.max_choices:
            raise DataError(f"n is {request.n}; this server writes at most {limits.max_choices} answers to a request.")
        if (count := prompts * (request.n or 1)) > limits.max_rows:
            raise ConfigError(f"The request asks for {count} answers; this server writes {limits.max_rows} at once.")
        config = GenerateConfig(
            max_new_tokens=longest or limits.max_tokens,
            temperature=1.0 if request.temperature is None else float(request.temperature),
            top_p=1.0 if request.top_p is None else float(request.top_p),
            seed=None if request.seed is None else request.seed % 2**32,
        )
        with contextlib.ExitStack() as stack:
            expert = stack.enter_context(self.experts.using(request.model))
            with self._lock:
                rows = rows_of(expert.key, config)
            if longest is not None and any(row.max_new_tokens < longest for row in rows):
                row = min(rows, key=lambda row: row.max_new_tokens)
                raise TooLongError(
                    f"The prompt has {len(row.tokens)} tokens and the answer was to have {longest}: the base's context "
                    f"has room for {row.max_new_tokens} more. Shorten one of them."
                )
            rows = [
                replace(
                    row,
                    presence_penalty=float(request.presence_penalty or 0),
                    frequency_penalty=float(request.frequency_penalty or 0),
                    logprobs=request.top,
                )
                for row in rows
            ]
            stops = tuple(request.stop or ())
            writers = [Written(self._decode, row.stops, stops, strip, () if strip else row.tokens) for row in rows]
            prompt_tokens = sum(len(row.tokens) for row in rows[:: request.n or 1])
            deadline = time.monotonic() + limits.deadline
            leave = stack.pop_all().close
        return Answering(expert.name, rows, writers, prompt_tokens, self.scheduler, self.metrics, leave, deadline)

    def _decode(self, tokens: Any) -> str:
        return str(self.session.tokenizer.decode(tokens, skip_special_tokens=True))


def as_it_is(prompt: str | list[int]) -> Prompt:
    """What is asked without a template."""
    if isinstance(prompt, str):
        return replace(Prompt.of(prompt), raw=True)
    return replace(Prompt.of("a"), raw=True, ids=tuple(prompt))
