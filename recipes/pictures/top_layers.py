"""A base of which only the top layers are run: what the lower ones make of a text is computed once.

An adapter of the top L layers leaves the layers below alone, and those see no picture. So their output depends on the
text only, and a question set of a few hundred texts needs it a few hundred times, not once a step. What is left is an
ordinary model of L layers on given inputs: the same numbers at L / N of the cost (a test compares them).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Question = tuple[str, str]


class Texts(NamedTuple):
    """B texts, padded on the right to T tokens, with R answer tokens in all.

    `hidden` [B, T, hidden] goes into the top layers, `mask` [B, T] says what is no padding, `places` [R] are the flat
    places that the answer's tokens are predicted at, `answer` [R] those tokens, `row` [R] the text that each is of.
    """

    hidden: Tensor
    mask: Tensor
    places: Tensor
    answer: Tensor
    row: Tensor


class TopLayers:
    """The top layers of a Llama with its head.

    Args:
        model: of which only those layers are left to run; it has no adapter.
        tokenizer: of the base.
        layers: L.
        template: how a question is written, {} in it.
    """

    def __init__(self, model: Any, tokenizer: Any, layers: int, template: str) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self._kept: dict[Question, tuple[Tensor, int, Tensor]] = {}
        self._whole = list(model.model.layers)
        self._top = self._whole[-layers:]
        self._run(self._top)

    def _run(self, layers: Sequence[Any]) -> None:
        self.model.model.layers = nn.ModuleList(layers)
        self.model.config.num_hidden_layers = len(layers)
        for number, layer in enumerate(layers):
            layer.self_attn.layer_idx = number

    def read(self, questions: Sequence[Question]) -> None:
        """Compute what the lower layers make of those that are new; no adapter may be on the model."""
        new = [question for question in dict.fromkeys(questions) if question not in self._kept]
        encoded = [(question, *encode(self.tokenizer, self.template, question)) for question in new]
        encoded.sort(key=lambda row: len(row[1]) + len(row[2]))
        self._run(self._whole)
        for start in range(0, len(encoded), 32):
            self._keep(encoded[start : start + 32], len(self._whole) - len(self._top))
        self._run(self._top)

    @torch.no_grad()
    def _keep(self, rows: Sequence[tuple[Question, list[int], list[int]]], depth: int) -> None:
        longest = max(len(asked) + len(answer) for _, asked, answer in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (_, asked, answer) in enumerate(rows):
            length = len(asked) + len(answer)
            ids[row, :length], mask[row, :length] = torch.tensor(asked + answer), 1
        states = self.model.model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        for row, (question, asked, answer) in enumerate(rows):
            hidden = states[depth][row, : len(asked) + len(answer)].clone()
            self._kept[question] = hidden, len(asked), torch.tensor(answer)

    def answer(self, question: Question) -> list[int]:
        """The tokens of its answer."""
        return self._kept[question][2].tolist()

    def before(self, question: Question, left: int) -> Tensor:
        """What the top layers get [hidden] where the last `left` tokens of the answer are still to come."""
        return self._kept[question][0][-left - 1]

    @torch.no_grad()
    def start_prompts(self, adapter: Any, question: Question) -> None:
        """Set each prompt [K, hidden] to what its layer's attention reads at places spread over a text."""
        hidden = self._kept[question][0]
        places = torch.linspace(0, len(hidden) - 1, adapter.config.adapter_len).round().long()
        handles = [
            layer.input_layernorm.register_forward_hook(partial(_take, adapter.layers[number].prompt, places))
            for number, layer in enumerate(self._top)
        ]
        try:
            self.model.model(inputs_embeds=hidden[None], use_cache=False, adapter_names=None)
        finally:
            for handle in handles:
                handle.remove()

    def texts(self, questions: Sequence[Question]) -> Texts:
        """A batch."""
        rows = [self._kept[question] for question in questions]
        longest = max(len(hidden) for hidden, _, _ in rows)
        padded = nn.utils.rnn.pad_sequence([hidden for hidden, _, _ in rows], batch_first=True)
        mask = torch.arange(longest) < torch.tensor([len(hidden) for hidden, _, _ in rows])[:, None]
        places = [row * longest + begin - 1 + torch.arange(len(ids)) for row, (_, begin, ids) in enumerate(rows)]
        of_row = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(ids) for _, _, ids in rows]))
        return Texts(padded, mask.long(), torch.cat(places), torch.cat([ids for _, _, ids in rows]), of_row)

    def logits(self, texts: Texts) -> Tensor:
        """[R, vocabulary], of whatever adapter is in use."""
        states = self.model.model(inputs_embeds=texts.hidden, attention_mask=texts.mask, use_cache=False)
        return self.model.lm_head(states.last_hidden_state.flatten(0, 1)[texts.places])


def _take(prompt: Tensor, places: Tensor, module: nn.Module, args: Any, states: Tensor) -> None:
    prompt.copy_(states[0, places])


def encode(tokenizer: Any, template: str, question: Question) -> tuple[list[int], list[int]]:
    """The tokens of what is asked and of the answer, which ends with the end-of-text token."""
    asked, answer = question
    return tokenizer(template.format(asked))["input_ids"], [
        *tokenizer(" " + answer)["input_ids"],
        tokenizer.eos_token_id,
    ]
