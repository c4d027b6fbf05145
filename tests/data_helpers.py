"""Tiny tokenizers and chat templates for the tests of `llama_adapter.data`; nothing is downloaded."""

from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llama_adapter.data import Example, Message

# No punctuation follows a colon here, so no token joins "### Response:" with a response.
SENTENCES = [
    "Below is an instruction that describes a task. Write a response that completes the request.",
    "### Instruction:\nName a colour.\n\n### Input:\nof the sky\n\n### Response:",
    "The cat sat on the mat and the dog ran to the cat.",
    "    four blanks    and   more",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<|head|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|head|>model\n{% endif %}"
)
# Thinking of earlier turns is dropped; the last answer gets a block for it, empty where there is none.
QWEN3 = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ answer }}"
    "{% else %}{{ answer }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
COUNTING = "{{ messages | length }} turns\n" + PLAIN
REWRITING = PLAIN.replace("%}assistant: {%", "%}answer: {%")
CHAT_TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "llama2": LLAMA2,
    "gemma": GEMMA,
    "qwen3": QWEN3,
    "plain": PLAIN,
}


@lru_cache
def byte_level(
    trim_offsets: bool = False, adds: str = "$A", chat: str | None = None, eos: str | None = "</s>"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE; `adds` is what it puts around a text, such as "<s> $A"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    steps = [processors.ByteLevel(trim_offsets=trim_offsets)]
    special_tokens = [(token, SPECIAL.index(token)) for token in ("<s>", "</s>")]
    steps.append(processors.TemplateProcessing(single=adds, special_tokens=special_tokens))
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=eos,
        extra_special_tokens=["<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>"],
        chat_template=chat,
    )


@lru_cache
def word_level() -> PreTrainedTokenizerFast:
    """One token a word or a run of punctuation; blanks belong to no token."""
    words = ["<unk>", "</s>", "The", "cat", "sat", "on", "the", "mat", ":", "###", "Response", "answer"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def merging(pair: tuple[str, str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE without any merge but `pair`."""
    tokens = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "".join(pair)]
    model = models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[pair])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def conversation(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    """User and assistant messages in turn, the user's first."""
    head = () if system is None else (Message("system", system),)
    roles = ("user", "assistant")
    return head + tuple(Message(roles[number % 2], content) for number, content in enumerate(contents))


def example(*contents: str, system: str | None = None, input: str = "", raw: bool = False) -> Example:
    return Example(conversation(*contents, system=system), input=input, raw=raw)
