"""The gate itself: pair the outcomes look by look, apply every criterion, and say what moved."""

from __future__ import annotations

import functools
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from suite.errors import InputError
from suite.gate import criteria, sides
from suite.gate.accuracy import Accuracy, Flip, Pairs, Progress, TaskMove
from suite.gate.criteria import Criterion, Phase
from suite.gate.outcomes import Recorded
from suite.gate.sequential import Verdict
from suite.gate.sides import Side
from suite.records import Memory
from suite.registry import load_plugin
from suite.specs import Frozen, Protocol

if TYPE_CHECKING:  # imported where a model is needed: two records are judged without torch
    from suite.gate.measured import Measured
    from suite.models import load


@dataclass(frozen=True)
class Settings:
    """What a user asked of the gate; a criterion that is None is not applied."""

    baseline: str
    candidate: str
    max_drop: float | None = None
    """In points of accuracy, as are all figures of a report."""
    max_perplexity_ratio: float | None = None
    max_size_ratio: float | None = None
    max_memory_ratio: float | None = None
    min_throughput_ratio: float | None = None
    throughput: Phase = "decode"
    protocol: str | None = None
    limit: int | None = None
    alpha: float = 0.05
    device: str = "cpu"
    results: Path = field(default_factory=lambda: Path("results"))
    data_folder: Path | None = None
    plugins: tuple[str, ...] = ()

    def checked(self) -> Settings:
        """These settings with the default criterion when none is given.

        Raises:
            InputError: a limit that makes no sense.
        """
        ratios = {
            "--max-perplexity-ratio": self.max_perplexity_ratio,
            "--max-size-ratio": self.max_size_ratio,
            "--max-memory-ratio": self.max_memory_ratio,
            "--min-throughput-ratio": self.min_throughput_ratio,
        }
        for flag, value in ratios.items():
            if value is not None and not value > 0:
                raise InputError(f"{flag} {value:g} must be above 0, for example 1.05.")
        if self.max_drop is not None and not 0 < self.max_drop < 100:
            raise InputError(
                f"--max-drop {self.max_drop:g} must be above 0 and below 100 points: no number of items can"
                " show that nothing at all was lost. Give the loss you could live with, for example 0.5."
            )
        if not 0 < self.alpha < 0.5:
            raise InputError(f"--alpha {self.alpha:g} must lie between 0 and 0.5.")
        if self.throughput not in ("prefill", "decode"):
            raise InputError(f"--throughput '{self.throughput}' must be prefill or decode.")
        if self.max_drop is None and all(value is None for value in ratios.values()):
            return Settings(**{**vars(self), "max_drop": 1.0})
        return self


class BaseMove(Frozen):
    """The base measured again against its own record: never counted against the candidate."""

    points: float
    """Accuracy now minus accuracy in the record, mean over tasks, on the items used."""
    changed: int
    items: int


class Report(Frozen):
    """Everything the gate found; accuracies and drops in points."""

    verdict: Verdict
    baseline: str
    candidate: str
    protocol: str
    criteria: tuple[Criterion, ...]
    items_used: int = 0
    items_available: int = 0
    tasks: tuple[TaskMove, ...] = ()
    flips: tuple[Flip, ...] = ()
    """In the order in which the items were used, those that were lost first."""
    base_move: BaseMove | None = None
    notices: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()


def run(settings: Settings, progress: Progress = lambda used, available, decision: None) -> Report:
    """Judge a candidate against a baseline.

    Raises:
        InputError: a side that cannot be found or paired, or a criterion that cannot be applied.
    """
    gate = _Gate(settings.checked(), progress)
    if gate.needs_no_model:
        return gate.report()
    from suite import bfloat16

    with bfloat16.widened(settings.device):
        return gate.report()


class _Gate:
    def __init__(self, settings: Settings, progress: Progress):
        self.settings, self.progress = settings, progress
        self.notices: list[str] = []
        self.blocked = ""
        """Why a FAIL cannot be blamed on the candidate."""
        for plugin in settings.plugins:
            load_plugin(plugin)
        if settings.device != "cpu":
            from suite.run.runner import check_device

            check_device(settings.device)
        wanted = Protocol.load(settings.protocol).name if settings.protocol else None
        self.base = sides.find("baseline", settings.baseline, settings.results, wanted, settings.limit)
        if self.base.record:
            wanted = self.base.record.spec.protocol.name
        self.candidate = sides.find("candidate", settings.candidate, settings.results, wanted, settings.limit)
        self.protocol, self.limit = self._protocol()
        self.outcomes = self._outcomes()

    @property
    def needs_no_model(self) -> bool:
        """Whether everything asked for stands in records."""
        return bool(self.base.record and self.candidate.record) and self.settings.min_throughput_ratio is None

    @functools.cached_property
    def models(self) -> dict[str, tuple[load.Source | None, str]]:
        """The model behind each side, or None and why there is none."""
        from suite.gate.measured import model_of

        return {side.role: model_of(side) for side in (self.base, self.candidate)}

    def _protocol(self) -> tuple[Protocol, int | None]:
        """The protocol and limit that both sides share.

        Raises:
            InputError: they share none.
        """
        specs = [side.record.spec for side in (self.base, self.candidate) if side.record]
        asked = Protocol.load(self.settings.protocol) if self.settings.protocol else None
        protocols = [spec.protocol for spec in specs] + ([asked] if asked else [])
        for other in protocols[1:]:
            if other.digest() != protocols[0].digest():
                raise InputError(
                    f"a record of protocol '{protocols[0].name}' and protocol '{other.name}' differ; outcomes"
                    " are compared under an equal protocol only."
                )
        limits = [spec.limit for spec in specs if spec.limit is not None]
        limits += [self.settings.limit] if self.settings.limit is not None else []
        return protocols[0] if protocols else Protocol.load("embedded"), min(limits, default=None)

    def _outcomes(self) -> dict[str, Recorded | Measured]:
        """For each side: its record where that holds under the conditions of the other, else its model."""
        pair = (self.base, self.candidate)
        if self.base.record and self.candidate.record:
            found = sides.differences(self.base.record.conditions, self.candidate.record.conditions)
            found = [what for what in found if not what.startswith("dtype ")]
            if found:
                self._block(f"the two records were measured under other conditions ({', '.join(found)})")
            return {side.role: self._recorded(side) for side in pair}
        return {side.role: self._outcomes_of(side) for side in pair}

    def _outcomes_of(self, side: Side) -> Recorded | Measured:
        from suite.gate.measured import Measured, cache_folder, current_conditions, dtype_now

        source, why_not = self.models[side.role]
        if side.record:
            now = current_conditions(self.settings.device)
            now |= dtype_now(source, self.protocol, side.record)
            found = sides.differences(side.record.conditions, now)
            if not found:
                return self._recorded(side)
            conditions = f"{side.role} record {side.record.id} was measured under other conditions"
            if source is None:
                self._block(f"{conditions} ({', '.join(found)}), and {why_not}")
                return self._recorded(side)
            self.notices.append(f"{conditions} ({', '.join(found)}): measured again.")
        if source is None:
            raise InputError(f"{side.role} '{side.given}' has neither outcomes nor a model.")
        place = (source, self.protocol, self.settings.device, self.limit, self.settings.data_folder)
        cache = cache_folder(*place) if side.role == "baseline" else None
        return Measured(
            source,
            self.protocol,
            self.settings.device,
            self.limit,
            self.settings.data_folder,
            cache,
            self.notices.append,
        )

    def _recorded(self, side: Side) -> Recorded:
        if side.record is None:
            raise InputError(f"{side.role} '{side.given}' is not a record.")
        return Recorded(side.record, side.outcomes_file)

    def _block(self, reason: str) -> None:
        self.blocked = reason
        self.notices.append(f"{reason}. A loss seen here may not be the candidate's.")

    def report(self) -> Report:
        """Apply all criteria."""
        s = self.settings
        statistical = (s.max_drop, s.max_perplexity_ratio, s.min_throughput_ratio)
        # Bonferroni: however many criteria can err, the chance that any does stays below alpha.
        alpha = s.alpha / max(1, sum(limit is not None for limit in statistical))
        self._check_throughput()
        found: list[Criterion] = []
        test = Accuracy(self.outcomes, self.protocol, self.limit) if s.max_drop is not None else None
        if test and s.max_drop is not None:
            judged = test.judge(s.max_drop, alpha, self.notices.append, self.progress)
            found.append(self._excused(judged))
        if s.max_perplexity_ratio is not None:
            both = (self.outcomes["baseline"].perplexity(), self.outcomes["candidate"].perplexity())
            judged = criteria.perplexity_ratio(*both, s.max_perplexity_ratio, alpha)
            found.append(self._excused(judged))
        if s.max_size_ratio is not None:
            base, candidate = self._size(self.base), self._size(self.candidate)
            found.append(criteria.plain_ratio("max-size-ratio", "size", base, candidate, s.max_size_ratio))
        if s.max_memory_ratio is not None:
            found.append(self._memory(s.max_memory_ratio))
        if s.min_throughput_ratio is not None:
            found.append(self._throughput(s.min_throughput_ratio, alpha))
        return Report(
            verdict=_overall(found),
            baseline=self.base.name,
            candidate=self.candidate.name,
            protocol=self.protocol.name,
            criteria=tuple(found),
            items_used=test.used if test else 0,
            items_available=test.available if test else 0,
            tasks=test.moves() if test else (),
            flips=test.flips() if test else (),
            base_move=self._base_move(test.pairs) if test else None,
            notices=tuple(self.notices),
            commands=self._commands(),
        )

    def _excused(self, criterion: Criterion) -> Criterion:
        if criterion.verdict != "fail" or not self.blocked:
            return criterion
        reason = f"would be FAIL, but {self.blocked}"
        return criterion.model_copy(update={"verdict": "inconclusive", "reason": reason})

    def _base_move(self, pairs: Pairs) -> BaseMove | None:
        if self.base.record is None or isinstance(self.outcomes["baseline"], Recorded) or not pairs:
            return None
        before = self._recorded(self.base)
        points, changed, items = [], 0, 0
        for rows in pairs.values():
            now = [base for base, _ in rows]
            both = zip(now, before.matching(now), strict=True)
            moves = [float(later["correct"]) - float(earlier["correct"]) for later, earlier in both]
            points.append(float(np.mean(moves)))
            changed, items = changed + sum(move != 0 for move in moves), items + len(moves)
        return BaseMove(points=100 * float(np.mean(points)), changed=changed, items=items)

    def _size(self, side: Side) -> float:
        if side.record and side.record.measurements:
            return float(side.record.measurements.sizes.bytes_disk)
        source, why_not = self.models[side.role]
        if source is None:
            raise InputError(f"the size of {side.role} '{side.given}' is unknown: {why_not}.")
        from suite.gate.cost import stored_bytes

        return float(stored_bytes(source))

    def _memory(self, limit: float) -> Criterion:
        """Both from records made on like machines, or both measured now, in fresh processes."""
        pair = (self.base, self.candidate)
        records = [o.record for o in self.outcomes.values() if isinstance(o, Recorded)]
        recorded = [record.measurements.memory for record in records if record.measurements]
        memory: list[Memory]
        if len(recorded) == 2:
            memory = recorded
            unlike = sides.differences(records[0].conditions, records[1].conditions)
            unlike = [what for what in unlike if what.startswith(("device ", "threads "))]
            if memory[0].how != memory[1].how:
                unlike.append(f"{memory[0].how} → {memory[1].how}")
            if unlike:
                return criteria.not_compared("max-memory-ratio", "peak memory", limit, ", ".join(unlike))
        else:
            from suite.gate.cost import measure_memory

            memory = []
            for side in pair:
                source, why_not = self.models[side.role]
                if source is None:
                    raise InputError(f"--max-memory-ratio needs both models; for the {side.role}, {why_not}.")
                place = (source, self.settings.device, self.protocol.speed, self.settings.plugins)
                memory.append(measure_memory(*place))
        base, candidate = (max(m.load, m.inference) for m in memory)
        how = f" ({memory[0].how})"
        return self._excused(
            criteria.plain_ratio("max-memory-ratio", "peak memory", base, candidate, limit, how)
        )

    def _throughput(self, limit: float, alpha: float) -> Criterion:
        from suite.gate.cost import throughput_ratio

        base, candidate = (self._measured(side).model for side in (self.base, self.candidate))
        return throughput_ratio(base, candidate, self.protocol.speed, self.settings.throughput, limit, alpha)

    def _check_throughput(self) -> None:
        """Refuse early what would need a model that is not there."""
        if self.settings.min_throughput_ratio is None:
            return
        for side in (self.base, self.candidate):
            source, why_not = self.models[side.role]
            if source is None:
                raise InputError(
                    f"--min-throughput-ratio needs both models, to run them in turn; for the {side.role},"
                    f" {why_not}."
                )

    def _measured(self, side: Side) -> Measured:
        from suite.gate.measured import Measured

        found = self.outcomes[side.role]
        if isinstance(found, Measured):
            return found
        source, _ = self.models[side.role]
        if source is None:
            raise InputError(f"{side.role} '{side.given}' has no model.")
        return Measured(source, self.protocol, self.settings.device)

    def _commands(self) -> tuple[str, ...]:
        """What reproduces the verdict, and what measures the candidate in full."""
        s = self.settings
        flags: dict[str, Any] = {
            "baseline": s.baseline,
            "candidate": s.candidate,
            "max-drop": s.max_drop,
            "max-perplexity-ratio": s.max_perplexity_ratio,
            "max-size-ratio": s.max_size_ratio,
            "max-memory-ratio": s.max_memory_ratio,
            "min-throughput-ratio": s.min_throughput_ratio,
            "throughput": s.throughput if s.min_throughput_ratio is not None else None,
            "protocol": s.protocol,
            "limit": s.limit,
            "alpha": s.alpha if s.alpha != 0.05 else None,
            "device": s.device if s.device != "cpu" else None,
            "results": s.results if s.results != Path("results") else None,
            "data-dir": s.data_folder,
        }
        spec = self.candidate.record.spec if self.candidate.record else None
        full: dict[str, Any] = {
            "model": spec.model if spec else s.candidate,
            "recipe": spec.recipe if spec else "dense",
            "budget": spec.budget if spec else None,
            "protocol": s.protocol or self.protocol.name,
            "seed": spec.seed if spec and spec.seed else None,
            "limit": self.limit,
            "data-dir": s.data_folder,
        }
        return _command("gate", flags, s.plugins), _command("run", full, s.plugins)


def _overall(found: list[Criterion]) -> Verdict:
    verdicts = [criterion.verdict for criterion in found]
    return "fail" if "fail" in verdicts else "inconclusive" if "inconclusive" in verdicts else "pass"


def _command(name: str, flags: dict[str, Any], plugins: tuple[str, ...]) -> str:
    words = ["weighin", name]
    for flag, value in flags.items():
        if value is not None:
            words += [f"--{flag}", f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join([*words, *(word for plugin in plugins for word in ("--plugin", plugin))])
