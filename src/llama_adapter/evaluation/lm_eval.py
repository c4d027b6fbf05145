"""lm-evaluation-harness on a base with an adapter.

    python -m llama_adapter.evaluation run --model llama_adapter \\
        --model_args model=bundled,adapter=runs/first --tasks arc_easy

is the harness's own command line, `lm_eval`, with the model class below registered first: the harness cannot find model
classes of other packages by itself. From Python, importing this module is enough.
"""

from typing import Any

import torch

from llama_adapter.data import Message, render_prompt
from llama_adapter.errors import DataError, MissingExtraError
from llama_adapter.inference.session import default_device, load_session

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError:
    raise MissingExtraError("lm-eval", "lm-eval", "The evaluation harness") from None


@register_model("llama_adapter")
class LlamaAdapterLM(HFLM):
    """A base with one adapter.

    Args:
        model: folder, hub name or 'bundled'; by default the base that the adapter was made for.
        adapter: its folder; without it the bare base is measured.
        precision: "auto", "bf16" or "fp32".
        load_in_4bit: quantise the base with bitsandbytes.
        device: as torch names it; by default the accelerator, else the CPU.
        tower: "python:FILE.py:FUNCTION" of an adapter that was trained with such a tower: code that you let run.
        options: everything else that the harness's own class takes (batch_size, max_length, ...).

    With `--apply_chat_template` prompts are written in the template that the adapter was trained with.
    """

    def __init__(
        self,
        model: str | None = None,
        adapter: str | None = None,
        precision: Any = "auto",
        load_in_4bit: bool = False,
        device: str | None = None,
        tower: str | None = None,
        **options: Any,
    ) -> None:
        where = default_device() if device is None else torch.device(device)
        adapters = {} if adapter is None else {"adapter": str(adapter)}
        bits: Any = "4bit" if load_in_4bit else None
        session = load_session(model, adapters, where, precision, bits, towers=() if tower is None else (tower,))
        self.written_as = session.templates["adapter" if adapters else None]
        super().__init__(pretrained=session.model, tokenizer=session.tokenizer, **options)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the adapter's training wrote it, up to where the answer begins."""
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]  # type: ignore[arg-type]
        if self.written_as == "raw" and len(messages) > 1:
            raise DataError("The adapter was trained without a template and takes one message: no few-shot turns.")
        return render_prompt(messages, self.written_as, self.tokenizer, raw=self.written_as == "raw").text
