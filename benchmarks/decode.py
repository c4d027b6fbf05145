"""Decoding speed: greedy generation of a forced length, prefill included, by the same loop for everyone.

    python -m benchmarks.decode --shape tiny --json benchmarks/results/cpu.json

Before anything is timed, our logits and PEFT's must be equal, teacher-forced and token by token with a cache.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, shapes
from benchmarks.harness import BenchmarkError, Contender, Setting
from benchmarks.lengths import random_prompts
from llama_adapter import list_adapters
from llama_adapter.core.model import active_adapter
from llama_adapter.inference.cache import GrowingCache
from llama_adapter.inference.choice import Row
from llama_adapter.inference.engine import Engine
from llama_adapter.inference.steps import why_no_quick_steps

BASE, OURS, PEFT, LORA = "bare base", "ours", "PEFT adaption prompt", "LoRA"
QUICK_BASE, STOCK_OURS = "bare base, our steps", "ours, transformers' steps"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}
"""Largest difference of two sets of logits, as a share of their size."""
CACHED_STEPS = 4
"""Tokens that the cached half of the parity check goes through."""


def models(setting: Setting) -> dict[str, Any]:
    """The base and three ways to adapt it, on the same weights; base and ours by transformers' `generate` and ours."""
    base = shapes.build(setting.shape, setting.device, setting.dtype, setting.options.seed)
    ours, adapter = shapes.with_ours(base, setting.shape)
    for model in (base, ours):
        if (reason := why_no_quick_steps(model)) is not None:
            raise BenchmarkError(f"There are no quick steps here: {reason}.")
    return {
        BASE: base,
        QUICK_BASE: Engine(shapes.share(base)),
        OURS: Engine(ours),
        STOCK_OURS: shapes.with_ours(base, setting.shape, adapter)[0],
        PEFT: shapes.with_adaption_prompt(base, setting.shape, adapter),
        LORA: shapes.with_lora(base, setting.options.lora_rank),
    }


def plain_model(found: Any) -> Any:
    """The transformers model that an engine or PEFT has."""
    found = found.model if isinstance(found, Engine) else found
    return found.get_base_model() if hasattr(found, "get_base_model") else found


def generate(found: Any, prompts: Tensor, new_tokens: int, names: Sequence[str | None] | None = None) -> Tensor:
    """Exactly `new_tokens` greedy tokens for every prompt, by an engine or by transformers' `generate`."""
    if isinstance(found, Engine):
        return by_engine(found, prompts, new_tokens, names)
    return found.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        disable_compile=True,
    )


def by_engine(
    engine: Engine, prompts: Tensor, new_tokens: int, names: Sequence[str | None] | None, compiled: bool = False
) -> Tensor:
    """The same by an engine; None is the active adapter for all."""
    active = active_adapter(engine.model) if list_adapters(engine.model) else None
    asked = zip(prompts.tolist(), names or [active] * len(prompts), strict=True)
    rows = [Row(tokens, name, max_new_tokens=new_tokens) for tokens, name in asked]
    written = torch.tensor(engine.generate(rows, compile=compiled), device=prompts.device)
    return torch.cat([prompts, written], 1)


@torch.no_grad()
def forced_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits of every position in one forward, and behind them those of the last positions one by one with a cache."""
    whole = model(input_ids=ids).logits
    split = ids.shape[1] - CACHED_STEPS
    cache, steps = GrowingCache(model.config), []
    model(input_ids=ids[:, :split], past_key_values=cache, use_cache=True)
    for position in range(split, ids.shape[1]):
        out = model(
            input_ids=ids[:, position : position + 1],
            position_ids=torch.full((len(ids), 1), position, device=ids.device),
            past_key_values=cache,
            use_cache=True,
        )
        steps.append(out.logits)
    return torch.cat([whole, *steps], 1).float()


def check_parity(found: dict[str, Any], ids: Tensor, dtype: torch.dtype) -> float:
    """How far our logits are from PEFT's, as a share of their size.

    Raises:
        BenchmarkError: further than `TOLERANCE`, or the adapter changes so little that this shows nothing.
    """
    ours, peft, base = (forced_logits(plain_model(found[name]), ids) for name in (OURS, PEFT, BASE))
    difference, effect = float((ours - peft).norm() / peft.norm()), float((ours - base).norm() / base.norm())
    if not difference <= TOLERANCE[dtype]:
        raise BenchmarkError(
            f"Our logits differ from PEFT's by {difference:.2g} of their size, where {TOLERANCE[dtype]:g} is allowed: "
            "nothing was timed."
        )
    if not effect > 2 * difference:
        raise BenchmarkError(f"The adapter changes logits by {effect:.2g} only, so equality would show nothing.")
    return difference


def contenders(setting: Setting, found: dict[str, Any], prompts: Tensor) -> list[Contender]:
    """Who is timed at one batch size; compiled at the first alone, as every size is compiled for itself."""
    count, chosen = setting.options.new_tokens, setting.chosen(list(found))
    plain = [Contender(name, lambda _, m=found[name]: generate(m, prompts, count)) for name in chosen]
    if not setting.options.compile or len(prompts) != setting.options.batches[0]:
        return plain
    engines = {name: Engine(plain_model(found[name])) for name in chosen if name in (BASE, OURS, PEFT)}
    return plain + [
        Contender(
            f"{name}, compiled", lambda _, engine=engine: by_engine(engine, prompts, count, None, True), optional=True
        )
        for name, engine in engines.items()
    ]


def measure(setting: Setting, found: dict[str, Any], batch: int, budget: harness.Budget) -> list[dict[str, Any]]:
    """The figures of every contender at one batch size."""
    options = setting.options
    prompts = random_prompts(batch, options.prompt_tokens, setting.shape.vocab, setting.device, options.seed)
    timings = harness.interleave(
        contenders(setting, found, prompts), options.turns, options.warmup, setting.device, budget
    )
    tokens = batch * options.new_tokens
    return [
        {
            "name": name,
            "batch": batch,
            "failure": timing.failure,
            "tokens_per_second": harness.spread([tokens / s for s in timing.seconds]) if timing.seconds else None,
            "seconds": timing.seconds,
            "peak_bytes": timing.peak_bytes,
            "ours_faster_by": harness.ratios(timing, timings[OURS]) if OURS in timings else None,
        }
        for name, timing in timings.items()
    ]


def show(found: Sequence[dict[str, Any]], setting: Setting, parity: float) -> str:
    """The table."""
    options = setting.options
    rows = [
        [
            str(row["batch"]), row["name"], row["failure"] or harness.with_range(row["tokens_per_second"]),
            harness.with_range(row["ours_faster_by"], "{:.2f}"), str(len(row["seconds"])),
            harness.gibibytes(row["peak_bytes"]),
        ]
        for row in found
    ]  # fmt: skip
    title = (
        f"Decoding, {setting.line()}: {options.prompt_tokens} prompt tokens and {options.new_tokens} new ones, "
        "median (quartiles)"
    )
    head = ["batch", "row", "tokens/s", "ours faster by", "turns", "peak GiB"]
    return harness.table(title, head, rows) + f"\nOur logits and PEFT's agree to {parity:.1g}.\n"


def parse(arguments: Sequence[str] | None) -> Any:
    """The options."""
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="rows decoded together")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of every row")
    parser.add_argument("--new-tokens", type=int, default=128, help="of every row")
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="rows with a static cache and a compiled step as well, at the first of the batches",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, time, report."""
    setting = Setting.of(parse(arguments))
    options = setting.options
    found = models(setting)
    ids = random_prompts(2, options.prompt_tokens, setting.shape.vocab, setting.device, options.seed + 1)
    parity = check_parity(found, ids, setting.dtype)
    rows: list[dict[str, Any]] = []
    for done, batch in enumerate(options.batches):
        rows += measure(setting, found, batch, setting.budget.share(len(options.batches) - done))
    setting.report("decode", {"parity": parity, "rows": rows})
    print(show(rows, setting, parity))


if __name__ == "__main__":
    harness.run(main)
