"""Check a recipe, its base's configuration and its data, without reading weights."""

import math
from dataclasses import replace
from typing import Any

from llama_adapter.base import check_parts, load_config, load_tokenizer
from llama_adapter.core.families import max_positions, shape_of
from llama_adapter.core.model import resolve_layers
from llama_adapter.data.batches import steps_per_epoch
from llama_adapter.formats.native import tensor_shapes
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.perceive import condition_of
from llama_adapter.training.prepare import prepare


def plan_run(config: TrainConfig) -> dict[str, Any]:
    """What a run with this recipe would be: data counts, steps, trained parameters, bytes of the adapter.

    Raises:
        LlamaAdapterError: whatever `train` would stop at before it loads the base.
    """
    base = load_config(config.model)
    resolve_layers(config.adapter_config(), base)
    shape = shape_of(base)
    data = prepare(config, load_tokenizer(config.model), max_positions(base))
    per_epoch = steps_per_epoch(len(data.train), config.batch_size)
    condition = condition_of(config, data)
    adapter = replace(config.adapter_config(), base_shape=shape, condition=condition)
    layers = resolve_layers(adapter, base)
    adapter = replace(adapter, adapter_layers=layers)
    shapes = tensor_shapes(adapter) | check_parts(adapter, base)
    parameters = sum(math.prod(size) for size in shapes.values())
    return {
        "model": config.model,
        "family": shape["model_type"],
        **data.report(),
        "steps_per_epoch": per_epoch,
        "steps": config.total_steps(per_epoch),
        "peak_lr": config.peak_lr,
        "adapter_layers": layers,
        "adapter_parameters": parameters,
        "adapter_bytes": 4 * parameters,
    }
