"""lmms-eval, a harness for questions about pictures, on a base with an adapter.

    python -m lmms_eval --model llama_adapter --model_args model=bundled,adapter=runs/first --tasks scienceqa_img

The harness finds the model class below by itself, through the package's entry point. From Python, an instance of the
class is passed to `lmms_eval.evaluator.simple_evaluate`. The harness brings torchvision, which must be of the build
that torch is: beside a torch for CPUs, take it from the same index as torch.

lmms-eval 0.7 to 0.7.3 turn the scores of any model into text, so their multiple-choice tasks fail; 0.6.1 runs them.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from llama_adapter.data import IGNORE, Encoded, Example, Media, Message, encode_all, without_tags
from llama_adapter.data.batches import MicroBatch, collate
from llama_adapter.errors import ConfigError, DataError, MissingExtraError
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.inference.session import Session, default_device, load_session
from llama_adapter.inference.writing import Prompt
from llama_adapter.progress import progress_bar
from llama_adapter.training.loss import response_logits, row_losses

try:
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest
except ImportError:
    raise MissingExtraError("lmms-eval", "lmms-eval", "The harness for questions about pictures") from None

ANSWER_TOKENS = 256
"""Longest answer where neither the caller nor the task says."""
_LETTER = re.compile(r"The answer is (?:\(([A-Z])\)|([A-Z])(?=\.|$))")
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def manifest() -> ModelManifest:
    """What lmms-eval asks the entry point for: the name of the model and where its class is."""
    return ModelManifest(model_id="llama_adapter", simple_class_path=f"{__name__}.LlamaAdapterLmms")


class LlamaAdapterLmms(lmms):
    """A base with one adapter.

    Args:
        model: folder, hub name or 'bundled'; by default the base that the adapter was made for.
        adapter: its folder; without it the bare base is measured. One without a condition does not see pictures.
        precision: "auto", "bf16" or "fp32".
        load_in_4bit: quantise the base with bitsandbytes.
        device: as torch names it; by default the accelerator, else the CPU.
        batch_size: requests answered at once.
        max_new_tokens: longest answer, over what the task says; an answer in a whole sentence needs more tokens than
            the letter that a task makes room for.
        tower: "python:FILE.py:FUNCTION" of an adapter that was trained with such a tower: code that you let run.
        bare_letters: reduce "The answer is (A)." to "A": tasks such as scienceqa count nothing else as right.

    Raises:
        LlamaAdapterError: a base or adapter that is missing, damaged or does not fit the other.
        ConfigError: a size that is no whole number above 0.
    """

    is_simple = True

    def __init__(
        self,
        model: str | None = None,
        adapter: str | None = None,
        precision: Any = "auto",
        load_in_4bit: bool = False,
        device: str | None = None,
        batch_size: int | str = 1,
        max_new_tokens: int | None = None,
        bare_letters: bool = True,
        tower: str | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = _whole("batch_size", batch_size)
        self.max_new_tokens = None if max_new_tokens is None else _whole("max_new_tokens", max_new_tokens)
        self.bare_letters = bare_letters
        where = default_device() if device is None else torch.device(device)
        adapters = {} if adapter is None else {"adapter": str(adapter)}
        self.adapter = "adapter" if adapters else None
        bits: Any = "4bit" if load_in_4bit else None
        towers = () if tower is None else (tower,)
        self.session: Session = load_session(model, adapters, where, precision, bits, towers=towers)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What the model writes for each request, in their order; args of one are (context, settings, doc_to_visual,
        doc_id, task, split).

        Raises:
            ConfigError: a task asks for beam search.
            DataError: a prompt does not fit into the base's context, or what is to be looked at cannot be.
        """
        texts = [""] * len(requests)
        for rows in self._batches(requests, [repr(request.args[1]) for request in requests]):
            asked = [requests[row].args for row in rows]
            settings = asked[0][1]
            prompts = [Prompt.of(without_tags(args[0]), media=self._seen(*args[2:])) for args in asked]
            answers = self.session.answer(prompts, self.adapter, decoding(settings, self.max_new_tokens))
            for row, answer in zip(rows, answers, strict=True):
                text = _cut(answer.text, settings.get("until"))
                texts[row] = bare_letter(text) if self.bare_letters else text
        return texts

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """A score of each request's continuation, and whether it is what greedy decoding writes; args of one are
        (context, continuation or doc_to_target, doc_to_visual, doc_id, task, split).

        The continuation is read as the adapter's training wrote answers, so without the blank that the harness puts in
        front. Its score is the sum over its tokens: of -log p for a choice among several, of which the harness takes
        the lowest, and of log p for the one target of a document, from which it computes a perplexity.

        Raises:
            DataError: a text does not fit into the base's context, or what is to be looked at cannot be.
        """
        scores = [(0.0, False)] * len(requests)
        for rows in self._batches(requests, [""] * len(requests)):
            asked = [requests[row].args for row in rows]
            encoded = [self._encode(args) for args in asked]
            with self.session.using(self.adapter, [self._seen(*args[2:]) for args in asked]):
                losses, greedy = self._losses(collate(encoded))
            for row, args, loss, same in zip(rows, asked, losses, greedy, strict=True):
                scores[row] = (loss if isinstance(args[1], str) else -loss, same)
        return scores

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "llama_adapter answers one question at a time, and this task goes on from its answers "
            "(generate_until_multi_round): take another task."
        )

    def _batches(self, requests: Sequence[Any], keys: Sequence[str]) -> Iterator[list[int]]:
        """Indices of at most `batch_size` requests of one key, with a progress bar."""
        groups: dict[str, list[int]] = {}
        for row, key in enumerate(keys):
            groups.setdefault(key, []).append(row)
        with progress_bar(len(requests), "request", "answers", disable=self.rank != 0) as bar:
            for rows in groups.values():
                for start in range(0, len(rows), self.batch_size):
                    batch = rows[start : start + self.batch_size]
                    yield batch
                    bar.update(len(batch))

    def _seen(self, doc_to_visual: Any, doc_id: Any, task: str, split: str) -> tuple[Media, ...]:
        """What the document has to look at, where the adapter can look."""
        if self.adapter not in self.session.perceptions:
            return ()
        return tuple(as_media(visual) for visual in doc_to_visual(self.task_dict[task][split][doc_id]) or ())

    def _encode(self, args: Sequence[Any]) -> Encoded:
        context, target, _, doc_id, task, split = args
        text = target if isinstance(target, str) else str(target(self.task_dict[task][split][doc_id]))
        template = self.session.templates[self.adapter]
        raw = template == "raw"
        messages = Message("user", without_tags(context)), Message("assistant", text if raw else text.lstrip())
        room = self.session.writer.limits.positions or 1 << 30
        encoded = encode_all([Example(messages, raw=raw)], template, self.session.tokenizer, room)[0]
        if encoded.truncated:
            raise DataError(f"Document {doc_id} of {task} has more than {room} tokens, the most the base takes.")
        end = max(place for place, label in enumerate(encoded.labels) if label != IGNORE)
        encoded.labels[end] = IGNORE  # the token that closes an answer is no part of the continuation
        return encoded

    @torch.no_grad()
    def _losses(self, batch: MicroBatch) -> tuple[list[float], list[bool]]:
        """-log p of each row's labels, and whether each of them is the likeliest token at its place."""
        logits, targets = response_logits(self.session.model, batch, self.session.model.device)
        greedy = ((logits.argmax(-1) == targets) | (targets == IGNORE)).all(-1)
        return row_losses(logits, targets).tolist(), greedy.tolist()


def decoding(settings: Mapping[str, Any], max_new_tokens: int | None = None) -> GenerateConfig:
    """How to decode, from a task's generation settings.

    Args:
        settings: of these max_new_tokens, do_sample, temperature and top_p are followed.
        max_new_tokens: takes precedence over the task's.

    Raises:
        ConfigError: beam search is asked for, or a setting breaks its rule.
    """
    if (settings.get("num_beams") or 1) > 1:
        raise ConfigError(f"The task asks for {settings['num_beams']} beams; set --gen_kwargs num_beams=1.")
    sampled = settings.get("do_sample")
    temperature = settings.get("temperature")
    if temperature is None:
        temperature = 1.0 if sampled else 0.0  # transformers' own default where sampling is all that is asked for
    return GenerateConfig(
        max_new_tokens=max_new_tokens or settings.get("max_new_tokens") or ANSWER_TOKENS,
        temperature=0.0 if sampled is False else float(temperature),
        top_p=float(settings.get("top_p") or 1),
    )


def bare_letter(text: str) -> str:
    """The letter, where the text says once "The answer is (A)" or "The answer is A."; else the text as it is."""
    found = _LETTER.findall(text)
    return found[0][0] or found[0][1] if len(found) == 1 else text


def as_media(visual: object) -> Media:
    """What a task gives to look at, as files are given elsewhere: a path, or the content of a file.

    Raises:
        DataError: it is neither a picture nor a file.
    """
    if isinstance(visual, str | bytes):
        return visual
    if not isinstance(visual, Image.Image):
        raise DataError(f"The task gives a {type(visual).__name__} to look at; only pictures and files can be.")
    picture = visual if visual.mode in _PNG_MODES else visual.convert("RGB")
    content = io.BytesIO()
    picture.save(content, "PNG", compress_level=1)  # it lives until it is decoded: speed counts, not size
    return content.getvalue()


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text up to where the first of the task's stops begins."""
    stops = [until] if isinstance(until, str) else until or ()
    return text[: min((text.find(stop) for stop in stops if stop and stop in text), default=len(text))].strip()


def _whole(name: str, value: object) -> int:
    """A command line gives numbers as text."""
    if not str(value).isdecimal() or int(str(value)) < 1:
        raise ConfigError(f"{name} is {value}; it must be a whole number of at least 1.")
    return int(str(value))
