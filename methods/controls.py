"""Controls: rows that tell what the others are worth."""

from __future__ import annotations

import random

from pydantic import Field
from transformers import PreTrainedModel

from methods.layer_pruning import fewest_removed
from suite.calibration import Calibration
from suite.method import Method, MethodConfig, Plan, Target, register
from suite.models.anatomy import Anatomy, drop_blocks


@register
class Dense(Method[MethodConfig]):
    """The model as it is: the reference of every ratio."""

    name = "dense"
    family = "control"
    source = "the uncompressed model"
    acts_on = frozenset()
    acts_on_parts = None

    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        return Plan()

    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> None:
        pass


class RandomLayersConfig(MethodConfig):
    """`remove`: how many blocks go; solved for the budget when not given."""

    remove: int | None = Field(default=None, ge=0)


@register
class RandomLayers(Method[RandomLayersConfig]):
    """Remove blocks drawn at random under the run's seed: what any depth pruning must beat."""

    name = "random-layers"
    family = "control"
    source = "random baseline, e.g. Men et al., ShortGPT (arXiv 2403.03853)"
    acts_on_parts = "blocks"
    Config = RandomLayersConfig

    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        def remove(count: int) -> Plan:
            drop = tuple(sorted(random.Random(seed).sample(range(anatomy.n_blocks), count)))
            return Plan(knobs={"remove": count, "blocks": list(drop)}, drop=drop)

        return fewest_removed(remove, anatomy, target, self.config.remove, self.name)

    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> None:
        drop_blocks(model, plan.drop)
