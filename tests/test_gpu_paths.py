"""Training and decoding as on a GPU, on one that is not there: nothing is left on the CPU, and the numbers are its."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from stand_in_gpu import GPU, StandInGpu, on_gpu
from test_packing import examples
from tiny import adapted, tiny_model

from llama_adapter import set_adapter
from llama_adapter.data.batches import collate
from llama_adapter.inference.choice import Row
from llama_adapter.inference.compiled import _mode
from llama_adapter.inference.engine import Engine
from llama_adapter.training import fp8, varlen
from llama_adapter.training.loss import owners_losses, response_loss
from llama_adapter.training.packed_attention import tell_layers
from llama_adapter.training.packing import pack, pack_sections

CPU = torch.device("cpu")
PARTS = {
    "norms": True, "linear_bias": ("q_proj",), "linear_scale": ("q_proj",), "lora_rank": 2, "lora_targets": ("v_proj",),
}  # fmt: skip


def kernel(query, key, value, queries, keys, most_queries, most_keys):
    """torch's varlen kernel, with what the one on CUDA refuses."""
    for states in (query, key, value):
        assert on_gpu(states)
        assert states.dtype in (torch.bfloat16, torch.float16)
        assert states.dim() == 3
        assert states.stride(-1) == 1
        assert states.shape[1:] == query.shape[1:]
        assert states.shape[-1] % 8 == 0
    outputs = []
    for ends in (queries, keys):
        assert on_gpu(ends)
        assert ends.dtype == torch.int32
    assert int((queries[1:] - queries[:-1]).max()) == most_queries
    assert int((keys[1:] - keys[:-1]).max()) == most_keys
    for i in range(len(queries) - 1):
        q, k, v = query[queries[i] : queries[i + 1]], key[keys[i] : keys[i + 1]], value[keys[i] : keys[i + 1]]
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * q.shape[-1] ** -0.5
        seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype))
    return torch.cat(outputs)


def scaled_mm(a, b, scale_a, scale_b, out_dtype, use_fast_accum):
    """torch's product in FP8, with what the one on CUDA refuses."""
    assert on_gpu(a)
    assert a.is_contiguous()
    assert b.t().is_contiguous()
    assert a.dtype == b.dtype == torch.float8_e4m3fn
    assert (scale_a.shape, scale_b.shape) == ((len(a), 1), (1, b.shape[1]))
    assert scale_a.dtype == scale_b.dtype == torch.float32
    assert scale_a.is_contiguous()
    assert scale_b.is_contiguous()
    assert not any(size % 16 for size in (*b.shape, a.shape[1]))
    assert out_dtype == torch.bfloat16
    return (a.float() @ b.float() * scale_a * scale_b).to(out_dtype)


@pytest.fixture
def kernels(monkeypatch):
    """How often each of the GPU's own was called."""
    counted = {"varlen": 0, "fp8": 0}

    def counting(name, function):
        def call(*args, **kwargs):
            counted[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(varlen, "_sees_the_end", lambda: True)
    monkeypatch.setattr(varlen, "_varlen", counting("varlen", kernel))
    monkeypatch.setattr(torch, "_scaled_mm", counting("fp8", scaled_mm))
    monkeypatch.setattr(fp8, "require_fp8", lambda device, config: None)
    return counted


def packed(model, adapters, device):
    return response_loss(model, pack(examples()), device)


def padded(model, adapters, device):
    return response_loss(model, collate(examples()), device)


def sections(model, adapters, device):
    row = pack_sections([[(0, examples()), (1, examples(4, (5, 6), 3))]])
    return owners_losses(model, row, device, adapters).sum()


def shared_below(model, adapters, device):
    tell_layers(model)
    row = pack_sections([[(0, examples()), (1, examples(lengths=(5, 6)))]], 1)
    return owners_losses(model, row, device, adapters).sum()


def rows_of_two(model, adapters, device):
    batch = replace(collate(examples()), owners=(0, 1, 0))
    return owners_losses(model, batch, device, adapters).sum()


def learnt(device, loss, family="llama", dtype=torch.bfloat16, quantised=False, **config):
    """Loss, and gradients of both adapters, after a step of the optimiser."""
    model = tiny_model(family).to(dtype).to(device)
    if quantised:
        fp8.quantise_base(model)
    adapters = [adapted(model, "second", 7, **config), adapted(model, "first", 5, **config)][::-1]
    if loss in (sections, shared_below, rows_of_two):
        parameters = [parameter for adapter in adapters for parameter in adapter.parameters()]
    else:
        set_adapter(model, "first")
        parameters = adapters[0].parameters()
    found = loss(model, adapters, device)
    found.backward()
    gradients = [parameter.grad for parameter in parameters]
    assert found.device.type == device.type
    assert {gradient.device.type for gradient in gradients} == {device.type}
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    torch.optim.AdamW(parameters).step()
    return found.item(), torch.cat([gradient.flatten().cpu() for gradient in gradients])


@pytest.mark.parametrize(
    ("loss", "family", "dtype", "quantised", "config", "calls"),
    [
        (packed, "llama", torch.bfloat16, False, {}, {"varlen"}),
        (packed, "llama", torch.float32, False, {}, set()),
        (packed, "qwen3", torch.bfloat16, False, {}, {"varlen"}),
        (packed, "llama", torch.bfloat16, True, {}, {"varlen", "fp8"}),
        (packed, "llama", torch.bfloat16, False, PARTS, {"varlen"}),
        (sections, "llama", torch.bfloat16, False, {}, {"varlen"}),
        (shared_below, "llama", torch.bfloat16, False, {}, {"varlen"}),
        (padded, "gemma2", torch.float32, False, {}, set()),
        (padded, "llama", torch.float32, False, PARTS, set()),
        (rows_of_two, "llama", torch.float32, False, {}, set()),
    ],
)
def test_a_step_is_that_of_the_cpu(loss, family, dtype, quantised, config, calls, kernels):
    expected, gradients = learnt(CPU, loss, family, dtype, quantised, **config)
    assert not any(kernels.values())
    with StandInGpu():
        found, on_device = learnt(GPU, loss, family, dtype, quantised, **config)
    assert {name for name, count in kernels.items() if count} == calls
    near = 1e-5 if dtype == torch.float32 else 0.05  # bf16 rounds in other places
    assert found == pytest.approx(expected, rel=near / 5)
    assert (on_device - gradients).norm() <= near * gradients.norm()
    assert gradients.norm() > 1e-3


def answers(device, family, compile=False):
    model = tiny_model(family).to(device)
    adapted(model)
    adapted(model, "other", 5, adapter_len=7)
    drawing = {"temperature": 0.7, "top_p": 0.9, "frequency_penalty": 0.3, "logprobs": 2}
    rows = [
        Row([5, 6, 7, 8, 9], "default", max_new_tokens=6),
        Row([9, 10], "other", max_new_tokens=4),
        Row([9, 10, 3], None, max_new_tokens=6, generator=torch.Generator().manual_seed(3), **drawing),
    ]
    return Engine(model).generate(rows, compile=compile)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_answers_are_those_of_the_cpu(family):
    expected = answers(CPU, family)
    with StandInGpu():
        assert answers(GPU, family) == expected


def test_a_graph_is_recorded_on_cuda_alone():
    model = tiny_model()
    assert _mode(model) == "default"
    with StandInGpu():
        assert _mode(model.to(GPU)) == "reduce-overhead"


@pytest.mark.parametrize(("size", "so"), [(64, True), (256, True), (100, False), (264, False)])
def test_the_packed_kernel_takes_heads_of_its_sizes(size, so, monkeypatch):
    monkeypatch.setattr(varlen, "_sees_the_end", lambda: True)
    query = SimpleNamespace(device=GPU, dtype=torch.bfloat16, shape=(1, 4, 9, size))
    assert varlen.fits(query, {}) is so


def test_the_stand_in_refuses_what_cuda_refuses():
    with StandInGpu():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        for mixing in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here[there.long()]):
            with pytest.raises(RuntimeError, match="on the same device"):
                mixing()
        with pytest.raises(TypeError, match="to numpy"):
            there.numpy()
        assert (there + torch.tensor(1.0)).device == there[torch.tensor([0])].device == GPU
        assert there.cpu().device == (there.cpu() + here).device == CPU
    assert there.device == CPU
