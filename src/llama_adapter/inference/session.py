"""Text in, text out: a base with its adapters answers prompts written as in training."""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.generation.streamers import TextStreamer

from llama_adapter.base import empty_base, first_sentence, is_here, load_base, load_config, load_tokenizer
from llama_adapter.conditions.config import ConditionConfig, is_python, unnamed
from llama_adapter.conditions.perception import Perception
from llama_adapter.conditions.python_towers import PythonTower, load_named_towers
from llama_adapter.core.config import AdapterConfig, WrittenAs
from llama_adapter.core.families import shape_of
from llama_adapter.core.model import check_name, get_adapter, list_adapters, remove_adapter, use_adapter
from llama_adapter.core.registry import device_of
from llama_adapter.data import Example, Media, Message, encode_all
from llama_adapter.data.limits import Limits
from llama_adapter.errors import AdapterError, ConfigError, ModelError, UnsupportedModelError
from llama_adapter.formats.load import check_parts_fit, find_adapter, load_adapter, place_adapter, read_adapter
from llama_adapter.formats.native import check_base, names_another_base
from llama_adapter.formats.stored import Hints, Reading
from llama_adapter.inference.choice import Row, fresh_generator
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.inference.defaults import base_defaults
from llama_adapter.inference.engine import Engine
from llama_adapter.inference.writing import Prompt, Writer
from llama_adapter.settings import Precision, Quantization

log = logging.getLogger(__name__)

MOST_FEATURES = 256
"""Files that an adapter remembers having looked at."""


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
        towers: those of Python code that adapters may look with.
        template: what all adapters are asked in, those added later, too; None: each as it was trained.
        writer: prompts to tokens, within what the base takes.
        engine: decodes.
        generator: what is drawn without a seed comes from it.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    adapters: list[str]
    templates: dict[str | None, WrittenAs]
    perceptions: dict[str, Perception] = field(default_factory=dict)
    towers: Sequence[PythonTower] = ()
    template: WrittenAs | None = None
    writer: Writer = field(init=False)
    engine: Engine = field(init=False)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.writer = Writer(self.tokenizer, self.templates, Limits.of(self.model.config), self.template)
        self.engine, self.generator, self._told = Engine(self.model), fresh_generator(), False

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
            DataError: a prompt cannot be asked (see `Writer.prompt`), or a file cannot be read.
            AdapterError: pictures for who cannot look at them, an unknown name, or another number of names.
            ConfigError: `on_text` with several prompts.
        """
        if on_text is not None and len(prompts) != 1:
            raise ConfigError(f"on_text streams one answer, and there are {len(prompts)} prompts: leave it out.")
        if not prompts:
            return []
        names = [adapter] * len(prompts) if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(names) != len(prompts):
            raise AdapterError(f"Got {len(names)} adapters for {len(prompts)} prompts: give one, or one for each.")
        rows = self.rows(prompts, names, config)
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

    def rows(self, prompts: Sequence[Prompt], names: Sequence[str | None], config: GenerateConfig) -> list[Row]:
        """What the engine is asked; files and stop tokens are looked up once for all rows of an adapter.

        Args:
            prompts: one per row.
            names: an adapter's name or None, the bare base, per row.
            config: how to decode.

        Raises:
            DataError, AdapterError: as `answer`.
        """
        draws = self.generator if config.seed is None else torch.Generator().manual_seed(config.seed)
        seeds = torch.randint(2**62, (len(prompts),), generator=draws).tolist()
        rows: dict[int, Row] = {}
        for name in dict.fromkeys(names):
            template, mine = self.writer.template(name), [i for i, other in enumerate(names) if other == name]
            asked = [self.writer.prompt(prompts[i], name) for i in mine]
            stops = frozenset(_stop_tokens(self.model, self.tokenizer, template, prompts[mine[0]]))
            condition = self.condition(name, [prompts[i].media for i in mine])
            for place, (i, tokens) in enumerate(zip(mine, asked, strict=True)):
                rows[i] = Row(
                    tokens=tokens,
                    adapter=name,
                    condition=None if condition is None else condition[place].view(-1, condition.shape[-1]),
                    max_new_tokens=self._room(len(tokens), config.max_new_tokens, prompts[i].origin),
                    temperature=config.temperature,
                    top_p=config.top_p,
                    stops=stops,
                    generator=torch.Generator().manual_seed(seeds[i]),
                )
        return [rows[i] for i in range(len(prompts))]

    def add(self, name: str, folder: str) -> None:
        """Load one more adapter; not while the engine decodes.

        Raises:
            AdapterError: the name is taken, or the folder is damaged or made for another base.
        """
        config = load_adapter(self.model, folder, name).config
        if isinstance(config.condition, ConditionConfig):
            try:
                device = device_of(self.model.get_input_embeddings())
                self.perceptions[name] = _perception(config.condition, device, self.perceptions, self.towers)
            except Exception:
                remove_adapter(self.model, name)
                raise
        self.templates[name] = self.writer.wanted(config.template)
        self.adapters.append(name)

    def remove(self, name: str) -> None:
        """Take an adapter off; not while the engine decodes.

        Raises:
            AdapterError: there is none of that name.
        """
        remove_adapter(self.model, name)
        self.adapters.remove(name)
        del self.templates[name]
        self.perceptions.pop(name, None)

    @torch.no_grad()
    def condition(self, adapter: str | None, media: Sequence[Sequence[Media]]) -> torch.Tensor | None:
        """The condition of each row's files, [B, hidden] or [B, K, hidden]; None where the adapter has none.

        Raises:
            DataError: a file cannot be read.
            AdapterError: files for the bare base, or for an adapter that has no condition.
        """
        perception = self.perceptions.get(adapter or "")
        if perception is not None:
            module: Any = get_adapter(self.model, adapter).condition
            return perception.condition(module, media)
        if any(media):
            who = "bare base" if adapter is None else f"adapter '{adapter}' was trained on text alone and"
            raise AdapterError(
                f"The {who} cannot look at files: leave them out, or take an adapter that was trained with --condition."
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

    def _room(self, tokens: int, wanted: int, origin: str) -> int:
        """How many new tokens a row may have, its own; that they are fewer than wanted is said once a session."""
        room = self.writer.limits.room(tokens)
        if room < wanted and not self._told:
            self._told = True
            log.warning(
                "%s has %d tokens and the base takes %s: there is room for %d new ones, not for max_new_tokens %d",
                origin or "the prompt", tokens, self.writer.limits.positions, room, wanted,
            )  # fmt: skip
        return min(room, wanted)


@dataclass(frozen=True)
class SessionPlan:
    """A session before its weights are read: what can be checked without them has been.

    Attributes:
        model: the base, as transformers finds it.
        folders: of each adapter, by name.
        readings: each adapter as it was read, by name.
        writer: prompts to tokens, within what the base takes; prompts can be checked with it now.
        defaults: what of the base's own settings for decoding is followed.
        towers: names of those that Python code makes, as the user gave them; `load` runs the code.
    """

    model: str
    folders: Mapping[str, str]
    readings: Mapping[str, Reading]
    writer: Writer
    defaults: GenerationConfig
    towers: tuple[str, ...] = ()

    def load(
        self,
        device: torch.device | str,
        precision: Precision = "auto",
        quantization: Quantization | None = None,
    ) -> Session:
        """Read the weights; see `load_session`."""
        try:
            device = torch.device(device)
        except RuntimeError:
            raise ConfigError(f"There is no device {device!r}: pass 'cpu', 'cuda' or as torch names them.") from None
        conditions = {n: c for n, r in self.readings.items() if isinstance(c := r.config.condition, ConditionConfig)}
        towers = load_named_towers(self.towers, conditions.values(), device)
        perceptions: dict[str, Perception] = {}
        for name, condition in conditions.items():
            perceptions[name] = _perception(condition, device, perceptions, towers)
        base = load_base(self.model, device, precision, quantization)
        base.generation_config = self.defaults
        log.info("base: %s on %s in %s", self.model, device.type, str(base.dtype).removeprefix("torch."))
        for name, found in self.readings.items():
            place_adapter(base, found, name, self.folders[name])
        writer, names = self.writer, list(self.folders)
        return Session(base, writer.tokenizer, names, dict(writer.templates), perceptions, towers, writer.given)


def load_session(
    model: str | None,
    adapters: Mapping[str, str],
    device: torch.device | str,
    precision: Precision = "auto",
    quantization: Quantization | None = None,
    template: WrittenAs | None = None,
    towers: Sequence[str] = (),
) -> Session:
    """Load a base and its adapters; all files are checked before the base's weights are read.

    Args:
        model: folder, hub name or 'bundled'; None takes the base that the first adapter was made for.
        adapters: name -> folder, "owner/name[@revision]" on the hub, or another program's adapter.
        device: where the base goes.
        precision: of the base.
        quantization: what its linears are rounded to, "4bit", "8bit" (bitsandbytes) or "int8" (torchao).
        template: prompt format; None takes the adapter's own, else the tokenizer's chat template where it has one.
        towers: "python:FILE.py:FUNCTION" of each adapter that was trained with such a tower: code that you let run.

    Raises:
        LlamaAdapterError: a base or adapter that is missing, damaged or does not fit the other.
    """
    return plan_session(model, adapters, template, towers).load(device, precision, quantization)


def plan_session(
    model: str | None, adapters: Mapping[str, str], template: WrittenAs | None = None, towers: Sequence[str] = ()
) -> SessionPlan:
    """Check the files of a session and read everything but the weights of its base; see `load_session`."""
    for name in adapters:
        check_name(name)
    hints = Hints(None if model is None else shape_of(load_config(model)))
    folders = {name: str(find_adapter(source)) for name, source in adapters.items()}
    found = {name: read_adapter(folder, hints) for name, folder in folders.items()}
    configs = {name: reading.config for name, reading in found.items()}
    for name, config in configs.items():
        if isinstance(config.condition, ConditionConfig) and is_python(config.condition.tower) and not towers:
            raise AdapterError(f"Adapter '{name}': {unnamed(config.condition.tower)}")
    if model is None:
        model = _base_of(next(iter(folders.values())), next(iter(configs.values()))) if adapters else "bundled"
    base = load_config(model)
    shape = shape_of(base)
    for name, folder in folders.items():
        check_base(configs[name], shape, folder)
        if warning := names_another_base(configs[name], model):
            log.warning("%s: %s", folder, warning)
        if configs[name].has_parts:
            check_parts_fit(configs[name], found[name].tensors, empty_base(base), folder)
    tokenizer, limits = load_tokenizer(model), Limits.of(base)
    if warning := limits.warning(tokenizer):
        log.warning(warning)
    templates: dict[str | None, WrittenAs] = {}
    writer = Writer(tokenizer, templates, limits, template)
    templates[None] = writer.wanted(None)
    templates.update((name, writer.wanted(config.template)) for name, config in configs.items())
    if len(configs) == 1 and template is None:
        templates[None] = next(templates[name] for name in configs)  # so that with and without are asked alike
    return SessionPlan(model, folders, found, writer, base_defaults(model, base), tuple(towers))


def _base_of(folder: str, config: AdapterConfig) -> str:
    """Where the base is that an adapter was made for: as it was named, or so beside the adapter's files.

    Raises:
        AdapterError: the adapter does not say.
        ModelError: it is in neither place and nothing that the hub could know.
    """
    base = config.base_model_name_or_path
    if base is None:
        raise AdapterError("The adapter does not say which base it was made for: pass --model.")
    for place in (base, os.path.join(folder, base)):
        if is_here(place):
            return place
    try:
        load_config(base)
    except UnsupportedModelError:
        raise
    except ModelError as error:
        raise ModelError(
            f"The adapter's base '{base}' is not here: pass --model FOLDER. ({first_sentence(error)})"
        ) from None
    return base


def _perception(
    condition: ConditionConfig, device: torch.device, others: Mapping[str, Perception], towers: Sequence[PythonTower]
) -> Perception:
    return Perception(condition, device, most=MOST_FEATURES, others=others.values(), towers=towers)


def default_device() -> torch.device:
    """The accelerator that PyTorch sees, else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def _stop_tokens(model: PreTrainedModel, tokenizer: Tokenizer, template: WrittenAs, asked: Prompt) -> list[int]:
    """What ends an answer: the token that ended responses in training, and the base's own end tokens."""
    raw = asked.raw or template == "raw"
    messages = asked.messages[-1:] if raw else asked.messages
    example = Example((*messages, Message("assistant", "b")), raw=raw, tools=() if raw else asked.tools)
    trained = encode_all([example], template, tokenizer, 1 << 20)[-1]
    own = model.generation_config.eos_token_id if model.generation_config else None
    own = [] if own is None else [own] if isinstance(own, int) else list(own)
    last = [label for label in trained.labels if label >= 0][-1]
    return list(dict.fromkeys([last, tokenizer.eos_token_id, *own]))  # a raw prompt's answer ended by the tokenizer's


class _Callback(TextStreamer):
    """Hands each finished piece of text to a function."""

    def __init__(self, tokenizer: Tokenizer, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each piece of text."""
        if text:
            self.on_text(text)
