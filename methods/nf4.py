"""NF4: the 16 values of a grid are quantiles of the normal distribution."""

from __future__ import annotations

from typing import Any

from methods.quantization import Quantizer, QuantizerConfig
from suite.method import register


@register
class NormalFloat4(Quantizer[QuantizerConfig]):
    """Every weight to the nearest of 16 normal quantiles times the largest size in its group; no data.

    Groups of 64 columns unless `group` is given. Scales are float16, not quantized a second time; 8-bit
    embeddings are on a uniform symmetric grid.
    """

    name = "nf4"
    source = "Dettmers et al., QLoRA (arXiv 2305.14314, section 3)"
    Config = QuantizerConfig
    bits = 4

    def format(self, bits: int, columns: int) -> dict[str, Any]:
        stored = super().format(bits, columns)
        return stored | {"grid": "normal-float"} if bits == 4 else stored
