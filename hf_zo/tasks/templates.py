"""The tasks: where their data is, how a row becomes a prompt, and what the options or answers are.

Prompts of the tasks in MeZO's OPT experiments follow the table of prompts in the appendix of arXiv 2305.17333, so that
numbers can be compared; the remaining GLUE tasks are worded in the same manner. An option is appended to the prompt, and the
white space between them belongs to the option.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """One prompted task.

    Attributes:
        name: as on the command line.
        dataset: repository of the data set on the Hub.
        config: its configuration, None for the default.
        fields: columns that a row must have, the label's not included.
        prompt: makes the prompt of a row.
        options: the candidate continuations of a row; None for tasks whose answer is generated.
        context: the column that is shortened when a prompt does not fit.
        metrics: names that `hf_zo.tasks.metrics_for` reports.
        label: column with the right option's number; None where ``target`` finds it.
        target: number of the right option of a row, where it is not simply a column.
        answers: the acceptable answers of a row of a generation task.
        texts: the one or two text columns of the plain classification form.
        group: tells which rows belong together, where a metric is over groups of rows.
    """

    name: str
    dataset: str
    config: str | None
    fields: tuple[str, ...]
    prompt: Callable[[Row], str]
    options: Callable[[Row], list[str]] | None
    context: str
    metrics: tuple[str, ...] = ("accuracy",)
    label: str | None = "label"
    target: Callable[[Row], int] | None = None
    answers: Callable[[Row], list[str]] | None = None
    texts: tuple[str, ...] = ()
    group: Callable[[Row], Hashable] | None = None

    @property
    def family(self) -> str:
        """``glue``, ``superglue`` or ``squad``: the example script that runs it."""
        if self.options is None:
            return "squad"
        return "superglue" if self.dataset == _SUPERGLUE else "glue"


def _fixed(*options: str) -> Callable[[Row], list[str]]:
    return lambda row: list(options)


_YES_NO = _fixed("\nYes", "\nNo")
_NO_YES = _fixed("\nNo", "\nYes")
_GLUE = "nyu-mll/glue"
_SUPERGLUE = "aps/super_glue"


def _entailment(first: str, second: str, answers: str) -> Callable[[Row], str]:
    return lambda row: f'{row[first]}\nDoes this mean that "{row[second]}" is true? {answers}'


def _same_meaning(first: str, second: str, noun: str) -> Callable[[Row], str]:
    return lambda row: f"{row[first]}\n{row[second]}\nDo these two {noun} mean the same? Yes or No?"


def _glue(
    name: str, texts: tuple[str, ...], prompt: Callable[[Row], str], options: Any, *metrics: str, context: str | None = None
) -> Task:
    return Task(name, _GLUE, name, texts, prompt, options, context or texts[0], metrics or ("accuracy",), texts=texts)


def _superglue(name: str, fields: tuple[str, ...], context: str, prompt: Any, options: Any, **more: Any) -> Task:
    return Task(name, _SUPERGLUE, name, fields, prompt, options, context, **more)


def _copa_prompt(row: Row) -> str:
    return f"{str(row['premise']).rstrip().rstrip('.')} {'so' if row['question'] == 'effect' else 'because'}"


def _copa_options(row: Row) -> list[str]:
    choices = [str(row[name]).split(" ") for name in ("choice1", "choice2")]
    return [" ".join(["", first if first == "I" else first.lower(), *rest]) for first, *rest in choices]


def _record_options(row: Row) -> list[str]:
    return ["\n" + str(row["query"]).replace("@placeholder", entity) for entity in row["entities"]]


def _record_target(row: Row) -> int:
    return next((i for i, entity in enumerate(row["entities"]) if entity in row["answers"]), -1)


def _squad_answers(row: Row) -> list[str]:
    return list(row["answers"]["text"])


def _drop_answers(row: Row) -> list[str]:
    return list(row["answers_spans"]["spans"])


_ALL = [
    _glue("sst2", ("sentence",), lambda r: f"{str(r['sentence']).strip()} It was", _fixed(" terrible", " great")),
    _glue(
        "cola",
        ("sentence",),
        lambda r: f"{str(r['sentence']).strip()} This is",
        _fixed(" incorrect", " correct"),
        "matthews_correlation",
        "accuracy",
    ),
    _glue("mrpc", ("sentence1", "sentence2"), _same_meaning("sentence1", "sentence2", "sentences"), _NO_YES, "accuracy", "f1"),
    _glue("qqp", ("question1", "question2"), _same_meaning("question1", "question2", "questions"), _NO_YES, "accuracy", "f1"),
    _glue(
        "mnli",
        ("premise", "hypothesis"),
        _entailment("premise", "hypothesis", "Yes, No, or Maybe?"),
        _fixed("\nYes", "\nMaybe", "\nNo"),
    ),
    _glue(
        "qnli",
        ("question", "sentence"),
        lambda r: f'{r["sentence"]}\nDoes this answer the question "{r["question"]}"? Yes or No?',
        _YES_NO,
        context="sentence",
    ),
    _glue("rte", ("sentence1", "sentence2"), _entailment("sentence1", "sentence2", "Yes or No?"), _YES_NO),
    # Worded as SST-2 and with the label words of the paper's RoBERTa experiments.
    Task(
        "sst5",
        "SetFit/sst5",
        None,
        ("text",),
        lambda r: f"{str(r['text']).strip()} It was",
        _fixed(" terrible", " bad", " okay", " good", " great"),
        "text",
        texts=("text",),
    ),
    _superglue(
        "cb",
        ("premise", "hypothesis"),
        "premise",
        lambda r: f'Suppose {r["premise"]} Can we infer that "{r["hypothesis"]}"? Yes, No, or Maybe?',
        _fixed("\nYes", "\nNo", "\nMaybe"),
        metrics=("accuracy", "macro_f1"),
        texts=("premise", "hypothesis"),
    ),
    _superglue(
        "boolq",
        ("question", "passage"),
        "passage",
        lambda r: f"{r['passage']} {str(r['question'])[:1].upper()}{str(r['question'])[1:].rstrip('?')}?",
        _NO_YES,
        texts=("question", "passage"),
    ),
    _superglue(
        "wsc",
        ("text", "span1_text", "span2_text"),
        "text",
        lambda r: (
            f'{r["text"]}\nIn the previous sentence, does the pronoun "{str(r["span2_text"]).lower()}" refer to '
            f"{r['span1_text']}? Yes or No?"
        ),
        _NO_YES,
    ),
    _superglue(
        "wic",
        ("word", "sentence1", "sentence2"),
        "sentence1",
        lambda r: (
            f'Does the word "{r["word"]}" have the same meaning in these two sentences? Yes, No?\n'
            f"{r['sentence1']}\n{r['sentence2']}"
        ),
        _NO_YES,
    ),
    _superglue("copa", ("premise", "choice1", "choice2", "question"), "premise", _copa_prompt, _copa_options),
    _superglue(
        "multirc",
        ("paragraph", "question", "answer", "idx"),
        "paragraph",
        lambda r: (
            f'{r["paragraph"]}\nQuestion: {r["question"]}\nI found this answer "{r["answer"]}". Is that correct? Yes or No?'
        ),
        _NO_YES,
        metrics=("f1", "exact_match", "accuracy"),
        group=lambda r: (r["idx"]["paragraph"], r["idx"]["question"]),
    ),
    _superglue(
        "record",
        ("passage", "query", "entities", "answers"),
        "passage",
        lambda r: str(r["passage"]).replace("@highlight\n", "- "),
        _record_options,
        metrics=("exact_match", "f1"),
        label=None,
        target=_record_target,
    ),
    Task(
        "squad",
        "rajpurkar/squad",
        None,
        ("title", "context", "question", "answers"),
        lambda r: f"Title: {r['title']}\nContext: {r['context']}\nQuestion: {str(r['question']).strip()}\nAnswer:",
        None,
        "context",
        ("exact_match", "f1"),
        label=None,
        answers=_squad_answers,
    ),
    Task(
        "drop",
        "ucinlp/drop",
        None,
        ("passage", "question", "answers_spans"),
        lambda r: f"Passage: {r['passage']}\nQuestion: {str(r['question']).strip()}\nAnswer:",
        None,
        "passage",
        ("exact_match", "f1"),
        label=None,
        answers=_drop_answers,
    ),
]

TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def get_task(name: str, family: str | None = None) -> Task:
    """Look a task up.

    Raises:
        ValueError: if there is none of that name (in that family); the message lists those there are.
    """
    there = [t.name for t in _ALL if family is None or t.family == family]
    if name not in there:
        raise ValueError(f"task_name={name!r} does not exist; choose one of {', '.join(there)}.")
    return TASKS[name]
