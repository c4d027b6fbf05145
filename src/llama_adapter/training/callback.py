"""An adapter in other people's trainers: checkpoints that hold the adapter, and no copy of the base."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llama_adapter.core.model import get_adapter
from llama_adapter.errors import TrainingError
from llama_adapter.formats.native import save_adapter


class AdapterCallback(TrainerCallback):
    """Makes each checkpoint of `transformers.Trainer`, or of TRL's trainers, an adapter's folder.

        Trainer(model, args, ..., callbacks=[AdapterCallback()])
        ...
        load_adapter(base, "out/checkpoint-500")

    The trainer's own `model.safetensors` then holds only what is trained, so that `load_best_model_at_end` and
    `resume_from_checkpoint` read the adapter back and the base is never written. From the beginning to the
    end of a training this goes for every `model.save_pretrained`; afterwards the model saves as before. A training
    that an exception ends leaves it so: `model._keys_to_ignore_on_save = None` undoes it.

    Args:
        name: of the adapter that is saved, by default the one that is active when the training begins; what the trainer
            restores is every parameter that it trains. A resumed run logs that the base's keys are missing: they are.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self._before: set[str] | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look whether there is something to save, before anything is trained.

        Raises:
            AdapterError: the model has no adapter of that name.
            TrainingError: it is a PeftModel, whose checkpoints have files of the same names.
        """
        if hasattr(kwargs["model"], "peft_config"):
            raise TrainingError(
                "AdapterCallback and PEFT write files of the same names into a checkpoint: leave the callback out "
                "and keep the adapter with save_adapter."
            )
        get_adapter(kwargs["model"], self.name)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the frozen base out of checkpoints."""
        self._leave_out(kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the adapter into the checkpoint's folder.

        Raises:
            AdapterError: the folder cannot be written.
            TrainingError: the trainer keeps its checkpoints elsewhere, as in a search for hyperparameters.
        """
        if not args.should_save:
            return
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if not folder.is_dir():
            raise TrainingError(
                f"The trainer wrote no {folder}, as in a search for hyperparameters: leave AdapterCallback out there."
            )
        save_adapter(kwargs["model"], folder, self.name)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the model save itself as before."""
        kwargs["model"]._keys_to_ignore_on_save, self._before = self._before, None

    def _leave_out(self, model: PreTrainedModel) -> None:
        self.name = get_adapter(model, self.name).name
        trained = {key for key, tensor in model.named_parameters(remove_duplicate=False) if tensor.requires_grad}
        if self._before is None:
            self._before = set(model._keys_to_ignore_on_save or ())
        # transformers' own list of what a model saves without; a trainer that misses just these keys does not warn
        model._keys_to_ignore_on_save = self._before | (model.state_dict().keys() - trained)
