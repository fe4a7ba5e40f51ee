"""From rows to token ids: prompts with options, prompts with answers, plain text pairs.

A prompt that is too long loses the end of its context column, never its question, options or answer; how many rows were
shortened is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from .templates import Row, Task

Form = Literal["options", "mask", "answers", "classes"]
"""How a task is put: options after a prompt, a verbalizer at a mask, a generated answer, or classes of a plain head."""


@dataclass
class EncodedRows:
    """Encoded rows, usable as a map-style data set.

    Attributes:
        examples: one dictionary per row, as the collator of the form wants it.
        shortened: number of rows whose context was cut to fit.
    """

    examples: list[dict[str, Any]]
    shortened: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.examples[i]


def encode_rows(
    task: Task, rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, form: Form | None = None
) -> EncodedRows:
    """Encode all rows of a task.

    Args:
        task: the task.
        rows: as `hf_zo.tasks.load_rows` gives them.
        tokenizer: of the model; for ``mask`` it needs a mask token.
        max_length: most tokens of a row.
        form: how the task is put; default ``options``, or ``answers`` for tasks without options.

    Raises:
        ValueError: if a row cannot be made to fit, a verbalizer is not a single token, or the task lacks the form.
    """
    form = form or ("options" if task.options is not None else "answers")
    encoders = {"options": _options, "mask": _mask, "answers": _answer, "classes": _classes}
    if form not in encoders:
        raise ValueError(f"form={form!r} does not exist; choose one of {', '.join(encoders)}.")
    encoder = encoders[form]
    if (form == "answers") != (task.options is None):
        raise ValueError(f"{task.name} cannot be put as {form!r}.")
    encoded = EncodedRows([])
    for row in rows:
        example, cut = encoder(task, row, tokenizer, max_length)
        encoded.examples.append(example)
        encoded.shortened += cut
    return encoded


def _target(task: Task, row: Row) -> int:
    return task.target(row) if task.target is not None else int(row[task.label or "label"])


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token a causal model's tokenizer puts first, if it does."""
    special = tokenizer("")["input_ids"]
    return special[:1] if special and special[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id) else []


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _fitted(
    task: Task, row: Row, tokenizer: PreTrainedTokenizerBase, endings: Sequence[str], room: int
) -> tuple[list[list[int]], list[int], bool]:
    """Token ids of prompt + each ending, the number of leading tokens they owe to the prompt, and whether it was cut."""
    shorter = dict(row)
    cut = False
    for _ in range(8):  # cutting text changes how it is split into tokens, so it may take more than one go
        prompt = task.prompt(shorter)
        alone = _plain(tokenizer, prompt)
        joined = [_plain(tokenizer, prompt + ending) for ending in endings]
        surplus = max(map(len, joined)) - room
        if surplus <= 0:
            return joined, [_common(alone, ids) for ids in joined], cut
        context = str(shorter[task.context])
        shortened = _shortened(tokenizer, context, surplus)
        if shortened is None:
            break
        shorter[task.context] = shortened if len(shortened) < len(context) else context[: len(context) // 2]
        cut = True
    raise ValueError(
        f"A {task.name} prompt does not fit into {room} tokens even without its {task.context!r}; raise max_seq_length. "
        f"It begins: {task.prompt(row)[:80]!r}"
    )


def _shortened(tokenizer: PreTrainedTokenizerBase, text: str, surplus: int) -> str | None:
    """A text without its last tokens; None if it has none at all."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    ids = encoded["input_ids"]
    if not ids:
        return None
    kept = max(0, len(ids) - surplus)
    if not tokenizer.is_fast:  # does not tell where its tokens are from
        return str(tokenizer.decode(ids[:kept], skip_special_tokens=True))
    places = encoded["offset_mapping"]
    return text[: min(places[kept - 1][1], places[kept][0])] if kept else ""  # a character of several tokens goes as a whole


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning, short of all of ``b``: an ending has at least one token."""
    n = 0
    while n < min(len(a), len(b) - 1) and a[n] == b[n]:
        n += 1
    return n


def _options(task: Task, row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[dict[str, Any], bool]:
    assert task.options is not None
    start = _start(tokenizer)
    joined, shared, cut = _fitted(task, row, tokenizer, task.options(row), max_length - len(start))
    rows = [start + ids for ids in joined]
    begins = [len(start) + n for n in shared]
    if any(begin == 0 for begin in begins):
        raise ValueError(f"A {task.name} prompt has no token before its options, so nothing predicts them.")
    one_row = all(ids[:-1] == rows[0][:-1] for ids in rows)  # nothing reads an option's last token
    scored = [
        (0 if one_row else r, position - 1, ids[position], r)
        for r, (ids, begin) in enumerate(zip(rows, begins, strict=True))
        for position in range(begin, len(ids))
    ]
    rows = [rows[0][:-1]] if one_row else rows
    return {"rows": rows, "scored": scored, "target": _target(task, row)}, cut


def _mask(task: Task, row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[dict[str, Any], bool]:
    assert task.options is not None
    if tokenizer.mask_token_id is None:
        raise ValueError("This tokenizer has no mask token; a verbalizer at a mask needs a masked language model.")
    options = task.options(row)
    tokens = []
    for option in options:
        ids = _plain(tokenizer, " " + option.strip())
        if len(ids) != 1:
            raise ValueError(f"Verbalizer {option.strip()!r} of {task.name} is {len(ids)} tokens; a mask stands for one.")
        if ids[0] == tokenizer.unk_token_id:
            raise ValueError(f"Verbalizer {option.strip()!r} of {task.name} is not in the tokenizer's vocabulary.")
        tokens.append(ids[0])
    start = _start(tokenizer)
    end = tokenizer("")["input_ids"][len(start) :]
    ending = f" {tokenizer.mask_token}."
    joined, _, cut = _fitted(task, row, tokenizer, [ending], max_length - len(start) - len(end))
    ids = [*start, *joined[0], *end]
    position = len(ids) - 1 - ids[::-1].index(tokenizer.mask_token_id)
    scored = [(0, position, token, option) for option, token in enumerate(tokens)]
    return {"rows": [ids], "scored": scored, "target": _target(task, row)}, cut


def _answer(task: Task, row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[dict[str, Any], bool]:
    assert task.answers is not None
    start = _start(tokenizer)
    # The answer ends with a new line, where generation stops.
    joined, shared, cut = _fitted(task, row, tokenizer, [f" {task.answers(row)[0].strip()}\n"], max_length - len(start))
    ids = start + joined[0]
    begin = len(start) + shared[0]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * begin + ids[begin:]}, cut


def _classes(task: Task, row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[dict[str, Any], bool]:
    if not task.texts:
        raise ValueError(f"{task.name} has no plain text form for a classification head; use its prompts.")
    texts = [str(row[name]) for name in task.texts]
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    cut = len(encoded["input_ids"]) == max_length and len(tokenizer(*texts)["input_ids"]) > max_length
    return {**encoded, "labels": _target(task, row)}, cut
