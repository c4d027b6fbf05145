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
            Trial("one vector, in full", "one", seed, in_full=True),
            Trial("patches, in full", "two", seed, "patches", "tokens", in_full=True),
            Trial("one vector, in full", "topics", seed, in_full=True),
        ]
    return [
        *plan,
        *(
            Trial("one vector, three times the steps, in full", "one", seed, steps=480, in_full=True)
            for seed in range(seeds)
        ),
        Trial("one vector, prompts from a text, in full", "one", 0, in_full=True, from_text=True),
        Trial("yes or no alone, to every second prompt", "one", 0, asks=("yes_no",), settings=HALF),
        Trial("patches", "two", 0, "patches", "tokens"),
        *(
            Trial(
                "patches, prompts from a text, in full", "two", seed, "patches", "tokens", in_full=True, from_text=True
            )
            for seed in range(seeds)
        ),
        Trial("one vector of both halves, in full", "two", 0, reads="halves", in_full=True),
        Trial("one vector of six scales, in full", "one", 0, reads="scales", in_full=True),
        Trial("visual prompt, in full", "one", 0, "visual_prompt", "tokens", settings=VISUAL, in_full=True),
        Trial("visual prompt, in full", "two", 0, "visual_prompt", "tokens", settings=VISUAL, in_full=True),
        *(
            Trial("one vector, to every second prompt, in full", "one", seed, settings=HALF, in_full=True)
            for seed in range(seeds)
        ),
        Trial("one vector of both halves, to every second prompt, in full", "two", 0, reads="halves", settings=HALF,
              in_full=True),
    ]  # fmt: skip
