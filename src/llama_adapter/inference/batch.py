"""A running batch: rows of any adapters join it, go on a token a step, and leave it when they have ended.

Rows stand flush right: the newest token of each lies in the last column, and what is short of the longest row is
padding on the left, which the mask hides. So a row joins by its cache being laid below the others', and leaves by being
left out. A row's answer does not depend on those beside it, up to rounding, but for rotations that transformers
scales by the longest row of a batch (dynamic and longrope, beyond the trained length).
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from llama_adapter.core.attention import ROUTING, wrap_attention
from llama_adapter.core.families import attention_modules
from llama_adapter.core.model import get_adapter, list_adapters
from llama_adapter.core.registry import device_of, in_use
from llama_adapter.core.routing import Adapter, Routing
from llama_adapter.core.tensor_parallel import as_first
from llama_adapter.core.zero_init import Prompts
from llama_adapter.inference.cache import GrowingCache, GrowingLayer
from llama_adapter.inference.choice import Choice, Row, choose
from llama_adapter.inference.compiled import CompiledSteps
from llama_adapter.inference.slots import BASE, Slots
from llama_adapter.inference.steps import QuickSteps


@dataclass(eq=False)
class Member:
    """A row in a batch: what it was asked, who answers, the slot its prompts are read from, and its answer so far."""

    row: Row
    adapter: Adapter | None
    slot: int
    release: Callable[[], None]
    answer: list[int] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether it came to a stop token or has its tokens."""
        return len(self.answer) >= self.row.max_new_tokens or (bool(self.answer) and self.answer[-1] in self.row.stops)


@dataclass(eq=False)
class Prefill:
    """Rows whose prompts are being read.

    Attributes:
        members: the rows.
        ids, mask, positions: int64 [B, T], flush right.
        cache: of the first `seen` columns.
    """

    members: list[Member]
    ids: Tensor
    mask: Tensor
    positions: Tensor
    cache: Any
    seen: int = 0

    def keep(self, kept: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self.members = [self.members[number] for number in kept]
        index = torch.tensor(kept, device=self.ids.device)
        self.ids, self.mask, self.positions = (part[index] for part in (self.ids, self.mask, self.positions))
        if self.seen:
            self.cache.keep(index, self.seen)


class Batch:
    """Rows that one engine is answering. One thread drives it, between two steps:

        batch.join(batch.admit(rows))
        for member, choice in batch.choose(): ...
        batch.drop(ended)
        batch.advance()

    Long prompts may be read piece by piece, so that others go on meanwhile: `batch.begin(members)`, and
    `batch.read(512)` between steps until nobody is `joining`.

    Args:
        model: the base with its adapters.
        slots: where admitted adapters lie.
        compiled: takes steps by one graph of fixed size: rows join once and stay in their place; None grows.
    """

    def __init__(self, model: PreTrainedModel, slots: Slots, compiled: CompiledSteps | None = None) -> None:
        self.model, self.slots, self.compiled = model, slots, compiled
        self.members: list[Member] = []
        self._attention = attention_modules(model)[0].config
        self._quick: QuickSteps | None = None
        self._reading: Prefill | None = None
        self._cache: Any = None
        self._mask = self._positions = self._ids = torch.empty(0)
        self._padded = False
        self._logits: Tensor | None = None
        self._routing = Routing((), prompts={}, ready=True)

    def admit(self, rows: Sequence[Row]) -> list[Member]:
        """Find the rows' prompts a slot each, and hold their adapters until they leave.

        Raises:
            AdapterError: there is no adapter of a row's name; none is admitted then.
        """
        adapters = {name: get_adapter(self.model, name) for row in rows if (name := row.adapter) is not None}
        self.slots.drop_removed()
        if not self.members:
            self.slots.check(next(iter(adapters.values()), None))
        admitted = {name: self.slots.admit(adapter) for name, adapter in adapters.items()}
        with contextlib.ExitStack() as undo:
            members = []
            for row in rows:
                with contextlib.ExitStack() as stack:
                    adapter, slot = None, BASE
                    if row.adapter is not None:
                        adapter, slot = adapters[row.adapter], admitted[row.adapter]
                        stack.enter_context(in_use(self.model, [adapter]))
                        if row.condition is not None:
                            slot = self.slots.fill(Routing((adapter,), condition=row.condition[None]))
                            stack.callback(self.slots.release, slot)
                    members.append(Member(row, adapter, slot, stack.pop_all().close))
                    undo.callback(members[-1].release)
            undo.pop_all()
            return members

    @property
    def joining(self) -> list[Member]:
        """Rows whose prompts are being read."""
        return self._reading.members if self._reading is not None else []

    def join(self, members: Sequence[Member]) -> None:
        """Read the prompts of admitted rows at once; they are members from then on."""
        if members:
            self.begin(members)
            self.read()

    def begin(self, members: Sequence[Member]) -> None:
        """Have `read` read the prompts of admitted rows, while nobody else joins; the batch releases them."""
        rows = [member.row for member in members]
        ids, mask = left_padded([row.tokens for row in rows], device_of(self.model.get_input_embeddings()))
        cache = self._new_cache(len(rows), ids.shape[1] + max(row.max_new_tokens for row in rows))
        self._reading = Prefill(list(members), ids, mask, mask.cumsum(-1).sub(1).clamp(min=0), cache)

    def read(self, tokens: int | None = None) -> None:
        """Read on in the prompts of the rows that are joining, which are members when the last token is read.

        Args:
            tokens: how many about, padding included; None, and where a piece would be read otherwise than the whole,
                reads all.
        """
        reading = self._reading
        if reading is None:
            return
        count, width = reading.ids.shape
        start, end = reading.seen, width
        if tokens is not None and self._reads_in_pieces(reading.cache):
            end = min(width, start + max(1, tokens // count))
        ids, positions, mask = reading.ids[:, start:end], reading.positions[:, start:end], reading.mask[:, :end]
        padded = not bool(reading.mask.all())
        routing = self._routing_of(reading.members)
        logits = self._forward(ids, positions, mask if padded else None, reading.cache, routing)
        reading.seen = end
        if end == width:
            self._reading = None
            self._take_in(reading, logits)

    def _reads_in_pieces(self, cache: Any) -> bool:
        """Whether a prompt's pieces, one after the other, are what the whole is."""
        grows = all(isinstance(layer, GrowingLayer) for layer in cache.layers)
        return grows and stretches_beyond(self.model.config) is None

    def _take_in(self, new: Prefill, logits: Tensor) -> None:
        """Lay rows whose prompts are read below the others'."""
        positions = new.positions[:, -1:]
        if not self.members:
            self._quick = None if self.compiled is not None else QuickSteps.of(self.model)
            self._cache, self._mask, self._positions, self._logits = new.cache, new.mask, positions, logits
        else:
            self._cache.take_in(new.cache)
            width = max(self._mask.shape[1], new.mask.shape[1])
            self._mask = torch.cat([left_filled(part, width) for part in (self._mask, new.mask)])
            self._positions = torch.cat([self._positions, positions])
            self._logits = logits if self._logits is None else torch.cat([self._logits, logits])
        self.members += new.members
        self.route()

    def choose(self) -> list[tuple[Member, Choice]]:
        """Each member's next token, which its answer has from then on."""
        if self._logits is None:
            return []
        going = [member for member in self.members if not member.ended]
        logits = self._logits
        if len(going) < len(self.members):  # of a compiled batch, where rows that have ended stay
            logits = logits[[number for number, member in enumerate(self.members) if not member.ended]]
        rows, answers = [member.row for member in going], [member.answer for member in going]
        chosen = choose(logits, rows, answers, partial(as_first, self.model))
        for member, choice in zip(going, chosen, strict=True):
            member.answer.append(choice.token)
        self._logits = None
        return list(zip(going, chosen, strict=True))

    def drop(self, members: Sequence[Member]) -> None:
        """Let rows leave: those that have ended, or that nobody waits for any more."""
        gone = {id(member) for member in members}
        self._drop_joining(gone)
        kept = [number for number, member in enumerate(self.members) if id(member) not in gone]
        for member in members:
            member.release()
        if self.compiled is not None or len(kept) == len(self.members):
            return
        self.members = [self.members[number] for number in kept]
        if not kept:
            self._cache, self._logits = None, None
            return
        index = torch.tensor(kept, device=self._mask.device)
        mask = self._mask[index]
        tokens = int(mask.sum(-1).max())
        self._mask, self._positions = mask[:, -tokens:], self._positions[index]
        self._logits = None if self._logits is None else self._logits[index]
        self._cache.keep(index, tokens)
        self.route()

    def _drop_joining(self, gone: set[int]) -> None:
        kept = [number for number, member in enumerate(self.joining) if id(member) not in gone]
        if self._reading is None or len(kept) == len(self.joining):
            return
        if kept:
            self._reading.keep(kept)
        else:
            self._reading = None

    def advance(self) -> None:
        """One forward: every member's last token is read, and the logits of its next one are there."""
        if not self.members:
            return
        going = [not member.ended for member in self.members]
        ids = torch.tensor([[member.answer[-1]] for member in self.members], device=self._mask.device)
        # A row that has ended stays where it is: it may neither leave the context nor stretch a scaled rotation
        self._positions = self._positions + torch.tensor(going, device=ids.device)[:, None].long()
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(ids), 1)], 1)
        mask = self._mask if self._padded else None
        self._logits = self._step(ids, self._positions, mask)

    def close(self) -> None:
        """Let every row leave."""
        members = [*self.members, *self.joining]
        self.members, self._reading, self._cache, self._logits = [], None, None, None
        for member in members:
            member.release()

    def route(self) -> None:
        """Gather every member's prompts from its slot; done where members have joined or left."""
        self._padded = not bool(self._mask.all())
        self._routing = self._routing_of(self.members)

    def _routing_of(self, members: Sequence[Member]) -> Routing:
        """Prompts that are ready, and who serves which row where an adapter has more than prompts."""
        prompts = self.slots.rows([member.slot for member in members])
        if self.compiled is not None:  # a graph is made for one layout of its inputs
            prompts = {layer: contiguous(found) for layer, found in prompts.items()}
        if not any(member.adapter is not None and member.adapter.modules for member in members):
            return Routing((), prompts=prompts, ready=True)
        distinct = tuple(dict.fromkeys(member.adapter for member in members))
        numbers = torch.tensor(
            [distinct.index(member.adapter) for member in members], device=device_of(self.model.get_input_embeddings())
        )
        return Routing(distinct, numbers if len(distinct) > 1 else None, prompts=prompts, ready=True)

    def _new_cache(self, rows: int, tokens: int) -> Any:
        return GrowingCache(self.model.config) if self.compiled is None else self.compiled.cache(rows, tokens)

    def _step(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        if self.compiled is not None:
            return self.compiled(ids, positions, mask, self._cache, self._routing)
        if self._quick is None or self._routing.adapters:  # quick steps know prompts alone
            return self._forward(ids, positions, mask, self._cache, self._routing)
        return self._quick(ids, positions, mask, self._cache, self._routing.prompts or {})

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Any, routing: Routing) -> Tensor:
        """Logits [B, vocabulary] behind ids [B, T] at positions [B, T], by transformers' own forward."""
        wrap_attention(self._attention)
        arguments: dict[str, Any] = {ROUTING: routing} if list_adapters(self.model) else {}
        return self.model(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True,
            logits_to_keep=1, **arguments,
        ).logits[:, -1]  # fmt: skip


def contiguous(prompts: Prompts | None) -> Prompts | None:
    """The same, each part in memory of its own."""
    if prompts is None:
        return None
    key, value, bias = prompts
    return Prompts(key.contiguous(), value.contiguous(), None if bias is None else bias.contiguous())


def stretches_beyond(config: PretrainedConfig) -> int | None:
    """Tokens beyond which a row's length changes the rotations of all rows beside it; None where it never does."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]  # some families have one by layer type
    if not any((kind.get("rope_type") or kind.get("type")) in ("dynamic", "longrope", "su") for kind in kinds):
        return None
    original = [kind.get("original_max_position_embeddings") for kind in kinds]
    original.append(getattr(config, "original_max_position_embeddings", None))
    return int(min([length for length in original if length] or [config.max_position_embeddings]))


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, T] padded with token 0 on the left, and their mask [B, T]."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


def left_filled(part: Tensor, width: int) -> Tensor:
    """[B, T] with zeros before it, [B, width]."""
    return torch.nn.functional.pad(part, (width - part.shape[1], 0))
