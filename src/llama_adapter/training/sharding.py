"""A frozen base whose weights lie in parts on several processes: FSDP2, asked for by `accelerate launch --use_fsdp`.

transformers shards the base layer by layer while it is loaded, so that no process ever holds more than its part and one
layer. The adapter is whole on every process and its gradient one flat sum, as without sharding. A layer's weights come
together whenever it runs, which all processes take part in: so all of them run as many forwards.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from packaging.version import Version
from transformers import PretrainedConfig

from llama_adapter.core.families import text_config
from llama_adapter.errors import TrainingError
from llama_adapter.training.config import TrainConfig

SHARDS = "5.23.0"
"""transformers from this release on loads a base in parts."""
Forward = TypeVar("Forward")


def is_sharded() -> bool:
    """Whether the launcher asks for FSDP, of whichever version: the base is sharded by FSDP2."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP", False))


def check_strategy(config: TrainConfig, base: PretrainedConfig, adapters: int = 1) -> None:
    """Refuse what the launcher asks for and cannot be, before a process group is there.

    Args:
        config: the recipe.
        base: its base's.
        adapters: how many are trained in the run.

    Raises:
        TrainingError: DeepSpeed or Megatron; FSDP with several adapters, one process, an old transformers, a base
            without a plan or with settings that change its weights or layers.
    """
    for flag, name in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if parse_flag_from_env(flag, False):
            raise TrainingError(
                f"{name} is not supported: for a base too large for one device launch with FSDP, accelerate launch "
                "--config_file recipes/fsdp.yaml -m llama_adapter train ..., or load it in 4 bits (--load-in-4bit)."
            )
    if not is_sharded():
        return
    if adapters > 1:
        # a process whose rows have no adapter below some layer would not wait for its weights in the backward pass
        raise TrainingError(
            f"A sharded base trains one adapter a run, and these are {adapters}: train them one by one with "
            "llama-adapter train, or launch without --use_fsdp."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise TrainingError(
            "FSDP shards the base over several processes, and this run is one: launch it with accelerate launch "
            "--use_fsdp --num_processes 2 or more, or without --use_fsdp."
        )
    if Version(transformers.__version__) < Version(SHARDS):
        raise TrainingError(
            f"A sharded base needs transformers {SHARDS} or newer, and this is {transformers.__version__}: "
            "pip install -U transformers."
        )
    changing = {
        f"base_precision {config.base_precision}": config.base_precision != "auto",
        "load_in_4bit": config.load_in_4bit,
        "load_in_8bit": config.load_in_8bit,
        "compile": config.compile,
        "a GGUF file": config.value("model").lower().endswith(".gguf"),
        "a quantised base": getattr(base, "quantization_config", None) is not None,
    }
    if given := [name for name, is_so in changing.items() if is_so]:
        raise TrainingError(
            f"A sharded base is loaded as it is, and this recipe has {' and '.join(given)}: leave that out, or launch "
            "without --use_fsdp."
        )
    if not getattr(text_config(base), "base_model_fsdp_plan", None):
        raise TrainingError(
            f"transformers has no sharding plan for the family '{text_config(base).model_type}': launch without "
            "--use_fsdp, with --load-in-4bit where the base is too large."
        )


def shards_of(accelerator: Accelerator) -> int | None:
    """Over how many processes the base is to be sharded; None is a whole base on each."""
    return accelerator.num_processes if is_sharded() else None


def in_step(
    batches: Iterable[Forward], accelerator: Accelerator, spare: Callable[[], Iterator[Forward]]
) -> Iterator[tuple[Forward, float]]:
    """Every batch with weight 1; on a sharded base then one with weight 0 for each that another process has more."""
    if not is_sharded():
        yield from ((batch, 1.0) for batch in batches)
        return
    own = list(batches)
    counts = accelerator.gather(torch.tensor([len(own)], device=accelerator.device))
    yield from ((batch, 1.0) for batch in own)
    for _ in range(int(counts.max()) - len(own)):
        yield (own[-1] if own else next(spare())), 0.0
