"""The alpaca template as Jinja: vLLM writes all chats of a server with one template."""

import json
from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from llama_adapter.base import load_tokenizer
from llama_adapter.core.config import AdapterConfig
from llama_adapter.data.formats import Message
from llama_adapter.data.templates import PREAMBLE, end_token, render_prompt
from llama_adapter.errors import ConfigError

ALPACA = (
    "{{- BEGIN }}{%- if messages[0].role == 'system' %}{%- set preamble = messages[0].content %}"
    "{%- set turns = messages[1:] %}{%- else %}{%- set preamble = PREAMBLE %}{%- set turns = messages %}{%- endif %}"
    "{{- preamble }}{%- for turn in turns %}{%- if turn.role == 'user' %}"
    "{{- '\\n\\n' if not loop.first and turns[loop.index0 - 1].role == 'user' else '\\n\\n### Instruction:\\n' }}"
    "{{- turn.content }}{%- if loop.last or turns[loop.index0 + 1].role != 'user' %}{{- '\\n\\n### Response:' }}"
    "{%- endif %}{%- elif turn.role == 'assistant' %}{{- turn.content }}"
    "{%- if turn.content[-(END | length):] != END %}{{- END }}{%- endif %}"
    "{%- else %}{{- raise_exception('A chat has messages of user and assistant.') }}{%- endif %}{%- endfor %}"
)


def chat_template(model: str, configs: Mapping[str, AdapterConfig]) -> str | None:
    """The one template of a server with these adapters by name; None: the tokenizer's own.

    Raises:
        ConfigError: they were trained with unlike templates, or the tokenizer cannot be told the alpaca one.
    """
    of_kind = {config.template: name for name, config in configs.items()}
    if "alpaca" in of_kind and "chat" in of_kind:
        raise ConfigError(
            f"'{of_kind['alpaca']}' was trained with the alpaca template and '{of_kind['chat']}' with the tokenizer's "
            "own, and vLLM has one for a whole server: start two, or use --backend embedded."
        )
    return alpaca_template(load_tokenizer(model)) if "alpaca" in of_kind else None


def alpaca_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """`data.templates`' alpaca text of a chat, with the special tokens that this tokenizer puts in front of text.

    Raises:
        ConfigError: written as text those are read as other tokens.
    """
    end, chat = end_token(tokenizer), [{"role": "user", "content": "Hi"}]
    plain = tokenizer("a", add_special_tokens=False).input_ids
    begin = tokenizer.decode(tokenizer("a").input_ids[: -len(plain)])
    template = ALPACA
    for name, value in (("BEGIN", begin), ("PREAMBLE", PREAMBLE), ("END", end)):
        template = template.replace(name, json.dumps(value))
    text = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
    wanted = tokenizer(render_prompt([Message("user", "Hi")], "alpaca", tokenizer).text).input_ids
    if tokenizer(text, add_special_tokens=False).input_ids != wanted:
        raise ConfigError("This base's tokenizer reads the alpaca template otherwise in vLLM: use --backend embedded.")
    return template
