"""What the plugin stands on in vLLM, its kernel in Triton's interpreter, and arguments of the command line."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from engines import apart, write_adapters, write_family

from llama_adapter.serving.vllm_plugin import patches
from llama_adapter.serving.vllm_plugin.patches import INTERNALS, MovedError, check_names

EVERYTHING = [
    (module, name, attribute) for module, name, attributes in INTERNALS for attribute in ["", *attributes.split()]
]


def test_all_of_it_is_there():
    check_names()


@pytest.mark.parametrize(("module", "name", "attribute"), EVERYTHING, ids=[".".join(one) for one in EVERYTHING])
def test_whatever_is_gone_is_named(module, name, attribute, monkeypatch):
    loaded = patches.importlib.import_module(module)

    class Rest:
        """What is left of the thing when one attribute is gone."""

    for other in {one[:2]: one[2] for one in INTERNALS}[module, name].split():
        if other != attribute:
            setattr(Rest, other, None)
    if attribute:
        monkeypatch.setattr(loaded, name, Rest)
    else:
        monkeypatch.delattr(loaded, name)
    with pytest.raises(MovedError, match=f"has no {module}.{name}{'.' + attribute if attribute else ''}, on which"):
        patches.register()


def test_the_kernel_is_the_operator_in_tritons_interpreter():
    code = """
import torch
from llama_adapter.serving.vllm_plugin import gated
from llama_adapter.serving.vllm_plugin.gated_triton import on_cuda
torch.manual_seed(0)
for T, S, H, N, K, D, cap, dtype, worst in [
    (37, 5, 4, 2, 16, 64, 0.0, torch.float32, 2e-6), (37, 5, 4, 4, 10, 96, 0.0, torch.float32, 2e-6),
    (20, 3, 8, 2, 7, 128, 30.0, torch.float32, 1e-5),  # scores near 0 lose what 30 + 1e-6 loses
    (20, 3, 8, 2, 7, 128, 0.0, torch.bfloat16, 2e-2),
    (0, 3, 8, 2, 7, 32, 0.0, torch.float32, 0),
]:
    q, k, v = (torch.randn(shape, dtype=dtype) for shape in ((T, H * D), (S, N, K, D), (S, H, K, D)))
    lengths = torch.randint(0, K + 1, (S,), dtype=torch.int32)
    for slots in (torch.randint(-1, S, (T + 5,)), torch.arange(T + 5) // 8 % (S + 1) - 1):
        want = torch.ops.llama_adapter.gated_prompts(q, k, v, lengths, slots, D ** -0.5, cap)
        got = on_cuda(q.view(T, H, D), k, v, lengths, slots[:T], D ** -0.5, cap).view(T, H * D)
        assert torch.equal(got[slots[:T] < 0], torch.zeros_like(got[slots[:T] < 0]))
        if T:
            assert (want - got).abs().max() <= worst, (want - got).abs().max()
print("equal")
"""
    surroundings = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=surroundings)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def parsed(*line):
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser()).parse_args(line)


def test_lora_modules_alone_switches_on_what_they_need(tmp_path, capsys):
    patches.register()
    base = apart(write_family, "llama", tmp_path / "base")
    folders = apart(write_adapters, base, tmp_path, 2, adapter_len=20)
    modules = [f"{name}={folder}" for name, folder in zip("ab", folders, strict=True)]
    args = parsed("--lora-modules", *modules)
    assert (args.enable_lora, args.max_lora_rank, args.max_loras, args.max_cpu_loras) == (True, 32, 2, 2)
    args = parsed("--max-loras", "7", "--max-lora-rank", "64", "--lora-modules", *modules)
    assert (args.enable_lora, args.max_lora_rank, args.max_loras) == (True, 64, 7)
    Path(folders[0], "adapter_config.json").write_text('{"format_version": 7}')
    with pytest.raises(SystemExit) as ended:
        parsed("--lora-modules", *modules)
    assert ended.value.code == 2
    assert "format_version is 7" in capsys.readouterr().err
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    args = parsed("--lora-modules", f"c={tmp_path / 'peft'}")
    assert not args.enable_lora
    assert args.max_loras == 1


def test_a_directory_of_adapters_that_is_none_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("LLAMA_ADAPTER_DIR", str(tmp_path / "gone"))
    with pytest.raises(Exception, match="which is no folder"):
        patches.register()


def test_registering_twice_wraps_once():
    from vllm.v1.core import kv_cache_utils

    patches.register()
    first = kv_cache_utils._gen_lora_extra_hash_keys
    patches.register()
    assert kv_cache_utils._gen_lora_extra_hash_keys is first
    assert first(SimpleNamespace(lora_request=None)) == []
