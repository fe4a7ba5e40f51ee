import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tasks.tiny import ROWS, make_bpe, tiny
from torch.nn.functional import cross_entropy, log_softmax
from transformers.modeling_outputs import CausalLMOutput

from hf_zo import ZOTrainer, ZOTrainingArguments
from hf_zo.tasks import TASKS, OptionCollator, OptionLabels, encode_rows, metrics_for, option_loss, option_predictions
from hf_zo.tasks.scoring import option_scores

CAUSAL = ["llama", "gpt2", "opt"]

COPA = [
    ROWS["copa"][0],
    {**ROWS["copa"][0], "premise": "The film was great.", "question": "cause", "choice1": "Yes.", "choice2": "No, it was not."},
    {**ROWS["copa"][0], "premise": "The capital of France was the capital of France.", "label": 0},
]
RECORD = [
    ROWS["record"][0],
    {**ROWS["record"][0], "entities": ["Ann", "the capital of France", "Bob", "Paris"], "answers": ["Paris"]},
    {**ROWS["record"][0], "entities": ["Bob"]},
]
SST2 = [{"sentence": text, "label": i % 2} for i, text in enumerate(["a fine film", "The story was terrible.", "great"])]


def by_hand(model, tokenizer, task, row, prefix=()):
    """Mean log-probability of every option's tokens, from one unpadded row each."""
    start = [tokenizer.bos_token_id] if tokenizer("")["input_ids"] else []
    prompt = task.prompt(row)
    told = start + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    scores = []
    for option in task.options(row):
        ids = start + tokenizer(prompt + option, add_special_tokens=False)["input_ids"]
        assert ids[: len(told)] == told
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        log_probs = log_softmax(logits[len(logits) - len(ids) :], dim=-1)
        scores.append(torch.stack([log_probs[i - 1, ids[i]] for i in range(len(told), len(ids))]).mean())
    return torch.stack(scores)


def scores(model, batch):
    batch = dict(batch)
    labels = batch.pop("labels")
    with torch.no_grad():
        return option_scores(model(**batch).logits, labels)


def batch_scores(model, tokenizer, task, rows):
    return scores(model, OptionCollator(tokenizer, model)(encode_rows(task, rows, tokenizer, 400)))


def with_prompt(model, config):
    torch.manual_seed(1)
    model = get_peft_model(model, config).eval()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert "prompt_encoder" in name
            p.data.normal_()
    return model


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize(("name", "rows"), [("copa", COPA), ("record", RECORD), ("sst2", SST2), ("boolq", [ROWS["boolq"][0]])])
def test_scores_equal_the_computation_by_hand(kind, name, rows, starts):
    tokenizer = make_bpe(starts)
    model, task = tiny(kind, tokenizer), TASKS[name]
    got = batch_scores(model, tokenizer, task, rows)
    for row, there in zip(rows, got, strict=True):
        wanted = by_hand(model, tokenizer, task, row)
        torch.testing.assert_close(there[: len(wanted)], wanted, atol=1e-5, rtol=0)
        assert torch.isinf(there[len(wanted) :]).all()


def test_options_of_copa_are_several_tokens(bpe):
    # Otherwise the test above says nothing about the mean.
    example = encode_rows(TASKS["copa"], COPA, bpe, 400)[1]
    per_option = [sum(record[3] == option for record in example["scored"]) for option in (0, 1)]
    assert min(per_option) >= 2
    assert per_option[0] != per_option[1]


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize(("name", "rows", "tokens"), [("sst2", SST2, 1), ("mnli", [ROWS["mnli"][0]], 2)])
def test_options_that_differ_in_their_last_token_score_as_rows_of_their_own(kind, name, rows, tokens, bpe):
    model, task = tiny(kind, bpe), TASKS[name]
    shared = encode_rows(task, rows, bpe, 400)
    separate = []
    for row, example in zip(rows, shared.examples, strict=True):
        assert len(example["rows"]) == 1
        own = [bpe(task.prompt(row) + option)["input_ids"] for option in task.options(row)]
        scored = [(i, len(ids) - n, ids[1 - n], i) for i, ids in enumerate(own) for n in range(tokens + 1, 1, -1)]
        separate.append({"rows": own, "scored": scored, "target": example["target"]})
    collate = OptionCollator(bpe, model)
    one, two = collate(shared.examples), collate(separate)
    assert len(task.options(rows[0])) * len(one["input_ids"]) == len(two["input_ids"])
    torch.testing.assert_close(scores(model, one), scores(model, two), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize(("name", "rows"), [("copa", COPA), ("sst2", SST2)])
def test_left_and_right_padding_give_the_same_scores(kind, name, rows, bpe):
    model = tiny(kind, bpe)
    right = batch_scores(model, bpe, TASKS[name], rows)
    bpe.padding_side = "left"
    batch = OptionCollator(bpe, model)(encode_rows(TASKS[name], rows, bpe, 400))
    assert (batch["attention_mask"][:, 0] == 0).any()
    assert batch["attention_mask"][:, -1].all()
    assert torch.equal(batch["position_ids"][0], (batch["attention_mask"][0].cumsum(0) - 1).clamp(min=0))
    torch.testing.assert_close(scores(model, batch), right, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_longer_neighbours_change_nothing(kind, side, bpe):
    model = tiny(kind, bpe)
    bpe.padding_side = side
    alone = batch_scores(model, bpe, TASKS["copa"], COPA[:1])
    longer = {**COPA[2], "premise": COPA[2]["premise"] * 6}
    among = batch_scores(model, bpe, TASKS["copa"], [longer, COPA[0], longer])
    torch.testing.assert_close(among[1, :2], alone[0, :2], atol=1e-5, rtol=0)


def test_masked_models_pad_left_too(wordpiece):
    model, rows = tiny("mlm", wordpiece), [SST2[0], {**SST2[0], "sentence": "a fine film " * 5}]
    encoded = encode_rows(TASKS["sst2"], rows, wordpiece, 100, "mask")
    right = OptionCollator(wordpiece, model)(encoded.examples)
    collate = OptionCollator(wordpiece, model)
    collate.left = collate.with_positions = True
    torch.testing.assert_close(scores(model, collate(encoded.examples)), scores(model, right), atol=1e-5, rtol=0)


def test_a_mask_is_scored_by_the_logits_at_the_mask(wordpiece):
    model = tiny("mlm", wordpiece)
    encoded = encode_rows(TASKS["sst2"], SST2[:1], wordpiece, 100, "mask")
    ids = wordpiece("a fine film It was [MASK].")["input_ids"]
    with torch.no_grad():
        at_mask = log_softmax(model(torch.tensor([ids])).logits[0, ids.index(wordpiece.mask_token_id)], -1)
    wanted = at_mask[wordpiece.convert_tokens_to_ids(["terrible", "great"])]
    got = scores(model, OptionCollator(wordpiece, model)(encoded.examples))[0, :2]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
def test_virtual_tokens_do_not_move_what_is_scored(config, kind, side, bpe):
    model = with_prompt(tiny(kind, bpe), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    bpe.padding_side = side
    got = batch_scores(model, bpe, TASKS["copa"], COPA)
    for row, there in zip(COPA, got, strict=True):
        torch.testing.assert_close(there[:2], by_hand(model, bpe, TASKS["copa"], row), atol=1e-5, rtol=0)
    plain = batch_scores(model.get_base_model(), bpe, TASKS["copa"], COPA)
    assert (got - plain)[:, :2].abs().max() > 0.01  # the virtual tokens are there


def test_loss_is_cross_entropy_over_options(bpe):
    model = tiny("llama", bpe)
    batch = OptionCollator(bpe, model)(encode_rows(TASKS["record"], RECORD, bpe, 400))
    labels = batch.pop("labels")
    with torch.no_grad():
        outputs = model(**batch)
    wanted = torch.stack(
        [
            cross_entropy(by_hand(model, bpe, TASKS["record"], row)[None], torch.tensor([target]))
            for row, target in zip(RECORD, (1, 3, 0), strict=True)
        ]
    ).mean()
    torch.testing.assert_close(option_loss(outputs, labels), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(option_loss((outputs.logits,), labels, num_items_in_batch=7), wanted, atol=1e-5, rtol=0)


def test_loss_and_prediction_of_given_logits():
    # Two examples over a vocabulary of 3: the first with two single tokens at one row, the second with a pair of rows.
    logits = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 3.0, 0.0]], [[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]], [[0.0, 1.0, 0.0]] * 2])
    scored = torch.tensor(
        [
            [(0, 1, 0, 0), (0, 1, 1, 1), (-100, -100, -100, -100)],
            [(1, 2, 0, 0), (1, 1, 1, 0), (2, 2, 1, 1)],
        ]
    )
    labels = OptionLabels(target=torch.tensor([0, 1]), scored=scored)
    p = log_softmax(logits, -1)
    first, second = torch.stack([p[0, 1, 0], p[0, 1, 1]]), torch.stack([(p[1, 0, 0] + p[1, 1, 1]) / 2, p[2, 0, 1]])
    wanted = (first.logsumexp(0) - first[0] + second.logsumexp(0) - second[1]) / 2
    torch.testing.assert_close(option_loss(CausalLMOutput(logits=logits), labels), wanted)
    assert option_predictions(logits, labels).tolist() == [1, 1]
    assert option_predictions((logits, "cache"), labels).tolist() == [1, 1]


def test_scores_are_fp32_whatever_the_model(bpe):
    model = tiny("llama", bpe).to(torch.bfloat16)
    got = batch_scores(model, bpe, TASKS["copa"], COPA)
    assert got.dtype == torch.float32


def test_examples_whose_columns_the_trainer_dropped_are_named(bpe):
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        OptionCollator(bpe)([{"target": 1}])


def test_labels_are_indexed_by_name_only():
    labels = OptionLabels(target=torch.tensor([1]), scored=torch.zeros(1, 1, 4))
    assert labels["target"].tolist() == [1]
    for key in (slice(None), (..., slice(1, None)), 0):
        with pytest.raises(TypeError, match="indexed by name"):
            labels[key]
    with pytest.raises(KeyError):
        labels["else"]


def test_the_trainer_does_not_count_option_labels(bpe, tmp_path):
    model = tiny("llama", bpe)
    trainer = options_trainer(model, bpe, tmp_path)
    batch = OptionCollator(bpe, model)(trainer.train_dataset.examples[:2])
    _, items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    assert items is None


def options_trainer(model, tokenizer, tmp_path, name="copa", rows=COPA, form=None, eval_batch_size=2, **settings):
    task, encoded = TASKS[name], encode_rows(TASKS[name], rows, tokenizer, 400, form)
    return ZOTrainer(
        model,
        ZOTrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            remove_unused_columns=False,
            disable_tqdm=True,
            learning_rate=1e-3,
            zo_eps=1e-2,
            max_steps=2,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=eval_batch_size,
            **settings,
        ),
        train_dataset=encoded,
        eval_dataset=encoded,
        data_collator=OptionCollator(tokenizer, model),
        compute_loss_func=option_loss,
        preprocess_logits_for_metrics=option_predictions,
        compute_metrics=metrics_for(task, rows, tokenizer),
    )


def losses_before_and_after(trainer):
    before = trainer.evaluate()
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    result = trainer.train()
    assert result.global_step == 2
    assert any(not torch.equal(p, weights[name]) for name, p in trainer.model.named_parameters())
    return before, trainer.evaluate()


def test_train_and_evaluate_by_options(bpe, tmp_path):
    model = tiny("llama", bpe)
    wanted = [int(by_hand(model, bpe, TASKS["copa"], row).argmax() == row["label"]) for row in COPA]
    loss = option_loss_of(model, bpe, "copa", COPA)
    trainer = options_trainer(model, bpe, tmp_path)
    before, after = losses_before_and_after(trainer)
    assert before["eval_accuracy"] == pytest.approx(sum(wanted) / 3)
    assert before["eval_loss"] == pytest.approx(loss, abs=1e-5)
    assert after["eval_loss"] != before["eval_loss"]
    assert after["eval_loss"] == pytest.approx(option_loss_of(model, bpe, "copa", COPA), abs=1e-5)


def option_loss_of(model, tokenizer, name, rows, form=None):
    """Mean over the rows, one batch each."""
    collate, encoded = OptionCollator(tokenizer, model), encode_rows(TASKS[name], rows, tokenizer, 400, form)
    losses = []
    for example in encoded.examples:
        batch = collate([example])
        labels = batch.pop("labels")
        with torch.no_grad():
            losses.append(option_loss(model(**batch), labels))
    return float(torch.stack(losses).mean())


def test_evaluation_gathers_batches_with_different_numbers_of_options(bpe, tmp_path):
    model = tiny("gpt2", bpe)
    rows = [RECORD[2], RECORD[1], RECORD[0]]
    trainer = options_trainer(model, bpe, tmp_path, "record", rows, eval_batch_size=1)
    best = [row["entities"][int(by_hand(model, bpe, TASKS["record"], row).argmax())] for row in rows]
    share = sum(said in row["answers"] for said, row in zip(best, rows, strict=True)) / 3
    assert trainer.evaluate()["eval_exact_match"] == pytest.approx(share)


def test_predicted_logits_are_those_of_the_rows(bpe, tmp_path):
    """Without preprocess_logits_for_metrics they go to whoever asked for them, who knows nothing of packing."""
    logits = {}
    for packing in (True, False):
        trainer = options_trainer(tiny("llama", bpe), bpe, tmp_path, eval_batch_size=3, zo_packing=packing)
        trainer.preprocess_logits_for_metrics = trainer.compute_metrics = None
        logits[packing] = torch.tensor(trainer.predict(trainer.eval_dataset).predictions)
    assert (len(logits[True]), logits[True].shape[-1]) == (2 * len(COPA), len(bpe))
    assert torch.equal(logits[True], logits[False])


def test_train_and_evaluate_a_masked_lm(wordpiece, tmp_path):
    model = tiny("mlm", wordpiece)
    trainer = options_trainer(model, wordpiece, tmp_path, "sst2", SST2, "mask")
    loss = option_loss_of(model, wordpiece, "sst2", SST2, "mask")
    before, after = losses_before_and_after(trainer)
    assert before["eval_loss"] == pytest.approx(loss, abs=1e-5)
    assert after["eval_loss"] != before["eval_loss"]
    assert before["eval_accuracy"] in (pytest.approx(k / 3) for k in range(4))
