"""The table of encoders, which read text or pictures and write none; `families.py` has the decoders.

An encoder's prompts are those of any other model: its own key and value projections, a softmax of their own. What is
trained beside them is a head, a module of the model that `AdapterConfig.modules_to_save` names.
"""

from typing import NamedTuple


class Encoder(NamedTuple):
    """One row of the table: class name of the self-attention in transformers, and of its projections.

    Attributes:
        attention: the class.
        key: its key projection.
        value: its value projection.
    """

    attention: str
    key: str = "k_proj"
    value: str = "v_proj"


ENCODERS: dict[str, Encoder] = {
    "bert": Encoder("BertSelfAttention", "key", "value"),
    "clip_text_model": Encoder("CLIPAttention"),
    "clip_vision_model": Encoder("CLIPAttention"),
    "roberta": Encoder("RobertaSelfAttention", "key", "value"),
    "vit": Encoder("ViTAttention"),
}
TOWERS_OF: dict[str, str] = {"clip": "vision_model or text_model"}
"""Models of two encoders, each of which takes an adapter of its own."""
