import pytest
from tasks.tiny import ROWS

from hf_zo.tasks import TASKS, encode_rows, get_task
from hf_zo.tasks.templates import Task

GLUE = ["sst2", "cola", "mrpc", "qqp", "mnli", "qnli", "rte", "sst5"]
SUPERGLUE = ["cb", "boolq", "wsc", "wic", "copa", "multirc", "record"]
SQUAD = ["squad", "drop"]

# What prompt + right option (or first answer) read, for the rows of conftest.
WORDING = {
    "sst2": ("a fine film It was", " great"),
    "cola": ("The cat sat. This is", " incorrect"),
    "mrpc": ("He ran.\nHe walked.\nDo these two sentences mean the same? Yes or No?", "\nNo"),
    "qqp": ("Who is it?\nWho was it?\nDo these two questions mean the same? Yes or No?", "\nYes"),
    "mnli": ('He ran.\nDoes this mean that "He moved." is true? Yes, No, or Maybe?', "\nNo"),
    "qnli": ('It is here.\nDoes this answer the question "Where is it?"? Yes or No?', "\nYes"),
    "rte": ('He ran.\nDoes this mean that "He moved." is true? Yes or No?', "\nNo"),
    "sst5": ("a fine film It was", " good"),
    "cb": ('Suppose He ran. Can we infer that "he moved"? Yes, No, or Maybe?', "\nMaybe"),
    "boolq": ("Water is wet. Is water wet?", "\nYes"),
    "wsc": (
        'Ann told Eve that she won.\nIn the previous sentence, does the pronoun "she" refer to Ann? Yes or No?',
        "\nYes",
    ),
    "wic": (
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA river bank.\nA rich bank.',
        "\nNo",
    ),
    "copa": ("It rained so", " it got wet."),
    "multirc": (
        'It rained.\nQuestion: Did it rain?\nI found this answer "yes". Is that correct? Yes or No?',
        "\nYes",
    ),
    "record": ("Ann met Bob.\n- They met.", "\nBob met Ann."),
    "squad": ("Title: Paris\nContext: Paris is the capital of France.\nQuestion: What is the capital?\nAnswer:", "Paris"),
    "drop": ("Passage: Two plus two is 4.\nQuestion: How much?\nAnswer:", "4"),
}


def test_the_tasks_are_those_of_the_examples():
    assert list(TASKS) == GLUE + SUPERGLUE + SQUAD
    assert {name: task.family for name, task in TASKS.items()} == {
        **dict.fromkeys(GLUE, "glue"),
        **dict.fromkeys(SUPERGLUE, "superglue"),
        **dict.fromkeys(SQUAD, "squad"),
    }


@pytest.mark.parametrize("name", TASKS)
def test_wording(name, task_row):
    task, row, _ = task_row(name)
    prompt, ending = WORDING[name]
    assert task.prompt(row) == prompt
    if task.options is None:
        assert task.answers(row)[0] == ending
    else:
        target = task.target(row) if task.target else row[task.label]
        assert task.options(row)[target] == ending


@pytest.mark.parametrize("name", TASKS)
def test_every_needed_field_is_in_the_text(name, task_row):
    task, row, _ = task_row(name)
    skipped = {"idx", "answers", "answers_spans", "label"}

    def text(row):
        return task.prompt(row) + "".join(task.options(row) if task.options else task.answers(row))

    for field in set(task.fields) - skipped:
        other = {**row, field: ["Xenia"] if field == "entities" else "cause" if row[field] == "effect" else "Xenia"}
        assert text(other) != text(row), field
    assert task.context in task.fields


@pytest.mark.parametrize("name", TASKS)
def test_a_minimal_row_encodes_and_the_target_is_the_right_option(name, task_row, bpe):
    task, row, target = task_row(name)
    row = {field: row[field] for field in (*task.fields, *([task.label] if task.label else []))}
    example = encode_rows(task, [row], bpe, 400)[0]
    prompt, ending = WORDING[name]
    if task.options is None:
        answer = [i for i in example["labels"] if i != -100]
        assert bpe.decode(answer) == f" {target[0]}\n"
        assert bpe.decode(example["input_ids"]) == f"{prompt} {target[0]}\n"
    else:
        assert example["target"] == target
        right = [token for _, _, token, option in example["scored"] if option == target]
        assert bpe.decode(right) == ending
        assert {option for *_, option in example["scored"]} == set(range(len(task.options(row))))
        assert all(bpe.decode(ids).startswith(prompt) for ids in example["rows"])


def test_copa_asks_for_the_cause_too(task_row):
    task, row, _ = task_row("copa")
    assert task.prompt({**row, "question": "cause"}) == "It rained because"


def test_options_of_copa_go_on_with_the_sentence(task_row):
    """As MeZO's template: "I" stays, any other first word is in lower case as a whole."""
    task, row, _ = task_row("copa")
    choices = {"I saw JFK.": " I saw JFK.", "JFK saw me.": " jfk saw me.", "It was I.": " it was I."}
    assert [task.options({**row, "choice1": choice})[0] for choice in choices] == list(choices.values())


def test_record_takes_the_first_entity_that_is_an_answer():
    row = {**ROWS["record"][0], "entities": ["Eve", "Ann", "Bob"], "answers": ["Bob", "Ann"]}
    assert TASKS["record"].target(row) == 1


def test_the_question_of_qnli_is_not_its_context():
    assert TASKS["qnli"].context == "sentence"


def test_unknown_task_lists_those_there_are():
    with pytest.raises(ValueError, match="task_name='sst3' does not exist") as caught:
        get_task("sst3")
    assert str(caught.value).endswith(", ".join(TASKS) + ".")


@pytest.mark.parametrize(("family", "there"), [("glue", GLUE), ("superglue", SUPERGLUE), ("squad", SQUAD)])
def test_unknown_task_of_a_family_lists_only_that_family(family, there):
    foreign = next(name for name in TASKS if name not in there)
    with pytest.raises(ValueError, match=f"task_name='{foreign}' does not exist") as caught:
        get_task(foreign, family)
    assert str(caught.value).endswith(f"choose one of {', '.join(there)}.")


def test_get_task_finds_a_task():
    assert isinstance(get_task("sst2"), Task)
    assert get_task("copa", "superglue") is TASKS["copa"]
