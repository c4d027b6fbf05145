"""Many experts in one run: each ends where its own single run ends, and none touches another."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from runs import assert_same_run, recipe, write_data
from tiny import VOCAB, adapted, tiny_model

from llama_adapter.cli import main
from llama_adapter.core.families import FAMILIES
from llama_adapter.data import IGNORE, Encoded
from llama_adapter.data.batches import collate, micro_batches
from llama_adapter.errors import ConfigError, Interrupted, TrainingError
from llama_adapter.files import whole_lines
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.draft import naming
from llama_adapter.training.loop import Run, train
from llama_adapter.training.loss import owners_losses, response_loss, why_not_packed
from llama_adapter.training.many import Runs, load_runs, train_many
from llama_adapter.training.packed_attention import tell_layers
from llama_adapter.training.packing import pack, pack_sections, packed_rows

CPU = torch.device("cpu")
WEIGHTS = "adapter_model.safetensors"
UNLIKE = {
    "plain": {},
    "long": {"adapter_len": 7, "adapter_layers": 3, "lr": 0.05, "seed": 3, "batch_size": 5, "epochs": 1.0},
    "open": {
        "adapter_len": 1,
        "adapter_layers": 1,
        "gate_activation": "identity",
        "batch_size": 5,
        "max_grad_norm": 0.1,
    },
    "short": {"seed": 9, "batch_size": 16, "weight_decay": 0.3, "max_steps": 2, "gate_scale": True, "eval_every": 1},
}
"""Experts with unlike data too: see `unlike`."""


def unlike(base: Path, folder: Path, names=tuple(UNLIKE), **changes) -> dict[str, TrainConfig]:
    made = {}
    for number, name in enumerate(names):
        data = write_data(folder / f"{name}.json", 14 + 5 * number)
        made[name] = recipe(base, data, folder / name, **{**UNLIKE[name], **changes})
    return made


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Pictures take more time than these runs; they are somebody else's test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_loss", "plot_gates", "plot_rewards"):
            patch.setattr(f"llama_adapter.training.learner.{name}", lambda content, path, *_: path.touch())
        yield


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """The folders of the same experts, each trained in a run of its own."""
    folder = tmp_path_factory.mktemp("alone")
    for config in unlike(base, folder).values():
        train(config)
    return folder


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_each_ends_where_its_single_run_ends(base, alone, tmp_path, packing, monkeypatch):
    mixed = []

    def seen(model, batch, *rest):
        mixed.append(len(set(batch.owners)))
        return owners_losses(model, batch, *rest)

    monkeypatch.setattr("llama_adapter.training.loop.owners_losses", seen)
    results = train_many(Runs(unlike(base, tmp_path, packing=packing, micro_batch_size=16)))
    assert max(mixed) > 2
    assert results["short"].steps == 2
    for name in UNLIKE:
        assert_same_run(tmp_path / name, alone / name)


def interrupt_at(monkeypatch, rounds):
    """Ctrl-C in the n-th step of the run."""
    step, done = Run._step, []

    def interrupted(run, *args):
        done.append(1)
        if len(done) == rounds:
            os.kill(os.getpid(), signal.SIGINT)
        return step(run, *args)

    monkeypatch.setattr(Run, "_step", interrupted)


def test_one_joins_late_one_ends_early_and_a_stop_in_between_changes_nothing(
    base, alone, tmp_path, monkeypatch, capsys
):
    recipes = unlike(base, tmp_path)
    file = tmp_path / "runs.yaml"

    def write(*names):
        shared = {"model": str(base), "micro_batch_size": 4, "precision": "fp32", "trackers": ["none"]}
        entries = []
        for name in names:
            fresh = TrainConfig()
            own = {k: v for k, v in vars(recipes[name]).items() if v != getattr(fresh, k) and k not in shared}
            entries.append({k: list(v) if isinstance(v, tuple) else v for k, v in own.items()})
        file.write_text(yaml.safe_dump({**shared, "runs": entries}))

    write("plain", "short", "open")
    interrupt_at(monkeypatch, 3)
    with pytest.raises(SystemExit) as ended:
        main(["train-many", str(file)])
    assert ended.value.code == 130
    said = capsys.readouterr().err
    assert f"everything is saved. Go on with: llama-adapter train-many {file} --resume" in said
    assert "short: done after 2 steps, best validation loss" in said
    assert not (tmp_path / "plain" / "loss.png").exists()
    write("plain", "short", "open", "long")
    main(["train-many", str(file), "--resume", "--json"])
    out = json.loads(capsys.readouterr().out)
    assert list(out) == ["plain", "short", "open", "long"]
    assert out["plain"]["output_dir"] == str(tmp_path / "plain")
    for name in UNLIKE:
        assert_same_run(tmp_path / name, alone / name)


def test_each_can_be_resumed_alone(base, alone, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 2)
    with pytest.raises(Interrupted, match=r"Go on with: the same call, with resume=True in the recipes$"):
        train_many(Runs(unlike(base, tmp_path)))
    for name in ("plain", "long"):
        train(replace(unlike(base, tmp_path)[name], resume=True, micro_batch_size=3))
        assert_same_run(tmp_path / name, alone / name)


def test_a_loss_that_is_not_finite_stops_its_own_run_alone(base, alone, tmp_path, monkeypatch):
    recipes = unlike(base, tmp_path)
    recipes["bad"] = recipe(base, tmp_path / "plain.json", tmp_path / "bad", save_every=1)
    step = Run._gradients

    def poisoned(run, shares, stop):
        figures, stopping = step(run, shares, stop)
        for place, (expert, _) in enumerate(shares):
            if expert.name == "bad" and expert.progress.step == 1:
                figures[place] = ({"loss": math.nan}, 1.0)
        return figures, stopping

    monkeypatch.setattr(Run, "_gradients", poisoned)
    with pytest.raises(
        TrainingError, match=r"1 of 5 runs failed, all others are finished. bad: Loss nan .* at step 2 "
    ):
        train_many(Runs(recipes))
    for name in UNLIKE:
        assert_same_run(tmp_path / name, alone / name)
    assert not (tmp_path / "bad" / "loss.png").exists()
    assert (tmp_path / "bad" / "last" / WEIGHTS).is_file()


# the loss of mixed batches


def examples(count: int, seed: int, begin: tuple[int, ...] = ()) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        own = torch.randint(3, VOCAB, (6 + 2 * number,), generator=generator).tolist()
        ids = [*begin, *own]
        found.append(Encoded(ids, [IGNORE] * (len(ids) - 3) + ids[-3:], False))
    return found


PARTS = {"norms": True, "linear_scale": ("q_proj", "down_proj"), "linear_bias": ("v_proj",)}
LORA = {"lora_rank": 2, "lora_targets": ("q_proj", "up_proj")}


def mixed_model(family="llama", **parts):
    model = tiny_model(family)
    adapters = [
        adapted(model, "a", 1, adapter_len=4),
        adapted(model, "b", 2, adapter_len=2, adapter_layers=3, gate_activation="identity", **parts),
        adapted(model, "c", 3, adapter_len=6, adapter_layers=1, **(LORA if parts else {})),
    ]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for adapter in adapters:
            for key, parameter in adapter.named_parameters():
                if not key.startswith("layers."):
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, adapters


def gradients(adapters):
    return [[None if p.grad is None else p.grad.clone() for p in adapter.parameters()] for adapter in adapters]


@pytest.mark.parametrize("parts", [{}, PARTS], ids=["prompts", "parts"])
@pytest.mark.parametrize("make", [packed_rows, micro_batches])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3"])
def test_losses_and_gradients_are_those_of_each_expert_alone(family, make, parts):
    if parts and family == "gpt2":
        pytest.skip("its linears have other names")
    if make is packed_rows and family == "gemma2":
        pytest.skip("its sliding window is shorter")
    model, adapters = mixed_model(family, **parts)
    begin = tuple(range(20, 40))
    sets = [examples(2, 1, begin), examples(3, 2, begin), examples(1, 3)]
    flat = [(example, owner) for owner, some in enumerate(sets) for example in some]
    (batch,) = make([example for example, _ in flat], 9, owners=[owner for _, owner in flat])
    losses = owners_losses(model, batch, CPU, adapters)
    found = torch.zeros(3).index_add(0, torch.tensor(batch.owners), losses)
    found.sum().backward()
    mine = gradients(adapters)
    for owner, adapter in enumerate(adapters):
        for parameter in adapter.parameters():
            parameter.grad = None
        expected = sum(response_loss_of(model, adapter.name, example) for example in sets[owner])
        expected.backward()
        torch.testing.assert_close(found[owner], expected, atol=1e-5, rtol=1e-5)
        for got, parameter in zip(mine[owner], adapter.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, atol=1e-5, rtol=1e-4)


def response_loss_of(model, name, example):
    from llama_adapter import use_adapter

    with use_adapter(model, name):
        return response_loss(model, collate([example]), CPU)


@pytest.mark.parametrize("parts", [{}, PARTS], ids=["prompts", "parts"])
@pytest.mark.parametrize("make", [packed_rows, micro_batches])
def test_a_gradient_reaches_nobody_but_its_own_expert(make, parts):
    model, adapters = mixed_model(**parts)
    (batch,) = make([*examples(2, 1), *examples(2, 2), *examples(2, 3)], 9, owners=[0, 0, 1, 1, 2, 2])
    losses = owners_losses(model, batch, CPU, adapters)
    losses[torch.tensor(batch.owners) == 1].sum().backward()
    sums = [sum(float(g.abs().sum()) for g in some if g is not None) for some in gradients(adapters)]
    assert sums[0] == sums[2] == 0
    assert sums[1] > 0
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "adapter_" not in name)


def test_what_is_not_finite_in_one_expert_stays_there():
    model, adapters = mixed_model()
    with torch.no_grad():
        adapters[1].layers[2].prompt.fill_(math.nan)
    rows = [*examples(2, 1), *examples(2, 2), *examples(2, 3)]
    for make in (packed_rows, micro_batches):
        (batch,) = make(rows, 9, owners=[0, 0, 1, 1, 2, 2])
        losses = owners_losses(model, batch, CPU, adapters)
        owners = torch.tensor(batch.owners)
        assert losses[owners == 1].isnan().all()
        assert losses[owners != 1].isfinite().all()
        losses.sum().backward()
        assert all(g.isfinite().all() for some in gradients([adapters[0], adapters[2]]) for g in some)


def test_rows_mix_owners_and_keep_each_one_s_together():
    begin = tuple(range(20, 40))
    some = [*examples(3, 1, begin), *examples(3, 2, begin)]
    rows = list(packed_rows(some, 4, owners=[0, 1, 0, 1, 0, 1]))
    assert [row.owners for row in rows] == [(0, 1), (1,)]
    assert [part.prefix for part in rows[0].segments.parts] == [20, 0]
    assert sum(len(row.targets) for row in rows) == len(pack(some).targets) == 18


def test_below_the_lowest_adapted_layer_experts_share_what_they_begin_with():
    begin = tuple(range(20, 40))
    some, owners = [*examples(2, 1, begin), *examples(2, 2, begin), *examples(1, 3, begin)], [0, 0, 1, 1, 2]
    (apart,) = packed_rows(some, 9, owners=owners)
    (row,) = packed_rows(some, 9, owners=owners, shared_layers=[1, 2, 1])
    assert row.segments.layers == 1
    assert [part.prefix for part in apart.segments.parts] == [21, 20, 0]  # by chance a token more
    assert row.input_ids.shape[1] == 20 + sum(len(e.input_ids) - 20 for e in some) < apart.input_ids.shape[1]
    assert torch.equal(row.input_ids[:, row.segments.source], apart.input_ids)
    assert torch.equal(row.position_ids[:, row.segments.source], apart.position_ids)
    assert torch.equal(row.predicting, apart.predicting)
    assert (row.spans, row.losses, row.segments.above) == (apart.spans, apart.losses, apart.segments)
    (none,) = packed_rows(some, 9, owners=owners, shared_layers=[1, 0, 1])
    assert none.input_ids.shape == apart.input_ids.shape


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gemma2", "gpt_oss"}))
def test_sharing_the_lowest_layers_is_exact(family):
    model = tiny_model(family)
    adapters = [adapted(model, name, seed, adapter_layers=2) for seed, name in enumerate("ab", start=1)]
    if not tell_layers(model):
        assert family == "gpt2"
        return
    begin = tuple(range(20, 23))
    some = [*examples(2, 1, begin), *examples(2, 2, begin)]
    if why_not_packed(model, max(len(e.input_ids) for e in some)):
        pytest.skip("its sliding window is shorter")
    row = pack_sections([[(0, some[:2]), (1, some[2:])]], 1)
    assert row.segments.layers == 1
    found = owners_losses(model, row, CPU, adapters)
    found.sum().backward()
    mine = gradients(adapters)
    for owner, adapter in enumerate(adapters):
        for parameter in adapter.parameters():
            parameter.grad = None
        expected = sum(response_loss_of(model, adapter.name, example) for example in some[2 * owner : 2 * owner + 2])
        expected.backward()
        torch.testing.assert_close(found[owner], expected, atol=1e-5, rtol=1e-5)
        for got, parameter in zip(mine[owner], adapter.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, atol=1e-5, rtol=1e-4)


# the file


def write_runs(folder: Path, base: Path, data: Path, runs=None, **shared) -> Path:
    runs = [{"output_dir": str(folder / "a")}, {"output_dir": str(folder / "b")}] if runs is None else runs
    common = {"model": str(base), "data": [str(data)], "trackers": ["none"], **shared}
    file = folder / "runs.yaml"
    file.write_text(yaml.safe_dump({**common, "runs": runs}))
    return file


def entry(folder, **settings):
    return {"output_dir": str(folder), **settings}


def bad_files(folder, base):
    a, b = folder / "a", folder / "b"
    return {
        "share the folder": {"runs": [entry(a), entry(a, name="other")]},
        "both read standard input": {"runs": [entry(a, data=["-"]), entry(b, data=["-"])]},
        "two runs have the name 'a': tell them apart with 'name:'": {"runs": [entry(a), entry(b / "a")]},
        "lies in that of a: put it beside": {"runs": [entry(a), entry(a / "b")]},
        "model is 'bundled' in b and": {"runs": [entry(a), entry(b, model="bundled")]},
        "precision is 'bf16' in b and 'auto' in a: it must be alike": {"runs": [entry(a), entry(b, precision="bf16")]},
        "micro_batch_size is 2 in b and 8 in a": {"runs": [entry(a), entry(b, micro_batch_size=2)]},
        "run 2 (b): unknown key 'lrr'; did you mean 'lr'?": {"runs": [entry(a), entry(b, lrr=1.0)]},
        "run 2 (b): unknown key 'learning_rate'; did you mean 'lr'?": {"runs": [entry(a), entry(b, learning_rate=1)]},
        "run 2: unknown key 'outptu_dir'; did you mean 'output_dir'?": {"runs": [entry(a), {"outptu_dir": str(b)}]},
        "run 2 (b): unknown key 'nmae'; did you mean 'name'?": {"runs": [entry(a), entry(b, nmae="x")]},
        "runs.yaml, beside 'runs': unknown key 'dta'; did you mean 'data'?": {"dta": "x"},
        "unknown key 'foo'; known: model, data, val_data, val_size, template, ": {"foo": 1},
        "push_to_hub.": {"foo": 1},
        "runs is []; it must be a list of recipes": {"runs": []},
        "runs is 'a.yaml'; it must be a list": {"runs": "a.yaml"},
        "run 1 is 'a.yaml'; it must be 'key: value' lines": {"runs": ["a.yaml"]},
        "run 2 has no output_dir": {"runs": [entry(a), {"lr": 0.1}]},
        "output_dir is each run's own": {"output_dir": "x"},
        "run 2 (b): lr is -1.0; it must be above 0": {"runs": [entry(a), entry(b, lr=-1.0)]},
        "run 1 (a): resume is a flag of train-many": {"resume": True},
        "Adapter name 'my run' is malformed": {"runs": [entry(folder / "my run")]},
        "compile knows one expert": {"compile": True},
        "run 1 (a): python:x.py:f is code, which a file may not": {
            "condition": "image",
            "tower": "python:x.py:f",
        },
        "a: wandb follows one run at a time": {"trackers": ["wandb"]},
        "share push_to_hub me/x": {"push_to_hub": "me/x"},
        "b: adapter_layers is 9, but the base has 3 layers": {"runs": [entry(a), entry(b, adapter_layers=9)]},
        "b: No record": {"runs": [entry(a), entry(b, data=str(base / "empty.jsonl"))]},
    }


@pytest.mark.parametrize("sentence", bad_files(Path("x"), Path("x")))
def test_what_cannot_be_is_one_sentence_before_weights_are_read(base, data, tmp_path, monkeypatch, fail, sentence):
    (base / "empty.jsonl").write_text("")
    monkeypatch.setattr("llama_adapter.training.loop.load_base", lambda *_: pytest.fail("read the weights"))
    found = fail("train-many", write_runs(tmp_path, base, data, **bad_files(tmp_path, base)[sentence]))
    assert sentence in found or (sentence == "b: No record" and "b: " in found), found
    assert not (tmp_path / "a").exists()


def test_flags_that_cannot_be(base, data, tmp_path, fail):
    file = write_runs(tmp_path, base, data)
    assert "No run of" in fail("train-many", file, "--resume")
    assert "exclude each other" in fail("train-many", file, "--resume", "--overwrite")
    assert "cannot be read" in fail("train-many", tmp_path / "nothing.yaml")
    plain = tmp_path / "plain.yaml"
    plain.write_text("lr: 0.1\n")
    assert "has no 'runs'" in fail("train-many", plain)
    for command in ("train", "validate"):
        assert "did you mean --lr?" in fail(command, "--learning-rate", "0.1")
        assert f"train them together with llama-adapter train-many {file}, or" in fail(command, file)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("precious")
    assert "b: " in (found := fail("train-many", file, "--overwrite"))
    assert "holds other files" in found


def test_what_is_said_of_a_run_s_data_names_it(base, tmp_path, caplog):
    lines = [{"instruction": f"Say {i}", "output": "sun", "note": 1} for i in range(40)]
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{}, *lines, {}]))
    changes = {"skip_bad_records": True, "max_steps": 6, "template": None}
    streaming = {**changes, "streaming": True, "val_size": 2, "shuffle_buffer": 8}
    recipes = {
        "plain": recipe(
            base, tmp_path / "a.jsonl", tmp_path / "plain", **changes, val_data=[str(tmp_path / "a.jsonl")]
        ),
        "stream": recipe(base, tmp_path / "b.jsonl", tmp_path / "stream", **streaming),
        "other": recipe(base, tmp_path / "b.jsonl", tmp_path / "other", skip_bad_records=True),
    }
    caplog.set_level("INFO", "llama_adapter")
    train_many(Runs(recipes))
    said = [record.getMessage() for record in caplog.records]
    about = [text for text in said if any(word in text for word in ("skipped", "note:", "validation:", "data:", "few"))]
    assert {text.partition(": ")[0] for text in about} == set(recipes)
    assert any(text.startswith("plain: note: the key 'note'") for text in said)
    assert any(text.startswith("plain: note: validation: ") for text in said)
    skipped = [text for text in said if text.startswith("stream: skipped: ")]
    assert sum("record 1:" in text for text in skipped) == 1
    assert sum("record 42:" in text for text in skipped) == 2, "in what was looked at, and in its steps"
    caplog.clear()
    train(replace(recipes["plain"], overwrite=True))
    assert any(record.getMessage().startswith("note: the key 'note'") for record in caplog.records)


def test_what_is_shared_gives_way_to_what_is_a_run_s_own(base, data, tmp_path):
    runs = [entry(tmp_path / "a", base_lr="3e-3"), entry(tmp_path / "b", name="poet", max_steps=3)]
    found = load_runs(str(write_runs(tmp_path, base, data, runs, lr=0.5, epochs=7))).recipes
    assert list(found) == ["a", "poet"]
    assert found["a"].peak_lr == pytest.approx(3e-3 * 64 / 256)
    assert (found["poet"].lr, found["poet"].max_steps, found["a"].epochs) == (0.5, 3, 7)


def test_runs_from_python_are_checked_too(base, data, tmp_path):
    config = recipe(base, data, tmp_path / "out")
    with pytest.raises(ConfigError, match="share the folder"):
        Runs({"a": config, "b": replace(config, seed=1)})
    with pytest.raises(ConfigError, match="runs is empty"):
        Runs({})


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("runs: [{output_dir: a}]\nruns: [{output_dir: b}]\n", "runs", 2),
        ("lr: 1\nruns:\n- &a {output_dir: a}\n- <<: *a\n  output_dir: b\n  seed: 1\n  seed: 2\n", "seed", 7),
    ],
)
def test_a_key_that_stands_twice_is_not_dropped_in_silence(tmp_path, text, key, line):
    (tmp_path / "runs.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"has '{key}' twice in one place, the second in line {line}"):
        load_runs(str(tmp_path / "runs.yaml"))
    (tmp_path / "runs.yaml").write_text("runs:\n- &a {output_dir: a, lr: 1}\n- <<: *a\n  output_dir: b\n  lr: 2\n")
    assert [c.lr for c in load_runs(str(tmp_path / "runs.yaml")).recipes.values()] == [1, 2]


def test_a_run_does_not_start_from_what_another_is_writing(base, data, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "plain")
    plain = recipe(base, data, tmp_path / "plain", overwrite=True)
    for part in ("", "last"):
        start = recipe(base, data, tmp_path / "b", init_from=str(tmp_path / "a" / part), adapter_len=None)
        with pytest.raises(ConfigError, match=r"b goes on from .*, which plain writes in this run: train plain first"):
            Runs({"plain": plain, "b": start})
        Runs({"b": start})


def test_a_run_is_not_called_like_another_s_reference(base, data, tmp_path):
    recipes = {name: recipe(base, data, tmp_path / name) for name in ("a.reference", "b")}
    Runs(recipes)
    with pytest.raises(ConfigError, match=r"a.reference is what the reference of a is called"):
        Runs({**recipes, "a": recipe(base, data, tmp_path / "a")})


def test_overwrite_starts_all_anew(base, data, tmp_path, fail, capsys):
    file = write_runs(tmp_path, base, data, max_steps=1, val_size=2, adapter_layers=2)
    main(["train-many", str(file)])
    assert f"adapter in {tmp_path / 'b'}" in capsys.readouterr().out
    assert "a: " in (found := fail("train-many", file))
    assert "already holds a run: pass --resume" in found
    main(["train-many", str(file), "--overwrite"])
    assert [line["step"] for line in whole_lines(tmp_path / "a" / "metrics.jsonl")] == [0, 1, 1]


def test_a_run_may_go_on_from_an_adapter_and_log_to_tensorboard(base, alone, tmp_path):
    start = alone / "plain"
    runs = [
        entry(tmp_path / "a", init_from=str(start), max_steps=1),
        entry(tmp_path / "b", adapter_layers=2, max_steps=2),
    ]
    file = write_runs(tmp_path, base, alone / "plain.json", runs, trackers=["tensorboard"], val_size=2)
    results = train_many(load_runs(str(file)))
    assert results["a"].base_val_loss != results["b"].base_val_loss  # b's is the bare base's
    assert all(list((tmp_path / name / "tensorboard").glob("events.*")) for name in "ab")


# slow


@pytest.mark.slow
def test_two_processes_end_where_one_does(base, alone, tmp_path):
    recipes = unlike(base, tmp_path)
    code = (
        "import sys, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom test_many import unlike, Runs, train_many\n"
        "train_many(Runs(unlike(Path(sys.argv[2]), Path(sys.argv[3]))))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    command += [str(Path(__file__).parent), str(base), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in recipes:
        assert_same_run(tmp_path / name, alone / name)


@pytest.mark.slow
def test_pictures_and_preferences_among_them(base, alone, tmp_path):
    from PIL import Image

    seen, pairs = [], []
    for number in range(12):
        record = {"instruction": f"colour {number}?", "output": ["red", "blue"][number % 2]}
        if number % 3:
            record["image"] = str(tmp_path / f"{number}.png")
            Image.new("RGB", (16, 16), record["output"]).save(record["image"])
        seen.append(record)
        pairs.append({"instruction": f"Repeat {number}", "chosen": "sun " * (1 + number % 3), "rejected": "no moon"})
    (tmp_path / "seen.json").write_text(json.dumps(seen))
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))

    def made(folder):
        return {
            "text": recipe(base, alone / "plain.json", folder / "text"),
            "pairs": recipe(base, tmp_path / "pairs.json", folder / "pairs", method="dpo", seed=1),
            "more": recipe(
                base, tmp_path / "pairs.json", folder / "more", method="dpo", init_from=str(alone / "plain"),
                adapter_len=None, adapter_layers=None,
            ),
            "seen": recipe(
                base, tmp_path / "seen.json", folder / "seen", condition="image", tower="bundled", absent="learnt"
            ),
        }  # fmt: skip

    train_many(Runs(made(tmp_path / "many")))
    for name, config in made(tmp_path / "single").items():
        train(config)
        assert_same_run(tmp_path / "many" / name, tmp_path / "single" / name)


def test_a_run_s_name_stands_before_what_its_own_thread_says(caplog):
    log = logging.getLogger("llama_adapter.training.feed")
    with naming("poet", ["poet", "clerk"]):
        log.warning("two records are skipped")
        other = threading.Thread(target=log.warning, args=("another run's own",))
        other.start()
        other.join()
        with naming("clerk", ["poet", "clerk"]):
            log.warning("none")
    log.warning("done")
    assert caplog.messages == ["poet: two records are skipped", "another run's own", "clerk: none", "done"]


@pytest.mark.slow
def test_thirty_two_experts_each_end_where_their_single_run_ends(base, tmp_path):
    def made(folder):
        folder.mkdir()
        return {
            f"e{i}": recipe(
                base, write_data(folder / f"{i}.json", 9 + i % 7), folder / f"e{i}", adapter_len=1 + i % 5,
                adapter_layers=1 + i % 3, batch_size=2 + i % 6, lr=0.005 * (1 + i % 4), seed=i, max_steps=2 + i % 5,
                micro_batch_size=16, val_size=2, gate_activation=("tanh", "identity")[i % 2],
            )
            for i in range(32)
        }  # fmt: skip

    train_many(Runs(made(tmp_path / "many")))
    for name, config in made(tmp_path / "alone").items():
        train(config)
        assert_same_run(tmp_path / "many" / name, tmp_path / "alone" / name)
