"""Text in, text out: a base with its adapters answers prompts written as in training."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.generation.streamers import TextStreamer

from llama_adapter.base import load_base, load_config, load_tokenizer
from llama_adapter.conditions.perception import Perception
from llama_adapter.core.config import WrittenAs
from llama_adapter.core.families import max_positions, shape_of
from llama_adapter.core.model import check_name, get_adapter, use_adapter
from llama_adapter.data import (
    Example,
    Media,
    Message,
    encode,
    encode_prompt,
    parse_record,
    read_records,
    with_found_media,
)
from llama_adapter.errors import AdapterError, DataError
from llama_adapter.formats.native import check_base, load_adapter, read_config, read_tensors
from llama_adapter.inference.cache import GrowingCache
from llama_adapter.inference.compiled import compiled_steps, static_cache
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.inference.steps import use_quick_steps
from llama_adapter.settings import Precision

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """What is asked: a conversation that ends with the user, Alpaca's `input` to it, and pictures it is about."""

    messages: tuple[Message, ...]
    input: str = ""
    media: tuple[Media, ...] = ()

    @staticmethod
    def of(instruction: str, input: str = "", media: tuple[Media, ...] = ()) -> "Prompt":
        """One instruction without history."""
        return Prompt((Message("user", instruction),), input, media)


@dataclass(frozen=True)
class Answer:
    """What was answered, and what it took.

    `finish_reason` is "stop" where the model ended by itself and "length" where `max_new_tokens` cut it.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    finish_reason: str


@dataclass(frozen=True)
class Session:
    """A loaded base with its adapters, ready to answer."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    adapters: tuple[str, ...]
    templates: Mapping[str | None, WrittenAs]
    perceptions: Mapping[str, Perception] = field(default_factory=dict)

    def answer(
        self,
        prompts: Sequence[Prompt],
        adapter: str | None,
        config: GenerateConfig,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Answer]:
        """Answer a batch of prompts with one adapter (None: the bare base).

        Args:
            prompts: one per row; they are padded on the left.
            adapter: a name in `adapters`.
            config: how to decode.
            on_text: called with each piece of text as it comes; takes a single prompt.

        Raises:
            DataError: a prompt does not fit into the base's context, or a file cannot be read.
            AdapterError: pictures for an adapter that has no condition.
        """
        template = self.templates[adapter]
        rows = [encode_prompt(p.messages, template, self.tokenizer, p.input, raw=template == "raw") for p in prompts]
        room = self._room(max(map(len, rows)))
        settings = self._generation_config(config, min(config.max_new_tokens, room), template)
        input_ids, mask = self._left_padded(rows)
        streamer = None if on_text is None else _Callback(self.tokenizer, on_text)
        if config.seed is not None:
            torch.manual_seed(config.seed)
        began = time.perf_counter()
        cache: Cache = GrowingCache(self.model.config)
        if config.compile:
            settings.disable_compile = True  # transformers would compile around the hook that chooses adapters
            cache = static_cache(self.model, len(rows), input_ids.shape[1] + settings.max_new_tokens)
        steps = compiled_steps(self.model) if config.compile else nullcontext()
        with self.using(adapter, [prompt.media for prompt in prompts]), steps:
            out = self.model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=settings,
                streamer=streamer,
                past_key_values=cache,
            )
        seconds = time.perf_counter() - began
        stops = set(settings.eos_token_id)
        return [
            self._read(new, len(row), stops, seconds)
            for new, row in zip(out[:, input_ids.shape[1] :].tolist(), rows, strict=True)
        ]

    def using(self, adapter: str | None, media: Sequence[Sequence[Media]]) -> Any:
        """A context in which `adapter` serves the model's forwards, under the condition of each row's files.

        Raises:
            DataError: a file cannot be read.
            AdapterError: files for an adapter that has no condition.
        """
        if not self.adapters:
            return torch.no_grad()
        perception = self.perceptions.get(adapter or "")
        if perception is None:
            if adapter is not None and any(media):
                raise AdapterError(
                    f"The adapter '{adapter}' was trained on text alone and cannot look at files: leave them out, or "
                    "take an adapter that was trained with --condition."
                )
            return use_adapter(self.model, adapter)
        module = get_adapter(self.model, adapter).condition
        assert module is not None  # as there is a perception
        with torch.no_grad():
            return use_adapter(self.model, adapter, perception.condition(module, media))

    def _read(self, ids: list[int], prompt_tokens: int, stops: set[int], seconds: float) -> Answer:
        end = next((i for i, token in enumerate(ids) if token in stops), None)
        kept = ids if end is None else ids[:end]
        text = self.tokenizer.decode(kept, skip_special_tokens=True).strip()
        return Answer(text, prompt_tokens, len(kept), round(seconds, 4), "length" if end is None else "stop")

    def _room(self, longest: int) -> int:
        context = max_positions(self.model.config) or 1 << 30
        if longest >= context:
            raise DataError(f"The prompt has {longest} tokens; the base takes at most {context - 1}: shorten it.")
        return context - longest

    def _left_padded(self, rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return ids.to(self.model.device), mask.to(self.model.device)

    def _generation_config(self, config: GenerateConfig, max_new_tokens: int, template: WrittenAs) -> GenerationConfig:
        stops = _stop_tokens(self.model, self.tokenizer, template)
        sampling = {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0} if config.temperature else {}
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=config.temperature > 0,
            eos_token_id=stops,
            pad_token_id=stops[0],
            **sampling,
        )


def load_session(
    model: str | None,
    adapters: Mapping[str, str],
    device: torch.device,
    precision: Precision = "auto",
    load_in_4bit: bool = False,
    template: WrittenAs | None = None,
) -> Session:
    """Load a base and its adapters; all files are checked before the base's weights are read.

    Args:
        model: folder, hub name or 'bundled'; None takes the base that the first adapter was made for.
        adapters: name -> folder.
        device: where the base goes.
        precision: of the base.
        load_in_4bit: quantise the base with bitsandbytes.
        template: prompt format; None takes the adapter's own, else the tokenizer's chat template where it has one.

    Raises:
        LlamaAdapterError: a base or adapter that is missing, damaged or does not fit the other.
    """
    for name in adapters:
        check_name(name)
    configs = {name: read_config(folder) for name, folder in adapters.items()}
    if model is None:
        model = next((config.base_model_name_or_path for config in configs.values()), "bundled")
    if model is None:
        raise AdapterError("The adapter does not say which base it was made for: pass --model.")
    shape = shape_of(load_config(model))
    for name, folder in adapters.items():
        check_base(configs[name], shape, folder)
        read_tensors(folder, configs[name])
    perceptions = {
        name: Perception(config.condition, device) for name, config in configs.items() if config.condition is not None
    }
    tokenizer = load_tokenizer(model)
    base = load_base(model, device, precision, load_in_4bit)
    log.info("base: %s on %s in %s", model, device.type, str(base.dtype).removeprefix("torch."))
    for name, folder in adapters.items():
        load_adapter(base, folder, name)
    use_quick_steps(base)
    fallback: WrittenAs = "chat" if tokenizer.chat_template else "alpaca"
    templates: dict[str | None, WrittenAs] = {None: template or fallback}
    for name, config in configs.items():
        templates[name] = template or config.template or fallback
    if len(configs) == 1 and template is None:
        templates[None] = next(templates[name] for name in configs)  # so that with and without are asked alike
    return Session(base, tokenizer, tuple(adapters), templates, perceptions)


def default_device() -> torch.device:
    """The accelerator that PyTorch sees, else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def read_prompts(source: str) -> list[Prompt]:
    """Prompts from a file: .json/.jsonl records, or any other file with one instruction a line.

    A record has `instruction` (and `input`), `prompt`, or `messages` that end with the user; `image` names pictures.

    Raises:
        DataError: the file cannot be read, or a record has none of these.
    """
    if source.lower().endswith((".json", ".jsonl", ".ndjson")):
        return [_prompt_of(record, source, number) for number, record in read_records(source)]
    try:
        with open(source, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(f"{source} cannot be read ({reason}): give a text file, .json or .jsonl.") from None
    prompts = [Prompt.of(line) for line in lines if line]
    if not prompts:
        raise DataError(f"{source} is empty: write one instruction a line.")
    return prompts


def _prompt_of(record: object, source: str, number: int) -> Prompt:
    try:
        example = with_found_media(parse_record(_with_placeholder_answer(record)), source)
    except DataError as error:
        raise DataError(f"{source}, record {number}: {error}.") from None
    return Prompt(example.messages[:-1], example.input, example.media)


def _with_placeholder_answer(record: object) -> object:
    """The record as training would take it: what it asks is then parsed and checked by the same rules."""
    if not isinstance(record, dict):
        return record
    messages = record.get("messages")
    if isinstance(messages, list):
        asked = messages[:-1] if messages and _role(messages[-1]) == "assistant" else messages
        return {**record, "messages": [*asked, {"role": "assistant", "content": "?"}]}
    if "prompt" in record and "instruction" not in record:
        return {**record, "instruction": record["prompt"], "output": "?"}
    return {**record, "output": "?"}


def _role(turn: object) -> object:
    return turn.get("role") if isinstance(turn, dict) else None


def _stop_tokens(model: PreTrainedModel, tokenizer: Tokenizer, template: WrittenAs) -> list[int]:
    """What ends an answer: the token that ended responses in training, and the base's own end tokens."""
    example = Example((Message("user", "a"), Message("assistant", "b")), raw=template == "raw")
    trained = encode(example, template, tokenizer, 1 << 20)
    own = model.generation_config.eos_token_id if model.generation_config else None
    own = [] if own is None else [own] if isinstance(own, int) else list(own)
    last = [label for label in trained.labels if label >= 0][-1]
    return list(dict.fromkeys([last, *own]))


class _Callback(TextStreamer):
    """Hands each finished piece of text to a function."""

    def __init__(self, tokenizer: Tokenizer, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each piece of text."""
        if text:
            self.on_text(text)
