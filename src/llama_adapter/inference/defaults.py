"""The base's generation_config.json: the one place that says what becomes of its settings.

The rule: `eos_token_id` is honoured, and nothing else. What else the file says (penalties, bans, forced tokens, beams,
stop strings, limits of length and time, sampling, caches, ...) was chosen by the base's publisher for another way of
asking. Here temperature, top-p and length are what the flags say, temperature 0 is the likeliest token and nothing
else, and a base is measured as it is. Settings that would have changed the tokens are named once.
"""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig
from transformers.utils import cached_file

from llama_adapter.base import pretrained
from llama_adapter.core.families import text_config
from llama_adapter.errors import ModelError
from llama_adapter.settings import shown

log = logging.getLogger(__name__)

FILE = "generation_config.json"
EXPECTED = {
    "eos_token_id", "bos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "max_length",
    "max_new_tokens", "transformers_version",
}  # fmt: skip
"""What nearly every such file has: our flags say the same things, so leaving them out is no news."""
NEUTRAL: tuple[Any, ...] = (None, False, 0, 1, "", [], {})
"""Values that switch a setting off, or cannot change a token."""


def base_defaults(model: str, config: PretrainedConfig) -> GenerationConfig:
    """What of a base's generation_config.json is followed.

    Args:
        model: folder, hub name or 'bundled'.
        config: its configuration, which says the end tokens where that file does not.

    Raises:
        ModelError: the file is no JSON object, or its end tokens are no token ids.
    """
    values = _read(model)
    eos = values.get("eos_token_id")
    if eos is None:
        eos = getattr(text_config(config), "eos_token_id", None)
    ids = eos if isinstance(eos, list | tuple) else [] if eos is None else [eos]
    if not all(type(token) is int for token in ids):
        raise ModelError(f"eos_token_id of '{model}' is {shown(eos)}: its {FILE} must have a token id, or a list.")
    others = [key for key in sorted(values.keys() - EXPECTED) if key[:1] != "_" and values[key] not in NEUTRAL]
    if others:
        names = ", ".join(others[:8]) + ("" if len(others) <= 8 else f" and {len(others) - 8} more")
        log.info("of the base's %s only the end tokens are followed, not: %s", FILE, names)
    return GenerationConfig(eos_token_id=list(ids) or None)


def _read(model: str) -> dict[str, Any]:
    """The file's values; none where the base has no such file, as GGUF files have none."""
    place, gguf = pretrained(model)
    if gguf:
        return {}
    path: Path | str | None = Path(place, FILE)
    if not Path(place).is_dir():
        try:
            path = cached_file(place, FILE)
        except OSError:  # also where there is no such file
            path = None
    if path is None or not Path(path).exists():
        return {}
    try:
        values = json.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{FILE} of '{model}' cannot be read ({reason}): restore it, or delete it.") from None
    if not isinstance(values, dict):
        raise ModelError(f"{FILE} of '{model}' holds no JSON object: restore it, or delete it.")
    return values
