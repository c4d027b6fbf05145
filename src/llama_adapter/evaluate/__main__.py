"""`python -m llama_adapter.evaluate`: lm-evaluation-harness's own command line, with our model class known to it."""

from lm_eval.__main__ import cli_evaluate

import llama_adapter.evaluate.harness  # noqa: F401  (registers the class)

cli_evaluate()
