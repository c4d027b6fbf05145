"""One engine, many adapters: eviction, prefix caching, chunked prefill, reloads, LoRA beside ours, quantised bases."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engines import (
    answers,
    apart,
    compared,
    engine,
    likeliest_with_lora,
    prompts,
    requests,
    write_adapter,
    write_adapters,
    write_family,
    write_loras,
)  # fmt: skip
from safetensors.torch import load_file, save_file

from llama_adapter.base import resolve_model

TEXTS = ("The capital of France is", "Once upon a time there was a small house by the sea, and", "The cat", "Below")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return apart(write_family, "llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def many(llama, tmp_path_factory):
    return apart(write_adapters, llama, tmp_path_factory.mktemp("many"), 12)


def check(base, found, tokens, name):
    result = apart(compared, base, found)
    print(f"\n{name}: {result}")
    assert result.equal == result.total == tokens
    assert result.worst < 2e-5
    assert result.effect > 0.5


def test_the_bundled_base(tmp_path):
    from transformers import AutoTokenizer

    base = resolve_model("bundled")
    folders, tokenizer = apart(write_adapters, Path(base), tmp_path), AutoTokenizer.from_pretrained(base)
    with engine(base) as llm:
        rows = requests([None, *folders])
        texts = [tokenizer(text).input_ids for text in TEXTS for _ in rows]
        found = [*answers(llm, texts, rows * 4), *answers(llm, texts, rows * 4)]
    check(base, found, 576, "bundled base, twice")


def test_twelve_adapters_in_four_slots_with_eviction_chunks_and_a_prefix_cache(llama, many):
    prompt = prompts(1, 100)[0] * 2
    options = {"max_num_batched_tokens": 48, "enable_chunked_prefill": True, "enable_prefix_caching": True}
    with engine(llama, max_cpu_loras=6, block_size=32, **options) as llm:
        rows = requests([None, *many]) * 2
        rows = rows[::3] + rows[1::3] + rows[2::3]
        first = answers(llm, [prompt] * len(rows), rows, 16)
        again = answers(llm, [prompt] * len(rows), rows[::-1], 16)
    assert any(one["cached"] for one in again)
    check(llama, [*first, *again], 832, "12 adapters, 4 slots")


def test_two_hundred_and_fifty_six_adapters_in_eight_slots(llama, tmp_path):
    folders = apart(write_adapters, llama, tmp_path, 256)
    with engine(llama, max_loras=8, max_cpu_loras=256) as llm:
        rows = requests([*folders, None])
        found = answers(llm, prompts(len(rows), 20), rows, 8)
    check(llama, found, 257 * 8, "256 adapters, 8 slots")


def test_a_reload_under_the_same_name_uses_no_blocks_of_the_old_content(llama, many, tmp_path):
    from vllm.lora.request import LoRARequest

    folder = tmp_path / "poet"

    def put(source):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)

    prompt = prompts(1, 100)[0] * 2
    with engine(llama, enable_prefix_caching=True, block_size=32) as llm:
        core, said = llm.llm_engine, []

        def ask(request):
            found = answers(llm, [prompt], [request], 16)[0]
            said.append(found)
            return found["cached"]

        put(many[0])
        poet = LoRARequest("poet", 1, str(folder))
        assert ask(poet) == 0
        assert ask(poet) > 0
        put(many[2])
        assert ask(poet) > 0, "what was loaded serves until it is loaded again"
        assert core.add_lora(LoRARequest("poet", 1, str(folder), load_inplace=True))
        assert ask(poet) == 0
        assert ask(LoRARequest("poet", 1, str(folder), load_inplace=True)) > 0
        put(many[0])
        assert core.add_lora(LoRARequest("poet", 1, str(folder), load_inplace=True))
        assert ask(poet) == 0, "blocks of a content that was replaced meanwhile do not come back"
        put(many[4])
        other = LoRARequest("poet", 2, str(folder))  # unloaded and loaded: vLLM gives a new number
        assert ask(other) == 0
    for found, source in zip(said, [0, 0, 0, 2, 2, 0, 4], strict=True):
        found["adapter"] = many[source]
    check(llama, said, 7 * 16, "reloads")


def test_content_that_changed_behind_the_engines_back_is_refused(llama, many, tmp_path):
    folder = tmp_path / "poet"
    shutil.copytree(many[0], folder)
    with engine(llama, max_loras=1, max_cpu_loras=1) as llm:
        poet, *others = requests([str(folder), *many[1:3]])
        answers(llm, prompts(1), [poet], 2)
        answers(llm, prompts(1), [others[0]], 2)
        shutil.rmtree(folder)
        shutil.copytree(many[2], folder)
        with pytest.raises(Exception, match="changed since adapter 'poet' was loaded"):
            answers(llm, prompts(1), [poet], 2)


def test_ours_beside_lora_and_the_base(llama, many, tmp_path):
    foreign = apart(write_loras, llama, tmp_path, 2)
    with engine(
        llama, lora_target_modules=None, max_loras=4
    ) as llm:  # as many as there are: base rows have no empty slot
        rows = requests([None, *many[:2], *foreign]) * 3
        found = answers(llm, prompts(len(rows)), rows, 16)
    check(llama, [one for one in found if one["adapter"] not in foreign], 9 * 16, "beside LoRA")
    assert apart(likeliest_with_lora, llama, [one for one in found if one["adapter"] in foreign]) == 6 * 16


def test_the_second_versions_gate_scale_and_lora(llama, tmp_path):
    names = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
    both = apart(
        write_adapters, llama, tmp_path / "a", 2, gate_scale=True, lora_rank=4, lora_targets=names, lora_alpha=6.0
    )
    bare = apart(
        write_adapters, llama, tmp_path / "b", 1, adapter_layers=0, lora_rank=8, lora_targets=("k_proj", "up_proj")
    )
    shutil.move(bare[0], tmp_path / "low-rank")
    with engine(llama, lora_target_modules=None, max_loras=3) as llm:
        rows = requests([None, *both, str(tmp_path / "low-rank")]) * 3
        found = answers(llm, prompts(len(rows)), rows, 16)
        for key in ("lora.layers.1.mlp.gate_proj.B", "lora.layers.1.self_attn.v_proj.B"):
            tensors = load_file(Path(both[0]) / "adapter_model.safetensors")
            tensors[key] = torch.cat([tensors[key], tensors[key]])
            wider = shutil.copytree(both[0], tmp_path / key)
            save_file(tensors, wider / "adapter_model.safetensors", metadata={"format": "pt"})
            with pytest.raises(Exception, match=f"{len(tensors[key])} outputs on {key[5:-2]}"):
                llm.llm_engine.add_lora(requests([str(wider)], first=50)[0])
    check(llama, found, 12 * 16, "gate_scale and LoRA")


def test_what_cannot_be_served_is_refused_by_name_and_the_engine_lives(llama, many, tmp_path):
    def saved(name, base=llama, **config):
        return apart(write_adapter, base, tmp_path / name, **config)

    other = apart(write_family, "llama", tmp_path / "other", hidden_size=64)
    refused = {
        saved("norms", norms=True): "has norms",
        saved("scale", linear_scale=("q_proj",), linear_bias=("q_proj",)): "has linear_scale, linear_bias",
        saved("lora", lora_rank=2, lora_targets=("q_proj",)): "no slots: leave out --lora-target-modules",
        saved("long", adapter_len=17): "needs --max-lora-rank 17",
        saved("foreign", other): "hidden_size 64 against 128",
        str(tmp_path / "pictures"): "has a condition",
        str(tmp_path / "peft"): "is no adapter of llama-adapter's",
        str(tmp_path / "half"): "adapter_model.safetensors cannot be read",
    }
    for name in ("pictures", "peft", "half"):
        shutil.copytree(many[0], tmp_path / name)
    (tmp_path / "half" / "adapter_model.safetensors").unlink()
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    path = tmp_path / "pictures" / "adapter_config.json"
    condition = {"kind": "image", "tower": "t", "tower_width": 8}
    path.write_text(json.dumps({**json.loads(path.read_text()), "condition": condition}))
    with engine(llama) as llm:
        for folder, says in refused.items():
            with pytest.raises(Exception, match=says):
                llm.llm_engine.add_lora(requests([folder], first=50)[0])
        found = answers(llm, prompts(2), requests([None, many[0]]), 8)
    check(llama, found, 16, "after refusals")


def test_half_precision(tmp_path):
    from transformers import AutoTokenizer

    base = Path(resolve_model("bundled"))
    folders, tokenizer = apart(write_adapters, base, tmp_path), AutoTokenizer.from_pretrained(base)
    with engine(base, dtype="bfloat16") as llm:
        rows = requests([None, *folders])
        found = answers(llm, [tokenizer(text).input_ids for text in TEXTS for _ in rows], rows * 4)
    bare = apart(compared, base, [one for one in found if one["adapter"] is None], dtype=torch.bfloat16)
    ours = apart(compared, base, [one for one in found if one["adapter"]], dtype=torch.bfloat16)
    print(f"\nbf16: base {bare}; adapters {ours}")
    assert ours.equal / ours.total > 0.9
    assert ours.worst < 0.05 * ours.effect


def test_an_int8_base(tmp_path):
    """W8A8, activations quantised as they come, against the same weights in floats, from which vLLM's own linears are
    3 to 5 % away: prompts take those, as text does."""
    from transformers import AutoTokenizer

    original = Path(resolve_model("bundled"))
    folders, tokenizer = apart(write_adapters, original, tmp_path), AutoTokenizer.from_pretrained(original)
    base, floats = quantised(original, tmp_path)
    with engine(base) as llm:
        rows = requests([None, *folders])
        texts = [tokenizer(text).input_ids for text in TEXTS for _ in rows]
        found = [*answers(llm, texts, rows * 4), *answers(llm, texts, rows * 4)]
    bare = apart(compared, floats, [one for one in found if one["adapter"] is None])
    ours = apart(compared, floats, [one for one in found if one["adapter"]])
    print(f"\nint8: base {bare}; adapters {ours}")
    assert bare.equal / bare.total > 0.9
    assert ours.equal / ours.total > 0.7
    assert ours.worst < 0.1 * ours.effect


def quantised(base, folder):
    """The base with int8 weights in compressed-tensors' layout, and with the floats that those stand for."""
    numbers, floats = load_file(base / "model.safetensors"), load_file(base / "model.safetensors")
    for key, weight in floats.items():
        if weight.dim() == 2 and "proj" in key:
            scale = numbers[key + "_scale"] = weight.float().abs().amax(1, keepdim=True) / 127
            numbers[key] = (weight / scale).round().to(torch.int8)
            floats[key] = numbers[key].float() * scale
    for name, tensors in (("int8", numbers), ("floats", floats)):
        shutil.copytree(base, folder / name)
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    kind = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"], "weights": {**kind, "strategy": "channel", "dynamic": False},
        "input_activations": {**kind, "strategy": "token", "dynamic": True},
    }  # fmt: skip
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"]}
    path = folder / "int8" / "config.json"
    settings["config_groups"] = {"group_0": group}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    return folder / "int8", folder / "floats"


@pytest.mark.parametrize("kind", ["tensor parallel", "speculative", "compiled"])
def test_in_a_process_of_its_own(kind, llama, many, tmp_path):
    """Two processes with half of the heads each; torch.compile, which vLLM leaves out on a CPU with LoRA."""
    script = Path(__file__).with_name("alone.py")
    output, folders = tmp_path / "found.json", [str(folder) for folder in many[:2]]
    line = [sys.executable, str(script), kind, str(llama), str(output), *folders]
    done = subprocess.run(line, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    values = json.loads(output.read_text())
    assert values["graphs"] or kind != "compiled"
    check(llama, values["found"], 576, kind)
