"""Recovery training after a structural stage: `layerchop+heal`, `tensor-network+heal+rtn-int4`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from methods.sparse_tuning import add_scales, merge_scales
from suite.calibration import Calibration
from suite.errors import InputError, require
from suite.healing import Schedule, train
from suite.losses import Objective
from suite.method import Method, MethodConfig, Plan, Target, register
from suite.models.anatomy import Anatomy
from suite.models.layouts import layout_of

Mode = Literal["full", "lora", "spp"]
# On SmolLM2-135M at params=0.8 sliced models wanted the lowest of these, shortened ones the highest.
LEARNING_RATES = {"full": (5e-5, 1.5e-4, 5e-4), "lora": (3e-4, 1e-3, 3e-3), "spp": (1e-3, 3e-3, 1e-2)}


class TrainingConfig(MethodConfig):
    """Knobs of the optimizer; the tokens, their order and the number of steps are the protocol's.

    `learning_rate` is the peak, reached after the share `warmup` of all steps; without one, the best
    of three for the model at hand is rehearsed on the first tokens and judged on held-out ones.
    """

    learning_rate: float | None = Field(default=None, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)

    def schedules(self, mode: Mode = "full") -> list[Schedule]:
        """The schedule with the rate given, or one for each rate to rehearse."""
        rates = (self.learning_rate,) if self.learning_rate else LEARNING_RATES[mode]
        return [
            Schedule(learning_rate=rate, warmup=self.warmup, weight_decay=self.weight_decay) for rate in rates
        ]


class HealConfig(TrainingConfig):
    """Knobs of recovery training.

    `mode`: train every weight, or low-rank adapters (`rank`, `alpha`) merged at the end; what stands in
    a linear's place and holds no linear, such as a tensor network, is then trained as it is. "spp" scales
    the kept weights of sparse linears by factors of `rank` rows (`methods.sparse_tuning`). `distill`:
    weight of the KL divergence to the dense model against cross-entropy; 0 is continued pretraining.
    `learning_rate`, `warmup`, `weight_decay`: see `TrainingConfig`.
    """

    mode: Mode = "full"
    distill: float = Field(default=0.0, ge=0, le=1)
    rank: int = Field(default=32, gt=0)
    alpha: float = Field(default=32.0, gt=0)


@register
class Heal(Method[HealConfig]):
    """Train what the stages before left: AdamW on float32 master weights, cosine, next-token loss.

    With `distill=0` and after `layerchop` this is the paper's continued pretraining, in small.
    """

    name = "heal"
    version = 2
    family = "recovery training"
    source = (
        "Jha et al., Just CHOP (arXiv 2305.14864, section 3); LoRA: Hu et al. (arXiv 2106.09685);"
        " SPP: Lu et al. (arXiv 2405.16057, section 3)"
    )
    acts_on = frozenset()
    needs = frozenset({"training"})
    acts_on_parts = None
    Config = HealConfig

    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        linears = anatomy.dense_linears(self.name, or_sparse=True)
        if self.config.mode == "lora":
            require("peft", "heal(mode=lora)")
            if linears and all(line.sparse for line in linears):
                raise InputError(
                    "heal(mode=lora) adapts dense linears, and an earlier stage stored all of them without"
                    " their zeros. Use heal(mode=spp) or heal(mode=full)."
                )
        if self.config.mode == "spp" and not any(line.sparse for line in linears):
            raise InputError(
                "heal(mode=spp) scales the kept weights of sparse linears, and there are none. Put it after"
                " magnitude, wanda or sparsegpt, or use another mode."
            )
        return Plan(knobs={"mode": self.config.mode, "distill": self.config.distill})

    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> Plan:
        assert calibration is not None
        assert calibration.training is not None
        config = self.config
        objective = Objective(distill=config.distill)
        adapters = None
        if config.mode == "lora":
            adapters = add_adapters(model, config.rank, config.alpha)
        elif config.mode == "spp":
            adapters = add_scales(model, config.rank, config.alpha)
        notes = train(model, calibration.training, objective, config.schedules(config.mode), adapters)
        if config.mode == "lora":
            merge_adapters(model)
        elif config.mode == "spp":
            merge_scales(model)
        return plan.model_copy(update={"notes": notes})


def add_adapters(model: PreTrainedModel, rank: int, alpha: float) -> list[nn.Parameter]:
    """Put a LoRA adapter on every linear of the blocks; returns what is to be trained.

    That is the adapters' parameters, and those of modules that took a linear's place and hold no linear.

    Raises:
        InputError: nothing in the blocks can be adapted.
    """
    import peft

    layout = layout_of(model.config)
    blocks = model.get_submodule(layout.blocks)
    linears = [
        f"{layout.blocks}.{path}" for path, module in blocks.named_modules() if isinstance(module, nn.Linear)
    ]
    if not linears:
        raise InputError("heal(mode=lora): this model has no linears left to adapt. Use heal(mode=full).")
    places = [block.get_submodule(path) for block in blocks.children() for path in layout.roles]
    foreign = [place for place in places if not any(isinstance(m, nn.Linear) for m in place.modules())]
    trained = [parameter for place in foreign for parameter in place.parameters()]
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=linears)
    peft.inject_adapter_in_model(config, model)
    return trained + [parameter for name, parameter in model.named_parameters() if "lora_" in name]


def merge_adapters(model: PreTrainedModel) -> None:
    """Add every adapter to its weights and put the linears back."""
    from peft.tuners.lora import LoraLayer

    for path, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            model.set_submodule(path, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    if getattr(model, "_hf_peft_config_loaded", False):
        model._hf_peft_config_loaded = False
