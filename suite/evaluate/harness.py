"""Zero-shot accuracy through lm-eval, with the outcome of every item.

Embedded tasks come from `tasks/embedded/*.jsonl`; all others are lm-eval's own tasks, whose data
alone is replaced by the data directory when one is given.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from suite import seal
from suite.errors import InputError, nearest
from suite.evaluate.items import Item, rows_from_samples, spread
from suite.records import TaskResult
from suite.specs import Protocol, TaskSpec

EMBEDDED = Path(str(resources.files("tasks"))) / "embedded"

DEFAULT_FEWSHOT_SEED = 1234

# Task -> split that lm-eval scores -> file in the data directory.
DATA_FILES: dict[str, dict[str, str]] = {
    "arc_easy": {"test": "arc_easy/validation.jsonl"},
    "arc_challenge": {"test": "arc_challenge/validation.jsonl"},
    "openbookqa": {"test": "openbookqa/validation.jsonl"},
    "lambada_openai": {"test": "lambada_openai/validation.jsonl"},
    "gsm8k": {"test": "gsm8k/validation.jsonl", "train": "gsm8k/train.jsonl.gz"},
    "mmlu": {"test": "mmlu/validation.jsonl", "dev": "mmlu/dev.jsonl"},
    "piqa": {"validation": "piqa/validation.jsonl"},
    "hellaswag": {"validation": "hellaswag/validation.jsonl"},
    "winogrande": {"validation": "winogrande/validation.jsonl"},
    "boolq": {"validation": "boolq/validation.jsonl"},
    "triviaqa": {"validation": "triviaqa/validation.jsonl"},
}


def embedded_tasks() -> list[str]:
    """Names of the tasks that ship with the suite."""
    return sorted(path.stem for path in EMBEDDED.glob("*.jsonl"))


def check_tasks(protocol: Protocol) -> None:
    """Refuse a protocol that names a task nobody knows, before any model is loaded.

    Raises:
        InputError: with the nearest known name.
    """
    known = set(embedded_tasks()) | set(DATA_FILES)
    unknown = [task.name for task in protocol.tasks if task.name not in known]
    if unknown:
        known |= set(_task_manager(True).all_tasks)
    for name in unknown:
        if name not in known:
            raise InputError(
                f"protocol '{protocol.name}': no task is called '{name}'.{nearest(name, known)}"
                f"  (weighin tasks lists them; any lm-eval task can be named.)"
            )


def check_task_files(protocol: Protocol, folder: Path | None) -> None:
    """Refuse a data directory that lacks a file of the protocol's tasks, before any model is compressed.

    Raises:
        InputError: with the file.
    """
    for task in protocol.tasks:
        _specifications(task.name, folder)


def load_tasks(name: str, folder: Path | None) -> dict[str, Any]:
    """lm-eval task objects by name; several for a group such as MMLU.

    Raises:
        InputError: the task's data is neither in the data directory nor on the hub.
        seal.Trespass: a method asks for them while it compresses.
    """
    seal.refuse_items(name)
    known = {*embedded_tasks(), *DATA_FILES}
    if name not in known and name not in _task_manager(True).all_tasks:
        raise InputError(f"no task is called '{name}'.{nearest(name, known)}")
    try:
        with _without_bars():
            return dict(_task_manager(not _is_embedded(name)).load(_specifications(name, folder))["tasks"])
    except InputError:
        raise
    except Exception as error:  # lm-eval fails in many ways on files that do not fit
        lines = str(error).splitlines() or [""]
        hint = "Offline, name a data directory with --data-dir." if folder is None else f"(From {folder}.)"
        raise InputError(
            f"the data of task '{name}' cannot be loaded ({type(error).__name__}: {lines[0]}). {hint}"
        ) from None


class Scorer:
    """Scores items of a protocol's tasks on one model: all of them, some, or more and more of them."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        protocol: Protocol,
        folder: Path | None = None,
    ):
        """`folder` is the data directory, None for the hub."""
        from suite.evaluate.model import WeighinLM

        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that is not a name
        self.protocol, self.folder = protocol, folder
        self.harness = WeighinLM(model, tokenizer=tokenizer, tokens_per_batch=protocol.tokens_per_batch)
        self._tasks: dict[str, dict[str, Any]] = {}

    def items(self, spec: TaskSpec, limit: int | None = None) -> list[Item]:
        """The items of a task, `limit` of them when given, spread over the parts of a group (see `spread`).

        Raises:
            InputError: the task's data cannot be loaded.
        """
        sizes = {name: len(task.eval_docs) for name, task in self._load(spec.name).items()}
        return spread(sizes, min((given for given in (limit, spec.limit) if given is not None), default=None))

    def score(self, spec: TaskSpec, chosen: Sequence[Item]) -> list[dict[str, Any]]:
        """One row (see `suite.evaluate.items`) for each of the chosen items.

        Raises:
            InputError: the task lacks the protocol's metric or filter.
        """
        from lm_eval.evaluator import evaluate as lm_evaluate

        # lm-eval reads an empty list of samples as "all of them".
        samples: dict[str, list[int]] = {}
        for name, index in chosen:
            samples.setdefault(name, []).append(index)
        tasks = {name: self._load(spec.name)[name] for name in samples}
        with _without_bars():
            output = lm_evaluate(
                lm=self.harness,
                task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
                samples=samples,
                bootstrap_iters=0,
                log_samples=True,
            )
        rows: list[dict[str, Any]] = []
        for name, logged in output["samples"].items():
            kept = [sample for sample in logged if sample["filter"] == spec.filter]
            if not kept:
                filters = sorted({sample["filter"] for sample in logged})
                raise InputError(
                    f"task '{spec.name}' has no filter '{spec.filter}' (it has {', '.join(filters)})."
                )
            if spec.metric not in kept[0]:
                raise InputError(f"task '{spec.name}' has no metric '{spec.metric}'.")
            rows += rows_from_samples(spec.name, name, spec.metric, kept)
        return rows

    def result(self, spec: TaskSpec, rows: Sequence[dict[str, Any]]) -> TaskResult:
        """The accuracy that rows of one task add up to."""
        first = next(iter(self._load(spec.name).values()))
        chances = [1 / len(row["log_likelihoods"]) for row in rows if len(row["log_likelihoods"]) > 1]
        mean = sum(row["correct"] for row in rows) / len(rows)
        return TaskResult(
            task=spec.name,
            metric=spec.metric,
            value=mean,
            standard_error=math.sqrt(mean * (1 - mean) / max(len(rows) - 1, 1)),
            items=len(rows),
            version=str(first.VERSION),
            fewshot=int(first.config.num_fewshot or 0),
            chance=sum(chances) / len(chances) if len(chances) == len(rows) else None,
        )

    def _load(self, name: str) -> dict[str, Any]:
        if name not in self._tasks:
            tasks = load_tasks(name, self.folder)
            for task in tasks.values():  # as lm-eval's own command does
                if task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
                task.set_fewshot_seed(seed=DEFAULT_FEWSHOT_SEED)
            self._tasks[name] = tasks
        return self._tasks[name]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol,
    *,
    folder: Path | None = None,
    limit: int | None = None,
    progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> tuple[list[TaskResult], list[dict[str, Any]]]:
    """Score every task of the protocol; returns the results and one row per item."""
    scorer = Scorer(model, tokenizer, protocol, folder)
    results, items = [], []
    for index, spec in enumerate(protocol.tasks):
        progress(spec.name, index, len(protocol.tasks))
        rows = scorer.score(spec, scorer.items(spec, limit))
        results.append(scorer.result(spec, rows))
        items += rows
    return results, items


def _specifications(name: str, folder: Path | None) -> list[str | dict[str, Any]]:
    if _is_embedded(name):
        shared = yaml.safe_load((EMBEDDED / "task.yaml").read_text())
        return [shared | {"task": name, **_local({"test": str(EMBEDDED / f"{name}.jsonl")})}]
    if folder is None or name not in DATA_FILES:
        return [name]
    files = {split: folder / file for split, file in DATA_FILES[name].items()}
    for path in files.values():
        if not path.is_file():
            raise InputError(
                f"task '{name}': the data directory has no file '{path}'.  (weighin data pull fetches it.)"
            )
    settings = _local({split: str(path) for split, path in files.items()})
    # lm-eval fails on a split that is named but absent.
    for split in ("training_split", "validation_split", "test_split"):
        used = {"training_split": "train", "validation_split": "validation", "test_split": "test"}[split]
        settings[split] = used if used in files else None
    members = [{"task": name, **settings}]
    if name == "mmlu":
        members = [
            {"task": f"mmlu_{subject}", **settings, "process_docs": functools.partial(_only, subject=subject)}
            for subject in _subjects(files["test"])
        ]
    # Inside a group, lm-eval merges these settings into its own task of that name.
    return [{"group": f"{name}_offline", "task": members}]


def _is_embedded(name: str) -> bool:
    return (EMBEDDED / f"{name}.jsonl").is_file()


def _local(files: dict[str, str]) -> dict[str, Any]:
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}


def _subjects(path: Path) -> list[str]:
    from suite.data import read_jsonl

    return sorted({row["subject"] for row in read_jsonl(path)})


def _only(dataset: Any, subject: str) -> Any:
    return dataset.filter(lambda row: row["subject"] == subject)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep lm-eval's progress bars, which cannot be switched off, out of the caller's own display."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


@functools.cache
def _task_manager(defaults: bool) -> Any:
    """lm-eval's task index; its own thousands of tasks, which take seconds to read, only when needed."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)
