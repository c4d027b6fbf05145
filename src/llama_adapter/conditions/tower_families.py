"""The one table of the encoders that can be a tower: what differs between them, and what their configuration says."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import transformers
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig

from llama_adapter.conditions.config import ConditionConfig
from llama_adapter.conditions.inputs import MelSteps, PictureSteps, Steps, WaveSteps, with_settings
from llama_adapter.errors import AdapterError, UnsupportedModelError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class TowerFamily:
    """One row of the table. N pieces, T tokens, W the encoder's width, D the features' width.

    Attributes:
        sense: what it takes.
        model_class: configuration -> name of the class in transformers that has this encoder and nothing else.
        embed: (model, hidden state [N, T, W]) -> [N, T, D], the way the model treats its last one.
        pool: the same -> [N, D], one vector a piece; None is a mean over time, which `Tower` takes.
        steps: (configuration of the encoder, preprocessor_config.json) -> how inputs become tensors.
        fixed_size: pictures must have the size that the position embeddings were made for.
        load_options: for `from_pretrained`.
        optional: weights that a checkpoint may lack, because nothing here reads them.
    """

    sense: Literal["picture", "audio"]
    model_class: Callable[[PretrainedConfig], str]
    embed: Callable[[Any, Tensor], Tensor]
    pool: Callable[[Any, Tensor], Tensor] | None
    steps: Callable[[PretrainedConfig, Mapping[str, Any]], Steps]
    fixed_size: bool = False
    load_options: Mapping[str, Any] | None = None
    optional: tuple[str, ...] = ()


def _trunk(model: Any) -> Any:
    return getattr(model, "vision_model", model)


def _clip_embed(model: Any, hidden: Tensor) -> Tensor:
    normed = _trunk(model).post_layernorm(hidden)
    projection = getattr(model, "visual_projection", None)
    return normed if projection is None else projection(normed)


def _clip_pool(model: Any, hidden: Tensor) -> Tensor:
    return _clip_embed(model, hidden[:, 0])


def _siglip_embed(model: Any, hidden: Tensor) -> Tensor:
    return _trunk(model).post_layernorm(hidden)


def _siglip_pool(model: Any, hidden: Tensor) -> Tensor:
    normed, head = _siglip_embed(model, hidden), getattr(_trunk(model), "head", None)
    return normed.mean(1) if head is None else head(normed)  # there is no CLS token


def _dino_embed(model: Any, hidden: Tensor) -> Tensor:
    return model.norm(hidden)


def _dino_pool(model: Any, hidden: Tensor) -> Tensor:
    return model.norm(hidden[:, 0])


def _unchanged(model: Any, hidden: Tensor) -> Tensor:
    return hidden


def _clip_steps(config: PretrainedConfig, settings: Mapping[str, Any]) -> Steps:
    size = config.image_size
    return with_settings(PictureSteps(size, (size, size), CLIP_MEAN, CLIP_STD), settings)


def _siglip_steps(config: PretrainedConfig, settings: Mapping[str, Any]) -> Steps:
    size = config.image_size
    return with_settings(PictureSteps((size, size), None, HALF, HALF), settings)


def _dino_steps(config: PretrainedConfig, settings: Mapping[str, Any]) -> Steps:
    size, bilinear = config.image_size, int(Image.Resampling.BILINEAR)
    defaults = PictureSteps((size, size), None, IMAGENET_MEAN, IMAGENET_STD, bilinear, scale_first=True)
    return with_settings(defaults, settings)


def _clip_class(config: PretrainedConfig) -> str:
    return "CLIPVisionModelWithProjection" if _is_projected(config) else "CLIPVisionModel"


def _is_projected(config: PretrainedConfig) -> bool:
    # A folder with the vision part alone says only by its class's name whether it kept the projection.
    return config.model_type == "clip" or any("WithProjection" in name for name in config.architectures or ())


_CLIP = TowerFamily("picture", _clip_class, _clip_embed, _clip_pool, _clip_steps, fixed_size=True)
_SIGLIP = TowerFamily(
    "picture", lambda config: "SiglipVisionModel", _siglip_embed, _siglip_pool, _siglip_steps, fixed_size=True
)
TOWERS: dict[str, TowerFamily] = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "dinov3_vit": TowerFamily("picture", lambda config: "DINOv3ViTModel", _dino_embed, _dino_pool, _dino_steps),
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "wav2vec2": TowerFamily(
        "audio",
        lambda config: "Wav2Vec2Model",
        _unchanged,
        None,
        WaveSteps.of,
        optional=("masked_spec_embed",),  # hides stretches in training
    ),
    "whisper": TowerFamily(
        "audio",
        lambda config: "WhisperEncoder",
        _unchanged,
        None,
        lambda config, settings: MelSteps(config.num_mel_bins, config.max_source_positions),
        load_options={"key_mapping": {r"^(model\.)?encoder\.": ""}},
    ),
}
_NAFLEX = (
    "its pictures have no fixed number of patches (NaFlex); SigLIP 2 of a fixed resolution, such as "
    "google/siglip2-base-patch16-224, is of family 'siglip' and works"
)
REFUSED: dict[str, str] = {"siglip2": _NAFLEX, "siglip2_vision_model": _NAFLEX}


def tower_family(config: PretrainedConfig) -> TowerFamily:
    """The row of a configuration.

    Raises:
        UnsupportedModelError: there is none; the message has the family's name and the reason.
    """
    name = config.model_type
    if name in TOWERS:
        return TOWERS[name]
    reason = REFUSED.get(name, "nobody has added it to the table in llama_adapter/conditions/tower_families.py yet")
    raise UnsupportedModelError(
        f"Models of family '{name}' cannot be a tower: {reason}. Supported: {', '.join(sorted(TOWERS))}."
    )


def model_class(config: PretrainedConfig) -> Any:
    """The class in transformers that loads the encoder of `config`.

    Raises:
        UnsupportedModelError: see `tower_family`.
    """
    name = tower_family(config).model_class(config)
    if name == "WhisperEncoder":  # the one that transformers does not export
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return WhisperEncoder
    return getattr(transformers, name)


def encoder_config(config: PretrainedConfig) -> PretrainedConfig:
    """The encoder's part of a configuration that may describe a text model beside it."""
    encoder = copy.deepcopy(getattr(config, "vision_config", config))
    if config.model_type == "clip":
        encoder.projection_dim = config.projection_dim  # many files have a width of their own there, which CLIP ignores
    return encoder


def tower_width(config: PretrainedConfig) -> int:
    """D, the width of the features of one scale, and of one token.

    Raises:
        UnsupportedModelError: see `tower_family`.
    """
    projected = tower_family(config).model_class(config) == "CLIPVisionModelWithProjection"
    encoder = encoder_config(config)
    return encoder.projection_dim if projected else encoder.hidden_size


def tower_layers(config: PretrainedConfig) -> int:
    """Layers of the encoder; it has one hidden state more, the embedding, which is number 0."""
    return encoder_config(config).num_hidden_layers


def spread_depths(config: PretrainedConfig, scales: int = 6) -> tuple[int, ...]:
    """Hidden states of that many layers, evenly spaced up to the last: 4, 8, ..., 24 for the six of 24 layers.

    The paper does not say which layers it takes. A tower of fewer layers gives as many scales as it has.
    """
    layers = tower_layers(config)
    scales = min(scales, layers)
    return tuple(layers * (i + 1) // scales for i in range(scales))


def resolve_depths(depths: tuple[int, ...], config: PretrainedConfig, name: str) -> list[int]:
    """Indices into the hidden states, none negative.

    Raises:
        AdapterError: the tower called `name` has no such hidden state.
    """
    count = tower_layers(config) + 1
    beyond = [depth for depth in depths if not -count <= depth < count]
    if beyond:
        raise AdapterError(
            f"The tower '{name}' has hidden states 0 to {count - 1}, not {beyond}: choose other depths or the tower "
            "that they were chosen for."
        )
    return [depth % count for depth in depths]


def check_tower(condition: ConditionConfig, config: PretrainedConfig, name: str) -> None:
    """Refuse a tower that cannot give what a condition was made for; only configurations are read.

    Raises:
        AdapterError: it has features of another width, too few layers, or another sense.
        UnsupportedModelError: see `tower_family`.
    """
    wanted = "audio" if condition.kind == "audio" else "picture"
    if tower_family(config).sense != wanted:
        fitting = sorted(family for family, row in TOWERS.items() if row.sense == wanted)
        raise AdapterError(
            f"A condition of kind '{condition.kind}' cannot read the tower '{name}', which is of family "
            f"'{config.model_type}': give one of {', '.join(fitting)}."
        )
    if condition.tower_width != tower_width(config):
        raise AdapterError(
            f"The adapter was made for features of width {condition.tower_width} (tower '{condition.tower}'), and the "
            f"tower '{name}' gives {tower_width(config)}: use the tower that it was trained with."
        )
    resolve_depths(condition.depths, config, name)
