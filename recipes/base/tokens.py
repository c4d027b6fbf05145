"""The base's tokenizer: a small byte-level BPE trained on the corpus itself."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def train_tokenizer(documents: Iterator[str], vocabulary: int, sample: int = 20_000) -> PreTrainedTokenizerFast:
    """Train on the first documents; digits stand alone, and every text begins with ``<s>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(documents, sample), trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[bos]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def packed_rows(
    documents: Iterator[str], tokenizer: PreTrainedTokenizerFast, length: int, chunk: int = 256
) -> Iterator[list[int]]:
    """Rows of ``length`` tokens out of documents set end to end, each closed by ``</s>``."""
    pending: list[int] = []
    while True:
        for ids in tokenizer(list(islice(documents, chunk)))["input_ids"]:
            pending += [*ids, tokenizer.eos_token_id]
        full = len(pending) // length * length
        for start in range(0, full, length):
            yield pending[start : start + length]
        pending = pending[full:]
