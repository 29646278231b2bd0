"""Zero-shot items: the same prompts and likelihoods as lm-eval's own model, item by item."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from suite.conformance import tiny
from suite.data import read_jsonl
from suite.errors import InputError
from suite.evaluate.harness import DATA_FILES, EMBEDDED, check_tasks, embedded_tasks, evaluate, load_tasks
from suite.evaluate.items import COLUMNS, frame
from suite.specs import CalibrationSpec, PerplexitySpec, Protocol, TaskSpec

METRICS = {"gsm8k": ("exact_match", "strict-match"), "triviaqa": ("exact_match", "remove_whitespace")}
CHANCE = {"arc_easy": 0.25, "arc_challenge": 0.25, "openbookqa": 0.25, "mmlu": 0.25, "hellaswag": 0.25}
CHANCE |= {"piqa": 0.5, "winogrande": 0.5, "boolq": 0.5}


@pytest.fixture(autouse=True)
def _no_environment_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks pip and the system for their versions on every run, which takes longer than the run."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def protocol(*tasks: TaskSpec | str, tokens_per_batch: int = 128) -> Protocol:
    return Protocol(
        name="test",
        description="",
        calibration=CalibrationSpec(source="pydoc", count=1, length=8),
        perplexity=PerplexitySpec(source="pydoc", window=8),
        tasks=tuple(TaskSpec(name=t, metric="acc") if isinstance(t, str) else t for t in tasks),
        tokens_per_batch=tokens_per_batch,
    )


def documented(name: str) -> list[dict[str, Any]]:
    return read_jsonl(EMBEDDED / f"{name}.jsonl")


def direct(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str, limit: int, folder: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What lm-eval makes of an embedded task on its own: a task file, its own model, nothing of ours."""
    settings = yaml.safe_load((EMBEDDED / "task.yaml").read_text()) | {
        "task": f"direct_{name}",
        "dataset_kwargs": {"data_files": {"test": str(EMBEDDED / f"{name}.jsonl")}},
    }
    (folder / "direct.yaml").write_text(yaml.safe_dump(settings))
    output = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
        tasks=[f"direct_{name}"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = sorted(output["samples"][f"direct_{name}"], key=lambda sample: sample["doc_id"])
    return samples, output["results"][f"direct_{name}"]


@pytest.mark.parametrize(("name", "metric"), [("science", "acc_norm"), ("minimal_pairs", "acc")])
def test_items_equal_a_direct_run_of_the_harness(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str, metric: str
) -> None:
    samples, summary = direct(llama, tokenizer, name, 12, tmp_path)
    task = TaskSpec(name=name, metric=metric, limit=12)
    (result,), rows = evaluate(llama, tokenizer, protocol(task))
    assert len(rows) == len(samples) == 12
    for row, sample in zip(rows, samples, strict=True):
        assert row["hash"] == sample["doc_hash"]
        assert row["log_likelihoods"] == pytest.approx(
            [answer[0] for answer in sample["filtered_resps"]], rel=1e-5
        )
        assert row["correct"] == sample[metric]
        assert row["target"] == str(sample["target"])
        assert (row["prediction"] == row["target"]) == bool(row["correct"])
    assert result.value == pytest.approx(summary[f"{metric},none"])
    ours = load_tasks(name, None)[name]
    ours.build_all_requests(limit=12, rank=0, world_size=1)
    prompts = [instance.args for instance in ours.instances]
    theirs = [tuple(argument) for sample in samples for argument in sample["arguments"]]
    assert [tuple(args[:2]) for args in prompts] == [args[:2] for args in theirs]


@torch.inference_mode()
def test_likelihoods_are_those_the_model_itself_gives(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    _, rows = evaluate(model, tokenizer, protocol(TaskSpec(name="physical", metric="acc", limit=3)))
    for row, item in zip(rows, documented("physical"), strict=False):
        prompt = tokenizer(item["prompt"]).input_ids
        for option, got in zip(item["options"], row["log_likelihoods"], strict=True):
            answer = tokenizer(" " + option).input_ids
            logits = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
            expected = sum(
                float(logits[len(prompt) + position - 1, token]) for position, token in enumerate(answer)
            )
            assert got == pytest.approx(expected, rel=1e-5)


def test_a_result_is_the_mean_of_its_items(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    tasks = [
        TaskSpec(name="science", metric="acc_norm", limit=20),
        TaskSpec(name="pronoun", metric="acc", limit=9),
    ]
    seen: list[tuple[str, int, int]] = []
    results, rows = evaluate(llama, tokenizer, protocol(*tasks), progress=lambda *at: seen.append(at))
    assert [result.task for result in results] == ["science", "pronoun"]
    assert seen[:1] == [("science", 0, 2)]
    for result, items in zip(results, (20, 9), strict=True):
        own = [row for row in rows if row["task"] == result.task]
        mean = sum(row["correct"] for row in own) / len(own)
        assert result.items == len(own) == items
        assert result.value == pytest.approx(mean)
        assert result.standard_error == pytest.approx(math.sqrt(mean * (1 - mean) / (items - 1)))
        assert result.fewshot == 0
        assert result.chance is not None
        choices = [len(item["options"]) for item in documented(result.task)[:items]]
        assert result.chance == pytest.approx(sum(1 / count for count in choices) / items)
    table = frame(rows)
    assert list(table.columns) == COLUMNS
    assert table["item"].tolist()[:20] == [item["id"] for item in documented("science")[:20]]
    assert set(table["family"]) == {"science", "pronoun"}


@pytest.mark.parametrize(
    ("of_task", "of_run", "found"), [(7, None, 7), (None, 5, 5), (7, 5, 5), (3, 5, 3), (10**6, None, None)]
)
def test_the_smaller_of_two_limits_is_respected(
    llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    of_task: int | None,
    of_run: int | None,
    found: int | None,
) -> None:
    task = TaskSpec(name="pronoun", metric="acc", limit=of_task)
    (result,), rows = evaluate(llama, tokenizer, protocol(task, tokens_per_batch=1024), limit=of_run)
    expected = documented("pronoun")[:found]
    assert result.items == len(rows) == len(expected)
    assert [row["item"] for row in rows] == [item["id"] for item in expected]


def test_the_batch_size_changes_no_outcome(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    task = TaskSpec(name="next", metric="acc_norm", limit=10)
    one, many = (evaluate(llama, tokenizer, protocol(task, tokens_per_batch=size))[1] for size in (1, 4096))
    for first, second in zip(one, many, strict=True):
        assert first["log_likelihoods"] == pytest.approx(second["log_likelihoods"], rel=1e-5)
        assert first["correct"] == second["correct"]


def test_evaluation_leaves_a_compressed_model_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny.build("llama")
    tiny.compress(model, "svd(share=0.8)+rtn-int4(embedding=4)")
    before = tiny.logits_of(model)
    evaluate(model, tokenizer, protocol(TaskSpec(name="science", metric="acc", limit=2)))
    assert torch.equal(tiny.logits_of(model), before)


@pytest.mark.parametrize("name", embedded_tasks())
def test_every_embedded_task_loads_all_its_items(name: str) -> None:
    (task,) = load_tasks(name, None).values()
    items = documented(name)
    assert len(task.eval_docs) == len(items)
    for document, item in zip(task.eval_docs, items, strict=True):
        assert task.doc_to_text(document) == item["prompt"]
        assert task.doc_to_choice(document) == item["options"]
        assert task.doc_to_target(document) == item["answer"]


def test_an_unknown_task_is_offered_the_nearest() -> None:
    for name, near in (("minimal_pair", "minimal_pairs"), ("helaswag", "hellaswag")):
        with pytest.raises(InputError, match=f"no task is called '{name}'. Did you mean '{near}'"):
            load_tasks(name, None)
        with pytest.raises(InputError, match=f"protocol 'test': no task is called '{name}'. Did you mean"):
            check_tasks(protocol("physical", name))


def test_a_task_that_only_the_harness_knows_may_be_named() -> None:
    check_tasks(protocol("physical", "arc_easy", "copa"))


def test_a_metric_the_task_does_not_have_is_refused(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    for task, says in (
        (TaskSpec(name="science", metric="exact_match", limit=1), "has no metric 'exact_match'"),
        (
            TaskSpec(name="science", metric="acc", filter="strict", limit=1),
            r"has no filter 'strict' \(it has none\)",
        ),
    ):
        with pytest.raises(InputError, match=says):
            evaluate(llama, tokenizer, protocol(task))


def test_data_that_is_missing_or_does_not_fit_is_refused_by_the_name_of_the_task(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"task 'piqa': the data directory has no file .*piqa"):
        load_tasks("piqa", tmp_path)
    for name, content in (
        ("hellaswag", '{"wrong": 1}\n'),
        ("piqa", ""),
        ("winogrande", '{"sentence": \n'),
        ("openbookqa", '{"wrong": 1}\n'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "validation.jsonl").write_text(content)
        with pytest.raises(InputError, match=f"the data of task '{name}' cannot be loaded"):
            load_tasks(name, tmp_path)


def test_without_a_data_directory_the_hub_is_asked_and_its_absence_explained() -> None:
    with pytest.raises(InputError, match=r"the data of task 'arc_easy' cannot be loaded .*--data-dir"):
        load_tasks("arc_easy", None)


@pytest.mark.parametrize("name", DATA_FILES)
def test_a_task_reads_every_row_of_the_data_directory(data_folder: Path, name: str) -> None:
    tasks = load_tasks(name, data_folder)
    scored = next(iter(DATA_FILES[name].values()))
    rows = read_jsonl(data_folder / scored)
    assert sum(len(task.eval_docs) for task in tasks.values()) == len(rows)
    if name == "mmlu":
        assert set(tasks) == {f"mmlu_{row['subject']}" for row in rows}
        for task_name, task in tasks.items():
            assert {f"mmlu_{document['subject']}" for document in task.eval_docs} == {task_name}
    else:
        assert list(tasks) == [name]


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA_FILES)
def test_a_task_of_the_data_directory_is_scored_item_by_item(
    data_folder: Path, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    metric, chosen = METRICS.get(name, ("acc", "none"))
    task = TaskSpec(name=name, metric=metric, filter=chosen)  # type: ignore[arg-type]
    limit = 1 if name == "gsm8k" else 5
    (result,), rows = evaluate(
        tiny.build("llama"), tokenizer, protocol(task, tokens_per_batch=256), folder=data_folder, limit=limit
    )
    assert result.items == len(rows) == limit
    assert result.value == pytest.approx(sum(row["correct"] for row in rows) / limit)
    assert result.fewshot == (5 if name == "gsm8k" else 0)
    assert result.chance == (pytest.approx(CHANCE[name], abs=0.03) if name in CHANCE else None)
    assert len({row["hash"] for row in rows}) == limit
    if name == "mmlu":
        assert len({row["subtask"] for row in rows}) == limit  # spread over the subjects
    for row in rows:
        assert row["task"] == name
        assert all(math.isfinite(value) for value in row["log_likelihoods"])


def test_a_multiple_choice_task_of_the_data_directory_keeps_the_prompt_of_its_own_task_file(
    data_folder: Path,
) -> None:
    (task,) = load_tasks("arc_easy", data_folder).values()
    row = read_jsonl(data_folder / DATA_FILES["arc_easy"]["test"])[0]
    assert task.doc_to_text(row) == f"Question: {row['question']}\nAnswer:"
    assert task.doc_to_choice(row) == row["choices"]["text"]
    assert task.doc_to_target(row) == row["choices"]["label"].index(row["answerKey"])


def test_mmlu_of_a_small_data_directory_is_split_by_subject(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, llama: PreTrainedModel
) -> None:
    (tmp_path / "mmlu").mkdir()
    rows = [
        {"question": f"{subject} {n}?", "subject": subject, "choices": ["a", "b", "c", "d"], "answer": n % 4}
        for subject, count in (("anatomy", 3), ("virology", 1), ("astronomy", 2))
        for n in range(count)
    ]
    for file in DATA_FILES["mmlu"].values():
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TaskSpec(name="mmlu", metric="acc")
    for limit, expected in ((2, 2), (4, 4), (5, 5), (None, 6), (50, 6)):
        (result,), items = evaluate(llama, tokenizer, protocol(task), folder=tmp_path, limit=limit)
        assert result.items == len(items) == expected
        subjects = [item["subtask"] for item in items]
        assert len(set(subjects)) == min(expected, 3)
    assert sorted(set(subjects)) == ["mmlu_anatomy", "mmlu_astronomy", "mmlu_virology"]
    assert subjects.count("mmlu_anatomy") == 3
