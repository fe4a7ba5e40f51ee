"""A grid and rows that the tests of the study share."""

import json

WORDS = ["great", "terrible", "fine", "bad", "film", "story", "acting", "it", "was", "the"]
GRID = {
    "model": "smollm2",
    "forms": ["base", "lora"],
    "tasks": ["sst2"],
    "arms": ["zero-shot", "mezo"],
    "multipliers": [1, 10],
    "seeds": [1, 2],
    "budget": 12,
    "checkpoints": [0, 0.5, 1],
    "batch_size": 4,
    "train_samples": 16,
    "dev_samples": 8,
    "max_length": 64,
    "dtype": "float32",
}


def sentences(split: str, n: int) -> list[dict]:
    """Rows whose text tells their split and number."""
    return [{"sentence": f"{split} {i} {WORDS[i % 10]} {WORDS[i * 7 % 10]}", "label": i % 2} for i in range(n)]


def write_rows(folder, split, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
