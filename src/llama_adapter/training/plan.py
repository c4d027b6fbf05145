"""Check a recipe, its base's configuration and its data, without reading weights."""

import math
from dataclasses import replace
from typing import Any

from llama_adapter.base import check_parts, load_config, load_tokenizer
from llama_adapter.core.families import shape_of
from llama_adapter.core.model import resolve_layers
from llama_adapter.data.limits import Limits
from llama_adapter.formats.native import tensor_shapes
from llama_adapter.training.checkpoint import RunFolder
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.perceive import condition_of, tower_of
from llama_adapter.training.prepare import prepare
from llama_adapter.training.start import adapter_of, check_extras, check_start, check_written_alike, settle, start_text


def plan_run(config: TrainConfig) -> dict[str, Any]:
    """What a run with this recipe would be: data counts, steps, trained parameters, bytes of the adapter.

    Raises:
        LlamaAdapterError: whatever `train` would stop at before it loads the base.
    """
    config, start = settle(config)
    check_extras(config)
    model = config.value("model")
    base = load_config(model)
    check_start(start, config, base)
    resolve_layers(config.adapter_config(), base)
    folder = RunFolder(config.output_dir)
    if config.resume:
        folder.check(config)
    tokenizer, limits = load_tokenizer(model), Limits.of(base)
    data = prepare(config, tokenizer, limits)
    check_written_alike(start, data.raw)
    start_text(config, data.train[0], tokenizer, limits)
    per_epoch = data.steps_per_epoch(config)
    folder.check_length(config, per_epoch)
    adapter = adapter_of(config, start, condition_of(config, data, tower_of(config)), data.raw)
    layers, shape = resolve_layers(adapter, base), shape_of(base)
    adapter = replace(adapter, adapter_layers=layers, base_shape=shape)
    shapes = tensor_shapes(adapter) | check_parts(adapter, base)
    parameters = sum(math.prod(size) for size in shapes.values())
    return {
        "model": model,
        "data": list(config.data),
        "family": shape["model_type"],
        "method": config.method,
        **data.report(),
        **({} if data.streamed else {"steps_per_epoch": per_epoch}),
        "steps": config.total_steps(per_epoch),
        "peak_lr": config.peak_lr,
        "adapter_layers": layers,
        "adapter_parameters": parameters,
        "adapter_bytes": 4 * parameters,
        "notes": data.notes,
    }
