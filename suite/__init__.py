"""Weigh-in: every compression method makes the same weight before quality and speed are compared.

Importing this package teaches `AutoModelForCausalLM.from_pretrained` to read compressed checkpoints.
"""

import logging
from importlib import import_module, metadata
from types import ModuleType

from wrapt import when_imported

# transformers imports torchao where it is installed, which warns of kernels for other machines.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


# Only once transformers itself can read models: `weighin --help` waits for neither it nor torch.
@when_imported("transformers.models.auto.modeling_auto")
def _teach(_: ModuleType) -> None:
    import_module("suite.quantizer")


__version__ = metadata.version("weighin")
