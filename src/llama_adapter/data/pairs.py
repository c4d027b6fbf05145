"""Preference pairs: a record with a chosen and a rejected answer becomes one example that holds both.

Each answer is put where the record's format has its own, so that `parse_record` reads and checks both as it would any
other. What the two conversations begin with alike is the prompt, stated or implicit, and is not learnt.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from llama_adapter.data.examples import Example, Message, type_name
from llama_adapter.data.formats import PREFERENCE, Record, parse_record
from llama_adapter.data.turns import role_of
from llama_adapter.errors import DataError
from llama_adapter.settings import shown

SHAPES = "prompt + chosen + rejected; chosen + rejected; instruction + chosen + rejected; messages + chosen + rejected"
CONTEXTS = ("prompt", "completion", "messages", "conversations", "instruction", "output")
"""Keys of what stands before an answer, or of an answer of the record's own, which pairs do without."""


def parse_pair(record: object) -> Example:
    """Turn one record into an example with a chosen and a rejected answer.

    `chosen` and `rejected` are texts, messages or lists of messages, behind a prompt of their own or with it in front.

    Raises:
        DataError: as `parse_record`; or it has not both answers, they are the same, or part elsewhere than at an
            answer.
    """
    if not isinstance(record, dict):
        raise DataError(f"a record must be an object, not {type_name(record)}")
    found = [key for key in PREFERENCE if record.get(key) is not None]
    if not found:
        names = ", ".join(shown(key).strip("'") for key in list(record)[:20]) or "none"
        raise DataError(f"its keys ({names}) are no preference pair, which --method dpo trains on; those are: {SHAPES}")
    if len(found) == 1:
        missing = PREFERENCE[found[0] == PREFERENCE[0]]
        raise DataError(f"it has '{found[0]}' and no '{missing}': a preference pair needs both answers")
    chosen, rejected = (parse_record(_answered(record, key)) for key in PREFERENCE)
    if chosen.messages == rejected.messages:
        raise DataError("'chosen' and 'rejected' are the same answer, which teaches nothing")
    alike = _alike(chosen.messages, rejected.messages)
    parting = [messages[alike : alike + 1] for messages in (chosen.messages, rejected.messages)]
    if not alike or not all(part and part[0].role == "assistant" for part in parting):
        raise DataError("'chosen' and 'rejected' part elsewhere than at an answer: both must answer the same question")
    return replace(
        chosen,
        messages=_answers_only(chosen.messages, alike),
        rejected=_answers_only(rejected.messages, alike),
        notes=(*chosen.notes, *(f"the key '{name}' of a pair is not used" for name in _unused(record))),
    )


def _alike(one: Sequence[object], other: Sequence[object]) -> int:
    """How many first items of two sequences are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _answers_only(messages: tuple[Message, ...], prompt: int) -> tuple[Message, ...]:
    """The messages, with those of the prompt as context that is not learnt."""
    context = tuple(replace(m, weight=0) if m.role == "assistant" else m for m in messages[:prompt])
    return context + messages[prompt:]


def _unused(record: Record) -> list[str]:
    """The keys of what stands before an answer, or is one, that another one of the record takes the place of."""
    given = [name for name in CONTEXTS if record.get(name) is not None]
    questions = [name for name in given if name not in ("completion", "output")]
    if isinstance(record["chosen"], str):
        order: tuple[str, ...] = ("instruction", "prompt", "messages", "conversations")
    elif isinstance(record.get("prompt"), list):
        order = ("prompt",)
    elif _brings_its_question(record["chosen"]):
        order = ("prompt",)  # that, as a text, only repeats it
    else:
        order = ("messages", "conversations", "instruction", "prompt")
    used = next((name for name in order if name in questions), None)
    return [name for name in given if name != used and record[name] != record["chosen"]]


def _brings_its_question(turns: Any) -> bool:
    """Whether an answer's turns begin with the user's, or with a system message."""
    first = turns[0] if isinstance(turns, list) and turns else turns
    role = first.get("role", first.get("from")) if isinstance(first, dict) else None
    return role_of(role) in ("user", "system")


def _answered(record: Record, key: str) -> Record:
    """The record as `parse_record` takes it, with the answer under `key` in its place."""
    rest = {name: value for name, value in record.items() if name not in (*PREFERENCE, *CONTEXTS)}
    answer, prompt, instruction = record[key], record.get("prompt"), record.get("instruction")
    turns = [answer] if isinstance(answer, dict) else answer
    if isinstance(turns, list):
        name, context = _context(record, turns)
        return {**rest, name: [*context, *turns]}
    if not isinstance(answer, str):
        raise DataError(f"'{key}' must be a string or a list of messages, not {type_name(answer)}")
    if not answer.strip():
        raise DataError(f"'{key}' is empty: a preference pair needs both answers")
    if instruction is not None:
        return {**rest, "instruction": instruction, "output": answer}
    if isinstance(prompt, str):
        return {**rest, "prompt": prompt, "completion": answer}
    if prompt is None and all(record.get(name) is None for name in ("messages", "conversations")):
        start = _implicit_prompt(*(record[name] for name in PREFERENCE))
        return {**rest, "prompt": answer[:start], "completion": answer[start:]}
    said = {"role": "assistant", "content": answer}
    name, context = _context(record, [said])
    return {**rest, name: [*context, said]}


def _context(record: Record, answer: list[Any]) -> tuple[str, list[Any]]:
    """Where the turns go, and those in front of an answer: none where it brings its own.

    As in TRL, a prompt that is a text beside a whole conversation only repeats its question.
    """
    prompt = record.get("prompt")
    if isinstance(prompt, list):
        return "messages", prompt
    if _brings_its_question(answer):
        return "messages", []
    for name in ("messages", "conversations"):
        if isinstance(record.get(name), list):
            return name, record[name]
    asked = record.get("instruction") or prompt
    return "messages", [] if asked is None else [{"role": "user", "content": asked}]


def _implicit_prompt(chosen: object, rejected: object) -> int:
    """How many characters of two texts are their prompt: what they begin with alike, without a blank at its end."""
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise DataError(f"'chosen' is {type_name(chosen)} and 'rejected' {type_name(rejected)}: write both alike")
    start = _alike(chosen, rejected)
    start -= chosen[:start].endswith(" ")
    if not 0 < start < min(len(chosen), len(rejected)):
        raise DataError("'chosen' and 'rejected' are no two answers to one text: write the prompt under 'prompt'")
    return start
