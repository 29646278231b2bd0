"""What a run is: budgets, protocols, tracks and the frozen, hashed specification of one cell."""

from __future__ import annotations

import hashlib
import json
import math
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from suite.errors import InputError, nearest

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "b": 1}
_SMALLEST_ABSOLUTE = 1000


Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What NumPy and torch take alike."""


class Frozen(BaseModel):
    """Immutable, hashable and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Budget(Frozen):
    """A size every method must meet.

    `params` counts unique parameters (embeddings included, tied weights once), `bytes` counts the
    bytes of the saved weights. `value` is a share of the dense model in (0, 1], or an absolute
    number. `none` runs a recipe at exactly the knobs it gives; such rows are shown, not ranked.
    """

    metric: Literal["params", "bytes", "none"]
    value: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `params=0.8`, `bytes=0.25`, `bytes=64MiB`, `params=100M` or `none`.

        Raises:
            InputError: the text is malformed, or a share lies outside (0, 1].
        """
        form = "Use params=SHARE, bytes=SHARE (0 < SHARE <= 1), bytes=64MiB, params=100M or none."
        if text == "none":
            return cls(metric="none")
        match = re.fullmatch(r"(\w+)=([0-9.]+(?:e-?\d+)?)\s*([A-Za-z]*)", text.strip())
        if not match or match[3].lower() not in _UNITS:
            raise InputError(f"'{text}' is not a budget. {form}")
        metric, number, unit = match[1], match[2], match[3].lower()
        if metric not in ("params", "bytes"):
            hint = nearest(metric, ["params", "bytes"])
            raise InputError(f"'{metric}' is not a budget metric.{hint} {form}")
        try:
            value = float(number) * _UNITS[unit]
        except ValueError:
            raise InputError(f"'{text}' is not a budget: '{number}' is not a number.") from None
        if not math.isfinite(value):
            raise InputError(f"'{text}' is not a budget: '{number}' is too large a number. {form}")
        if not unit and not 0 < value <= 1 and value < _SMALLEST_ABSOLUTE:
            raise InputError(f"budget '{text}': a share must lie in (0, 1]. {form}")
        if value <= 0 or (value < _SMALLEST_ABSOLUTE and (unit or value > 1)):
            raise InputError(f"budget '{text}' is too small to be an absolute size. {form}")
        return cls(metric=metric, value=value)  # type: ignore[arg-type]

    def target(self, dense: int) -> int:
        """The absolute target, given the dense model's count in the same unit."""
        return int(self.value * dense) if self.value <= 1 else int(self.value)

    def __str__(self) -> str:
        if self.metric == "none":
            return "none"
        return f"{self.metric}={self.value:g}" if self.value <= 1 else f"{self.metric}={self.value:.0f}"


class CalibrationSpec(Frozen):
    """Which text every method is calibrated on: `count` sequences of `length` tokens."""

    source: str
    count: int = Field(gt=0)
    length: int = Field(gt=1)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `NAME:COUNTxLENGTH`, for example `wikitext2:64x512`."""
        match = re.fullmatch(r"([\w-]+):(\d+)x(\d+)", text.strip())
        if not match or int(match[2]) < 1 or int(match[3]) < 2:
            raise InputError(f"'{text}' is not a text sample. Use NAME:COUNTxLENGTH, e.g. wikitext2:64x512.")
        return cls(source=match[1], count=int(match[2]), length=int(match[3]))

    def __str__(self) -> str:
        return f"{self.source}:{self.count}x{self.length}"


class HealingSpec(CalibrationSpec):
    """Which text every healed or distilled model is trained on, once through, in one order.

    `batch` sequences make one optimizer step.
    """

    batch: int = Field(default=2, gt=0)

    @classmethod
    def parse(cls, text: str, batch: int = 2) -> Self:
        """Read `NAME:COUNTxLENGTH/BATCH`, for example `wikitext2:128x512/4`; /BATCH may be left out."""
        sample, slash, given = text.partition("/")
        if slash and not (given.strip().isdecimal() and int(given)):
            raise InputError(
                f"'{text}' is not a training text. Use NAME:COUNTxLENGTH/BATCH, e.g. wikitext2:128x512/4."
            )
        return super().parse(sample).model_copy(update={"batch": int(given) if slash else batch})

    def __str__(self) -> str:
        return f"{super().__str__()}/{self.batch}"

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.count * self.length


class PerplexitySpec(Frozen):
    """Perplexity over one text: non-overlapping windows, mean over tokens, optional BOS."""

    source: str
    window: int = Field(gt=1)
    windows: int | None = Field(default=None, gt=0)
    bos: bool = False


class TaskSpec(Frozen):
    """One zero-shot task and the single metric that every row of a table reports for it."""

    name: str
    metric: Literal["acc", "acc_norm", "exact_match"]
    filter: str = "none"
    limit: int | None = Field(default=None, gt=0)


class SpeedSpec(Frozen):
    """Shapes of the three throughput measurements."""

    prefill_batch: int = Field(default=4, gt=0)
    prefill_length: int = Field(default=128, gt=0)
    decode_prompt: int = Field(default=64, gt=0)
    decode_tokens: int = Field(default=24, gt=0)
    train_batch: int = Field(default=2, gt=0)
    train_length: int = Field(default=128, gt=1)
    repeats: int = Field(default=5, gt=0)


class Protocol(Frozen):
    """Everything that must be equal between two rows for a table to compare them."""

    name: str
    description: str
    calibration: CalibrationSpec
    perplexity: PerplexitySpec
    tasks: tuple[TaskSpec, ...]
    speed: SpeedSpec = SpeedSpec()
    healing: HealingSpec | None = None
    dtype: Literal["bfloat16", "float32", "native"] = "native"
    tokens_per_batch: int | None = Field(default=None, gt=0)
    """Tokens in a padded evaluation batch; by default 512 on a CPU and 16,384 on an accelerator."""

    @classmethod
    def load(cls, name: str) -> Protocol:
        """Load a protocol by name (`weighin tasks` lists them) or from a YAML file."""
        return load_named(cls, "protocol", name)

    def digest(self) -> str:
        """SHA-256 of all that every row depends on; what only healed rows need is in their `RunSpec`."""
        return digest_of(self.model_dump(mode="json", exclude={"healing"}))


class Track(Frozen):
    """A grid of cells: models × recipes × budgets × seeds under one protocol."""

    models: tuple[str, ...] = Field(default=("smollm2-135m",), min_length=1)
    recipes: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ("none",)
    protocol: str = "embedded"
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1)
    calibration: str | None = None
    healing: str | None = None
    limit: int | None = Field(default=None, gt=0)
    cells: tuple[tuple[str, str], ...] = ()
    """Extra (recipe, budget) pairs beside the full product."""

    @classmethod
    def load(cls, name: str) -> Track:
        """Load a track by name or from a YAML file."""
        return load_named(cls, "track", name)

    def pairs(self) -> list[tuple[str, str]]:
        """All (recipe, budget) pairs, dense first; each once."""
        product = [(r, b) for b in self.budgets for r in self.recipes if r != "dense"]
        return list(dict.fromkeys([("dense", "none"), *product, *self.cells]))


class RunSpec(Frozen):
    """One cell. Two cells with equal specs have equal records; the digest names the record."""

    schema_version: ClassVar[int] = 1

    model: str
    model_digest: str
    recipe: str
    method_versions: tuple[str, ...]
    budget: Budget
    protocol: Protocol
    protocol_digest: str
    calibration: CalibrationSpec
    healing: HealingSpec | None = None
    """The training text, where a stage of the recipe trains."""
    seed: int = 0
    device: str = "cpu"
    limit: int | None = None

    def digest(self) -> str:
        """Sixteen hexadecimal digits naming this cell's record."""
        unused = {"protocol": {"healing": True}} | ({} if self.healing else {"healing": True})
        return digest_of([self.schema_version, self.model_dump(mode="json", exclude=unused)])[:16]


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON-able value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


NamedT = TypeVar("NamedT", Protocol, Track)


def named_files(kind: str) -> dict[str, Path]:
    """The YAML files of one kind ("protocol" or "track") that ship with the suite, by name."""
    folder = Path(str(resources.files("tasks"))) / f"{kind}s"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_named(cls: type[NamedT], kind: str, name: str) -> NamedT:
    """Load a protocol or track that ships with the suite, or any YAML file of that shape.

    Raises:
        InputError: unknown name, unreadable file, or fields that do not fit.
    """
    known = named_files(kind)
    path = known.get(name, Path(name))
    if name not in known and path.suffix not in (".yaml", ".yml"):
        listing = ", ".join(known)
        raise InputError(f"no {kind} is called '{name}'.{nearest(name, known)}  (There are: {listing}.)")
    try:
        fields = yaml.safe_load(path.read_text())
        return cls.model_validate(fields)
    except FileNotFoundError:
        raise InputError(f"{kind} file '{name}' does not exist.") from None
    except ValidationError as error:
        raise InputError(f"{kind} file '{name}': {explain(error, cls)}") from None
    except (OSError, yaml.YAMLError, ValueError) as error:  # YAML's dates may be none
        raise InputError(f"{kind} file '{name}' cannot be read: {error}") from None


def explain(error: ValidationError, cls: type[BaseModel]) -> str:
    """The first problem of a pydantic error in one sentence, with the nearest field name."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        fields = ", ".join(cls.model_fields) or "none"
        return f"unknown field '{where}'.{nearest(where, cls.model_fields)} (Fields: {fields}.)"
    return f"'{where}': {first['msg']}." if where else f"{first['msg']}."
