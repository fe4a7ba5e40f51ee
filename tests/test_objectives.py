import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tasks.tiny import ROWS, make_bpe, make_wordpiece, tiny
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from hf_zo import ZOTrainer, ZOTrainingArguments
from hf_zo.objectives import OBJECTIVES, accuracy, contributions, f1, label_count
from hf_zo.tasks import TASKS, OptionCollator, encode_rows, option_loss, option_predictions

SQUAD = [
    ROWS["squad"][0],
    {**ROWS["squad"][0], "context": "Great.", "answers": {"text": ["the capital of France"], "answer_start": [0]}},
]
COPA = [{**ROWS["copa"][0], "premise": premise, "label": label} for premise in ("It rained.", "Ann ran.") for label in (0, 1)]
SST2 = [{"sentence": text, "label": i % 2} for i, text in enumerate(["a fine film", "The story was terrible.", "so great"])]


@pytest.fixture
def bpe():
    return make_bpe()


@pytest.fixture
def trainer_of(tmp_path):
    def build(model, encoded, collator, **kwargs):
        settings = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("zo_")}
        return ZOTrainer(
            model,
            ZOTrainingArguments(
                output_dir=str(tmp_path),
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
                max_steps=2,
                per_device_train_batch_size=2,
                learning_rate=1e-2,
                zo_eps=0.5,
                zo_restore="copy",  # measures nothing but the probes
                logging_steps=1,
                **settings,
            ),
            train_dataset=encoded,
            data_collator=collator,
            **kwargs,
        )

    return build


def squad_batch(tokenizer):
    encoded = encode_rows(TASKS["squad"], SQUAD, tokenizer, 400)
    collator = DataCollatorForSeq2Seq(tokenizer)
    return encoded, collator, collator([dict(e) for e in encoded.examples])


def teach(model, successors):
    """Logits that make ``successors[token]`` follow a token."""
    forward = model.forward

    def taught(input_ids=None, labels=None, **kwargs):
        out = forward(input_ids=input_ids, labels=labels, **kwargs)
        out.logits = torch.nn.functional.one_hot(successors[input_ids], out.logits.shape[-1]).float()
        return out

    model.forward = taught


def test_accuracy_of_options(bpe, trainer_of):
    model = tiny("llama", bpe)
    encoded = encode_rows(TASKS["copa"], COPA, bpe, 400)
    collator = OptionCollator(bpe, model)
    batch = collator(encoded.examples)
    trainer = trainer_of(model, encoded, collator, compute_loss_func=option_loss)
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        value = accuracy(trainer, model, batch)
    said = option_predictions(logits, batch["labels"]).tolist()
    assert float(value) == pytest.approx(1 - sum(s == row["label"] for s, row in zip(said, COPA, strict=True)) / 4)
    assert float(value) == 0.5  # every premise has both labels
    # Labels equal to what the model says, then one of four wrong.
    batch["labels"]["target"] = torch.tensor(said)
    assert float(accuracy(trainer, model, batch)) == 0.0
    batch["labels"]["target"] = torch.tensor([1 - said[0], *said[1:]])
    assert float(accuracy(trainer, model, batch)) == 0.25


def test_accuracy_of_classes(trainer_of):
    tokenizer = make_wordpiece()
    model = tiny("classes", tokenizer, num_labels=2)
    encoded = encode_rows(TASKS["sst2"], SST2, tokenizer, 100, "classes")
    collator = DataCollatorWithPadding(tokenizer)
    trainer, batch = trainer_of(model, encoded, collator), dict(collator(encoded.examples))
    with torch.no_grad():
        said = model(**batch).logits.argmax(-1)
        for wrong in range(4):
            batch["labels"] = torch.where(torch.arange(3) < wrong, 1 - said, said)
            assert float(accuracy(trainer, model, batch)) == pytest.approx(wrong / 3)


@pytest.mark.parametrize(
    ("num_labels", "labels"), [(1, [0.5, 1.0, 2.0]), (1, [0, 1, 0]), (3, [[1.0, 0.0, 1.0]] * 3), (2, None)]
)
def test_accuracy_without_classes_is_refused(trainer_of, num_labels, labels):
    tokenizer = make_wordpiece()
    model = tiny("classes", tokenizer, num_labels=num_labels)
    encoded = encode_rows(TASKS["sst2"], SST2, tokenizer, 100, "classes")
    collator = DataCollatorWithPadding(tokenizer)
    trainer, batch = trainer_of(model, encoded, collator), dict(collator(encoded.examples))
    batch["labels"] = torch.tensor(labels) if labels is not None else None
    with pytest.raises(ValueError, match="needs one class as the label"), torch.no_grad():
        accuracy(trainer, model, batch)


def test_accuracy_of_a_causal_lm_is_over_shifted_label_tokens(bpe, trainer_of):
    model = tiny("llama", bpe)
    encoded, collator, batch = squad_batch(bpe)
    trainer = trainer_of(model, encoded, collator)
    with torch.no_grad():
        said = model(**batch).logits.argmax(-1)
    assert float(accuracy(trainer, model, batch)) == 1.0
    labels = batch["labels"].clone()
    counted = labels[:, 1:] != -100
    labels[:, 1:][counted] = said[:, :-1][counted]
    n = int(counted.sum())
    assert float(accuracy(trainer, model, {**batch, "labels": labels})) == 0.0
    row, column = (int(i) for i in counted.nonzero()[0])
    labels[row, column + 1] = (labels[row, column + 1] + 1) % len(bpe)
    assert float(accuracy(trainer, model, {**batch, "labels": labels})) == pytest.approx(1 / n)


@pytest.mark.parametrize("kind", ["classes", "tokens"])
def test_errors_of_items_add_up_to_one_minus_the_accuracy(kind, bpe, trainer_of):
    """What zo_per_example measures, with labels right, wrong and left out."""
    if kind == "classes":
        tokenizer = make_wordpiece()
        model, collator = tiny("classes", tokenizer, num_labels=2), DataCollatorWithPadding(tokenizer)
        encoded = encode_rows(TASKS["sst2"], SST2, tokenizer, 100, "classes")
        batch = dict(collator(encoded.examples))
    else:
        model = tiny("llama", bpe)
        encoded, collator, batch = squad_batch(bpe)
    trainer = trainer_of(model, encoded, collator)
    with torch.no_grad():
        logits = model(**batch).logits
        said = logits.argmax(-1) if kind == "classes" else logits[:, :-1].argmax(-1)
        labels = batch["labels"] if kind == "classes" else batch["labels"][:, 1:]  # a view: what is written is in the batch
        counted = labels != -100
        labels[counted] = said[counted]
        first, *_, last = counted.nonzero().tolist()
        labels[tuple(first)] = 1 - said[tuple(first)] if kind == "classes" else (said[tuple(first)] + 1) % len(bpe)
        labels[tuple(last)] = -100
        items = contributions(model, logits, batch, None, "accuracy")
        whole = float(accuracy(trainer, model, batch))
    wrong = torch.zeros(labels.shape)
    wrong[tuple(first)] = 1 / (int(counted.sum()) - 1)
    torch.testing.assert_close(items, wrong.flatten())
    assert float(items.sum()) == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
)
def test_accuracy_of_an_adapted_causal_lm(config, bpe, trainer_of):
    model = get_peft_model(tiny("llama", bpe), config).eval()
    encoded, collator, batch = squad_batch(bpe)
    trainer = trainer_of(model, encoded, collator)
    with torch.no_grad():
        plain = {k: v for k, v in batch.items() if k != "labels"}
        said = model(**plain).logits[:, -batch["labels"].shape[1] :].argmax(-1)
        labels = batch["labels"].clone()
        counted = labels[:, 1:] != -100
        labels[:, 1:][counted] = said[:, :-1][counted]
        assert float(accuracy(trainer, model, {**batch, "labels": labels})) == 0.0


def test_f1_of_greedy_answers(bpe, trainer_of):
    model = tiny("llama", bpe)
    # After the prompt's colon: " Paris", then a new line.
    paris, new_line = bpe.convert_tokens_to_ids("ĠParis"), bpe("\n")["input_ids"][0]
    successors = torch.full((len(bpe),), paris)
    successors[paris] = new_line
    teach(model, successors)
    encoded, collator, batch = squad_batch(bpe)
    trainer = trainer_of(model, encoded, collator, processing_class=bpe)
    # "Paris" for "Paris" is 1; for "the capital of France" 0.
    assert float(f1(trainer, model, batch)) == pytest.approx(0.5)
    assert float(f1(trainer, model, {k: v[:1] for k, v in batch.items()})) == pytest.approx(0.0)
    assert float(f1(trainer, model, {k: v[1:] for k, v in batch.items()})) == pytest.approx(1.0)


def test_f1_counts_words_in_common(bpe, trainer_of, monkeypatch):
    model = tiny("llama", bpe)
    monkeypatch.setattr("hf_zo.objectives.greedy_answers", lambda model, inputs, tokenizer: ["in Paris", "capital France"])
    encoded, collator, batch = squad_batch(bpe)
    trainer = trainer_of(model, encoded, collator, processing_class=bpe)
    # 2*1/(2+1) and 2*2/(2+3): the article of "the capital of France" does not count
    assert float(f1(trainer, model, batch)) == pytest.approx(1 - (2 / 3 + 4 / 5) / 2)


def test_f1_needs_a_tokenizer(bpe, trainer_of):
    encoded, collator, _ = squad_batch(bpe)
    trainer = trainer_of(tiny("llama", bpe), encoded, collator, zo_objective="f1")
    with pytest.raises(ValueError, match="pass the tokenizer as processing_class"):
        trainer.train()


@pytest.mark.parametrize("name", [name for name, score in OBJECTIVES.items() if score is not None])
def test_training_by_a_score(name, bpe, trainer_of):
    model, loss = tiny("llama", bpe), None
    encoded, collator, _ = squad_batch(bpe)
    if name == "accuracy":
        encoded, collator, loss = encode_rows(TASKS["copa"], COPA[1::2], bpe, 400), OptionCollator(bpe, model), option_loss
    trainer = trainer_of(
        model, encoded, collator, zo_objective=name, processing_class=bpe, compute_loss_func=loss, zo_num_directions=8
    )
    measured = []
    score = OBJECTIVES[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OBJECTIVES, name, lambda *args: measured.append(float(score(*args))) or measured[-1])
        trainer.train()
    assert len(measured) == 32  # sixteen probes in each of two steps
    assert all(0 <= value <= 1 for value in measured)
    assert len(set(measured)) > 1
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [pytest.approx(sum(measured[i : i + 16]) / 16, abs=1e-6) for i in (0, 16)]


def test_a_function_of_ones_own(bpe, trainer_of):
    encoded, collator, _ = squad_batch(bpe)
    model, seen = tiny("llama", bpe), []

    def norm(model, inputs):
        seen.append(sorted(inputs))
        return model.get_input_embeddings().weight.pow(2).mean()

    trainer = trainer_of(model, encoded, collator, objective_fn=norm)
    weights = model.get_input_embeddings().weight.detach().clone()
    trainer.train()
    assert seen == [["attention_mask", "input_ids", "labels"]] * 4
    assert not torch.equal(model.get_input_embeddings().weight, weights)
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    # The mean of w^2 over a Gaussian perturbation of radius 0.5, both signs: w^2 + 0.25, up to chance.
    assert first == pytest.approx(float(weights.pow(2).mean()) + 0.25, abs=0.02)


@pytest.mark.parametrize("value", [None, torch.zeros(3)])
def test_a_function_that_returns_no_number_is_named(value, bpe, trainer_of):
    encoded, collator, _ = squad_batch(bpe)
    trainer = trainer_of(tiny("llama", bpe), encoded, collator, objective_fn=lambda model, inputs: value)
    with pytest.raises(TypeError, match="objective_fn must return one number"):
        trainer.train()


def test_an_objective_of_another_name_gets_batches_as_they_came(bpe, trainer_of, monkeypatch):
    model, seen = tiny("llama", bpe), []

    def own(trainer, model, inputs):
        seen.append((sorted(inputs), inputs["attention_mask"].ndim))
        return trainer.compute_loss(model, dict(inputs))

    monkeypatch.setitem(OBJECTIVES, "own", own)
    encoded = encode_rows(TASKS["copa"], COPA, bpe, 400)
    options = {"zo_objective": "own", "compute_loss_func": option_loss}
    trainer_of(model, encoded, OptionCollator(bpe, model), **options).train()
    assert seen == [(["attention_mask", "input_ids", "labels"], 2)] * 4


def test_a_function_and_a_name_exclude_each_other(bpe, trainer_of):
    encoded, collator, _ = squad_batch(bpe)
    with pytest.raises(ValueError, match="objective_fn and zo_objective='accuracy' exclude each other"):
        trainer_of(tiny("llama", bpe), encoded, collator, zo_objective="accuracy", objective_fn=lambda model, inputs: 0.0)


def test_an_unknown_objective_lists_those_there_are(bpe, trainer_of):
    encoded, collator, _ = squad_batch(bpe)
    with pytest.raises(ValueError, match="zo_objective='bleu' does not exist; choose one of loss, accuracy, f1"):
        trainer_of(tiny("llama", bpe), encoded, collator, zo_objective="bleu")


def test_what_a_mean_loss_is_a_mean_of(bpe):
    causal, masked = tiny("llama", bpe), tiny("mlm", make_wordpiece())
    labels = torch.tensor([[5, -100, 6], [7, 8, 9]])
    assert int(label_count(causal, {"labels": labels})) == 3  # the first position is never predicted
    assert int(label_count(masked, {"labels": labels})) == 5
    assert int(label_count(masked, {"labels": torch.tensor([1, 0, -100])})) == 2
    assert label_count(masked, {"labels": torch.tensor([0.5, -100.0])}) == 2
    options = OptionCollator(bpe)(encode_rows(TASKS["copa"], COPA, bpe, 400).examples)
    assert len(options["input_ids"]) == 8
    assert label_count(causal, options) == 4
    assert label_count(causal, {"input_ids": labels}) == 2
