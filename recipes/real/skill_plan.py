"""Which trials answer which question, the most important first. A trial that several groups share is run once."""

from __future__ import annotations

from dataclasses import replace

from real_methods import Options
from skill_trial import Trial

SEEDS = (0, 1, 2)
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
SCALES = Options(adapter_len=4, start="text", norms=True, scale=("o_proj", "down_proj"), parts_lr=0.3)
"""Four prompts that start from a text, own norms, and scales where nothing of a norm reaches."""
AT_ONE_RATE = replace(SCALES, parts_lr=1.0)
"""All of that at one rate."""
IA3_SCALES = Options(adapter_len=4, start="text", scale=("o_proj", "down_proj"), parts_lr=3.0)
"""Four prompts from a text, and scales at IA3's rate where IA3 has those of values and of the feed-forward."""
BEST, BEST_LR, LORA_LR = "K=4 from text, norms and scales", 0.01, 1e-2


def trials() -> list[Trial]:
    """The whole plan, the most important first."""
    return [*methods(), *seeds(), *gap(), *gates(), *rivals(), *layers(), *lengths(), *epochs(), *levers(), *science()]


def methods() -> list[Trial]:
    """This method and LoRA, each at several rates."""
    return [
        *(Trial("methods", "LoRA r=3", "lora", lr) for lr in (5e-3, 1e-2)),
        Trial("methods", "LoRA r=3, twice the rate", "lora", 2 * LORA_LR),
        Trial("methods", BEST, "zero-init", BEST_LR, options=SCALES),
        *(Trial("methods", f"{BEST}, all at one rate", "zero-init", lr, options=AT_ONE_RATE) for lr in (0.005, 0.01)),
        Trial("methods", f"{BEST}, twice the rate", "zero-init", 2 * BEST_LR, options=SCALES),
        *(Trial("methods", "the paper's recipe", "zero-init", lr) for lr in (0.01, 0.03)),
        Trial("methods", "bare", "bare", 0.0, steps=0),
    ]


def rivals() -> list[Trial]:
    """Others, each at the rate that is usual for it and at one more; the seeds of the best by validation loss."""
    found = [
        ("IA3 (PEFT)", "ia3", (0.03, 0.01)),
        ("full fine-tuning", "full", (1e-4, 3e-4)),
        ("adaption prompt (PEFT)", "adaption-prompt", (0.01, 0.03)),
        ("prefix tuning (PEFT)", "prefix", (0.01, 0.1)),
    ]
    more = [Trial("methods", "IA3 (PEFT)", "ia3", 0.03, seed) for seed in SEEDS[1:]]
    return [Trial("methods", label, method, lr) for label, method, rates in found for lr in rates] + more


def gap() -> list[Trial]:
    """What was tried on the way from the paper's recipe to the best."""
    biased = Options(adapter_len=4, start="text", norms=True, bias=EVERY, parts_lr=0.2)
    tried = {
        "paper's, with a sink of score 0 in the second softmax": Options(sink="zero"),
        "paper's, prompts from a text": Options(start="text"),
        "paper's, prompts from a text, gates at 3 times the rate": Options(start="text", gate_lr=3.0),
        "K=4 from text, norms and biases": biased,
        "K=4 from text and norms": Options(adapter_len=4, start="text", norms=True, parts_lr=0.2),
    }
    open_quickly = replace(AT_ONE_RATE, gate_lr=3.0)
    with_lora = Options(adapter_len=3, start="text", lora=2, lora_lr=1.0)
    with_both = Options(adapter_len=4, start="text", norms=True, parts_lr=0.3, lora=1, lora_lr=1.0)
    text = Options(adapter_len=3, start="text")
    return [
        *(Trial("gap", "K=4 from text, scales at IA3's rate", "zero-init", 0.01, s, options=IA3_SCALES) for s in SEEDS),
        *(Trial("gap", "K=3 from text and LoRA r=2", "zero-init", lr, options=with_lora) for lr in (0.01, 0.02)),
        *(Trial("gap", "K=3 from text and LoRA r=2", "zero-init", 0.02, s, options=with_lora) for s in SEEDS[1:]),
        Trial("gap", "K=4 from text, norms and LoRA r=1", "zero-init", 0.01, options=with_both),
        *(Trial("gap", "K=3 from text", "zero-init", 0.01, seed, options=text) for seed in SEEDS),
        Trial("gap", f"{BEST}, all at one rate, gates at 3 times", "zero-init", 0.005, options=open_quickly),
        *(Trial("gap", label, "zero-init", 0.01, options=options) for label, options in tried.items()),
    ]


def gates() -> list[Trial]:
    """Gates that start at zero against gates drawn at random, in the paper's recipe."""
    return [
        Trial("gates", "zero", "zero-init", 0.01),
        Trial("gates", "random", "zero-init", 0.01, options=Options(gate_start=1.0)),
    ]


def seeds() -> list[Trial]:
    """More seeds of the two that matter most."""
    return [
        trial
        for seed in SEEDS[1:]
        for trial in (
            Trial("methods", "LoRA r=3", "lora", LORA_LR, seed),
            Trial("methods", "LoRA r=3, twice the rate", "lora", 2 * LORA_LR, seed),
            Trial("methods", f"{BEST}, all at one rate", "zero-init", 0.005, seed, options=AT_ONE_RATE),
            Trial("methods", BEST, "zero-init", BEST_LR, seed, options=SCALES),
        )
    ]


def layers() -> list[Trial]:
    """The paper's Table 4: in how many of 30 layers, K as in its recipe."""
    return [
        Trial("layers", "L=10", "zero-init", 0.01, options=Options(adapter_layers=10)),
        Trial("layers", "L=20", "zero-init", 0.01, options=Options(adapter_layers=20)),
        Trial("layers", "L=28", "zero-init", 0.01),
    ]


def lengths() -> list[Trial]:
    """How many prompts; ten is the paper's."""
    counts = {4: Options(adapter_len=4), 10: Options(), 40: Options(adapter_len=40)}
    return [Trial("lengths", f"K={count}", "zero-init", 0.01, options=options) for count, options in counts.items()]


def epochs() -> list[Trial]:
    """The paper's Table 6: the same number of steps over fewer and fewer data."""
    return [
        Trial(
            "epochs",
            f"{45 // count * 12} examples, {count} times",
            "zero-init",
            0.005,
            options=AT_ONE_RATE,
            epochs=count,
        )
        for count in (1, 3, 9)
    ]


def levers() -> list[Trial]:
    """One change each to the best recipe of this method."""
    changed = {
        "as it is": AT_ONE_RATE,
        "one gate a layer": replace(AT_ONE_RATE, gate_per_layer=True),
        "a learnt sink, so a gate that depends on the query": replace(AT_ONE_RATE, adapter_len=5, sink="learnt"),
        "prompts by Muon": replace(AT_ONE_RATE, muon=True),
        "gates do not decay": replace(AT_ONE_RATE, gate_decay=False),
    }
    return [
        *(Trial("levers", label, "zero-init", 0.005, options=options) for label, options in changed.items()),
        Trial("levers", "no cosine", "zero-init", 0.005, options=AT_ONE_RATE, schedule="constant"),
    ]


def science() -> list[Trial]:
    """ScienceQA's questions without pictures, where `--data` says where they are."""
    methods = [
        ("bare", "bare", 0.0, Options()),
        ("LoRA r=3", "lora", 5e-3, Options()),
        ("LoRA r=3", "lora", 1e-2, Options()),
        (f"{BEST}, all at one rate", "zero-init", 0.005, AT_ONE_RATE),
        ("the paper's recipe", "zero-init", 0.01, Options()),
        ("IA3 (PEFT)", "ia3", 0.03, Options()),
    ]
    return [
        Trial(
            "science", label, method, lr, options=options, skills=("science",), tests=200, per_skill=8,
            steps=60 if lr else 0,
        )
        for label, method, lr, options in methods
    ]  # fmt: skip
