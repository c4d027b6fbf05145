"""The processes of a run, as a launcher set them up."""

import logging

import torch
from accelerate import Accelerator, PartialState

from llama_adapter.base import first_sentence
from llama_adapter.errors import TrainingError


def start_accelerator() -> Accelerator:
    """The processes and devices that `accelerate launch` or torchrun set up; one process without them.

    Raises:
        TrainingError: the environment speaks of processes that cannot find each other.
    """
    try:
        # accelerate takes processes on the CPU for strangers to each other unless it is told
        accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    except ValueError as error:
        raise TrainingError(
            f"The processes of this run cannot be set up ({first_sentence(error).rstrip('.')}): launch them with "
            "torchrun or accelerate launch, or unset WORLD_SIZE."
        ) from None
    if not accelerator.is_main_process:
        logging.getLogger("llama_adapter.training").setLevel(logging.ERROR)
    return accelerator


def leave_processes() -> bool:
    """End the process group, where there is one: nothing of this program trains any more. Whether this is the first."""
    state = PartialState()
    state.destroy_process_group()
    return state.is_main_process
