"""lm-eval's own command line, with the suite's model (`--model weighin`) and checkpoints known to it."""

from lm_eval.__main__ import cli_evaluate

import suite.evaluate.model  # noqa: F401 (importing it registers the model)
from suite import bfloat16

with bfloat16.widened("cpu"):
    cli_evaluate()
