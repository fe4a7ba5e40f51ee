"""The sentences that come with the demo: balanced, disjoint, as the README says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from hf_zo.tasks import get_task, load_rows

FOLDER = Path(__file__).parents[1] / "examples" / "demo_data"


def test_demo_data_is_balanced_and_disjoint() -> None:
    splits = {split: load_rows(get_task("sst2"), split, FOLDER) for split in ("train", "validation")}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 440, "validation": 200}
    for rows in splits.values():
        assert len(set(Counter(row["label"] for row in rows).values())) == 1
    sentences = [row["sentence"].lower().strip(" .!?") for rows in splits.values() for row in rows]
    assert len(set(sentences)) == len(sentences)
    assert all(5 <= len(sentence.split()) <= 25 and sentence.isascii() for sentence in sentences)
