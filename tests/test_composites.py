"""Models around a decoder of the table: what is accepted works, what cannot work is refused."""

import pytest
import torch
import transformers as hf
from tiny import COMMON, GPT2, HEADS, HIDDEN, adapted, tiny_config, tiny_model, tokens

from llama_adapter import add_adapter, use_adapter
from llama_adapter.errors import UnsupportedModelError

MEDIA = 96  # the token that stands for a part of a picture or recording
PATCHES = 4
LAYERS = {"hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": HEADS}
EYE = {**LAYERS, "image_size": 16, "patch_size": 8}
EAR = {"d_model": HIDDEN, "encoder_layers": 1, "encoder_attention_heads": HEADS, "encoder_ffn_dim": 32}


def llava():
    eye = hf.CLIPVisionConfig(**EYE, projection_dim=HIDDEN)
    options = {"image_token_index": MEDIA, "vision_feature_layer": -1}
    config = hf.LlavaConfig(vision_config=eye, text_config=tiny_config("llama"), **options)
    return hf.LlavaForConditionalGeneration(config)


def gemma3():
    options = {"mm_tokens_per_image": PATCHES, "image_token_index": MEDIA}
    eye = hf.SiglipVisionConfig(**EYE)
    config = hf.Gemma3Config(vision_config=eye, text_config=tiny_config("gemma3_text"), **options)
    model = hf.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # made of zeros
    return model


def paligemma():
    eye = hf.SiglipVisionConfig(**EYE, projection_dim=HIDDEN)
    options = {"projection_dim": HIDDEN, "hidden_size": HIDDEN, "image_token_index": MEDIA}
    config = hf.PaliGemmaConfig(vision_config=eye, text_config=tiny_config("gemma"), **options)
    return hf.PaliGemmaForConditionalGeneration(config)


def internvl():
    eye = hf.InternVLVisionConfig(**{**EYE, "image_size": (16, 16), "patch_size": (8, 8)})
    config = hf.InternVLConfig(vision_config=eye, text_config=tiny_config("qwen2"), image_token_id=MEDIA)
    return hf.InternVLForConditionalGeneration(config)


def idefics3():
    config = hf.Idefics3Config(vision_config=EYE, text_config=tiny_config("llama"), image_token_id=MEDIA)
    return hf.Idefics3ForConditionalGeneration(config)


def qwen2_audio():
    ear = hf.Qwen2AudioEncoderConfig(**EAR)
    config = hf.Qwen2AudioConfig(audio_config=ear, text_config=tiny_config("qwen2"), audio_token_index=MEDIA)
    return hf.Qwen2AudioForConditionalGeneration(config)


def voxtral():
    ear = hf.VoxtralEncoderConfig(**LAYERS)
    config = hf.VoxtralConfig(audio_config=ear, text_config=tiny_config("llama"), audio_token_id=MEDIA)
    return hf.VoxtralForConditionalGeneration(config)


def granite_speech():
    ear = {"hidden_dim": HIDDEN, "num_layers": 1, "num_heads": HEADS, "input_dim": 16, "dim_head": 8, "output_dim": 10}
    parts = {"encoder_config": ear, "projector_config": hf.Blip2QFormerConfig(**LAYERS, encoder_hidden_size=HIDDEN)}
    config = hf.GraniteSpeechConfig(text_config=tiny_config("granite"), audio_token_index=MEDIA, **parts)
    return hf.GraniteSpeechForConditionalGeneration(config)


BUILDERS = (llava, gemma3, paligemma, internvl, idefics3, qwen2_audio, voxtral, granite_speech)
COMPOSITES = {build.__name__: build for build in BUILDERS}
composites = pytest.mark.parametrize("name", COMPOSITES)
seeing = pytest.mark.parametrize("name", ["llava", "gemma3"])


def built(name):
    torch.manual_seed(0)
    return COMPOSITES[name]().eval()


def question(model, rows=2) -> dict[str, torch.Tensor]:
    ids = tokens(rows, 9).clamp(max=MEDIA - 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def picture_and_question(model, rows=2) -> dict[str, torch.Tensor]:
    """As the wrapper's processor would write it: a token for each patch, then the text."""
    inputs = question(model, rows)
    ids = torch.cat([torch.full((rows, PATCHES), MEDIA), inputs["input_ids"]], 1)
    pixels = torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    if model.config.model_type == "gemma3":
        inputs["token_type_ids"] = (ids == MEDIA).long()
    return inputs


def check_that_the_adapter_works(model, inputs):
    """Open gates change every row, the bare base is one choice away, and every parameter learns."""
    with torch.no_grad():
        bare = model(**inputs).logits
    adapter = adapted(model)
    logits = model(**inputs).logits
    with torch.no_grad(), use_adapter(model, None):
        assert torch.equal(model(**inputs).logits, bare)
    with torch.no_grad(), use_adapter(model, ["default", None]):
        mixed = model(**inputs).logits
    torch.testing.assert_close(mixed, torch.stack([logits[0].detach(), bare[1]]), atol=1e-5, rtol=1e-4)
    assert ((logits - bare).abs().amax(dim=(1, 2)) > 1e-3).all()
    logits.square().sum().backward()
    for key, parameter in adapter.named_parameters():
        assert parameter.grad is not None, key
        assert torch.count_nonzero(parameter.grad) == parameter.numel(), key


def check_that_cached_generation_is_uncached(model, inputs):
    """By the logits of every step: a tiny random model may well say the same whatever the logits are."""
    adapted(model)

    def logits(**settings):
        settings |= {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        found = model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
        return torch.stack(found.logits)

    cached = logits(use_cache=True)
    torch.testing.assert_close(cached, logits(use_cache=False), atol=1e-5, rtol=1e-4)
    with use_adapter(model, None):
        bare = logits(use_cache=True)
    assert ((cached - bare).abs().amax(dim=2) > 1e-3).all()  # at every step, in every row


@composites
def test_an_adapter_works_on_text(name):
    model = built(name)
    check_that_the_adapter_works(model, question(model))


# Without a cache PaliGemma reads its answer in both directions, as part of the question: bare logits differ, too.
@pytest.mark.parametrize("name", sorted(COMPOSITES.keys() - {"paligemma"}))
def test_cached_generation_is_uncached_on_text(name):
    model = built(name)
    check_that_cached_generation_is_uncached(model, question(model))


@seeing
def test_an_adapter_works_behind_a_picture(name):
    model = built(name)
    check_that_the_adapter_works(model, picture_and_question(model))


@seeing
def test_cached_generation_is_uncached_behind_a_picture(name):
    model = built(name)
    inputs = picture_and_question(model)
    check_that_cached_generation_is_uncached(model, inputs)
    with torch.no_grad():
        other = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
        assert not torch.allclose(model(**inputs).logits, other, atol=1e-4)  # the picture was looked at


# What is refused


def decoder():
    return hf.GPT2Config(**GPT2, is_decoder=True, add_cross_attention=True)


def bert_gpt2():
    encoder = hf.BertConfig(vocab_size=97, **LAYERS)
    return hf.EncoderDecoderModel(hf.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder()))


def vit_gpt2():
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**EYE), decoder())
    return hf.VisionEncoderDecoderModel(config)


def speech_gpt2():
    ear = hf.Wav2Vec2Config(**LAYERS, conv_dim=(8,), conv_kernel=(3,), conv_stride=(2,), num_conv_pos_embeddings=4)
    return hf.SpeechEncoderDecoderModel(hf.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(ear, decoder()))


def gpt2_with_cross_attention():
    return hf.GPT2LMHeadModel(decoder())


def bart():
    sizes = {"d_model": HIDDEN, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 97}
    heads = {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS}
    return hf.BartForConditionalGeneration(hf.BartConfig(**sizes, **heads, encoder_layers=1, decoder_layers=1))


def t5():
    sizes = {"d_model": HIDDEN, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": HEADS, "vocab_size": 97}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes))


@pytest.mark.parametrize("build", [bert_gpt2, vit_gpt2, speech_gpt2, gpt2_with_cross_attention, bart, t5])
def test_a_decoder_that_reads_an_encoder_is_refused_and_left_alone(build):
    model = build()
    before = list(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=r"cannot be adapted: .*(cross-attention|decoder-only)"):
        add_adapter(model)
    assert list(model.state_dict()) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_second_decoder_that_the_hook_does_not_reach_is_refused():
    """A draft model kept inside the model it drafts for: its layers would be adapted and never told by whom."""
    model = tiny_model("llama")
    model.draft = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match="6 modules of class LlamaAttention, not all"):
        add_adapter(model)
    adapted(model.draft)


def test_the_text_sizes_are_those_of_the_wrappers():
    """The tiny configurations must reach the wrapped decoder: a default one would be 100 times as wide."""
    for name in COMPOSITES:
        assert built(name).config.get_text_config(decoder=True).hidden_size == COMMON["hidden_size"]
