"""Towers: tiny random encoders of every kind, against what transformers itself computes from the same weights."""

import json
import logging
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from llama_adapter.conditions import processors
from llama_adapter.conditions.cache import FeatureCache
from llama_adapter.conditions.config import ConditionConfig
from llama_adapter.conditions.perception import Perception, condition_config
from llama_adapter.conditions.tower_families import (
    REFUSED_TOWERS,
    TOWERS,
    check_tower,
    spread_depths,
    tower_width,
)
from llama_adapter.conditions.towers import load_tower, load_tower_config
from llama_adapter.errors import AdapterError, DataError, ModelError, UnsupportedModelError

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
EYES = {**SMALL, "image_size": 32, "patch_size": 8}
TEXT = {**SMALL, "num_hidden_layers": 1, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WHISPER = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_source_positions": 50,  # one second
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
WAVE = {**SMALL, "vocab_size": 99, "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2)}
WAVE |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2}


def clip_vision(projected):
    kind = CLIPVisionModelWithProjection if projected else CLIPVisionModel
    return kind(CLIPVisionConfig(**EYES, projection_dim=20))


MADE = {
    "clip": lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=EYES, projection_dim=20)),
    "clip vision, projected": lambda: clip_vision(True),
    "clip vision": lambda: clip_vision(False),
    "siglip": lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=EYES)),
    "siglip vision": lambda: SiglipVisionModel(SiglipVisionConfig(**EYES)),
    "siglip vision, headless": lambda: SiglipVisionModel(SiglipVisionConfig(**EYES, vision_use_head=False)),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**EYES, num_register_tokens=2)),
    "whisper": lambda: WhisperForConditionalGeneration(WhisperConfig(**WHISPER)),
    "whisper, headless": lambda: WhisperModel(WhisperConfig(**WHISPER)),
    "wav2vec2": lambda: Wav2Vec2Model(Wav2Vec2Config(**WAVE)),
    "wav2vec2, ctc": lambda: Wav2Vec2ForCTC(Wav2Vec2Config(**WAVE)),
    "wav2vec2, stable": lambda: Wav2Vec2Model(
        Wav2Vec2Config(**WAVE, do_stable_layer_norm=True, feat_extract_norm="layer")
    ),
}
SIGHT = [name for name in MADE if name.startswith(("clip", "siglip", "dino"))]
HEARING = [name for name in MADE if name not in SIGHT]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Name -> (transformers' model, its folder); norms and biases are random too, or they would hide a mistake."""
    found = {}

    def make(name):
        if name not in found:
            torch.manual_seed(0)
            model = MADE[name]().eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            folder = tmp_path_factory.mktemp(name.replace(" ", "_").replace(",", ""))
            model.save_pretrained(folder)
            found[name] = model, folder
        return found[name]

    return make


def photo(seed=0, width=50, height=40):
    """Smooth colours with some noise."""
    noise = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def sound(seconds=0.5, seed=0):
    return np.random.default_rng(seed).normal(size=int(16_000 * seconds)).astype(np.float32) * 0.1


def an_input(name, seed=0):
    return photo(seed) if name in SIGHT else sound(0.3 + 0.1 * seed, seed)


def pixels(tower, picture):
    """[3, H, W] that the tower sees."""
    return tower.pieces(picture)[0].values


@torch.no_grad()
def last_scale(name, model, tower, given):
    """What the whole model gives for one input, by its own outputs."""
    if name == "clip":
        return model.get_image_features(pixels(tower, given)[None]).pooler_output[0]
    if name in SIGHT:
        out = model(pixels(tower, given)[None]) if name != "siglip" else None
        if name == "siglip":
            return model.get_image_features(pixels(tower, given)[None]).pooler_output[0]
        if name == "clip vision, projected":
            return out.image_embeds[0]
        return out.last_hidden_state[0].mean(0) if "headless" in name else out.pooler_output[0]
    if name.startswith("whisper"):
        mel = WhisperFeatureExtractor(chunk_length=1)(given, sampling_rate=16_000, return_tensors="pt").input_features
        states = getattr(model, "model", model).encoder(mel).last_hidden_state[0]
        return states[: -(-len(given) // 320)].mean(0)
    values = Wav2Vec2FeatureExtractor()(given, sampling_rate=16_000, return_tensors="pt").input_values
    out = getattr(model, "wav2vec2", model)(values, output_hidden_states=True)
    return out.hidden_states[-1][0].mean(0)


@pytest.mark.parametrize("name", MADE)
def test_the_last_scale_is_what_the_model_itself_gives(made, name):
    model, folder = made(name)
    tower = load_tower(str(folder))
    given = an_input(name)
    found = tower.features([given], (-1,))
    assert found.shape == (1, 1, tower.width)
    expected = last_scale(name, model, tower, given)
    assert expected.std() > 0.05
    torch.testing.assert_close(found[0, 0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def by_hand(name, model, tower, given, depth):
    """The same for any depth: run a copy of the model that ends there."""
    trunk = getattr(model, "vision_model", getattr(model, "wav2vec2", model))
    if name.startswith("whisper"):
        trunk = getattr(model, "model", model).encoder
        layers, place = trunk.layers, trunk
    elif name == "dinov3":
        layers, place = trunk.model.layer, trunk.model
    else:
        layers, place = trunk.encoder.layers, trunk.encoder
    attribute = "layer" if name == "dinov3" else "layers"
    setattr(place, attribute, layers[:depth])
    try:
        return last_scale(name, model, tower, given)
    finally:
        setattr(place, attribute, layers)


@pytest.mark.parametrize("name", SIGHT)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_an_inner_scale_is_what_a_shorter_model_gives(made, name, depth):
    model, folder = made(name)
    tower = load_tower(str(folder))
    given = photo()
    expected = by_hand(name, model, tower, given, depth)
    both = tower.features([given], (depth, depth - 4))[0]
    torch.testing.assert_close(both[0], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(both[0], both[1])
    assert (tower.features([given], (-1,))[0, 0] - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", HEARING)
def test_inner_scales_of_sound_are_means_of_hidden_states(made, name):
    model, folder = made(name)
    tower = load_tower(str(folder))
    given = sound(0.4)
    found = tower.features([given], (0, 1, 2, 3))[0]
    with torch.no_grad():
        if name.startswith("whisper"):
            extractor = WhisperFeatureExtractor(chunk_length=1)
            mel = extractor(given, sampling_rate=16_000, return_tensors="pt").input_features
            states = getattr(model, "model", model).encoder(mel, output_hidden_states=True).hidden_states
            states = [state[0, :20] for state in states]  # 0.4 of the 50 of a second
        else:
            values = torch.from_numpy((given - given.mean()) / np.sqrt(given.var() + 1e-7))[None]
            states = getattr(model, "wav2vec2", model)(values, output_hidden_states=True).hidden_states
            states = [state[0] for state in states]
    assert len(states) == 4
    for scale, state in zip(found, states, strict=True):
        torch.testing.assert_close(scale, state.mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MADE)
def test_a_batch_is_its_inputs_one_by_one(made, name):
    tower = load_tower(str(made(name)[1]))
    given = [an_input(name, seed) for seed in range(5)]
    tower.batch_size = 2
    together = tower.features(given, (1, -1))
    assert together.shape == (5, 2, tower.width)
    for row, one in zip(together, given, strict=True):
        torch.testing.assert_close(tower.features([one], (1, -1))[0], row, atol=1e-5, rtol=1e-5)
    assert tower.features([], (1, -1)).shape == (0, 2, tower.width)


@pytest.mark.parametrize("name", SIGHT)
def test_a_video_is_the_mean_of_its_frames(made, name):
    tower = load_tower(str(made(name)[1]))
    film, still = [photo(seed) for seed in range(3)], photo(9)
    found = tower.features([film, still], (1, -1))
    torch.testing.assert_close(found[0], tower.features(film, (1, -1)).mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], tower.features([still], (1, -1))[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["whisper", "wav2vec2"])
def test_a_long_recording_is_the_mean_of_its_windows(made, name, monkeypatch):
    monkeypatch.setattr(processors, "WINDOW_SECONDS", 1)  # the tiny Whisper's own
    tower = load_tower(str(made(name)[1]))
    hiss, tone = sound(0.8), np.sin(np.arange(12_800) / 6).astype(np.float32)
    parts = [tone, hiss, np.cumsum(hiss)]  # unlike sounds
    parts = [(part - part.mean()) / part.std() for part in parts]  # so that wav2vec2 normalises parts like the whole
    long = np.concatenate(parts)
    found = tower.features([long])[0]
    apart = torch.stack([tower.features([part])[0] for part in parts])
    expected = apart.mean(0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found - apart[0]).abs().max() > 2e-2


def test_silence_behind_a_short_recording_does_not_count(made):
    tower = load_tower(str(made("whisper")[1]))
    piece = tower.pieces(sound(0.3))[0]
    assert piece.values.shape == (80, 100)
    assert piece.states == 15


def test_a_recording_shorter_than_the_convolutions_is_filled_up(made):
    tower = load_tower(str(made("wav2vec2")[1]))
    (piece,) = tower.pieces(np.ones(7, np.float32))
    assert piece.values.shape == (20,)  # 10 samples, and two more strides of 5
    assert torch.equal(piece.values[7:], torch.zeros(13))
    assert tower.features([np.ones(1, np.float32)]).isfinite().all()


@pytest.mark.parametrize("name", SIGHT)
def test_tokens_are_all_of_the_last_hidden_state(made, name):
    model, folder = made(name)
    tower = load_tower(str(folder))
    seen = torch.stack([pixels(tower, photo(seed)) for seed in range(3)])
    trunk = model.vision_model if hasattr(model, "vision_model") else model
    with torch.no_grad():
        expected = trunk(seen).last_hidden_state
        if name.startswith("clip"):
            expected = trunk.post_layernorm(expected)
            expected = expected if name == "clip vision" else model.visual_projection(expected)
    tower.batch_size = 2
    found = tower.tokens([photo(seed) for seed in range(3)])
    assert found.shape == (3, 16 + (1 if "clip" in name else 3 if name == "dinov3" else 0), tower.width)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_tokens_of_what_has_none(made):
    with pytest.raises(ModelError, match="is for audio: visual prompts need a picture tower, such as CLIP"):
        load_tower(str(made("whisper")[1])).tokens([sound()])
    with pytest.raises(DataError, match="made of one picture, not of a video"):
        load_tower(str(made("clip")[1])).tokens([[photo(), photo(1)]])


# frozen


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov3", "whisper", "wav2vec2"])
def test_gradients_reach_the_condition_and_not_the_tower(made, name):
    tower = load_tower(str(made(name)[1]))
    condition = ConditionConfig("image", "tiny", tower.width, depths=(1, -1), width=4).build(
        hidden_size=8, adapter_len=2
    )
    features = tower.features([an_input(name)], (1, -1))
    assert not features.requires_grad
    condition(features).sum().backward()
    assert condition.down.weight.grad.abs().sum() > 0
    assert not tower.model.training
    assert all(p.grad is None and not p.requires_grad for p in tower.model.parameters())


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov3", "whisper", "wav2vec2"])
def test_half_precision_towers_give_fp32_features(made, name):
    folder, given = str(made(name)[1]), an_input(name)
    full, half = (load_tower(folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    found = half.features([given])
    assert found.dtype == torch.float32
    expected = full.features([given])
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert half.key((-1,)) != full.key((-1,))


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_text_model_is_not_built(made, name):
    model, folder = made(name)
    tower = load_tower(str(folder))
    built = sum(parameter.numel() for parameter in tower.model.parameters())
    vision = sum(parameter.numel() for key, parameter in model.named_parameters() if key.startswith("vis"))
    assert built == vision < sum(parameter.numel() for parameter in model.parameters())


# pictures as each model was trained on them


def told(folder, target, values, file="preprocessor_config.json"):
    """The tower of `folder` with such a file beside its weights."""
    copied(folder, target)
    (target / file).write_text(json.dumps(values))
    return load_tower(str(target))


def by_the_formula(picture, size, mean, std, resample):
    """Squashed to `size`, scaled and normalised."""
    values = np.asarray(picture.resize((size, size), resample), np.float32) / 255
    return torch.from_numpy((values - np.float32(mean)) / np.float32(std)).permute(2, 0, 1)


CLIP_NUMBERS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALVES = ((0.5,) * 3, (0.5,) * 3)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("name", "numbers", "resample"),
    [
        ("clip", CLIP_NUMBERS, Image.Resampling.BICUBIC),
        ("clip vision", CLIP_NUMBERS, Image.Resampling.BICUBIC),
        ("siglip", HALVES, Image.Resampling.BICUBIC),
        ("siglip vision", HALVES, Image.Resampling.BICUBIC),
        ("dinov3", IMAGENET, Image.Resampling.BILINEAR),
    ],
)
def test_a_folder_without_settings_gets_those_of_its_family(made, name, numbers, resample):
    given = photo(0, 70, 70)
    found = pixels(load_tower(str(made(name)[1])), given)
    torch.testing.assert_close(found, by_the_formula(given, 32, *numbers, resample), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("width", "height"), [(41, 97), (500, 333), (20, 10), (300, 10)])
def test_clip_takes_the_middle_and_siglip_all(made, width, height):
    given = photo(0, width, height)
    short = min(width, height)
    middle = given.resize((int(32 * width / short), int(32 * height / short)), Image.Resampling.BICUBIC)
    left, top = (middle.width - 32) // 2, (middle.height - 32) // 2
    middle = middle.crop((left, top, left + 32, top + 32))
    expected = by_the_formula(middle, 32, *CLIP_NUMBERS, Image.Resampling.BICUBIC)
    torch.testing.assert_close(pixels(load_tower(str(made("clip")[1])), given), expected, atol=1e-5, rtol=0)
    expected = by_the_formula(given, 32, *HALVES, Image.Resampling.BICUBIC)
    torch.testing.assert_close(pixels(load_tower(str(made("siglip")[1])), given), expected, atol=1e-5, rtol=0)


def test_dino_s_pixels_are_those_of_torchvision_to_a_step_of_a_byte(made):
    """Its own processor, which needs torchvision, resizes fractions; ours rounds to bytes in between."""
    given = photo(0, 70, 90)
    fractions = torch.from_numpy(np.array(given)).permute(2, 0, 1)[None] / 255
    resized = torch.nn.functional.interpolate(fractions, (32, 32), mode="bilinear", antialias=True)[0]
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in IMAGENET)
    found = pixels(load_tower(str(made("dinov3")[1])), given) * std + mean
    assert (found - resized).abs().max() < 1 / 255


def test_dino_s_own_file_is_read_without_its_processor(made, tmp_path):
    values = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 48, "width": 48}}
    values |= {"image_mean": [0.1, 0.2, 0.3], "do_center_crop": None, "crop_size": None, "device": None, "resample": 2}
    found = pixels(told(made("dinov3")[1], tmp_path, values), photo())
    expected = by_the_formula(photo(), 48, (0.1, 0.2, 0.3), IMAGENET[1], Image.Resampling.BILINEAR)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_an_endless_strip_is_cut_before_it_is_resized(made, monkeypatch):
    tower = load_tower(str(made("clip")[1]))
    strip = Image.new("RGB", (4000, 2))  # to 32 pixels of height: 64,000 wide
    strip.paste((255, 255, 255), (1999, 0, 2001, 2))
    assert processors.without_ends(strip).size == (processors.MAX_ASPECT * 2, 2)
    assert processors.without_ends(strip.transpose(Image.Transpose.ROTATE_90)).size == (2, processors.MAX_ASPECT * 2)
    assert processors.without_ends(photo()).size == photo().size
    short = pixels(tower, strip)
    assert short[0].max() > 1.9
    monkeypatch.setattr(processors, "MAX_ASPECT", 4000)
    torch.testing.assert_close(pixels(tower, strip), short, atol=0.02, rtol=0)  # a step of a byte


@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor"])
def test_settings_beside_the_weights_win(made, tmp_path, kind):
    values = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "resample": 2}
    values |= {"image_mean": [0.1, 0.2, 0.3]}
    key = "feature_extractor_type" if kind.endswith("Extractor") else "image_processor_type"
    tower = told(made("clip vision")[1], tmp_path, {**values, key: kind})
    expected = CLIPImageProcessorPil(**values)(photo(), return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(pixels(tower, photo()), expected, atol=0, rtol=0)
    assert tower.key() != load_tower(str(made("clip vision")[1])).key()


def test_the_processor_that_a_folder_names_is_taken(made, tmp_path):
    values = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}
    found = pixels(told(made("clip vision")[1], tmp_path, values), photo())
    expected = by_the_formula(photo(), 32, *HALVES, Image.Resampling.BICUBIC)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "kind", [{}, {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}]
)
def test_settings_of_a_whole_processor(made, tmp_path, kind):
    values = {"image_processor": {"image_mean": [0, 0, 0], **kind}}
    tower = told(made("siglip vision")[1], tmp_path, values, "processor_config.json")
    expected = by_the_formula(photo(), 32, (0,) * 3, (0.5,) * 3, Image.Resampling.BICUBIC)
    torch.testing.assert_close(pixels(tower, photo()), expected, atol=1e-5, rtol=0)


def test_settings_from_before_sizes_and_processors_had_names(made, tmp_path):
    """What such a file leaves out stays as the family has it."""
    found = pixels(told(made("clip vision")[1], tmp_path, {"size": 40, "crop_size": 32, "image_std": None}), photo())
    processor = CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    assert torch.equal(found, processor(photo(), return_tensors="pt").pixel_values[0])


def test_settings_of_hearing(made, tmp_path):
    values = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": False}
    tower = told(made("wav2vec2")[1], tmp_path, values)
    assert torch.equal(tower.pieces(sound())[0].values, torch.from_numpy(sound()))
    assert tower.key() != load_tower(str(made("wav2vec2")[1])).key()


def test_a_whisper_with_another_spectrogram_is_refused(made, tmp_path):
    values = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 128}
    with pytest.raises(ModelError, match=r"gives inputs of 128 x 100, and its config\.json wants 80 x 100"):
        told(made("whisper")[1], tmp_path, values)


def test_features_do_not_depend_on_torchvision(made, tmp_path):
    """Where it is installed transformers would take its own resizing, which rounds otherwise."""
    values = {"image_processor_type": "CLIPImageProcessor", "crop_size": 32, "size": 32}
    assert told(made("clip vision")[1], tmp_path, values).processor.backend == "pil"


# what is refused


def copied(folder, target):
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"size": {"longest_edge": 3}}, "cannot be used: "),
        ({"image_std": [1, 1]}, "cannot be used: "),
        ({"resample": 77}, "cannot be used: "),
        ({"image_processor_type": "PixtralImageProcessor"}, "gives inputs of varying sizes, and its config.json wants"),
        (
            {"image_processor_type": "CLIPImageProcessor"},
            "gives inputs of 3 x 224 x 224, and its config.json wants 3 x",
        ),
        ({"image_processor_type": "Mine", "auto_map": {"AutoImageProcessor": "code.Mine"}}, "cannot be used: "),
        (
            {"crop_size": 48},
            "gives inputs of 3 x 48 x 48, and its config.json wants 3 x 32 x 32: restore the two files.",
        ),
        ({"do_center_crop": False}, "gives inputs of varying sizes, and its config.json wants 3 x 32 x 32"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(made, tmp_path, values, sentence):
    with pytest.raises(ModelError) as raised:
        told(made("clip vision")[1], tmp_path, values)
    message = str(raised.value)
    assert message.startswith(f"preprocessor_config.json of the tower '{tmp_path}' {sentence}")
    assert "estore" in message


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_settings_that_are_no_settings(made, tmp_path, text):
    folder = copied(made("clip vision")[1], tmp_path)
    (folder / "preprocessor_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"preprocessor_config.json of the tower '.*' cannot be used: .+ Restore it"):
        load_tower(str(folder))


@pytest.mark.parametrize("family", REFUSED_TOWERS)
def test_naflex_is_refused_with_a_way_out(tmp_path, family):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(UnsupportedModelError, match=r"NaFlex.*siglip2-base-patch16-224, is of family 'siglip'"):
        load_tower_config(str(tmp_path))


def test_other_models_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UnsupportedModelError, match=r"family 'llama' cannot be a tower: nobody .* Supported: clip, "):
        load_tower(str(tmp_path))


def test_towers_that_are_not_there(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name, sentence in {
        str(tmp_path / "gone"): "does not exist: give a folder with a config.json, a hub name or 'bundled'.",
        str(tmp_path / "file"): "is a file: give the folder that holds its config.json.",
        str(tmp_path / "folder"): "cannot be read: ",
    }.items():
        with pytest.raises(ModelError, match=re.escape(f"The tower '{name}' {sentence}")):
            load_tower(name)


def test_damaged_weights_are_one_sentence(made, tmp_path):
    folder = copied(made("clip vision")[1], tmp_path)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:1000])
    with pytest.raises(ModelError, match=r"The weights of the tower '.*' cannot be read: "):
        load_tower(str(folder))


@pytest.mark.parametrize("damage", ["missing", "another shape"])
def test_weights_that_do_not_fit_are_not_replaced_by_random_ones(made, tmp_path, damage):
    folder = copied(made("clip vision")[1], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    key = next(key for key in tensors if "layers.1.mlp.fc1.weight" in key)
    tensor = tensors.pop(key)
    if damage == "another shape":
        tensors[key] = tensor[:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors are missing or of another shape, such as .*layers.1.mlp.fc1.wei"):
        load_tower(str(folder))


def test_weights_that_nothing_reads_may_be_missing(made, tmp_path):
    folder = copied(made("wav2vec2")[1], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["masked_spec_embed"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = load_tower(str(folder)).features([sound()])
    torch.testing.assert_close(found, load_tower(str(made("wav2vec2")[1])).features([sound()]))


def test_loading_says_nothing(made, capsys):
    """Not even which weights of the text model were left out; and what was heard of transformers before is again."""
    folder = str(made("clip")[1])
    capsys.readouterr()
    logger, heard = logging.getLogger("transformers"), []
    handler = logging.Handler()
    handler.emit = heard.append
    logger.addHandler(handler)
    level = logger.level
    try:
        load_tower(folder)
    finally:
        logger.removeHandler(handler)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert heard == []
    assert logger.level == level < logging.ERROR


@pytest.mark.parametrize(
    ("name", "given", "sentence"),
    [
        ("clip", "picture.png", "takes pictures or lists of frames, not a str: open files with read_picture"),
        ("clip", [], "A video without a frame has no features"),
        ("clip", [photo(), "b.png"], "takes pictures or lists of frames, not a list"),
        ("whisper", "a.wav", "takes mono samples at 16 kHz, not a str: open files with read_audio"),
        ("wav2vec2", np.zeros((2, 9)), "not an array of shape (2, 9)"),
        ("wav2vec2", np.zeros(0), "not an array of shape (0,)"),
    ],
)
def test_inputs_of_another_kind_are_one_sentence(made, name, given, sentence):
    with pytest.raises(DataError, match=re.escape(sentence)):
        load_tower(str(made(name)[1])).features([given])


# widths, depths, identity


@pytest.mark.parametrize(
    ("name", "width"), [(name, 20 if "clip" in name and name != "clip vision" else 32) for name in MADE]
)
def test_the_width_is_known_before_any_weight_is_read(made, name, width):
    folder = made(name)[1]
    config = load_tower_config(str(folder))
    assert tower_width(config) == load_tower(str(folder)).width == width
    kind = "image" if name in SIGHT else "audio"
    check_tower(ConditionConfig(kind, "t", width, depths=(0, 3, -4)), config, "t")


@pytest.mark.parametrize(
    ("kind", "width", "depths", "sentence"),
    [
        ("image", 768, (-1,), "made for features of width 768 (tower 'mine'), and the tower 'yours' gives 20: use the"),
        ("visual_prompt", 32, (-1,), "made for features of width 32 (tower 'mine'), and the tower 'yours' gives 20"),
        ("image", 20, (-1, 4, -5), "The tower 'yours' has hidden states 0 to 3, not [4, -5]: choose other depths"),
        ("audio", 20, (-1,), "kind 'audio' cannot read the tower 'yours', which is of family 'clip': give one of wav2"),
    ],
)
def test_a_tower_that_does_not_fit_is_one_sentence(made, kind, width, depths, sentence):
    config = load_tower_config(str(made("clip")[1]))
    with pytest.raises(AdapterError, match=re.escape(sentence)):
        check_tower(ConditionConfig(kind, "mine", width, depths=depths), config, "yours")


def test_pictures_are_not_for_ears(made):
    with pytest.raises(AdapterError, match=r"kind 'image' cannot read .* family 'whisper': give one of clip, clip_vis"):
        check_tower(ConditionConfig("image", "mine", 32), load_tower_config(str(made("whisper")[1])), "yours")


def test_depths_out_of_range_are_refused_by_the_tower_too(made):
    with pytest.raises(AdapterError, match=r"has hidden states 0 to 3, not \[7\]"):
        load_tower(str(made("clip")[1])).features([photo()], (7,))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(24, (4, 8, 12, 16, 20, 24)), (12, (2, 4, 6, 8, 10, 12)), (8, (1, 2, 4, 5, 6, 8)), (2, (1, 2))],
)
def test_scales_are_spread_evenly(layers, expected):
    assert spread_depths(CLIPVisionConfig(num_hidden_layers=layers)) == expected


def test_the_key_is_the_tower_s_not_the_folder_s(made, tmp_path):
    folder = made("clip vision")[1]
    tower = load_tower(str(folder))
    moved = load_tower(str(copied(folder, tmp_path)))
    assert moved.key((-1,)) == tower.key((-1,)) == tower.key((3,))
    assert len({tower.key((-1,)), tower.key((-2,)), tower.key((-2, -1)), tower.key((-1, -2)), tower.key()}) == 5
    with torch.no_grad():
        moved.model.encoder.layers[1].mlp.fc1.bias.add_(1e-3)
    assert moved.key((-1,)) != tower.key((-1,))


def test_a_cached_picture_does_not_meet_the_tower_again(made, tmp_path):
    tower = load_tower(str(made("clip")[1]))
    photo().save(tmp_path / "a.png")
    given = [tmp_path / "a.png", tmp_path / "a.png"]

    def compute(paths):
        return tower.features([Image.open(path) for path in paths], (1, -1))

    first = FeatureCache(tmp_path / "cache", tower.key((1, -1))).get_many(given, compute)
    torch.testing.assert_close(torch.stack(first), compute(given))
    tower.model = None
    key = load_tower(str(made("clip")[1])).key((1, -1))
    again = FeatureCache(tmp_path / "cache", key).get_many(given, compute)
    assert torch.equal(torch.stack(again), torch.stack(first))


def test_every_row_of_the_table_was_tried(made):
    tried = {load_tower_config(str(made(name)[1])).model_type for name in MADE}
    assert tried == set(TOWERS)


def test_an_animation_is_kept_as_a_picture_and_as_a_video_apart(tmp_path):
    noise = np.random.default_rng(0)
    frames = [Image.fromarray(noise.integers(0, 255, (40, 40, 3), np.uint8)) for _ in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])

    def features(kind, cache):
        eye = Perception(condition_config(kind, "bundled"), torch.device("cpu"), cache)
        return eye.features([str(tmp_path / "a.gif")])[0]

    for kind in ("image", "video", "image"):
        torch.testing.assert_close(features(kind, tmp_path / "kept"), features(kind, None))
    assert not torch.allclose(features("image", None), features("video", None))
