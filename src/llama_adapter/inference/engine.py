"""The engine: tokens in, tokens out. It owns its model, the slots of its adapters, and the ways to take a step."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedModel

from llama_adapter.core.model import get_adapter, list_adapters
from llama_adapter.errors import LlamaAdapterError
from llama_adapter.inference.batch import Batch
from llama_adapter.inference.choice import Row
from llama_adapter.inference.compiled import CompiledSteps
from llama_adapter.inference.slots import Slots

log = logging.getLogger(__name__)


class Engine:
    """Decodes on a model that nobody else changes while it does.

    Threads may share it: one batch runs at a time.

    Args:
        model: the base with its adapters. Its weights may be joined into slices of larger tensors, in place.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.slots = Slots(model)
        self.compiled = CompiledSteps(model)
        self._lock = threading.RLock()
        self._decoding = False

    @contextlib.contextmanager
    def batch(self, compile: bool = False) -> Iterator[Batch]:
        """An empty batch, to be driven by this thread; other threads wait until the block ends, and its rows with it.

        Args:
            compile: take steps by one compiled graph, with a cache of fixed size; rows then join at once or not at all.

        Raises:
            LlamaAdapterError: this thread is in such a block already.
        """
        # Not inference_mode, also where the caller is in it: slots that were made there could not be written later.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._decoding:
                raise LlamaAdapterError("An engine cannot decode from within its own on_tokens: wait for its answer.")
            self._decoding = True
            learning = [module for module in self.model.modules() if module.training]
            batch = Batch(self.model, self.slots, self.compiled if compile and self._compiles() else None)
            try:
                for module in learning:
                    module.training = False
                yield batch
            finally:
                batch.close()
                for module in learning:
                    module.training = True
                self._decoding = False

    def _compiles(self) -> bool:
        if any(get_adapter(self.model, name).modules for name in list_adapters(self.model)):
            log.warning("--compile is left out: norms, scales, biases and LoRA are not in the compiled step")
            return False
        return True

    def generate(
        self,
        rows: Sequence[Row],
        on_tokens: Callable[[int, int], None] = lambda row, token: None,
        compile: bool = False,
    ) -> list[list[int]]:
        """What each row is answered, its stop token included where it came to one.

        Args:
            rows: at least one.
            on_tokens: called with a row's number and its next token, as it comes.
            compile: take steps by one compiled graph, with a cache of fixed size.

        Raises:
            AdapterError: there is no adapter of a row's name.
            ModelError: there is nothing to compile with.
            LlamaAdapterError: it is called from its own `on_tokens`.
        """
        with self.batch(compile) as batch:
            members = batch.admit(rows)
            number = {member: i for i, member in enumerate(members)}
            batch.join(members)
            while True:
                chosen = batch.choose()
                for member, choice in chosen:
                    on_tokens(number[member], choice.token)
                batch.drop([member for member, _ in chosen if member.ended])
                if all(member.ended for member in members):
                    return [member.answer for member in members]
                batch.advance()
