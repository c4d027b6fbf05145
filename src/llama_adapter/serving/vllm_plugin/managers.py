"""vLLM's managers of LoRA adapters, taught to read ours; slots, limits, eviction and warm-up stay theirs."""

import re
from typing import Any

import msgspec
from torch import Tensor, nn
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.utils import get_adapter_absolute_path, replace_submodule
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.attention import Attention

from llama_adapter.core.config import AdapterConfig
from llama_adapter.core.families import family_of, shape_of
from llama_adapter.core.zero_init import GATE_ACTIVATIONS
from llama_adapter.errors import AdapterError, UnsupportedModelError
from llama_adapter.formats.native import read_tensors
from llama_adapter.serving.vllm_plugin.folders import folder_digest, is_ours, rank_of, read_servable
from llama_adapter.serving.vllm_plugin.layer import AttentionWithPrompts

TARGET = "attn"
"""`--lora-target-modules attn`: no slots for LoRA's own matrices, prompts alone."""


class AdapterModelManager(LRUCacheLoRAModelManager):
    """Wraps the model's attention layers as LoRA's manager wraps its linear ones."""

    _spare = 0

    def __init__(self, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        self.vllm_config = vllm_config
        self.prompted: dict[int, tuple[str, AttentionWithPrompts]] = {}
        """The layers' numbers -> the attention layers' names in the model, and what stands there."""
        self.refusal: str | None = None
        """Why no adapter of ours can be served here; LoRA's can all the same."""
        super().__init__(*args, vllm_config=vllm_config, **kwargs)

    @property
    def lora_slots(self) -> int:
        """How many adapters fit on the device."""
        return super().lora_slots + self._spare

    def _match_target_modules(self, module_name: str) -> bool:
        return not module_name.endswith("." + TARGET) and super()._match_target_modules(module_name)

    def _create_lora_modules(self) -> None:
        # vLLM's LoRA on a CPU indexes its matrices with -1 for tokens of the base, which is the last slot: one more,
        # never filled, keeps those tokens the base's.
        self._spare = int(self.device.type == "cpu")
        super()._create_lora_modules()
        self._spare = 0
        config = self.vllm_config.model_config
        try:
            family_of(config.hf_config)
            found = self._attention_layers()
            for number, (name, module) in found.items():
                self._wrap(number, name, module)
            for _, layer in self.prompted.values():
                layer.check(config.hf_text_config.hidden_size)
        except UnsupportedModelError as error:
            self.refusal = str(error)
            for name, layer in self.prompted.values():
                replace_submodule(self.model, name, layer.base_layer)
                del self.modules[name]
            self.prompted = {}

    def _attention_layers(self) -> dict[int, tuple[str, nn.Module]]:
        found: dict[int, tuple[str, nn.Module]] = {}
        for name, module in self.model.named_modules():
            number = re.search(r"\.(\d+)\.[^\d]*\." + TARGET + "$", name)
            if type(module) is Attention and self._get_punica_wrapper(name) is not None:
                if number is None or int(number[1]) in found:
                    raise UnsupportedModelError(
                        f"{type(self.model).__name__} has an attention layer {name} of its own."
                    )
                found[int(number[1])] = (name, module)
        parallel = self.vllm_config.parallel_config.pipeline_parallel_size
        wanted = set(range(self.vllm_config.model_config.hf_text_config.num_hidden_layers))
        if not found.keys() <= wanted or (parallel == 1 and found.keys() != wanted):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has {len(found)} softmax attention layers in this vLLM, and "
                f"{len(wanted)} layers."
            )
        return found

    def _wrap(self, number: int, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        rotary = next((b.shape[-1] * 2 for key, b in self.model.named_buffers() if key.endswith("inv_freq")), None)
        layer = AttentionWithPrompts(
            module, self.model.get_submodule(parent), child, rotary,
            self.lora_slots, self.lora_config.max_lora_rank, self.vllm_config.model_config.dtype,
        )  # fmt: skip
        replace_submodule(self.model, name, layer)
        self.register_module(name, layer)
        layer.set_mapping(self._get_punica_wrapper(name))
        self.prompted[number] = (name, layer)

    def create_dummy_lora(self, lora_id: int, rank: int, embedding_modules: dict[str, str] | None = None) -> Any:
        """LoRA's, with prompts of zeros: warm-up then runs what requests will."""
        dummy = super().create_dummy_lora(lora_id, rank, embedding_modules)
        for name, layer in self.prompted.values():
            key, value = layer.prompt_key[0, :, :rank].cpu(), layer.prompt_value[0, :, :rank].cpu()
            dummy.loras[name] = LoRALayerWeights(name, rank, rank, key * 0, value * 0)
        return dummy

    def _create_merged_loras_inplace(self, lora_model: Any) -> None:
        if lora_model.loras:  # a pipeline's rank may hold no layer of an adapter's
            super()._create_merged_loras_inplace(lora_model)

    def read(self, folder: str, lora_id: int) -> Any:
        """An adapter of ours, projected through this rank's layers.

        Raises:
            AdapterError: it is damaged, made for another base, or more than this engine was started for.
        """
        if self.refusal is not None:
            raise AdapterError(f"{folder} cannot be served: {self.refusal}")
        config = read_servable(folder, shape_of(self.vllm_config.model_config.hf_config))
        rank, room = rank_of(config), self.lora_config.max_lora_rank
        if rank > room:
            raise AdapterError(
                f"{folder} needs --max-lora-rank {rank} (its prompts a layer, or r), and this is {room}."
            )
        tensors = read_tensors(folder, config)
        adapter = LoRAModel(lora_id, rank, {})
        for number, (name, layer) in self.prompted.items():
            if f"layers.{number}.prompt" in tensors:
                states = layer.project(tensors[f"layers.{number}.prompt"], strength_of(config, tensors, number))
                adapter.loras[name] = LoRALayerWeights(name, config.adapter_len, config.adapter_len, *states)
        for key in tensors:
            if key.startswith("lora.") and key.endswith(".A"):
                self._add_low_rank(adapter, key[len("lora.") : -len(".A")], tensors, config, folder)
        return adapter

    def _add_low_rank(self, adapter: Any, path: str, tensors: Any, config: AdapterConfig, folder: str) -> None:
        """V2's LoRA of one linear, as LoRA's manager has its own."""
        number = int(re.findall(r"\.(\d+)\.", f".{path}")[0])
        if number not in self.prompted:
            return  # another rank's of a pipeline
        root = self.prompted[number][0].split(f".{number}.")[0].rpartition(".")[0]
        name = f"{root}.{path}" if root else path
        sizes = self._sizes_of(name)
        if sizes is None:
            raise AdapterError(
                f"{folder} has LoRA on {path}, for which this engine has no slots: leave out --lora-target-modules, or "
                "serve it with llama-adapter serve."
            )
        factor = 1.0 if config.lora_alpha is None else config.lora_alpha / config.lora_rank
        a, b = tensors[f"lora.{path}.A"], tensors[f"lora.{path}.B"] * factor
        if (a.shape[1], b.shape[0]) != sizes:
            raise AdapterError(
                f"{folder} has LoRA of {a.shape[1]} inputs and {b.shape[0]} outputs on {path}, and this base's has "
                f"{sizes[0]} and {sizes[1]}: load it on the base it was trained on."
            )
        dtype = self.lora_config.lora_dtype
        adapter.loras[name] = LoRALayerWeights(name, config.lora_rank, config.lora_rank, a.to(dtype), b.to(dtype))

    def _sizes_of(self, name: str) -> tuple[int, int] | None:
        """Inputs and outputs, over all ranks, of a linear that has slots for LoRA, alone or in a fused one."""
        fused, place = next(
            ((one, parts.index(name)) for one, parts in self.packed_modules.items() if name in parts), (name, None)
        )
        linear = getattr(self.modules.get(fused), "base_layer", None)
        if linear is None:
            return None
        if place is None:
            return linear.input_size, linear.output_size
        if hasattr(linear, "total_num_kv_heads"):  # its own sizes count a rank's copies of keys and values
            heads = linear.total_num_heads if place == 0 else linear.total_num_kv_heads
            return linear.input_size, heads * linear.head_size
        return linear.input_size, linear.output_sizes[place]


class AdapterWorkerManager(LRUCacheWorkerLoRAManager):
    """Reads an adapter of ours where a LoRA request names one."""

    _manager_cls = AdapterModelManager

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._contents: dict[tuple[int, str], str] = {}
        self._places: dict[int, str] = {}
        """Where the adapters of these numbers were replaced from."""
        self._adapter_manager: Any

    def _apply_adapters(self, lora_requests: Any) -> None:
        # vLLM leaves `load_inplace` on all later requests of an adapter, and would read its files at every step.
        super()._apply_adapters({msgspec.structs.replace(one, load_inplace=False) for one in lora_requests if one})

    def _load_adapter(self, lora_request: Any) -> Any:
        number = lora_request.lora_int_id
        if lora_request.load_inplace:
            loaded = self._read_adapter(lora_request)
            self._places[number] = lora_request.lora_path
            return loaded
        # A request from before a replacement may still name the place that was before.
        place = self._places.get(number, lora_request.lora_path)
        return self._read_adapter(msgspec.structs.replace(lora_request, lora_path=place))

    def _read_adapter(self, lora_request: Any) -> Any:
        folder = get_adapter_absolute_path(lora_request.lora_path)
        if not is_ours(folder):
            if self.lora_config.target_modules == [TARGET]:
                raise AdapterError(
                    f"{lora_request.lora_path} is no adapter of llama-adapter's, and --lora-target-modules {TARGET} "
                    "has no slots for others: leave it out."
                )
            return super()._load_adapter(lora_request)
        key, content = (lora_request.lora_int_id, lora_request.lora_path), folder_digest(folder)
        if not lora_request.load_inplace and self._contents.get(key, content) != content:
            # The prefix cache knows these requests by the content that was there first.
            raise AdapterError(
                f"{folder} changed since adapter '{lora_request.lora_name}' was loaded, and --max-cpu-loras was too "
                "few to keep that: load it again with load_inplace, or under another name."
            )
        adapter = self._adapter_manager.read(folder, lora_request.lora_int_id)
        if folder_digest(folder) != content:
            raise AdapterError(f"{folder} changed while it was read: load it again.")
        self._contents[key] = content
        return adapter

    def remove_adapter(self, adapter_id: int) -> bool:
        """Take an adapter off; its number may then stand for another."""
        self._contents = {key: content for key, content in self._contents.items() if key[0] != adapter_id}
        self._places.pop(adapter_id, None)
        return super().remove_adapter(adapter_id)


def strength_of(config: AdapterConfig, tensors: dict[str, Tensor], number: int) -> Tensor:
    """act(g) [all heads] of a layer, times V2's `gate_scale` where there is one."""
    opened = GATE_ACTIVATIONS[config.gate_activation](tensors[f"layers.{number}.gate"])
    scale = tensors.get(f"layers.{number}.gate_scale")
    return opened if scale is None else scale * opened
