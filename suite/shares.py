"""Allocation files: the share of its weights every linear keeps, made by a profile, used by methods.

A method takes one with two lines: a knob `shares: FilePath | None = None` in its config, and
`shares = shares_for(self.config.shares, anatomy)` in its plan.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from suite.errors import InputError
from suite.models.anatomy import Anatomy
from suite.specs import Frozen, explain

_MORE = 3


class LinearShare(Frozen):
    """A linear of the model an allocation was made for, and the share of its weights it keeps."""

    out_features: int
    in_features: int
    share: float = Field(ge=0, le=1)


class Allocation(Frozen):
    """A budget spread over the linears of one model."""

    kind: Literal["weighin-allocation"] = "weighin-allocation"
    model: str
    model_digest: str
    method: str
    """The recipe that was profiled."""
    profile: str
    """Digest of the profile's contents."""
    budget: str
    predicted_increase: float
    """Sum of the parts' measured increases of log-perplexity, in nats per token."""
    linears: dict[str, LinearShare]


def load_allocation(file: Path) -> Allocation:
    """Read an allocation file.

    Raises:
        InputError: it cannot be read, or is not an allocation.
    """
    how = "weighin profile --allocate BUDGET writes one."
    try:
        return Allocation.model_validate_json(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"allocation file '{file}' cannot be read: {error}. {how}") from None
    except ValidationError as error:
        raise InputError(f"allocation file '{file}': {explain(error, Allocation)} {how}") from None


def shares_for(file: Path, anatomy: Anatomy) -> dict[str, float]:
    """Kept share in [0, 1] by path of every linear of `anatomy`.

    Raises:
        InputError: the file was made for a model of other linears.
    """
    allocation = load_allocation(file)
    given = {path: (line.out_features, line.in_features) for path, line in allocation.linears.items()}
    met = {line.path: (line.out_features, line.in_features) for line in anatomy.linears}
    if given != met:
        differing = sorted(path for path in given | met if given.get(path) != met.get(path))
        shown = ", ".join(differing[:_MORE]) + (", ..." if len(differing) > _MORE else "")
        raise InputError(
            f"allocation file '{file}' was made for the linears of {allocation.model}; those of this model"
            f" differ ({shown}). Make one for this model with weighin profile --allocate, and put the"
            " method that uses it before any stage that changes shapes."
        )
    return {path: line.share for path, line in allocation.linears.items()}
