"""Methods that do something beside their work, on purpose or by mistake: each must be caught.

A plug-in like any other: every module type is registered here, so that checkpoints reload.
"""

import contextlib
import gc
import time

import torch
from transformers import PreTrainedTokenizerBase

from suite import data
from suite.errors import ImpossibleBudget
from suite.evaluate import harness
from suite.layers import LowRankLinear, ModuleSpec, module_type, replace
from suite.linalg import truncated_svd
from suite.method import Method, MethodConfig, Plan, largest_fitting, largest_share, register
from suite.models.anatomy import drop_blocks
from suite.packed_layers import PackedEmbedding


class DropLast(Method):
    """Removes blocks right before the last one. Honest; the base of what misbehaves beside that."""

    family, source = "cheat", "a test"
    Config = MethodConfig

    def plan(self, anatomy, target, seed):
        last = anatomy.n_blocks - 1
        plans = [Plan(drop=tuple(range(last - k, last))) for k in range(last)]
        return plans[0] if target is None else largest_fitting(plans, anatomy, target)

    def compress(self, model, plan, calibration):
        drop_blocks(model, plan.drop)
        self.cheat(model)

    def cheat(self, model):
        """What goes on beside the work."""


@module_type("cheat_detached")
class Detached(LowRankLinear):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class HalfRank(Method):
    """A truncated SVD, the base of what goes wrong in low-rank methods."""

    family, source = "cheat", "a test"
    Config = MethodConfig
    kind, keeps_bias = LowRankLinear, True

    def plan(self, anatomy, target, seed):
        def build(share):
            return Plan(
                modules={
                    line.path: ModuleSpec(
                        type=self.kind.type_name,
                        arguments={
                            "in_features": line.in_features,
                            "out_features": line.out_features,
                            "rank": max(1, int(share * min(line.in_features, line.out_features) / 2)),
                            "bias": line.bias and self.keeps_bias,
                        },
                    )
                    for line in anatomy.dense_linears(self.name)
                }
            )

        return build(1.0) if target is None else largest_share(build, anatomy, target)[1]

    def compress(self, model, plan, calibration):
        for path, spec in plan.modules.items():
            linear = model.get_submodule(path)
            if not self.keeps_bias:
                linear.bias = None
            left, right = truncated_svd(linear.weight, spec.arguments["rank"])
            replace(model, path, self.kind.from_factors(left, right, linear))


@register
class NoGradient(HalfRank):
    name, kind = "no-gradient", Detached


@register
class LosesBiases(HalfRank):
    name, keeps_bias = "loses-biases", False


# Planning one thing and doing another


@register
class ReturnsDense(DropLast):
    name = "returns-dense"

    def compress(self, model, plan, calibration):
        pass


@register
class PlansTooMuch(DropLast):
    name = "plans-too-much"

    def compress(self, model, plan, calibration):
        drop_blocks(model, [*plan.drop, 0])


@register
class WrongSmallest(DropLast):
    name = "wrong-smallest"

    def plan(self, anatomy, target, seed):
        try:
            return super().plan(anatomy, target, seed)
        except ImpossibleBudget:
            raise ImpossibleBudget(anatomy.size(target.metric) // 10) from None


@register
class FicklePlan(DropLast):
    name = "fickle-plan"

    def plan(self, anatomy, target, seed):
        plan = super().plan(anatomy, target, seed)
        return plan.model_copy(update={"knobs": {"drawn": time.perf_counter_ns()}})


@register
class NonDeterministic(DropLast):
    name = "non-deterministic"

    def cheat(self, model):
        generator = torch.Generator()
        generator.seed()
        weight = model.get_input_embeddings().weight.data
        weight += 1e-3 * torch.randn(weight.shape, generator=generator)


# Looking at what is scored


@register
class OpensItems(DropLast):
    name = "opens-items"

    def cheat(self, model):
        (harness.EMBEDDED / "physical.jsonl").read_text()


@register
class LoadsTasks(DropLast):
    name = "loads-tasks"

    def cheat(self, model):
        with contextlib.suppress(Exception):  # hiding the refusal is the cheat
            harness.load_tasks("physical", None)


@register
class ReadsHeldOut(DropLast):
    name = "reads-held-out"

    def cheat(self, model):
        data.text("pydoc-held-out")


# Changing the rules


@register
class ChangesTokenizer(DropLast):
    name = "changes-tokenizer"

    def cheat(self, model):
        for thing in gc.get_objects():
            if isinstance(thing, PreTrainedTokenizerBase):
                thing.add_tokens(["an answer"])


@register
class ChangesConfig(DropLast):
    name = "changes-config"

    def cheat(self, model):
        model.config.max_position_embeddings *= 2


@register
class ChangesEnd(DropLast):
    name = "changes-end"

    def cheat(self, model):
        model.generation_config.eos_token_id = 3


@register
class RareNaN(DropLast):
    name = "rare-nan"

    def cheat(self, model):
        model.get_input_embeddings().weight.data[299] = float("nan")


@register
class ForgetsTie(DropLast):
    """Packs the tied embedding and leaves a dense head behind."""

    name = "forgets-tie"

    def cheat(self, model):
        embedding = model.get_input_embeddings()
        model.set_input_embeddings(PackedEmbedding.from_embedding(embedding, 8, 48, True))
        model.config.tie_word_embeddings = False
