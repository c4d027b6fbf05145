"""LLaMA-Adapter V2's parts: norms, scales, biases and LoRA, against formulas written out here, by row and by thread."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from tiny import HIDDEN, LAYERS, adapted, at_once, tiny_llama, tiny_model, tokens
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.pytorch_utils import Conv1D

from llama_adapter import (
    AdapterConfig,
    add_adapter,
    disable_adapter,
    get_adapter,
    merge_adapter,
    reference_model,
    remove_adapter,
    use_adapter,
)
from llama_adapter.base import empty_base
from llama_adapter.core.current import _calls
from llama_adapter.core.families import FAMILIES
from llama_adapter.core.parts import PartsHook, part_shapes
from llama_adapter.errors import AdapterError, ConfigError
from llama_adapter.inference.engine import Engine, Row
from llama_adapter.inference.steps import QuickSteps
from llama_adapter.training.loop import enable_checkpointing
from llama_adapter.training.loss import response_loss
from llama_adapter.training.packing import pack

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BIASED = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL = {
    "norms": True, "linear_scale": SEVEN, "linear_bias": SEVEN, "lora_rank": 2, "lora_targets": SEVEN,
    "gate_scale": True,
}  # fmt: skip
IDS = tokens(4)
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def moved(adapter, seed=3, by=0.2):
    """Every parameter away from where it began."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return adapter


def add(model, name, **config):
    return moved(add_adapter(model, AdapterConfig(**{"adapter_len": 4, "adapter_layers": 2, **config}), name))


@pytest.fixture(scope="module")
def model():
    """One with everything ("v2"), prompts alone ("plain"), no prompts ("chat") and LoRA of another rank ("lora")."""
    model = tiny_llama()
    adapted(model, "plain")
    add(model, "v2", **ALL)
    add(model, "chat", adapter_layers=0, norms=True, linear_scale=SEVEN, linear_bias=SEVEN)
    add(model, "lora", adapter_layers=1, lora_rank=3, lora_alpha=1.5, lora_targets=("q_proj", "up_proj"))
    return model


NAMES = ["v2", None, "plain", "chat", "lora"]


@torch.no_grad()
def of(model, name, ids=IDS):
    return model(ids, adapter_names=name).logits


# --- against formulas


def by_hand(model, adapter, ids):
    """Logits of a Llama with an adapter of all parts, in fp64, from the tensors alone."""
    base = {key: tensor.double() for key, tensor in model.state_dict().items()}
    own = {key: tensor.double() for key, tensor in adapter.state_dict().items()}
    config, rate = model.config, 1.0 if adapter.config.lora_alpha is None else adapter.config.lora_alpha / 2
    heads, kv, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    length = ids.shape[1]

    def norm(x, path):
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * own[f"norms.{path}.weight"]

    def plain(x, path):
        return x @ base[f"model.{path}.weight"].T

    def adapted_linear(x, path):
        x = x * own[f"linears.{path}.scale"]
        low = rate * (x @ own[f"lora.{path}.A"].T @ own[f"lora.{path}.B"].T)
        return plain(x, path) + low + own[f"linears.{path}.bias"]

    def split(x, count):
        return x.unflatten(-1, (count, size)).transpose(-2, -3)

    def rotated(x):
        angles = torch.arange(length).double()[:, None] / 10000.0 ** (torch.arange(0, size, 2).double() / size)
        left, right = x.chunk(2, -1)
        return torch.cat([left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()], -1)

    x = base["model.embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        at = f"layers.{i}."
        y = norm(x, at + "input_layernorm")
        q, k, v = (
            split(adapted_linear(y, f"{at}self_attn.{n}_proj"), c) for n, c in (("q", heads), ("k", kv), ("v", kv))
        )
        q, k, v = rotated(q), rotated(k).repeat_interleave(heads // kv, 1), v.repeat_interleave(heads // kv, 1)
        scores = q @ k.mT / size**0.5 + torch.full((length, length), float("-inf")).double().triu(1)
        out = scores.softmax(-1) @ v
        if f"{at}prompt" in own:
            k, v = (split(plain(own[f"{at}prompt"], f"{at}self_attn.{n}_proj"), kv) for n in "kv")
            k, v = k.repeat_interleave(heads // kv, 0), v.repeat_interleave(heads // kv, 0)
            gate = own[f"{at}gate_scale"] * own[f"{at}gate"].tanh()
            out = out + gate[:, None, None] * ((q @ k.mT / size**0.5).softmax(-1) @ v)
        x = x + adapted_linear(out.transpose(1, 2).flatten(2), f"{at}self_attn.o_proj")
        y = norm(x, at + "post_attention_layernorm")
        gate = torch.nn.functional.silu(adapted_linear(y, f"{at}mlp.gate_proj"))
        x = x + adapted_linear(gate * adapted_linear(y, f"{at}mlp.up_proj"), f"{at}mlp.down_proj")
    return norm(x, "norm") @ base["lm_head.weight"].T


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_all_parts_together_are_the_formula_in_float64(alpha):
    model = tiny_llama()
    adapter = add(model, "v2", **ALL, lora_alpha=alpha)
    expected = by_hand(model, adapter, IDS)
    torch.testing.assert_close(of(model, "v2").double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_parts_on_every_family_are_a_base_with_such_weights(family):
    """W, b and norms are written into a copy by hand; a base without a bias gets one from a hook."""
    model = tiny_model(family)
    try:
        part_shapes(AdapterConfig(adapter_layers=0, linear_bias=("none",)), model)
    except ConfigError as error:
        names = tuple(str(error).partition("known: ")[2].rstrip(".").split(", "))
    norms = any("norm" in name and "weight" in name and "attn" not in name for name, _ in model.named_parameters())
    norms = norms or family == "gpt2"
    expected = copy.deepcopy(model)
    adapter = add(
        model,
        "v2",
        adapter_layers=0,
        norms=norms,
        linear_scale=names,
        linear_bias=names,
        lora_rank=2,
        lora_targets=names,
    )
    own = adapter.state_dict()
    with torch.no_grad():
        for prefix in adapter.homes:
            kind, _, path = prefix.partition(".")
            home = expected.base_model.get_submodule(path)
            if kind == "norms":
                for name, parameter in home.named_parameters():
                    parameter.copy_(own[f"{prefix}.{name}"])
            elif kind == "linears":
                low = own[f"lora.{path}.B"] @ own[f"lora.{path}.A"]
                low = low.T if isinstance(home, Conv1D) else low
                scale = own[f"{prefix}.scale"]
                home.weight.copy_((home.weight + low) * (scale[:, None] if isinstance(home, Conv1D) else scale))
                home.register_forward_hook(lambda m, a, y, b=own[f"{prefix}.bias"]: y + b)
    assert len({prefix.partition(".")[0] for prefix in adapter.homes}) == 2 + norms
    assert not torch.allclose(of(model, "v2"), of(model, None), atol=1e-3)
    torch.testing.assert_close(of(model, "v2"), expected(IDS).logits.detach(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_is_the_base_bit_for_bit(kind, dtype):
    model = tiny_model(kind, dtype=dtype)
    before = model(IDS).logits
    names = {"gpt2": ("c_attn", "c_fc"), "phi3": ("qkv_proj", "gate_up_proj")}.get(kind, SEVEN)
    config = AdapterConfig(
        adapter_len=4, norms=True, linear_scale=names, linear_bias=names, lora_rank=2, lora_targets=names
    )
    adapter = add_adapter(model, config, "new")
    assert torch.equal(model(IDS).logits, before)
    moved(adapter)
    assert model(IDS).logits.dtype == dtype
    assert not torch.equal(model(IDS).logits, before)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}


def test_norms_of_queries_and_keys_stay_the_model_s():
    adapter = add(tiny_model("qwen3"), "v2", norms=True)
    paths = {key for key in adapter.state_dict() if key.startswith("norms.")}
    inside = {f"norms.layers.{i}.{n}_layernorm.weight" for i in range(LAYERS) for n in ("input", "post_attention")}
    assert paths == {"norms.norm.weight", *inside}


# --- parameters


def test_the_first_step_moves_all_but_prompts_and_a_and_the_second_all():
    model = tiny_llama()
    adapter = add_adapter(model, AdapterConfig(adapter_len=4, adapter_layers=2, **ALL))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0)
    base = {key: tensor.clone() for key, tensor in model.state_dict().items() if "adapter_" not in key}

    def step():
        before = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        return {key for key, tensor in adapter.state_dict().items() if not torch.equal(tensor, before[key])}

    resting = {key for key in adapter.state_dict() if key.endswith((".prompt", ".A", ".gate_scale"))}
    assert step() == adapter.state_dict().keys() - resting
    assert step() == adapter.state_dict().keys()
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in base.items())


def llama(hidden=4096, inner=11008, layers=32):
    return empty_base(
        LlamaConfig(
            hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=hidden // 128
        )
    )


def count(model, **config):
    return sum(torch.Size(shape).numel() for shape in part_shapes(AdapterConfig(**config), model).values())


def test_counts_at_the_sizes_that_were_published():
    seven = llama()
    assert count(seven, norms=True, linear_bias=BIASED) == 1_363_968  # V2's instruction tuning
    chat = {"adapter_layers": 0, "norms": True, "linear_scale": SEVEN, "linear_bias": SEVEN}
    assert count(seven, **chat) == 2_764_800
    assert round(count(llama(8192, 22016, 80), **chat) / 1e6, 1) == 13.8  # the dialog checkpoint on 65B
    assert count(seven, lora_rank=16, lora_targets=SEVEN) == 103_072_544 - 63_095_552 - 32  # new_gate is one a layer


def test_a_whole_adapter_at_seven_billion_counts_prompts_gates_and_parts():
    config = AdapterConfig(adapter_layers=31, norms=True, linear_bias=BIASED, gate_scale=True)
    adapter = add_adapter(llama(), config)
    assert adapter.num_parameters == 31 * (10 * 4096 + 32 + 1) + 1_363_968


@pytest.mark.parametrize("field", ["linear_scale", "linear_bias", "lora_targets"])
def test_an_unknown_linear_is_refused_with_the_names_there_are(field):
    model = tiny_model("phi3")
    rank = {"lora_rank": 2} if field == "lora_targets" else {}
    with pytest.raises(
        ConfigError, match=f"{field}: unknown linear 'w1'; known: down_proj, gate_up_proj, o_proj, qkv_proj"
    ):
        add_adapter(model, AdapterConfig(**{field: ("w1",)}, **rank))
    assert not hasattr(model, "_llama_adapters")


def test_norms_without_weights_are_refused():
    with pytest.raises(ConfigError, match="none with weights"):
        add_adapter(tiny_model("olmo"), AdapterConfig(norms=True))


# --- who serves whom


def test_rows_of_one_batch_are_served_each_by_its_own(model):
    ids = tokens(5)
    mixed = of(model, NAMES, ids)
    assert torch.equal(mixed[1], of(model, None, ids)[1])
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(mixed[row], of(model, name, ids)[row], atol=1e-6, rtol=1e-5)
    assert len({of(model, name, ids)[0].sum().item() for name in NAMES}) == len(NAMES)


def test_rows_that_a_layer_lays_end_to_end_keep_their_adapters():
    model = tiny_model("qwen2_moe")  # its shared expert sees [B x T, hidden]
    for name in ("one", "two"):
        moved(add(model, name, adapter_layers=0, linear_scale=("up_proj",), linear_bias=("up_proj",), lora_rank=2,
                  lora_targets=("gate_proj",)), seed=len(name) + ord(name[0]), by=0.5)  # fmt: skip
    mixed = of(model, ["one", "two", None, "one"])
    for row, name in enumerate(["one", "two", None, "one"]):
        torch.testing.assert_close(mixed[row], of(model, name)[row], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(mixed[0], of(model, "two")[0], atol=1e-4)


def test_each_row_s_gradient_reaches_its_own_adapter(model):
    for name in ("v2", "chat"):
        adapter = get_adapter(model, name)
        model.zero_grad()
        model(IDS[:2], adapter_names=name).logits[0].sum().backward()
        alone = {key: parameter.grad.clone() for key, parameter in adapter.named_parameters()}
        model.zero_grad()
        model(IDS[:2], adapter_names=[name, "lora"]).logits[0].sum().backward()
        for key, parameter in adapter.named_parameters():
            torch.testing.assert_close(parameter.grad, alone[key], atol=1e-5, rtol=1e-4)
        other = {"v2": "chat", "chat": "v2"}[name]
        assert all(not p.grad.any() for p in get_adapter(model, other).parameters() if p.grad is not None)


def test_blocks_and_disabling_reach_the_parts(model):
    bare = of(model, None)
    with use_adapter(model, "v2"):
        assert torch.equal(model(IDS).logits, of(model, "v2"))
        with disable_adapter(model):
            assert torch.equal(model(IDS).logits, bare)
    assert torch.equal(reference_model(model)(IDS).logits, bare)


def test_generation_with_a_cache_is_that_without(model):
    ids = tokens(5)
    made = model.generate(ids, adapter_names=NAMES, **GREEDY)
    for row, name in enumerate(NAMES):
        seen = ids[row : row + 1]
        for _ in range(5):
            seen = torch.cat([seen, of(model, name, seen)[:, -1].argmax(-1, keepdim=True)], 1)
        assert seen[0].tolist() == made[row].tolist(), name
    beams = model.generate(ids[:2], adapter_names=["v2", None], num_beams=2, **GREEDY)
    for row, name in enumerate(["v2", None]):
        alone = model.generate(ids[row : row + 1], adapter_names=name, num_beams=2, **GREEDY)
        assert torch.equal(beams[row], alone[0])


@pytest.mark.parametrize("compile", [False, True])
def test_the_engine_answers_as_generate_does(model, compile, caplog):
    ids = tokens(5)
    expected = model.generate(ids, adapter_names=NAMES, **GREEDY)[:, ids.shape[1] :].tolist()
    rows = [Row(ids[row].tolist(), name, max_new_tokens=5) for row, name in enumerate(NAMES)]
    assert Engine(model).generate(rows, compile=compile) == expected
    assert ("--compile is left out" in caplog.text) == compile


def test_batches_without_parts_take_quick_steps_beside_them(monkeypatch):
    model = tiny_llama()
    adapted(model, "plain")
    steps, before = [], QuickSteps.__call__
    monkeypatch.setattr(QuickSteps, "__call__", lambda self, *args: steps.append(1) or before(self, *args))
    rows = [Row(IDS[0].tolist(), "plain", max_new_tokens=4), Row(IDS[1].tolist(), max_new_tokens=4)]
    expected = Engine(model).generate(rows)
    add(model, "v2", **ALL)
    engine = Engine(model)
    steps.clear()
    assert engine.generate(rows) == expected
    assert steps
    steps.clear()
    engine.generate([*rows, Row(IDS[2].tolist(), "v2", max_new_tokens=4)])
    assert not steps


def test_threads_get_their_own(model):
    ids = tokens(5)
    expected = {name: of(model, name, ids) for name in NAMES}
    wrong = []

    def work(name):
        for _ in range(3):
            if not torch.equal(of(model, name, ids), expected[name]):
                wrong.append(name)

    at_once([lambda name=name: work(name) for name in NAMES])
    assert wrong == []


# --- training's ways to compute


def stop_checkpointing(model):
    for layer in model.model.layers:
        layer.gradient_checkpointing = layer.training = False


def gradients(model, adapter, compute):
    model.zero_grad()
    compute().backward()
    return {key: parameter.grad.clone() for key, parameter in adapter.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_gradients(reentrant):
    model = tiny_llama()
    adapter = add(model, "v2", **ALL)
    other = add(model, "other", adapter_layers=0, norms=True, linear_bias=SEVEN)
    names = ["v2", "other", None, "v2"]

    def loss():
        states = model.get_input_embeddings()(IDS).detach().requires_grad_()  # reentrant recomputation wants it
        return model(inputs_embeds=states, adapter_names=names, labels=IDS, use_cache=False).loss

    for handle in (adapter, other):
        expected = gradients(model, handle, loss)
        enable_checkpointing(model)
        for layer in model.model.layers if reentrant else ():
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=True)
        found = gradients(model, handle, loss)
        stop_checkpointing(model)
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], atol=1e-7, rtol=1e-5)
    assert _calls.stack == []


def test_packed_examples_give_the_gradients_of_rows_of_their_own():
    from llama_adapter.data.encode import Encoded

    model = tiny_llama()
    adapter = add(model, "v2", **ALL)
    start = IDS[3, :4].tolist()
    examples = [
        Encoded(input_ids=start + ids[:n].tolist(), labels=[-100] * 6 + ids[2:n].tolist(), truncated=False)
        for ids, n in zip(IDS[:3], (5, 7, 9), strict=True)
    ]

    def alone():
        return sum(response_loss(model, pack([example]), torch.device("cpu")) for example in examples)

    expected = gradients(model, adapter, alone)
    found = gradients(model, adapter, lambda: response_loss(model, pack(examples), torch.device("cpu")))
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=1e-4)


# --- what is left behind


def hooks(model):
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if isinstance(hook, PartsHook)
    ]


def test_hooks_are_there_only_while_parts_are_and_the_base_is_untouched():
    model = tiny_llama()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    bare = model(IDS).logits
    adapted(model, "plain")
    assert hooks(model) == []
    add(model, "v2", **ALL)
    add(model, "chat", adapter_layers=0, norms=True)
    enable_checkpointing(model)
    model(IDS, use_cache=False)
    stop_checkpointing(model)
    kept = of(model, "chat")
    remove_adapter(model, "v2")
    assert torch.equal(of(model, "chat"), kept)
    remove_adapter(model, "chat")
    assert hooks(model) == []
    remove_adapter(model, "plain")
    assert torch.equal(model(IDS).logits, bare)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_forward_that_fails_leaves_nothing(model):
    def fail(*args):
        raise RuntimeError("in the middle")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        of(model, "v2")
    handle.remove()
    assert _calls.stack == []
    states = torch.ones(1, HIDDEN)
    linear = model.model.layers[1].mlp.up_proj
    assert torch.equal(linear(states), torch.nn.functional.linear(states, linear.weight))


def test_a_forward_that_ctrl_c_ended_is_forgotten_by_the_next(model):
    def stop(*args):
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        of(model, "v2")
    handle.remove()
    of(model, None)
    assert _calls.stack == []


def test_an_adapter_removed_while_a_forward_runs_ends_it():
    model = tiny_llama()
    add(model, "chat", adapter_layers=0, linear_bias=SEVEN)
    add(model, "other", adapter_layers=0, norms=True)
    handle = model.model.layers[2].self_attn.o_proj.register_forward_hook(lambda *args: remove_adapter(model, "chat"))
    with pytest.raises(AdapterError, match="removed while a forward used it"):
        model(IDS, adapter_names="chat")
    handle.remove()


def test_copies_answer_for_themselves(model):
    expected = of(model, "v2")
    twin = copy.deepcopy(model)
    moved(get_adapter(twin, "v2"), seed=9)
    assert torch.equal(of(model, "v2"), expected)
    assert not torch.equal(of(twin, "v2"), expected)
    remove_adapter(twin, "v2")
    assert torch.equal(of(model, "v2"), expected)
    read = pickle.load(io.BytesIO(pickle.dumps(model)))
    assert torch.equal(of(read, "v2"), expected)


def test_a_lora_of_peft_lives_beside_ours():
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny_llama()
    add(model, "v2", **ALL)
    expected = of(model, "v2")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), model)
    torch.testing.assert_close(of(model, "v2"), expected, atol=1e-6, rtol=1e-5)
    after = tiny_llama()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), after)
    adapter = add_adapter(after, AdapterConfig(adapter_len=4, adapter_layers=2, **ALL), "v2")
    assert adapter.state_dict().keys() == get_adapter(model, "v2").state_dict().keys()
    adapter.load_state_dict(get_adapter(model, "v2").state_dict())
    torch.testing.assert_close(of(after, "v2"), expected, atol=1e-6, rtol=1e-5)


# --- merging


@pytest.mark.parametrize("kind", ["llama", "qwen3", "granite", "gpt2", "gemma", "starcoder2"])
def test_a_merged_base_answers_as_the_adapter_did_and_is_read_back(kind, tmp_path):
    model = tiny_model(kind)
    names = {"gpt2": ("c_attn", "c_proj"), "starcoder2": ("q_proj", "c_fc")}.get(kind, ("q_proj", "down_proj"))
    biases = ("q_proj", "o_proj") if kind in ("gemma", "qwen3") else names
    lora = {"lora_rank": 2, "lora_alpha": 3.0, "lora_targets": names}
    add(model, "v2", adapter_layers=0, norms=True, linear_scale=names, linear_bias=biases, **lora)
    expected = of(model, "v2")
    merge_adapter(model, "v2")
    assert hooks(model) == []
    torch.testing.assert_close(model(IDS).logits, expected, atol=2e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(read(IDS).logits, expected, atol=2e-5, rtol=1e-4)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_cannot_be_merged_is_refused_and_nothing_changes(model):
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(AdapterError, match="'v2' has prompts, which cannot be merged"):
        merge_adapter(model, "v2")
    with pytest.raises(AdapterError, match="would change the base of other adapters"):
        merge_adapter(model, "chat")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    other = tiny_model("qwen2")
    add(other, "v2", adapter_layers=0, linear_bias=("q_proj", "o_proj"))
    expected = of(other, "v2")
    with pytest.raises(AdapterError, match=r"The bias of model\.layers\.0\.self_attn\.o_proj cannot be merged"):
        merge_adapter(other)
    assert torch.equal(of(other, "v2"), expected)
    with use_adapter(other, "v2"), pytest.raises(AdapterError, match="in use"):
        merge_adapter(other, "v2")


def test_a_condition_wants_prompts(model):
    with pytest.raises(AdapterError, match="'chat' has no prompts"):
        use_adapter(model, "chat", torch.zeros(4, HIDDEN))
