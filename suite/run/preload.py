"""What the fork server imports once, so that every worker starts with it."""

import lm_eval.evaluator
import lm_eval.models.huggingface  # noqa: F401

import suite.run.worker  # noqa: F401
