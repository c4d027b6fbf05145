"""The learnable part of a condition: features of a frozen tower in, something to add to every layer's prompt out.

`ImageCondition` is the paper's (arXiv:2303.16199, section 3.4): I = Proj(concat_m I_m), one vector for all prompts.
`VisualPromptCondition` is LLaMA-Adapter V2's: learnable queries that read the picture's tokens, one vector a prompt.
`PatchCondition` is ours: the paper's projection for each part of the picture, one vector a prompt.
`ImageBindCondition` is ImageBind-LLM's bridge: one embedding of any sense, one vector for all prompts.

Neither paper says how the projections start, so every layer has PyTorch's own initialisation. The gates start at
zero, so whatever a condition gives, the adapted model starts as the base.

Shape letters: B rows, M scales, D tower_width, T tokens, K prompts, H heads.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from llama_adapter.core.fixed_dtype import FixedDtype
from llama_adapter.errors import AdapterError

BOTTLENECK_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "identity": nn.Identity,
}
MLP_RATIO = 4
BRIDGE_STEPS = 3
MOST_IN_FRONT = 8
"""Tokens that an encoder may have before its patches: a CLS token, registers."""


class Condition(FixedDtype):
    """What all kinds share: rows without a picture, and parameters that stay fp32 on a half-precision model."""

    def __init__(self, absent: str, *shape: int) -> None:
        super().__init__()
        self.shape = shape
        # Zero is where "no picture" already is; what a learnt one is worth, training says.
        self.absent = nn.Parameter(torch.zeros(shape)) if absent == "learnt" else None

    def adapter_params(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that are trained and saved, by name."""
        return self.named_parameters()

    def forward(self, features: Tensor, owner: Tensor | None = None, rows: int | None = None) -> Tensor:
        """The condition of each row of a batch: the mean over its pictures, or `absent` where it has none.

        Args:
            features: [N, ...], one entry a picture.
            owner: [N] int64, the row that each picture belongs to; None stands for one picture a row, in order.
            rows: B; None stands for N.

        Returns:
            [B, hidden] or [B, K, hidden], fp32.
        """
        found = self.project(features.float())
        if owner is None or rows is None:
            return found
        owner = owner.to(found.device)
        count = torch.bincount(owner, minlength=rows).reshape(-1, *[1] * (found.dim() - 1))
        condition = found.new_zeros(rows, *self.shape).index_add(0, owner, found) / count.clamp(min=1)
        return condition if self.absent is None else torch.where(count == 0, self.absent, condition)

    def project(self, features: Tensor) -> Tensor:
        """One condition a picture: fp32 features [N, ...] -> [N, hidden] or [N, K, hidden]."""
        raise NotImplementedError


class ImageCondition(Condition):
    """Scales side by side through a bottleneck: M x D -> `width` -> hidden, one vector for all prompts."""

    def __init__(
        self,
        hidden_size: int,
        scales: int = 6,
        tower_width: int = 768,
        width: int = 64,
        activation: str = "gelu",
        bias: bool = True,
        absent: str = "zero",
    ) -> None:
        super().__init__(absent, hidden_size)
        self.down = nn.Linear(scales * tower_width, width, bias=bias)
        self.activation = BOTTLENECK_ACTIVATIONS[activation]()
        self.up = nn.Linear(width, hidden_size, bias=bias)

    def project(self, features: Tensor) -> Tensor:
        """[B, M, D] or [B, M x D] -> [B, hidden]."""
        return self.up(self.activation(self.down(features.flatten(1))))


class PatchCondition(Condition):
    """The same bottleneck for each of K parts of a picture, tower_width -> `width` -> hidden: one vector a prompt.

    The parts are `grid(K)` of the picture, row by row. Prompt k of every layer stands for part k, so a query finds a
    part by the prompt's key, and what is there in its value: one vector for all prompts, as the paper has it, is the
    same for every query.
    """

    def __init__(
        self,
        hidden_size: int,
        adapter_len: int,
        tower_width: int = 768,
        width: int = 64,
        activation: str = "gelu",
        bias: bool = True,
        absent: str = "zero",
    ) -> None:
        super().__init__(absent, adapter_len, hidden_size)
        self.down = nn.Linear(tower_width, width, bias=bias)
        self.activation = BOTTLENECK_ACTIVATIONS[activation]()
        self.up = nn.Linear(width, hidden_size, bias=bias)

    def project(self, features: Tensor) -> Tensor:
        """[B, T, D] -> [B, K, hidden]; the last of the T tokens are the patches of a square, row by row.

        Raises:
            AdapterError: more tokens are left over than a CLS token and registers in front.
        """
        tokens = features.shape[1]
        side = math.isqrt(tokens)
        if tokens - side * side > MOST_IN_FRONT:
            raise AdapterError(f"{tokens} tokens are no square of patches: condition patches takes square pictures.")
        places = features[:, tokens - side * side :].transpose(1, 2).unflatten(2, (side, side))
        parts = nn.functional.adaptive_avg_pool2d(places, grid(self.shape[0]))
        return self.up(self.activation(self.down(parts.flatten(2).transpose(1, 2))))


def grid(parts: int) -> tuple[int, int]:
    """Rows and columns of that many parts, as square as can be and never taller than wide: 10 are 2 x 5."""
    rows = next(rows for rows in range(math.isqrt(parts), 0, -1) if parts % rows == 0)
    return rows, parts // rows


class VisualPromptCondition(Condition):
    """K learnable queries and a picture's tokens through self-attention; what the queries became, projected.

    The submodules have the names of the authors' checkpoints, whose tensors `load_state_dict` takes as they are.
    """

    def __init__(
        self,
        hidden_size: int,
        adapter_len: int,
        tower_width: int = 768,
        blocks: int = 8,
        block_width: int = 768,
        block_heads: int = 16,
        absent: str = "zero",
    ) -> None:
        super().__init__(absent, adapter_len, hidden_size)
        self.visual_query = nn.Embedding(adapter_len, block_width)
        self.clip_proj = nn.Linear(tower_width, block_width)
        self.clip_proj_norm = nn.LayerNorm(block_width)
        self.visual_blocks = nn.ModuleList(_Block(block_width, block_heads) for _ in range(blocks))
        self.visual_proj = nn.Linear(block_width, hidden_size)
        self.visual_proj_norm = nn.LayerNorm(hidden_size)

    def project(self, features: Tensor) -> Tensor:
        """[B, T, D] -> [B, K, hidden]."""
        tokens = self.clip_proj_norm(self.clip_proj(features))
        queries = self.visual_query.weight.expand(len(tokens), -1, -1)
        states = torch.cat([queries, tokens], dim=1)  # [B, K + T, block_width]
        for block in self.visual_blocks:
            states = block(states)
        return self.visual_proj_norm(self.visual_proj(states[:, : queries.shape[1]]))


class ImageBindCondition(Condition):
    """A linear layer and three gated MLPs, x + f2(silu(f1(norm(x))) * f3(norm(x))): one vector for all prompts.

    The submodules have the names of the authors' checkpoints. Embeddings are taken as ImageBind gives them.
    """

    def __init__(self, hidden_size: int, tower_width: int = 1024, legacy: bool = False, absent: str = "zero") -> None:
        super().__init__(absent, hidden_size)
        self.image_bind_proj = nn.Linear(tower_width, hidden_size)
        inner = MLP_RATIO * hidden_size
        for i in range(1, BRIDGE_STEPS + 1):
            norm = nn.LayerNorm(hidden_size) if legacy else nn.RMSNorm(hidden_size, eps=1e-6)
            self.add_module(f"image_bind_norm_{i}", norm)
            self.add_module(f"image_bind_f1_{i}", nn.Linear(hidden_size, inner, bias=legacy))
            self.add_module(f"image_bind_f2_{i}", nn.Linear(inner, hidden_size, bias=legacy))
            self.add_module(f"image_bind_f3_{i}", nn.Linear(hidden_size, inner, bias=legacy))

    def project(self, features: Tensor) -> Tensor:
        """[B, D] or [B, 1, D] -> [B, hidden]."""
        states = self.image_bind_proj(features.flatten(1))
        for i in range(1, BRIDGE_STEPS + 1):
            norm, f1, f2, f3 = (self.get_submodule(f"image_bind_{part}_{i}") for part in ("norm", "f1", "f2", "f3"))
            normed = norm(states)
            states = states + f2(nn.functional.silu(f1(normed)) * f3(normed))
        return states


class _Block(nn.Module):
    """A pre-norm transformer block, [B, N, width] -> [B, N, width], under the names that timm gives its parts."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = _SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _Mlp(width)

    def forward(self, states: Tensor) -> Tensor:
        states = states + self.attn(self.norm1(states))
        return states + self.mlp(self.norm2(states))


class _SelfAttention(nn.Module):
    """Unmasked attention of every token to every token."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, states: Tensor) -> Tensor:
        query, key, value = self.qkv(states).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, N, -1]
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    """fc1, exact GELU, fc2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, states: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(states)))
