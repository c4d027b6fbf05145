"""What a base can take: the one place that says how many tokens, and which token ids."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama_adapter.core.families import max_positions, text_config
from llama_adapter.data.templates import tokenizer_name
from llama_adapter.errors import DataError, TooLongError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Limits:
    """What a base can take.

    Attributes:
        positions: the context, in tokens, prompt and answer together; None where the base does not say.
        embeddings: token ids are below it.
    """

    positions: int | None
    embeddings: int

    @classmethod
    def of(cls, config: "PretrainedConfig") -> "Limits":
        """From the base's configuration alone."""
        return cls(max_positions(config), text_config(config).vocab_size)

    def room(self, tokens: int) -> int:
        """How many new tokens fit behind a prompt of so many.

        Raises:
            TooLongError: none.
        """
        context = self.positions or 1 << 30
        if tokens >= context:
            raise TooLongError(f"The prompt has {tokens} tokens; the base takes at most {context - 1}: shorten it.")
        return context - tokens

    def check_length(self, tokens: int) -> None:
        """Check that a text whose loss is wanted fits into the context.

        Raises:
            DataError: it does not.
        """
        if self.positions is not None and tokens > self.positions:
            raise DataError(f"Prompt and answer have {tokens} tokens; the base takes {self.positions}: shorten them.")

    def check_ids(self, texts: Iterable[Sequence[int]], tokenizer: "PreTrainedTokenizerBase") -> None:
        """Check that the base has an embedding for every token.

        Raises:
            DataError: naming the token, and how many ids and embeddings there are.
        """
        for ids in texts:
            if ids and max(ids) >= self.embeddings:
                token = next(i for i in ids if i >= self.embeddings)
                raise DataError(
                    f"The text has the token {tokenizer.convert_ids_to_tokens(token)!r} of id {token}, and "
                    f"{self._too_many(tokenizer)}."
                )

    def warning(self, tokenizer: "PreTrainedTokenizerBase") -> str | None:
        """A sentence where the tokenizer knows tokens that the base does not.

        Published bases have such tokenizers (of Gemma 3's 1B, where the last id stands for pictures): it is no error
        until a text has such a token.
        """
        if highest_id(tokenizer) < self.embeddings:
            return None
        return f"texts with some tokens will be refused: {self._too_many(tokenizer)}"

    def _too_many(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        return (
            f"the tokenizer {tokenizer_name(tokenizer)} has token ids up to {highest_id(tokenizer)}, but the base has "
            f"{self.embeddings} embeddings: resize them (resize_token_embeddings), or take the base's own tokenizer"
        )


def highest_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The highest token id of a tokenizer; there may be holes below it."""
    return max(tokenizer.get_vocab().values(), default=-1)
