"""Which trials `real.py` runs."""

from __future__ import annotations

from real_trial import Trial

SEEDS = 3
HALF = (("half", True),)
VISUAL = (("blocks", 1), ("block_width", 128), ("block_heads", 4))


def trials(seeds: int = SEEDS) -> list[Trial]:
    """The plan, the most important first."""
    short = {"layers": 4, "template": "{}\nAnswer:"}
    plan = [
        Trial("one vector, four layers", "one", 0, **short),
        Trial("patches, four layers", "one", 0, "patches", "tokens", **short),
        Trial("patches, four layers", "two", 0, "patches", "tokens", **short),
        Trial("one vector, naming alone", "one", 0, steps=200, asks=("naming",)),
        Trial("one vector, four layers", "two", 0, **short),
    ]
    for seed in range(seeds):
        plan += [
            Trial("one vector", "one", seed, steps=400),
            Trial("patches", "two", seed, "patches", "tokens"),
            Trial("one vector", "two", seed),
            Trial("one vector", "topics", seed),
        ]
    return [
        *plan,
        Trial("one vector, to every second prompt", "one", 0, settings=HALF),
        Trial("one vector of six scales", "one", 0, reads="scales"),
        Trial("visual prompt", "one", 0, "visual_prompt", "tokens", settings=VISUAL),
        Trial("visual prompt", "two", 0, "visual_prompt", "tokens", settings=VISUAL),
        Trial("one vector of both halves", "two", 0, reads="halves"),
        Trial("one vector of both halves, to every second prompt", "two", 0, reads="halves", settings=HALF),
    ]
