"""The one table of the encoders that can be a tower: what differs between them, and what their configuration says."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import transformers
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    PretrainedConfig,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from llama_adapter.conditions.config import ConditionConfig
from llama_adapter.conditions.processors import Piece, mel_pieces, picture_pieces, wave_pieces
from llama_adapter.errors import AdapterError, UnsupportedModelError


@dataclass(frozen=True)
class TowerFamily:
    """One row of the table. N pieces, T tokens, W the encoder's width, D the features' width.

    Attributes:
        sense: what it takes.
        model_class: configuration -> name of the class in transformers that has this encoder and nothing else.
        embed: (model, hidden state [N, T, W]) -> [N, T, D], the way the model treats its last one.
        pool: the same -> [N, D], one vector a piece; None is a mean over time, which `Tower` takes.
        processor: configuration of the encoder -> transformers' processor for a folder that has none of its own.
        pieces: (processor, configuration of the encoder, input) -> what the encoder takes.
        input_shape: configuration of the encoder -> shape of a piece; None where it varies.
        fixed_size: it must be that one, as the position embeddings were made for it.
        own_processor: what a folder names is passed over for `processor`'s class, as it would need torchvision.
        load_options: for `from_pretrained`.
        optional: weights that a checkpoint may lack, because nothing here reads them.
    """

    sense: Literal["picture", "audio"]
    model_class: Callable[[PretrainedConfig], str]
    embed: Callable[[Any, Tensor], Tensor]
    pool: Callable[[Any, Tensor], Tensor] | None
    processor: Callable[[PretrainedConfig], Any]
    pieces: Callable[[Any, PretrainedConfig, Any], list[Piece]]
    input_shape: Callable[[PretrainedConfig], tuple[int, ...]] | None
    fixed_size: bool = True
    own_processor: bool = False
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


def _square(config: PretrainedConfig) -> dict[str, int]:
    return {"height": config.image_size, "width": config.image_size}


def _picture_shape(config: PretrainedConfig) -> tuple[int, ...]:
    return (3, config.image_size, config.image_size)


def _clip_processor(config: PretrainedConfig) -> Any:
    return CLIPImageProcessorPil(size={"shortest_edge": config.image_size}, crop_size=_square(config))


def _siglip_processor(config: PretrainedConfig) -> Any:
    return SiglipImageProcessorPil(size=_square(config))


def _dino_processor(config: PretrainedConfig) -> Any:
    return ViTImageProcessorPil(size=_square(config), image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD)


def _clip_class(config: PretrainedConfig) -> str:
    return "CLIPVisionModelWithProjection" if _is_projected(config) else "CLIPVisionModel"


def _is_projected(config: PretrainedConfig) -> bool:
    # A folder with the vision part alone says only by its class's name whether it kept the projection.
    return config.model_type == "clip" or any("WithProjection" in name for name in config.architectures or ())


_CLIP = TowerFamily("picture", _clip_class, _clip_embed, _clip_pool, _clip_processor, picture_pieces, _picture_shape)
_SIGLIP = TowerFamily(
    "picture",
    lambda config: "SiglipVisionModel",
    _siglip_embed,
    _siglip_pool,
    _siglip_processor,
    picture_pieces,
    _picture_shape,
)
TOWERS: dict[str, TowerFamily] = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "dinov3_vit": TowerFamily(
        "picture",
        lambda config: "DINOv3ViTModel",
        _dino_embed,
        _dino_pool,
        _dino_processor,
        picture_pieces,
        _picture_shape,
        fixed_size=False,
        own_processor=True,
    ),
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "wav2vec2": TowerFamily(
        "audio",
        lambda config: "Wav2Vec2Model",
        _unchanged,
        None,
        lambda config: Wav2Vec2FeatureExtractor(),
        wave_pieces,
        input_shape=None,
        optional=("masked_spec_embed",),  # hides stretches in training
    ),
    "whisper": TowerFamily(
        "audio",
        lambda config: "WhisperEncoder",
        _unchanged,
        None,
        lambda config: WhisperFeatureExtractor(feature_size=config.num_mel_bins),
        mel_pieces,
        lambda config: (config.num_mel_bins, 2 * config.max_source_positions),
        load_options={"key_mapping": {r"^(model\.)?encoder\.": ""}},
    ),
}
_NAFLEX = (
    "its pictures have no fixed number of patches (NaFlex); SigLIP 2 of a fixed resolution, such as "
    "google/siglip2-base-patch16-224, is of family 'siglip' and works"
)
REFUSED_TOWERS: dict[str, str] = {"siglip2": _NAFLEX, "siglip2_vision_model": _NAFLEX}


def tower_family(config: PretrainedConfig) -> TowerFamily:
    """The row of a configuration.

    Raises:
        UnsupportedModelError: there is none; the message has the family's name and the reason.
    """
    name = config.model_type
    if name in TOWERS:
        return TOWERS[name]
    reason = REFUSED_TOWERS.get(name, "nobody has added it to llama_adapter/conditions/tower_families.py yet")
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


def resolve_depths(depths: tuple[int, ...], count: int, name: str) -> list[int]:
    """Indices into the `count` hidden states of the tower called `name`, none negative.

    Raises:
        AdapterError: it has no such hidden state.
    """
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
    if condition.kind == "image_bind":
        raise AdapterError(
            "No tower gives ImageBind's embeddings: make them with ImageBind itself, and pass "
            "get_adapter(model).condition(embeddings) to use_adapter."
        )
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
    resolve_depths(condition.depths, tower_layers(config) + 1, name)
