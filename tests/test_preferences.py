"""`train --method dpo`: pairs as they are read, DPO's loss beside a formula and TRL, and runs over them."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from runs import WORDS, recipe, tiny_tokenizer, write_base
from safetensors.torch import load_file
from tiny import adapted, tiny_model, tokens

from llama_adapter import AdapterConfig, add_adapter, get_adapter, remove_adapter, set_adapter
from llama_adapter.cli import main
from llama_adapter.data import IGNORE, Encoded
from llama_adapter.data.batches import collate
from llama_adapter.data.encode import encode_records, texts_of
from llama_adapter.data.pairs import parse_pair
from llama_adapter.errors import ConfigError, DataError
from llama_adapter.files import whole_lines
from llama_adapter.training.config import TrainConfig, load_recipe
from llama_adapter.training.loop import Run, train
from llama_adapter.training.objective import Preferences
from llama_adapter.training.packing import pack, packed_rows

CPU = torch.device("cpu")
PARTS = {"norms": True, "linear_scale": ("o_proj",), "linear_bias": ("down_proj",), "lora_rank": 2,
         "lora_targets": ("v_proj",), "gate_scale": True}  # fmt: skip


def pairs(lengths=((3, 5), (4, 2), (2, 2)), prompts=(4, 6, 4)) -> list[Encoded]:
    """Pairs whose prompts begin alike, with answers of these lengths."""
    start, made = tokens(1, 3)[0].tolist(), []
    for number, (both, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        asked = start + tokens(1, prompt, 10 + number)[0].tolist()
        texts = []
        for side, length in enumerate(both):
            answer = tokens(1, length, 100 + 2 * number + side)[0].tolist()
            texts.append(Encoded(asked + answer, [IGNORE] * len(asked) + answer, False))
        made.append(replace(texts[0], rejected=texts[1]))
    return made


def log_probability(model, text: Encoded) -> torch.Tensor:
    logits = model(torch.tensor([text.input_ids])).logits[0].log_softmax(-1)
    return sum(logits[i - 1, token] for i, token in enumerate(text.labels) if token != IGNORE)


def by_formula(model, reference, batch: list[Encoded], beta: float) -> list[torch.Tensor]:
    """Loss and what is logged, text by text on two models, in the models' own precision."""
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(5)]
    for pair in batch:
        with torch.no_grad():
            against = [log_probability(reference, text) for text in texts_of([pair])]
        chosen, rejected = (
            beta * (log_probability(model, text) - there) for text, there in zip(texts_of([pair]), against, strict=True)
        )
        loss = torch.log1p(torch.exp(rejected - chosen))
        found = (loss, chosen, rejected, float(chosen > rejected), chosen - rejected)
        sums = [total + value for total, value in zip(sums, found, strict=True)]
    return sums


def numbers(values: list[torch.Tensor]) -> list[float]:
    return [float(value.detach()) for value in values]


def gradients(adapter) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in adapter.parameters()]
    for parameter in adapter.parameters():
        parameter.grad = None
    return found


@pytest.mark.parametrize(
    ("family", "parts"), [("llama", {}), ("llama", PARTS), ("qwen3", {}), ("mixtral", {}), ("gpt2", {})]
)
def test_loss_and_gradients_are_the_formula_s_on_two_models(family, parts):
    model = tiny_model(family)
    adapter = adapted(model, **parts)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    reference = copy.deepcopy(model)
    remove_adapter(reference)
    expected = by_formula(model, reference, pairs(), 0.5)
    expected[0].backward()
    wanted = gradients(adapter)
    assert all(gradient.abs().max() > 1e-5 for gradient in wanted)
    objective = Preferences(0.5, "default")
    for batch in (collate(pairs()), pack(pairs())):
        sums = objective.sums(model, batch, CPU)
        sums[0].backward()
        torch.testing.assert_close(sums.tolist(), numbers(expected), atol=1e-5, rtol=1e-5)
        for mine, theirs in zip(gradients(adapter), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_another_adapter_may_be_the_reference():
    model = tiny_model()
    adapter = adapted(model)
    adapted(model, "before", seed=5, adapter_len=2)
    twin = copy.deepcopy(model)
    set_adapter(model, "default")
    set_adapter(twin, "before")
    expected = by_formula(model, twin, pairs(), 0.3)
    objective = Preferences(0.3, adapter.name, "before")
    for batch in (collate(pairs()), pack(pairs())):
        sums = objective.sums(model, batch, CPU)
        torch.testing.assert_close(sums.tolist(), numbers(expected), atol=1e-5, rtol=1e-5)
    sums[0].backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapter.parameters())
    assert not any(p.grad is not None and p.grad.any() for p in get_adapter(model, "before").parameters())


def test_the_policy_at_closed_gates_is_the_reference():
    model = tiny_model()
    add_adapter(model, AdapterConfig(adapter_len=4, adapter_layers=2))
    loss, *rewards = Preferences(0.1, "default").sums(model, pack(pairs()), CPU).tolist()
    assert loss == pytest.approx(3 * math.log(2), abs=1e-6)
    assert rewards == [0, 0, 0, 0]


def test_a_pair_shares_its_prompt_in_a_packed_row():
    (first, *rest) = pairs()
    (row,) = packed_rows([first], 8)
    assert row.segments.prefix == 6, "all of the prompt but the token that predicts the answer"
    assert row.counts == (3, 5)
    assert sum(len(row.counts) for row in packed_rows([first, *rest], 8)) == 6
    shares = [row for process in range(2) for row in packed_rows([first, *rest], 8, process, 2)]
    assert sum(len(row.counts) for row in shares) == 6


# Records

ASKED, GOOD, BAD = ({"role": role, "content": text} for role, text in
                    (("user", "Hm?"), ("assistant", "Yes."), ("assistant", "No.")))  # fmt: skip
SHAPES = {
    "texts": ({"prompt": "Hm? ", "chosen": "Yes.", "rejected": "No."}, "Hm? "),
    "an implicit prompt": ({"chosen": "Hm? Yes.", "rejected": "Hm? No."}, "Hm?"),
    "Alpaca": ({"instruction": "Hm?", "chosen": "Yes.", "rejected": "No."}, "Hm?"),
    "messages": ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, "Hm?"),
    "one message each": ({"prompt": [ASKED], "chosen": GOOD, "rejected": BAD}, "Hm?"),
    "messages and texts": ({"prompt": [ASKED], "chosen": "Yes.", "rejected": "No."}, "Hm?"),
    "implicit in messages": ({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, "Hm?"),
    "a prompt told twice": (
        {"prompt": "Hm?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "messages": [ASKED, GOOD]}, "Hm?",
    ),
    "a text and messages": ({"prompt": "Hm?", "chosen": [GOOD], "rejected": [BAD]}, "Hm?"),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Hm?"}], "chosen": {"from": "gpt", "value": "Yes."},
         "rejected": {"from": "gpt", "value": "No."}}, "Hm?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_pair_is_read(shape):
    record, prompt = SHAPES[shape]
    pair = parse_pair({**record, "score_chosen": 7.0})
    assert [message.content for message in pair.messages] == [prompt, "Yes." if shape[:2] != "an" else " Yes."]
    assert [message.content for message in pair.rejected] == [prompt, "No." if shape[:2] != "an" else " No."]
    assert pair.raw == isinstance(record.get("prompt", record["chosen"]), str) & isinstance(record["chosen"], str) & (
        "instruction" not in record
    )
    assert pair.notes == ("the key 'score_chosen' is not used",)


@pytest.mark.parametrize(
    ("record", "unused"),
    [
        ({"prompt": "Hm? ", "messages": [ASKED], "chosen": "Yes.", "rejected": "No."}, ["messages"]),
        ({"instruction": "Hm?", "prompt": "What?", "chosen": "Yes.", "rejected": "No."}, ["prompt"]),
        ({"prompt": [ASKED], "conversations": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, ["conversations"]),
        ({"prompt": "What?", "messages": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, ["prompt"]),
        ({"prompt": "Hm? ", "output": "Yes!", "chosen": "Yes.", "rejected": "No."}, ["output"]),
        ({"prompt": "Hm?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, []),
    ],
)
def test_keys_that_another_takes_the_place_of_are_named(record, unused):
    assert parse_pair(record).notes == tuple(f"the key '{name}' of a pair is not used" for name in unused)


def test_answers_before_the_last_question_are_no_part_of_a_pair():
    before = [{"role": "system", "content": "Be brief."}, ASKED, GOOD, {"role": "user", "content": "Sure?"}]
    pair = parse_pair({"chosen": [*before, GOOD], "rejected": [*before, BAD]})
    assert [message.weight for message in pair.messages] == [1, 1, 0, 1, 1]
    (text,) = encode_records([pair], "alpaca", tiny_tokenizer(), 512)[0]
    for one, answer in zip(texts_of([text]), ("Yes.", "No."), strict=True):
        learnt = [token for token in one.labels if token != IGNORE]
        assert tiny_tokenizer().decode(learnt) == f"{answer}</s>"


BAD_RECORDS = {
    "it has 'chosen' and no 'rejected'": {"prompt": "Hm?", "chosen": "Yes."},
    "it has 'rejected' and no 'chosen'": {"prompt": "Hm?", "chosen": None, "rejected": "Yes."},
    "are the same answer": {"prompt": "Hm?", "chosen": "Yes.", "rejected": "Yes."},
    "its keys (instruction, output) are no preference pair": {"instruction": "Hm?", "output": "Yes."},
    "a record must be an object": "Yes.",
    "'chosen' must be a string or a list of messages": {"prompt": "Hm?", "chosen": 1, "rejected": "No."},
    "'rejected' must be a string or a list of messages": {"prompt": "Hm?", "chosen": "Yes.", "rejected": 2},
    "part elsewhere than at an answer": {"chosen": [ASKED, GOOD], "rejected": [{**ASKED, "content": "So?"}, BAD]},
    "no two answers to one text": {"chosen": "Hm? Yes.", "rejected": "Hm? Yes. No."},
    "'rejected' is empty: a preference pair needs both": {"prompt": "Hm?", "chosen": "Yes.", "rejected": " "},
    "'chosen' is empty": {"instruction": "Hm?", "chosen": "", "rejected": "No."},
    "starts with an assistant turn": {"chosen": [GOOD], "rejected": [BAD]},
    "'chosen' is a string and 'rejected' a list": {"chosen": "Hm? Yes.", "rejected": [ASKED, BAD]},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_RECORDS)
def test_what_is_no_pair_is_refused(message):
    with pytest.raises(DataError) as raised:
        parse_pair(BAD_RECORDS[message])
    assert message in str(raised.value)


def test_a_long_prompt_loses_the_same_beginning_for_both_answers():
    long = {"prompt": "moon " * 40, "chosen": "sun " * 30, "rejected": "no"}
    pair = encode_records([parse_pair(long)], "alpaca", tiny_tokenizer(), 24)[0][0]
    starts = [next(i for i, label in enumerate(text.labels) if label != IGNORE) for text in texts_of([pair])]
    assert starts[0] == starts[1]
    assert pair.input_ids[: starts[0]] == pair.rejected.input_ids[: starts[0]]
    assert len(pair.input_ids) == 24
    assert pair.truncated
    assert pair.rejected.truncated


def test_answers_that_part_behind_max_length_are_refused():
    record = {"prompt": "moon", "chosen": " sun" * 40 + " yes", "rejected": " sun" * 40 + " no"}
    skipped = []
    with pytest.raises(DataError, match="are the same 24 tokens"):
        encode_records([parse_pair(record)], "alpaca", tiny_tokenizer(), 24)
    assert encode_records([parse_pair(record)], "alpaca", tiny_tokenizer(), 24, skipped=skipped) == []
    assert len(skipped) == 1


# Runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    lines = [
        {
            "instruction": f"Repeat {i}",
            "chosen": f"{WORDS[i % 8]} " * (1 + i % 4),
            "rejected": f"no {WORDS[-1 - i % 8]}",
        }
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def last(folder):
    return load_file(folder / "last" / "adapter_model.safetensors")


def test_a_run_prefers_chosen_answers_and_keeps_the_best(base, data, tmp_path):
    result = train(recipe(base, data, tmp_path / "out", method="dpo", epochs=5.0, beta=0.5, lr=0.3))
    assert result.base_val_loss == pytest.approx(math.log(2), abs=1e-6)
    assert result.best_val_loss < result.base_val_loss - 0.1
    lines = whole_lines(tmp_path / "out" / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert steps[-1]["rewards/margins"] == pytest.approx(
        steps[-1]["rewards/chosen"] - steps[-1]["rewards/rejected"], abs=1e-4
    )
    assert steps[-1]["rewards/accuracies"] > 0.7
    assert [line["val_rewards/accuracies"] for line in lines if "val_loss" in line][-1] > 0.7
    for name in ("loss.png", "gates.png", "rewards.png", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert "method dpo" in (tmp_path / "out" / "README.md").read_text()
    assert load_recipe(str(tmp_path / "out" / "recipe.yaml"), {}).method == "dpo"


@pytest.fixture(scope="module")
def three_steps(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    train(recipe(base, data, folder, method="dpo", max_steps=3))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": False, "micro_batch_size": 3},
        pytest.param({"micro_batch_size": 1}, marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
    ids=["padded", "small", "checkpointing"],
)
def test_how_it_is_computed_does_not_change_the_result(base, data, three_steps, tmp_path, changes):
    train(recipe(base, data, tmp_path / "out", method="dpo", max_steps=3, **changes))
    for key, tensor in last(three_steps).items():
        torch.testing.assert_close(last(tmp_path / "out")[key], tensor, atol=1e-5, rtol=1e-5)


def test_a_run_that_goes_on_from_an_adapter_is_held_against_it(base, data, three_steps, tmp_path, monkeypatch):
    shutil.copytree(three_steps, tmp_path / "first")
    settings = {"method": "dpo", "max_steps": 4, "init_from": str(tmp_path / "first"), "adapter_len": None}
    settings["adapter_layers"] = None
    whole = train(recipe(base, data, tmp_path / "whole", **settings))
    assert whole.base_val_loss == pytest.approx(math.log(2), abs=1e-6)
    step = Run._step

    def killed(run, *args):
        if run.experts[0].progress.step == at:
            raise ZeroDivisionError
        return step(run, *args)

    config = recipe(base, data, tmp_path / "cut", **settings)
    for at in (1, 3):  # before the first checkpoint, which then begins once more, and behind it
        monkeypatch.setattr(Run, "_step", killed)
        with pytest.raises(ZeroDivisionError):
            train(replace(config, resume=at > 1))
        monkeypatch.undo()
    (tmp_path / "first").rename(tmp_path / "gone")
    train(replace(config, resume=True))
    for key, tensor in last(tmp_path / "whole").items():
        assert torch.equal(last(tmp_path / "cut")[key], tensor)
    for name in ("adapter_model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "cut" / name).exists()


@pytest.mark.slow
def test_two_processes_end_where_one_does(base, data, tmp_path):
    train(recipe(base, data, tmp_path / "one", method="dpo"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "llama_adapter", "train", str(tmp_path / "one" / "recipe.yaml")]
    command += ["--output-dir", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for key, tensor in last(tmp_path / "one").items():
        torch.testing.assert_close(last(tmp_path / "two")[key], tensor, atol=1e-5, rtol=1e-5)
    both = [whole_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    for one, two in zip(*both, strict=True):
        for key in one.keys() - {"seconds"}:
            assert two[key] == pytest.approx(one[key], abs=1e-4), key


def test_settings_that_cannot_be_are_refused(base, data, tmp_path):
    with pytest.raises(ConfigError, match="beta has no effect without method dpo"):
        TrainConfig(beta=0.2)
    with pytest.raises(ConfigError, match="method is 'ppo'; it must be one of sft, dpo"):
        TrainConfig(method="ppo")
    with pytest.raises(ConfigError, match="method dpo compares answers to text, without a condition"):
        TrainConfig(method="dpo", condition="image")
    with pytest.raises(ConfigError, match="beta is 0"):
        TrainConfig(method="dpo", beta=0)


@pytest.mark.parametrize(
    ("records", "flags", "message"),
    [
        ([{"prompt": "Hm?", "chosen": "Yes."}], [], "it has 'chosen' and no 'rejected'"),
        ([{"prompt": "Hm?", "chosen": "Yes.", "rejected": "Yes."}], [], "the same answer"),
        ([{"instruction": "Hm?", "output": "Yes."}], [], "no preference pair"),
        ([SHAPES["texts"][0]], ["--beta", "-1"], "beta is -1"),
    ],
)
def test_the_command_line_says_it_before_weights_are_read(records, flags, message, base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llama_adapter.training.loop.load_base", None)
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--method", "dpo", "--model", str(base), "--data", str(path), "--output-dir",
              str(tmp_path / "out"), "--val-size", "0", *flags])  # fmt: skip
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "out").exists()


# TRL


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_loss_and_gradients_are_trl_s_with_a_separate_reference_model(base, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from transformers import AutoModelForCausalLM

    from llama_adapter.training.prepare import prepare

    records = [{"prompt": f"{word} is", "chosen": f" {word} yes" * (1 + i % 3), "rejected": " no"}
               for i, word in enumerate(WORDS)]  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapter = adapted(model)
    prepared = prepare(recipe(base, path, tmp_path, method="dpo", val_size=0), tiny_tokenizer())
    assert len(prepared.train) == len(records)
    found = []
    for batch in (pack(prepared.train), collate(prepared.train)):
        sums = Preferences(0.1, "default").sums(model, batch, CPU) / len(records)
        sums[0].backward()
        found.append((sums.tolist(), gradients(adapter)))
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=len(records), report_to=[], use_cpu=True,
        bf16=False, gradient_checkpointing=False, max_length=512,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        model, ref_model=reference, args=arguments, train_dataset=datasets.Dataset.from_list(records),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    model.train()
    loss = trainer.compute_loss(model, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    theirs = gradients(adapter)
    names = [name for name in Preferences.names if name != "loss"]
    expected = [float(loss), *(trainer._metrics["train"][name][-1] for name in names)]
    for sums, mine in found:
        torch.testing.assert_close(sums, expected, atol=1e-5, rtol=1e-5)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
            assert other.abs().max() > 1e-6
