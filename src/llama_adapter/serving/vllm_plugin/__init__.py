"""Serve adapters from vLLM, as if they were LoRA adapters: an entry point of vLLM's, `vllm.general_plugins`.

vLLM calls `register` in every process that it starts. A LoRA request whose folder holds an adapter of ours
(`--lora-modules poet=runs/poet`, `/v1/load_lora_adapter`, `LoRARequest`) then adds the gated term to the model's
attention; any other folder is LoRA as ever, and both may stand in one batch. See docs/vllm.md.
"""

from llama_adapter.serving.vllm_plugin.patches import register

__all__ = ["register"]
