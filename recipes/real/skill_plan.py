"""Which trials answer which question, the most important first. A trial that several groups share is run once."""

from __future__ import annotations

from real_methods import Options
from skill_trial import Trial

SEEDS = (0, 1, 2)
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")

PAPER = Options()
TEXT = Options(start="text")
SINK = Options(sink="zero")
SMALL_V2 = Options(adapter_len=4, norms=True, bias=PARTS)
V2_SLOW = Options(adapter_len=4, norms=True, bias=PARTS, parts_lr=0.2, start="text")


def trials() -> list[Trial]:
    """The whole plan."""
    return [
        Trial("methods", "LoRA r=3", "lora", 5e-3),
        Trial("gap", "K=4, norms and biases at a fifth of the rate, text", "zero-init", 0.01, options=V2_SLOW),
        Trial("gap", "sink", "zero-init", 0.01, options=SINK),
        Trial("gap", "prompts from text", "zero-init", 0.01, options=TEXT),
        Trial(
            "gap",
            "K=4, norms and LoRA r=1, text",
            "zero-init",
            0.01,
            options=Options(adapter_len=4, norms=True, parts_lr=0.2, start="text", lora=1),
        ),
        Trial(
            "gap",
            "K=4, norms and scales, text",
            "zero-init",
            0.01,
            options=Options(adapter_len=4, norms=True, scale=("o_proj", "down_proj"), parts_lr=0.3, start="text"),
        ),
        Trial("gap", "prompts from text, gates 3x", "zero-init", 0.01, options=Options(start="text", gate_lr=3.0)),
        Trial("methods", "LoRA r=3", "lora", 1e-2),
        Trial("methods", "paper's recipe", "zero-init", 0.01, options=PAPER),
        Trial("methods", "bare", "bare", 0.0, steps=0),
    ]
