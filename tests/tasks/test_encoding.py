import copy
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks.tiny import ROWS, make_bpe, make_wordpiece
from tokenizers import normalizers
from transformers import BertTokenizer

from hf_zo.tasks import TASKS, encode_rows

WORDS = "The film was great and the story was terrible. It rained in Paris, the capital of France."
WITH_OPTIONS = [name for name, task in TASKS.items() if task.options is not None]
# Short enough for the context of every task to be cut, long enough for the rest of it.
TIGHT = 180


def longer(name, times=40):
    task, row = TASKS[name], dict(ROWS[name][0])
    return {**row, task.context: str(row[task.context]) + (" " + WORDS) * times}


def ending_of(example, option):
    return [token for _, _, token, number in example["scored"] if number == option]


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_a_long_context_is_cut_and_everything_else_stays(name, starts):
    tokenizer, task, row = make_bpe(starts), TASKS[name], longer(name)
    encoded = encode_rows(task, [ROWS[name][0], row], tokenizer, TIGHT)
    assert encoded.shortened == 1
    example = encoded[1]
    assert TIGHT - 8 <= max(map(len, example["rows"])) <= TIGHT
    without = tokenizer.decode(example["rows"][0], skip_special_tokens=True)
    # The prompt around the context is as it was: before it, a good part of it, and after it.
    before, after = task.prompt({**row, task.context: "\0"}).split("\0")
    assert without.startswith(before)
    assert WORDS[:30] in without
    assert after in without
    for number, option in enumerate(task.options(row)):
        assert tokenizer.decode(ending_of(example, number)) == option
    assert example["rows"][0][0] == tokenizer.bos_token_id or not starts


@pytest.mark.parametrize("name", ["squad", "drop"])
def test_a_long_context_leaves_question_and_answer(name, bpe):
    task, row = TASKS[name], longer(name)
    encoded = encode_rows(task, [row], bpe, TIGHT)
    assert encoded.shortened == 1
    example = encoded[0]
    assert len(example["input_ids"]) == len(example["labels"]) == len(example["attention_mask"]) <= TIGHT
    text = bpe.decode(example["input_ids"])
    assert f"\nQuestion: {row['question'].strip()}\nAnswer: {task.answers(row)[0]}\n" in text
    assert bpe.decode([i for i in example["labels"] if i != -100]) == f" {task.answers(row)[0]}\n"


def test_a_long_context_at_a_mask(wordpiece):
    task, row = TASKS["boolq"], longer("boolq")
    encoded = encode_rows(task, [row], wordpiece, TIGHT, "mask")
    (ids,) = encoded[0]["rows"]
    assert encoded.shortened == 1
    assert TIGHT - 8 <= len(ids) <= TIGHT
    assert wordpiece.decode(ids).endswith("Is water wet? [MASK]. [SEP]")
    assert ids[0] == wordpiece.cls_token_id


def test_of_a_context_of_word_pieces_no_more_is_cut_than_needed(wordpiece, task_row):
    """Put together again from its pieces, it would be longer than it was, and in lower case."""
    tokenizer = copy.deepcopy(wordpiece)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    task, row, _ = task_row("sst2")
    row["sentence"] = "It's  (quite) well-made, the U.S. say: 'Not-bad'... isn't it?  Un-put-down-able!"
    seen = []
    spied = dataclasses.replace(task, prompt=lambda row: seen.append(row["sentence"]) or task.prompt(row))
    (whole,) = encode_rows(task, [row], tokenizer, 512, "mask")[0]["rows"]
    encoded = encode_rows(spied, [row], tokenizer, len(whole) - 3, "mask")
    assert encoded.shortened == 1
    assert len(whole) - 5 <= len(encoded[0]["rows"][0]) <= len(whole) - 3
    assert row["sentence"].startswith(seen[-1])


@pytest.mark.parametrize("surplus", range(1, 9))
def test_a_character_of_several_tokens_is_cut_as_a_whole(surplus, bpe):
    row = {**ROWS["boolq"][0], "passage": "It rained in Paris. " * 10 + "\N{GRINNING FACE}" * 6}
    whole = max(map(len, encode_rows(TASKS["boolq"], [row], bpe, 1000)[0]["rows"]))
    cut = max(map(len, encode_rows(TASKS["boolq"], [row], bpe, whole - surplus)[0]["rows"]))
    assert whole - surplus - 5 <= cut <= whole - surplus


@pytest.mark.parametrize("name", sorted({*WITH_OPTIONS} - {"copa", "record", "sst5"}))
def test_options_that_are_the_same_for_all_rows_are_read_from_one(name, bpe):
    """SST-5's words are no tokens of this tokenizer."""
    assert len(encode_rows(TASKS[name], [ROWS[name][0]], bpe, 400)[0]["rows"]) == 1


def test_short_rows_are_not_counted(bpe):
    assert encode_rows(TASKS["sst2"], [ROWS["sst2"][0]] * 3, bpe, 400).shortened == 0


def test_a_row_that_fits_exactly_is_not_cut(bpe):
    row = ROWS["boolq"][0]
    (ids,) = encode_rows(TASKS["boolq"], [row], bpe, 400)[0]["rows"]
    length = len(ids) + 1  # the options' last token has a place too
    assert encode_rows(TASKS["boolq"], [row], bpe, length).shortened == 0
    assert encode_rows(TASKS["boolq"], [row], bpe, length - 1).shortened == 1


@pytest.mark.parametrize(("name", "form"), [("boolq", None), ("squad", None), ("boolq", "mask")])
def test_what_cannot_fit_is_refused(name, form):
    tokenizer = make_wordpiece() if form else make_bpe()
    with pytest.raises(
        ValueError, match=f"A {name} prompt does not fit into .* even without its '{TASKS[name].context}'"
    ) as told:
        encode_rows(TASKS[name], [ROWS[name][0]], tokenizer, 6, form)
    assert "max_seq_length" in str(told.value)


def test_the_rest_alone_fits_when_the_context_is_gone(bpe):
    task, row = TASKS["qnli"], longer("qnli")
    (ids,) = encode_rows(task, [{**row, "sentence": ""}], bpe, 400)[0]["rows"]
    least = len(ids) + 1  # the options' last token has a place too
    example = encode_rows(task, [row], bpe, least)[0]
    assert bpe.decode(example["rows"][0]) == task.prompt({**row, "sentence": ""}) + "\n"
    with pytest.raises(ValueError, match="does not fit"):
        encode_rows(task, [row], bpe, least - 1)


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(WITH_OPTIONS),
    context=st.text(max_size=300),
    starts=st.booleans(),
    room=st.integers(min_value=TIGHT - 40, max_value=TIGHT + 60),
)
def test_rows_never_exceed_the_room_and_options_stay_whole(name, context, starts, room):
    tokenizer, task = make_bpe(starts), TASKS[name]
    row = {**ROWS[name][0], task.context: "It rained. " + context}
    encoded = encode_rows(task, [row], tokenizer, room)
    example = encoded[0]
    assert all(len(ids) <= room for ids in example["rows"])
    prompt = task.prompt(row)
    rest = max(len(tokenizer(prompt + option)["input_ids"]) for option in task.options(row))
    assert bool(encoded.shortened) == (rest > room)
    for number, option in enumerate(task.options(row)):
        assert tokenizer.decode(ending_of(example, number)) == option
        for row_number, position, token, which in example["scored"]:
            ids = example["rows"][row_number]
            assert 0 <= position < len(ids)
            if which == number and position + 1 < len(ids):
                assert ids[position + 1] == token


def test_labels_cover_the_answer_and_its_new_line_only(bpe):
    example = encode_rows(TASKS["squad"], [ROWS["squad"][0]], bpe, 400)[0]
    begin = example["labels"].index(next(i for i in example["labels"] if i != -100))
    assert example["labels"][begin:] == example["input_ids"][begin:]
    assert set(example["labels"][:begin]) == {-100}
    assert bpe.decode(example["input_ids"][:begin]).endswith("Answer:")


def test_a_mask_is_where_the_option_would_be(wordpiece):
    example = encode_rows(TASKS["sst2"], [ROWS["sst2"][0]], wordpiece, 100, "mask")[0]
    (ids,) = example["rows"]
    assert ids == wordpiece("a fine film It was [MASK].")["input_ids"]
    assert [(ids[position], token, option) for _, position, token, option in example["scored"]] == [
        (wordpiece.mask_token_id, wordpiece.convert_tokens_to_ids(word), option)
        for option, word in enumerate(["terrible", "great"])
    ]


def test_a_mask_in_the_data_is_not_the_one_to_score(wordpiece):
    row = {"sentence": "a [MASK] film", "label": 1}
    example = encode_rows(TASKS["sst2"], [row], wordpiece, 100, "mask")[0]
    (ids,) = example["rows"]
    assert ids.count(wordpiece.mask_token_id) == 2
    assert {position for _, position, _, _ in example["scored"]} == {len(ids) - 1 - ids[::-1].index(wordpiece.mask_token_id)}


def test_a_mask_with_the_tokenizer_of_bert(tmp_path, wordpiece):
    words = [w for w, _ in sorted(wordpiece.get_vocab().items(), key=lambda item: item[1])]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    tokenizer = BertTokenizer.from_pretrained(tmp_path, do_lower_case=False)
    row = ROWS["sst2"][0]
    assert (
        encode_rows(TASKS["sst2"], [row], tokenizer, 100, "mask")[0]
        == (encode_rows(TASKS["sst2"], [row], wordpiece, 100, "mask")[0])
    )


def test_a_verbalizer_of_several_tokens_is_named(wordpiece):
    with pytest.raises(ValueError, match=r"Verbalizer 'it dried\.' of copa is \d+ tokens; a mask stands for one"):
        encode_rows(TASKS["copa"], [ROWS["copa"][0]], wordpiece, 100, "mask")


def test_a_tokenizer_without_a_mask(bpe):
    with pytest.raises(ValueError, match="no mask token"):
        encode_rows(TASKS["sst2"], [ROWS["sst2"][0]], bpe, 100, "mask")


def test_classes_take_the_texts_as_a_pair(wordpiece):
    row = ROWS["mrpc"][0]
    example = encode_rows(TASKS["mrpc"], [row], wordpiece, 100, "classes")[0]
    assert example["input_ids"] == wordpiece(row["sentence1"], row["sentence2"])["input_ids"]
    assert example["labels"] == row["label"]
    assert set(example) >= {"input_ids", "attention_mask", "labels"}


def test_long_texts_of_classes_are_cut_and_counted(wordpiece):
    encoded = encode_rows(TASKS["mrpc"], [ROWS["mrpc"][0], longer("mrpc")], wordpiece, 40, "classes")
    assert encoded.shortened == 1
    assert [len(e["input_ids"]) for e in encoded.examples][1] == 40
    assert wordpiece.decode(encoded[1]["input_ids"]).endswith("[SEP] He walked. [SEP]")


@pytest.mark.parametrize(("name", "form"), [("squad", "options"), ("squad", "classes"), ("sst2", "answers"), ("drop", "mask")])
def test_a_form_that_the_task_lacks(name, form, bpe):
    with pytest.raises(ValueError, match=f"{name} cannot be put as '{form}'"):
        encode_rows(TASKS[name], [ROWS[name][0]], bpe, 100, form)


def test_classes_need_plain_texts(bpe):
    with pytest.raises(ValueError, match="copa has no plain text form"):
        encode_rows(TASKS["copa"], [ROWS["copa"][0]], bpe, 100, "classes")


def test_encoded_rows_are_a_data_set(bpe):
    encoded = encode_rows(TASKS["sst2"], [ROWS["sst2"][0]] * 3, bpe, 100)
    assert len(encoded) == 3
    assert encoded[2] == encoded.examples[2]


def test_a_verbalizer_outside_the_vocabulary(wordpiece, task_row):
    task, row, _ = task_row("sst2")
    strange = dataclasses.replace(task, options=lambda row: [" great", " \u4e16"])
    with pytest.raises(ValueError, match="'\u4e16' of sst2 is not in the tokenizer's vocabulary"):
        encode_rows(strange, [row], wordpiece, 64, "mask")


def test_an_unknown_form_lists_the_forms(bpe, task_row):
    task, row, _ = task_row("sst2")
    with pytest.raises(ValueError, match="choose one of options, mask, answers, classes"):
        encode_rows(task, [row], bpe, 64, "free")
