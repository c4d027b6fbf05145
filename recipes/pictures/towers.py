"""The tower, the text encoder that it is trained against, and the tower's folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from draw import SIZE
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

MEAN, STD = 0.88, 0.2
"""Of the drawn pictures, which are mostly light paper."""
README = """\
# A small tower for drawn pictures

A CLIP vision encoder with projection ({parameters:.2f} million parameters, 64 x 64 pixels, patches of 8), trained from
nothing by `recipes/pictures/train_tower.py` on drawn shapes and digits and their captions. It knows no photographs.
`training.json` says how well it tells captions apart that differ in one word, for the combinations of words that the
question set `recipes/pictures/questions.py` trains on ("seen") and for those it holds out ("unseen"), and which of them
each of its runs has drawn (option `seen_only`).

Licence: Apache-2.0, as the project; pictures and captions are made by the project's own code.
"""


def build_tower(hidden: int, layers: int, heads: int, intermediate: int) -> CLIPVisionModelWithProjection:
    """A CLIP vision encoder with random weights."""
    config = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=8,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        projection_dim=hidden,
    )
    return CLIPVisionModelWithProjection(config)


def normalised(pictures: NDArray[np.uint8], device: str = "cpu") -> Tensor:
    """[N, H, W, 3] of 0 to 255 -> [N, 3, H, W], what the tower reads; the folder's preprocessing says the same."""
    values = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float()
    return (values / 255 - MEAN) / STD


class TextEncoder(nn.Module):
    """A small transformer over the tokens of a caption; it is thrown away after training."""

    def __init__(self, vocabulary: int, width: int, out: int, layers: int = 2, longest: int = 64) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(longest, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 32, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.project = nn.Linear(width, out, bias=False)
        nn.init.normal_(self.words.weight, std=0.5)
        nn.init.normal_(self.places.weight, std=0.5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[N, T] token ids and mask of what is no padding -> [N, out]."""
        hidden = self.words(ids) + self.places.weight[: ids.shape[1]]
        hidden = self.layers(hidden, src_key_padding_mask=~mask)
        shares = mask / mask.sum(1, keepdim=True)
        return self.project(torch.einsum("ntw,nt->nw", hidden, shares.to(hidden.dtype)))


def preprocessing() -> dict[str, Any]:
    """What preprocessor_config.json says."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": SIZE, "width": SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
    }


def save(tower: CLIPVisionModelWithProjection, folder: Path, training: dict[str, Any]) -> None:
    """Write the float16 form to a neighbour folder first, so that a reader never finds half a tower."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    state = {name: tensor.detach().to("cpu", torch.float16) for name, tensor in tower.state_dict().items()}
    copy = CLIPVisionModelWithProjection(tower.config).to(torch.float16)
    copy.load_state_dict(state)
    copy.save_pretrained(fresh)
    for name, values in (("preprocessor_config.json", preprocessing()), ("training.json", training)):
        (fresh / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    (fresh / "README.md").write_text(README.format(parameters=tower.num_parameters() / 1e6), encoding="utf-8")
    for path in fresh.iterdir():
        path.chmod(0o644)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)
