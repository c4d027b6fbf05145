"""Bases cut head by head over several processes: forwards, gradients and runs are those of one process."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from runs import WORDS, recipe, tiny_tokenizer, write_base, write_data
from safetensors.torch import load_file
from tiny import tiny_config, tiny_model
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from llama_adapter import AdapterConfig, add_adapter
from llama_adapter.base import load_config
from llama_adapter.errors import TrainingError, UnsupportedModelError
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.loop import train
from llama_adapter.training.sharding import check_strategy

FAMILIES = ("llama", "qwen3", "gemma2", "mixtral")
OTHERS = ("qwen3_moe", "gpt_neox", "olmo2", "phi3", "granitemoe")
"""Mixtures of experts, fused projections, and attention that has all heads on each process."""
WEIGHTS = "adapter_model.safetensors"
FORWARDS = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tiny import tokens
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from llama_adapter import AdapterConfig, add_adapter, use_adapter
from llama_adapter.errors import UnsupportedModelError
from llama_adapter.formats.native import save_adapter
from llama_adapter.inference.choice import Row
from llama_adapter.inference.engine import Engine
torch.distributed.init_process_group("gloo")
rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
def answers(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    for seed, (name, length) in enumerate({"a": 4, "b": 2}.items()):
        torch.manual_seed(seed + 100 * rank * bool(options))  # the first process's counts
        adapter = add_adapter(model, AdapterConfig(adapter_len=length, adapter_layers=2, gate_scale=True), name)
        torch.manual_seed(seed)
        with torch.no_grad():
            for layer in adapter.layers.values():
                layer.gate.copy_(torch.randn(len(layer.gate)))
    ids = tokens()
    parameters = [p for p in model.parameters() if p.requires_grad]
    names = ["a", "b", None][:len(ids)]
    with torch.no_grad():
        found = [model(ids).logits, model(ids, adapter_names=names).logits, model(ids, adapter_names=None).logits]
    model(ids, labels=ids, adapter_names=names).loss.backward()
    condition = torch.full((len(ids), model.config.hidden_size), 0.1)
    with use_adapter(model, "b", condition.requires_grad_(True)):
        model(ids, labels=ids).loss.backward()
    found += [*(p.grad for p in parameters), condition.grad]
    written = model.generate(ids, max_new_tokens=6, do_sample=False, adapter_names="a")
    cut = [m.weight for m in model.modules() if isinstance(getattr(m, "weight", None), DTensor)]
    return model, parameters, found, written, cut
for folder in map(Path, sys.argv[2:]):
    _, _, expected, written, _ = answers(folder)
    distributed = DistributedConfig(tp_size=processes, tp_plan="auto")
    model, parameters, found, again, cut = answers(folder, distributed_config=distributed)
    assert cut or folder.name == "granitemoe"
    assert all(not isinstance(p, DTensor) for p in parameters)
    for i, (mine, one) in enumerate(zip(found, expected, strict=True)):
        error, size = float((mine - one).abs().max()), float(one.abs().max())
        assert 0 < size and error < min(1e-5, 1e-4 * size + 1e-8), (folder, i, error, size)
    assert all(float(p.grad.abs().min()) > 0 for p in parameters if p.dim() == 1), "every gate learns"
    assert torch.equal(written, again)
    rows = [Row([5, 6, 7], name, max_new_tokens=8, temperature=2.0) for name in ("a", None)]
    drawn = [None] * processes
    torch.distributed.all_gather_object(drawn, Engine(model).generate(rows))
    assert all(answer == drawn[0] for answer in drawn), "every process draws the same tokens"
    if folder.name == "llama":
        try:
            add_adapter(model.model, AdapterConfig(adapter_len=2, adapter_layers=1), "inner")
        except UnsupportedModelError as error:
            assert "pass the whole model" in str(error)
        else:
            raise AssertionError("a part of a cut base is taken for a whole one")
    save_adapter(model, folder.parent / f"saved-{folder.name}-{rank}", "a")
torch.distributed.destroy_process_group()
"""
RUNS = """
import json, sys
from pathlib import Path
from torch.distributed.tensor import DTensor
from llama_adapter.training import loop
from llama_adapter.training.config import TrainConfig
step = loop.Run._step
def watched(run, *args):
    if run.experts[0].progress.step == stop:
        raise ZeroDivisionError
    base = [p for p in run.model.parameters() if not p.requires_grad]
    assert any(isinstance(p, DTensor) for p in base)
    return step(run, *args)
loop.Run._step = watched
stop, *groups = json.loads(Path(sys.argv[1]).read_text())
for group in groups:
    try:
        loop.train_together({name: TrainConfig(**values) for name, values in group.items()})
    except ZeroDivisionError:
        assert stop >= 0
"""


def launch(processes: int, script: Path, text: str, *arguments: object) -> None:
    script.write_text(text)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*command, str(script), *map(str, arguments)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-9000:]


def write(folder: Path, family: str) -> Path:
    """A tiny base with eight heads, four for keys and values where these are fewer: four processes can share."""
    if not folder.exists():
        config, tokenizer = tiny_config(family), tiny_tokenizer()
        config.num_attention_heads, config.max_position_embeddings = 8, 1024
        config.vocab_size = len(tokenizer)
        if hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = 4
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("tensor-parallel")
    write_data(root / "data.json")
    return root


def forwards(root: Path, processes: int, families: tuple[str, ...]) -> None:
    folders = [write(root / family, family) for family in families]
    launch(processes, root / "forwards.py", FORWARDS, Path(__file__).parent, *folders)
    for family in families:
        files = [(root / f"saved-{family}-{rank}" / WEIGHTS).read_bytes() for rank in range(processes)]
        assert len(set(files)) == 1
        saved = load_file(root / f"saved-{family}-0" / WEIGHTS)
        assert {len(gate) for key, gate in saved.items() if key.endswith(".gate")} == {8}


def runs(root: Path, processes: int, *groups: dict[str, TrainConfig], stop: int = -1) -> None:
    cut = [{name: asdict(replace(r, tensor_parallel=True)) for name, r in group.items()} for group in groups]
    (root / "runs.json").write_text(json.dumps([stop, *cut]))
    launch(processes, root / "runs.py", RUNS, root / "runs.json")


def single(root: Path, name: str, family: str, **changes: object) -> TrainConfig:
    """The recipe of a run beside one of a single process, which is done here."""
    config = recipe(write(root / family, family), root / "data.json", root / f"one-{name}")
    config = replace(config, **changes)
    if not (root / f"one-{name}").exists():
        train(config)
    return replace(config, output_dir=str(root / f"cut-{name}"))


def compare(root: Path, *names: str) -> None:
    for name in names:
        for part in ("", "last"):
            found, wanted = (load_file(root / f"{kind}-{name}" / part / WEIGHTS) for kind in ("cut", "one"))
            assert found.keys() == wanted.keys()
            for key, tensor in wanted.items():
                torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=1e-5)
        moved = max(float(tensor.abs().max()) for key, tensor in found.items() if "gate" in key)
        assert moved > 0.01


def test_two_processes_are_one(root):
    forwards(root, 2, ("llama",))


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "families"), [(4, FAMILIES[1:]), (2, OTHERS)])
def test_families_and_numbers_of_processes_are_one(root, processes, families):
    forwards(root, processes, families)


@pytest.mark.slow
def test_runs_of_families_settings_and_many_experts_end_where_one_process_does(root):
    lines = [{"instruction": f"Repeat {word}", "chosen": word * (1 + i % 3), "rejected": "no"} for i, word in
             enumerate(WORDS * 3)]  # fmt: skip
    (root / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    short = {"max_steps": 3, "eval_every": 2}
    alone = {family: single(root, family, family, **short) for family in FAMILIES}
    alone["padded"] = single(root, "padded", "llama", **short, packing=False, gradient_checkpointing=True)
    alone["dpo"] = single(root, "dpo", "llama", **short, method="dpo", data=(str(root / "pairs.jsonl"),))
    alone["started"] = single(root, "started", "llama", **short, prompt_init_text="The sun.", max_grad_norm=0.01)
    many = {"a": single(root, "a", "llama", **short), "b": single(root, "b", "llama", adapter_len=2, adapter_layers=3)}
    runs(root, 2, *({"default": config} for config in alone.values()), many)
    compare(root, *alone, *many)


@pytest.mark.slow
def test_a_run_goes_on_with_a_whole_base(root):
    config = single(root, "resumed", "llama")
    runs(root, 2, {"default": config}, stop=3)
    train(replace(config, resume=True))
    compare(root, "resumed")


def cut(family: str, processes: int):
    """A base as `add_adapter` sees one that is cut."""
    model = tiny_model(family)
    model._tp_size = processes
    return model


@pytest.mark.parametrize(
    ("family", "processes", "settings", "message"),
    [
        ("llama", 4, {}, "4 processes cannot share its 2 key-value heads evenly"),
        ("llama", 3, {}, "3 processes cannot share its 4 attention heads evenly"),
        ("llama", 2, {"norms": True}, "norms, scales, biases and LoRA would each need a cut of their own"),
        ("llama", 2, {"lora_rank": 2, "lora_targets": ("v_proj",)}, "LoRA.*accelerate launch --use_fsdp"),
        ("cohere", 2, {}, "its attention's q_norm has all heads"),
    ],
)
def test_a_base_that_cannot_be_cut_for_adapters_is_refused(family, processes, settings, message):
    with pytest.raises(UnsupportedModelError, match=rf"cut head by head over {processes} processes.*{message}"):
        add_adapter(cut(family, processes), AdapterConfig(adapter_len=4, adapter_layers=2, **settings))


def test_clipped_projections_are_refused():
    with pytest.raises(UnsupportedModelError, match="transformers cannot clip queries and keys"):
        add_adapter(cut("olmo", 2), AdapterConfig(adapter_len=4, adapter_layers=2))


@pytest.mark.parametrize(("processes", "flags"), [("2", []), ("two", []), ("two", ["--tensor-parallel"])])
def test_an_environment_that_speaks_of_processes_nobody_started_is_one_sentence(processes, flags, tmp_path):
    base, data = write_base(tmp_path / "base"), write_data(tmp_path / "data.json")
    command = [sys.executable, "-m", "llama_adapter", "train", "--model", base, "--data", data]
    done = subprocess.run(
        [*map(str, command), "--output-dir", str(tmp_path / "out"), *flags],
        capture_output=True, text=True, check=False, env={**os.environ, "WORLD_SIZE": processes},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("Error: ") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_other_ways_of_cutting_are_refused():
    whole, packed, twice = cut("olmo2", 3), cut("llama", 2), cut("llama", 2)
    add_adapter(whole, AdapterConfig(adapter_len=4, adapter_layers=2))  # each process has all heads of this family
    packed.tp_plan = {"model.layers.*.self_attn.q_proj": "packed_colwise"}
    with pytest.raises(UnsupportedModelError, match=r"in a way that is not known here \(packed_colwise\)"):
        add_adapter(packed, AdapterConfig(adapter_len=4, adapter_layers=2))
    twice.config.distributed_config = DistributedConfig(tp_size=2, fsdp_size=2)
    with pytest.raises(UnsupportedModelError, match="it is sharded in another way too"):
        add_adapter(twice, AdapterConfig(adapter_len=4, adapter_layers=2))


TWO = {"WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "settings", "message"),
    [
        ({}, {}, "this run is one: launch it with torchrun --nproc_per_node 2"),
        ({**TWO, "ACCELERATE_USE_FSDP": "true"}, {}, "tensor_parallel and FSDP exclude each other"),
        ({**TWO, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "parallelism_config is not read.*--tensor-parallel"),
        (TWO, {"load_in_4bit": True}, "this recipe has load_in_4bit.*without tensor_parallel"),
        (TWO, {"base_precision": "fp8"}, "this recipe has base_precision fp8"),
        (TWO, {"compile": True}, "this recipe has compile"),
        (TWO, {"norms": True}, "knows no norms"),
        ({"WORLD_SIZE": "64"}, {}, "64 processes cannot share"),
    ],
)
def test_runs_that_cannot_be_are_refused(environment, settings, message, monkeypatch):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(TrainingError, match=message):
        check_strategy([TrainConfig(tensor_parallel=True, **settings)], load_config("bundled"))


def test_a_family_without_a_plan_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="no sharding plan for the family 'gpt2': launch without tensor_parallel"):
        check_strategy([TrainConfig(tensor_parallel=True)], tiny_config("gpt2"))


def test_the_command_line_says_it_before_weights_are_read(tmp_path, monkeypatch, capsys):
    from llama_adapter.cli import main

    monkeypatch.setattr("llama_adapter.training.loop.load_base", None)
    base, data = write_base(tmp_path / "base"), write_data(tmp_path / "data.json")
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--model", str(base), "--data", str(data), "--output-dir", str(tmp_path / "out"),
              "--tensor-parallel"])  # fmt: skip
    assert stopped.value.code == 2
    assert "torchrun --nproc_per_node 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
