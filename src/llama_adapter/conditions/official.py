"""A condition in the authors' checkpoints: which of their tensors it is, and the settings that these say.

The tensors have one name there and here, so that a file of theirs and a condition's `state_dict` agree key by key:
LLaMA-Adapter V2's visual projector, and the bridge of ImageBind-LLM.
"""

from collections.abc import Collection, Mapping
from typing import Any

from llama_adapter.conditions.config import ConditionConfig
from llama_adapter.conditions.modules import BRIDGE_STEPS
from llama_adapter.errors import AdapterError

VISUAL_PROMPT = ("visual_query", "clip_proj", "clip_proj_norm", "visual_blocks", "visual_proj", "visual_proj_norm")
IMAGE_BIND = (
    "image_bind_proj",
    *(f"image_bind_{part}_{i}" for i in range(1, BRIDGE_STEPS + 1) for part in ("norm", "f1", "f2", "f3")),
)
CLIP, BIND = "openai/clip-vit-large-patch14", "imagebind_huge"


def condition_keys(keys: Collection[str]) -> list[str]:
    """Those of an authors' checkpoint's keys that belong to its condition; ours are the same behind `condition.`."""
    return [key for key in keys if key.partition(".")[0] in (*VISUAL_PROMPT, *IMAGE_BIND)]


def official_condition(
    shapes: Mapping[str, tuple[int, ...]], tower: str | None = None, block_heads: int = 16
) -> ConditionConfig | None:
    """The settings under which these tensors of the authors are a condition's, or None where they hold none.

    Args:
        shapes: key -> shape of all tensors of a checkpoint; what is no condition's is passed over.
        tower: the frozen encoder; None takes the one that the authors used.
        block_heads: of a visual prompt, which no tensor tells; theirs are 16.

    Raises:
        AdapterError: a part is missing or left over, or a width does not fit the others.
    """
    found = {key: shapes[key] for key in condition_keys(shapes)}
    if not found:
        return None
    settings: dict[str, Any] = {}
    try:
        if "visual_query.weight" in found:
            settings = {
                "kind": "visual_prompt",
                "tower": tower or CLIP,
                "tower_width": found["clip_proj.weight"][1],
                "blocks": len({key.split(".")[1] for key in found if key.startswith("visual_blocks.")}),
                "block_width": found["visual_query.weight"][1],
                "block_heads": block_heads,
            }
            prompts, hidden = found["visual_query.weight"][0], found["visual_proj.weight"][0]
        else:
            legacy = "image_bind_norm_1.bias" in found
            width = found["image_bind_proj.weight"][1]
            settings = {"kind": "image_bind", "tower": tower or BIND, "tower_width": width, "legacy_bridge": legacy}
            prompts, hidden = 1, found["image_bind_proj.weight"][0]
    except (KeyError, IndexError) as error:
        raise AdapterError(f"The checkpoint's condition is incomplete: {error} is not there. Copy it again.") from None
    config = ConditionConfig(**settings)
    wanted = config.shapes(hidden, prompts)
    wrong = sorted(key for key in wanted.keys() | found if wanted.get(key) != found.get(key))
    if wrong:
        raise AdapterError(
            f"The checkpoint's condition does not fit together: {wrong[0]} is {found.get(wrong[0], 'missing')}, not "
            f"{wanted.get(wrong[0], 'part of it')}. Copy it again."
        )
    return config
