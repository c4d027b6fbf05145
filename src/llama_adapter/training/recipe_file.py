"""A recipe's file, read."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from llama_adapter.errors import ConfigError
from llama_adapter.settings import BUNDLED, BUNDLED_FOLDER


def read_settings(path: str) -> dict[str, Any]:
    """What the file of one recipe says.

    Raises:
        ConfigError: as `read_yaml`; or it lists several.
    """
    values = read_yaml(path)
    if "runs" in values:
        raise ConfigError(
            f"{path} lists several recipes under 'runs': train them together with llama-adapter train-many "
            f"{shlex.quote(path)}, or give one of them a file of its own."
        )
    return values


def read_yaml(path: str) -> dict[str, Any]:
    """What a recipe's file says, or the one called 'bundled'.

    Raises:
        ConfigError: the file is missing or is no YAML mapping.
    """
    import yaml

    file = BUNDLED_FOLDER / "recipe.yaml" if path == BUNDLED else Path(os.path.expanduser(path))
    try:
        text = file.read_text(encoding="utf-8")
        loaded = yaml.safe_load(text)
        twice = _twice(yaml.compose(text, yaml.SafeLoader))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        hint = f", such as {file / 'recipe.yaml'}" if os.path.isfile(file / "recipe.yaml") else ""
        raise ConfigError(f"Recipe {path} cannot be read ({reason}): give the path of a YAML file{hint}.") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # of escapes that are no character
        _check_no_data(path)
        raise ConfigError(f"Recipe {path} is not YAML: {_fault(error)}.") from None
    if not isinstance(loaded, dict | None):
        _check_no_data(path)
        raise ConfigError(f"Recipe {path} holds a {type(loaded).__name__}, not 'key: value' lines.")
    if twice is not None:
        raise ConfigError(
            f"Recipe {path} has '{twice.value}' twice in one place, the second in line {twice.start_mark.line + 1}: "
            "keep one of them."
        )
    return loaded or {}


def _fault(error: Exception) -> str:
    """Where YAML stops being that, and what is mostly meant."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    problem = getattr(error, "problem", "") or "nothing can stand here"
    if "mapping values are not allowed" in problem:
        problem = "a second ': ' in a line, or a line that is indented; put a value with ': ' in quotes"
    elif "\\t" in problem:
        problem = "a tab; indent with blanks"
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _twice(root: Any) -> Any:
    """The first key that stands twice in one mapping, of which YAML would keep the last in silence; None without."""
    left, seen = [root], set()
    while left:
        node = left.pop()
        if id(node) in seen or not isinstance(getattr(node, "value", None), list):
            continue
        seen.add(id(node))  # an alias is the node that it stands for
        pairs = [item for item in node.value if isinstance(item, tuple)]
        keys: set[Any] = set()
        for key, _ in pairs:
            if isinstance(key.value, str) and (key.tag, key.value) in keys:
                return key
            keys.add((key.tag, key.value if isinstance(key.value, str) else id(key)))
        left += [value for _, value in pairs] if pairs else node.value
    return None


def _check_no_data(path: str) -> None:
    from llama_adapter.data.kinds import is_data_file

    if is_data_file(path):
        raise ConfigError(
            f"{path} holds data, not a recipe: pass it as --data {path}, or name it in a recipe's file under 'data'."
        )
