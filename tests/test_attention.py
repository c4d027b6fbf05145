"""The mathematics: against the authors' outputs, PEFT, and the formula in float64."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import adapted, open_gates, tiny_llama, tiny_model, tokens
from transformers import LlamaConfig, LlamaForCausalLM

from llama_adapter import AdapterConfig, add_adapter, use_adapter
from llama_adapter.core.zero_init import ZeroInitAdapter

FIXTURE = Path(__file__).parent / "fixtures" / "official_v1_a.safetensors"


def rotate_half_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Meta's interleaved rotary pairs to Hugging Face's halves, per head."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


@pytest.fixture(scope="module")
def official():
    """The authors' tiny V1 model with its adapter, loaded into ours, and their outputs."""
    with safe_open(FIXTURE, "pt") as file:
        shape = json.loads(file.metadata()["params"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape["vocab_size"],
            hidden_size=shape["dim"],
            intermediate_size=shape["ffn"],
            num_hidden_layers=shape["n_layers"],
            num_attention_heads=shape["n_heads"],
            rms_norm_eps=shape["norm_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    ).eval()
    state = {
        "model.embed_tokens.weight": tensors["base.tok_embeddings.weight"],
        "model.norm.weight": tensors["base.norm.weight"],
        "lm_head.weight": tensors["base.output.weight"],
    }
    names = {
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for i in range(shape["n_layers"]):
        theirs, ours = f"base.layers.{i}.", f"model.layers.{i}."
        for old, new in names.items():
            state[f"{ours}{new}.weight"] = tensors[f"{theirs}{old}.weight"]
        for kind in "qk":
            weight = tensors[f"{theirs}attention.w{kind}.weight"]
            state[f"{ours}self_attn.{kind}_proj.weight"] = rotate_half_rows(weight, shape["n_heads"])
    model.load_state_dict(state)
    adapter = add_adapter(model, AdapterConfig(adapter_len=shape["adapter_len"], adapter_layers=shape["adapter_layer"]))
    first = shape["n_layers"] - shape["adapter_layer"]
    prompts = tensors["adapter.adapter_query.weight"].view(shape["adapter_layer"], shape["adapter_len"], -1)
    adapter.load_state_dict(
        {f"layers.{first + i}.prompt": prompt for i, prompt in enumerate(prompts)}
        | {
            f"layers.{i}.gate": tensors[f"adapter.layers.{i}.attention.gate"].flatten()
            for i in range(first, shape["n_layers"])
        }
    )
    return model, adapter, tensors, shape


def official_loss(model, tensors):
    logits = model(tensors["tokens"]).logits
    labels = tensors["labels"][:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=0)
    return logits, loss


def test_fixture_gates_are_open(official):
    _, adapter, _, _ = official
    assert all(layer.gate.abs().min() > 1e-3 for layer in adapter.layers.values())


def test_logits_and_loss_equal_the_authors(official):
    model, _, tensors, _ = official
    with torch.no_grad():
        logits, loss = official_loss(model, tensors)
    torch.testing.assert_close(logits, tensors["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, tensors["loss"][0], atol=1e-4, rtol=0)


def test_gradients_equal_the_authors(official):
    model, adapter, tensors, shape = official
    model.zero_grad()
    official_loss(model, tensors)[1].backward()
    theirs = tensors["grad.adapter_query.weight"].view(shape["adapter_layer"], shape["adapter_len"], -1)
    for prompt, (i, layer) in zip(theirs, adapter.layers.items(), strict=True):
        gate = tensors[f"grad.layers.{i}.attention.gate"].flatten()
        assert (layer.prompt.grad - prompt).norm() <= 1e-4 * prompt.norm()
        assert (layer.gate.grad - gate).norm() <= 1e-4 * gate.norm()


def test_equals_peft_s_adaption_prompt():
    """PEFT has one gate g per layer and no tanh: ours is atanh(g) on every head."""
    from peft import AdaptionPromptConfig, get_peft_model

    ids = tokens(2, 8)
    ours, theirs = tiny_llama(num_key_value_heads=2), tiny_llama(num_key_value_heads=2)
    adapter = add_adapter(ours, AdapterConfig(adapter_len=4, adapter_layers=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(
            theirs, AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
        ).eval()
    wrapped = [m for m in peft.modules() if type(m).__name__ == "AdaptedAttention"]
    with torch.no_grad():
        for gate, module, layer in zip((0.4, -0.7), wrapped, adapter.layers.values(), strict=True):
            module.adaption_gate.fill_(gate)
            module.adaption_prompt.copy_(layer.prompt)
            layer.gate.fill_(torch.atanh(torch.tensor(gate)))
    theirs_loss, ours_loss = peft(input_ids=ids, labels=ids).loss, ours(ids, labels=ids).loss
    torch.testing.assert_close(ours_loss, theirs_loss, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, peft(input_ids=ids).logits, atol=1e-5, rtol=0)
    theirs_loss.backward()
    ours_loss.backward()
    for module, layer in zip(wrapped, adapter.layers.values(), strict=True):
        torch.testing.assert_close(layer.prompt.grad, module.adaption_prompt.grad[0], atol=1e-6, rtol=1e-4)
        slope = 1 - layer.gate.tanh() ** 2
        torch.testing.assert_close((layer.gate.grad / slope).sum(), module.adaption_gate.grad[0], atol=1e-6, rtol=1e-4)


class Float64Llama:
    """A Llama with zero-init attention written out from the paper in float64, one row, no shared code."""

    def __init__(self, model, adapter):
        self.config = model.config
        self.state = {k: v.detach().double() for k, v in model.state_dict().items() if "zero_init" not in k}
        self.prompts = {i: x.prompt.detach().double().requires_grad_() for i, x in adapter.layers.items()}
        self.gates = {i: x.gate.detach().double().requires_grad_() for i, x in adapter.layers.items()}
        self.act = torch.tanh if adapter.config.gate_activation == "tanh" else lambda gate: gate

    def norm(self, x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * self.state[name]

    def rotate(self, x):
        half = x.shape[-1] // 2
        theta = self.config.rope_parameters["rope_theta"]
        angle = torch.arange(len(x)).double()[:, None] * theta ** (-torch.arange(half).double() / half)
        left, right = x[:, :half], x[:, half:]
        return torch.cat([left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], -1)

    def attention(self, x, i):
        prefix, D = f"model.layers.{i}.self_attn.", self.config.head_dim
        wq, wk, wv, wo = (self.state[f"{prefix}{kind}_proj.weight"] for kind in "qkvo")
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        causal = torch.full((len(x), len(x)), float("-inf")).triu(1).double()
        outs = []
        for h in range(self.config.num_attention_heads):
            kv = slice(h // group * D, (h // group + 1) * D)
            q = self.rotate(x @ wq[h * D : (h + 1) * D].T)
            k = self.rotate(x @ wk[kv].T)
            out = (q @ k.T / D**0.5 + causal).softmax(-1) @ (x @ wv[kv].T)
            if i in self.prompts:
                P = self.prompts[i]
                out = out + self.act(self.gates[i][h]) * ((q @ (P @ wk[kv].T).T / D**0.5).softmax(-1) @ (P @ wv[kv].T))
            outs.append(out)
        return torch.cat(outs, -1) @ wo.T

    def loss(self, ids):
        x = self.state["model.embed_tokens.weight"][ids]
        for i in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{i}."
            x = x + self.attention(self.norm(x, f"{prefix}input_layernorm.weight"), i)
            y = self.norm(x, f"{prefix}post_attention_layernorm.weight")
            gate, up, down = (self.state[f"{prefix}mlp.{k}_proj.weight"] for k in ("gate", "up", "down"))
            x = x + (torch.nn.functional.silu(y @ gate.T) * (y @ up.T)) @ down.T
        logits = self.norm(x, "model.norm.weight") @ self.state["lm_head.weight"].T
        return logits, torch.nn.functional.cross_entropy(logits[:-1], ids[1:])


@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_forward_and_gradients_equal_a_float64_reference(activation):
    """Grouped kv heads, and a head_dim apart from hidden / heads."""
    model = tiny_llama(num_key_value_heads=2, head_dim=16)
    adapter = adapted(model, gate_activation=activation)
    ids = tokens(1, 11)[0]
    reference = Float64Llama(model, adapter)
    expected, expected_loss = reference.loss(ids)
    out = model(ids[None], labels=ids[None])
    torch.testing.assert_close(out.logits[0].double(), expected, atol=1e-5, rtol=1e-5)
    out.loss.backward()
    expected_loss.backward()
    for i, layer in adapter.layers.items():
        for mine, theirs in (
            (layer.prompt.grad, reference.prompts[i].grad),
            (layer.gate.grad, reference.gates[i].grad),
        ):
            assert theirs.norm() > 1e-4
            assert (mine.double() - theirs).norm() <= 1e-4 * theirs.norm()


def test_gradient_checkpointing_recomputes_with_the_adapter_of_the_forward():
    model, ids = tiny_model(), tokens()
    adapter = adapted(model, "a", seed=1)
    adapted(model, "b", seed=2)

    def gradient():
        model.zero_grad()
        with use_adapter(model, "a"):
            loss = model(ids, labels=ids).loss
        loss.backward()  # outside the block, where "b" is active
        return [parameter.grad.clone() for parameter in adapter.parameters()]

    plain = gradient()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    for mine, expected in zip(gradient(), plain, strict=True):
        torch.testing.assert_close(mine, expected)


def test_parameters_stay_fp32_on_a_bf16_base_and_still_learn():
    model, ids = tiny_model().to(torch.bfloat16), tokens()
    adapter = add_adapter(model, AdapterConfig(adapter_len=4, adapter_layers=2))
    model.to(torch.float16).to(torch.bfloat16)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    open_gates(adapter)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in adapter.parameters())
    half = {key: value.clone() for key, value in adapter.state_dict().items()}
    full = tiny_model()
    reference = add_adapter(full, AdapterConfig(adapter_len=4, adapter_layers=2))
    reference.load_state_dict(half)
    torch.testing.assert_close(loss.float(), full(ids, labels=ids).loss, atol=0.02, rtol=0)


def test_strength_follows_the_activation():
    for activation, expected in (("tanh", 0.7615942), ("identity", 1.0)):
        layer = ZeroInitAdapter(2, 4, 3, activation)
        assert torch.count_nonzero(layer.gate) == 0
        torch.nn.init.ones_(layer.gate)
        torch.testing.assert_close(layer.strength(), torch.full((3,), expected))


def test_parameters_at_7b_shape():
    """Counted on the meta device: 30 layers x 10 prompts x 4096, and one gate per head."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    adapter = add_adapter(model, AdapterConfig(adapter_len=10, adapter_layers=30))
    assert sum(layer.prompt.numel() for layer in adapter.layers.values()) == 1_228_800
    assert sum(layer.gate.numel() for layer in adapter.layers.values()) == 960
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1_229_760
    assert 4.9e6 < 4 * adapter.num_parameters < 4.95e6


class TestPrompts:
    """Prompts are projected at every forward, once in a generation, and never stale."""

    @pytest.fixture
    def setup(self):
        model, ids = tiny_model(), tokens()
        adapter = adapted(model)
        module = model.model.layers[-1].self_attn
        calls = []
        forward = module.k_proj.forward
        module.k_proj.forward = lambda x: calls.append(x.shape) or forward(x)
        return model, ids, adapter, lambda: sum(shape[-2:] == (4, 32) for shape in calls)

    @torch.no_grad()
    def test_projects_the_prompt_at_every_forward_and_once_in_a_generation(self, setup):
        model, ids, _, projections = setup
        for count in (1, 2, 3):
            model(ids)
            assert projections() == count
        model.generate(ids, max_new_tokens=6, pad_token_id=0, eos_token_id=None)
        assert projections() == 4
        model.generate(ids, max_new_tokens=6, pad_token_id=0, eos_token_id=None, adapter_names="default")
        assert projections() == 5

    @torch.no_grad()
    def test_who_else_is_in_a_batch_changes_nothing(self, setup):
        model, ids, _, _ = setup
        adapted(model, "second", seed=3)
        made = [model(ids, adapter_names=names).logits for names in (["default", None, "second"], ["default"] * 3)]
        torch.testing.assert_close(made[0][0], made[1][0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(made[0][2], self.alone(model, ids, "second")[2], atol=1e-6, rtol=1e-5)

    @staticmethod
    def alone(model, ids, name):
        with use_adapter(model, name):
            return model(ids).logits

    @pytest.mark.parametrize("change", ["prompt", "gate", "base", "data", "replace"])
    @torch.no_grad()
    def test_any_change_is_seen(self, setup, change):
        model, ids, adapter, _ = setup
        layer = adapter.layers[2]
        attention = model.model.layers[-1].self_attn
        before = model(ids).logits
        if change == "prompt":
            layer.prompt.mul_(2)
        elif change == "gate":
            layer.gate.add_(0.5)
        elif change == "base":
            attention.v_proj.weight.mul_(2)
        elif change == "data":
            layer.prompt.data = layer.prompt.data * 2
        else:
            layer.prompt = torch.nn.Parameter(layer.prompt * 2)
        after = model(ids).logits
        assert not torch.allclose(after, before, atol=1e-4)
        with torch.enable_grad():
            torch.testing.assert_close(model(ids).logits.detach(), after, atol=1e-6, rtol=1e-5)

    def test_training_after_inference_still_reaches_the_prompt(self, setup):
        model, ids, adapter, _ = setup
        with torch.no_grad():
            model(ids)
        for _ in range(2):
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())

    @torch.no_grad()
    def test_changing_who_is_served_is_seen(self, setup):
        model, ids, _, _ = setup
        single = model(ids).logits
        for names in (["default", None, "default"], [None, "default", None]):
            with use_adapter(model, names):
                mixed = model(ids).logits
            with use_adapter(model, None):
                bare = model(ids).logits
            for row, name in enumerate(names):
                expected = (bare if name is None else single)[row]
                torch.testing.assert_close(mixed[row], expected, atol=1e-6, rtol=1e-5)

    def test_inference_mode_follows_changes_too(self, setup):
        model, ids, adapter, _ = setup
        with torch.inference_mode():
            before = model(ids).logits
        with torch.no_grad():
            adapter.layers[2].prompt.mul_(2)
        with torch.inference_mode():
            assert not torch.allclose(model(ids).logits, before, atol=1e-4)
