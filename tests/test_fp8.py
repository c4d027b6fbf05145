"""The FP8 base: its arithmetic against float64, prompts that learn through it, and what it refuses."""

import copy
import gc
import logging
import weakref
from dataclasses import replace

import pytest
import torch
from runs import recipe, write_base
from test_packing import examples
from tiny import LAYERS, adapted, tiny_config, tiny_llama, tiny_model, tokens
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cosine_similarity

from llama_adapter import AdapterConfig, add_adapter, load_adapter, remove_adapter
from llama_adapter.base import load_base
from llama_adapter.core.families import FAMILIES
from llama_adapter.data.batches import collate
from llama_adapter.errors import ModelError, TrainingError
from llama_adapter.training.fp8 import FP8, Fp8Linear, product, quantise, quantise_base, require_fp8
from llama_adapter.training.loop import train
from llama_adapter.training.loss import packed_loss, response_losses
from llama_adapter.training.packing import pack

CPU = torch.device("cpu")
MADE_OF_LINEAR = sorted(set(FAMILIES) - {"gpt2"})


def e4m3(numbers: torch.Tensor) -> torch.Tensor:
    """The nearest of the format's numbers, ties to even, by its definition: 3 bits of mantissa, exponents from -6."""
    exponent = numbers.abs().clamp(min=2.0**-6).log2().floor()
    return torch.round(numbers / 2 ** (exponent - 3)) * 2 ** (exponent - 3)


def rounded(rows: torch.Tensor) -> torch.Tensor:
    """In float64, each row as its own power of two times numbers of e4m3."""
    rows = rows.detach().double()
    scales = 2 ** (rows.abs().amax(-1, keepdim=True) / 448).log2().ceil()
    return e4m3(rows / scales) * scales


def linear(inputs: int = 64, outputs: int = 48, bias: bool = False, dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    with torch.no_grad():
        made.weight *= torch.logspace(-2, 2, outputs)[:, None] * torch.logspace(1, -1, inputs)  # channels differ
    return made


def states(*shape: int, dtype=torch.float32) -> torch.Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, shape[-2])[:, None]
    return made.to(dtype).requires_grad_()


def both_ways(layer: nn.Module, inputs: torch.Tensor, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What comes out, the gradient that is sent back, and what of it arrives."""
    out = layer(inputs)
    sent = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    (arrived,) = torch.autograd.grad(out, inputs, sent)
    return out.detach(), sent, arrived


class TestArithmetic:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("shape", [(10, 64), (2, 7, 64)])
    def test_both_products_are_those_of_the_rounded_operands(self, shape, bias):
        layer, inputs = linear(bias=bias), states(*shape)
        out, sent, arrived = both_ways(Fp8Linear(layer), inputs)
        weight, weight_back = rounded(layer.weight), rounded(layer.weight.t())
        expected = rounded(inputs) @ weight.t() + (layer.bias.double() if bias else 0)
        # Products of rows under one scale: what fp32 rounds away is small beside the largest of the row.
        size = (rounded(inputs).abs() @ weight.abs().t()).clamp(min=1e-30)
        assert ((out - expected).abs() <= 1e-6 * size + 1e-7 * expected.abs()).all()
        size = rounded(sent).abs() @ weight_back.abs().t()
        assert ((arrived - rounded(sent) @ weight_back.t()).abs() <= 1e-6 * size).all()
        assert out.shape == (*shape[:-1], 48)
        assert arrived.shape == shape

    def test_the_error_is_what_three_bits_of_mantissa_make(self):
        layer, inputs = linear(), states(10, 64)
        x, w = inputs.detach().double(), layer.weight.detach().double()
        # Half a step of a normal number, or of the smallest one under a scale of at most the largest number / 224.
        off_x = torch.maximum(x.abs() * 2**-4, x.abs().amax(-1, keepdim=True) / 224 * 2**-10)
        off_w = torch.maximum(w.abs() * 2**-4, w.abs().amax(-1, keepdim=True) / 224 * 2**-10)
        bound = off_x @ w.abs().t() + x.abs() @ off_w.t() + off_x @ off_w.t()
        error = (Fp8Linear(layer)(inputs).double() - x @ w.t()).abs()
        assert (error <= bound * (1 + 1e-5)).all()
        assert error.max() > 0.01 * bound.max()

    def test_bf16_loses_nothing_but_the_last_rounding(self):
        layer, inputs = linear(dtype=torch.bfloat16), states(10, 64, dtype=torch.bfloat16)
        out, sent, arrived = both_ways(Fp8Linear(layer), inputs)
        assert out.dtype == arrived.dtype == torch.bfloat16
        expected = (rounded(inputs) @ rounded(layer.weight).t()).to(torch.bfloat16)
        torch.testing.assert_close(out, expected, rtol=2**-8, atol=1e-6)
        expected = (rounded(sent) @ rounded(layer.weight.t()).t()).to(torch.bfloat16)
        torch.testing.assert_close(arrived, expected, rtol=2**-8, atol=1e-6)

    def test_scales_are_powers_of_two_that_use_the_whole_range(self):
        rows = torch.cat([states(200, 64).detach(), torch.full((1, 64), 448.0), torch.full((1, 64), 449.0)])
        values, scales = quantise(rows)
        assert (scales.log2() == scales.log2().round()).all()
        largest = values.float().abs().amax(-1)
        assert (largest > 223).all()
        assert scales[-2:, 0].tolist() == [1, 2]
        assert torch.equal(values.double() * scales, rounded(rows))

    def test_rows_of_zeros_and_of_tiny_numbers(self):
        values, scales = quantise(torch.stack([torch.zeros(16), torch.full((16,), 3e-33)]))
        assert torch.equal(values[0].float(), torch.zeros(16))
        torch.testing.assert_close(values[1].float() * scales[1], torch.full((16,), 3e-33), rtol=2**-4, atol=0)

    @pytest.mark.parametrize("broken", [float("nan"), float("inf")])
    def test_what_is_not_finite_is_seen_and_spoils_its_own_row_only(self, broken):
        inputs = states(3, 64).detach()
        inputs[1, 5] = broken
        out = Fp8Linear(linear())(inputs)
        assert out[1].isnan().all()
        assert out[[0, 2]].isfinite().all()

    def test_no_row_depends_on_the_rows_beside_it(self):
        layer, inputs = Fp8Linear(linear()), states(12, 64)  # rows of sizes from 1e-3 to 1e3
        out, sent, arrived = both_ways(layer, inputs)
        for row in range(12):
            alone = inputs[row : row + 1].detach().requires_grad_()
            own = layer(alone)
            (own_gradient,) = torch.autograd.grad(own, alone, sent[row : row + 1])
            torch.testing.assert_close(own[0], out[row], rtol=1e-5, atol=1e-6 * float(out[row].abs().max()))
            torch.testing.assert_close(
                own_gradient[0], arrived[row], rtol=1e-5, atol=1e-6 * float(arrived[row].abs().max())
            )

    def test_no_rows_at_all(self):
        assert Fp8Linear(linear())(torch.zeros(2, 0, 64)).shape == (2, 0, 48)

    def test_no_activation_is_kept(self):
        layer, kept = Fp8Linear(linear()), []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.dtype) or tensor, lambda t: t):
            layer(states(10, 64))
        assert sorted(map(str, kept)) == sorted(map(str, (FP8, torch.float32)))  # the transposed weight and its scales

    def test_a_gpu_gets_operands_in_the_layout_that_it_takes(self):
        layer = Fp8Linear(linear())  # both copies have the layout of an unquantised weight, so fake ones have it too
        assert layer.values.is_contiguous()
        assert layer.transposed.is_contiguous()
        assert layer.scales.is_contiguous()
        with FakeTensorMode():  # runs torch's checks of a CUDA product without a GPU
            for weight, scales in ((layer.values, layer.scales), (layer.transposed, layer.transposed_scales)):
                on_gpu = torch.empty(weight.shape, dtype=FP8, device="cuda")
                scales = torch.empty(scales.shape, device="cuda")
                for dtype in (torch.bfloat16, torch.float32):
                    rows = torch.empty(10, weight.shape[1], dtype=dtype, device="cuda")
                    made = product(rows, on_gpu, scales, fast=True)
                    assert made.dtype == dtype
                    assert made.shape == (10, weight.shape[0])

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own doing
    def test_it_compiles_whole(self):
        layers = nn.Sequential(Fp8Linear(linear(bias=True)), Fp8Linear(linear(48, 64)))
        try:
            compiled = torch.compile(copy.deepcopy(layers), backend="aot_eager", fullgraph=True, dynamic=True)
            for inputs in (states(10, 64), states(7, 64)):
                for mine, theirs in zip(both_ways(compiled, inputs), both_ways(layers, inputs), strict=True):
                    assert torch.equal(mine, theirs)
        finally:
            torch._dynamo.reset()

    @pytest.mark.parametrize("cast", [torch.bfloat16, torch.float64])
    def test_a_cast_of_the_model_leaves_the_numbers_alone(self, cast):
        layer, inputs = Fp8Linear(linear(bias=True)), states(5, 64)
        assert torch.equal(copy.deepcopy(layer).to(cast)(inputs), layer(inputs))


def learnt(model, adapter) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of all prompts, and of all gates, from three examples."""
    for parameter in adapter.parameters():
        parameter.grad = None
    response_losses(model, collate(examples()), CPU).sum().backward()
    layers = adapter.layers.values()
    return torch.cat([layer.prompt.grad.flatten() for layer in layers]), torch.cat(
        [layer.gate.grad for layer in layers]
    )


def gradient(loss, parameters) -> torch.Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters, retain_graph=True)])


class TestModels:
    @pytest.mark.parametrize("family", MADE_OF_LINEAR)
    def test_prompts_learn_nearly_what_they_would_on_the_base_itself(self, family):
        plain, quantised = tiny_model(family), tiny_model(family)
        if family == "olmo":  # numbers near its clamp would have a gradient on one side and none on the other
            plain.config.clip_qkv = quantised.config.clip_qkv = None
        quantise_base(quantised)
        prompts, gates = learnt(plain, adapted(plain, adapter_len=10))
        near_prompts, near_gates = learnt(quantised, adapted(quantised, adapter_len=10))
        assert 0.95 < cosine_similarity(prompts, near_prompts, 0) < 1 - 1e-5
        assert 0.95 < cosine_similarity(gates, near_gates, 0) < 1 - 1e-5

    @pytest.mark.parametrize("family", ["gemma", "gpt_neox", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3"])
    def test_zero_gates_change_nothing(self, family):
        model = tiny_model(family)
        quantise_base(model)
        with torch.no_grad():
            before = model(tokens()).logits
            add_adapter(model, AdapterConfig(adapter_len=4))
            assert torch.equal(model(tokens()).logits, before)

    @pytest.mark.parametrize(
        ("family", "each"), [("llama", 7), ("gpt_neox", 4), ("phi", 6), ("phi3", 4), ("qwen2_moe", 7), ("mixtral", 4)]
    )
    def test_attention_and_feed_forward_are_replaced_and_nothing_else(self, family, each):
        model = tiny_model(family)
        kept = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert quantise_base(model) == each * LAYERS
        kept &= {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert {name.split(".")[-1] for name in kept} <= {"lm_head", "embed_out", "shared_expert_gate"}
        assert len(kept) == (1 + LAYERS if family == "qwen2_moe" else 1)
        for module in (module for module in model.modules() if isinstance(module, Fp8Linear)):
            assert [p.dtype for name, p in module.named_parameters() if name != "bias"] == [FP8, FP8]
            assert not any(parameter.requires_grad for name, parameter in module.named_parameters() if name != "bias")
            assert {buffer.shape for buffer in module.buffers()} == {(1, module.in_features), (1, module.out_features)}

    def test_an_output_head_of_even_sizes_stays(self):
        model = tiny_llama(vocab_size=96)
        quantise_base(model)
        assert type(model.lm_head) is nn.Linear

    def test_the_original_weights_are_freed(self):
        model = tiny_model()
        weights = [weakref.ref(module.weight) for module in model.model.layers.modules() if type(module) is nn.Linear]
        quantise_base(model)
        gc.collect()
        assert len(weights) == 21
        assert not any(weight() is not None for weight in weights)

    @pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
    def test_before_and_after_the_adapter_are_the_same(self, family):
        early, late = tiny_model(family), tiny_model(family)
        quantise_base(early)
        first, second = adapted(early), adapted(late)
        parameters = {id(parameter) for parameter in second.parameters()}
        with torch.no_grad():
            late(tokens())  # keys and values of prompts are kept from here on, and must not outlive the change
            quantise_base(late)
            assert torch.equal(late(tokens()).logits, early(tokens()).logits)
        for mine, theirs in zip(learnt(early, first), learnt(late, second), strict=True):
            assert torch.equal(mine, theirs)
        assert parameters == {id(parameter) for parameter in late.parameters() if parameter.requires_grad}
        remove_adapter(late)
        assert not any(p.requires_grad for p in late.parameters() if p.dtype == FP8)

    def test_a_layer_of_another_class_or_of_odd_sizes_stays(self):
        class FourBit(nn.Linear):
            pass

        model = tiny_model()
        model.model.layers[0].mlp.up_proj.__class__ = FourBit
        model.model.layers[1].mlp.up_proj = nn.Linear(32, 40)
        assert quantise_base(model) == 19
        assert type(model.model.layers[0].mlp.up_proj) is FourBit
        assert type(model.model.layers[1].mlp.up_proj) is nn.Linear

    @pytest.mark.parametrize("prefix", [0, 4])
    def test_packed_and_padded_rows_agree(self, prefix):
        model = tiny_model()
        quantise_base(model)
        parameters = list(adapted(model).parameters())
        batch = examples(prefix, (9, 5, 7, 8, 6, 4, 9))
        padded, packed = response_losses(model, collate(batch), CPU), pack(batch)
        differences = []
        for number, loss in enumerate(padded):
            own = slice(3 * number, 3 * number + 3)  # an example's response; the others only come along
            alone = replace(packed, predicting=packed.predicting[own], targets=packed.targets[own], losses=(3,))
            found = packed_loss(model, alone)
            mine, theirs = gradient(found, parameters), gradient(loss, parameters)
            differences.append([abs(found.item() / loss.item() - 1), float((mine - theirs).norm() / theirs.norm())])
        # fp32 sums in another order tip a number over a rounding boundary now and then, so not each of the examples.
        assert torch.tensor(differences).median(0).values.max() < 1e-5
        assert packed.segments.prefix == prefix


class TestRuns:
    def test_a_run_says_what_it_does_and_leaves_an_adapter_for_any_base(self, base, data, tmp_path, caplog):
        caplog.set_level(logging.INFO)
        plain = train(recipe(base, data, tmp_path / "plain", max_steps=3))
        caplog.clear()
        quantised = train(recipe(base, data, tmp_path / "fp8", max_steps=3, base_precision="fp8"))
        assert "base: 21 linear layers in FP8" in caplog.messages
        assert sum("brings no speed on a CPU" in message for message in caplog.messages) == 1
        assert quantised.best_val_loss != plain.best_val_loss
        assert quantised.best_val_loss == pytest.approx(plain.best_val_loss, rel=0.01)
        adapter = load_adapter(load_base(str(base), CPU), tmp_path / "fp8")
        assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
        with pytest.raises(TrainingError, match=r"base_precision 'auto' \(was 'fp8'\)"):
            train(recipe(base, data, tmp_path / "fp8", max_steps=3, resume=True))

    def test_checkpointing_recomputes_the_same(self, base, data, tmp_path):
        options = {"max_steps": 2, "base_precision": "fp8"}
        kept = train(recipe(base, data, tmp_path / "kept", **options))
        recomputed = train(recipe(base, data, tmp_path / "recomputed", gradient_checkpointing=True, **options))
        assert recomputed.train_loss == pytest.approx(kept.train_loss, rel=1e-6)

    def test_a_base_without_linear_layers_is_refused_before_it_is_read(self, data, tmp_path):
        folder = write_base(tmp_path / "base")
        tiny_config("gpt2").save_pretrained(folder)
        (folder / "model.safetensors").write_bytes(b"not read")
        with pytest.raises(ModelError, match=r"needs a base made of nn\.Linear, and gpt2 has Conv1D: leave it out"):
            train(recipe(folder, data, tmp_path / "run", base_precision="fp8"))


class TestRefusals:
    CONFIG = tiny_config("llama")

    @pytest.mark.parametrize(
        ("device", "message"),
        [
            ("mps", "needs an NVIDIA GPU or a CPU, and this is mps: leave it out"),
            ("xpu", "needs an NVIDIA GPU or a CPU, and this is xpu: leave it out"),
            ("cuda", r"needs a GPU of compute capability 8\.9 or newer, and NVIDIA A100 has 8\.0: leave it out"),
        ],
    )
    def test_a_device_without_fp8(self, device, message, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
        with pytest.raises(ModelError, match=f"--base-precision fp8 {message}"):
            require_fp8(torch.device(device), self.CONFIG)

    def test_an_amd_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.version, "hip", "7.0")
        with pytest.raises(ModelError, match="this is an AMD GPU"):
            require_fp8(torch.device("cuda"), self.CONFIG)

    @pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
    def test_devices_with_fp8(self, capability, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        assert require_fp8(torch.device("cuda"), self.CONFIG) is None

    def test_another_dtype(self):
        with pytest.raises(
            ModelError, match="made of bf16 or fp32 weights, and these are float16: load it with another"
        ):
            quantise_base(tiny_model().half())

    def test_sizes_that_are_no_multiples_of_16(self):
        model = tiny_llama(hidden_size=24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=3)
        with pytest.raises(
            ModelError, match=r"LlamaForCausalLM has no nn\.Linear in its layers with sizes that are mult"
        ):
            quantise_base(model)

    def test_a_base_that_is_quantised_already(self):
        model = tiny_model()
        quantise_base(model)
        with pytest.raises(ModelError, match=r"has no nn\.Linear in its layers"):
            quantise_base(model)
