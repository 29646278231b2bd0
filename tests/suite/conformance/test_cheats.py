"""Every cheat in the zoo is caught, by the check that is made for it, with words that name the offence."""

from __future__ import annotations

from pathlib import Path

import pytest

from suite.conformance.trial import Subject, examine, subjects_of

pytestmark = pytest.mark.slow

ZOO = sorted((Path(__file__).parent / "zoo").glob("*.py"))

CAUGHT = {
    "dense-in-attribute": ("resident memory", "mlp", "keeps it in attribute '_orig'"),
    "dense-in-array": ("resident memory", "keeps it in attribute '_array'", "array"),
    "dense-in-closure": ("resident memory", "keeps it in attribute 'forward' (the closure of InClosure"),
    "dense-in-buffer": ("resident memory", "in a non-persistent buffer"),
    "dense-in-global": ("resident memory", "keeps it in the global '_DENSE'", "modules"),
    "wide-words": ("counted honestly", "weights packed into wider words are under-counted"),
    "lying-count": ("counted honestly", "Liar counts its own parameters"),
    "stowaway": ("counted honestly", "residual", "it would be under-counted"),
    "weights-in-index": ("counted honestly", ".index is not the places of 1 kept values"),
    "weights-in-arguments": ("counts equal the ledger", "its constructor arguments are"),
    "returns-dense": ("budget met", "over budget"),
    "plans-too-much": ("counts equal the ledger", "not as planned"),
    "forgets-tie": ("counts equal the ledger", "not as planned"),
    "wrong-smallest": ("impossible budgets refused", "is called the smallest size, but asked for it refuses"),
    "fickle-plan": ("plans are repeatable", "differ"),
    "non-deterministic": ("deterministic", "wrote different model.safetensors"),
    "opens-items": ("evaluation items untouched", "opened the evaluation data", "physical.jsonl"),
    "loads-tasks": ("evaluation items untouched", "read the evaluation items of task 'physical'"),
    "reads-held-out": ("evaluation items untouched", "read the evaluation text 'pydoc-held-out'"),
    "keeps-state": ("no state between calls", "a module keeps state between calls"),
    "sees-the-future": ("cache equals no cache", "with a key-value cache the logits differ"),
    "changes-tokenizer": ("tokenizer unchanged", "the tokenizer was changed"),
    "changes-config": ("config unchanged", "'max_position_embeddings' was changed from 512 to 1024"),
    "changes-end": ("config unchanged", "generation setting 'eos_token_id' was changed from 257 to 3"),
    "rare-nan": ("finite", "model.embed_tokens.weight", "row 299"),
    "sleeps": ("not silently slow", "× the dense model's time"),
    "no-gradient": ("trains", "no finite gradient reaches"),
    "loses-biases": ("biases kept", "the bias is lost in query of block 0"),
}


@pytest.fixture(scope="module")
def zoo() -> dict[str, Subject]:
    return {subject.recipe: subject for file in ZOO for subject in subjects_of(str(file))}


@pytest.mark.parametrize("name", CAUGHT)
def test_every_cheat_is_caught_by_its_check(name: str, zoo: dict[str, Subject]) -> None:
    check, *words = CAUGHT[name]
    examination = examine(zoo[name], families=["qwen2" if name == "loses-biases" else "llama"])
    finding = examination.finding(check)
    assert not examination.passed
    assert finding.status == "failed", [(f.check.name, f.details) for f in examination.findings]
    for word in words:
        assert word in " ".join(finding.details)


def test_every_cheat_in_the_zoo_is_expected_to_be_caught(zoo: dict[str, Subject]) -> None:
    assert set(zoo) == set(CAUGHT)
