"""Training: one visible loop over accelerate.

A run trains one expert, or many on one base: each step mixes the rows of all of them in its forwards, and a row's
gradient reaches its own expert alone. Every process encodes the same data and knows every batch of the run from the
seed and the step alone. A step sums an expert's loss over all response tokens of its global batch and divides by their
number, which everyone knows; so micro-batches, accumulation, processes and other experts change nothing but rounding.
Gradients are 1.2M numbers an expert: one flat sum over the processes.
"""

import logging
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from llama_adapter.base import check_parts, load_base, load_config
from llama_adapter.compiler import compile_layers, compiler_errors
from llama_adapter.conditions.modules import Condition
from llama_adapter.conditions.perception import Perception
from llama_adapter.core.model import resolve_layers, use_adapter
from llama_adapter.core.quantised import check_backward
from llama_adapter.data import Encoded
from llama_adapter.data.batches import MicroBatch, micro_batches
from llama_adapter.data.encode import texts_of
from llama_adapter.errors import DataError, Interrupted, LlamaAdapterError, TrainingError
from llama_adapter.progress import progress_bar, say
from llama_adapter.training.checkpoint import RunFolder, resumable
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.disjoint import by_kind, training_only
from llama_adapter.training.draft import check_alike, naming, read_drafts, telling
from llama_adapter.training.edited import remember
from llama_adapter.training.fp8 import quantise_base, require_fp8
from llama_adapter.training.learner import Learner, TrainResult
from llama_adapter.training.loss import owners_losses, why_not_packed
from llama_adapter.training.means import Figures, Means, Share
from llama_adapter.training.objective import objective_of
from llama_adapter.training.owner import restarted
from llama_adapter.training.packed_attention import tell_layers
from llama_adapter.training.packing import PackedRow, packed_rows
from llama_adapter.training.processes import start_accelerator
from llama_adapter.training.sharding import (
    check_strategy,
    distribution,
    give_freed_memory_back,
    in_step,
    over_processes,
    place_of,
)
from llama_adapter.training.start import check_extras, check_start, settle
from llama_adapter.training.stop import stop_signals

log = logging.getLogger(__name__)
ONLY_NAME = "default"
"""What the only adapter of a run is called."""


def train(config: TrainConfig) -> TrainResult:
    """Train an adapter as a recipe says and leave it in `config.output_dir` (see `checkpoint.py`).

    Raises:
        LlamaAdapterError: anything wrong with recipe, data, base or folder, found before the base's weights are read;
            later a loss that is not finite, or a full disk. The last good checkpoint is kept.
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    return train_together({ONLY_NAME: config})[ONLY_NAME]


def train_together(recipes: Mapping[str, TrainConfig], again: str | None = None) -> dict[str, TrainResult]:
    """Train an adapter for each recipe, by name, all of them on one base in one run.

    Args:
        recipes: alike in what `draft.ALIKE` names.
        again: the command that goes on with a run that was stopped (default: `train` with its only recipe; of several,
            this function).

    Raises:
        LlamaAdapterError: as `train`; of several runs it begins with the name of the one that is meant. A loss that is
            not finite ends that run alone, and is raised when the others have ended.
    """
    folders = {name: RunFolder(config.output_dir, len(recipes)) for name, config in recipes.items()}
    try:
        return _train_together({name: restarted(config) for name, config in recipes.items()}, folders, again)
    finally:
        for folder in folders.values():
            folder.release()


def _train_together(
    recipes: Mapping[str, TrainConfig], folders: Mapping[str, RunFolder], again: str | None
) -> dict[str, TrainResult]:
    settled = {}
    for name, config in recipes.items():
        with telling(name, recipes):
            settled[name] = settle(config)
            check_extras(settled[name][0])
    check_alike({name: config for name, (config, _) in settled.items()})
    shared = next(config for config, _ in settled.values())
    base = load_config(shared.value("model"))
    for name, (config, start) in settled.items():
        with telling(name, recipes):
            check_start(start, config, base)
            resolve_layers(config.adapter_config(), base)
            check_parts(config.adapter_config(), base)
    check_strategy([config for config, _ in settled.values()], base)
    accelerator = start_accelerator()
    if shared.base_precision == "fp8":
        require_fp8(accelerator.device, base)
    drafts = read_drafts(settled, folders, accelerator, base)
    perceptions: dict[str, Perception | None] = {}
    for draft in drafts:
        with telling(draft.name, recipes):
            perceptions[draft.name] = draft.perceive(accelerator)

    give_freed_memory_back(accelerator.device)
    parts = distribution(shared, accelerator)
    model = load_base(shared.value("model"), accelerator.device, shared.precision, shared.quantization, parts)
    check_backward(model)
    if shared.base_precision == "fp8":
        log.info("base: %d linear layers in FP8", quantise_base(model))
    if shared.gradient_checkpointing:
        enable_checkpointing(model)
    if shared.compile:
        compile_layers(model)
    experts = [draft.expert(model, perceptions[draft.name], accelerator.is_main_process) for draft in drafts]
    if accelerator.is_main_process:
        for begin in (RunFolder.reserve, RunFolder.claim):  # no old run is cleared away before all can begin
            for expert in experts:
                with telling(expert.name, recipes):
                    begin(expert.folder, expert.config)
    accelerator.wait_for_everyone()
    for draft, expert in zip(drafts, experts, strict=True):
        with telling(expert.name, recipes):
            expert.objective = objective_of(
                expert.config, model, expert.adapter, draft.start, expert.folder, expert.is_main
            )
            expert.restore()
            if expert.is_main:
                remember(expert.folder, expert.config)
    run = Run(experts, accelerator, model, again)
    with resumable(run.again):
        with compiler_errors():
            run.loop()
        return run.finish()


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
    """One run of one expert or many. `loop` is the part to read.

    Args:
        experts: what is trained; `ALIKE` settings are read from the first.
        accelerator: processes and device.
        model: the base with the adapters of all of them.
        again: the command that goes on with it once it was stopped.
    """

    def __init__(
        self, experts: Sequence[Learner], accelerator: Accelerator, model: PreTrainedModel, again: str | None = None
    ) -> None:
        self.experts, self.accelerator, self.model = list(experts), accelerator, model
        alone = f"llama-adapter train {shlex.quote(str(experts[0].folder.recipe))} --resume"
        self.again = again or (alone if len(experts) == 1 else "the same call, with resume=True in the recipes")
        self.shared = experts[0].config
        self.results: dict[str, TrainResult] = {}
        self.packed = self._may_pack()
        self.shares_layers = len(self.experts) > 1 and tell_layers(model)

    def _may_pack(self) -> bool:
        """Whether examples are packed; the log says which, and why not."""
        readers = [expert for expert in self.experts if expert.perception is None]
        longest = max((expert.data.longest for expert in readers), default=0)
        reason = "packing is off" if not self.shared.packing else why_not_packed(self.model, longest)
        if not readers:
            reason = "pictures give every example prompts of its own"
        log.info("batches: %s", f"padded, of like lengths: {reason}" if reason else "packed, without padding")
        return reason is None

    def loop(self) -> None:
        """Train from where the experts stand to the end of each; who has no step left leaves the batch."""
        for expert in self.experts:
            expert.start_trackers()
        done, total = self._steps()
        self._announce(done, total)
        bar = progress_bar(total, "step", initial=done, disable=not self.accelerator.is_main_process)
        with stop_signals() as stop, bar:
            self._let_go([expert for expert in self.experts if not expert.learns], bar)
            self._validate([expert for expert in self.experts if expert.progress.step == 0], bar)
            while learning := [expert for expert in self.experts if expert.learns]:
                began = time.perf_counter()
                if not (shares := self._draw(learning)):
                    continue
                rates = [expert.lr for expert, _ in shares]
                figures, stopping = self._step(shares, stop.requested)
                seconds = round(time.perf_counter() - began, 4)
                moved = [expert for expert in learning if expert.failure is None]
                self._show(bar, shares, figures, seconds)
                for (expert, batch), lr, (values, norm) in zip(shares, rates, figures, strict=True):
                    if expert in moved:
                        tokens = sum(len(text.input_ids) for text in texts_of(batch))
                        expert.log(**values, lr=lr, grad_norm=norm, tokens=tokens, seconds=seconds)
                self._validate([e for e in moved if e.is_due(e.config.eval_every or e.per_epoch)], bar)
                for expert in moved:
                    expert.save(stopping or expert.is_due(expert.config.save_every))
                if stopping:
                    raise Interrupted(self._stopped())
                self._let_go([expert for expert in moved if not expert.learns], bar)

    def _draw(self, learning: Sequence[Learner]) -> list[Share]:
        """The examples of each expert's next step; of those whose data, read as they are needed, can be read."""
        shares: list[Share] = []
        for expert in learning:
            try:
                with naming(expert.name, self.experts):
                    shares.append((expert, expert.batch()))
            except DataError as error:
                self._fail(expert, error)
        return shares

    def _fail(self, expert: Learner, error: LlamaAdapterError) -> None:
        """Stop one of several experts; the only one stops the run."""
        if len(self.experts) == 1:
            raise error
        log.warning("%s: %s The others go on.", expert.name, error)
        expert.failure = error

    def _step(self, shares: Sequence[Share], stop: bool) -> tuple[list[Figures], bool]:
        """An optimiser step of each expert on its examples.

        Returns:
            of each its objective's values and the gradient's norm, and whether to stop.
        """
        figures, stopping = self._gradients(shares, stop)
        for (expert, _), (values, norm) in zip(shares, figures, strict=True):
            try:
                expert.update(values["loss"], norm)
            except TrainingError as error:
                self._fail(expert, error)
        return figures, stopping

    def _gradients(self, shares: Sequence[Share], stop: bool) -> tuple[list[Figures], bool]:
        """The clipped gradients of a step, over all processes; nothing has moved yet. Returns what `_step` does."""
        accelerator, means = self.accelerator, Means(shares, self.accelerator.device)
        for expert, _ in shares:
            expert.optimizer.zero_grad(set_to_none=False)
        for batch, weight in self._batches(shares, self.shared.micro_batch_size):
            with self._trained(shares, batch):
                means.add(batch, self._sums(shares, batch) * weight).backward()
        flags = torch.cat([means.totals, means.totals.new_tensor([float(stop)])])
        gradients = [gradient for expert, _ in shares for gradient in expert.gradients()]
        if accelerator.num_processes > 1:
            flat = over_processes(torch.cat([flags, *map(torch.flatten, gradients)]), self.shared, accelerator)
            flags, *rest = flat.split([len(flags), *(gradient.numel() for gradient in gradients)])
            for gradient, summed in zip(gradients, rest, strict=True):
                gradient.copy_(summed.view_as(gradient))
        norms = torch.stack([expert.clip() for expert, _ in shares])
        *values, stopping = flags.tolist()
        return list(zip(means.named(values), norms.tolist(), strict=True)), bool(stopping)

    def _batches(self, shares: Sequence[Share], size: int) -> Iterator[tuple[MicroBatch | PackedRow, float]]:
        """This process's part of the experts' examples, `size` a forward; an owner is a place in `shares`.

        With each batch comes what it counts for, see `in_step`.

        Experts mix, but for those with a condition or a reference: their rows come among themselves.
        """
        mixed = [place for place, (expert, _) in enumerate(shares) if expert.mixes]
        for places in ([mixed] if mixed else []) + [[i] for i in range(len(shares)) if i not in mixed]:
            expert, some = shares[places[0]]
            for kind in by_kind(some) if expert.config.disjoint else [None]:
                examples = [(i, e) for i in places for e in (shares[i][1] if kind is None else kind)]
                yield from self._forwards([e for _, e in examples], [i for i, _ in examples], shares, size)

    def _forwards(
        self, examples: Sequence[Encoded], owners: Sequence[int], shares: Sequence[Share], size: int
    ) -> Iterator[tuple[MicroBatch | PackedRow, float]]:
        accelerator = self.accelerator
        make: Callable[..., Iterator[MicroBatch | PackedRow]] = micro_batches
        if self.packed and shares[owners[0]][0].perception is None:
            depths = [expert.shared_layers if expert.mixes else 0 for expert, _ in shares]
            make = partial(packed_rows, shared_layers=depths if self.shares_layers else None)
        own = make(examples, size, *place_of(self.shared, accelerator), owners)
        return in_step(own, accelerator, partial(make, examples[:1], size, owners=owners[:1]))

    def _sums(self, shares: Sequence[Share], batch: MicroBatch | PackedRow) -> torch.Tensor:
        """Summed loss for each of a batch's owners, or where only one can have it all sums of that one's objective."""
        expert, device = shares[batch.owners[0]][0], self.accelerator.device
        if expert.mixes:
            return owners_losses(self.model, batch, device, [expert.adapter for expert, _ in shares])
        if expert.perception is None or expert.adapter.condition is None or isinstance(batch, PackedRow):
            return expert.objective.sums(self.model, batch, device)
        condition = expert.perception.condition(cast(Condition, expert.adapter.condition), batch.media)
        with use_adapter(self.model, expert.name, condition):
            return expert.objective.sums(self.model, batch, device)

    @staticmethod
    def _trained(shares: Sequence[Share], batch: MicroBatch | PackedRow) -> AbstractContextManager[None]:
        """Which parameters take gradients from a batch: all, or under `disjoint` a group of them."""
        expert = shares[batch.owners[0]][0]
        return training_only(expert.adapter, batch) if expert.config.disjoint else nullcontext()

    @torch.no_grad()
    def evaluate(self, shares: Sequence[Share]) -> list[dict[str, float]]:
        """The values of each expert's objective over its examples."""
        means = Means(shares, self.accelerator.device)
        for batch, weight in self._batches(shares, 2 * self.shared.micro_batch_size):
            means.add(batch, self._sums(shares, batch) * weight)
        return means.named(over_processes(means.totals, self.shared, self.accelerator).tolist())

    def _validate(self, experts: Sequence[Learner], bar: Any) -> None:
        shares = [(expert, expert.data.val) for expert in experts if expert.data.val]
        if not shares:
            return
        bar.set_description("validating")
        found = self.evaluate(shares)
        bar.set_description(f"val {found[0]['loss']:.3f}" if len(self.experts) == 1 else None)
        for (expert, _), values in zip(shares, found, strict=True):
            expert.validated(values)
            if len(self.experts) > 1 and expert.has_news():
                step, loss = f"step {expert.progress.step} of {expert.total}", values["loss"]
                say(bar, f"{expert.name}: {step}, validation loss {loss:.4f}")

    def _let_go(self, ended: Sequence[Learner], bar: Any) -> None:
        """Finish the experts that have all their steps."""
        for expert in ended:
            result = self.results[expert.name] = expert.finish()
            if len(self.experts) > 1:
                best = "" if result.best_val_loss is None else f", best validation loss {result.best_val_loss:.4f}"
                say(bar, f"{expert.name}: done after {result.steps} steps{best}; in {result.output_dir}")

    def _announce(self, done: int, total: int) -> None:
        if done >= total:
            log.info("nothing was left to do: the run has all its steps; more --epochs or --max-steps would go on")
            return
        count, shared = len(self.experts), self.shared
        what = f"{shared.batch_size} examples, learning rate {shared.peak_lr:.3g}," if count == 1 else f"{count} runs"
        log.info(
            "training %s parameters: %d steps of %s on %d x %s in %s",
            f"{sum(expert.adapter.num_parameters for expert in self.experts):,}", total, what,
            self.accelerator.num_processes, self.accelerator.device.type, str(self.model.dtype).removeprefix("torch."),
        )  # fmt: skip

    def _steps(self) -> tuple[int, int]:
        """Optimiser steps that are done and all of them, over the experts."""
        done = sum(min(expert.progress.step, expert.total) for expert in self.experts)
        return done, sum(expert.total for expert in self.experts)

    def _show(self, bar: Any, shares: Sequence[Share], figures: Sequence[Figures], seconds: float) -> None:
        tokens = sum(len(text.input_ids) for _, batch in shares for text in texts_of(batch))
        loss = sum(values["loss"] for values, _ in figures) / len(figures)
        experts = {} if len(self.experts) == 1 else {"experts": len(shares)}
        bar.set_postfix(**experts, loss=f"{loss:.3f}", tok_s=f"{tokens / seconds:,.0f}", refresh=False)
        bar.update(len(shares))

    def _stopped(self) -> str:
        done, total = self._steps()
        return f"Stopped after step {done} of {total}; everything is saved. Go on with: {self.again}"

    def finish(self) -> dict[str, TrainResult]:
        """Push what is to be pushed.

        Raises:
            AdapterError: that failed; the run is kept.
            TrainingError: of several experts some did not reach their end; the others are finished.
        """
        for expert in self.experts:
            with naming(expert.name, self.experts):
                log.info("data: %s", expert.feed.summary())
        failures: dict[str, LlamaAdapterError] = {}
        for expert in self.experts:
            try:
                if expert.failure is not None:
                    raise expert.failure
                expert.push()
            except LlamaAdapterError as error:
                failures[expert.name] = error
        if len(self.experts) == 1 and failures:
            raise failures.popitem()[1]
        if failures:
            which = "; ".join(f"{name}: {error}" for name, error in failures.items())
            raise TrainingError(f"{len(failures)} of {len(self.experts)} runs failed, all others are finished. {which}")
        return {expert.name: self.results[expert.name] for expert in self.experts}
