"""A frozen base whose weights lie in parts on several processes, which transformers cuts while it is loaded.

FSDP2, asked for by `accelerate launch --use_fsdp`: no process ever holds more than its part and one layer. The adapter
is whole on every process and its gradient one flat sum, as without sharding. A layer's weights come together whenever
it runs, which all processes take part in: so all of them run as many forwards.

Tensor parallelism, asked for by the recipe's `tensor_parallel`: every process has some heads of each layer. All of them
together are one: they run the same forwards, and each has the whole gradient (see `core/tensor_parallel.py`).
"""

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from packaging.version import Version
from transformers import PretrainedConfig

from llama_adapter.base import empty_base
from llama_adapter.core.families import text_config
from llama_adapter.core.tensor_parallel import CUTS, why_not_by_head
from llama_adapter.errors import TrainingError
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.processes import FSDP

Forward = TypeVar("Forward")
MMAP_THRESHOLD, GIVEN_BACK = -3, 2**20
"""glibc's name for the size, and that size in bytes, from which on a block goes back to the system when it is freed."""


def is_sharded() -> bool:
    """Whether the launcher asks for FSDP, of whichever version: the base is sharded by FSDP2."""
    return bool(parse_flag_from_env(FSDP, False))


def check_strategy(recipes: Sequence[TrainConfig], base: PretrainedConfig) -> None:
    """Refuse what the launcher or the recipe asks for and cannot be, before a process group is there.

    Args:
        recipes: of the adapters that are trained in the run.
        base: their base's.

    Raises:
        TrainingError: DeepSpeed, Megatron or accelerate's own parallelism; FSDP with several adapters; FSDP or
            tensor parallelism with one process, an old transformers, a base without a plan or with settings that change
            its weights or layers; tensor parallelism with norms, scales, biases, LoRA, or heads that cannot be shared.
    """
    config = recipes[0]
    for flag, name in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if parse_flag_from_env(flag, False):
            raise TrainingError(
                f"{name} is not supported: for a base too large for one device launch with FSDP, accelerate launch "
                "--config_file recipes/fsdp.yaml -m llama_adapter train ..., or load it in 4 bits (--load-in-4bit)."
            )
    if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG", False):
        raise TrainingError(
            "accelerate's parallelism_config is not read: for tensor parallelism launch without it, torchrun "
            "--nproc_per_node 2 -m llama_adapter train ... --tensor-parallel; for FSDP, accelerate launch --use_fsdp."
        )
    if config.tensor_parallel and is_sharded():
        raise TrainingError("tensor_parallel and FSDP exclude each other: leave one of them out.")
    if config.tensor_parallel:
        _check_parts(config, base, "Tensor parallelism", "tensor_parallel")
        _check_heads(recipes, base)
    elif is_sharded():
        if len(recipes) > 1:
            # a process whose rows have no adapter below some layer would not wait for its weights in the backward pass
            raise TrainingError(
                f"A sharded base trains one adapter a run, and these are {len(recipes)}: train them one by one with "
                "llama-adapter train, or launch without --use_fsdp."
            )
        _check_parts(config, base, "FSDP", "--use_fsdp")


def _check_parts(config: TrainConfig, base: PretrainedConfig, name: str, switch: str) -> None:
    """What both ways to have a base in parts ask of a run."""
    if _processes() < 2:
        fsdp = "accelerate launch --use_fsdp --num_processes 2"
        launch = "torchrun --nproc_per_node 2" if config.tensor_parallel else fsdp
        raise TrainingError(
            f"{name} shards the base over several processes, and this run is one: launch it with {launch} or more, or "
            f"without {switch}."
        )
    if Version(transformers.__version__) < Version(CUTS):
        raise TrainingError(
            f"A sharded base needs transformers {CUTS} or newer, and this is {transformers.__version__}: "
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
            f"without {switch}."
        )
    if not getattr(text_config(base), f"base_model_{'tp' if config.tensor_parallel else 'fsdp'}_plan", None):
        raise TrainingError(
            f"transformers has no sharding plan for the family '{text_config(base).model_type}': launch without "
            f"{switch}, with --load-in-4bit where the base is too large."
        )


def _processes() -> int:
    """How many the launcher says there are; 1 where it says nothing that is a number, which accelerate reports."""
    said = os.environ.get("WORLD_SIZE", "1")
    return int(said) if said.isdecimal() else 1


def _check_heads(recipes: Sequence[TrainConfig], base: PretrainedConfig) -> None:
    if any(config.adapter_config().has_parts for config in recipes):
        raise TrainingError(
            "tensor_parallel knows no norms, linear_scale, linear_bias and lora_rank: leave them out, or shard with "
            "accelerate launch --use_fsdp instead."
        )
    processes = _processes()
    if reason := why_not_by_head(empty_base(base), processes):
        raise TrainingError(
            f"This base cannot be cut head by head: {reason}. Launch another number of processes, or shard it with "
            "accelerate launch --use_fsdp instead."
        )


def distribution(config: TrainConfig, accelerator: Accelerator) -> Any:
    """What transformers is told of how the base is cut, a `DistributedConfig`; None is a whole base on each process."""
    if not (config.tensor_parallel or is_sharded()):
        return None
    from transformers.distributed import DistributedConfig

    if config.tensor_parallel:
        return DistributedConfig(tp_size=accelerator.num_processes, tp_plan="auto")
    return DistributedConfig(fsdp_size=accelerator.num_processes)


def give_freed_memory_back(device: torch.device) -> None:
    """On a CPU, let a sharded base's process shrink when a layer's weights are freed, where its malloc is glibc's.

    That keeps blocks of up to 32 MB for later once the first was freed, in pieces which the next layer does not fit
    into: without this, processes grow to more than the whole base, however many share it. It stays so until the process
    ends, as glibc does not tell what was set before; a process of a sharded run does nothing else.
    """
    if is_sharded() and device.type == "cpu" and os.name == "posix":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # others than glibc have none, or one that does nothing
        if mallopt is not None:
            mallopt(MMAP_THRESHOLD, GIVEN_BACK)


def place_of(config: TrainConfig, accelerator: Accelerator) -> tuple[int, int]:
    """Which part of every batch is this process's, and of how many; all processes of a base cut by heads are one."""
    return (0, 1) if config.tensor_parallel else (accelerator.process_index, accelerator.num_processes)


def over_processes(tensor: torch.Tensor, config: TrainConfig, accelerator: Accelerator) -> torch.Tensor:
    """The sum of what the parts of a batch gave.

    Processes that are one have all of it each, and take the mean: what one of them rounded otherwise would else add up,
    step by step, to another adapter.
    """
    return accelerator.reduce(tensor, "mean" if config.tensor_parallel else "sum")


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
