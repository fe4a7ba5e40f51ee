import socket

import numpy as np
import pytest
from tasks.tiny import ROWS
from transformers import EvalPrediction

from hf_zo.tasks import TASKS, metrics_for

# 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
SAID = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
WANTED = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a metric asked for the network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def compute(name, said, wanted=None, rows=(), tokenizer=None):
    labels = {"target": np.asarray(wanted)} if wanted is not None else None
    return metrics_for(TASKS[name], rows, tokenizer)(EvalPrediction(predictions=np.asarray(said), label_ids=labels))


def test_accuracy():
    assert compute("sst2", SAID, WANTED) == {"accuracy": pytest.approx(0.7)}


def test_accuracy_and_f1():
    # precision 3/4, recall 3/5
    assert compute("mrpc", SAID, WANTED) == {"accuracy": pytest.approx(0.7), "f1": pytest.approx(2 / 3)}


def test_matthews_correlation():
    # (3*4 - 1*2) / sqrt(4 * 5 * 5 * 6)
    wanted = {"matthews_correlation": pytest.approx(10 / np.sqrt(600)), "accuracy": pytest.approx(0.7)}
    assert compute("cola", SAID, WANTED) == wanted


def test_matthews_correlation_has_a_sign():
    assert compute("cola", WANTED, WANTED)["matthews_correlation"] == pytest.approx(1)
    assert compute("cola", 1 - WANTED, WANTED)["matthews_correlation"] == pytest.approx(-1)
    assert compute("cola", np.ones(10, int), WANTED)["matthews_correlation"] == 0.0


def test_f1_without_any_positive_is_zero():
    assert compute("mrpc", [0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0}


def test_macro_f1():
    # Class 0: precision 1/2, recall 1. Class 1: precision 1, recall 2/3. Class 2: precision 1, recall 1/2.
    said, wanted = [0, 0, 0, 0, 1, 1, 2], [0, 0, 1, 2, 1, 1, 2]
    assert compute("cb", said, wanted) == {
        "accuracy": pytest.approx(5 / 7),
        "macro_f1": pytest.approx((2 / 3 + 4 / 5 + 2 / 3) / 3),
    }


def test_macro_f1_counts_a_class_that_was_only_said():
    # Class 0: precision 1, recall 1/2. Class 1: recall 1, precision 1. Class 2: never right.
    assert compute("cb", [0, 2, 1], [0, 0, 1])["macro_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_multirc_is_exact_over_all_answers_of_a_question():
    def row(paragraph, question, answer):
        return {**ROWS["multirc"][0], "idx": {"paragraph": paragraph, "question": question, "answer": answer}}

    # The same question number in two paragraphs is two questions; their answers need not be neighbours.
    rows = [row(0, 0, 0), row(0, 0, 1), row(0, 1, 2), row(1, 0, 3), row(0, 0, 4), row(1, 0, 5)]
    said, wanted = [1, 0, 1, 0, 1, 0], [1, 0, 1, 0, 0, 0]
    assert compute("multirc", said, wanted, rows) == {
        "f1": pytest.approx(2 * 2 / (3 + 2)),
        "exact_match": pytest.approx(2 / 3),
        "accuracy": pytest.approx(5 / 6),
    }


def test_record_compares_the_chosen_entity():
    rows = [
        {**ROWS["record"][0], "entities": ["Ann", "Bob Smith"], "answers": ["Bob", "Ann Jones"]},
        {**ROWS["record"][0], "entities": ["the Bob", "Eve"], "answers": ["Bob"]},
        {**ROWS["record"][0], "entities": ["Ann", "Eve"], "answers": ["Ann"]},
    ]
    # "Bob Smith" for "Bob": F1 2/3. "the Bob" for "Bob": the article does not count. "Eve": wrong.
    assert compute("record", [1, 0, 1], [0, 0, 0], rows) == {
        "exact_match": pytest.approx(1 / 3),
        "f1": pytest.approx((2 / 3 + 1 + 0) / 3),
    }


@pytest.mark.parametrize("name", ["squad", "drop"])
def test_answers_are_compared_with_the_best_reference(name, bpe):
    row, references = ROWS[name]
    said = [bpe(f" {references[1]}.\nAnd more")["input_ids"], bpe(" wrong")["input_ids"]]
    width = max(map(len, said))
    padded = [ids + [-100] * (width - len(ids)) for ids in said]
    got = compute(name, padded, rows=[row, row], tokenizer=bpe)
    assert got == {"exact_match": pytest.approx(0.5), "f1": pytest.approx(0.5)}


def test_class_logits_of_a_head():
    logits = np.array([[0.1, 0.9], [2.0, -1.0], [0.0, 0.5]])
    compute_metrics = metrics_for(TASKS["sst2"], [])
    for predictions in (logits, (logits, np.zeros(3))):
        prediction = EvalPrediction(predictions=predictions, label_ids=np.array([1, 0, 0]))
        assert compute_metrics(prediction) == {"accuracy": pytest.approx(2 / 3)}


def test_one_metric_serves_many_evaluations():
    compute_metrics = metrics_for(TASKS["sst2"], [])
    for said, accuracy in (([1, 1], 0.5), ([1, 0], 1.0), ([0, 1], 0.0)):
        prediction = EvalPrediction(predictions=np.array(said), label_ids={"target": np.array([1, 0])})
        assert compute_metrics(prediction) == {"accuracy": accuracy}


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.options is not None])
def test_every_task_reports_the_metrics_it_names(name):
    row, target = ROWS[name]
    assert tuple(compute(name, [target], [target], [row])) == TASKS[name].metrics
