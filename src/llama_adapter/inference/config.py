"""`GenerateConfig`: how an answer is decoded."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt, Le

from llama_adapter.settings import Count, NotNegative, Seed, check


@dataclass(frozen=True)
class GenerateConfig:
    """How an answer is decoded; the defaults are the paper's (temperature 0.1, top-p 0.75).

    `temperature` 0 decodes greedily. `seed` None draws differently at every call. `compile` takes some seconds at the
    first answer of a batch size and length, and less for every token after it.

    Raises:
        ConfigError: values break their rules; every one of them is named.
    """

    max_new_tokens: Count = 256
    temperature: NotNegative = 0.1
    top_p: Annotated[float, Gt(0), Le(1)] = 0.75
    seed: Seed | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        check(self)
