"""The suite's lm-eval model: the numbers of lm-eval's `hf` model, with every token computed once.

Importing this module registers it, so `lm_eval`'s own tools know it as `--model weighin`
(`python -m suite.evaluate` is lm-eval's command line with this import done).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from suite.errors import WeighinError
from suite.evaluate.packing import Layout, Request, Tree, build_trees, layout
from suite.rebuilding import rebuilt_once

logger = logging.getLogger(__name__)

# Measured on two cores: larger batches leave the caches. An accelerator wants them large.
TOKENS_PER_BATCH = 512
TOKENS_PER_BATCH_ACCELERATOR = 16384
_GENERATION_TOKENS = 8192  # a decoding step costs the same for one row and for several
_LARGEST_TREE = 512
# A widened head is widened anew for each product, which costs as much as a dozen rows of it (measured).
_LOGITS_AT_ONCE = 1 << 25
_LOGITS_IN_CACHE = 1 << 22
_ROWS_OF_ROLLING = 1 << 20

Scored = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("weighin")
class WeighinLM(HFLM):  # type: ignore[misc]
    """Any causal language model: a checkpoint, a `PreTrainedModel`, or an `nn.Module`.

    A module that is no `PreTrainedModel` takes token ids (batch × length) and returns logits
    (batch × length × vocabulary), bare or as `.logits`; it needs `tokenizer` and `max_length`.

    Requests with a common beginning share its computation under a tree mask, the vocabulary head
    runs only where a token is scored, and log-softmax is taken in float32. A model that does not
    give the same logits that way (tried once, on a few tokens) gets plain rows instead.
    `tokens_per_batch` bounds a padded batch; it is halved and retried when memory runs out, and
    starts anew with every task. Results depend on it by rounding alone: below 1e-3 nats per
    continuation in float32; in bfloat16 by what its eight bits of precision give.
    """

    def __init__(
        self,
        pretrained: str | nn.Module,
        *,
        tokens_per_batch: int | str | None = None,
        max_length: int | None = None,
        **arguments: Any,
    ):
        if isinstance(pretrained, nn.Module) and not isinstance(pretrained, PreTrainedModel):
            if max_length is None:
                raise WeighinError("a plain module needs max_length=, the longest input it takes.")
            pretrained, arguments["backend"] = _Wrapped(pretrained), "causal"
        super().__init__(pretrained=pretrained, max_length=max_length, **arguments)
        self.tokens_per_batch = int(tokens_per_batch or usual_tokens_per_batch(self.device))
        self._head: nn.Module | None = None
        self._head, self._packs = self._abilities()

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        cut = [
            Request(tuple((context + continuation)[-(self.max_length + 1) :]), len(continuation))
            for _, context, continuation in requests
        ]
        for request in cut:
            if not 0 < request.scored < len(request.tokens):
                raise WeighinError(
                    f"a continuation of {request.scored} tokens cannot be scored by a model that takes"
                    f" {self.max_length}."
                )
        largest = _LARGEST_TREE if self._packs else 0
        waiting = build_trees(cut, largest, getattr(self.config, "sliding_window", None))
        answers: dict[int, tuple[float, bool]] = {}
        tokens = self.tokens_per_batch
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Scoring continuations")
        with bar, rebuilt_once():
            while waiting:
                batch = waiting[: max(1, tokens // len(waiting[0]))]
                try:
                    answers |= self._score(batch, cut)
                except Exception as error:
                    tokens = self._smaller_budget(error, len(batch), len(batch[0]))
                    continue
                waiting = waiting[len(batch) :]
                bar.update(sum(len(tree.reads) for tree in batch))
        results = [answers[index] for index in range(len(requests))]
        for (key, _, _), answer in zip(requests, results, strict=True):
            if key is not None:  # rolling windows have none; their sum is cached by the caller
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return results

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        self.batch_size_per_gpu = _ROWS_OF_ROLLING  # all windows at once: batches are filled below
        rolled: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        return rolled

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """lm-eval's own generation, in batches filled to the token budget and sorted by length."""
        lengths = [
            len(self.tok_encode(request.args[0]))
            + int(request.args[1].get("max_gen_toks", self.max_gen_toks))
            for request in requests
        ]
        waiting = sorted(range(len(requests)), key=lambda i: (str(requests[i].args[1]), -lengths[i]))
        texts: dict[int, str] = {}
        tokens = max(self.tokens_per_batch, _GENERATION_TOKENS)
        while waiting:
            # A plain module knows no padding mask, so its prompts go one by one.
            rows = 1 if isinstance(self.model, _Wrapped) else max(1, tokens // lengths[waiting[0]])
            chosen = waiting[:rows]
            rows = len(chosen)
            self.batch_size_per_gpu = rows
            try:
                generated = super().generate_until([requests[i] for i in chosen], disable_tqdm=True)
            except Exception as error:
                tokens = self._smaller_budget(error, rows, lengths[waiting[0]])
                continue
            texts |= dict(zip(chosen, generated, strict=True))
            waiting = waiting[len(chosen) :]
        return [texts[index] for index in range(len(requests))]

    @staticmethod
    def _smaller_budget(error: Exception, rows: int, length: int) -> int:
        """Half the tokens of a batch that did not fit; any other error goes on."""
        if rows == 1 or not should_reduce_batch_size(error):
            raise error
        clear_device_cache()
        logger.warning("out of memory with %d rows of %d tokens: going on with half of it", rows, length)
        return rows // 2 * length

    @torch.inference_mode()
    def _score(self, batch: Sequence[Tree], requests: Sequence[Request]) -> dict[int, tuple[float, bool]]:
        """Summed log-probability and whether greedy, by request index."""
        rows: list[int] = []
        nodes: list[int] = []
        targets: list[int] = []
        owners: list[int] = []
        for row, tree in enumerate(batch):
            for index, read in tree.reads:
                rows += [row] * len(read)
                nodes += read
                targets += requests[index].tokens[len(requests[index].tokens) - len(read) :]
                owners += [index] * len(read)
        table = layout(batch)
        length = table.ids.shape[1]
        flat, where = torch.unique(torch.tensor(rows) * length + torch.tensor(nodes), return_inverse=True)
        target = torch.tensor(targets)
        log_probabilities = torch.empty(len(targets), dtype=torch.float64)
        greedy = torch.empty(len(targets), dtype=torch.bool)
        hidden = self._hidden(table).flatten(0, 1)
        start = 0
        for logits in self._logits(hidden[flat.to(hidden.device)]):
            reads = (where >= start) & (where < start + len(logits))
            at = (where[reads] - start).to(logits.device)
            start += len(logits)
            wanted = target[reads].to(logits.device)
            scores = logits.log_softmax(-1)[at, wanted]
            log_probabilities[reads] = scores.double().cpu()
            greedy[reads] = (logits.argmax(-1)[at] == wanted).cpu()
        answers: dict[int, tuple[float, bool]] = {}
        ends = [i for i in range(len(owners)) if i + 1 == len(owners) or owners[i + 1] != owners[i]]
        start = 0
        for end in ends:
            span = slice(start, end + 1)
            answers[owners[end]] = (float(log_probabilities[span].sum()), bool(greedy[span].all()))
            start = end + 1
        return answers

    def _hidden(self, table: Layout) -> Tensor:
        """Final hidden states, or logits when the head cannot be run apart (rows × length × width)."""
        arguments: dict[str, Tensor] = {}
        if table.mask is not None:
            mask = torch.zeros(table.mask.shape, dtype=self.model.dtype)
            mask.masked_fill_(~table.mask, torch.finfo(mask.dtype).min)
            arguments = {
                "attention_mask": mask.to(self.device),
                "position_ids": table.positions.to(self.device),
            }
        ids = table.ids.to(self.device)
        if self._head is None:
            return _logits_of(self.model(ids, **arguments, use_cache=False))
        states: Tensor = self.model.base_model(ids, **arguments, use_cache=False).last_hidden_state
        return states

    def _logits(self, hidden: Tensor) -> Iterator[Tensor]:
        """Logits in float32 for chosen positions, some at a time (positions × vocabulary)."""
        vocabulary = len(self.tokenizer)
        for part in hidden.split(max(1, _LOGITS_AT_ONCE // vocabulary)):
            logits = part if self._head is None else self._head(part)
            for some in logits.split(max(1, _LOGITS_IN_CACHE // vocabulary)):
                yield some.float()

    @torch.inference_mode()
    def _abilities(self) -> tuple[nn.Module | None, bool]:
        """The head, when it can be run apart, and whether tree masks give the plain logits."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.tokenizer.vocab_size, (15,), generator=generator).tolist()
        # One context of six tokens with two continuations, each on its own and both packed.
        pair = [Request(tuple(tokens[:10]), 4), Request(tuple(tokens[:6] + tokens[10:]), 5)]
        apart = build_trees(pair, 0)
        plain = self._probe(apart)
        # Rounding stays below; a token that attends where it must not moves logits far more.
        tolerance = (1e-3 if self.model.dtype == torch.float32 else 0.05) * plain.norm()
        self._head = None if isinstance(self.model, _Wrapped) else self.model.get_output_embeddings()
        if self._head is not None and (self._probe(apart) - plain).norm() > tolerance:
            self._head = None
        try:
            packs = bool((self._probe(build_trees(pair, _LARGEST_TREE)) - plain).norm() <= tolerance)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            logger.warning("contexts are not shared: this model takes no tree mask (%s)", error)
            return self._head, False
        if not packs:
            logger.warning("contexts are not shared: this model gives other logits under a tree mask")
        return self._head, packs

    def _probe(self, trees: Sequence[Tree]) -> Tensor:
        """Logits at all scored positions of a few small trees, request by request."""
        states = [
            (index, self._hidden(layout([tree]))[0, read]) for tree in trees for index, read in tree.reads
        ]
        chosen = torch.cat([state for _, state in sorted(states, key=lambda pair: pair[0])])
        return torch.cat(list(self._logits(chosen)))


def usual_tokens_per_batch(device: torch.device) -> int:
    """Tokens in a padded batch when nobody chooses."""
    return TOKENS_PER_BATCH if device.type == "cpu" else TOKENS_PER_BATCH_ACCELERATOR


def _logits_of(output: Any) -> Tensor:
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


class _Wrapped(PreTrainedModel, GenerationMixin):
    """A plain module behind the interface that lm-eval and `generate` expect; no cache."""

    config_class = PretrainedConfig

    def __init__(self, module: nn.Module):
        super().__init__(PretrainedConfig())
        self.module = module

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=_logits_of(self.module(input_ids)))

    def prepare_inputs_for_generation(self, input_ids: Any, *_: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {"input_ids": input_ids}

    def generate(self, *positional: Any, **arguments: Any) -> Any:
        parent: Any = super()
        return parent.generate(*positional, **(arguments | {"use_cache": False}))
