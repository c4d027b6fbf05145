"""One trial on a real model: prepare a method, train it on the skills, measure it. Deterministic in its settings."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from real_methods import METHODS, Options, Prepared
from transformers import PreTrainedModel

from llama_adapter import list_adapters
from llama_adapter.base import load_base, load_tokenizer
from llama_adapter.data import Encoded
from llama_adapter.data import Example as Conversation
from llama_adapter.data.batches import response_tokens
from llama_adapter.data.encode import encode_all
from llama_adapter.data.examples import Message
from llama_adapter.evaluation.demo import smollm2
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.inference.session import Session
from llama_adapter.inference.writing import Prompt
from llama_adapter.training.loss import response_loss

RECIPES = Path(__file__).resolve().parents[1]
sys.path += [str(RECIPES / "skills"), str(RECIPES / "base")]
from prose import heldout_passages  # noqa: E402
from science import Science  # noqa: E402
from skills import SKILLS, SPLITS, Skill  # noqa: E402
from skills import Example as Asked  # noqa: E402

TEMPLATE = "chat"
WARMUP = 0.1
PASSAGES, PASSAGE_LENGTH = 12, 128
"""How much prose is read."""
HELD_OUT = ("heldout_entities", "heldout_wordings")
CURVE = 15
"""Steps between validations."""


@dataclass(frozen=True)
class Trial:
    """What is tried; `group` and `label` say where the result goes in the report.

    Attributes:
        group: the question it belongs to.
        label: its row.
        method: one of `METHODS`.
        lr: peak learning rate.
        seed: of initialisation and of the training examples.
        steps: optimiser steps.
        per_skill: examples of each skill in a step.
        skills: which are learnt, all by one adapter.
        options: of the method.
        epochs: how often each training example is seen; `steps` stay as they are, so that data become fewer.
        schedule: "cosine" or "constant", both after a warm-up.
        tests: questions of each skill and held-out split; a quarter as many validate.
    """

    group: str
    label: str
    method: str
    lr: float
    seed: int = 0
    steps: int = 45
    per_skill: int = 2
    skills: tuple[str, ...] = tuple(SKILLS)
    options: Options = field(default_factory=Options)
    epochs: int = 1
    schedule: str = "cosine"
    tests: int = 16

    def key(self) -> dict[str, Any]:
        """Everything that decides the figures; trials of several groups may share them."""
        settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        del settings["group"], settings["label"]
        for name, default in (("epochs", 1), ("schedule", "cosine"), ("tests", 16)):  # as figures before were kept
            if settings[name] == default:
                del settings[name]
        usual = json.loads(json.dumps(dataclasses.asdict(Options())))
        changed = {name: value for name, value in settings.pop("options").items() if value != usual[name]}
        return settings | changed

    @classmethod
    def asked_in(cls, settings: Mapping[str, Any]) -> Trial:
        """A trial that learns from and is asked what one with this `key` was; its method's options are not in it."""
        own = {field.name for field in dataclasses.fields(cls)} - {"skills", "options"}
        given = {name: value for name, value in settings.items() if name in own}
        return cls("", "", **given, skills=tuple(settings["skills"]))

    def taught_by(self, data: Path | None) -> dict[str, Skill | Science]:
        """Its skills; `data` is the folder of ScienceQA."""
        return {name: Science(data) if name == Science.name and data else SKILLS[name] for name in self.skills}

    def examples(self, split: str, data: Path | None) -> dict[str, list[Asked]]:
        """What it learns from, validates on or is asked, by skill."""
        seed, count = {
            "train": (self.seed, self.steps * self.per_skill), "validation": (0, self.tests // 4),
        }.get(split, (0, self.tests))  # fmt: skip
        return {name: skill.examples(split, seed, count) for name, skill in self.taught_by(data).items()}

    def digest(self, data: Path | None = None) -> str:
        """Of all its examples: figures about other ones are not mixed in."""
        found = [[e.record() for e in es] for split in SPLITS for es in self.examples(split, data).values()]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


@cache
def base(device: str, precision: Any) -> PreTrainedModel:
    """The base as it was loaded; trials work on copies."""
    return load_base(smollm2(), torch.device(device), precision)


@cache
def tokenizer() -> Any:
    """Its tokenizer."""
    return load_tokenizer(smollm2())


def conversation(example: Asked) -> Conversation:
    """A skill's example as the package takes it."""
    return Conversation(
        (Message("user", example.instruction), Message("assistant", example.output)), input=example.input
    )


def encoded(examples: Sequence[Asked]) -> list[Encoded]:
    """Examples in the model's own chat template."""
    return encode_all([conversation(e) for e in examples], TEMPLATE, tokenizer(), 512)


def run(trial: Trial, device: str = "cpu", precision: str = "auto", data: Path | None = None) -> dict[str, Any]:
    """Train and measure; the figures as plain JSON values. `data` is ScienceQA's folder, for the skill "science"."""
    torch.manual_seed(trial.seed)
    skills = trial.taught_by(data)
    model = copy.deepcopy(base(device, precision))
    train = {name: encoded(examples) for name, examples in trial.examples("train", data).items()}
    val = [e for examples in trial.examples("validation", data).values() for e in encoded(examples)]
    shown = conversation(skills[trial.skills[0]].examples("train", 1000, 1)[0])
    prepared = METHODS[trial.method](
        model, trial.options, tokenizer(), encode_all([shown], TEMPLATE, tokenizer(), 512)[0]
    )
    began = time.process_time()
    curve, val_curve = fit(prepared, trial, train, val)
    cpu_seconds = time.process_time() - began
    prepared.model.eval()
    return {
        "parameters": sum(p.numel() for p in prepared.parameters),
        "cpu_seconds": round(cpu_seconds, 1),
        "train_loss": [round(x, 4) for x in curve],
        "val_loss": val_curve,
        **measure(prepared, trial, data),
    }


def fit(
    prepared: Prepared, trial: Trial, train: dict[str, list[Encoded]], val: list[Encoded]
) -> tuple[list[float], list[tuple[int, float]]]:
    """Train all that a method trains; returns the loss of every step and some validations."""
    device = prepared.model.device
    optimizers = prepared.optimizers(trial.lr)
    curve: list[float] = []
    validations = [(0, mean_loss(prepared, val))]
    for step in range(trial.steps):
        first = step % (trial.steps // trial.epochs) * trial.per_skill
        batch = [e for examples in train.values() for e in examples[first : first + trial.per_skill]]
        tokens, loss = response_tokens(batch), 0.0
        for part in prepared.batches(batch, len(batch)):
            share = response_loss(prepared.model, part, device) / tokens
            share.backward()
            loss += share.item()
        prepared.tie()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate(trial, step) * group["factor"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        curve.append(loss)
        if (step + 1) % CURVE == 0 or step + 1 == trial.steps:
            validations.append((step + 1, mean_loss(prepared, val)))
    return curve, validations


def rate(trial: Trial, step: int) -> float:
    """Linear warm-up over a tenth of the run, then half a cosine or the peak to the end."""
    warmup = max(1.0, WARMUP * trial.steps)
    if step + 1 < warmup:
        return trial.lr * (step + 1) / warmup
    if trial.schedule == "constant":
        return trial.lr
    return trial.lr * 0.5 * (1 + math.cos(math.pi * (step + 1 - warmup) / (trial.steps + 1 - warmup)))


@torch.no_grad()
def mean_loss(prepared: Prepared, examples: list[Encoded]) -> float:
    """Loss per response token."""
    prepared.model.eval()
    parts = prepared.batches(examples, 24)
    total = sum(response_loss(prepared.model, part, prepared.model.device).item() for part in parts)
    return round(total / response_tokens(examples), 5)


def measure(prepared: Prepared, trial: Trial, data: Path | None = None) -> dict[str, Any]:
    """Answers, the share of right ones on both held-out splits by skill, and perplexity on held-out prose."""
    answers: dict[str, dict[str, list[str]]] = {}
    for split in HELD_OUT:
        asked = trial.examples(split, data)
        given = iter(prepared.answer([e for examples in asked.values() for e in examples]))
        answers[split] = {name: [next(given) for _ in examples] for name, examples in asked.items()}
    return {
        **shares(trial, answers, data),
        "prose_perplexity": prose_perplexity(prepared.model),
        "answers": answers,
    }


def shares(trial: Trial, answers: Mapping[str, Mapping[str, Sequence[str]]], data: Path | None) -> dict[str, Any]:
    """Share of right answers by held-out split and skill, as the checkers say now."""
    figures: dict[str, Any] = {}
    skills = trial.taught_by(data)
    for split in HELD_OUT:
        right = {
            name: [skills[name].check(e, answer) for e, answer in zip(examples, answers[split][name], strict=True)]
            for name, examples in trial.examples(split, data).items()
        }
        figures[split] = {name: round(sum(r) / len(r), 4) for name, r in right.items()}
        figures[split]["all"] = round(sum(figures[split].values()) / len(right), 4)
    return figures


@torch.no_grad()
def prose_perplexity(model: Any) -> float:
    """Perplexity per token on the ends of books that no trial learns from."""
    loss, count = 0.0, 0
    for passage in heldout_passages()[:PASSAGES]:
        ids = torch.tensor([tokenizer()(passage)["input_ids"][:PASSAGE_LENGTH]], device=model.device)
        loss += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return round(math.exp(loss / count), 3)


def answers_by_session(model: PreTrainedModel, examples: Sequence[Asked]) -> list[str]:
    """Greedy answers by the project's own engine."""
    names = tuple(name for name in list_adapters(model) if name != "unused")
    session = Session(model, tokenizer(), names, dict.fromkeys((None, *names), TEMPLATE))
    config = GenerateConfig(max_new_tokens=40, temperature=0)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].instruction + examples[i].input))
    texts = [""] * len(examples)
    for first in range(0, len(order), 32):
        part = order[first : first + 32]
        prompts = [Prompt.before(conversation(examples[i])) for i in part]
        for i, answer in zip(part, session.answer(prompts, names[0] if names else None, config), strict=True):
            texts[i] = answer.text
    return texts


def answers_by_generate(model: Any, examples: Sequence[Asked]) -> list[str]:
    """Greedy answers by transformers' `generate`, for methods that need it."""
    texts = []
    for first in range(0, len(examples), 32):
        part = encoded(examples[first : first + 32])
        prompts = [e.input_ids[: next(i for i, label in enumerate(e.labels) if label >= 0)] for e in part]
        longest = max(map(len, prompts))
        ids = torch.tensor([[tokenizer().eos_token_id] * (longest - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        found = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=40, do_sample=False,
            eos_token_id=tokenizer().eos_token_id, pad_token_id=tokenizer().eos_token_id,
        )  # fmt: skip
        new = found[:, longest:] if found.shape[1] > longest else found
        texts += tokenizer().batch_decode(new, skip_special_tokens=True)
    return texts
