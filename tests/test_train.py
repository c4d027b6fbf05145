"""Training: the loss, the loop, and what a run survives."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import torch
from runs import recipe, tiny_tokenizer, write_base, write_data
from safetensors.torch import load_file
from transformers import AutoTokenizer

from llama_adapter import add_adapter, load_adapter, use_adapter
from llama_adapter.base import load_base
from llama_adapter.data.batches import collate, global_batch, micro_batches, response_tokens
from llama_adapter.errors import ConfigError, Interrupted, TrainingError
from llama_adapter.files import whole_lines
from llama_adapter.training.checkpoint import RunFolder
from llama_adapter.training.config import TrainConfig, load_recipe
from llama_adapter.training.loop import Run, train
from llama_adapter.training.loss import owners_losses, response_loss
from llama_adapter.training.optimizer import learning_rate
from llama_adapter.training.prepare import prepare

CPU = torch.device("cpu")
WEIGHTS = "adapter_model.safetensors"


def last(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last" / WEIGHTS)


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


def assert_close(left, right, atol):
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], atol=atol, rtol=0)


def test_a_run_moves_every_parameter_and_leaves_a_usable_adapter(base, data, tmp_path):
    result = train(recipe(base, data, tmp_path / "out", lr=0.3))
    assert result.steps == 6
    assert result.best_val_loss < result.base_val_loss
    before = load_base(str(base), CPU)
    torch.manual_seed(0)
    start = add_adapter(before, recipe(base, data, tmp_path).adapter_config()).state_dict()
    end = last(tmp_path / "out")
    assert all(not torch.equal(start[key], end[key]) for key in start)
    model = load_base(str(base), CPU)
    load_adapter(model, tmp_path / "out", "trained")
    for name in ("recipe.yaml", "metrics.jsonl", "loss.png", "gates.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    prepared = prepare(recipe(base, data, tmp_path), tiny_tokenizer())
    with torch.no_grad(), use_adapter(model, "trained"):
        loss = response_loss(model, collate(prepared.val), CPU) / response_tokens(prepared.val)
    assert float(loss) == pytest.approx(result.best_val_loss, abs=1e-5)


def test_validation_before_the_first_step_is_the_bare_base(base, data, tmp_path):
    config = recipe(base, data, tmp_path / "out", max_steps=1)
    result = train(config)
    prepared = prepare(config, tiny_tokenizer())
    model = load_base(str(base), CPU)
    with torch.no_grad():
        loss = response_loss(model, collate(prepared.val), CPU) / response_tokens(prepared.val)
    assert result.base_val_loss == pytest.approx(float(loss), abs=1e-5)


def test_loss_is_the_mean_over_response_tokens_counted_by_hand(base, data, tmp_path):
    model = load_base(str(base), CPU)
    examples = prepare(recipe(base, data, tmp_path), tiny_tokenizer()).train[:3]
    total, count = 0.0, 0
    for example in examples:
        with torch.no_grad():
            logits = model(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        for position in range(1, len(example.input_ids)):
            if example.labels[position] != -100:
                total -= float(logits[position - 1, example.input_ids[position]])
                count += 1
    assert count == response_tokens(examples)
    with torch.no_grad():
        assert float(response_loss(model, collate(examples), CPU)) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_micro_batches_do_not_change_the_result(base, data, tmp_path, micro_batch_size):
    train(recipe(base, data, tmp_path / "a", max_steps=3))
    train(recipe(base, data, tmp_path / "b", max_steps=3, micro_batch_size=micro_batch_size))
    assert_close(last(tmp_path / "a"), last(tmp_path / "b"), atol=1e-5)


def test_gradient_checkpointing_does_not_change_the_result(base, data, tmp_path):
    train(recipe(base, data, tmp_path / "a", max_steps=3))
    train(recipe(base, data, tmp_path / "b", max_steps=3, gradient_checkpointing=True))
    assert_close(last(tmp_path / "a"), last(tmp_path / "b"), atol=1e-6)


LINEARS = ("q_proj", "down_proj")
PARTS = {"norms": True, "linear_scale": LINEARS, "linear_bias": LINEARS, "lora_rank": 2, "lora_targets": LINEARS}


@pytest.mark.parametrize("parts", [{}, pytest.param(PARTS, marks=pytest.mark.slow)], ids=["prompts", "parts"])
def test_two_processes_end_where_one_does(base, data, tmp_path, parts):
    train(recipe(base, data, tmp_path / "one", trackers=("tensorboard",), **parts))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "llama_adapter", "train", str(tmp_path / "one" / "recipe.yaml")]
    command += ["--output-dir", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "on 2 x cpu" in done.stderr
    assert done.stdout.count("adapter in") == 1
    assert_close(last(tmp_path / "one"), last(tmp_path / "two"), atol=1e-5)
    assert len(whole_lines(tmp_path / "two" / "metrics.jsonl")) == len(whole_lines(tmp_path / "one" / "metrics.jsonl"))


KILLED_RUN = """
import os, signal, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from runs import recipe
from llama_adapter.training import checkpoint as run_folder, loop as train
at, where = int(sys.argv[5]), sys.argv[6]
def die(): os.kill(os.getpid(), signal.SIGKILL)
if where == "step":
    step = train.Run._step
    train.Run._step = lambda run, *args: die() if run.experts[0].progress.step == at else step(run, *args)
else:
    save = run_folder.save_adapter
    run_folder.save_adapter = lambda model, folder, name: (
        die() if Path(folder).name == "last" else save(model, folder, name)
    )
train.train(recipe(*map(Path, sys.argv[2:5])))
"""


@pytest.mark.parametrize(("at", "where"), [(0, "step"), (3, "step"), (0, "save")])
def test_a_run_killed_at_any_step_resumes_to_the_same_bits(base, data, tmp_path, at, where):
    train(recipe(base, data, tmp_path / "whole"))
    arguments = [str(Path(__file__).parent), base, data, tmp_path / "killed", at, where]
    done = subprocess.run([sys.executable, "-c", KILLED_RUN, *map(str, arguments)], capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    train(recipe(base, data, tmp_path / "killed", resume=True))
    assert_equal(last(tmp_path / "whole"), last(tmp_path / "killed"))
    assert_equal(load_file(tmp_path / "whole" / WEIGHTS), load_file(tmp_path / "killed" / WEIGHTS))
    both = [whole_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed")]
    timeless = [[{k: v for k, v in line.items() if k != "seconds"} for line in lines] for lines in both]
    assert timeless[0] == timeless[1]


def with_template(folder: Path, template: str) -> Path:
    """A tiny base whose tokenizer has this chat template."""
    tokenizer = AutoTokenizer.from_pretrained(write_base(folder))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


DATED = (
    "It is {{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}.{% for m in messages %}\n{{ m.role }}:{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}\nassistant:"
    "{% endif %}"
)


def test_a_run_whose_template_writes_the_time_resumes_to_the_same_bits(data, tmp_path, monkeypatch):
    base = with_template(tmp_path / "base", DATED)
    began = datetime(2024, 2, 28, 23, 59, 59, 999_999)
    monkeypatch.setattr(RunFolder, "now", lambda folder, config: began)
    whole = train(recipe(base, data, tmp_path / "whole", template="chat"))
    cut = recipe(base, data, tmp_path / "cut", template="chat")
    monkeypatch.setattr(Run, "_step", _stop_at(3, Run._step))
    with pytest.raises(ZeroDivisionError):
        train(cut)
    monkeypatch.undo()
    train(replace(cut, resume=True))
    assert whole.steps == 6
    assert_equal(last(tmp_path / "whole"), last(tmp_path / "cut"))


def _stop_at(step, go_on):
    return lambda run, *args: 1 / 0 if run.experts[0].progress.step == step else go_on(run, *args)


def test_the_time_that_a_template_writes_is_one_for_all_examples(data, tmp_path):
    base = with_template(tmp_path / "base", DATED)
    config = recipe(base, data, tmp_path / "out", template="chat", max_length=1024)
    tokenizer, now = AutoTokenizer.from_pretrained(base), datetime(2024, 2, 29)
    told, again, other = (prepare(config, tokenizer, now=time) for time in (now, now, datetime(2024, 3, 1)))
    assert told.digest == again.digest != other.digest
    texts = [tokenizer.decode(example.input_ids) for example in (*prepare(config, tokenizer).train, *told.val)]
    assert len({text.split("user:")[0] for text in texts}) == 2


def test_tokens_that_join_prompt_and_answer_are_counted_and_warned_of_once(data, tmp_path, caplog):
    spaced = DATED.replace("{{ m.role }}:", "{{ m.role }}: ").replace("assistant:", "assistant: ")
    base = with_template(tmp_path / "base", spaced)
    found = prepare(recipe(base, data, tmp_path, template="chat"), AutoTokenizer.from_pretrained(base))
    assert found.report()["merged_examples"] == 21  # one of eight words has no token with a blank
    (warning,) = [record.getMessage() for record in caplog.records if "joins an answer's edge" in record.getMessage()]
    assert warning.startswith("21 of 24 examples have a token")


def test_answers_of_one_record_stay_on_one_side_of_the_split(tmp_path):
    counting = "{{ messages | length }}" + DATED
    base = with_template(tmp_path / "base", counting)
    turns = [{"role": "user", "content": "sun"}, {"role": "assistant", "content": "moon"}] * 3
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"messages": turns}] * 4))
    found = prepare(recipe(base, path, tmp_path, template="chat", val_size=1), AutoTokenizer.from_pretrained(base))
    assert (len(found.train), len(found.val)) == (9, 3)


def test_ctrl_c_saves_and_says_how_to_resume(base, data, tmp_path, monkeypatch):
    train(recipe(base, data, tmp_path / "whole"))
    step = Run._step

    def interrupted(run, *args):
        if run.experts[0].progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(run, *args)

    monkeypatch.setattr(Run, "_step", interrupted)
    with pytest.raises(Interrupted, match=r"after step 5 of 6.*--resume") as error:
        train(recipe(base, data, tmp_path / "stopped", save_every=100))
    assert error.value.exit_code == 130
    monkeypatch.undo()
    train(recipe(base, data, tmp_path / "stopped", save_every=100, resume=True))
    assert_equal(last(tmp_path / "whole"), last(tmp_path / "stopped"))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(base, data, tmp_path, monkeypatch):
    real = owners_losses
    calls = []

    def poisoned(*args):
        calls.append(1)
        loss = real(*args)
        return loss * math.nan if len(calls) > 9 else loss

    monkeypatch.setattr("llama_adapter.training.loop.owners_losses", poisoned)
    with pytest.raises(TrainingError, match=r"at step \d are not finite; the checkpoint in .*last is kept"):
        train(recipe(base, data, tmp_path / "out", val_size=0, save_every=1))
    assert all(tensor.isfinite().all() for tensor in last(tmp_path / "out").values())


def test_a_full_disk_is_one_sentence_and_keeps_what_was_there(base, data, tmp_path, monkeypatch):
    import errno

    from llama_adapter.errors import AdapterError
    from llama_adapter.formats import native as storage

    train(recipe(base, data, tmp_path / "out", max_steps=2))
    kept = last(tmp_path / "out")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    model = load_base(str(base), CPU)
    load_adapter(model, tmp_path / "out" / "last")
    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(AdapterError, match=r"No space left on device.*kept"):
        storage.save_adapter(model, tmp_path / "out" / "last")
    assert_equal(kept, last(tmp_path / "out"))
    assert not list((tmp_path / "out" / "last").glob(".*"))


def test_output_folder_of_another_run_is_refused_unless_asked(base, data, tmp_path):
    config = recipe(base, data, tmp_path / "out", max_steps=1)
    train(config)
    with pytest.raises(TrainingError, match="already holds a run: pass --resume"):
        train(config)
    with pytest.raises(TrainingError, match=r"other settings: lr 0.5 \(was 0.02\)"):
        train(recipe(base, data, tmp_path / "out", max_steps=1, lr=0.5, resume=True))
    train(recipe(base, data, tmp_path / "out", max_steps=1, lr=0.5, overwrite=True))
    assert load_recipe(str(tmp_path / "out" / "recipe.yaml"), {}).lr == 0.5
    assert [line["step"] for line in whole_lines(tmp_path / "out" / "metrics.jsonl")] == [0, 1, 1]


def test_what_is_edited_in_a_runs_own_recipe_is_said_and_never_another_adapter(base, data, tmp_path, caplog):
    train(recipe(base, data, tmp_path / "out", max_steps=2))
    file = tmp_path / "out" / "recipe.yaml"
    written = file.read_text()

    def go_on(old="", new="", steps=3):
        file.write_text(file.read_text().replace(old, new))
        caplog.clear()
        train(load_recipe(str(file), {"resume": True, "max_steps": steps}))
        return [record.message for record in caplog.records if "was edited" in record.message]

    assert go_on() == []
    for old, new in (("adapter_len: 4", "adapter_len: 5"), ("gate_activation: null", "gate_activation: identity")):
        assert old in written
        with pytest.raises(TrainingError, match=r"recipe.yaml was edited: .* until step 3, which is another adapter"):
            go_on(old, new, steps=4)
        file.write_text(written)
    (said,) = go_on("\nlr: 0.02", "\nlr: 0.01", steps=4)
    assert "recipe.yaml was edited: lr is 0.01 and was 0.02 until step 3; the run goes on with the new" in said
    assert go_on(steps=5) == []  # said once


def test_a_folder_with_other_files_is_never_touched(base, data, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(TrainingError, match="holds other files"):
            train(recipe(base, data, tmp_path, **options))
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_resuming_with_changed_data_is_refused(base, tmp_path):
    data = write_data(tmp_path / "data.json")
    train(recipe(base, data, tmp_path / "out", max_steps=2))
    write_data(data, count=30)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(TrainingError, match="data has changed"):
        train(recipe(base, data, tmp_path / "out", max_steps=3, resume=True))
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_a_damaged_checkpoint_is_one_sentence(base, data, tmp_path):
    train(recipe(base, data, tmp_path / "out", max_steps=2))
    for state in (tmp_path / "out" / "last").glob("[jt]*"):
        state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(TrainingError, match="is damaged"):
        train(recipe(base, data, tmp_path / "out", max_steps=2, resume=True))


def test_wrong_settings_are_found_before_weights_are_read(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr("llama_adapter.training.loop.load_base", lambda *_: pytest.fail("read the weights"))
    with pytest.raises(ConfigError, match="adapter_layers is 4, but the base has 3 layers"):
        train(recipe(base, data, tmp_path / "out", adapter_layers=4))
    with pytest.raises(ConfigError, match="leaves none to train on"):
        train(recipe(base, data, tmp_path / "out2", val_size=24))
    assert not (tmp_path / "out").exists()


def test_tensorboard_events_are_written(base, data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(recipe(base, data, tmp_path / "out", max_steps=2, trackers=("tensorboard",)))
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]


def test_learning_rate_warms_up_peaks_and_decays():
    config = TrainConfig(epochs=5, warmup_epochs=2, batch_size=64)
    assert config.peak_lr == pytest.approx(9e-3 * 64 / 256)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates.index(max(rates)) == 39
    assert max(rates) == pytest.approx(config.peak_lr)
    assert rates[0] == pytest.approx(config.peak_lr / 40)
    assert learning_rate(config, 100, 100) == pytest.approx(0, abs=1e-12)
    assert 0 < rates[-1] < 0.01 * config.peak_lr
    assert rates == sorted(rates[:40]) + sorted(rates[40:], reverse=True)


@pytest.mark.parametrize("warmup_epochs", [0, 0.2, 2, 5])
@pytest.mark.parametrize("total", [1, 2, 3, 10])
def test_every_step_of_a_short_run_trains(total, warmup_epochs):
    config = TrainConfig(epochs=5, warmup_epochs=warmup_epochs)
    rates = [learning_rate(config, step, total) for step in range(total)]
    assert min(rates) > 0.01 * config.peak_lr
    assert max(rates) <= config.peak_lr


def test_the_rate_stays_above_its_floor():
    config = TrainConfig(lr=1.0, min_lr=0.25)
    rates = [learning_rate(config, step, 20) for step in range(21)]
    assert rates[20] == pytest.approx(0.25)
    assert 0.25 < rates[19] < rates[18]


def test_a_run_of_one_step_trains(base, data, tmp_path):
    train(recipe(base, data, tmp_path / "out", max_steps=1))
    model = load_base(str(base), CPU)
    assert any(bool(layer.gate.any()) for layer in load_adapter(model, tmp_path / "out" / "last").layers.values())


def test_every_epoch_sees_every_example_once_in_another_order():
    epochs = [[i for step in range(4) for i in global_batch(10, 3, epoch * 4 + step, seed=7)] for epoch in range(2)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_processes_share_a_batch_without_overlap(base, data, tmp_path):
    examples = prepare(recipe(base, data, tmp_path), tiny_tokenizer()).train[:7]
    rows = [
        tuple(row[mask.bool()].tolist())
        for process in range(3)
        for batch in micro_batches(examples, 2, process, 3)
        for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    assert sorted(rows) == sorted(tuple(example.input_ids) for example in examples)


def test_recipe_is_written_and_runs_again(base, data, tmp_path):
    config = recipe(base, data, tmp_path / "out", max_steps=1)
    train(config)
    assert load_recipe(str(tmp_path / "out" / "recipe.yaml"), {}) == config
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["template"] == "alpaca"


def test_prompt_completion_data_are_asked_as_they_were_trained(base, tmp_path):
    from llama_adapter.inference.config import GenerateConfig
    from llama_adapter.inference.session import load_session
    from llama_adapter.inference.writing import Prompt

    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i} is", "completion": " a number"}) + "\n" for i in range(12)))
    train(recipe(base, data, tmp_path / "out", max_steps=1))
    session = load_session(None, {"a": str(tmp_path / "out")}, CPU)
    assert session.templates["a"] == "raw"
    answer = session.answer([Prompt.of("3 is")], "a", GenerateConfig(max_new_tokens=2, temperature=0))[0]
    assert answer.prompt_tokens == len(tiny_tokenizer()("3 is").input_ids)
