"""A tiny base on disk with its tokenizer, tiny data, and runs of the trainer over them."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llama_adapter.training.config import TrainConfig

WORDS = ["sun", "moon", "cat", "dog", "tree", "lake", "bird", "fish"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over little more than the bytes; BOS in front; pad is not EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=1024
    )


def write_base(folder: Path) -> Path:
    """A random 3-layer Llama of width 32 with that tokenizer."""
    import torch

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_data(path: Path, count: int = 24) -> Path:
    """Alpaca records: say a word twice."""
    records = [
        {
            "instruction": f"Repeat {i}",
            "input": WORDS[i % 8] if i % 3 else "",
            "output": f"{WORDS[i % 8]} " * (1 + i % 4),
        }
        for i in range(count)
    ]
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def recipe(base: Path, data: Path, output: Path, **changes) -> TrainConfig:
    """Six steps of eight examples."""
    values = {
        "model": str(base),
        "data": (str(data),),
        "val_size": 4,
        "output_dir": str(output),
        "adapter_len": 4,
        "adapter_layers": 2,
        "epochs": 2.0,
        "warmup_epochs": 0.5,
        "batch_size": 8,
        "micro_batch_size": 4,
        "lr": 0.02,
        "trackers": ("none",),
        "precision": "fp32",
        "save_every": 2,
    }
    return TrainConfig(**{**values, **changes})


def assert_same_run(mine: Path, single: Path) -> None:
    """Check that two folders hold the same run, to rounding, but for its times."""
    import pytest
    import torch
    from safetensors.torch import load_file

    from llama_adapter.files import whole_lines

    for part in ("", "last"):
        found, expected = (
            load_file(mine / part / "adapter_model.safetensors"),
            load_file(single / part / "adapter_model.safetensors"),
        )
        assert found.keys() == expected.keys()
        for key in found:
            torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=0, msg=f"{mine.name} {part} {key}")
    lines = [whole_lines(folder / "metrics.jsonl") for folder in (mine, single)]
    assert [line.keys() for line in lines[0]] == [line.keys() for line in lines[1]]
    for found, expected in zip(*lines, strict=True):
        for key in found.keys() - {"seconds"}:
            assert found[key] == pytest.approx(expected[key], abs=1e-4, rel=1e-4), (mine.name, key)
    for name in ("loss.png", "gates.png", "README.md", "adapter_config.json"):
        assert (mine / name).is_file()
    assert (mine / "adapter_config.json").read_bytes() == (single / "adapter_config.json").read_bytes()
