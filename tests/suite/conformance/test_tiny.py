"""The tiny models that checks run on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from suite.conformance import tiny


class Elsewhere:
    """A model on the device "meta", which says where its tokens are."""

    device = torch.device("meta")

    def __call__(self, ids: Tensor, **_: object) -> Any:
        self.logits = ids
        return self

    def generate(self, prompt: Tensor, attention_mask: Tensor, **_: object) -> Tensor:
        assert attention_mask.device == prompt.device
        return prompt


def test_tokens_follow_a_model_to_its_device() -> None:
    model: Any = Elsewhere()
    assert tiny.logits_of(model).device == model.device
    assert tiny.logits_of(model, tiny.token_ids(1, 5)).device == model.device
    assert tiny.greedy(model, use_cache=False).device == model.device
