"""Training: one visible loop over accelerate.

Every process encodes the same data and knows every batch of the run from the seed and the step alone. A step sums the
loss over all response tokens of the global batch and divides by their number, which everyone knows; so micro-batches,
accumulation and processes change nothing but rounding. Gradients are 1.2M numbers: one flat sum over the processes.
"""

import logging
import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from llama_adapter.base import check_parts, first_sentence, load_base, load_config, load_tokenizer
from llama_adapter.compiler import compile_layers, compiler_errors
from llama_adapter.conditions.modules import Condition
from llama_adapter.conditions.perception import Perception
from llama_adapter.core.model import add_adapter, resolve_layers, use_adapter
from llama_adapter.core.quantised import check_backward
from llama_adapter.core.routing import Adapter
from llama_adapter.core.warm_start import prompts_from_text
from llama_adapter.data import Encoded
from llama_adapter.data.batches import MicroBatch, micro_batches
from llama_adapter.data.encode import texts_of
from llama_adapter.data.limits import Limits
from llama_adapter.errors import AdapterError, Interrupted, TrainingError
from llama_adapter.formats.native import save_adapter
from llama_adapter.formats.push import open_repository, push_adapter
from llama_adapter.progress import progress_bar
from llama_adapter.training.agreement import check_agreed
from llama_adapter.training.card import write_run_card
from llama_adapter.training.checkpoint import Progress, RunFolder, Trained
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.disjoint import by_kind, training_only
from llama_adapter.training.fp8 import quantise_base, require_fp8
from llama_adapter.training.loss import why_not_packed
from llama_adapter.training.objective import Objective, Responses, objective_of
from llama_adapter.training.optimizer import build_optimizer, learning_rate
from llama_adapter.training.owner import restarted
from llama_adapter.training.packing import PackedRow, packed_rows
from llama_adapter.training.perceive import condition_of, look, tower_of
from llama_adapter.training.plots import plot_gates, plot_loss, plot_rewards
from llama_adapter.training.prepare import Prepared, prepare
from llama_adapter.training.sharding import check_strategy, in_step, shards_of
from llama_adapter.training.start import (
    adapter_of,
    check_extras,
    check_start,
    check_written_alike,
    chosen_trackers,
    settle,
    start_text,
)
from llama_adapter.training.stop import stop_signals

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. `base_val_loss` is the validation loss before the first step: the bare base's, or that of the
    adapter in `init_from`."""

    output_dir: Path
    steps: int
    train_loss: float | None
    base_val_loss: float | None
    best_val_loss: float | None
    best_step: int


def train(config: TrainConfig) -> TrainResult:
    """Train an adapter as a recipe says and leave it in `config.output_dir` (see `checkpoint.py`).

    Raises:
        LlamaAdapterError: anything wrong with recipe, data, base or folder, found before the base's weights are read;
            later a loss that is not finite, or a full disk. The last good checkpoint is kept.
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    folder = RunFolder(config.output_dir)
    try:
        return _train(restarted(config), folder)
    finally:
        folder.release()


def _train(config: TrainConfig, folder: RunFolder) -> TrainResult:
    config, start = settle(config)
    check_extras(config)
    base = load_config(config.value("model"))
    check_start(start, config, base)
    resolve_layers(config.adapter_config(), base)
    check_parts(config.adapter_config(), base)
    check_strategy(config, base)
    accelerator = start_accelerator(config)
    if config.base_precision == "fp8":
        require_fp8(accelerator.device, base)
    if accelerator.is_main_process:
        folder.lock()
        folder.check(config)
        if config.push_to_hub:
            open_repository(config.push_to_hub)
    (now,) = broadcast_object_list([folder.now(config)])
    tokenizer = load_tokenizer(config.value("model"))
    limits = Limits.of(base)
    data = prepare(config, tokenizer, limits, now)
    check_written_alike(start, data.raw)
    text = start_text(config, data.train[0], tokenizer, limits)
    check_agreed(config, data.digest, folder.finished_steps() if config.resume else 0)
    if accelerator.is_main_process:
        folder.check_length(config, data.steps_per_epoch(config))
    log.info("data: %s", ", ".join(f"{value} {key}" for key, value in data.report().items()))

    tower = tower_of(config, accelerator.device)
    condition = condition_of(config, data, tower)
    adapter_config = adapter_of(config, start, condition, data.raw)
    resolve_layers(adapter_config, base)  # again, with the condition's layers
    perception = None if condition is None else look(condition, config, data, accelerator, tower)

    model = load_base(
        config.value("model"), accelerator.device, config.precision, config.quantization, shards_of(accelerator)
    )
    check_backward(model)
    if config.base_precision == "fp8":
        log.info("base: %d linear layers in FP8", quantise_base(model))
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    if config.compile:
        compile_layers(model)
    torch.manual_seed(config.seed)
    adapter = add_adapter(model, adapter_config, state_dict=None if start is None else start.tensors)
    if text is not None:
        prompts_from_text(model, adapter, text)
    optimizer = build_optimizer(adapter, config)
    if accelerator.is_main_process:
        folder.claim(config)
    accelerator.wait_for_everyone()
    objective = objective_of(config, model, adapter, start, folder, accelerator.is_main_process)
    run = Run(config, accelerator, folder, data, model, adapter, optimizer, perception, objective)
    with folder.resumable():
        with compiler_errors():
            run.loop()
        return run.finish()


def start_accelerator(config: TrainConfig) -> Accelerator:
    """The processes and devices that `accelerate launch` or torchrun set up; one process without them.

    Raises:
        TrainingError: a tracker cannot be used.
    """
    trackers = chosen_trackers(config)
    try:
        accelerator = Accelerator(
            # accelerate takes processes on the CPU for strangers to each other unless it is told
            cpu=not torch.accelerator.is_available(),
            log_with=trackers or None,
            project_dir=config.output_dir,
        )
    except (ImportError, ValueError) as error:
        raise TrainingError(f"trackers {', '.join(trackers)} cannot be used: {error}") from None
    if not accelerator.is_main_process:
        log.setLevel(logging.ERROR)
    return accelerator


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute the layers' activations in the backward pass, while the frozen base answers as in evaluation.

    transformers recomputes the layers that are in training mode, and asks that of the layer object alone. What lies
    inside stays in evaluation mode, so that no dropout and no router noise of the base's configuration sets in.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


class Run:
    """One training run. `loop` is the part to read."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        folder: RunFolder,
        data: Prepared,
        model: PreTrainedModel,
        adapter: Adapter,
        optimizer: torch.optim.AdamW,
        perception: Perception | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.config, self.accelerator, self.folder, self.data = config, accelerator, folder, data
        self.model, self.adapter, self.optimizer, self.perception = model, adapter, optimizer, perception
        self.objective = objective or Responses()
        self.per_epoch, self.feed = data.steps_per_epoch(config), data.feed(config)
        self.total = config.total_steps(self.per_epoch)
        self.progress = folder.restore(adapter, optimizer, data.digest) if config.resume else Progress()
        self.feed.seek(self.progress.position)
        self.is_main = accelerator.is_main_process
        self.packed = self._may_pack()

    def _may_pack(self) -> bool:
        """Whether examples are packed; the log says which, and why not."""
        reason = "packing is off" if not self.config.packing else why_not_packed(self.model, self.data.longest)
        if self.perception is not None:
            reason = "pictures give every example prompts of its own"
        log.info("batches: %s", f"padded, of like lengths: {reason}" if reason else "packed, without padding")
        return reason is None

    def loop(self) -> None:
        """Train from where the run stands to its end."""
        config, start = self.config, self.progress.step
        self._start_trackers(start)
        log.info(
            "training %s parameters: %d steps of %d examples, learning rate %.3g, on %d x %s in %s",
            f"{self.adapter.num_parameters:,}", self.total, config.batch_size, config.peak_lr,
            self.accelerator.num_processes, self.accelerator.device.type, str(self.model.dtype).removeprefix("torch."),
        )  # fmt: skip
        if start >= self.total:
            log.info("nothing was left to do: the run has all its steps; more --epochs or --max-steps would go on")
        bar = progress_bar(self.total, "step", initial=start, disable=not self.is_main)
        with stop_signals() as stop, bar:
            if start == 0:
                self._validate(bar)
            for step in range(start, self.total):
                began = time.perf_counter()
                batch = self.feed.batch(step)
                lr = learning_rate(config, step, self.total)
                values, norm, stopping = self._step(batch, lr, stop.requested)
                self.progress.step, self.progress.position = step + 1, self.feed.position
                seconds = time.perf_counter() - began
                tokens = sum(len(text.input_ids) for text in texts_of(batch))
                bar.set_postfix(loss=f"{values['loss']:.3f}", tok_s=f"{tokens / seconds:,.0f}", refresh=False)
                bar.update()
                self._log(**values, lr=lr, grad_norm=norm, tokens=tokens, seconds=round(seconds, 4))
                if self._is_due(config.eval_every or self.per_epoch):
                    self._validate(bar)
                if self.is_main:
                    self._save(stopping or self._is_due(config.save_every))
                if stopping:
                    raise Interrupted(
                        f"Stopped after step {step + 1} of {self.total}; everything is saved. "
                        f"Go on with: llama-adapter train {shlex.quote(str(self.folder.recipe))} --resume"
                    )

    def _step(self, batch: Sequence[Encoded], lr: float, stop: bool) -> tuple[dict[str, float], float, bool]:
        """One optimiser step; returns the objective's values, the gradient's norm, and whether to stop."""
        accelerator, count = self.accelerator, max(1, self.objective.count(batch))
        parameters = list(self.adapter.parameters())
        self.optimizer.zero_grad(set_to_none=False)
        total = torch.zeros(len(self.objective.names), device=accelerator.device)
        for micro_batch, weight in self._batches(batch, self.config.micro_batch_size):
            with training_only(self.adapter, micro_batch) if self.config.disjoint else nullcontext():
                sums = self._sums(micro_batch) * weight / count
                sums[0].backward()
            total += sums.detach()
        gradients = [self._gradient(parameter) for parameter in parameters]
        flags = torch.cat([total, total.new_tensor([float(stop)])])
        if accelerator.num_processes > 1:
            flat = accelerator.reduce(torch.cat([flags, *(gradient.flatten() for gradient in gradients)]), "sum")
            flags, *rest = flat.split([len(flags), *(gradient.numel() for gradient in gradients)])
            for gradient, summed in zip(gradients, rest, strict=True):
                gradient.copy_(summed.view_as(gradient))
        limit = self.config.max_grad_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if not math.isfinite(norm) or not math.isfinite(float(flags[0])):
            kept = f"the checkpoint in {self.folder.last} is kept" if self.folder.last.exists() else "no checkpoint yet"
            raise TrainingError(
                f"Loss {float(flags[0])} and gradient norm {norm} at step {self.progress.step + 1} are not finite; "
                f"{kept}. Lower --lr (it is {lr:.3g}), or set --max-grad-norm 1."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        self.optimizer.step()
        *values, stopping = flags.tolist()
        return dict(zip(self.objective.names, values, strict=True)), norm, bool(stopping)

    def _batches(self, examples: Sequence[Encoded], size: int) -> Iterator[tuple[MicroBatch | PackedRow, float]]:
        """This process's share, `size` examples a forward, and what each counts for, see `in_step`."""
        make: Callable[..., Iterator[MicroBatch | PackedRow]] = packed_rows if self.packed else micro_batches
        accelerator = self.accelerator
        for kind in by_kind(examples) if self.config.disjoint else [examples]:
            share = make(kind, size, accelerator.process_index, accelerator.num_processes)
            yield from in_step(share, accelerator, partial(make, kind[:1], size))

    def _sums(self, batch: MicroBatch | PackedRow) -> torch.Tensor:
        """The objective's sums over a micro-batch, under the condition of its pictures where there is one."""
        if self.perception is None or self.adapter.condition is None or isinstance(batch, PackedRow):
            return self.objective.sums(self.model, batch, self.accelerator.device)
        condition = self.perception.condition(cast(Condition, self.adapter.condition), batch.media)
        with use_adapter(self.model, self.adapter.name, condition):
            return self.objective.sums(self.model, batch, self.accelerator.device)

    @staticmethod
    def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
        if parameter.grad is None:  # a process whose share of the batch was empty
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Encoded]) -> dict[str, float]:
        """The objective's values over `examples`."""
        objective, accelerator = self.objective, self.accelerator
        total = torch.zeros(len(objective.names), device=accelerator.device)
        for batch, weight in self._batches(examples, 2 * self.config.micro_batch_size):
            total += self._sums(batch) * weight
        means = accelerator.reduce(total, "sum") / max(1, objective.count(examples))
        return dict(zip(objective.names, means.tolist(), strict=True))

    def _validate(self, bar: Any) -> None:
        if not self.data.val:
            return
        bar.set_description("validating")
        values = self.evaluate(self.data.val)
        loss = values["loss"]
        bar.set_description(f"val {loss:.3f}")
        self._log(**{f"val_{name}": value for name, value in values.items()})
        if loss < self.progress.best_val_loss:
            self.progress.best_val_loss, self.progress.best_step = loss, self.progress.step
            if self.is_main:
                save_adapter(self.model, self.folder.path, self.adapter.name)

    def _save(self, whole: bool) -> None:
        """Write a checkpoint, or else the step's state alone."""
        state = Trained(self.adapter, self.optimizer, self.progress, self.data.digest, self.data.now)
        if whole:
            self.folder.save_checkpoint(self.model, state)
        else:
            self.folder.save_step(state)

    def _is_due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.total

    def _log(self, **values: float) -> None:
        step = self.progress.step
        if self.is_main:
            self.folder.log({"step": step, "epoch": self.feed.epoch(step), **values})
            self.accelerator.log(values, step=step)

    def _start_trackers(self, start: int) -> None:
        if not self.accelerator.log_with:
            return
        try:
            self.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": start or None}})
        except Exception as error:  # each tracker has its own kinds, for no login as for no network
            names = ", ".join(str(getattr(name, "value", name)) for name in self.accelerator.log_with)
            raise TrainingError(
                f"The trackers ({names}) cannot start: {first_sentence(error)} Set them up, or go on with "
                f"--resume --output-dir {self.folder.path} --trackers none."
            ) from None

    def _push(self, repository: str) -> None:
        try:
            log.info("pushed: %s", push_adapter(self.folder.path, repository))
        except AdapterError as error:
            again = f"llama-adapter push {self.folder.path} {repository}"
            raise AdapterError(f"{error} The run is finished and kept; try again: {again}") from None

    def finish(self) -> TrainResult:
        """Write the pictures and the card, push where that is asked for, and sum the run up."""
        log.info("trained on %s", self.feed.summary())
        self.accelerator.end_training()
        history = self.folder.history() if self.is_main else []
        if self.is_main:
            if not self.data.val:
                save_adapter(self.model, self.folder.path, self.adapter.name)
            plot_loss(history, self.folder.path / "loss.png", self.objective.unit)
            if self.config.method == "dpo":
                plot_rewards(history, self.folder.path / "rewards.png")
            gates = {i: layer.strength().tolist() for i, layer in self.adapter.layers.items()}
            if gates:
                plot_gates(gates, self.folder.path / "gates.png")
        losses = [line["loss"] for line in history if "loss" in line]
        val_losses = [line["val_loss"] for line in history if "val_loss" in line]
        result = TrainResult(
            output_dir=self.folder.path,
            steps=self.progress.step,
            train_loss=losses[-1] if losses else None,
            base_val_loss=val_losses[0] if val_losses else None,
            best_val_loss=min(val_losses, default=None),
            best_step=self.progress.best_step,
        )
        if self.is_main:
            write_run_card(self.config, asdict(result), self.feed.summary(), len(self.data.val))
            if self.config.push_to_hub:
                self._push(self.config.push_to_hub)
        return result
