"""What every compression method must hold: each check is a function with a name and a sentence.

A check gets one situation (a plan, a compression, a second compression, a checkpoint reloaded in a
fresh process) on one tiny model, returns a short detail for the report, raises `Exempt` where it has
nothing to look at, and raises anything else where the method fails; the message names the offence.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from suite.conformance import tiny
from suite.conformance.cases import SEED, Attempt, Exempt, Planning, Reloaded, Scope, Situation, Twins
from suite.errors import CellFailed, ImpossibleBudget
from suite.measure.ledger import Entry, total_disk
from suite.measure.speed import synchronize
from suite.models import load
from suite.models.anatomy import Anatomy, anatomy_of
from suite.packed_layers import TiedHead
from suite.recipe import Recipe
from suite.run import audit
from suite.seal import Trespass
from suite.specs import Budget

SLOWEST = 10.0


@dataclass(frozen=True)
class Check:
    """One thing a method must hold."""

    name: str
    sentence: str
    situation: Situation
    scopes: tuple[Scope, ...]
    run: Callable[[Any], str]


CHECKS: dict[str, Check] = {}


def check(
    name: str, situation: Situation, *scopes: Scope
) -> Callable[[Callable[[Any], str]], Callable[[Any], str]]:
    """Decorator: add a check; its docstring's first line is its sentence."""

    def register(function: Callable[[Any], str]) -> Callable[[Any], str]:
        sentence = (function.__doc__ or "").strip().split("\n")[0]
        CHECKS[name] = Check(name, sentence, situation, scopes or ("main",), function)
        return function

    return register


@check("runs on every family", "compress", "main", "every", "full")
def runs(attempt: Attempt) -> str:
    """Planning and compressing raise nothing on any of the tiny models."""
    if attempt.error is not None and not isinstance(attempt.error, Trespass):
        raise attempt.error
    return ""


@check("evaluation items untouched", "compress", "main", "every", "full", "stack")
def items_untouched(attempt: Attempt) -> str:
    """While it plans and compresses, the method opens no evaluation data and no network connection."""
    if isinstance(attempt.error, Trespass):
        raise attempt.error
    return ""


@check("budget met", "reload", "main", "every")
def budget_met(reloaded: Reloaded) -> str:
    """The reloaded checkpoint is at or under every target."""
    details = []
    for budget in (reloaded.case.budget, *reloaded.case.alike):
        if budget.metric == "none":
            raise Exempt("acts on no budget")
        audit.within_budget(budget, reloaded.dense, reloaded.entries)
        size = anatomy_of(reloaded.model).size(budget.metric) / reloaded.dense.size(budget.metric)
        details.append(f"{budget.metric} {budget.value:g} → {size:.4f}")
    return ", ".join(details)


@check("counts equal the ledger", "reload", "main", "every")
def counts_equal(reloaded: Reloaded) -> str:
    """Planned parameters and bytes are those of the reloaded checkpoint, and its bytes those of the files."""
    audit.checkpoint_bytes(reloaded.entries, reloaded.folder)
    audit.as_planned(reloaded.planned, reloaded.entries)
    return ""


@check("counted honestly", "reload")
def counted_honestly(reloaded: Reloaded) -> str:
    """No tensor stands for more weights than it is counted as."""
    audit.counted_honestly(reloaded.model, reloaded.dense.dtype)
    return ""


@check("impossible budgets refused", "plan")
def impossible_refused(planning: Planning) -> str:
    """A budget out of reach raises ImpossibleBudget with a size that can then be planned."""
    if not planning.metrics:
        raise Exempt("acts on no budget")
    details = []
    for metric in planning.metrics:
        try:
            planning.recipe.plan(planning.dense, Budget(metric=metric, value=2.0), SEED)
        except ImpossibleBudget as error:
            smallest = error.smallest
        else:
            raise CellFailed(f"a budget of 2 {metric} was planned for; raise ImpossibleBudget")
        try:
            plan = planning.recipe.plan(planning.dense, Budget(metric=metric, value=float(smallest)), SEED)
        except ImpossibleBudget as error:
            raise CellFailed(
                f"{smallest:,} {metric} is called the smallest size, but asked for it refuses again: {error}"
            ) from None
        if plan.final.size(metric) > smallest:
            raise CellFailed(f"{smallest:,} {metric} is called the smallest size, but cannot be met")
        details.append(f"smallest {metric} {smallest / planning.dense.size(metric):.3f}")
    return ", ".join(details)


@check("plans are repeatable", "plan")
def plans_repeatable(planning: Planning) -> str:
    """The same shapes, budget and seed give the same plan."""
    budgets = [Budget(metric=metric, value=1.0) for metric in planning.metrics] or [Budget(metric="none")]
    for budget in budgets:
        first, second = (planning.recipe.plan(planning.dense, budget, SEED).stages for _ in range(2))
        if first != second:
            raise CellFailed(f"two plans for {budget} under the same seed differ")
    return ""


@check("whole size is enough", "reload", "full")
def whole_size(reloaded: Reloaded) -> str:
    """At the dense model's own size, planning succeeds, and a plan that changes no shape changes no logit."""
    budget = reloaded.case.budget
    audit.within_budget(budget, reloaded.dense, reloaded.entries)
    if not _same_shapes(reloaded.dense, reloaded.entries):
        return "compresses further than asked"
    if "training" in Recipe.parse(reloaded.case.recipe).needs:
        return "trained on"
    dense = load.load_model(reloaded.source, str(reloaded.model.device))
    gap = (tiny.logits_of(dense) - tiny.logits_of(reloaded.model)).abs().max()
    if gap > 1e-4 * tiny.logits_of(dense).abs().max():
        raise CellFailed(
            f"asked for the whole size it keeps every shape, but the logits differ by {float(gap):.3g}"
        )
    return "dense logits"


@check("deterministic", "again")
def deterministic(twins: Twins) -> str:
    """Two compressions under one seed, in two processes and other random states, write the same bytes."""
    for file in sorted(twins.first.iterdir()):
        other = twins.second / file.name
        if not other.is_file() or _digest(file) != _digest(other):
            raise CellFailed(f"two compressions under the same seed wrote different {file.name}")
    return ""


@check("reloads in a fresh process", "reload", "main", "every")
def reloads(reloaded: Reloaded) -> str:
    """A fresh process gives the compressed model's logits bit for bit."""
    audit.same_logits(reloaded.model, reloaded.probe)
    return ""


@check("finite", "reload", "main", "every", "full")
def finite(reloaded: Reloaded) -> str:
    """No tensor holds NaN or infinity, in rare rows either."""
    audit.finite_tensors(reloaded.model)
    return ""


@check("ties kept", "reload")
def ties_kept(reloaded: Reloaded) -> str:
    """Embedding and head that the dense model shares are still shared, or counted twice in the plan."""
    layout = reloaded.dense.layout
    if not reloaded.dense.tied:
        raise Exempt("the dense model shares nothing")
    embedding: Any = reloaded.model.get_input_embeddings()
    head: Any = reloaded.model.get_output_embeddings() or reloaded.model.get_submodule(layout.head)
    if isinstance(head, TiedHead):
        shared = head.source == layout.embedding
    else:
        shared = getattr(head, "weight", None) is getattr(embedding, "weight", head)
    if shared:
        return ""
    if any(entry.path.startswith(layout.head) and entry.params for entry in reloaded.planned.entries):
        return "untied, and counted so"
    raise CellFailed("embedding and head are no longer tied after the reload, and the plan counts them once")


@check("grouped-query attention", "reload")
def grouped_queries(reloaded: Reloaded) -> str:
    """Where queries share key-value heads, the cache holds as many as the config says."""
    if reloaded.dense.heads == reloaded.dense.key_value_heads:
        raise Exempt("every query head has keys of its own")
    with torch.inference_mode():
        output: Any = reloaded.model(_ids(reloaded), use_cache=True)
    config: Any = reloaded.model.config
    for index, layer in enumerate(output.past_key_values.layers):
        if layer.keys.shape[1] != config.num_key_value_heads:
            raise CellFailed(
                f"block {index} caches {layer.keys.shape[1]} key-value heads,"
                f" the config says {config.num_key_value_heads}"
            )
    return ""


@check("biases kept", "reload")
def biases_kept(reloaded: Reloaded) -> str:
    """A linear that had a bias still has one, in whatever form."""
    had = {line.role for line in reloaded.dense.linears if line.bias}
    if not had:
        raise Exempt("the dense model has no biases")
    found: dict[tuple[int, str], bool] = {}
    for line in anatomy_of(reloaded.model).linears:
        key = (line.block, line.role)
        found[key] = found.get(key, False) or line.bias
    lost = [f"{role} of block {block}" for (block, role), bias in found.items() if role in had and not bias]
    if lost:
        raise CellFailed(f"the bias is lost in {lost[0]}" + (f" and {len(lost) - 1} more" * (len(lost) > 1)))
    return ""


@check("cache equals no cache", "reload")
def cache_equals_no_cache(reloaded: Reloaded) -> str:
    """Greedy text is the same with a key-value cache and without, and logits agree token by token."""
    model, ids = reloaded.model, _ids(reloaded)
    with torch.inference_mode():
        whole: Any = model(ids, use_cache=False)
        cache, steps = None, []
        for position in range(ids.shape[1]):
            output: Any = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    gap = (torch.cat(steps, 1) - whole.logits).abs().max()
    if not gap <= 1e-3 * whole.logits.abs().max():
        raise CellFailed(f"with a key-value cache the logits differ by up to {float(gap):.3g}")
    if not torch.equal(tiny.greedy(model, use_cache=True), tiny.greedy(model, use_cache=False)):
        raise CellFailed("greedy generation with a key-value cache gives other tokens than without")
    return ""


@check("no state between calls", "reload")
def stateless(reloaded: Reloaded) -> str:
    """The same input gives the same logits after other inputs."""
    first = tiny.logits_of(reloaded.model)
    tiny.logits_of(reloaded.model, tiny.token_ids(1, 5, seed=9))
    gap = (first - tiny.logits_of(reloaded.model)).abs().max()
    if gap > 0:
        raise CellFailed(f"a module keeps state between calls: the same input's logits moved by {gap:.3g}")
    return ""


@check("resident memory", "reload")
def resident_memory(reloaded: Reloaded) -> str:
    """After use, no memory is held beyond the ledger: no hidden dense copies."""
    dense = sum(entry.resident - entry.disk for entry in reloaded.dense.entries)
    tolerance = max(2048, total_disk(reloaded.entries) // 100)
    audit.no_hidden_memory(reloaded.model, reloaded.entries, dense, tolerance)
    return ""


@check("trains", "reload")
def trains(reloaded: Reloaded) -> str:
    """A training step has a finite loss, and a finite gradient reaches every trainable parameter."""
    parameters = [(n, p) for n, p in reloaded.model.named_parameters() if p.requires_grad]
    if not parameters:
        raise Exempt("no trainable parameters")
    ids, model = _ids(reloaded), reloaded.model
    model.train()
    try:
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        if not torch.isfinite(loss):
            raise CellFailed("the training loss is not finite")
        unreached = [n for n, p in parameters if p.grad is None or not torch.isfinite(p.grad).all()]
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()
    if unreached:
        raise CellFailed(f"no finite gradient reaches {unreached[0]} ({len(unreached)} such parameters)")
    return ""


@check("config unchanged", "reload")
def config_unchanged(reloaded: Reloaded) -> str:
    """Only fields that a change of structure needs differ from the dense config."""
    audit.same_config(load.load_config(reloaded.source), reloaded.source.location, reloaded.model)
    return ""


@check("tokenizer unchanged", "reload")
def tokenizer_unchanged(reloaded: Reloaded) -> str:
    """The tokenizer beside the checkpoint is the dense model's."""
    dense, saved = (load.load_tokenizer(str(f)) for f in (reloaded.source.location, reloaded.folder))
    audit.same_tokenizer(dense, saved)
    return ""


@check("stacks under int4", "reload", "stack")
def stacks(reloaded: Reloaded) -> str:
    """With rtn-int4 after it, plan, files, ledger and the reload still agree."""
    audit.checkpoint_bytes(reloaded.entries, reloaded.folder)
    audit.as_planned(reloaded.planned, reloaded.entries)
    audit.finite_tensors(reloaded.model)
    audit.same_logits(reloaded.model, reloaded.probe)
    return ""


@check("not silently slow", "reload")
def not_slow(reloaded: Reloaded) -> str:
    """A forward takes no more than ten times the dense model's; only gross offences fail.

    The shortest of a few forwards is taken: what else the machine does only ever adds time.
    """
    dense = load.load_model(reloaded.source, str(reloaded.model.device))
    ids = tiny.token_ids(4, 64)
    seconds: dict[PreTrainedModel, list[float]] = {dense: [], reloaded.model: []}
    for _ in range(7):
        for model, taken in seconds.items():
            start = time.perf_counter()
            tiny.logits_of(model, ids)
            synchronize(model)
            taken.append(time.perf_counter() - start)
    ratio = min(seconds[reloaded.model]) / min(seconds[dense])
    if ratio > SLOWEST:
        raise CellFailed(f"a forward takes {ratio:.0f} × the dense model's time")
    return f"{ratio:.2g} ×"


def _ids(reloaded: Reloaded) -> torch.Tensor:
    return tiny.token_ids().to(reloaded.model.device)


def _same_shapes(dense: Anatomy, entries: tuple[Entry, ...]) -> bool:
    return {(e.path, e.type, e.params) for e in dense.entries} == {
        (e.path, e.type, e.params) for e in entries
    }


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
