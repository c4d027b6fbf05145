"""Which trials answer which question, the most important first. A trial that several groups share is run once."""

from __future__ import annotations

from real_methods import Options
from skill_trial import Trial

SEEDS = (0, 1, 2)
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")

PAPER = Options()
TEXT = Options(start="text")
SMALL_V2 = Options(adapter_len=4, norms=True, bias=PARTS)


def trials() -> list[Trial]:
    """The whole plan."""
    return [
        Trial("methods", "LoRA r=3", "lora", 5e-3),
        Trial("gap", "K=4, norms and biases", "zero-init", 0.01, options=SMALL_V2),
        Trial("methods", "paper's recipe", "zero-init", 0.01, options=PAPER),
        Trial("gap", "prompts from text", "zero-init", 0.01, options=TEXT),
        Trial("methods", "LoRA r=3", "lora", 1e-2),
    ]
