"""Which trials answer which question. A trial that several groups share is run once."""

from __future__ import annotations

from methods import Options
from trial import Trial

SEEDS = (0, 1, 2)
LR = 0.12
"""The recipe's rate; `learning rates` below shows what others give."""
EPOCHS = 2.0
BEST_LR = {"zero-init": LR, "lora": 0.02, "adaption-prompt": 0.2, "full": 2e-4}
"""Each method's best rate on the validation set, from the `learning rates` trials."""
RATES = {
    "zero-init": (0.03, 0.06, 0.12, 0.25),
    "lora": (3e-3, 0.01, 0.02, 0.04),
    "adaption-prompt": (0.06, 0.1, 0.2, 0.4),
    "full": (5e-5, 1e-4, 2e-4, 5e-4),
}
LAYERS = (1, 2, 4, 6, 8)
LENGTHS = (1, 4, 10, 20, 40)
EPOCH_FACTORS = (0.5, 1.0, 2.0)
GAP = {
    "gates at a tenth of the rate": Options(gate_lr=0.1),
    "gates at three times the rate": Options(gate_lr=3.0),
    "prompts start at 0.1": Options(prompt_scale=0.1),
    "prompts start at 3": Options(prompt_scale=3.0),
}
"""What might close a gap to LoRA."""
V2 = {
    "and norms": Options(norms=True),
    "and scales and biases": Options(norms=True, scale_bias=True),
    "and LoRA": Options(norms=True, scale_bias=True, lora=2),
}
"""LLaMA-Adapter V2, part by part beside the prompts."""


def trials() -> list[Trial]:
    """The whole plan, the most important first."""
    return [*side_by_side(), *gates(), *layers(), *lengths(), *epochs(), *gap(), *v2(), *learning_rates()]


def seeds(group: str, label: str, options: Options, epochs: float | None = None) -> list[Trial]:
    """The recipe with other options, once a seed."""
    return [Trial(group, label, seed, LR, epochs=epochs, options=options) for seed in SEEDS]


def side_by_side() -> list[Trial]:
    """Every method at its best rate."""
    return [Trial("methods", m, s, BEST_LR[m], method=m) for m in BEST_LR for s in SEEDS]


def learning_rates() -> list[Trial]:
    """Every method at several rates, first seed."""
    return [Trial("rates", f"{m} {lr:g}", SEEDS[0], lr, method=m) for m in RATES for lr in RATES[m]]


def gates() -> list[Trial]:
    """Gates that start at zero against gates drawn at random."""
    random = Options(gate_start=1.0)
    at_other_rates = [Trial("gates", f"random {lr:g}", SEEDS[0], lr, options=random) for lr in (0.03, 0.06)]
    return [*seeds("gates", "zero", Options()), *seeds("gates", "random", random), *at_other_rates]


def layers() -> list[Trial]:
    """L grows."""
    return [t for count in LAYERS for t in seeds("layers", str(count), Options(adapter_layers=count))]


def lengths() -> list[Trial]:
    """K grows."""
    return [t for count in LENGTHS for t in seeds("lengths", str(count), Options(adapter_len=count))]


def epochs() -> list[Trial]:
    """1, 2 and 4 times a half run."""
    return [
        t
        for factor in EPOCH_FACTORS
        for t in seeds("epochs", f"{factor * EPOCHS:g}", Options(), None if factor == 1 else factor * EPOCHS)
    ]


def gap() -> list[Trial]:
    """What might help the adapter."""
    return [Trial("gap", label, SEEDS[0], LR, options=options) for label, options in GAP.items()]


def v2() -> list[Trial]:
    """The second version's parts."""
    return [Trial("v2", label, seed, LR, options=options) for seed in SEEDS for label, options in V2.items()]
