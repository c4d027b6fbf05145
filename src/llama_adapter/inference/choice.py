"""What one row of a batch is asked, and how its next token is chosen from the logits."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from llama_adapter.errors import ConfigError, DataError


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
        presence_penalty: taken off the logit of every token that the answer has, once; OpenAI's.
        frequency_penalty: taken off as often as the answer has it.
        logprobs: how many of the likeliest tokens are reported beside the chosen one; None reports nothing.
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
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    stops: frozenset[int] = frozenset()
    generator: torch.Generator = field(default_factory=fresh_generator)

    def __post_init__(self) -> None:
        if not len(self.tokens):
            raise DataError("A prompt of no token cannot be answered: write something.")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")


class Choice(NamedTuple):
    """A row's next token; where it asked for them, its log-probability and the likeliest tokens with theirs.

    Those are the model's own, before temperature, top-p and penalties.
    """

    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


def choose(
    logits: Tensor,
    rows: Sequence[Row],
    answers: Sequence[Sequence[int]],
    agreed: Callable[[Tensor], Tensor] = lambda tokens: tokens,
) -> list[Choice]:
    """The next token of each row.

    Args:
        logits: [B, vocabulary].
        rows: what each was asked.
        answers: what each has answered so far; penalties count it.
        agreed: what processes that answer together make of the tokens [B] that this one has drawn.
    """
    tokens = agreed(drawn(penalised(logits, rows, answers), rows)).tolist()
    if all(row.logprobs is None for row in rows):
        return [Choice(token) for token in tokens]
    return [
        Choice(token) if row.logprobs is None else _reported(line, token, row.logprobs)
        for token, row, line in zip(tokens, rows, logits, strict=True)
    ]


def _reported(logits: Tensor, token: int, count: int) -> Choice:
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return Choice(token, logprobs[token].item(), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def penalised(logits: Tensor, rows: Sequence[Row], answers: Sequence[Sequence[int]]) -> Tensor:
    """Logits [B, vocabulary] less the penalties of tokens that answers have already."""
    changed: Tensor | None = None
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        if answer and (row.presence_penalty or row.frequency_penalty):
            changed = logits.float().clone() if changed is None else changed
            counts = Counter(answer)
            ids = torch.tensor(list(counts), device=logits.device)
            times = torch.tensor(list(counts.values()), device=logits.device, dtype=torch.float32)
            changed[number, ids] -= row.presence_penalty + row.frequency_penalty * times
    return logits if changed is None else changed


def drawn(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Tokens [B]: the likeliest of each row's logits [B, vocabulary], or one drawn as it asks."""
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
    tiny = torch.finfo(torch.float32).tiny  # smaller numbers are 0 in fp32, and leave no token
    temperature, top_p = temperature.clamp(min=tiny), top_p.clamp(min=tiny)
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
