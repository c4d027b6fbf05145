"""`GenerateConfig`: how an answer is decoded."""

from dataclasses import dataclass

from llama_adapter.settings import Problems


@dataclass(frozen=True)
class GenerateConfig:
    """How an answer is decoded; the defaults are the paper's (temperature 0.1, top-p 0.75).

    `temperature` 0 decodes greedily. `seed` None draws differently at every call. `compile` takes some seconds at the
    first answer of a batch size and length, and less for every token after it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.1
    top_p: float = 0.75
    seed: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        problems = Problems()
        problems.at_least("max_new_tokens", self.max_new_tokens, 1)
        problems.at_least("temperature", self.temperature, 0)
        problems.seed(self.seed)
        problems.require("top_p", 0 < self.top_p <= 1, f"is {self.top_p}; it must be above 0 and at most 1")
        problems.raise_if_any()
