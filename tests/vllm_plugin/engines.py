"""Tiny bases with adapters, vLLM's engine on them, and what transformers says to the same tokens.

vLLM rewrites classes of transformers in its own process: whatever needs transformers as it is runs `apart`.
"""

import gc
import multiprocessing
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from runs import tiny_tokenizer
from tiny import open_gates
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llama_adapter import AdapterConfig, add_adapter, load_adapter, save_adapter

COMMON = {
    "vocab_size": 300, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.08, "tie_word_embeddings": False,
}  # fmt: skip
TIED = {"tie_word_embeddings": True}
MHA = {"num_key_value_heads": 4}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, dict] = {
    "arcee": {},
    "cohere": {"use_qk_norm": True, "logit_scale": 1.0, **TIED},
    "cohere2": {"logit_scale": 1.0, **SLIDING, "sliding_window": 512, **TIED},
    "ernie4_5": {},
    "exaone4": SLIDING,
    "gemma": {},
    "gemma2": {**SLIDING, **TIED, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 40},
    "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 40},
    "glm": {},
    "glm4": {},
    "gpt2": {},
    "gpt_neox": {"rotary_pct": 0.5, **MHA},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, **SLIDING},
    "granite": {"attention_multiplier": 0.2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": {},
    "hunyuan_v1_dense": {},
    "llama": {},
    "ministral": {"sliding_window": 16},
    "mistral": {"sliding_window": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo": {"clip_qkv": 0.5},
    "olmo2": {},
    "olmo3": SLIDING,
    "phi": {"qk_layernorm": True, "partial_rotary_factor": 0.5},
    "phi3": MHA,
    "qwen2": {},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 64},
    "qwen3": {},
    "qwen3_moe": MOE,
    "seed_oss": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "starcoder2": {},
}
"""Every family of the table, with what makes it unlike Llama."""
GPT2 = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 512}


def write_family(family: str, folder: Path, **changes: Any) -> Path:
    """A random base of a family, norms and biases away from 1 and 0, with the tiny tokenizer."""
    tokenizer = tiny_tokenizer()
    values = {**COMMON, **FAMILIES[family], **changes, "vocab_size": len(tokenizer)}
    if family == "gpt2":
        values = {key: values[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")} | GPT2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * (0.3 if "norm" in name else 0.1))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_adapters(base: Path, folder: Path, count: int = 2, **config: Any) -> list[str]:
    """Adapters with open gates, unlike in length, layers and activation, by turns; their folders."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    layers, folders = model.config.num_hidden_layers, []
    for number in range(count):
        torch.manual_seed(100 + number)
        kind = (10, layers, "tanh") if number % 2 == 0 else (7, layers // 2, "identity")
        values = dict(zip(("adapter_len", "adapter_layers", "gate_activation"), kind, strict=True)) | config
        adapter = add_adapter(model, AdapterConfig(**values), f"n{number}", replace=False)
        open_gates(adapter, number, scale=0.7)
        with torch.no_grad():
            for key, value in adapter.state_dict().items():
                if key.startswith("lora.") and key.endswith(".B"):
                    value.normal_(0, 0.05)
                if key.endswith("gate_scale"):
                    value.fill_(1.5 + number)
        folders.append(str(save_adapter(model, folder / f"n{number}", f"n{number}")))
    return folders


@contextmanager
def engine(base: Path | str, **settings: Any):
    """vLLM's engine in this process, in fp32."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    values = {
        "dtype": "float32", "max_model_len": 256, "enforce_eager": True, "max_num_seqs": 32, "enable_lora": True,
        "max_loras": 4, "max_cpu_loras": 8, "max_lora_rank": 16, "lora_target_modules": ["attn"],
        "disable_log_stats": True,
    }  # fmt: skip
    values = {key: value for key, value in {**values, **settings}.items() if value is not None}
    if "tensor_parallel_size" not in values:
        values["distributed_executor_backend"] = "uni"
    llm = None
    try:
        llm = LLM(str(base), **values)
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def requests(folders: Sequence[str | None], first: int = 1) -> list[Any]:
    """A LoRA request for each folder, by its place in the list; None is the base."""
    from vllm.lora.request import LoRARequest

    return [f and LoRARequest(Path(f).name, first + number, f) for number, f in enumerate(folders)]


def prompts(count: int, longest: int = 60, seed: int = 0) -> list[list[int]]:
    """Random tokens, unlike in number, none of them special."""
    rng = random.Random(seed)
    return [[1, *(rng.randint(3, 255) for _ in range(rng.randint(4, longest)))] for _ in range(count)]


def answers(llm: Any, tokens: Sequence[list[int]], adapters: Sequence[Any], new: int = 24) -> list[dict[str, Any]]:
    """What the engine says to prompts, each with an adapter's request or None: tokens and their log probabilities."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new, logprobs=1, ignore_eos=True)
    outputs = llm.generate(
        [{"prompt_token_ids": row} for row in tokens], sampling, lora_request=list(adapters), use_tqdm=False
    )
    found = []
    for output, adapter in zip(outputs, adapters, strict=True):
        said = list(output.outputs[0].token_ids)
        scores = [step[token].logprob for token, step in zip(said, output.outputs[0].logprobs, strict=True)]
        found.append(
            {
                "adapter": adapter and adapter.lora_path, "prompt": list(output.prompt_token_ids), "tokens": said,
                "logprobs": scores, "cached": output.num_cached_tokens,
            }
        )  # fmt: skip
    return found


@dataclass
class Compared:
    """What transformers and llama_adapter say to the tokens that an engine said.

    Attributes:
        equal, total: tokens that are the reference's likeliest, of all.
        worst: largest difference of a log probability.
        effect: largest difference that adapters make to the base's log probabilities.
    """

    equal: int = 0
    total: int = 0
    worst: float = 0.0
    effect: float = 0.0

    def __str__(self) -> str:
        return f"{self.equal}/{self.total} tokens, logprobs {self.worst:.1e}, effect {self.effect:.1f}"


def compared(base: Path | str, found: Sequence[dict[str, Any]], dtype: torch.dtype = torch.float32) -> Compared:
    """Answers against the reference."""
    result = Compared()
    capped = getattr(AutoConfig.from_pretrained(base), "attn_logit_softcapping", None)
    attention = {"attn_implementation": "eager"} if capped else {}  # transformers' sdpa leaves the cap out
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **attention).eval()
    for folder in {one["adapter"] for one in found} - {None}:
        load_adapter(model, folder, name=Path(folder).name)
    adapted = any(one["adapter"] for one in found)
    for one in found:
        ids, start = one["prompt"] + one["tokens"], len(one["prompt"])
        names = {"adapter_names": one["adapter"] and Path(one["adapter"]).name} if adapted else {}
        with torch.inference_mode():
            scores = model(torch.tensor([ids]), **names).logits[0, start - 1 : -1].float().log_softmax(-1)
            if one["adapter"]:
                bare = model(torch.tensor([ids]), adapter_names=None).logits[0, start - 1 : -1].float().log_softmax(-1)
                result.effect = max(result.effect, (bare - scores).abs().max().item())
        mine = scores.gather(1, torch.tensor(one["tokens"])[:, None])[:, 0]
        result.worst = max(result.worst, (mine - torch.tensor(one["logprobs"])).abs().max().item())
        result.equal += int((scores.argmax(-1) == torch.tensor(one["tokens"])).sum())
        result.total += len(one["tokens"])
    return result


def write_loras(base: Path, folder: Path, count: int) -> list[str]:
    """PEFT's LoRA on every linear, open."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for number in range(count):
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapted = get_peft_model(model, LoraConfig(r=8, target_modules=targets))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.05)
        adapted.save_pretrained(folder / f"l{number}")
    return [str(folder / f"l{number}") for number in range(count)]


def likeliest_with_lora(base: Path, found: Sequence[dict[str, Any]]) -> int:
    """How many tokens of LoRA's answers are those of PEFT."""
    from peft import PeftModel

    equal = 0
    for one in found:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        adapted = PeftModel.from_pretrained(model, one["adapter"])
        with torch.inference_mode():
            logits = adapted(torch.tensor([one["prompt"] + one["tokens"]])).logits[0, len(one["prompt"]) - 1 : -1]
        equal += int((logits.argmax(-1) == torch.tensor(one["tokens"])).sum())
    return equal


def write_adapter(base: Path, folder: Path, **config: Any) -> str:
    """One adapter of this configuration, with closed gates."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    add_adapter(model, AdapterConfig(**{"adapter_len": 4, "adapter_layers": 2, **config}))
    return str(save_adapter(model, folder))


def greedy_text(base: Path, folder: Path | None, text: str, new: int) -> str:
    """What transformers goes on with after a text whose special tokens are written out."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    if folder is not None:
        load_adapter(model, folder)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def first_scores(base: Path, folder: Path, text: str, count: int) -> list[float]:
    """The largest log probabilities of what follows a text, as transformers has them."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    load_adapter(model, folder)
    with torch.inference_mode():
        logits = model(tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids).logits[0, -1]
    return logits.log_softmax(-1).topk(count).values.tolist()


@cache
def _other_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def apart(function: Any, *args: Any, **kwargs: Any) -> Any:
    """What a function of this module gives in a process where vLLM is not."""
    return _other_process().submit(function, *args, **kwargs).result()
