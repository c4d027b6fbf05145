"""Other people's trainers train an adapted model with nothing of ours between."""

import math

import pytest
import torch
from runs import WORDS, tiny_tokenizer
from safetensors.torch import load_file
from tiny import COMMON
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from llama_adapter import (
    AdapterCallback,
    AdapterConfig,
    add_adapter,
    get_adapter,
    list_adapters,
    load_adapter,
    reference_model,
    use_adapter,
)
from llama_adapter.errors import AdapterError, TrainingError

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


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "lr_scheduler_type": "linear",
}


def rows_of(tokenizer, texts):
    return [{"input_ids": ids, "labels": ids} for ids in tokenizer(texts)["input_ids"]]


def equally_long(tokenizer):
    """Rows that need no padding."""
    texts = [TEXTS[0], TEXTS[0].upper(), TEXTS[0][::-1]] * 4
    length = min(len(ids) for ids in tokenizer(texts)["input_ids"])
    return [{key: ids[:length] for key, ids in row.items()} for row in rows_of(tokenizer, texts)]


def trainer_of(model, tokenizer, folder, **changes):
    rows = equally_long(tokenizer)
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**COMMON_ARGUMENTS, **BEST, **changes}),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[AdapterCallback()],
    )


def fresh_base(like):
    """The base that `like` was before it was adapted."""
    torch.manual_seed(0)
    return LlamaForCausalLM(like.config)


def state(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_has(model, tensors):
    mine = get_adapter(model).state_dict()
    assert mine.keys() == tensors.keys()
    for key in mine:
        assert torch.equal(mine[key], tensors[key]), key


def test_a_checkpoint_of_trainer_is_an_adapter_s_folder_without_the_base(tmp_path, model, tokenizer):
    trainer = trainer_of(model, tokenizer, tmp_path)
    assert trainer.args.optim == "adamw_torch_fused"
    trainer.train()
    folder = tmp_path / f"checkpoint-{STEPS}"
    assert_has(model, state(folder))
    whole = sum(tensor.nbytes for tensor in fresh_base(model).state_dict().values())
    assert (folder / "model.safetensors").stat().st_size < whole / 5
    assert load_file(folder / "model.safetensors").keys() == {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    base = fresh_base(model)
    load_adapter(base, folder)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_on_rows(base, trainer.eval_dataset), abs=1e-6)


@torch.no_grad()
def loss_on_rows(model, rows):
    ids = torch.tensor([row["input_ids"] for row in rows])
    return float(model.eval()(ids, labels=ids, use_cache=False).loss)


def test_the_best_adapter_is_back_at_the_end(tmp_path, model, tokenizer):
    # the highest loss counts as the best one, so that the best checkpoint is the first and not the last
    trainer = trainer_of(model, tokenizer, tmp_path, metric_for_best_model="eval_loss", greater_is_better=True)
    trainer.train()
    best = tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    assert str(best) == trainer.state.best_model_checkpoint
    assert best.name == "checkpoint-2"
    assert_has(model, state(best))
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len(set(losses)) == len(losses) == 3
    assert trainer.state.best_metric == max(losses)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), abs=1e-6)
    base = fresh_base(model)
    load_adapter(base, best)
    assert loss_on_rows(base, trainer.eval_dataset) == pytest.approx(max(losses), abs=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_a_resumed_trainer_ends_where_one_that_was_not_stopped_does(tmp_path, model, tokenizer, tied):
    def base():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "tie_word_embeddings": tied}))

    def adapted_base():
        made = base()
        add_adapter(made, AdapterConfig(adapter_len=4, adapter_layers=2))
        return made

    torch.manual_seed(1)
    whole = adapted_base()
    trainer_of(whole, tokenizer, tmp_path, load_best_model_at_end=False).train()
    torch.manual_seed(2)  # other prompts than the run began with
    resumed = adapted_base()
    before = {name: parameter.clone() for name, parameter in base().named_parameters()}
    transformers_logging.enable_propagation()
    try:
        trainer = trainer_of(resumed, tokenizer, tmp_path / "resumed", load_best_model_at_end=False)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    finally:
        transformers_logging.disable_propagation()
    assert trainer.state.global_step == STEPS
    assert_has(resumed, state(tmp_path / f"checkpoint-{STEPS}"))
    now = dict(resumed.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in before.items())


def test_after_training_the_model_saves_itself_as_before(tmp_path, model, tokenizer):
    model._keys_to_ignore_on_save = {"lm_head.weight"}
    trainer = trainer_of(model, tokenizer, tmp_path, max_steps=2)
    trainer.train()
    assert model._keys_to_ignore_on_save == {"lm_head.weight"}
    model._keys_to_ignore_on_save = set()
    model.save_pretrained(tmp_path / "whole")
    assert load_file(tmp_path / "whole" / "model.safetensors").keys() == model.state_dict().keys()


def test_the_callback_says_so_when_there_is_no_such_adapter(tmp_path, model, tokenizer):
    arguments = TrainingArguments(output_dir=str(tmp_path), **COMMON_ARGUMENTS)
    with pytest.raises(AdapterError, match="defautl"):
        Trainer(model=model, args=arguments, callbacks=[AdapterCallback("defautl")])
    assert not model._keys_to_ignore_on_save


def test_the_callback_says_so_when_checkpoints_are_elsewhere(tmp_path, model):
    arguments = TrainingArguments(output_dir=str(tmp_path), **COMMON_ARGUMENTS)
    with pytest.raises(TrainingError, match="checkpoint-3"):
        AdapterCallback().on_save(arguments, TrainerState(global_step=3), TrainerControl(), model=model)


@torch.no_grad()
def test_a_reference_model_is_the_bare_base_on_the_same_weights(model):
    get_adapter(model).layers[2].gate.fill_(0.7)
    ids = torch.tensor([[5, 6, 7, 8]])
    with use_adapter(model, None):
        bare = model(ids).logits
    adapted = model(ids).logits
    reference = reference_model(model)
    assert torch.equal(reference(ids).logits, bare)
    assert list_adapters(reference) == []
    assert torch.equal(model(ids).logits, adapted)
    assert list_adapters(model) == ["default"]
    theirs = {name: parameter.data_ptr() for name, parameter in reference.named_parameters()}
    mine = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert theirs.items() < mine.items()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == mine.keys() - theirs.keys()
    assert not any(parameter.requires_grad for parameter in reference.parameters())


@pytest.mark.slow
@OLD_NAME
@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_dpo_trains_against_the_bare_base_without_a_second_copy(model, tokenizer, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    pairs = [{"prompt": f"{word} ", "chosen": f"{word} yes", "rejected": "no no"} for word in (WORDS * 4)[:8]]
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=0.05, report_to=[],
        use_cpu=True, bf16=False, logging_steps=1, save_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip
    before, reference = snapshot(model), reference_model(model)
    weights = [parameter.detach().clone() for parameter in reference.parameters()]
    trainer = trl.DPOTrainer(
        model, ref_model=reference, args=arguments, train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert abs(losses[0] - math.log(2)) < 1e-3, "at zero gates the policy is the reference"
    assert losses[-1] < losses[0] - 1e-3
    assert_only_the_adapter_changed(model, before)
    assert all(torch.equal(now, then) for now, then in zip(reference.parameters(), weights, strict=True))
