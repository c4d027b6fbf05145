"""One trial: prepare a method, train it, measure it. Deterministic in its settings; runs in a process of its own."""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from methods import METHODS, Options, Prepared

import llama_adapter
from llama_adapter import list_adapters
from llama_adapter.base import load_base, load_tokenizer
from llama_adapter.data import Encoded
from llama_adapter.data.batches import global_batch, micro_batches, response_tokens, steps_per_epoch
from llama_adapter.evaluation.instructions import Task, evaluate_instructions, read_tasks
from llama_adapter.inference.session import Session
from llama_adapter.training.config import load_recipe
from llama_adapter.training.loss import response_loss
from llama_adapter.training.optimizer import learning_rate
from llama_adapter.training.prepare import prepare

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "base"))
import recall

BUNDLED = Path(llama_adapter.__file__).parent / "bundled"
CPU = torch.device("cpu")
VALIDATIONS = 5
"""How often a run is validated: often enough for a curve, rarely enough to cost little."""


@dataclass(frozen=True)
class Trial:
    """What is tried; `group` and `label` say where the result goes in the report."""

    group: str
    label: str
    seed: int
    lr: float
    method: str = "zero-init"
    epochs: float | None = None
    options: Options = field(default_factory=Options)

    def key(self) -> dict[str, Any]:
        """Everything that decides the figures; trials of several groups may share them."""
        settings = {"seed": self.seed, "lr": self.lr, "method": self.method, "epochs": self.epochs}
        return settings | dataclasses.asdict(self.options)


@cache
def tasks(name: str) -> list[Task]:
    """A bundled set of questions."""
    return read_tasks(str(BUNDLED / f"{name}.json"))


def run(trial: Trial) -> dict[str, Any]:
    """Train and measure; the figures as plain JSON values."""
    torch.manual_seed(trial.seed)
    overrides = {"seed": trial.seed, "lr": trial.lr} | ({"epochs": trial.epochs} if trial.epochs else {})
    if trial.epochs:
        recipe = load_recipe("bundled", {})
        overrides["warmup_epochs"] = recipe.warmup_epochs * trial.epochs / recipe.epochs
    config = load_recipe("bundled", overrides)
    tokenizer = load_tokenizer(config.model)
    data = prepare(dataclasses.replace(config, seed=0), tokenizer)  # one split for all seeds
    prepared = METHODS[trial.method](load_base(config.model, CPU, "fp32"), trial.options)
    began = time.perf_counter()
    curve, val_curve = fit(prepared, config, data.train, data.val)
    seconds = time.perf_counter() - began
    session = session_of(prepared.model.eval(), tokenizer)
    figures = measure(session)
    parameters = prepared.parameters
    return {
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * 4 for p in parameters),
        "seconds": round(seconds, 1),
        "train_loss": [round(x, 4) for x in curve],
        "val_loss": val_curve,
        **figures,
    }


def fit(
    prepared: Prepared, config: Any, train: list[Encoded], val: list[Encoded]
) -> tuple[list[float], list[tuple[int, float]]]:
    """The recipe's schedule over a method's parameters; returns the loss of every step and some validations."""
    groups = [group for group in prepared.groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=config.peak_lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    total = config.total_steps(steps_per_epoch(len(train), config.batch_size))
    every, curve, validations = max(1, total // VALIDATIONS), [], []
    for step in range(total):
        if step % every == 0:
            validations.append((step, mean_loss(prepared.model, val, config.micro_batch_size)))
        batch = [train[i] for i in global_batch(len(train), config.batch_size, step, config.seed)]
        tokens, loss = response_tokens(batch), 0.0
        for micro_batch in prepared.batches(batch, config.micro_batch_size):
            part = response_loss(prepared.model, micro_batch, CPU) / tokens
            part.backward()
            loss += part.item()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, total) * group["factor"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        curve.append(loss)
    validations.append((total, mean_loss(prepared.model, val, config.micro_batch_size)))
    return curve, validations


@torch.no_grad()
def mean_loss(model: Any, examples: list[Encoded], size: int) -> float:
    """Loss per response token."""
    total = sum(response_loss(model, batch, CPU).item() for batch in micro_batches(examples, 2 * size))
    return round(total / response_tokens(examples), 4)


def session_of(model: Any, tokenizer: Any) -> Session:
    """A trained model as it is; where it has an adapter of ours, that answers."""
    names = tuple(list_adapters(model))
    return Session(model, tokenizer, names, dict.fromkeys((None, *names), "alpaca"))


def measure(session: Session) -> dict[str, Any]:
    """Greedy exact match and loss on held-out facts and wordings, by family, and the damage done to prose."""
    figures: dict[str, Any] = {}
    answering = session.adapters[0] if session.adapters else None
    for name in ("heldout_facts", "heldout_wordings"):
        scores, _ = evaluate_instructions(session, answering, tasks(name), max_new_tokens=16, batch_size=64)
        figures[name] = {score.family: [round(score.exact_match, 4), round(score.loss, 4)] for score in scores}
    figures["prose_perplexity"] = prose_perplexity(session)
    return figures


def prose_perplexity(session: Session) -> float:
    """Perplexity per token on the held-out ends of the books."""
    return recall.prose_perplexity(session.model, session.tokenizer)


def base_figures() -> dict[str, Any]:
    """The bare base: asked in the template, completing plain statements of the held-out facts, reading prose."""
    from world import heldout_facts, load_world

    config = load_recipe("bundled", {})
    tokenizer, model = load_tokenizer(config.model), load_base(config.model, CPU, "fp32")
    world = load_world()
    held = sorted(heldout_facts(world))
    pairs = [(fact, pair) for fact in held for pair in recall.statement_pairs(world, fact, 2)]
    hits = recall.greedy_matches(model, tokenizer, [pair for _, pair in pairs])
    by_family: dict[str, list[bool]] = {}
    for (fact, _), hit in zip(pairs, hits, strict=True):
        by_family.setdefault(fact.family, []).append(hit)
    shares = {family: round(sum(found) / len(found), 4) for family, found in by_family.items()}
    session = session_of(model, tokenizer)
    return {
        "recall": shares | {"all": round(sum(hits) / len(hits), 4)},
        **measure(session),
    }
