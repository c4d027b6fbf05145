"""A recipe's file, read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llama_adapter.errors import ConfigError
from llama_adapter.settings import BUNDLED


def read_yaml(path: str) -> dict[str, Any]:
    """What a recipe's file says, or the one called 'bundled'.

    Raises:
        ConfigError: the file is missing or is no YAML mapping.
    """
    import yaml

    file = Path(__file__).parents[1] / "bundled" / "recipe.yaml" if path == BUNDLED else Path(os.path.expanduser(path))
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        hint = f", such as {file / 'recipe.yaml'}" if os.path.isfile(file / "recipe.yaml") else ""
        raise ConfigError(f"Recipe {path} cannot be read ({reason}): give the path of a YAML file{hint}.") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # of escapes that are no character
        _check_no_data(path)
        raise ConfigError(f"Recipe {path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(loaded, dict | None):
        _check_no_data(path)
        raise ConfigError(f"Recipe {path} holds a {type(loaded).__name__}, not 'key: value' lines.")
    return loaded or {}


def _check_no_data(path: str) -> None:
    from llama_adapter.data.kinds import is_data_file

    if is_data_file(path):
        raise ConfigError(f"{path} holds data, not a recipe: pass it as --data {path}.")
