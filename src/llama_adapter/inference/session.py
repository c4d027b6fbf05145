"""Text in, text out: a base with its adapters answers prompts written as in training."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.generation.streamers import TextStreamer

from llama_adapter.base import load_base, load_config, load_tokenizer
from llama_adapter.conditions.config import ConditionConfig
from llama_adapter.conditions.perception import Perception
from llama_adapter.core.config import WrittenAs
from llama_adapter.core.families import max_positions, shape_of
from llama_adapter.core.model import check_name, get_adapter, list_adapters, use_adapter
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
from llama_adapter.errors import AdapterError, ConfigError, DataError
from llama_adapter.formats.native import check_base, find_adapter, load_adapter, read_config, read_tensors
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.inference.engine import Engine, Row, fresh_generator
from llama_adapter.settings import Precision, Quantization, unknown_name

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


@dataclass(eq=False)
class Session:
    """A loaded base with its adapters, ready to answer. Threads may share one.

    Attributes:
        model: the base, which `engine` owns: it is not to be changed while the session answers.
        tokenizer: the base's.
        adapters: names.
        templates: how each adapter, and None, the bare base, wants prompts to be written.
        perceptions: what looks at files, for adapters with a condition.
        engine: decodes.
        generator: what is drawn without a seed comes from it.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    adapters: tuple[str, ...]
    templates: Mapping[str | None, WrittenAs]
    perceptions: Mapping[str, Perception] = field(default_factory=dict)
    engine: Engine = field(init=False)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.engine, self.generator = Engine(self.model), fresh_generator()

    def answer(
        self,
        prompts: Sequence[Prompt],
        adapter: str | Sequence[str | None] | None,
        config: GenerateConfig,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Answer]:
        """Answer a batch of prompts.

        Args:
            prompts: one per row; they are padded on the left.
            adapter: a name in `adapters` or None, the bare base, for all of them; or a sequence with one for each.
            config: how to decode.
            on_text: called with each piece of text as it comes; takes a single prompt.

        Raises:
            DataError: a prompt does not fit into the base's context, or a file cannot be read.
            AdapterError: pictures for an adapter that has no condition, an unknown name, or another number of names.
            ConfigError: `on_text` with several prompts.
        """
        if on_text is not None and len(prompts) != 1:
            raise ConfigError(f"on_text streams one answer, and there are {len(prompts)} prompts: leave it out.")
        if not prompts:
            return []
        names = [adapter] * len(prompts) if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(names) != len(prompts):
            raise AdapterError(f"Got {len(names)} adapters for {len(prompts)} prompts: give one, or one for each.")
        rows = self._rows(prompts, names, config)
        streamer = None if on_text is None else _Callback(self.tokenizer, on_text)

        def stream(number: int, token: int) -> None:
            if streamer is not None and token not in rows[number].stops:
                streamer.put(torch.tensor([token]))

        began = time.perf_counter()
        answers = self.engine.generate(rows, stream, config.compile)
        if streamer is not None:
            streamer.end()
        seconds = time.perf_counter() - began
        return [self._read(ids, row, seconds) for ids, row in zip(answers, rows, strict=True)]

    def _rows(self, prompts: Sequence[Prompt], names: Sequence[str | None], config: GenerateConfig) -> list[Row]:
        """What the engine is asked; files and stop tokens are looked up once for all rows of an adapter."""
        draws = self.generator if config.seed is None else torch.Generator().manual_seed(config.seed)
        seeds = torch.randint(2**62, (len(prompts),), generator=draws).tolist()
        rows: dict[int, Row] = {}
        for name in dict.fromkeys(names):
            if name not in self.templates:
                raise AdapterError(f"The session has an {unknown_name('adapter', name, self.adapters)}")
            template, mine = self.templates[name], [i for i, other in enumerate(names) if other == name]
            stops = frozenset(_stop_tokens(self.model, self.tokenizer, template))
            condition = self.condition(name, [prompts[i].media for i in mine])
            for place, i in enumerate(mine):
                asked = prompts[i]
                tokens = encode_prompt(asked.messages, template, self.tokenizer, asked.input, raw=template == "raw")
                rows[i] = Row(
                    tokens=tokens,
                    adapter=name,
                    condition=None if condition is None else condition[place].view(-1, condition.shape[-1]),
                    max_new_tokens=min(config.max_new_tokens, self._room(len(tokens))),
                    temperature=config.temperature,
                    top_p=config.top_p,
                    stops=stops,
                    generator=torch.Generator().manual_seed(seeds[i]),
                )
        return [rows[i] for i in range(len(prompts))]

    @torch.no_grad()
    def condition(self, adapter: str | None, media: Sequence[Sequence[Media]]) -> torch.Tensor | None:
        """The condition of each row's files, [B, hidden] or [B, K, hidden]; None where the adapter has none.

        Raises:
            DataError: a file cannot be read.
            AdapterError: files for an adapter that has no condition.
        """
        perception = self.perceptions.get(adapter or "")
        if perception is not None:
            module: Any = get_adapter(self.model, adapter).condition
            return perception.condition(module, media)
        if adapter is not None and any(media):
            raise AdapterError(
                f"The adapter '{adapter}' was trained on text alone and cannot look at files: leave them out, or "
                "take an adapter that was trained with --condition."
            )
        return None

    def using(self, adapter: str | None, media: Sequence[Sequence[Media]]) -> Any:
        """A context in which `adapter` serves the model's forwards, under the condition of each row's files.

        Raises:
            DataError, AdapterError: see `condition`.
        """
        if not list_adapters(self.model):
            return torch.no_grad()
        return use_adapter(self.model, adapter, self.condition(adapter, media))

    def _read(self, ids: list[int], row: Row, seconds: float) -> Answer:
        ended = bool(ids) and ids[-1] in row.stops
        kept = ids[:-1] if ended else ids
        text = self.tokenizer.decode(kept, skip_special_tokens=True).strip()
        return Answer(text, len(row.tokens), len(kept), round(seconds, 4), "stop" if ended else "length")

    def _room(self, tokens: int) -> int:
        context = max_positions(self.model.config) or 1 << 30
        if tokens >= context:
            raise DataError(f"The prompt has {tokens} tokens; the base takes at most {context - 1}: shorten it.")
        return context - tokens


def load_session(
    model: str | None,
    adapters: Mapping[str, str],
    device: torch.device,
    precision: Precision = "auto",
    quantization: Quantization | None = None,
    template: WrittenAs | None = None,
) -> Session:
    """Load a base and its adapters; all files are checked before the base's weights are read.

    Args:
        model: folder, hub name or 'bundled'; None takes the base that the first adapter was made for.
        adapters: name -> folder, or "owner/name[@revision]" on the hub.
        device: where the base goes.
        precision: of the base.
        quantization: what its linears are rounded to, "4bit", "8bit" (bitsandbytes) or "int8" (torchao).
        template: prompt format; None takes the adapter's own, else the tokenizer's chat template where it has one.

    Raises:
        LlamaAdapterError: a base or adapter that is missing, damaged or does not fit the other.
    """
    for name in adapters:
        check_name(name)
    folders = {name: find_adapter(source) for name, source in adapters.items()}
    configs = {name: read_config(folder) for name, folder in folders.items()}
    if model is None:
        model = next((config.base_model_name_or_path for config in configs.values()), "bundled")
    if model is None:
        raise AdapterError("The adapter does not say which base it was made for: pass --model.")
    shape = shape_of(load_config(model))
    for name, folder in folders.items():
        check_base(configs[name], shape, folder)
        read_tensors(folder, configs[name])
    perceptions = {
        name: Perception(config.condition, device)
        for name, config in configs.items()
        if isinstance(config.condition, ConditionConfig)
    }
    tokenizer = load_tokenizer(model)
    base = load_base(model, device, precision, quantization)
    log.info("base: %s on %s in %s", model, device.type, str(base.dtype).removeprefix("torch."))
    for name, folder in folders.items():
        load_adapter(base, folder, name)
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
        super().__init__(tokenizer, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each piece of text."""
        if text:
            self.on_text(text)
