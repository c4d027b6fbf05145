"""Our templates as Jinja: vLLM writes all chats of a server with one template."""

import json
from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from llama_adapter.base import load_tokenizer
from llama_adapter.core.config import AdapterConfig
from llama_adapter.data.formats import Message
from llama_adapter.data.templates import PREAMBLE, end_token, render_prompt
from llama_adapter.errors import ConfigError

TEXT = (  # vLLM hands parts over as they are to a template that goes through them, else joined by line breaks
    "{%- macro text(content) %}{%- if content is string %}{{- content }}{%- else %}{%- for part in content %}"
    "{{- part.text }}{%- endfor %}{%- endif %}{%- endmacro %}"
    "{%- set preamble = PREAMBLE %}{%- set turns = messages %}"
    "{%- if messages[0].role in ('system', 'developer') %}{%- set said = text(messages[0].content) %}"
)
ALPACA = (
    TEXT + "{%- set turns = messages[1:] %}{%- if said | trim %}{%- set preamble = said %}{%- endif %}{%- endif %}"
    "{%- if add_generation_prompt and messages[-1].role != 'user' %}"
    "{{- raise_exception('A prompt must end with a user message: add the question to be answered.') }}{%- endif %}"
    "{{- BEGIN }}{{- preamble }}{%- for turn in turns %}{%- set said = text(turn.content) %}"
    "{%- if turn.role == 'user' %}"
    "{{- '\\n\\n' if not loop.first and turns[loop.index0 - 1].role == 'user' else '\\n\\n### Instruction:\\n' }}"
    "{{- said }}{%- if loop.last or turns[loop.index0 + 1].role != 'user' %}{{- '\\n\\n### Response:' }}"
    "{%- endif %}{%- elif turn.role == 'assistant' and not loop.first and turns[loop.index0 - 1].role == 'user' %}"
    "{{- said }}{%- if said[-(END | length):] != END %}{{- END }}{%- endif %}"
    "{%- else %}{{- raise_exception('A chat has messages of user and assistant by turns.') }}{%- endif %}{%- endfor %}"
)
RAW = (
    TEXT + "{%- if not said | trim %}{%- set turns = messages[1:] %}{%- endif %}{%- endif %}"
    "{%- if turns | length != 1 %}{{- raise_exception('This adapter takes text as it is: one message.') }}"
    "{%- endif %}{{- BEGIN }}{%- for turn in turns %}{{- text(turn.content) }}{%- endfor %}"
)
JINJA = {"alpaca": ALPACA, "raw": RAW}


def chat_template(model: str, configs: Mapping[str, AdapterConfig]) -> str | None:
    """The one template of a server with these adapters by name; None: the tokenizer's own.

    Raises:
        ConfigError: they were trained with unlike templates, or the tokenizer cannot be told theirs.
    """
    kinds = {config.template: name for name, config in configs.items() if config.template is not None}
    if len(kinds) > 1:
        (one, first), (two, second), *_ = kinds.items()
        raise ConfigError(
            f"'{first}' was trained with the template '{one}' and '{second}' with '{two}', and vLLM has one for a "
            "whole server: start two, or use --backend embedded."
        )
    kind = next(iter(kinds), "chat")
    return None if kind == "chat" else as_jinja(kind, load_tokenizer(model))


def as_jinja(kind: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """`data.templates`' text of a chat, with the special tokens that this tokenizer puts in front of text.

    Args:
        kind: "alpaca", or "raw", the one message as it is.
        tokenizer: the base's.

    Raises:
        ConfigError: written as text those are read as other tokens.
    """
    end, chat = end_token(tokenizer), [{"role": "user", "content": "Hi"}]
    plain = tokenizer("a", add_special_tokens=False).input_ids
    begin = tokenizer.decode(tokenizer("a").input_ids[: -len(plain)])
    template = JINJA[kind]
    for name, value in (("BEGIN", begin), ("PREAMBLE", PREAMBLE), ("END", end)):
        template = template.replace(name, json.dumps(value))
    text = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
    rendered = render_prompt([Message("user", "Hi")], "alpaca", tokenizer, raw=kind == "raw")
    if tokenizer(text, add_special_tokens=False).input_ids != tokenizer(rendered.text).input_ids:
        raise ConfigError(
            f"This base's tokenizer reads the template '{kind}' otherwise in vLLM: use --backend embedded."
        )
    return template
