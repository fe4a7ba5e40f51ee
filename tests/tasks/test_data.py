import gzip
import json

import pytest
from tasks.tiny import ROWS

from hf_zo.tasks import TASKS, DataError, load_rows


def write(folder, rows, split="train", zipped=False):
    path = folder / (f"{split}.jsonl.gz" if zipped else f"{split}.jsonl")
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    with gzip.open(path, "wt", encoding="utf-8") if zipped else open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


def sentences(n):
    return [{"sentence": f"film {i} était bien", "label": i % 2} for i in range(n)]


@pytest.mark.parametrize("zipped", [False, True])
def test_reads_json_lines(tmp_path, zipped):
    rows = sentences(3)
    write(tmp_path, rows, zipped=zipped)
    assert load_rows(TASKS["sst2"], "train", tmp_path) == rows


@pytest.mark.parametrize("name", TASKS)
def test_rows_of_every_task_load(tmp_path, name):
    write(tmp_path, [ROWS[name][0]], "validation")
    assert load_rows(TASKS[name], "validation", str(tmp_path)) == [ROWS[name][0]]


@pytest.mark.parametrize("name", TASKS)
def test_a_missing_field_is_named_with_file_and_line(tmp_path, name):
    task, row = TASKS[name], ROWS[name][0]
    for field in (*task.fields, *([task.label] if task.label else [])):
        for bad in ({k: v for k, v in row.items() if k != field}, {**row, field: None}):
            path = write(tmp_path, [row, bad])
            with pytest.raises(DataError) as caught:
                load_rows(task, "train", tmp_path)
            assert str(caught.value).startswith(f"{path}, line 2: field {field!r} is missing; {name} needs ")


@pytest.mark.parametrize("label", [2, -1, "1", 0.5])
def test_a_label_outside_the_verbalizer(tmp_path, label):
    path = write(tmp_path, [*sentences(2), {"sentence": "x", "label": label}])
    with pytest.raises(DataError) as caught:
        load_rows(TASKS["sst2"], "train", tmp_path)
    assert str(caught.value) == (
        f"{path}, line 3: field 'label' gives {label!r}, but sst2 has options 0 to 1: 'terrible', 'great'."
    )


def test_an_answer_among_no_entity(tmp_path):
    write(tmp_path, [{**ROWS["record"][0], "answers": ["Eve"]}])
    with pytest.raises(DataError, match=r"line 1: field 'answers' gives -1, but record has options 0 to 1: 'Ann met Ann\.'"):
        load_rows(TASKS["record"], "train", tmp_path)


def test_no_answer(tmp_path):
    write(tmp_path, [{**ROWS["squad"][0], "answers": {"text": [], "answer_start": []}}])
    with pytest.raises(DataError, match="line 1: no answer given; squad needs at least one"):
        load_rows(TASKS["squad"], "train", tmp_path)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("squad", {"answers": {"answer_start": [0]}}),
        ("squad", {"answers": "Paris"}),
        ("drop", {"answers_spans": {}}),
        ("record", {"entities": 3}),
    ],
)
def test_a_field_of_the_wrong_build_is_named_with_file_and_line(tmp_path, name, broken):
    path = write(tmp_path, [ROWS[name][0], {**ROWS[name][0], **broken}])
    with pytest.raises(DataError) as caught:
        load_rows(TASKS[name], "train", tmp_path)
    assert str(caught.value).startswith(f"{path}, line 2: a field of {name} is not built as expected (")


def test_a_line_that_is_not_json(tmp_path):
    path = write(tmp_path, [*sentences(1), "{sentence: x}"])
    with pytest.raises(DataError) as caught:
        load_rows(TASKS["sst2"], "train", tmp_path)
    assert str(caught.value).startswith(f"{path}, line 2: not JSON (")


@pytest.mark.parametrize("harm", ["cut", "altered", "not zipped", "not UTF-8"])
def test_a_damaged_file_is_named(tmp_path, harm):
    path = write(tmp_path, sentences(50), zipped=True)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "cut": whole[:middle],
            "altered": whole[:middle] + bytes(8) + whole[middle + 8 :],
            "not zipped": gzip.decompress(whole),
            "not UTF-8": gzip.compress(b"\xff" + gzip.decompress(whole)),
        }[harm]
    )
    with pytest.raises(DataError, match=f"{path.name} is damaged, or not in UTF-8"):
        load_rows(TASKS["sst2"], "train", tmp_path)


def test_a_line_that_is_no_object(tmp_path):
    path = write(tmp_path, [*sentences(1), "[1, 2]"])
    with pytest.raises(DataError) as caught:
        load_rows(TASKS["sst2"], "train", tmp_path)
    assert str(caught.value) == f"{path}, line 2: expected an object with the task's fields, got list."


def test_an_empty_split(tmp_path):
    path = write(tmp_path, [])
    with pytest.raises(DataError) as caught:
        load_rows(TASKS["sst2"], "train", tmp_path)
    assert str(caught.value) == f"{path} is empty; sst2 needs at least one row."


def test_a_missing_split_says_what_is_there(tmp_path):
    write(tmp_path, sentences(1))
    with pytest.raises(FileNotFoundError, match=r"has no validation\.jsonl or validation\.jsonl\.gz \(there: train\.jsonl\)"):
        load_rows(TASKS["sst2"], "validation", tmp_path)
    with pytest.raises(FileNotFoundError, match="the folder does not exist"):
        load_rows(TASKS["sst2"], "train", tmp_path / "nowhere")


def test_max_samples_draws_without_replacement_and_reproducibly(tmp_path):
    rows = sentences(40)
    write(tmp_path, rows)
    texts = [r["sentence"] for r in rows]

    def drawn(n, seed=0):
        return [r["sentence"] for r in load_rows(TASKS["sst2"], "train", tmp_path, n, seed)]

    first = drawn(20)
    assert len(first) == len(set(first)) == 20
    assert set(first) <= set(texts)
    assert drawn(20) == first
    assert set(drawn(20, seed=1)) != set(first)
    assert first != texts[:20]
    assert drawn(10) == first[:10]  # a smaller draw is the beginning of a larger one
    assert drawn(40) == drawn(99) == drawn(None) == texts


def test_max_samples_of_multirc_draws_whole_questions(tmp_path):
    """Exact match is over all answers to a question; the number of a question is its number in the paragraph."""
    numbers = [(p, q) for p in range(4) for q in range(3)]
    asked = [(p, q, a) for p, q in numbers for a in range(1 + (p + 2 * q) % 4)]
    named = [dict(zip(("paragraph", "question", "answer"), idx, strict=True)) for idx in asked]
    write(tmp_path, [{**ROWS["multirc"][0], "idx": idx} for idx in named])

    def drawn(n, seed=0):
        rows = load_rows(TASKS["multirc"], "train", tmp_path, n, seed)
        return [(row["idx"]["paragraph"], row["idx"]["question"], row["idx"]["answer"]) for row in rows]

    for seed in range(4):
        for n in range(1, len(asked)):
            kept = drawn(n, seed)
            questions = {idx[:2] for idx in kept}
            assert sorted(kept) == [idx for idx in asked if idx[:2] in questions]
            assert n - 4 < len(kept) <= n or len(questions) == 1
            assert kept == drawn(n, seed) == drawn(n + 1, seed)[: len(kept)] or n + 1 == len(asked)
    assert len({tuple(drawn(9, seed)) for seed in range(4)}) == 4
    assert drawn(len(asked)) == asked


def test_the_hub_is_asked_for_the_matched_split_of_mnli(monkeypatch):
    asked = []

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        return [ROWS["mnli"][0]]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_rows(TASKS["mnli"], "validation") == [ROWS["mnli"][0]]
    load_rows(TASKS["mnli"], "train")
    assert asked == [("nyu-mll/glue", "mnli", "validation_matched"), ("nyu-mll/glue", "mnli", "train")]


@pytest.mark.parametrize("number", [0, -3])
def test_no_samples_are_refused(tmp_path, number):
    with pytest.raises(ValueError, match=f"max_samples={number}"):
        load_rows(TASKS["sst2"], "train", tmp_path, max_samples=number)


def test_blank_lines_are_passed_over(tmp_path):
    write(tmp_path, [*sentences(2), "", " "])
    assert len(load_rows(TASKS["sst2"], "train", tmp_path)) == 2
