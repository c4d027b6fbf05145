"""A base whose attention is cut head by head over several processes: transformers' `tp_plan="auto"`.

Adapters stay whole on every process. Process r of n holds the heads r H/n to (r+1) H/n of each layer, so it reads

    keys, values    of its heads: Wk and Wv are cut by rows, and the prompt P goes through what it has of them
    gates           act(g) of its heads: a slice
    out             sum over processes of Wo[:, own heads] (text + act(g) * adapter): the base's own all-reduce

Every process sees the same batch and, after that sum, the same loss L. Its gradient is taken once: the sum's backward
hands dL/d out to each process as it is. From there a process goes back through its own heads alone, which gives

    dL/d act(g)     of its heads; the backward of the slice gathers those of all: whole, on every process
    dL/d P          the part that came through its heads, (dL/d K_r) Wk_r + (dL/d V_r) Wv_r; the input of a projection
                    that is cut by rows sums its gradient over the processes: whole, on every process

So each process ends with the gradient that one process has alone, and nothing is left to be summed. Optimisers that
start alike take the same steps, and what any process saves is the file of one.
"""

import re
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_adapter.core.config import AdapterConfig
from llama_adapter.core.families import attention_modules, is_encoder, shape_of, text_config
from llama_adapter.core.quantised import is_quantised
from llama_adapter.errors import UnsupportedModelError

CUTS = "5.23.0"
"""transformers from this release on loads a base in parts, as DTensors."""
BY_HEAD = {"colwise", "rowwise", "replicated_with_grad_allreduce"}
"""Styles of transformers' plans under which a process's attention has its own heads alone."""
ALL_HEADS = {"colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep"}
"""Those under which weights are cut, and each process's attention has all heads."""


def own_heads(strength: Tensor, attention: nn.Module, heads: int | None) -> Tensor:
    """act(g) of the heads that this process has; its gradient is that of all heads, on every process.

    Args:
        strength: act(g) [A, H], alike on all processes.
        attention: the module that they are for.
        heads: what `heads_here` said of the model.

    Returns:
        [A, heads]; `strength` itself where `heads` is None.
    """
    if heads is None:
        return strength
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = next(weight.device_mesh for weight in attention.parameters() if isinstance(weight, DTensor))
    whole = DTensor.from_local(strength, mesh, [Replicate()], run_check=False)
    return whole.redistribute(placements=[Shard(strength.dim() - 1)]).to_local()


def heads_here(model: PreTrainedModel) -> int | None:
    """How many heads of each layer this process has; None is all of them."""
    processes = tensor_parallel_size(model)
    if processes == 1 or set(_plan_of_attention(model)[1].values()) <= ALL_HEADS:
        return None
    return int(shape_of(model.config)["num_attention_heads"]) // processes


def tensor_parallel_size(model: PreTrainedModel) -> int:
    """Over how many processes transformers cut the base's weights; 1 is a whole base."""
    return getattr(model, "_tp_size", None) or 1


def as_first(model: PreTrainedModel, values: Tensor) -> Tensor:
    """What the first of the processes that share a cut base has in `values`, written there; on a whole base unchanged.

    What a process draws by itself, parameters or tokens, would else be another on each, and their heads those of no
    model. All processes call it together.
    """
    if tensor_parallel_size(model) > 1 and (mesh := getattr(model, "_device_mesh", None)) is not None:
        group = (mesh["tp"] if mesh.mesh_dim_names else mesh).get_group()
        torch.distributed.broadcast(values, group=group, group_src=0)
    return values


def check_tensor_parallel(model: PreTrainedModel, config: AdapterConfig) -> None:
    """Refuse a cut base on which an adapter would not be that of a whole one.

    Raises:
        UnsupportedModelError: norms, scales, biases or LoRA; an old transformers, a quantised base, an encoder, other
            ways of cutting beside this one; heads that the processes cannot share evenly, or a plan that cuts attention
            in a way not known here; a part of a cut base instead of the whole.
    """
    processes = tensor_parallel_size(model)
    if processes == 1:
        if _is_part_of_a_cut_base(model):
            raise UnsupportedModelError(
                "This is a part of a base that is cut head by head (tensor parallelism): pass the whole model, as "
                "from_pretrained returned it."
            )
        return
    distributed: Any = getattr(model.config, "distributed_config", None)
    others = ("fsdp_size", "dp_replicate_size", "pp_size", "ep_size")
    reasons = {
        "norms, scales, biases and LoRA would each need a cut of their own": config.has_parts,
        f"transformers {CUTS} or newer is needed, and this is {transformers.__version__}": (
            Version(transformers.__version__) < Version(CUTS)
        ),
        "its weights are quantised": is_quantised(model),
        "it is an encoder": is_encoder(model.config),
        "it is sharded in another way too": any((getattr(distributed, name, None) or 1) > 1 for name in others),
    }
    if reason := next((reason for reason, so in reasons.items() if so), None) or why_not_by_head(model, processes):
        raise UnsupportedModelError(
            f"This base is cut head by head over {processes} processes (tensor parallelism), and cannot have this "
            f"adapter: {reason}. Leave that out, load the base whole, or shard it with accelerate launch --use_fsdp."
        )


def why_not_by_head(model: PreTrainedModel, processes: int) -> str | None:
    """The reason why a base's attention cannot be cut over so many processes as adapters need it, or None.

    It may be one without weights.
    """
    pattern, plan = _plan_of_attention(model)
    if set(plan.values()) <= ALL_HEADS:
        return None
    if unknown := set(plan.values()) - BY_HEAD:
        return f"its plan cuts attention in a way that is not known here ({', '.join(sorted(unknown))})"
    if getattr(text_config(model.config), "clip_qkv", None) is not None:
        return "transformers cannot clip queries and keys (clip_qkv) of weights that are cut"
    for name, part in attention_modules(model)[0].named_children():
        if f"{pattern}.{name}" not in plan and any(weight.dim() > 1 for weight in part.parameters(recurse=False)):
            return f"its attention's {name} has all heads"  # Cohere's norm of queries and keys
    shape = shape_of(model.config)
    for kind in ("attention", "key_value"):
        count = int(shape[f"num_{kind}_heads"])
        if count % processes:
            return f"{processes} processes cannot share its {count} {kind.replace('_', '-')} heads evenly"
    return None


def _is_part_of_a_cut_base(model: PreTrainedModel) -> bool:
    """Whether weights are cut and nothing at the model says so: it does at the whole one, and FSDP at each layer."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    cut = any(isinstance(weight, DTensor) for weight in attention_modules(model)[0].parameters())
    return cut and not any(isinstance(module, FSDPModule) for module in model.modules())


def _plan_of_attention(model: PreTrainedModel) -> tuple[str, dict[str, str]]:
    """What transformers' plan calls the attention modules, and its part for them: name -> style."""
    attention = attention_modules(model)[0]
    path = next(name for name, module in model.named_modules() if module is attention)
    pattern = re.sub(r"\.\d+(?=\.|$)", ".*", path)
    plan = (model.tp_plan or {}).items()
    return pattern, {name: style for name, style in plan if f"{name}.".startswith(f"{pattern}.")}
