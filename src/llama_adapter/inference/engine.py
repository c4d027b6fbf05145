"""The engine: tokens in, tokens out. It owns its model, the slots of its adapters, and the ways to take a step.

A batch has rows of any adapters and of the bare base. It is read at once, padded on the left, then goes on a token a
row until the last one has ended. A row's answer does not depend on those beside it, up to rounding, but for rotations
that transformers scales by the longest row of a batch (dynamic and longrope, beyond the trained length).
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from llama_adapter.core.attention import ROUTING, wrap_attention
from llama_adapter.core.families import attention_modules
from llama_adapter.core.model import get_adapter, list_adapters
from llama_adapter.core.registry import device_of, in_use
from llama_adapter.core.routing import Adapter, Routing
from llama_adapter.core.zero_init import Prompts
from llama_adapter.errors import ConfigError, DataError, LlamaAdapterError
from llama_adapter.inference.cache import GrowingCache
from llama_adapter.inference.compiled import CompiledSteps
from llama_adapter.inference.slots import BASE, Slots
from llama_adapter.inference.steps import QuickSteps

log = logging.getLogger(__name__)


def fresh_generator() -> torch.Generator:
    """A random generator with a seed from the system; torch's own start alike."""
    generator = torch.Generator()
    generator.seed()
    return generator


@dataclass(frozen=True, eq=False)
class Row:
    """What one row of a batch is asked.

    Attributes:
        tokens: the prompt, at least one.
        adapter: its name; None is the bare base.
        condition: [1, hidden] or [K, hidden], added to the adapter's prompts.
        max_new_tokens: it ends after so many.
        temperature: 0 takes the likeliest token, anything above draws.
        top_p: draw from the likeliest tokens of this total probability.
        stops: it ends after one of these.
        generator: draws come from it, on the CPU; the row's own, so that rows beside it change nothing.

    Raises:
        DataError: no token.
        ConfigError: `max_new_tokens` is below 1.
    """

    tokens: Sequence[int]
    adapter: str | None = None
    condition: Tensor | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stops: frozenset[int] = frozenset()
    generator: torch.Generator = field(default_factory=fresh_generator)

    def __post_init__(self) -> None:
        if not len(self.tokens):
            raise DataError("A prompt of no token cannot be answered: write something.")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")


class Engine:
    """Decodes on a model that nobody else changes while it does.

    Threads may share it: one batch runs at a time.

    Args:
        model: the base with its adapters. Its weights may be joined into slices of larger tensors, in place.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.slots = Slots(model)
        self.compiled = CompiledSteps(model)
        self._lock = threading.RLock()
        self._decoding = False

    def generate(
        self,
        rows: Sequence[Row],
        on_tokens: Callable[[int, int], None] = lambda row, token: None,
        compile: bool = False,
    ) -> list[list[int]]:
        """What each row is answered, its stop token included where it came to one.

        Args:
            rows: at least one.
            on_tokens: called with a row's number and its next token, as it comes.
            compile: take steps by one compiled graph, with a cache of fixed size.

        Raises:
            AdapterError: there is no adapter of a row's name.
            ModelError: there is nothing to compile with.
            LlamaAdapterError: it is called from its own `on_tokens`.
        """
        # Not inference_mode, also where the caller is in it: slots that were made there could not be written later.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._decoding:
                raise LlamaAdapterError("An engine cannot decode from within its own on_tokens: wait for its answer.")
            self._decoding = True
            learning = [module for module in self.model.modules() if module.training]
            try:
                for module in learning:
                    module.training = False
                answers: list[list[int]] = [[] for _ in rows]
                adapters = {name: get_adapter(self.model, name) for row in rows if (name := row.adapter) is not None}
                with in_use(self.model, adapters.values()):
                    for tokens in self._decode(rows, adapters, compile):
                        for number, token in tokens.items():
                            answers[number].append(token)
                            on_tokens(number, token)
                return answers
            finally:
                for module in learning:
                    module.training = True
                self._decoding = False

    def _decode(self, rows: Sequence[Row], adapters: Mapping[str, Adapter], compile: bool) -> Iterator[dict[int, int]]:
        """Each step's token of the rows that have not ended."""
        device = device_of(self.model.get_input_embeddings())
        slots: list[int] = []
        temporary: list[int] = []
        self.slots.drop_removed()
        try:
            self.slots.check(next(iter(adapters.values()), None))
            admitted = {name: self.slots.admit(adapter) for name, adapter in adapters.items()}
            for row in rows:
                if row.adapter is None or row.condition is None:
                    slots.append(BASE if row.adapter is None else admitted[row.adapter])
                else:
                    slots.append(self.slots.fill(Routing((adapters[row.adapter],), condition=row.condition[None])))
                    temporary.append(slots[-1])
            prompts = self.slots.rows(slots)
            if compile:  # a graph is made for one layout of its inputs
                prompts = {layer: contiguous(found) for layer, found in prompts.items()}
            routing = self._routing(rows, adapters, prompts)
            ids, mask = left_padded([row.tokens for row in rows], device)
            room = max(row.max_new_tokens for row in rows)
            step = self.stepper(len(rows), ids.shape[1] + room, routing, compile)
            positions = (torch.ones_like(ids) if mask is None else mask).cumsum(-1).sub(1).clamp(min=0)
            going, moving = set(range(len(rows))), torch.ones_like(positions[:, -1:])
            for count in range(1, room + 1):
                logits = step(ids, positions, mask)
                chosen = choose(logits, rows)
                tokens = chosen.tolist()
                yield {number: tokens[number] for number in sorted(going)}
                ended = {n for n in going if tokens[n] in rows[n].stops or count >= rows[n].max_new_tokens}
                going -= ended
                if not going:
                    return
                moving[sorted(ended)] = 0
                # A row that has ended stays where it is: it may neither leave the context nor stretch a scaled rotation
                ids, positions = chosen[:, None], positions[:, -1:] + moving
                mask = None if mask is None else torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        finally:
            for slot in temporary:
                self.slots.release(slot)

    def _routing(
        self, rows: Sequence[Row], adapters: Mapping[str, Adapter], prompts: dict[int, Prompts | None]
    ) -> Routing:
        """Prompts that are ready, and who serves which row where an adapter has more than prompts."""
        if not any(adapter.modules for adapter in adapters.values()):
            return Routing((), prompts=prompts, ready=True)
        chosen = [None if row.adapter is None else adapters[row.adapter] for row in rows]
        distinct = tuple(dict.fromkeys(chosen))
        device = device_of(self.model.get_input_embeddings())
        numbers = torch.tensor([distinct.index(adapter) for adapter in chosen], device=device)
        return Routing(distinct, numbers if len(distinct) > 1 else None, prompts=prompts, ready=True)

    def stepper(
        self, rows: int, tokens: int, routing: Routing, compile: bool
    ) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """What decodes a batch: ids, positions [B, T], mask [B, all tokens] or None -> logits [B, vocabulary]."""
        model = self.model
        wrap_attention(attention_modules(model)[0].config)
        if compile and any(get_adapter(model, name).modules for name in list_adapters(model)):
            log.warning("--compile is left out: norms, scales, biases and LoRA are not in the compiled step")
            compile = False
        cache: Cache = self.compiled.cache(rows, tokens) if compile else GrowingCache(model.config)
        # Quick steps know prompts alone.
        quick = None if compile or routing.adapters else QuickSteps.of(model)

        def step(ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
            if ids.shape[1] == 1 and cache.get_seq_length() > 0:
                if quick is not None:
                    return quick(ids, positions, mask, cache, routing.prompts or {})
                if compile:
                    return self.compiled(ids, positions, mask, cache, routing)
            arguments: dict[str, Any] = {ROUTING: routing} if list_adapters(model) else {}
            return model(
                input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True,
                logits_to_keep=1, **arguments,
            ).logits[:, -1]  # fmt: skip

        return step


def contiguous(prompts: Prompts | None) -> Prompts | None:
    """The same, each part in memory of its own."""
    if prompts is None:
        return None
    key, value, bias = prompts
    return Prompts(key.contiguous(), value.contiguous(), None if bias is None else bias.contiguous())


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ids [B, T] padded with token 0 on the left, and their mask [B, T], or None where nothing is padded."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    if all(len(prompt) == longest for prompt in prompts):
        return ids, None
    return ids, torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)


def choose(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """The next token of each row, [B], from logits [B, vocabulary]."""
    likeliest = logits.argmax(-1)
    drawing = [number for number, row in enumerate(rows) if row.temperature > 0]
    if not drawing:
        return likeliest
    asked = [rows[number] for number in drawing]
    temperature, top_p, draws = (
        torch.tensor(values, device=logits.device, dtype=torch.float32)[:, None]
        for values in (
            [row.temperature for row in asked],
            [row.top_p for row in asked],
            [torch.rand((), generator=row.generator).item() for row in asked],
        )
    )
    scores = logits[drawing].float()
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature  # no temperature is too low for 0 and -inf
    probabilities, order = scores.softmax(-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)  # the likeliest always stays
    total = probabilities.cumsum(-1)
    place = (total <= draws * total[:, -1:]).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    place = torch.minimum(place, (probabilities > 0).sum(-1, keepdim=True) - 1)
    likeliest[drawing] = order.gather(-1, place)[:, 0]
    return likeliest
