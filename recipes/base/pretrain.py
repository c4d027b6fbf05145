"""Train the bundled base from nothing: tokenizer, model, figures.

    python recipes/base/pretrain.py --output src/llama_adapter/bundled/base

On a GPU it runs in bfloat16, on a CPU in float32.  The learning rate follows whichever is further
along, the steps or (with ``--max-minutes``) the clock, so that a run which has to stop early still
ends annealed.  Checkpoints of the saved form are written on the way; the loss curve goes to
``loss.jsonl`` next to them and the figures to ``training.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from corpus import documents
from muon import Muon
from recall import print_table, prose_perplexity, recall_by_family
from tokens import packed_rows, train_tokenizer
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from world import World, all_facts, load_world

LOG_EVERY = 20
MUON_FACTOR = 2.0
"""Muon's rate against AdamW's."""


@dataclass
class Clock:
    """How far along a run is, by steps and by time."""

    steps: int
    max_minutes: float
    begun: float

    def minutes(self) -> float:
        """Minutes since the beginning."""
        return (time.monotonic() - self.begun) / 60

    def progress(self, step: int) -> float:
        """The share of the run that is over."""
        by_time = self.minutes() / self.max_minutes if self.max_minutes else 0.0
        return min(1.0, max(step / self.steps, by_time))


def build_model(arguments: argparse.Namespace, tokenizer: Any) -> LlamaForCausalLM:
    """A small Llama with tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 32,
        num_key_value_heads=arguments.hidden // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def learning_rate(progress: float, step: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to one hundredth of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * cosine)


def build_optimizers(model: LlamaForCausalLM, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices; AdamW for embeddings and norms, which Muon is not made for."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() > 1]
    chosen = set(matrices)
    rest = [p for p in model.parameters() if p not in chosen]
    adam = torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, foreach=True)
    return [adam, Muon(matrices, lr=1e-3, weight_decay=weight_decay)]


def batches(rows: Iterator[list[int]], size: int, device: str) -> Iterator[torch.Tensor]:
    """Rows stacked to batches."""
    while True:
        yield torch.tensor([next(rows) for _ in range(size)], device=device)


def save(model: LlamaForCausalLM, tokenizer: Any, folder: Path, training: dict[str, Any]) -> None:
    """Write the float16 form to a neighbour folder first, so that a reader never finds half a model."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    state = {name: tensor.detach().to("cpu", torch.float16) for name, tensor in model.state_dict().items()}
    copy = LlamaForCausalLM(model.config).to(torch.float16)
    copy.load_state_dict(state)
    copy.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    (fresh / "training.json").write_text(json.dumps(training, indent=1) + "\n", encoding="utf-8")
    for path in fresh.iterdir():
        path.chmod(0o644)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def measure(model: LlamaForCausalLM, tokenizer: Any, world: World, limit: int | None = None) -> dict[str, Any]:
    """Recall and perplexity; with a limit on one wording and a few passages."""
    model.eval()
    figures = {
        "recall": recall_by_family(model, tokenizer, world, wordings=1 if limit else 2),
        "heldout_prose_perplexity": prose_perplexity(model, tokenizer, limit=limit),
    }
    model.train()
    return figures


class Run:
    """One training run: the model, where it stands, and what it has written."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.manual_seed(arguments.seed)
        self.arguments, self.world, self.folder = arguments, load_world(), Path(arguments.output)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = train_tokenizer(documents(self.world, arguments.seed), arguments.vocabulary)
        self.model = build_model(arguments, self.tokenizer).to(self.device)
        self.forward = torch.compile(self.model) if arguments.compile else self.model
        self.optimizers = build_optimizers(self.model, arguments.weight_decay)
        self.clock = Clock(arguments.steps, arguments.max_minutes, time.monotonic())
        self.curve: list[dict[str, float]] = []
        self.step = 0

    def rows(self) -> Iterator[torch.Tensor]:
        """Batches without end."""
        rows = packed_rows(documents(self.world, self.arguments.seed + 1), self.tokenizer, self.arguments.length)
        return batches(rows, self.arguments.batch, self.device)

    def update(self, ids: torch.Tensor) -> torch.Tensor:
        """One optimizer step; the loss before it."""
        rate = learning_rate(self.clock.progress(self.step), self.step, self.arguments.rate, self.arguments.warmup)
        for optimizer, factor in zip(self.optimizers, (1.0, MUON_FACTOR), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = factor * rate
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss = self.forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach()

    def note(self, recent: list[torch.Tensor]) -> float:
        """Add the mean of the last losses to the curve."""
        mean = round(torch.stack(recent).mean().item(), 4)
        rate = round(self.optimizers[0].param_groups[0]["lr"], 6)
        self.curve.append({"step": self.step, "minutes": round(self.clock.minutes(), 2), "rate": rate, "loss": mean})
        return mean

    def write(self, limit: int | None = None) -> dict[str, Any]:
        """Measure and save model, figures and curve."""
        figures = measure(self.model, self.tokenizer, self.world, limit)
        options = {name: value for name, value in vars(self.arguments).items() if name != "output"}
        training = {
            "steps": self.step,
            "tokens": self.step * self.arguments.batch * self.arguments.length,
            "facts": len(all_facts(self.world)),
            "parameters": self.model.num_parameters(),
            "hours": round(self.clock.minutes() / 60, 3),
            "device": self.device,
            "options": options,
            "final_loss": self.curve[-1]["loss"] if self.curve else None,
            **figures,
        }
        save(self.model, self.tokenizer, self.folder, training)
        write_curve(self.curve, self.folder)
        return figures


def train(arguments: argparse.Namespace) -> None:
    """The whole run."""
    run, saved, recent = Run(arguments), 0.0, []
    rows = run.rows()
    with tqdm(total=arguments.steps, mininterval=5, desc="pre-training") as bar:
        while run.clock.progress(run.step) < 1.0:
            recent.append(run.update(next(rows)))
            bar.update()
            if run.step % LOG_EVERY == 0:
                bar.set_postfix(loss=run.note(recent), refresh=False)
                recent = []
            if run.clock.minutes() - saved >= arguments.save_minutes:
                saved = run.clock.minutes()
                figures = run.write(limit=12)
                bar.write(f"{saved:.1f} min, step {run.step}: {json.dumps(figures)}")
    figures = run.write()
    print_table(figures["recall"])
    print(f"perplexity on held-out prose {figures['heldout_prose_perplexity']}")


def write_curve(curve: list[dict[str, float]], folder: Path) -> None:
    """The loss curve, one JSON object to a line."""
    (folder / "loss.jsonl").write_text("".join(json.dumps(point) + "\n" for point in curve), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder for the model")
    parser.add_argument("--steps", type=int, default=7361)
    parser.add_argument("--max-minutes", type=float, default=0, help="end, annealed, after this time (0: no limit)")
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--compile", action="store_true", help="compile the model: a fifth faster, a minute to start")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=160)
    parser.add_argument("--intermediate", type=int, default=448)
    parser.add_argument("--vocabulary", type=int, default=3072)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--weight-decay", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: as torch chooses)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return arguments


if __name__ == "__main__":
    train(parse_arguments())
