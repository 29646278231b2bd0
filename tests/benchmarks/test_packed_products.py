"""How long decoder blocks of Llama-2-7B's shapes take, dense and packed; run with `tox run -e benchmarks`.

Weights are random, which no path's speed depends on. Rows are tokens decoded at once, one of each
sequence. One row asks for memory, 64 for arithmetic, a prompt for more of it. An accelerator, where
there is one, gets all of the model's blocks, as a replayed CUDA graph: launching kernels takes longer
than they do.

A machine's speed changes within minutes, so the dense blocks run before every timed round. The median
of the rounds' ratios, and their quartiles, are in the `extra_info` of `--benchmark-json FILE`; those of
`dense`, timed against its like, say how far to trust the others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from suite import kernels
from suite.bfloat16 import widened
from suite.models.anatomy import anatomy_of
from suite.recipe import Recipe
from suite.run.environment import device_name
from suite.specs import Budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS = 32 if DEVICE == "cuda" else 1
SHAPES = LlamaConfig(
    vocab_size=256,  # hardly any: the blocks are what is timed
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=BLOCKS,
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
DATA_DECIDES = {"llm-int8"}
"""How much is multiplied hangs on the activations, which a recorded graph cannot follow."""
PROMPT = 512
WARMUP = 3


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return random_model()


@pytest.fixture(scope="module")
def model(recipe: str) -> Iterator[PreTrainedModel]:
    built, parsed = random_model(), Recipe.parse(recipe)
    kernels.forget()
    with widened(DEVICE):
        parsed.compress(built, parsed.plan(anatomy_of(built), Budget.parse("none")), None)
        yield built


def random_model() -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return LlamaForCausalLM(SHAPES).bfloat16().eval()


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_decoding_with_blocks_of_7b_shapes(
    dense: PreTrainedModel, model: PreTrainedModel, recipe: str, rows: int, benchmark: BenchmarkFixture
) -> None:
    benchmark.group = f"{BLOCKS} of Llama-2-7B's blocks, {rows} rows, {device_name(DEVICE)}"
    measure(model, dense, recipe, (rows, 1), 15, benchmark)


def test_reading_a_prompt_with_blocks_of_7b_shapes(
    dense: PreTrainedModel, model: PreTrainedModel, recipe: str, benchmark: BenchmarkFixture
) -> None:
    benchmark.group = f"{BLOCKS} of Llama-2-7B's blocks, a prompt of {PROMPT}, {device_name(DEVICE)}"
    measure(model, dense, recipe, (1, PROMPT), 5, benchmark)


def measure(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    recipe: str,
    shape: tuple[int, int],
    rounds: int,
    benchmark: BenchmarkFixture,
) -> None:
    ids = torch.randint(SHAPES.vocab_size, shape, device=DEVICE)
    replayed = DEVICE == "cuda" and recipe not in DATA_DECIDES
    seconds: list[float] = []
    with torch.inference_mode():
        packed, beside = runner(model, ids, replayed), runner(dense, ids, DEVICE == "cuda")

        def dense_first() -> None:
            start = time.perf_counter()
            beside()
            seconds.append(time.perf_counter() - start)

        logits = benchmark.pedantic(packed, setup=dense_first, rounds=rounds, warmup_rounds=WARMUP)
        assert logits.isfinite().all()
    own = benchmark.stats.stats.data
    ratios = [plain / short for plain, short in zip(seconds[WARMUP : WARMUP + rounds], own, strict=True)]
    benchmark.extra_info["ratio to dense"] = statistics.median(ratios)
    benchmark.extra_info["its quartiles"] = statistics.quantiles(ratios)[::2]
    benchmark.extra_info["kernels"] = kernels.chosen()
    benchmark.extra_info["replayed graph"] = replayed


def runner(model: PreTrainedModel, ids: Tensor, replayed: bool) -> Callable[[], Tensor]:
    """A call that returns when the model has read the tokens, ids of shape (sequences, tokens)."""

    def step() -> Tensor:
        logits: Tensor = model(ids, use_cache=False, logits_to_keep=1).logits
        return logits

    run = graph_of(step) if replayed else step

    def finished() -> Tensor:
        logits = run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return logits

    return finished


def graph_of(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Replays what `step` does on the GPU; it runs a few times before, as paths are chosen then."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay
