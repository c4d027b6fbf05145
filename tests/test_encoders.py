"""Encoders: BERT, RoBERTa, ViT and CLIP's towers against a float64 formula, with heads of their own, and a trainer."""

import math

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from llama_adapter import (
    AdapterConfig,
    add_adapter,
    get_adapter,
    load_adapter,
    remove_adapter,
    save_adapter,
    set_adapter,
    use_adapter,
)
from llama_adapter.base import load_config
from llama_adapter.core.attention import SLOT
from llama_adapter.core.families import attention_modules
from llama_adapter.core.families_encoder import ENCODERS
from llama_adapter.errors import AdapterError, ConfigError, UnsupportedModelError
from llama_adapter.formats.inspect import describe_adapter

HIDDEN, LAYERS, HEADS, LABELS = 16, 3, 2, 3
SHAPE = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 24,
    "initializer_range": 0.3,
}  # fmt: skip
TEXT = {**SHAPE, "vocab_size": 50, "max_position_embeddings": 40, "num_labels": LABELS}
PICTURE = {**SHAPE, "image_size": 12, "patch_size": 4, "num_labels": LABELS}
MODELS = {
    "bert": (BertForSequenceClassification, BertConfig, TEXT, "classifier"),
    "roberta": (RobertaForSequenceClassification, RobertaConfig, TEXT, "classifier"),
    "vit": (ViTForImageClassification, ViTConfig, PICTURE, "classifier"),
    "clip_text_model": (CLIPTextModelWithProjection, CLIPTextConfig, {**TEXT, "projection_dim": 5}, "text_projection"),
    "clip_vision_model": (
        CLIPVisionModelWithProjection, CLIPVisionConfig, {**PICTURE, "projection_dim": 5}, "visual_projection",
    ),
}  # fmt: skip


def build(family, attention="sdpa"):
    torch.manual_seed(0)
    cls, config, values, _ = MODELS[family]
    return cls(config(**values, attn_implementation=attention)).eval()


def inputs(family, rows=4):
    generator = torch.Generator().manual_seed(1)
    if "pixel" in MODELS[family][0].main_input_name:
        return {"pixel_values": torch.randn(rows, 3, 12, 12, generator=generator)}
    mask = torch.ones(rows, 9, dtype=torch.int64)
    mask[1, 6:] = 0  # rows of unlike length
    return {"input_ids": torch.randint(3, 50, (rows, 9), generator=generator), "attention_mask": mask}


def answer(model, **given):
    out = model(**given)
    return out[0] if model.config.model_type.startswith("clip") else out.logits


def opened(model, name="default", seed=1, **config):
    torch.manual_seed(seed)
    adapter = add_adapter(model, AdapterConfig(**{"adapter_len": 4, "adapter_layers": 2, **config}), name)
    with torch.no_grad():
        for key, parameter in adapter.named_parameters():
            if not key.endswith("prompt"):
                parameter.normal_()
    return adapter


def test_every_encoder_of_the_table_is_tested():
    assert MODELS.keys() == ENCODERS.keys()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_attention_is_the_formula_in_float64(family, attention):
    """What each layer's attention gives before its output projection: text + act(g) softmax(q (Wk P)') (Wv P)."""
    model, given = build(family, attention), inputs(family)
    adapter = opened(model)
    seen = {}

    def watch(module, args, kwargs):
        seen[module.layer_idx] = (args[0] if args else kwargs["hidden_states"]).double()

    def answered(module, args, kwargs, output):
        seen[module.layer_idx, "out"] = output[0].double()

    modules = attention_modules(model)
    for module in modules:
        module.register_forward_pre_hook(watch, with_kwargs=True)
        module.register_forward_hook(answered, with_kwargs=True)
    answer(model, **given)
    found = dict(seen)
    for module in modules:  # what the base alone makes of the very same inputs
        layer = adapter.layers.get(module.layer_idx)
        if layer is None:
            continue
        x, slot = found[module.layer_idx], getattr(module, SLOT)
        names = [("query", "key", "value"), ("q_proj", "k_proj", "v_proj")][hasattr(module, "q_proj")]
        q, k, v = (
            torch.nn.functional.linear(y, getattr(module, n).weight.double(), getattr(module, n).bias.double())
            for y, n in zip((x, layer.prompt.double(), layer.prompt.double()), names, strict=True)
        )
        q = q.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (y.unflatten(-1, (HEADS, -1)).transpose(0, 1) for y in (k, v))
        weights = (q @ k.mT / math.sqrt(HIDDEN / HEADS)).softmax(-1)
        term = (layer.gate.double().tanh()[:, None, None] * (weights @ v)).transpose(1, 2).flatten(2)
        out = getattr(module, "o_proj", None) or getattr(module, "out_proj", None)
        if out is not None:
            term = term @ out.weight.double().T
        gate = layer.gate.clone()
        layer.gate.zero_()
        seen.clear()
        answer(model, **given)
        torch.testing.assert_close(seen[module.layer_idx], x)  # layers below have not changed
        expected = seen[module.layer_idx, "out"] + term
        torch.testing.assert_close(found[module.layer_idx, "out"], expected, atol=2e-6, rtol=1e-5)
        assert term.abs().max() > 0.05
        layer.gate.copy_(gate)
        assert slot.get(adapter) is layer


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_a_new_adapter_with_its_head_changes_nothing(family):
    model, given = build(family), inputs(family)
    expected = answer(model, **given)
    adapter = add_adapter(model, AdapterConfig(adapter_len=4, modules_to_save=(MODELS[family][3],)))
    assert torch.equal(answer(model, **given), expected)
    assert adapter.config.adapter_layers == 1
    head = dict(model.get_submodule(MODELS[family][3]).named_parameters())
    own = [key for key, _ in adapter.named_parameters() if key.startswith("modules_to_save.")]
    assert own == [f"modules_to_save.{MODELS[family][3]}.{key}" for key in head if "llama_adapter" not in key] != []
    remove_adapter(model)
    assert torch.equal(answer(model, **given), expected)
    assert not any("llama_adapter" in key or SLOT in key for key, _ in model.named_modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_rows_have_adapters_and_heads_of_their_own(family):
    model, given, head = build(family), inputs(family), MODELS[family][3]
    base = answer(model, **given)
    opened(model, "a", 1, modules_to_save=(head,))
    opened(model, "b", 2, adapter_len=6)  # with the base's head
    names = ["a", None, "b", "a"]
    mixed = answer(model, **given, adapter_names=names)
    for row, name in enumerate(names):
        one = {key: tensor[row : row + 1] for key, tensor in given.items()}
        with use_adapter(model, name):
            torch.testing.assert_close(mixed[row], answer(model, **one)[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mixed[row], answer(model, **one, adapter_names=name)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1], base[1], atol=1e-6, rtol=1e-6)
    set_adapter(model, "b")
    assert torch.equal(answer(model, **given, adapter_names=None), base)
    assert (mixed[0] - base[0]).abs().max() > 1e-2 < (mixed[2] - base[2]).abs().max()


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_a_file_and_back(family, tmp_path):
    model, given = build(family), inputs(family)
    opened(model, "a", modules_to_save=(MODELS[family][3],))
    expected = answer(model, **given)
    save_adapter(model, tmp_path)
    other = build(family)
    load_adapter(other, tmp_path, "one")
    load_adapter(other, tmp_path, "two", activate=True)  # beside one that has its copy of the head already
    assert torch.equal(answer(other, **given), expected)
    assert describe_adapter(tmp_path)["parameters"] == get_adapter(other, "two").num_parameters


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_transformers_trainer_trains_adapter_and_head(family, tmp_path):
    model, given = build(family), inputs(family, rows=16)
    labels = torch.arange(16) % LABELS
    adapter = add_adapter(model, AdapterConfig(adapter_len=4, adapter_layers=2, modules_to_save=("classifier",)))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if "adapter_" not in key}
    start = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    rows = [{**{key: tensor[i] for key, tensor in given.items()}, "labels": int(labels[i])} for i in range(16)]
    options = {"num_train_epochs": 12, "learning_rate": 0.05, "report_to": [], "save_strategy": "no", "use_cpu": True}
    arguments = TrainingArguments(tmp_path, per_device_train_batch_size=8, disable_tqdm=True, **options)
    with torch.no_grad():
        first = model(**given, labels=labels).loss
    Trainer(model, arguments, train_dataset=rows).train()
    model.eval()
    with torch.no_grad():
        assert model(**given, labels=labels).loss < 0.7 * first
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert all(not torch.equal(tensor, start[key]) for key, tensor in adapter.state_dict().items())


def test_a_head_over_tokens():
    torch.manual_seed(0)
    model, given = BertForTokenClassification(BertConfig(**TEXT)).eval(), inputs("bert")
    with torch.no_grad():
        base = model(**given).logits
        opened(model, modules_to_save=("classifier",))
        mixed = model(**given, adapter_names=["default", None, "default", None]).logits
        assert torch.equal(mixed[1], model(**given, adapter_names=None).logits[1])
        torch.testing.assert_close(mixed[0], model(**given).logits[0])
    torch.testing.assert_close(mixed[[1, 3]], base[[1, 3]], atol=1e-6, rtol=1e-6)


def test_a_linear_probe_is_a_head_alone():
    model = build("bert")
    adapter = add_adapter(model, AdapterConfig(adapter_layers=0, modules_to_save=("classifier",)))
    assert [key for key, _ in adapter.named_parameters()] == [
        "modules_to_save.classifier.weight", "modules_to_save.classifier.bias",
    ]  # fmt: skip


@torch.no_grad()
def test_norms_and_lora_on_an_encoder():
    model, given = build("bert"), inputs("bert")
    base = answer(model, **given)
    adapter = add_adapter(model, AdapterConfig(norms=True, lora_rank=2, lora_targets=("query", "value")))
    assert torch.equal(answer(model, **given), base)
    assert sum(key.startswith("lora.") for key, _ in adapter.named_parameters()) == 4 * LAYERS
    for parameter in adapter.parameters():
        parameter.normal_()
    assert (answer(model, **given) - base).abs().max() > 0.1


@torch.no_grad()
def test_the_two_towers_of_clip_have_adapters_of_their_own(tmp_path):
    torch.manual_seed(0)
    text, picture = (MODELS[name][2] for name in ("clip_text_model", "clip_vision_model"))
    config = CLIPConfig(text_config=text, vision_config={**picture, "hidden_size": 24}, projection_dim=5)
    model = CLIPModel(config).eval()
    given = {**inputs("clip_text_model"), **inputs("clip_vision_model")}
    base = model(**given)
    with pytest.raises(
        UnsupportedModelError, match=r"two encoders, each for an adapter of its own: pass model.vision_mo"
    ):
        add_adapter(model)
    opened(model.vision_model)
    seen = model(**given)
    assert torch.equal(seen.text_embeds, base.text_embeds)
    assert (seen.image_embeds - base.image_embeds).abs().max() > 1e-2
    opened(model.text_model)
    assert (model(**given).text_embeds - base.text_embeds).abs().max() > 1e-2
    with pytest.raises(AdapterError, match=r"Several parts of this model have adapters: .* text_model, vision_model"):
        save_adapter(model, tmp_path)
    save_adapter(model.text_model, tmp_path)
    assert torch.equal(model(**given, adapter_names=None).image_embeds, base.image_embeds)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("clasifier", "unknown module 'clasifier'; did you mean 'classifier'"),
        ("bert", "'bert' has layers in it"),
        ("dense", "it is"),
        ("embeddings", "'embeddings' has buffers"),
    ],
)
def test_modules_that_cannot_be_an_adapter_s_own(name, sentence):
    model = build("bert")
    with pytest.raises(ConfigError, match=f"modules_to_save: .*{sentence}"):
        add_adapter(model, AdapterConfig(modules_to_save=(name,)))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_commands_for_text_refuse_an_encoder(tmp_path):
    build("bert").config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"is an encoder \(bert\) and writes no text"):
        load_config(str(tmp_path))
