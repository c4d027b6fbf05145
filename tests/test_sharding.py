"""Bases in parts (FSDP2): several processes end where one does, and what cannot be is said before weights are read."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import WORDS, recipe, tiny_tokenizer, write_base, write_data
from safetensors.torch import load_file
from tiny import adapted, tiny_config, tiny_model, tokens
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

from llama_adapter.base import load_config
from llama_adapter.core.families import attention_modules
from llama_adapter.errors import TrainingError
from llama_adapter.training import sharding
from llama_adapter.training.config import TrainConfig, load_recipe
from llama_adapter.training.loop import train
from llama_adapter.training.processes import start_accelerator
from llama_adapter.training.sharding import check_strategy

FAMILIES = ("llama", "qwen3", "gemma2", "mixtral")
SCRIPT = """
import json, os, sys, torch
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from runs import recipe
from torch.distributed.tensor import DTensor
from llama_adapter.training import loop
root, out, stop, families = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5:]
step, seen = loop.Run._step, {}
def watched(run, *args):
    if run.experts[0].progress.step == stop:
        raise ZeroDivisionError
    done = step(run, *args)
    base = {p for p in run.model.parameters() if not p.requires_grad}
    seen[run.shared.model] = (sum(p.to_local().numel() for p in base if isinstance(p, DTensor)),
                              sum(p.numel() for p in base), sum(not isinstance(p, DTensor) for p in base))
    return done
loop.Run._step = watched
for family in families:
    config = recipe(root / family, root / "data.json", root / f"{family}-{out}")
    config = replace(config, **json.loads(os.environ["CHANGES"]))
    if Path(config.output_dir).exists():
        config = replace(config, resume=True)
    try:
        loop.train(config)
    except ZeroDivisionError:
        assert stop >= 0
    here, whole, others = seen[str(root / family)]
    assert others == 0, "every weight of the base is sharded"
    assert here < 1.2 * whole / int(os.environ["WORLD_SIZE"]) + 2000, (here, whole)
"""


def launch(processes: int, changes: dict, *arguments: object) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--main_process_port", "0"]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CHANGES": json.dumps(changes)},
    )
    assert done.returncode == 0, done.stderr[-9000:]


def shard(root: Path, processes: int, out: str, families: tuple[str, ...], stop: int = -1, **changes: object) -> None:
    script = root / "script.py"
    script.write_text(SCRIPT)
    launch(processes, changes, script, Path(__file__).parent, root, out, stop, *families)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny base of each family, data, and a run of one process, which has no shards."""
    root = tmp_path_factory.mktemp("sharding")
    write_data(root / "data.json")
    for family in FAMILIES:
        config, tokenizer = tiny_config(family), tiny_tokenizer()
        config.vocab_size, config.max_position_embeddings = len(tokenizer), 1024
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
    return root


def whole(root: Path, family: str) -> dict[str, torch.Tensor]:
    """What one process ends with."""
    if not (root / f"{family}-one").exists():
        train(recipe(root / family, root / "data.json", root / f"{family}-one"))
    return load_file(root / f"{family}-one" / "last" / "adapter_model.safetensors")


def compare(root: Path, family: str, out: str) -> None:
    found = load_file(root / f"{family}-{out}" / "last" / "adapter_model.safetensors")
    for key, tensor in whole(root, family).items():
        torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=1e-5)
    assert max(float(tensor.abs().max()) for key, tensor in found.items() if "gate" in key) > 0.01


def test_a_sharded_base_ends_where_a_whole_one_does(root):
    shard(root, 2, "quick", ("llama",))
    compare(root, "llama", "quick")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_families_and_numbers_of_processes_end_alike(root, processes):
    shard(root, processes, str(processes), FAMILIES)
    for family in FAMILIES:
        compare(root, family, str(processes))


SETTINGS = {
    "parts": {"norms": True, "lora_rank": 2, "lora_targets": ["v_proj"], "linear_bias": ["down_proj"],
              "gradient_checkpointing": True},
    "padded": {"packing": False, "micro_batch_size": 1},
    "dpo": {"method": "dpo", "data": ["pairs.jsonl"]},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_other_settings_are_as_without_shards(root, name):
    changes = dict(SETTINGS[name])
    if "data" in changes:
        lines = [{"instruction": f"Repeat {word}", "chosen": word * (1 + i % 3), "rejected": "no"} for i, word in
                 enumerate(WORDS * 3)]  # fmt: skip
        (root / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        changes["data"] = [str(root / "pairs.jsonl")]
    train(replace(recipe(root / "llama", root / "data.json", root / f"llama-{name}-one"), **changes))
    shard(root, 2, name, ("llama",), **changes)
    found, wanted = (load_file(root / f"llama-{label}" / "last" / "adapter_model.safetensors")
                     for label in (name, f"{name}-one"))  # fmt: skip
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(2, 4), (4, 2)])
def test_a_run_goes_on_with_another_number_of_processes(root, first, second):
    out = f"{first}-then-{second}"
    shard(root, first, out, ("llama", "mixtral"), stop=4)
    shard(root, second, out, ("llama", "mixtral"))
    for family in ("llama", "mixtral"):
        compare(root, family, out)


def test_what_accelerate_s_own_sharding_asks_for_is_not_asked(monkeypatch):
    """Its defaults, which want a GPU, and what its second version refuses."""
    for version, changes in (("1", {}), ("2", {"FSDP_FORWARD_PREFETCH": "true"})):
        settings = {
            "FSDP_VERSION": version,
            "FSDP_SYNC_MODULE_STATES": "true",
            "ACCELERATE_USE_FSDP": "true",
            **changes,
        }
        for key, value in settings.items():
            monkeypatch.setenv(key, value)
        assert start_accelerator().device.type == "cpu"
        assert sharding.is_sharded()


def test_processes_without_examples_of_their_own_keep_step(monkeypatch):
    class Accelerator:
        device = torch.device("cpu")

        def gather(self, counts):
            return torch.cat([counts, torch.tensor([3])])

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert list(sharding.in_step("ab", Accelerator(), lambda: iter("s"))) == [("a", 1.0), ("b", 1.0), ("b", 0.0)]
    assert list(sharding.in_step("", Accelerator(), lambda: iter("s"))) == [("s", 0.0)] * 3
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert list(sharding.in_step("ab", Accelerator(), lambda: iter("s"))) == [("a", 1.0), ("b", 1.0)]


@pytest.mark.parametrize(
    ("device", "flag", "calls"), [("cpu", "true", [(-3, 2**20)]), ("cpu", "false", []), ("cuda", "true", [])]
)
def test_freed_layers_go_back_to_the_system_on_a_cpu_alone(device, flag, calls, monkeypatch):
    found = []
    libraries = SimpleNamespace(CDLL=lambda name: SimpleNamespace(mallopt=lambda *values: found.append(values)))
    monkeypatch.setattr(sharding, "ctypes", libraries)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", flag)
    sharding.give_freed_memory_back(torch.device(device))
    assert found == calls
    monkeypatch.setattr(sharding, "ctypes", SimpleNamespace(CDLL=lambda name: object()))
    sharding.give_freed_memory_back(torch.device(device))  # a C library without it


@torch.no_grad()
def test_a_class_of_fsdp_s_own_does_not_hide_the_family():
    model, renamed = (
        tiny_model("gemma2", attn_implementation="eager"),
        tiny_model("gemma2", attn_implementation="eager"),
    )
    for module in attention_modules(renamed):
        kind = type(module)
        module.__class__ = type(f"FSDP{kind.__name__}", (kind,), {})  # as fully_shard
        type(module).__module__ = "torch.distributed.fsdp._fully_shard._fully_shard"
    adapted(model), adapted(renamed)
    assert torch.equal(model(tokens()).logits, renamed(tokens()).logits)


@torch.no_grad()
def test_norms_of_a_class_of_fsdp_s_own_have_their_weights_of_the_adapter():
    model, renamed = tiny_model(), tiny_model()
    for found in (model, renamed):
        adapter = adapted(found, norms=True)
        for key, parameter in adapter.named_parameters():
            if key.startswith("norms."):
                parameter += 0.5
    for module in (renamed.model.norm, renamed.model.layers[0].input_layernorm):
        module.__class__ = type("FSDPNorm", (FSDPModule, type(module)), {})  # as fully_shard
    assert torch.equal(model(tokens()).logits, renamed(tokens()).logits)


@pytest.mark.parametrize(
    ("environment", "settings", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "FSDP shards the base over several processes, and this run is one"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed is not supported.*accelerate launch --config_file"),
        ({"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}, {"load_in_4bit": True}, "this recipe has load_in_4bit"),
        ({"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}, {"compile": True}, "this recipe has compile"),
        ({"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}, {"base_precision": "fp8"}, "has base_precision fp8"),
    ],
)
def test_what_cannot_be_sharded_is_refused(environment, settings, message, monkeypatch):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(TrainingError, match=message):
        check_strategy([TrainConfig(**settings)], load_config("bundled"))


def test_the_command_line_says_it_before_weights_are_read(tmp_path, monkeypatch, capsys):
    from llama_adapter.cli import main

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr("llama_adapter.training.loop.load_base", None)
    base, data = write_base(tmp_path / "base"), write_data(tmp_path / "data.json")
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--model", str(base), "--data", str(data), "--output-dir", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "--use_fsdp --num_processes 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_recipe_of_a_large_base_is_one():
    config = load_recipe("recipes/alpaca-70b.yaml", {})
    assert (config.adapter_layers, config.gradient_checkpointing) == (78, True)
