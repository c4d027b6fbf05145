"""Train the bundled tower from nothing: a CLIP vision encoder that knows the pictures of the drawn world.

    python recipes/pictures/train_tower.py

Pictures and captions are pulled together, and apart from all others of the batch, by the symmetric contrastive loss,
and a linear layer says which words a picture's caption has. Contrast alone learns colours first and shapes, counts and
digits slowly; words alone would not tell which colour belongs to which shape. The text encoder and the layer are thrown
away. The tower sees every combination of words, as one that was trained on the world's pictures has seen most; which
of them an adapter learns from is the question set's matter (`combos.py`). With ``--seen-only`` what the test split
shows
is new to the tower, too: it then calls two hearts one or four, as hearts never came in twos. ``--start`` goes on from a
tower that is there. The learning rate follows whichever is further along, the steps or (with
``--max-minutes``) the clock, so that a run which ends early still ends annealed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captions import captions
from combos import changes, random_scene
from draw import Scene, draw
from pool import GROUP, Batch, Pool, canonical
from pretrain import Clock, learning_rate
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax, normalize
from torch.optim import AdamW
from towers import TextEncoder, build_tower, normalised, save
from tqdm import tqdm

from llama_adapter.base import load_tokenizer

LOG_EVERY = 20
ATTRIBUTES = ("colour", "shape", "count", "place", "digit", "size")
CANDIDATES = 4
WORDS_WEIGHT = 0.3
ROOT = Path(__file__).resolve().parents[2]


class Pair(nn.Module):
    """The tower, the text encoder, how sharply they are compared, and what reads words off a picture."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__()
        self.tokenizer = load_tokenizer("bundled")
        self.tower = build_tower(arguments.hidden, arguments.layers, arguments.heads, arguments.intermediate)
        self.text = TextEncoder(len(self.tokenizer), 128, arguments.hidden)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.words = nn.Linear(arguments.hidden, len(self.tokenizer))

    def device(self) -> str:
        """Where the weights are."""
        return self.log_scale.device.type

    def picture_vectors(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] -> unit vectors."""
        return normalize(self.tower(pixel_values=pixels).image_embeds, dim=-1)

    def caption_vectors(self, texts: list[str]) -> Tensor:
        """Captions -> unit vectors."""
        encoded = self.encoded(texts)
        return normalize(self.text(encoded["input_ids"], encoded["attention_mask"].bool()), dim=-1)

    def losses(self, pixels: Tensor, texts: list[str], same: Tensor) -> tuple[Tensor, Tensor]:
        """The contrastive loss, and that of the words of each picture's caption."""
        pictures, encoded = self.tower(pixel_values=pixels), self.encoded(texts)
        told = normalize(self.text(encoded["input_ids"], encoded["attention_mask"].bool()), dim=-1)
        seen, scale = normalize(pictures.image_embeds, dim=-1), self.log_scale.exp().clamp(max=100)
        contrast = contrastive_loss(seen.float(), told.float(), scale, same)
        has = torch.zeros(len(texts), self.words.out_features, device=pixels.device)
        has.scatter_(1, encoded["input_ids"], 1.0)
        has[:, self.tokenizer.pad_token_id] = 0.0
        guessed = self.words(pictures.image_embeds).float()
        return contrast, binary_cross_entropy_with_logits(guessed, has, reduction="sum") / len(texts)

    def encoded(self, texts: list[str]) -> Any:
        """Their tokens [N, T], and a mask."""
        return self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device())


def contrastive_loss(pictures: Tensor, texts: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """Symmetric cross-entropy; scenes that happen to be in a batch twice (`same`) share the probability."""
    logits = scale * pictures @ texts.T
    targets = same / same.sum(1, keepdim=True)
    rows = -(targets * log_softmax(logits, dim=1)).sum(1).mean()
    columns = -(targets * log_softmax(logits.T, dim=1)).sum(1).mean()
    return (rows + columns) / 2


def same_scenes(scenes: list[Scene]) -> Tensor:
    """[N, N], one where two scenes look the same."""
    numbers: dict[Scene, int] = {}
    index = torch.tensor([numbers.setdefault(canonical(scene), len(numbers)) for scene in scenes])
    return (index[:, None] == index[None, :]).float()


def build_optimizer(pair: Pair, weight_decay: float) -> AdamW:
    """AdamW with decay on the matrices only."""
    matrices = [p for p in pair.parameters() if p.dim() > 1]
    vectors = [p for p in pair.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups, lr=1e-3, betas=(0.9, 0.98), foreach=True)


class Run:
    """One training run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.manual_seed(arguments.seed)
        self.arguments, self.rng = arguments, random.Random(arguments.seed)
        self.pair = Pair(arguments).to("cuda" if torch.cuda.is_available() else "cpu")
        self.before: list[dict[str, Any]] = []
        if arguments.start:
            self.pair.tower.load_state_dict(load_file(Path(arguments.start) / "model.safetensors"))
            told = json.loads((Path(arguments.start) / "training.json").read_text(encoding="utf-8"))
            self.before = [*told.pop("before", []), told]
        self.optimizer = build_optimizer(self.pair, arguments.weight_decay)
        begun = time.monotonic()
        self.pool = Pool(arguments.pool, self.rng, arguments.seen_only)
        self.drawn_per_second = arguments.pool * GROUP / (time.monotonic() - begun)
        self.clock = Clock(arguments.steps, arguments.max_minutes, time.monotonic())
        self.curve: list[dict[str, float]] = []
        self.step = 0

    def varied(self, batch: Batch) -> Tensor:
        """The batch's pictures in other light and with grain."""
        pixels = normalised(batch.pictures, self.pair.device())
        light = 1 + 0.05 * torch.randn(len(pixels), 1, 1, 1, device=pixels.device)
        return pixels * light + 0.1 * torch.randn_like(pixels)

    def update(self) -> Tensor:
        """One optimizer step; the two losses before it."""
        rate = learning_rate(self.clock.progress(self.step), self.step, self.arguments.rate, self.arguments.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.pool.refresh(self.arguments.fresh)
        batch, device = self.pool.batch(self.arguments.batch), self.pair.device()
        told = [self.rng.choice(captions(scene)) for scene in batch.scenes]
        same = same_scenes(batch.scenes).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            contrast, words = self.pair.losses(self.varied(batch), told, same)
        loss = contrast + WORDS_WEIGHT * words
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.pair.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return torch.stack([contrast.detach(), words.detach()])

    def note(self, recent: list[Tensor]) -> str:
        """Add the means of the last losses to the curve, and say them."""
        contrast, words = (round(value, 4) for value in torch.stack(recent).mean(0).tolist())
        minutes = round(self.clock.minutes(), 2)
        self.curve.append({"step": self.step, "minutes": minutes, "contrast": contrast, "words": words})
        return f"{contrast:.2f}, words {words:.2f}"

    def write(self) -> dict[str, Any]:
        """Measure, and save the tower with its figures."""
        minutes = self.clock.minutes()
        figures = measure(self.pair, self.arguments.test_pictures)
        options = {name: value for name, value in vars(self.arguments).items() if name not in ("output", "start")}
        training = {
            "steps": self.step,
            "seed": self.arguments.seed,
            "hours": round(minutes / 60, 3),
            "pictures_per_second": round(self.step * self.arguments.batch / minutes / 60, 1),
            "drawn_per_second": round(self.drawn_per_second, 1),
            "device": self.pair.device(),
            "parameters": self.pair.tower.num_parameters(),
            "options": options,
            "caption_choice": figures,
            "loss_curve": self.curve,
            "before": self.before,
        }
        save(self.pair.tower, Path(self.arguments.output), training)
        return figures


@torch.no_grad()
def measure(pair: Pair, count: int) -> dict[str, dict[str, float]]:
    """How often a picture's own caption is nearer than captions that differ in one word.

    For each attribute, pictures of combinations that training has shown ("seen") and has not ("unseen"), all freshly
    drawn; three other captions each, one where there is but one other size. "chance" is what guessing gives.
    """
    pair.eval()
    figures: dict[str, dict[str, float]] = {}
    for attribute in ATTRIBUTES:
        row = {"chance": 0.5 if attribute == "size" else 1 / CANDIDATES}
        for sort in ("seen", "unseen"):
            rng = random.Random(f"measure/{attribute}/{sort}")
            row[sort] = caption_choice(pair, attribute, count, rng, sort == "unseen")
        figures[attribute] = row
    pair.train()
    return figures


def caption_choice(pair: Pair, attribute: str, count: int, rng: random.Random, unseen: bool) -> float:
    """The share of pictures whose right caption wins."""
    right = 0
    scenes = scenes_with(attribute, count, rng, unseen)
    for start in range(0, count, 64):
        part = scenes[start : start + 64]
        sets = [[scene, *rng.sample(others, min(len(others), CANDIDATES - 1))] for scene, others in part]
        pictures = pair.picture_vectors(drawn([scene for scene, _ in part], rng, pair.device()))
        texts = pair.caption_vectors([rng.choice(captions(scene)) for scenes in sets for scene in scenes])
        texts = texts.reshape(len(part), len(sets[0]), -1)
        right += (torch.einsum("nd,ncd->nc", pictures, texts).argmax(1) == 0).sum().item()
    return round(right / count, 3)


def scenes_with(attribute: str, count: int, rng: random.Random, unseen: bool) -> list[tuple[Scene, list[Scene]]]:
    """Scenes that have the attribute, each with those that differ from it there."""
    found: list[tuple[Scene, list[Scene]]] = []
    while len(found) < count:
        scene = random_scene(rng, unseen)
        if others := changes(scene).get(attribute):
            found.append((scene, others))
    return found


def drawn(scenes: list[Scene], rng: random.Random, device: str) -> Tensor:
    """Fresh pictures of the scenes, as the tower reads them."""
    return normalised(np.stack([np.asarray(draw(scene, rng)) for scene in scenes]), device)


def train(arguments: argparse.Namespace) -> None:
    """The whole run."""
    run, recent = Run(arguments), []
    with tqdm(total=arguments.steps, mininterval=5, desc="tower") as bar:
        while run.clock.progress(run.step) < 1.0:
            recent.append(run.update())
            bar.update()
            if run.step % LOG_EVERY == 0:
                bar.set_postfix(loss=run.note(recent), refresh=False)
                recent = []
    for attribute, row in run.write().items():
        print(f"{attribute:8}" + "".join(f"{name} {value:.3f}  " for name, value in row.items()))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=str(ROOT / "src" / "llama_adapter" / "bundled" / "tower"))
    parser.add_argument("--start", help="folder of a tower to go on from")
    parser.add_argument("--seen-only", action="store_true", help="no combination that the questions hold out")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--max-minutes", type=float, default=0, help="end, annealed, after this time (0: no limit)")
    parser.add_argument("--batch", type=int, default=128, help=f"pictures a step, a multiple of {GROUP}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: as torch chooses)")
    parser.add_argument("--pool", type=int, default=2048, help=f"groups of {GROUP} drawn pictures kept in memory")
    parser.add_argument("--fresh", type=int, default=8, help="groups drawn anew before every step")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--intermediate", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--test-pictures", type=int, default=200, help="for each attribute, seen and unseen")
    parser.add_argument("--smoke", action="store_true", help="20 steps, to see that everything runs")
    arguments = parser.parse_args()
    if arguments.batch % GROUP or not GROUP <= arguments.batch <= GROUP * arguments.pool:
        parser.error(f"--batch {arguments.batch} is no multiple of {GROUP} between {GROUP} and {GROUP} times --pool.")
    if arguments.smoke:
        arguments.steps, arguments.pool, arguments.test_pictures = 20, 64, 20
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return arguments


if __name__ == "__main__":
    train(parse_arguments())
