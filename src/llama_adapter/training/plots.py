"""Pictures of a run: the loss curve, and the gates layer by head."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from llama_adapter.errors import ConfigError
from llama_adapter.files import write_atomically, writing


def plot_loss(history: Sequence[Mapping[str, Any]], path: Path, unit: str = "loss per response token (nats)") -> None:
    """Training loss per step (thin, and smoothed) and validation loss, from the lines of metrics.jsonl."""
    train = [(line["step"], line["loss"]) for line in history if "loss" in line]
    val = [(line["step"], line["val_loss"]) for line in history if "val_loss" in line]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if train:
        steps, losses = np.array(train).T
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1)
        axes.plot(steps, smooth(losses), color="tab:blue", label="training")
    if val:
        steps, losses = np.array(val).T
        axes.plot(steps, losses, color="tab:orange", marker="o", markersize=4, label="validation")
        axes.axhline(losses[0], color="grey", linewidth=1, linestyle=":", label="the base, before training")
    axes.set(xlabel="optimiser step", ylabel=unit, title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    _write(figure, path)


def plot_rewards(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rewards of a DPO run (smoothed) and, on validation data, how often the chosen answer has the higher one."""
    train = [line for line in history if "rewards/chosen" in line]
    val = [line for line in history if "val_rewards/accuracies" in line]
    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    for name, colour in (("chosen", "tab:green"), ("rejected", "tab:red"), ("margins", "tab:blue")):
        if train:
            values = np.array([line[f"rewards/{name}"] for line in train])
            above.plot([line["step"] for line in train], smooth(values), color=colour, label=name)
    steps = [line["step"] for line in train]
    below.plot(steps, smooth(np.array([line["rewards/accuracies"] for line in train])), label="training")
    shares = [line["val_rewards/accuracies"] for line in val]
    below.plot([line["step"] for line in val], shares, marker="o", markersize=4, label="validation")
    above.set(ylabel="reward", title="Rewards: beta x log-ratio to the reference")
    below.set(xlabel="optimiser step", ylabel="chosen above rejected", ylim=(0, 1))
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend()
    _write(figure, path)


def plot_gates(gates: Mapping[int, Sequence[float]], path: Path) -> None:
    """act(g) of every head in every adapted layer; 0 (white) lets nothing in.

    Args:
        gates: layer index -> one value per head.
        path: where the PNG goes.
    """
    layers = sorted(gates)
    values = np.array([gates[layer] for layer in layers])
    bound = max(float(np.abs(values).max()), 1e-6)
    height = min(2.0 + 0.28 * len(layers), 12)
    figure = Figure(figsize=(max(4.5, min(2.5 + 0.28 * values.shape[1], 14)), height), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
    axes.set(xlabel="head", ylabel="layer of the base", title="Gates: act(g), 0 lets nothing in")
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.invert_yaxis()  # the top layer on top
    figure.colorbar(image, ax=axes)
    _write(figure, path)


def plot_scores(values: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Exact match per task family, one bar a model.

    Args:
        values: model -> family -> share of right answers.
        path: where the PNG goes.
    """
    families = list(next(iter(values.values())))
    figure = Figure(figsize=(max(5.0, min(2 + 0.5 * len(families), 16)), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(values)
    for i, (name, scores) in enumerate(values.items()):
        places = np.arange(len(families)) + (i - (len(values) - 1) / 2) * width
        axes.bar(places, [scores[family] for family in families], width, label=name)
    axes.set_xticks(range(len(families)), families, rotation=60, ha="right")
    axes.set(ylabel="exact match", ylim=(0, 1), title="Right answers by task family")
    axes.grid(alpha=0.3, axis="y")
    axes.legend()
    _write(figure, path)


def _write(figure: Figure, path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise ConfigError(f"{path} does not end in .png: pictures are PNG files.")
    content = BytesIO()
    figure.savefig(content, dpi=120)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.getvalue())


def smooth(values: np.ndarray, weight: float = 0.9) -> np.ndarray:
    """Exponential moving average, corrected for its start."""
    smoothed, average = [], 0.0
    for count, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return np.array(smoothed)
