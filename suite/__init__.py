"""Weigh-in: every compression method makes the same weight before quality and speed are compared.

Importing this package teaches `AutoModelForCausalLM.from_pretrained` to read compressed checkpoints.
"""

from importlib import metadata

from suite import checkpoint as checkpoint

__version__ = metadata.version("weighin")
