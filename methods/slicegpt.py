"""SliceGPT: rotate the residual stream by its principal components, then cut its last coordinates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from suite.calibration import Calibration
from suite.errors import InputError
from suite.layers import ModuleSpec, replace
from suite.method import Method, MethodConfig, Plan, Target, largest_share, register
from suite.models.anatomy import Anatomy, anatomy_of
from suite.models.folding import reading, scale_and_shift, times, writing
from suite.models.sliced import READS_ATTENTION, READS_MLP, SlicedLayout, sliced_modules
from suite.streaming import BlockOnStream, second_moment, stream

DAMPING = 0.01


class SliceGptConfig(MethodConfig):
    """Knobs of SliceGPT; D is the width of the dense model's residual stream.

    `width`: coordinates kept everywhere, solved for the budget when not given. `rounding`: a solved
    width is a multiple of it (the official program's 8 suits some hardware, 1 meets budgets best).
    `layout`: `tie-preserving` leaves embedding and head alone and projects beside them, `official`
    slices the embedding and unties the head; by default the first for tied models, the second for
    others. `head`: whether an official head still reads D coordinates (`kept`, the published default
    and ours where `layout=official` is asked for) or the cut ones (`sliced`, the default otherwise).
    `signal`: the principal components of the stream as it is (`raw`, the official program) or of what
    leaves a norm (`normed`, the paper's text, where all tokens weigh the same).
    `schedule`: `constant`, or `linear` in depth, where the share cut off goes from `start` in the
    first block to `end` in the last (before the MLP from `mlp_start` to `mlp_end`, by default the
    same); a budget scales these shares together.
    """

    layout: SlicedLayout | None = None
    head: Literal["kept", "sliced"] | None = None
    width: int | None = Field(default=None, ge=1)
    rounding: int = Field(default=1, ge=1)
    signal: Literal["raw", "normed"] = "raw"
    schedule: Literal["constant", "linear"] = "constant"
    start: float | None = Field(default=None, ge=0, lt=1)
    end: float | None = Field(default=None, ge=0, lt=1)
    mlp_start: float | None = Field(default=None, ge=0, lt=1)
    mlp_end: float | None = Field(default=None, ge=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> SliceGptConfig:
        shares = (self.start, self.end, self.mlp_start, self.mlp_end)
        if self.schedule == "linear":
            if self.start is None or self.end is None:
                raise ValueError("schedule=linear needs start and end, the shares cut off (0 to 1)")
            if self.width is not None:
                raise ValueError("width belongs to schedule=constant; leave one of them out")
        elif any(share is not None for share in shares):
            raise ValueError("start, end, mlp_start and mlp_end belong to schedule=linear")
        if self.layout == "tie-preserving" and self.head is not None:
            raise ValueError("head belongs to layout=official; the tie-preserving layout keeps the head")
        return self


@register
class SliceGpt(Method[SliceGptConfig]):
    """The residual stream in its principal components, the small ones cut off, block by block.

    A norm without scale commutes with rotations: its scale goes into the linears that read it (and
    for LayerNorm the mean's removal into those that write), so the stream may be rotated by an
    orthogonal Q before every norm. Q holds the principal components of the calibration's stream,
    as the already sliced blocks before make it; keeping the first d of D leaves small dense matrices
    and one d × d matrix on every skip connection. Folding, components and rotation are in float64.
    """

    name = "slicegpt"
    family = "structured pruning"
    source = "Ashkboos et al., SliceGPT (arXiv 2401.15024, section 3); microsoft/TransformerCompression"
    needs = frozenset({"calibration"})
    acts_on_parts = None
    Config = SliceGptConfig

    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        _refuse_unsuitable(anatomy, self.name)
        size, config = anatomy.hidden_size, self.config
        if config.width is not None and config.width > size:
            raise InputError(f"{self.name}(width={config.width}): the model's stream is only {size} wide.")
        if config.width is not None:
            return self._plan(anatomy, [config.width] * _points(anatomy))
        if config.schedule == "constant" and target is None:
            return self._plan(anatomy, [size] * _points(anatomy))
        if target is None:
            return self._plan(anatomy, self._widths(anatomy, 1 - max(self._shares_cut(anatomy))))
        return largest_share(
            lambda share: self._plan(anatomy, self._widths(anatomy, share)), anatomy, target
        )[1]

    def _shares_cut(self, anatomy: Anatomy) -> list[float]:
        """Share of the width to cut at every point where a branch reads the stream, and at its end."""
        config = self.config
        if config.start is None or config.end is None:
            return [1.0] * _points(anatomy)
        mlp_start = config.start if config.mlp_start is None else config.mlp_start
        mlp_end = config.end if config.mlp_end is None else config.mlp_end
        shares: list[float] = []
        for block in range(anatomy.n_blocks):
            depth = block / max(anatomy.n_blocks - 1, 1)
            shares.append(config.start + (config.end - config.start) * depth)
            if not anatomy.parallel:
                shares.append(mlp_start + (mlp_end - mlp_start) * depth)
        return [*shares, config.end]

    def _widths(self, anatomy: Anatomy, share: float) -> list[int]:
        """Widths at all points when `share` is kept where most is cut."""
        size, step = anatomy.hidden_size, min(self.config.rounding, anatomy.hidden_size)
        shares = self._shares_cut(anatomy)
        scale = (1 - share) / (max(shares) or 1)
        kept = [size * (1 - scale * cut) for cut in shares]
        # The small term keeps a whole number whole after floating-point arithmetic.
        return [size if k >= size else max(step, int(k + 1e-6) // step * step) for k in kept]

    def _plan(self, anatomy: Anatomy, widths: list[int]) -> Plan:
        size, layout = anatomy.hidden_size, self._layout(anatomy)
        knobs: dict[str, Any] = {"layout": layout, "signal": self.config.signal}
        low, high = min(widths), max(widths)
        knobs["width"] = low if low == high else f"{low}..{high}"
        if layout == "official":
            knobs["head"] = self._head()
            if knobs["head"] == "kept":
                widths = [*widths[:-1], size]
        if low == size:
            return Plan(knobs=knobs)
        return Plan(knobs=knobs, modules=sliced_modules(anatomy, widths, layout))

    def _layout(self, anatomy: Anatomy) -> SlicedLayout:
        return self.config.layout or ("tie-preserving" if anatomy.tied else "official")

    def _head(self) -> str:
        return self.config.head or ("kept" if self.config.layout else "sliced")

    @torch.no_grad()
    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> None:
        if not plan.modules:
            return
        assert calibration is not None
        surgeon = _Surgeon(model, plan.modules, normed=self.config.signal == "normed")
        for block in stream(model, calibration.tokens):
            surgeon.slice(block)
        surgeon.finish()


def _refuse_unsuitable(anatomy: Anatomy, name: str) -> None:
    size, usual = anatomy.hidden_size, len(anatomy.layout.roles) * anatomy.n_blocks
    linears = anatomy.dense_linears(name)
    if len(linears) != usual or any(
        (line.in_features if line.role in READS_ATTENTION | READS_MLP else line.out_features) != size
        for line in linears
    ):
        raise InputError(
            f"'{name}' needs the blocks' linears whole, but an earlier stage factorised or sliced them."
            f" Put {name} first: {name}+..."
        )
    if not anatomy.pre_norm or anatomy.embedding_size != size:
        raise InputError(
            f"'{name}' rotates what stands before a norm; this {anatomy.model_type} model has its norms"
            " after the additions, or an embedding of another width than its stream. Use another method"
            " for it (weighin methods lists them)."
        )


def _points(anatomy: Anatomy) -> int:
    """How often a stream may change its width: before every branch, and at the end."""
    return anatomy.n_blocks * (1 if anatomy.parallel else 2) + 1


class _Surgeon:
    """Slices a model block by block while the calibration's residual stream passes.

    The stream is held in the dense model's coordinates and projected onto what the cut keeps, so the
    dense block itself can be run on it: W Q (Qᵀ x) = W (Q Qᵀ x). One pass through a block suffices.
    """

    def __init__(self, model: PreTrainedModel, modules: dict[str, ModuleSpec], normed: bool):
        self.model, self.modules, self.normed = model, modules, normed
        self.anatomy = anatomy_of(model)
        self.wide = torch.float64 if model.dtype == torch.float64 else torch.float32
        self.basis = torch.empty(0)  # D × width, float64: the coordinates kept, in the dense model's
        self.entrance = torch.empty(0)

    def slice(self, block: BlockOnStream) -> None:
        """Find the block's bases on the stream, move the stream past it, and slice its weights."""
        layout, spec = self.anatomy.layout, self.modules[block.path].arguments
        inputs, dense = block.inputs, block.module

        def attend(hidden: Tensor, position: int) -> Tensor:
            return layout.attend(dense, hidden, block.arguments[position])

        def feed_forward(hidden: Tensor, position: int) -> Tensor:
            return layout.feed_forward(dense, hidden)

        if block.index == 0:
            inputs[:] = [self._centred(hidden.to(self.wide)) for hidden in inputs]
            self.basis = self.entrance = self._turn(inputs, [], spec["entering"], rotate=True)
        entering = self.basis
        if spec["between"] is None:
            between = entering
            branches = [attend, feed_forward]
            leaving = self._turn(inputs, branches, spec["leaving"], spec["mlp_skip"])
            attention_out = leaving
        else:
            between = attention_out = self._turn(inputs, [attend], spec["between"], spec["attention_skip"])
            leaving = self._turn(inputs, [feed_forward], spec["leaving"], spec["mlp_skip"])
        block.advanced = True
        self._put_block(block, entering, between, attention_out, leaving)

    def _turn(
        self,
        states: list[Tensor],
        branches: Sequence[Callable[[Tensor, int], Tensor]],
        width: int,
        rotate: bool,
    ) -> Tensor:
        """Add the branches to the stream; find the basis of the sum, and project the stream onto it."""
        size = self.anatomy.hidden_size
        moment = torch.zeros(size, size, dtype=torch.float64, device=states[0].device)
        for position, state in enumerate(states):
            hidden = state.to(self.model.dtype)
            for branch in branches:
                state = state + self._centred(branch(hidden, position).to(self.wide))
            states[position] = state
            if rotate:
                moment += second_moment(self._signal(state).reshape(-1, size))
        if rotate:
            components = principal_components(moment)
            self.basis = components[:, :width]
            for state in states:
                _project(state.view(-1, size), components.to(self.wide), width)
        return self.basis

    def _signal(self, state: Tensor) -> Tensor:
        if not self.normed:
            return state
        return state * torch.rsqrt(state.square().mean(-1, keepdim=True) + self.anatomy.norms.eps)

    def _centred(self, hidden: Tensor) -> Tensor:
        """LayerNorm would take the mean out at every norm; it is taken out where the stream is written."""
        return hidden - hidden.mean(-1, keepdim=True) if self.anatomy.norms.centred else hidden

    def _put_block(
        self, block: BlockOnStream, entering: Tensor, between: Tensor, attention_out: Tensor, leaving: Tensor
    ) -> None:
        spec = self.modules[block.path].arguments
        parts = self.anatomy.layout
        size = self.anatomy.hidden_size
        norms = [scale_and_shift(block.module.get_submodule(path), size) for path in parts.norms]
        for inner, role in parts.roles.items():
            path, linear = f"{block.path}.{inner}", block.module.get_submodule(inner)
            assert isinstance(linear, nn.Linear)
            if role in READS_ATTENTION | READS_MLP:
                scale, shift = norms[role in READS_MLP]
                basis = between if role in READS_MLP else entering
                self._put(path, **reading(linear, basis, scale, shift))
            else:
                written = self._centred_basis(leaving if role == "down" else attention_out)
                self._put(path, **writing(linear, written))
        for inner in parts.norms:
            self._put(f"{block.path}.{inner}")
        skips: dict[str, Tensor] = {}
        if spec["attention_skip"]:
            skips["attention_skip.weight"] = between.T @ entering
        if spec["mlp_skip"]:
            skips["mlp_skip.weight"] = leaving.T @ between
        if spec["entrance"] is not None:
            skips["entrance.weight"] = self._centred_basis(entering).T
        self._put(block.path, **skips)

    def finish(self) -> None:
        """Slice or project what stands before and after the blocks."""
        parts = self.anatomy.layout
        norm = self.model.get_submodule(parts.final_norm)
        scale, shift = scale_and_shift(norm, self.anatomy.hidden_size)
        if self.modules[parts.final_norm].type == "expanding_norm":
            bias = {"bias": shift} if shift is not None else {}
            self._put(parts.final_norm, **{"expand.weight": self.basis, "weight": scale, **bias})
            return
        head = self.model.get_submodule(parts.head)
        assert isinstance(head, nn.Linear)
        tables = [path for path in (parts.embedding, parts.positions) if path is not None]
        self._put(parts.head, **reading(head, self.basis, scale, shift))
        for path in tables:
            table = self.model.get_submodule(path)
            assert isinstance(table, nn.Embedding)
            self._put(path, weight=times(table.weight, self._centred_basis(self.entrance)))
        self._put(parts.final_norm)
        self.model.config.tie_word_embeddings = False

    def _centred_basis(self, basis: Tensor) -> Tensor:
        """What to multiply a stream with that still has its mean, to get coordinates without."""
        return basis - basis.mean(0) if self.anatomy.norms.centred else basis

    def _put(self, path: str, **tensors: Tensor) -> None:
        """Put the planned module at `path`, holding `tensors`."""
        dtype = self.model.dtype
        module = self.modules[path].build(dtype)
        module.load_state_dict({k: v.to(dtype).contiguous() for k, v in tensors.items()}, assign=True)
        replace(self.model, path, module)


def principal_components(moment: Tensor) -> Tensor:
    """Eigenvectors (D × D, in columns, largest eigenvalue first) of a second moment (D × D, float64).

    A hundredth of the mean diagonal is added, which moves no eigenvector but helps the solver.
    """
    damping = DAMPING * moment.diagonal().mean() * torch.eye(len(moment)).to(moment)
    vectors: Tensor = torch.linalg.eigh(moment + damping)[1]
    return vectors.flip(-1)


def _project(rows: Tensor, components: Tensor, width: int) -> None:
    """Replace rows (tokens × D) by their projection onto the first `width` of the components."""
    kept, cut = components[:, :width], components[:, width:]
    if 2 * cut.shape[1] < len(components):  # fewer operations to take away than to keep
        rows.addmm_(rows @ cut, cut.T, alpha=-1)
    else:
        rows.copy_(rows @ (kept @ kept.T))
