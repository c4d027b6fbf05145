"""Every setting with its default, its meaning and its rule. Nothing here imports torch."""

from llama_adapter.config.adapter import FORMAT_VERSION, AdapterConfig, GateActivation, Template, WrittenAs
from llama_adapter.config.checks import Problems, parse, unknown_name
from llama_adapter.config.condition import Absent, Activation, ConditionConfig, Kind
from llama_adapter.config.generate import GenerateConfig
from llama_adapter.config.train import BUNDLED, Precision, TrainConfig, load_recipe, setting

__all__ = [
    "BUNDLED",
    "FORMAT_VERSION",
    "Absent",
    "Activation",
    "AdapterConfig",
    "ConditionConfig",
    "GateActivation",
    "GenerateConfig",
    "Kind",
    "Precision",
    "Problems",
    "Template",
    "TrainConfig",
    "WrittenAs",
    "load_recipe",
    "parse",
    "setting",
    "unknown_name",
]
