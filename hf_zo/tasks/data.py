"""Loading rows: from the Hub, or from a local folder of JSON lines with the Hub's field names."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .templates import Task


class DataError(ValueError):
    """A data file that cannot be used, with file, line and field."""


def load_rows(
    task: Task,
    split: str,
    dataset_dir: str | Path | None = None,
    max_samples: int | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Load a split as a list of rows.

    Args:
        task: the task whose fields are needed.
        split: ``train``, ``validation`` or ``test``; MNLI's ``validation`` is its matched one on the Hub.
        dataset_dir: folder with ``<split>.jsonl`` or ``<split>.jsonl.gz``; None loads ``task.dataset`` from the Hub.
        max_samples: keep that many rows, drawn without replacement by ``seed``; of a task with groups (MultiRC's questions)
            whole groups, up to as many rows.
        seed: of the draw.

    Raises:
        FileNotFoundError: if the folder has no such split.
        ValueError: if ``max_samples`` is below 1.
        DataError: for an empty split, a row without a needed field, or a label that is no option's number.
    """
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples={max_samples} leaves no {split} rows; give at least 1, or leave it unset for all.")
    if dataset_dir is None:
        import datasets

        name = "validation_matched" if (task.name, split) == ("mnli", "validation") else split
        rows = [dict(row) for row in datasets.load_dataset(task.dataset, task.config, split=name)]
        source = f"{task.dataset}/{task.config or 'default'}/{name}"
    else:
        path = _find(Path(dataset_dir), split)
        rows, source = _read(path), str(path)
    if not rows:
        raise DataError(f"{source} is empty; {task.name} needs at least one row.")
    for number, row in enumerate(rows, start=1):
        _check(task, row, f"{source}, line {number}")
    if max_samples is not None and max_samples < len(rows):
        if task.group is not None:
            return _whole_groups(task.group, rows, max_samples, seed)
        chosen = np.random.default_rng(seed).permutation(len(rows))[:max_samples]
        rows = [rows[i] for i in chosen]
    return rows


def _whole_groups(
    key: Callable[[Mapping[str, Any]], Hashable], rows: list[dict[str, Any]], most: int, seed: int
) -> list[dict[str, Any]]:
    """Rows of groups drawn one after the other, whole, as exact match is over all of a group; one at least."""
    groups: dict[Hashable, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    of_groups, chosen = list(groups.values()), list[dict[str, Any]]()
    for i in np.random.default_rng(seed).permutation(len(of_groups)):
        if chosen and len(chosen) + len(of_groups[i]) > most:
            break
        chosen += of_groups[i]
    return chosen


def _find(folder: Path, split: str) -> Path:
    for name in (f"{split}.jsonl", f"{split}.jsonl.gz"):
        if (folder / name).is_file():
            return folder / name
    there = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "the folder does not exist"
    raise FileNotFoundError(f"dataset_dir={folder} has no {split}.jsonl or {split}.jsonl.gz (there: {there}).")


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            lines = list(file)
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged, or not in UTF-8 ({error}).") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object with the task's fields, got {type(row).__name__}.")
        rows.append(row)
    return rows


def _check(task: Task, row: dict[str, Any], where: str) -> None:
    needed = (*task.fields, task.label) if task.label else task.fields
    for name in needed:
        if row.get(name) is None:
            raise DataError(f"{where}: field {name!r} is missing; {task.name} needs {', '.join(map(str, needed))}.")
    try:
        _check_target(task, row, where)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where}: a field of {task.name} is not built as expected ({type(error).__name__}: {error})."
        ) from error


def _check_target(task: Task, row: dict[str, Any], where: str) -> None:
    if task.options is not None:
        options = task.options(row)
        label = row[task.label] if task.label else None
        if task.target is not None:
            label = task.target(row)
        if not isinstance(label, int) or not 0 <= label < len(options):
            raise DataError(
                f"{where}: field {task.label or 'answers'!r} gives {label!r}, but {task.name} has options "
                f"0 to {len(options) - 1}: {', '.join(repr(o.strip()) for o in options[:6])}."
            )
    if task.answers is not None and not task.answers(row):
        raise DataError(f"{where}: no answer given; {task.name} needs at least one.")
