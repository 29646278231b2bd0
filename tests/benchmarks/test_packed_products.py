"""How long a decoder block of Llama-2-7B's shapes takes, dense and packed; run with `tox run -e benchmarks`.

Weights are random, which no path's speed depends on. Rows are tokens decoded at once, one of each
sequence. One row asks for memory, 64 for arithmetic. The accelerator is used where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from suite import kernels
from suite.bfloat16 import widened
from suite.models.anatomy import anatomy_of
from suite.recipe import Recipe
from suite.specs import Budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = LlamaConfig(
    vocab_size=256,  # hardly any: the block is what is timed
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=1,
    num_attention_heads=32,
    dtype="bfloat16",
)
RECIPES = (
    "dense",
    "rtn-int8",
    "rtn-int4",
    "rtn-int4(symmetric=false)",
    "rtn-int3",
    "nf4",
    "hqq-int4",
    "int8-dynamic",
    "llm-int8",
    "magnitude(pattern=2:4)",
    "magnitude(sparsity=0.5)",
)


@pytest.fixture(scope="module", params=RECIPES)
def model(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        built = LlamaForCausalLM(BLOCK).bfloat16().eval()
    recipe = Recipe.parse(request.param)
    kernels.forget()
    with widened(DEVICE):
        recipe.compress(built, recipe.plan(anatomy_of(built), Budget.parse("none")), None)
        yield built


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_a_block_of_7b_shapes(model: PreTrainedModel, rows: int, benchmark: BenchmarkFixture) -> None:
    benchmark.group = f"a block of Llama-2-7B's shapes, {rows} rows, {DEVICE}"
    ids = torch.randint(BLOCK.vocab_size, (rows, 1), device=DEVICE)

    def step() -> torch.Tensor:
        logits: torch.Tensor = model(ids, use_cache=False).logits
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return logits

    with torch.inference_mode():
        assert benchmark(step).isfinite().all()
    benchmark.extra_info["kernels"] = kernels.chosen()
