"""One run of `real.py`: an adapter of SmolLM2's top layers learns to talk about pictures, and is asked."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from clothes import ONE, SUBJECT, TWO, Question, Wordings, answer, ask, every_question
from numpy.typing import NDArray
from top_layers import TopLayers
from torch import Tensor

from llama_adapter import AdapterConfig, add_adapter, remove_adapter, use_adapter
from llama_adapter.conditions.config import ConditionConfig

WORDINGS = {"one": ONE, "two": TWO, "topics": SUBJECT}
BATCH, PROMPTS = 16, 10
LR, CONDITION_LR, DECAY, BETAS, CLIP = 0.02, 0.003, 0.02, (0.9, 0.95), 1.0
WARM_UP = 0.1
PROBES = (0.003, 0.03, 0.3)
"""Penalties of the linear probe; the one that is best on the test set counts, to the probe's advantage."""


@dataclass(frozen=True)
class Trial:
    """A run: which set it learns, what reads the picture, how long, and its seed.

    `reads` are features of `Features.of`; `settings` are those of `ConditionConfig`; of two things only `sides` are
    asked; `in_full` is that of `clothes.answer`; with `from_text` prompts start from the hidden states of the
    first question.
    """

    label: str
    scenes: str
    seed: int
    kind: str = "image"
    reads: str = "last"
    steps: int = 160
    layers: int = 8
    template: str = "Question: {}\nAnswer:"
    asks: tuple[str, ...] = ("naming", "yes_no")
    settings: tuple[tuple[str, Any], ...] = ()
    in_full: bool = False
    from_text: bool = False

    @property
    def kinds(self) -> list[str]:
        """What is asked; the first counts for trained wordings too."""
        return ["sides"] if self.scenes == "two" else list(self.asks)

    def key(self) -> dict[str, Any]:
        """Everything that decides the figures; what came later is left out where it is off."""
        later = {name: True for name in ("in_full", "from_text") if getattr(self, name)}
        return later | {
            "scenes": self.scenes, "seed": self.seed, "kind": self.kind, "reads": self.reads, "steps": self.steps,
            "settings": dict(self.settings), "layers": self.layers, "template": self.template, "prompts": PROMPTS,
            "asks": self.kinds, "batch": BATCH, "lr": LR, "condition_lr": CONDITION_LR,
        }  # fmt: skip


@dataclass(frozen=True)
class Features:
    """What the encoder gives of N pictures: `tokens` [N, 49, 1280] fp16, `scales` [N, 7, 1280], and their labels."""

    tokens: Tensor
    scales: Tensor
    labels: NDArray[Any]

    def of(self, reads: str) -> Tensor:
        """'tokens'; 'last', their mean [N, 1, D]; 'halves', of left and right columns [N, 2, D]; 'scales'."""
        if reads == "tokens":
            return self.tokens.float()
        if reads == "halves":
            columns = self.tokens.float().unflatten(1, (7, 7)).mean(1)
            return torch.stack([columns[:, :3].mean(1), columns[:, 4:].mean(1)], 1)
        return self.scales[:, [0, 1, 2, 3, 4, 6]] if reads == "scales" else self.scales[:, -1:]


class HalfOfThePrompts(torch.nn.Module):
    """A condition that every second prompt gets: the others are where a query looks that does not ask for it."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, features: Tensor) -> Tensor:
        """[B, M, D] -> [B, K, hidden]."""
        found = self.inner(features)
        return torch.stack([found, torch.zeros_like(found)], 1).repeat(1, PROMPTS // 2, 1)


def run(trial: Trial, top: TopLayers, train: Features, test: Features, names: Sequence[str]) -> dict[str, Any]:
    """Train and ask; the figures."""
    began = time.process_time()
    torch.manual_seed(trial.seed)
    features = train.of(trial.reads)
    settings = {"tower": "efficientnet", "tower_width": features.shape[-1], **dict(trial.settings)}
    if trial.kind == "image":
        settings["depths"] = tuple(range(features.shape[1]))
    halved = settings.pop("half", False)
    condition = ConditionConfig(trial.kind, **settings)
    adapter = add_adapter(
        top.model, AdapterConfig(adapter_len=PROMPTS, adapter_layers=trial.layers, condition=condition), replace=True
    )
    reader = HalfOfThePrompts(adapter.condition) if halved else adapter.condition
    assert reader is not None
    if trial.from_text:
        top.start_prompts(adapter, every_question(trial.kinds, names, WORDINGS[trial.scenes], trial.in_full)[0])
    try:
        loss = learn(trial, top, adapter, reader, features, train.labels, names)
        figures = measure(trial, top, reader, test, names)
    finally:
        remove_adapter(top.model)
    cpu = round(time.process_time() - began)
    return {"parameters": adapter.num_parameters, "loss": round(loss, 4), **figures, "cpu_seconds": cpu}


def learn(
    trial: Trial,
    top: TopLayers,
    adapter: Any,
    reader: Any,
    features: Tensor,
    labels: NDArray[Any],
    names: Sequence[str],
) -> float:
    """Train as `llama-adapter train` does: AdamW, warm-up, cosine; the mean loss of the last ten steps."""
    condition = list(adapter.condition.parameters())
    inside = {id(parameter) for parameter in condition}
    prompts = [parameter for parameter in adapter.parameters() if id(parameter) not in inside]
    groups = [{"params": prompts, "peak": LR}, {"params": condition, "peak": CONDITION_LR}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=DECAY)
    rng, order, losses = random.Random(trial.seed), [], []
    for step in range(trial.steps):
        if len(order) < BATCH:
            order = rng.sample(range(len(labels)), len(labels))
        chosen, order = order[:BATCH], order[BATCH:]
        questions = mixed(trial, labels[chosen].tolist(), names, rng)
        share = min(1.0, (step + 1) / (WARM_UP * trial.steps)) * (1 + math.cos(math.pi * step / trial.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]
        texts = top.texts(questions)
        optimizer.zero_grad()
        with use_adapter(top.model, "default", reader(features[chosen])):
            loss = torch.nn.functional.cross_entropy(top.logits(texts), texts.answer)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), CLIP)
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / len(losses[-10:])


def mixed(trial: Trial, labels: Sequence[Any], names: Sequence[str], rng: random.Random) -> list[Question]:
    """Questions in wordings that are trained, of each kind as many."""
    wordings, found = WORDINGS[trial.scenes][0], []
    for label in labels:
        found += ask(rng.choice(trial.kinds), [label], names, wordings, rng.randrange(2**32), trial.in_full)
    return found


def measure(trial: Trial, top: TopLayers, reader: Any, test: Features, names: Sequence[str]) -> dict[str, Any]:
    """Greedy answers that are right to the letter: held-out pictures, in trained and in held-out wordings."""
    trained, held_out = WORDINGS[trial.scenes]
    labels, features = test.labels.tolist(), test.of(trial.reads)
    figures: dict[str, Any] = {}
    for kind in trial.kinds:
        questions = ask(kind, labels, names, held_out, 0, trial.in_full)
        by_name = names if kind == "yes_no" and trial.in_full else ()
        right = answered(top, questions, reader, features, by_name)
        figures[kind] = share(right)
        if kind != "yes_no":
            figures["by_wording"] = by_wording(questions, right)
        figures[f"{kind}, without"] = share(answered(top, questions, None, features, by_name))
    questions = ask(trial.kinds[0], labels[:200], names, trained, 1, trial.in_full)
    by_name = names if trial.kinds[0] == "yes_no" and trial.in_full else ()
    right = answered(top, questions, reader, features[:200], by_name)
    return figures | {f"{trial.kinds[0]}, trained wordings": share(right)}


@torch.no_grad()
def answered(
    top: TopLayers, questions: Sequence[Question], reader: Any, features: Tensor, by_name: Sequence[str] = ()
) -> list[bool]:
    """Whether greedy decoding writes the right answer, to the letter.

    With the names, of yes or no in full: whether the word after the name is right, whatever thing is named.
    """
    find = partial(_word_right, top, by_name) if by_name else partial(_right, top)
    if reader is None:  # without a picture equal texts have equal answers
        distinct = list(dict.fromkeys(questions))
        known = dict(zip(distinct, find(distinct, [None] * len(distinct)), strict=True))
        return [known[question] for question in questions]
    return find(questions, [reader(part) for part in features.split(64)])


def _right(top: TopLayers, questions: Sequence[Question], conditions: Sequence[Tensor | None]) -> list[bool]:
    pairs = zip(questions, _likeliest(top, questions, conditions), strict=True)
    return [tokens == top.answer(question) for question, tokens in pairs]


def _word_right(
    top: TopLayers, names: Sequence[str], questions: Sequence[Question], conditions: Sequence[Tensor | None]
) -> list[bool]:
    """Greedy decoding in two steps: what is named, and what is said after that name."""
    begun = [_path(asked, names[0]) for asked, _ in questions]
    firsts = {top.answer(_path(begun[0][0], name))[0]: name for name in names}
    assert len(firsts) == len(names), "two names begin alike"
    named = [firsts.get(tokens[0]) for tokens in _likeliest(top, begun, conditions)]
    paths = [_path(asked, name or names[0]) for (asked, _), name in zip(begun, named, strict=True)]
    found = []
    for question, path, name, said in zip(questions, paths, named, _likeliest(top, paths, conditions), strict=True):
        written, *end = top.answer(path)[:-2], *top.answer(question)[-2:]
        same = said[-2:] == end if path[1].split()[-1] == question[1].split()[-1] else said[-2] == end[0]
        found.append(name is not None and said[:-2] == written and same)
    return found


def _path(asked: str, name: str) -> Question:
    return asked, answer("yes_no", asked, name, True)


def _likeliest(top: TopLayers, questions: Sequence[Question], conditions: Sequence[Tensor | None]) -> list[list[int]]:
    """At each place of each answer, after what stands before it, the likeliest token."""
    found: list[list[int]] = []
    for number, start in enumerate(range(0, len(questions), 64)):
        texts = top.texts(questions[start : start + 64])
        with use_adapter(top.model, "default", conditions[number]):
            likeliest = top.logits(texts).argmax(-1)
        found += [part.tolist() for part in likeliest.split(texts.row.bincount().tolist())]
    return found


def by_wording(questions: Sequence[Question], right: Sequence[bool]) -> dict[str, float]:
    """The share of each text that is asked."""
    texts = sorted({asked for asked, _ in questions})
    return {text: share([r for (asked, _), r in zip(questions, right, strict=True) if asked == text]) for text in texts}


def share(right: Sequence[bool]) -> float:
    """Of the right ones."""
    return round(sum(right) / len(right), 4)


def probe(train: Features, test: Features, reads: str, names: Sequence[str], wordings: Wordings) -> dict[str, Any]:
    """A linear classifier on the same features, asked the same questions: it answers by what it takes a picture for."""
    first, second = (features.of(reads).flatten(1) for features in (train, test))
    mean, spread = first.mean(0), first.std(0) + 1e-3
    first, second = (first - mean) / spread, (second - mean) / spread
    found = []
    for strength in PROBES:
        if train.labels.ndim == 2:
            guesses = [classify(first, train.labels[:, side], second, strength) for side in range(2)]
            right = [share((guess == test.labels[:, side]).tolist()) for side, guess in enumerate(guesses)]
            found.append({"sides": sum(right) / 2, "strength": strength})
            continue
        guess = classify(first, train.labels, second, strength)
        questions = ask("yes_no", test.labels.tolist(), names, wordings, 0)
        says = ["yes" if f" {names[g]}" in asked else "no" for g, (asked, _) in zip(guess, questions, strict=True)]
        yes_no = share([word == answer for word, (_, answer) in zip(says, questions, strict=True)])
        found.append({"naming": share((guess == test.labels).tolist()), "yes_no": yes_no, "strength": strength})
    return max(found, key=lambda figures: figures.get("naming", figures.get("sides", 0.0)))


def classify(train: Tensor, labels: NDArray[Any], test: Tensor, strength: float) -> NDArray[Any]:
    """Logistic regression with a penalty on its weights' squares, to the optimum; the labels of `test`."""
    linear = torch.nn.Linear(train.shape[1], int(labels.max()) + 1)
    torch.nn.init.zeros_(linear.weight)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=60, line_search_fn="strong_wolfe")
    target = torch.from_numpy(labels)

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = torch.nn.functional.cross_entropy(linear(train), target) + strength * linear.weight.square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    with torch.no_grad():
        return linear(test).argmax(1).numpy()
