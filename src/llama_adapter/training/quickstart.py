"""A first recipe for somebody's data and base, each setting with its reason; reads no weights.

The rules, all of them guesses to start from and none a search:

template    the base's chat template where it has one, else alpaca; prompt-completion records take none
max_length  the longest example up to 1024 tokens, else the length that 99 % stay below, in steps of 64
batch_size  the paper's 64, halved until an epoch has at least 30 steps, down to 8
epochs      the paper's 5, more where 300 steps need them, up to 20
output_dir  runs/ and the name of the data, with a number behind it where that is there
lr          the paper's peak of 2.25e-3, as AdamW's steps are of the rate's size at any batch; the bundled base: 0.12
"""

import math
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from transformers import AutoModelForCausalLM, PretrainedConfig

from llama_adapter.base import load_config, load_tokenizer, resolve_dtype
from llama_adapter.core.families import max_positions, text_config
from llama_adapter.data import Encoded, Example, encode_all
from llama_adapter.data.batches import steps_per_epoch
from llama_adapter.data.sources import load_examples
from llama_adapter.errors import ConfigError, DataError
from llama_adapter.files import write_atomically, writing
from llama_adapter.settings import BUNDLED, BUNDLED_LR
from llama_adapter.training.prepare import ENOUGH

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True)
class Quickstart:
    """What was found, the recipe that fits, and why.

    Attributes:
        found: facts about data and base.
        recipe: settings of a `TrainConfig`.
        reasons: why, by setting.
        warnings: what to look at before a run.
    """

    found: dict[str, Any]
    recipe: dict[str, Any]
    reasons: dict[str, str]
    warnings: list[str]

    def write(self, path: str) -> None:
        """Write the recipe as YAML, a reason behind each setting.

        Raises:
            ConfigError: something is there already.
            AdapterError: the place cannot be written.
        """
        file = Path(os.path.expanduser(path))
        if os.path.lexists(file):
            raise ConfigError(f"{path} exists: give --output another name, or remove it.")
        lines = []
        for key, value in self.recipe.items():
            text = yaml.safe_dump({key: value}, allow_unicode=True).strip()
            reason = " ".join(self.reasons.get(key, "").split())  # a line break would end the comment
            lines.append(f"{text}  # {reason}" if reason else text)
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, ("\n".join(lines) + "\n").encode())


def look_at(data: str, model: str = BUNDLED) -> Quickstart:
    """Look at data and base, and choose.

    Args:
        data: a source as `llama-adapter train --data` takes it.
        model: the base: a folder, a hub name or 'bundled'.

    Raises:
        LlamaAdapterError: the base is not supported, or there is not one record to use.
    """
    base, tokenizer = load_config(model), load_tokenizer(model)
    loaded = load_examples([data], skip_bad_records=True, pictures=False)
    examples, context = loaded.examples, max_positions(base)
    template, why_template, encoded = _write(examples, tokenizer)
    lengths = sorted(len(example.input_ids) for example in encoded)
    recipe: dict[str, Any] = {"model": model, "data": [data], "output_dir": free_folder(f"runs/{name_of(data)}")}
    reasons = {}
    if template is not None:
        recipe["template"], reasons["template"] = template, why_template
    recipe["max_length"], reasons["max_length"] = choose_length(lengths, context)
    if model == BUNDLED:
        recipe["adapter_layers"], reasons["adapter_layers"] = text_config(base).num_hidden_layers, "all, as its recipe"
    recipe |= choose_sizes(len(examples), model, reasons)
    media = sum(bool(example.media) for example in examples)
    if media:
        recipe["condition"], reasons["condition"] = "image", f"{media} records name a file"
    if loaded.skipped:
        recipe["skip_bad_records"], reasons["skip_bad_records"] = True, f"{len(loaded.skipped)} cannot be used"
    cut = sum(length > recipe["max_length"] for length in lengths)
    found = {
        "records": len(examples) + len(loaded.skipped),
        "usable_records": len(examples),
        "format": format_of(examples),
        "tokens": {f"p{share}": percentile(lengths, share) for share in PERCENTILES},
        "truncated_share": round(cut / len(lengths), 4),
        "context": context,
        **estimate(base, recipe, lengths, context),
    }
    warnings = _warnings(examples, loaded.skipped, cut, media)
    if model == BUNDLED and data != BUNDLED:
        warnings.append(
            "the bundled base has 3M parameters and knows its own small world alone: it shows how a run goes, and will "
            "get few answers about yours right; pass --model with a base of yours."
        )
    return Quickstart(found, recipe, reasons, warnings)


def _write(examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase") -> tuple[str | None, str, list[Encoded]]:
    """The template, why, and the examples written with it at full length."""
    whole = 1 << 20
    if all(example.raw for example in examples):
        return None, "", encode_all(examples, "alpaca", tokenizer, whole)
    if not tokenizer.chat_template:
        return "alpaca", "the base has no chat template", encode_all(examples, "alpaca", tokenizer, whole)
    try:
        return "chat", "the base's own", encode_all(examples, "chat", tokenizer, whole)
    except DataError as error:
        why = "the base's chat template does not take these records: " + str(error).split(": ")[0]
        return "alpaca", why, encode_all(examples, "alpaca", tokenizer, whole)


def name_of(data: str) -> str:
    """A run's name, after its data: 'poems' of data/poems.jsonl and of owner/poems:train."""
    return re.sub(r"[^\w-]+", "-", re.split(r"[.:]", Path(data).name)[0]).strip("-") or "adapter"


def free_folder(folder: str) -> str:
    """The folder, or the first of folder-2, folder-3, ... where that is there."""
    names = chain([folder], (f"{folder}-{number}" for number in count(2)))
    return next(name for name in names if not os.path.lexists(name))


def choose_length(lengths: Sequence[int], context: int | None) -> tuple[int, str]:
    """max_length for sorted lengths, and why."""
    longest, most = lengths[-1], percentile(lengths, 99)
    wanted, why = (longest, "the longest example") if longest <= 1024 else (most, "99 % of the examples are shorter")
    length = max(64, 64 * math.ceil(wanted / 64))
    if context is not None and length > context:
        return context, "what the base takes"
    return length, why


def choose_sizes(count: int, model: str, reasons: dict[str, str]) -> dict[str, Any]:
    """Validation part, epochs, batch and rate for a number of records; `reasons` gets a line for each."""
    sizes: dict[str, Any] = {}
    if count >= 100:
        sizes["val_size"] = 200 if count >= 10_000 else 50 if count >= 1000 else max(ENOUGH, round(0.05 * count))
        reasons["val_size"] = "enough to see over-fitting"
    else:
        few = "so few cannot say which step is the best one: the last is kept; look at the answers"
        sizes["val_size"], reasons["val_size"] = 0, few if count > 1 else "there is one record"
    train = count - sizes["val_size"]
    batch = 64
    while batch > 8 and steps_per_epoch(train, batch) < 30:
        batch //= 2
    sizes["batch_size"] = batch
    steps = steps_per_epoch(train, batch)
    small = f"{steps} steps an epoch" if steps >= 30 else f"the smallest that we take; steps an epoch: {steps}"
    reasons["batch_size"] = "the paper's" if batch == 64 else small
    sizes["micro_batch_size"], reasons["micro_batch_size"] = 8, "change it to fit the memory; the result stays the same"
    sizes["epochs"] = min(20, max(5, math.ceil(300 / steps)))
    why = "some 300 are a start" if sizes["epochs"] < 20 else "20 passes are the most proposed; look at the answers"
    reasons["epochs"] = "the paper's" if sizes["epochs"] == 5 else f"{sizes['epochs'] * steps} steps: {why}"
    sizes["lr"] = BUNDLED_LR if model == BUNDLED else 2.25e-3
    reasons["lr"] = "the bundled recipe's" if model == BUNDLED else "the paper's peak"
    return sizes


def format_of(examples: Sequence[Example]) -> str:
    """How the records are written, the most frequent kind first."""
    kinds = Counter(
        "prompt-completion" if e.raw else "instructions" if len(e.messages) == 2 else "conversations" for e in examples
    )
    return ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())


def estimate(
    base: PretrainedConfig, recipe: dict[str, Any], lengths: Sequence[int], context: int | None
) -> dict[str, Any]:
    """Memory and time of a run on this machine, roughly: within a factor of two or three.

    Memory is the weights, and for a micro-batch of the longest examples what the backward pass needs: of a layer some
    16 vectors of the hidden width a token, and the logits. Time is four operations a parameter and token (forward, and
    backward to the activations alone) at half the speed of a matrix product that is timed here.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(base).parameters())
    device = torch.device(torch.accelerator.current_accelerator() or "cpu")
    dtype = resolve_dtype("auto", device)
    size, text = dtype.itemsize, text_config(base)
    longest = min(lengths[-1], recipe["max_length"])
    tokens = recipe["micro_batch_size"] * longest
    activations = tokens * size * (16 * text.hidden_size * text.num_hidden_layers + 3 * text.vocab_size)
    train = len(lengths) - recipe["val_size"]
    learnt = recipe["epochs"] * train * sum(min(n, recipe["max_length"]) for n in lengths) / len(lengths)
    seconds = 4 * parameters * learnt / (0.5 * measured_speed(device, dtype))
    return {
        "parameters": parameters,
        "weights_bytes": parameters * size,
        "weights_bytes_4bit": parameters // 2,
        "activations_bytes": activations,
        "device": f"{device.type}, {str(dtype).removeprefix('torch.')}",
        "steps": recipe["epochs"] * steps_per_epoch(train, recipe["batch_size"]),
        "estimated_seconds": round(seconds, 1),
    }


def measured_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product, the best of three."""
    width, best = 1024, math.inf
    left = torch.ones(width, width, device=device, dtype=dtype)
    for _ in range(3):
        began = time.perf_counter()
        float((left @ left)[0, 0])  # reading a number waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * width**3 / best


def percentile(ordered: Sequence[int], share: int) -> int:
    """The smallest of sorted numbers that `share` percent do not exceed."""
    return ordered[max(0, math.ceil(share / 100 * len(ordered)) - 1)]


def _warnings(examples: Sequence[Example], skipped: Sequence[str], cut: int, media: int) -> list[str]:
    twice = len(examples) - len({(e.messages, e.input, e.media) for e in examples})
    empty = sum("empty" in sentence for sentence in skipped)
    sentences = []
    if skipped:
        sentences.append(f"{len(skipped)} records cannot be used ({empty} empty ones). The first: {skipped[0]}")
    if twice:
        sentences.append(f"{twice} records stand there twice: the validation part may hold what is trained on.")
    if cut:
        sentences.append(f"{cut} examples are longer than max_length and lose their end.")
    if len(examples) < 50:
        few = f"{len(examples)} records are few" if len(examples) > 1 else "one record is little"
        sentences.append(f"{few}: look at answers, not at the loss.")
    if media:
        sentences.append("files are looked at by a tower: see --tower, and docs/pictures.md.")
    return sentences
