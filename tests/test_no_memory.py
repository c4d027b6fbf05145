"""Nothing is remembered: whatever writes to a parameter, the next forward, evaluation and generation read it."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny import adapted, tiny_config, tiny_model, tokens
from transformers import AutoModelForCausalLM, DynamicCache

from llama_adapter import (
    AdapterConfig,
    add_adapter,
    get_adapter,
    list_adapters,
    remove_adapter,
    save_adapter,
    use_adapter,
)
from llama_adapter.core.families import FAMILIES

IDS = tokens(4, 8)
FIRST = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def first(model):
    """Logits of the first generated token."""
    return model.generate(IDS, pad_token_id=0, **FIRST).logits[0]


@torch.no_grad()
def quiet(model):
    """Logits of the last token, without gradients."""
    return model(IDS).logits[:, -1]


def truth(model):
    """The same from a copy that has never answered anything, in a graph."""
    fresh = tiny_model()
    adapter = add_adapter(fresh, AdapterConfig(adapter_len=4, adapter_layers=2))
    adapter.load_state_dict(get_adapter(model).state_dict())
    return fresh(IDS).logits[:, -1].detach()


def fused(adapter):
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.5, fused=True)
    for parameter in adapter.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def through_data(adapter):
    for parameter in adapter.parameters():
        parameter.data.mul_(-2)


def through_numpy(adapter):
    for parameter in adapter.parameters():
        parameter.detach().numpy()[:] += 0.7


def ema_swap(adapter):
    for parameter in adapter.parameters():
        parameter.data = 0.5 * parameter.data + torch.randn_like(parameter)


def through_inference_mode(adapter):
    with torch.inference_mode():
        for parameter in adapter.parameters():
            parameter.data.copy_(torch.randn_like(parameter))


def as_vector(adapter):
    vector = torch.nn.utils.parameters_to_vector(adapter.parameters())
    torch.nn.utils.vector_to_parameters(-1.5 * vector, adapter.parameters())


WRITES = [fused, through_data, through_numpy, ema_swap, through_inference_mode, as_vector]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_every_write_is_read_by_the_next_forward_and_generation(write, mode):
    model = tiny_model()
    adapter = adapted(model)
    for _ in range(2):
        with mode():
            before = model(IDS).logits[:, -1].clone()
            generated = first(model).clone()
        write(adapter)
        with mode():
            now, now_generated = model(IDS).logits[:, -1].clone(), first(model).clone()
        expected = truth(model)
        torch.testing.assert_close(now, expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(now_generated, expected, atol=1e-5, rtol=1e-5)
        assert (now - before).abs().max() > 1e-3
        assert (now_generated - generated).abs().max() > 1e-3


def test_validation_in_a_loop_of_one_s_own_is_of_the_trained_adapter():
    model = tiny_model()
    adapter = adapted(model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05, fused=True)
    for _ in range(5):
        with torch.no_grad():
            validation = model(IDS, labels=IDS).loss
        loss = model(IDS, labels=IDS).loss
        assert abs(validation.item() - loss.item()) < 1e-6
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_rollouts_between_steps_are_of_the_trained_policy():
    model = tiny_model()
    adapter = adapted(model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.3, fused=True)
    before = first(model)
    for _ in range(3):
        for _ in range(3):
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        rollout = first(model)
        torch.testing.assert_close(rollout, truth(model), atol=1e-5, rtol=1e-5)
        assert (rollout - before).abs().max() > 1e-2


@torch.no_grad()
def test_a_cache_that_outlives_a_write_does_not_bring_old_prompts():
    model = tiny_model()
    adapter, cache = adapted(model), DynamicCache()
    model(IDS, past_key_values=cache, use_cache=True)
    step = {"past_key_values": cache, "use_cache": True}
    model(IDS[:, :1], **step)
    cache.crop(-1)
    through_data(adapter)
    now = model(IDS[:, :1], **step).logits
    cache.crop(-1)
    through_data(adapter)
    assert (model(IDS[:, :1], **step).logits - now).abs().max() > 1e-4


def with_lora(model):
    return inject_adapter_in_model(LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False), model)


def test_switching_lora_on_and_off_is_seen_by_prompts():
    model = with_lora(tiny_model())
    adapter = adapted(model)
    layers = [module for module in model.modules() if hasattr(module, "adapter_layer_names")]

    def both():
        with torch.no_grad():
            return model(IDS).logits[:, -1], first(model)

    on = both()
    for layer in layers:
        layer.enable_adapters(False)
    off = both()
    expected = truth(model)
    torch.testing.assert_close(off[0], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(off[1], expected, atol=1e-5, rtol=1e-5)
    for layer in layers:
        layer.enable_adapters(True)
    for now, before in zip(both(), on, strict=True):
        assert torch.equal(now, before)
    assert (on[0] - off[0]).abs().max() > 1e-3
    assert adapter.layers[2].gate.requires_grad


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_a_lora_goes_on_learning_beside_the_adapter():
    peft_model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapter = add_adapter(peft_model, AdapterConfig(adapter_len=4, adapter_layers=2))
    trainable = {
        name.rpartition(".")[0].rpartition(".")[2] for name, p in peft_model.named_parameters() if p.requires_grad
    }
    assert any("lora_A" in name or "default" in name for name in trainable)
    peft_model(IDS, labels=IDS).loss.backward()
    assert adapter.layers[2].gate.grad.abs().max() > 0
    lora = [p for name, p in peft_model.named_parameters() if "lora_B" in name]
    assert all(p.grad.abs().max() > 0 for p in lora)
    base = [p for name, p in peft_model.named_parameters() if "lora_" not in name and "zero_init" not in name]
    assert not any(p.requires_grad for p in base)
    assert list_adapters(peft_model) == ["default"]
    remove_adapter(peft_model)
    assert all(p.requires_grad for p in lora)
    assert not any(p.requires_grad for p in base)


def test_autocast_before_and_after_full_precision():
    model = tiny_model()
    adapted(model)
    full = quiet(model)
    with torch.autocast("cpu", torch.bfloat16):
        half, half_first = quiet(model), first(model)
    torch.testing.assert_close(half.float(), full, atol=0.05, rtol=0.05)
    assert not torch.equal(half.float(), full)
    assert torch.equal(quiet(model), full)
    torch.testing.assert_close(first(model), full, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(half_first.float(), full, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_adapted_model_is_pickled_saved_and_copied_whole(family):
    model = tiny_model(family)
    adapted(model)
    adapted(model, "second", 2)
    with use_adapter(model, "default"), torch.no_grad():
        expected = model(IDS).logits
        model.generate(IDS, max_new_tokens=2, pad_token_id=0)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        copies = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    buffer.seek(0)
    copies.append(torch.load(buffer, weights_only=False))
    for other in copies:
        assert list_adapters(other) == ["default", "second"]
        with torch.no_grad():
            assert torch.equal(other(IDS, adapter_names="default").logits, expected)
            assert torch.equal(other(IDS).logits, model(IDS).logits)
            for parameter in get_adapter(other, "default").parameters():
                parameter.zero_()
            assert torch.equal(model(IDS, adapter_names="default").logits, expected)
            assert not torch.equal(other.generate(IDS[:1], max_new_tokens=1, pad_token_id=0), IDS[:1])
        remove_adapter(other, "second")
        remove_adapter(other, "default")
        assert not other.base_model._forward_pre_hooks
        assert len(model.base_model._forward_pre_hooks) == 1


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3"])
def test_an_offloaded_base_is_adapted_where_it_computes(family, tmp_path):
    from accelerate import cpu_offload, disk_offload

    plain = tiny_model(family)
    adapted(plain)
    for offload in (cpu_offload, lambda model, device: disk_offload(model, tmp_path / family, device)):
        model = tiny_model(family)
        offload(model, torch.device("cpu"))
        assert next(model.parameters()).device.type == "meta"
        adapter = adapted(model)
        assert {p.device.type for p in adapter.parameters()} == {"cpu"}
        torch.testing.assert_close(quiet(model), quiet(plain), atol=1e-6, rtol=1e-5)
        model(IDS, labels=IDS).loss.backward()
        assert adapter.layers[2].gate.grad.abs().max() > 0


@pytest.mark.slow
def test_a_saved_adapter_scores_alike_in_a_fresh_process(tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    model.save_pretrained(tmp_path / "base")
    adapter = adapted(model.eval())
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05, fused=True)
    for _ in range(5):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            loss = model(IDS, labels=IDS).loss.item()
    save_adapter(model, tmp_path / "adapter")
    code = f"""
import torch
from transformers import AutoModelForCausalLM
from llama_adapter import load_adapter
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r}).eval()
load_adapter(model, {str(tmp_path / "adapter")!r})
ids = torch.tensor({IDS.tolist()})
with torch.no_grad():
    print(model(ids, labels=ids).loss.item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert abs(float(done.stdout.split()[-1]) - loss) < 1e-6
