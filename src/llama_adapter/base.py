"""The frozen base model and its tokenizer: found, checked and loaded, with a sentence for everything that can fail."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from llama_adapter.core.config import AdapterConfig
from llama_adapter.core.families import family_of, text_config
from llama_adapter.core.parts import part_shapes
from llama_adapter.errors import MissingExtraError, ModelError
from llama_adapter.files import is_lfs_pointer
from llama_adapter.settings import BUNDLED, Precision, shown

ModelKind = Literal["base", "tower"]
MOST_LAYERS = 10_000
"""A configuration that claims more is damaged, and building it would never end."""


def resolve_model(name: str, kind: ModelKind = "base") -> str:
    """What transformers is asked for: the package's own folder for 'bundled', else the name itself.

    Raises:
        ModelError: it looks like a path and is no folder, or holds Git LFS pointers.
    """
    if name == BUNDLED:
        return str(Path(__file__).parent / "bundled" / kind)
    path = Path(name).expanduser()
    if path.is_dir():
        if pointers := [file.name for file in sorted(path.iterdir()) if is_lfs_pointer(file)]:
            raise ModelError(
                f"{path / pointers[0]} is a Git LFS pointer, not the file: run 'git lfs pull' in its folder."
            )
        return str(path)
    if path.exists():
        raise ModelError(f"The {kind} '{name}' is a file: give the folder that holds its config.json.")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ModelError(
            f"The {kind} '{name}' does not exist: give a folder with a config.json, a hub name or 'bundled'."
        )
    return name


def is_here(name: str) -> bool:
    """Whether a base's name is 'bundled' or a folder."""
    return name == BUNDLED or Path(name).expanduser().is_dir()


def load_config(name: str) -> PretrainedConfig:
    """The base's configuration, checked to be of a supported family; no weights are read.

    Raises:
        ModelError: there is no such base, or it claims a number of layers that no base has.
        UnsupportedModelError: its family cannot be adapted.
    """
    config = load_any_config(name)
    family_of(config)
    layers = text_config(config).num_hidden_layers
    if not 0 < layers <= MOST_LAYERS:
        raise ModelError(f"The base '{name}' has num_hidden_layers {shown(layers)}: take a whole copy of config.json.")
    return config


def load_any_config(name: str, kind: ModelKind = "base") -> PretrainedConfig:
    """The configuration of a base or a tower of any family.

    Raises:
        ModelError: there is none.
    """
    try:
        return AutoConfig.from_pretrained(resolve_model(name, kind))
    except ModelError:
        raise
    except Exception as error:  # a malformed config.json raises whatever its first wrong value meets
        raise ModelError(
            f"The {kind} '{name}' cannot be read: {first_sentence(error)} "
            "Give a folder with a config.json, the name of a model on the hub, or 'bundled'."
        ) from None


def load_tokenizer(name: str) -> Tokenizer:
    """The base's tokenizer.

    Raises:
        ModelError: the folder or hub repository has none that can be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(name))
    except ModelError:
        raise
    except Exception as error:  # tokenizers raise bare Exception on malformed files
        raise ModelError(f"The tokenizer of '{name}' cannot be read: {first_sentence(error)}") from None
    rules = {"chat_template": (str | dict | None, "a text"), "model_max_length": (int | float, "a number")}
    for key, (kind, what) in rules.items():
        if not isinstance(value := getattr(tokenizer, key), kind):
            raise ModelError(f"{key} of the tokenizer of '{name}' is {shown(value)}: it must be {what}.")
    return tokenizer


def load_base(
    name: str, device: torch.device, precision: Precision = "auto", load_in_4bit: bool = False
) -> PreTrainedModel:
    """The base on `device`, in evaluation mode.

    Args:
        name: a folder, a hub name or 'bundled'.
        device: where its weights go.
        precision: see `resolve_dtype`.
        load_in_4bit: quantise the weights to NF4 with bitsandbytes.

    Raises:
        ModelError: it is not there, is damaged, or does not fit into memory.
        UnsupportedModelError: its family cannot be adapted.
        MissingExtraError: 4-bit weights without bitsandbytes.
    """
    config = load_config(name)
    dtype = resolve_dtype(precision, device)
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    text = text_config(config)
    pad = getattr(text, "pad_token_id", None)
    if pad is not None and not 0 <= pad < text.vocab_size:
        # Published bases have such: the tokenizer got a pad token, the embeddings did not. Nothing here uses it.
        text.pad_token_id = None
        options["config"] = config
    if load_in_4bit:
        if device.type != "cuda":
            # bitsandbytes' 4-bit product on a CPU has no backward pass: prompts would silently not learn.
            raise ModelError(f"--load-in-4bit needs a CUDA device, and this is {device.type}: leave the flag out.")
        options["quantization_config"] = _four_bit(dtype)
    try:
        with nullcontext() if sys.stderr.isatty() and name != BUNDLED else quiet():
            # A generation config of our own, so that the base's generation_config.json is not read: nothing in it may
            # stop us or change a token. Sessions follow its end tokens (inference/defaults.py).
            options["generation_config"] = GenerationConfig()
            model = AutoModelForCausalLM.from_pretrained(resolve_model(name), **options)
    except torch.OutOfMemoryError:
        raise ModelError(
            f"The base '{name}' does not fit on {device} in {dtype}: use --load-in-4bit or a smaller base."
        ) from None
    except Exception as error:  # safetensors and pickle readers raise their own kinds on damaged files
        raise ModelError(f"The weights of '{name}' cannot be read: {first_sentence(error)}") from None
    return model.eval()


def empty_base(config: PretrainedConfig) -> PreTrainedModel:
    """A base of this configuration without weights: its modules and their shapes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def check_parts(config: AdapterConfig, base: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the norms, scales, biases and LoRA that `config` asks for; no weights are read.

    Raises:
        ConfigError: it names a linear that the base does not have.
    """
    return part_shapes(config, empty_base(base)) if config.has_parts else {}


def resolve_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """`precision` as a dtype: "auto" is bf16 where the hardware computes in it, else fp32.

    A CPU without instructions for bf16 emulates it at a fraction of its fp32 speed.
    """
    if precision != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    return torch.bfloat16 if _computes_bf16(device) else torch.float32


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private: a torch may lack them
        return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "xpu"


def _four_bit(dtype: torch.dtype) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "bnb", "--load-in-4bit")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


@contextmanager
def quiet(reports: bool = True) -> Iterator[None]:
    """No progress bar: for weights that are read in milliseconds, or when nobody watches, it is noise.

    Without `reports` transformers says nothing of missing and left-out weights either: the caller checks them.
    """
    shown, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    if not reports:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()


def first_sentence(error: Exception) -> str:
    """The first sentence of what another library has to say, for one of ours to quote."""
    text = " ".join(str(error).split())
    return (text.split(". ")[0] or type(error).__name__).rstrip(".:") + "."
