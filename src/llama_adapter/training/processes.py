"""The processes of a run, as a launcher set them up."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, PartialState

from llama_adapter.base import first_sentence
from llama_adapter.errors import TrainingError

FSDP = "ACCELERATE_USE_FSDP"
"""What `accelerate launch --use_fsdp` sets."""


def start_accelerator() -> Accelerator:
    """The processes and devices that `accelerate launch` or torchrun set up; one process without them.

    Raises:
        TrainingError: the environment speaks of processes that cannot find each other.
    """
    _meet_after_a_restart()
    try:
        # accelerate takes processes on the CPU for strangers to each other unless it is told
        with _without_its_sharding():
            accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    except ValueError as error:
        raise TrainingError(
            f"The processes of this run cannot be set up ({first_sentence(error).rstrip('.')}): launch them with "
            "torchrun or accelerate launch, or unset WORLD_SIZE."
        ) from None
    if not accelerator.is_main_process:
        logging.getLogger("llama_adapter.training").setLevel(logging.ERROR)
    return accelerator


@contextmanager
def _without_its_sharding() -> Iterator[None]:
    """Let accelerate take the processes for what they are, as `sharding.py` shards the base, and nothing else.

    Its own FSDP would read a configuration of which nothing is used here, and stop at what it cannot keep: on a CPU at
    the default of `accelerate launch --use_fsdp`.
    """
    said = os.environ.pop(FSDP, None)
    try:
        yield
    finally:
        if said is not None:
            os.environ[FSDP] = said


def _meet_after_a_restart() -> None:
    """Begin the process group where torchrun has replaced processes, on one machine.

    Its store is the one from before, in which gloo finds addresses of processes that are gone and tries those. The
    number of restarts keeps them apart; several machines may count differently (docs/formats.md says what to set).
    """
    said = os.environ.get
    alone = said("WORLD_SIZE") == said("LOCAL_WORLD_SIZE") and said("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restarts = said("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or not alone or torch.distributed.is_initialized():
        return
    store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    torch.distributed.init_process_group(
        store=torch.distributed.PrefixStore(f"restart {restarts}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def leave_processes() -> bool:
    """End the process group, where there is one: nothing of this program trains any more. Whether this is the first."""
    state = PartialState()
    state.destroy_process_group()
    return state.is_main_process
