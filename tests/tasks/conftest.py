import pytest
from tasks.tiny import ROWS, make_bpe, make_wordpiece

from hf_zo.tasks import TASKS


@pytest.fixture
def bpe():
    tokenizer = make_bpe()
    yield tokenizer
    tokenizer.padding_side = "right"


@pytest.fixture
def wordpiece():
    return make_wordpiece()


@pytest.fixture
def task_row():
    """Task, a row and its target, by the task's name."""
    return lambda name: (TASKS[name], dict(ROWS[name][0]), ROWS[name][1])
