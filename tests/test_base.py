"""What is said of a base that cannot be found or read."""

import re

import pytest
import transformers

from llama_adapter.base import load_config
from llama_adapter.errors import ModelError


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{}", "its config.json has no model_type. Give a folder"),
        ('{"model_type": "foo"}', f"transformers {transformers.__version__} does not know its model_type 'foo'. Give"),
    ],
)
def test_a_base_that_transformers_does_not_know_is_told_in_our_words(tmp_path, config, words):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=re.escape(words)):
        load_config(str(tmp_path))
