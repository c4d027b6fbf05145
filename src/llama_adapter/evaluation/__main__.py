"""`python -m llama_adapter.evaluation`: lm-evaluation-harness's own command line, with our model class known to it."""

from lm_eval.__main__ import cli_evaluate

import llama_adapter.evaluation.lm_eval  # noqa: F401  (registers the class)

cli_evaluate()
