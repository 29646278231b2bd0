"""Weigh-in: every compression method makes the same weight before quality and speed are compared.

Importing this package teaches `AutoModelForCausalLM.from_pretrained` to read compressed checkpoints.
"""

import logging
from importlib import metadata

# transformers imports torchao where it is installed, which warns of kernels for other machines.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

from suite import checkpoint as checkpoint  # noqa: E402

__version__ = metadata.version("weighin")
