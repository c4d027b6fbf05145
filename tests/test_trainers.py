"""Other people's trainers train an adapted model with nothing of ours between."""

import math

import pytest
import torch
from runs import WORDS, tiny_tokenizer
from tiny import COMMON
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from llama_adapter import AdapterConfig, add_adapter, get_adapter, use_adapter

STEPS = 6
# transformers 5.23 renames the option; earlier versions know the old name only
OLD_NAME = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**COMMON, "vocab_size": len(tokenizer), "max_position_embeddings": 256}))
    add_adapter(model, AdapterConfig(adapter_len=4, adapter_layers=2))
    return model


def snapshot(model):
    adapter = {id(parameter) for parameter in get_adapter(model).parameters()}
    state = {name: (id(p) in adapter, p.detach().clone()) for name, p in model.named_parameters()}
    assert sum(is_adapter for is_adapter, _ in state.values()) == 4
    return state


def assert_only_the_adapter_changed(model, before):
    parameters = dict(model.named_parameters())
    assert parameters.keys() == before.keys()
    for name, (is_adapter, value) in before.items():
        assert torch.equal(parameters[name], value) != is_adapter, name


@torch.no_grad()
def loss_of(model, tokenizer, texts):
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model.eval()
    return float(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss)


TEXTS = [f"say {word} {word} {word}" for word in WORDS]
COMMON_ARGUMENTS = {
    "per_device_train_batch_size": 4,
    "max_steps": STEPS,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "seed": 0,
}


def logged_losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@OLD_NAME
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_transformers_trainer_trains_the_adapter_and_nothing_else(tmp_path, model, tokenizer, gradient_checkpointing):
    def collate(rows):
        batch = tokenizer(rows, padding=True, return_tensors="pt")
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    before, loss = snapshot(model), loss_of(model, tokenizer, TEXTS)
    options = {**COMMON_ARGUMENTS, "remove_unused_columns": False, "gradient_checkpointing": gradient_checkpointing}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), **options),
        train_dataset=TEXTS,
        data_collator=collate,
    )
    trainer.train()
    assert_only_the_adapter_changed(model, before)
    losses = logged_losses(trainer)
    assert len(losses) == STEPS
    assert all(map(math.isfinite, losses))
    trained = loss_of(model, tokenizer, TEXTS)
    assert trained < loss
    with use_adapter(model, None):
        assert loss_of(model, tokenizer, TEXTS) == loss


def test_transformers_trainer_trains_the_active_adapter_and_leaves_an_older_one(tmp_path, model, tokenizer):
    add_adapter(model, AdapterConfig(adapter_len=2, adapter_layers=1), "second")
    older = {key: tensor.clone() for key, tensor in get_adapter(model, "default").state_dict().items()}
    newer = {key: tensor.clone() for key, tensor in get_adapter(model, "second").state_dict().items()}
    rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer([TEXTS[0]] * 8)["input_ids"]]
    trainer = Trainer(
        model=model, args=TrainingArguments(output_dir=str(tmp_path), **COMMON_ARGUMENTS), train_dataset=rows
    )
    trainer.train()
    for key, tensor in get_adapter(model, "default").state_dict().items():
        assert torch.equal(tensor, older[key]), key
    for key, tensor in get_adapter(model, "second").state_dict().items():
        assert not torch.equal(tensor, newer[key]), key


@OLD_NAME
@pytest.mark.slow
@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": f"say {word}:", "completion": f" {word} {word}"} for word in WORDS],
        [{"text": text} for text in TEXTS],
    ],
    ids=["prompt-completion", "text"],
)
def test_trl_s_sft_trainer_trains_the_adapter_and_nothing_else(tmp_path, model, tokenizer, rows):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    texts = [row.get("text") or row["prompt"] + row["completion"] for row in rows]
    before, loss = snapshot(model), loss_of(model, tokenizer, texts)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(tmp_path), max_length=64, **{**COMMON_ARGUMENTS, "bf16": False}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    assert_only_the_adapter_changed(model, before)
    losses = logged_losses(trainer)
    assert len(losses) == STEPS
    assert all(map(math.isfinite, losses))
    assert loss_of(model, tokenizer, texts) < loss
    with use_adapter(model, None):
        assert loss_of(model, tokenizer, texts) == pytest.approx(loss, abs=1e-6)
