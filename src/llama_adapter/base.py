"""The frozen base model and its tokenizer: found, checked and loaded, with a sentence for everything that can fail."""

import importlib.util
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from packaging.version import Version
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
from llama_adapter.core.families import family_of, is_encoder, text_config
from llama_adapter.core.parts import part_shapes
from llama_adapter.core.quantised import is_quantised
from llama_adapter.errors import MissingExtraError, ModelError, UnsupportedModelError
from llama_adapter.files import is_lfs_pointer
from llama_adapter.settings import BUNDLED, BUNDLED_FOLDER, Precision, Quantization, shown

ModelKind = Literal["base", "tower"]
READS_GGUF = "5.23.0"
"""Older releases (5.17 was tried) read a GGUF's tokenizer without its `add_bos_token`: texts lack their first token."""
META_BASE = (
    "{} is a base in Meta's layout: with transformers 4 run 'python -m "
    "transformers.models.llama.convert_llama_weights_to_hf --input_dir {} --model_size 7B --llama_version 2 "
    "--output_dir NEW', with its size and version, and pass --model NEW."
)
"""Of the path that was given, and its folder. The converter is not in transformers 5."""
META_FILE = r"consolidated\.\d+(-of-\d+\.model)?\.pth"
MOST_LAYERS = 10_000
"""A configuration that claims more is damaged, and building it would never end."""


def resolve_model(name: str, kind: ModelKind = "base") -> str:
    """What transformers is asked for: the package's own folder for 'bundled', else the name itself.

    Raises:
        ModelError: it looks like a path and is no folder, or holds Git LFS pointers.
    """
    if name == BUNDLED:
        return str(BUNDLED_FOLDER / kind)
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        if pointers := [file.name for file in sorted(path.iterdir()) if is_lfs_pointer(file)]:
            raise ModelError(
                f"{path / pointers[0]} is a Git LFS pointer, not the file: run 'git lfs pull' in its folder."
            )
        if is_meta_base(path):
            raise ModelError(META_BASE.format(path, path))
        return str(path)
    if path.exists() and re.fullmatch(META_FILE, path.name):
        raise ModelError(META_BASE.format(path, path.parent))
    if path.exists():
        raise ModelError(f"The {kind} '{name}' is a file: give the folder that holds its config.json.")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ModelError(
            f"The {kind} '{name}' does not exist: give a folder with a config.json, a hub name or 'bundled'."
        )
    return name


def is_meta_base(folder: Path) -> bool:
    """Whether a folder has a base's weights as Meta's code wrote them, and no config.json beside them."""
    names = [file.name for file in folder.iterdir()]
    return "config.json" not in names and any(re.fullmatch(META_FILE, name) for name in names)


def is_here(name: str) -> bool:
    """Whether a base's name is 'bundled', a folder or a GGUF file."""
    path = Path(os.path.expanduser(name))
    return name == BUNDLED or path.is_dir() or (path.suffix.lower() == ".gguf" and path.is_file())


def pretrained(name: str) -> tuple[str, dict[str, str]]:
    """What transformers' `from_pretrained` is given for a base: a source and, of a GGUF file, its name in there.

    'owner/name/file.gguf' is a file on the hub.

    Raises:
        ModelError: see `resolve_model`; or a file that does not exist, or a transformers that reads it wrongly.
        MissingExtraError: a GGUF file without the package that reads it.
    """
    if not name.lower().endswith(".gguf") or os.path.isdir(name):
        return resolve_model(name), {}
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("gguf", "gguf", f"Reading {name}")
    version = transformers.__version__
    if Version(version) < Version(READS_GGUF):
        raise ModelError(
            f"Reading {name} needs transformers {READS_GGUF} or newer, and this is {version}: "
            "pip install -U transformers."
        )
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if path.is_absolute() or owner in ("", ".", "..", "~") or not file or os.path.exists(owner):
        raise ModelError(
            f"The base '{name}' does not exist: give a GGUF file, or 'owner/name/file.gguf' for one on the hub."
        )
    return f"{owner}/{repository}", {"gguf_file": file}


def load_config(name: str) -> PretrainedConfig:
    """The base's configuration, checked to be of a supported family; no weights are read.

    Raises:
        ModelError: there is no such base, or it claims a number of layers that no base has.
        UnsupportedModelError: its family cannot be adapted.
    """
    config = load_any_config(name)
    family_of(config)
    if is_encoder(config):
        raise UnsupportedModelError(
            f"The base '{name}' is an encoder ({config.model_type}) and writes no text: adapt it from Python, with "
            "add_adapter."
        )
    layers = text_config(config).num_hidden_layers
    if not 0 < layers <= MOST_LAYERS:
        raise ModelError(f"The base '{name}' has num_hidden_layers {shown(layers)}: take a whole copy of config.json.")
    return config


def load_any_config(name: str, kind: ModelKind = "base") -> PretrainedConfig:
    """The configuration of a base or a tower of any family.

    Raises:
        ModelError: there is none.
    """
    options: dict[str, str] = {}
    try:
        source, options = pretrained(name) if kind == "base" else (resolve_model(name, kind), {})
        return AutoConfig.from_pretrained(source, **options)
    except (ModelError, MissingExtraError):
        raise
    except Exception as error:  # a malformed config.json raises whatever its first wrong value meets
        if options and not Path(os.path.expanduser(name)).is_file():
            raise ModelError(
                f"There is no file '{name}' here, and the hub gave none ({first_sentence(error)[:-1]}): check the path."
            ) from None
        raise ModelError(
            f"The {kind} '{name}' cannot be read: {_why_unread(error)} "
            "Give a folder with a config.json, a GGUF file, the name of a model on the hub, or 'bundled'."
        ) from None


def _why_unread(error: Exception) -> str:
    """A sentence about a config.json in our words, where transformers' would speak of its own parts."""
    sentence = first_sentence(error)
    if sentence.startswith("Unrecognized model"):
        return "its config.json has no model_type."
    if found := re.search(r"has model type `(.+?)` but Transformers does not recognize", sentence):
        return f"transformers {transformers.__version__} does not know its model_type '{found[1]}'."
    return sentence


def load_tokenizer(name: str) -> Tokenizer:
    """The base's tokenizer.

    Raises:
        ModelError: the folder or hub repository has none that can be read.
    """
    source, options = pretrained(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # tokenizers raise bare Exception on malformed files
        raise ModelError(f"The tokenizer of '{name}' cannot be read: {first_sentence(error)}") from None
    rules = {"chat_template": (str | dict | None, "a text"), "model_max_length": (int | float, "a number")}
    for key, (kind, what) in rules.items():
        if not isinstance(value := getattr(tokenizer, key), kind):
            raise ModelError(f"{key} of the tokenizer of '{name}' is {shown(value)}: it must be {what}.")
    return tokenizer


def load_base(
    name: str,
    device: torch.device,
    precision: Precision = "auto",
    quantization: Quantization | None = None,
    distributed: Any = None,
) -> PreTrainedModel:
    """The base on `device`, in evaluation mode.

    Args:
        name: a folder, a GGUF file, a hub name or 'bundled'; a GGUF's weights become plain ones of `precision`.
        device: where its weights go.
        precision: see `resolve_dtype`.
        quantization: what its linears are rounded to.
        distributed: transformers' `DistributedConfig` of how processes share its weights; each reads its part alone.

    Raises:
        ModelError: it is not there, is damaged, or does not fit into memory.
        UnsupportedModelError: its family cannot be adapted.
        MissingExtraError: a package that reads or rounds the weights is not installed.
    """
    config = load_config(name)
    dtype = resolve_dtype(precision, device)
    source, gguf = pretrained(name)
    options: dict[str, Any] = {"dtype": dtype, **gguf, **_readable(config)}
    # where weights go: all of them on one device, or this process's part of them
    options |= {"device_map": {"": device}} if distributed is None else {"distributed_config": distributed}
    if gguf:  # weights that are left packed, where there are kernels for it, have no backward pass
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if quantization is not None:
        _check_plain(name, config)
        options["quantization_config"] = quantization_config(quantization, dtype)
    try:
        with nullcontext() if sys.stderr.isatty() and name != BUNDLED else quiet(), reading_in_parts():
            model, found = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    except torch.OutOfMemoryError:
        raise ModelError(
            f"The base '{name}' does not fit on {device} in {dtype}: use --load-in-4bit or a smaller base."
        ) from None
    except ImportError as error:  # the package that a folder's own quantisation asks for
        raise ModelError(f"The base '{name}' needs another package: {first_sentence(error)}") from None
    except Exception as error:  # safetensors and pickle readers raise their own kinds on damaged files
        raise ModelError(f"The weights of '{name}' cannot be read: {first_sentence(error)}") from None
    absent = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if absent:  # transformers draws them at random
        raise ModelError(
            f"The weights of '{name}' are incomplete: {', '.join(absent[:3])} {'and others ' * (len(absent) > 3)}"
            "not there or of another shape. Copy the base again."
        )
    if gguf:  # its weights are plain by now: nothing has to keep it from being merged and saved
        model.is_quantized, model.hf_quantizer = False, None
        vars(model.config).pop("quantization_config", None)
    elif is_quantised(model):  # compressed-tensors unpacks at the first forward of the whole, and only of that
        with torch.no_grad():
            model.eval()(torch.zeros(1, 1, dtype=torch.long, device=device))
    return model.eval()


@contextmanager
def reading_in_parts() -> Iterator[None]:
    """Every process reads its own part: accelerate's way is that the first reads all and sends it to the others."""
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


def _readable(config: PretrainedConfig) -> dict[str, Any]:
    """What of a base's own settings is not followed while it is read."""
    # A generation config of our own, so that the base's generation_config.json is not read: nothing in it may stop us
    # or change a token. Sessions follow its end tokens (inference/defaults.py).
    options: dict[str, Any] = {"generation_config": GenerationConfig()}
    text = text_config(config)
    pad = getattr(text, "pad_token_id", None)
    if pad is not None and not 0 <= pad < text.vocab_size:
        # Published bases have such: the tokenizer got a pad token, the embeddings did not. Nothing here uses it.
        text.pad_token_id = None
        options["config"] = config
    return options


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


def _check_plain(name: str, config: PretrainedConfig) -> None:
    already = getattr(config, "quantization_config", None)
    if name.lower().endswith(".gguf"):
        raise ModelError(f"{name} is rounded already, and GGUF weights are unpacked to --precision: quantise no more.")
    if already is not None:
        kind = already.get("quant_method") if isinstance(already, dict) else getattr(already, "quant_method", None)
        raise ModelError(f"The base '{name}' is quantised already ({kind or 'by its config.json'}): quantise no more.")


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    """What transformers is asked for.

    Raises:
        MissingExtraError: the package for it is not installed.
    """
    if quantization == "int8":
        if importlib.util.find_spec("torchao") is None:
            raise MissingExtraError("torchao", "torchao", "--base-precision int8")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig(version=2))
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "bnb", f"--load-in-{quantization}")
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        # it would tell of every product that it rounds its inputs to fp16 on the way
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
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
