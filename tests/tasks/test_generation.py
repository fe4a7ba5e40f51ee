import numpy as np
import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tasks.tiny import ROWS, tiny
from transformers import DataCollatorForSeq2Seq, LlamaForCausalLM

from hf_zo import ZOTrainer, ZOTrainingArguments
from hf_zo.tasks import TASKS, GenerateToEvaluate, encode_rows, metrics_for
from hf_zo.tasks.generation import decode_answers, generate, greedy_answers, reference_answers

SQUAD = TASKS["squad"]
ROW = ROWS["squad"][0]
ROWS_OF_SQUAD = [
    ROW,
    {**ROW, "context": ROW["context"] * 5, "answers": {"text": ["the film"], "answer_start": [0]}},
    {
        **ROW,
        "context": "Great.",
        "question": "Was it terrible?",
        "answers": {"text": ["No", "it was great"], "answer_start": [0, 0]},
    },
]


class GeneratingTrainer(GenerateToEvaluate, ZOTrainer):
    pass


class Parrot(LlamaForCausalLM):
    """Says what it was told to say to a prompt, whatever its weights."""

    def generate(self, input_ids, attention_mask, **settings):
        heard = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        self.heard += heard
        said = [torch.tensor(self.says[prompt]) for prompt in heard]
        said = torch.nn.utils.rnn.pad_sequence(said, batch_first=True, padding_value=settings["pad_token_id"])
        return torch.cat([input_ids, said], dim=1)


def batch_of(tokenizer, rows=ROWS_OF_SQUAD):
    return DataCollatorForSeq2Seq(tokenizer)([dict(example) for example in encode_rows(SQUAD, rows, tokenizer, 400).examples])


def trainer_for(model, tokenizer, tmp_path, rows=ROWS_OF_SQUAD):
    encoded = encode_rows(SQUAD, rows, tokenizer, 400)
    return GeneratingTrainer(
        model,
        ZOTrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            max_steps=2,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            learning_rate=1e-3,
            zo_eps=1e-2,
        ),
        train_dataset=encoded,
        eval_dataset=encoded,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        compute_metrics=metrics_for(SQUAD, rows, tokenizer),
    )


def alone(model, tokenizer, row, new_tokens):
    """The model's own greedy continuation of one unpadded prompt, up to the first new line."""
    prompt = torch.tensor([tokenizer(SQUAD.prompt(row))["input_ids"]])
    stops = [tokenizer.eos_token_id, *tokenizer("\n")["input_ids"]]
    with torch.no_grad():
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
        )
    return out[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("adapter", [None, PrefixTuningConfig, PromptTuningConfig])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_a_batch_gets_the_answers_that_each_prompt_alone_gets(kind, adapter, side, bpe):
    model = tiny(kind, bpe)
    if adapter is not None:
        model = get_peft_model(model, adapter(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    bpe.padding_side = side
    got = generate(model, batch_of(bpe), bpe, 6)
    for row, there in zip(ROWS_OF_SQUAD, got, strict=True):
        wanted = alone(model, bpe, row, 6)
        assert there[: len(wanted)].tolist() == wanted
        assert set(there[len(wanted) :].tolist()) <= {bpe.pad_token_id}
    assert any(len(set(ids.tolist())) > 1 for ids in got)


def test_a_prompt_ends_where_the_labels_begin(bpe):
    model = tiny("llama", bpe)
    model.__class__ = Parrot
    prompts = [tuple(bpe(SQUAD.prompt(row))["input_ids"]) for row in ROWS_OF_SQUAD]
    model.heard, model.says = [], {prompt: bpe("great")["input_ids"] for prompt in prompts}
    assert greedy_answers(model, batch_of(bpe), bpe) == ["great"] * 3
    assert model.heard == prompts
    assert bpe.decode(model.heard[1]).endswith("Answer:")


def test_generation_stops_at_a_new_line(bpe):
    model = tiny("llama", bpe)
    new_line, word = bpe("\n")["input_ids"][0], bpe.convert_tokens_to_ids("ĠParis")
    # The last layer reads the position's own token only: Paris after anything, a new line after Paris.
    successors = torch.full((len(bpe),), word)
    successors[word] = new_line
    model.forward = hold(model.forward, successors)
    out = generate(model, batch_of(bpe, [ROW]), bpe, 8)
    assert out.tolist() == [[word, new_line]]
    assert greedy_answers(model, batch_of(bpe, [ROW]), bpe) == ["Paris"]


def hold(forward, successors):
    """``forward`` with logits that make ``successors[token]`` follow a token."""

    def held(input_ids=None, **kwargs):
        out = forward(input_ids=input_ids, **kwargs)
        out.logits = torch.nn.functional.one_hot(successors[input_ids], out.logits.shape[-1]).float()
        return out

    return held


def test_decoding_takes_the_first_line(bpe):
    ids = bpe(" Paris \nor Rome")["input_ids"]
    rows = np.array([[-100, *ids, bpe.eos_token_id, bpe.pad_token_id, -100]])
    assert decode_answers(rows, bpe) == ["Paris"]
    assert decode_answers([[-100, -100]], bpe) == [""]


def test_references_are_the_first_answers(bpe):
    assert reference_answers(batch_of(bpe), bpe) == ["Paris", "the film", "No"]


def test_the_reference_does_not_leak_into_what_is_generated(bpe, tmp_path):
    other = [{**row, "answers": {"text": ["the capital of France"], "answer_start": [0]}} for row in ROWS_OF_SQUAD]
    model = tiny("llama", bpe)
    one = trainer_for(model, bpe, tmp_path).predict(encode_rows(SQUAD, ROWS_OF_SQUAD, bpe, 400))
    two = trainer_for(model, bpe, tmp_path, other).predict(encode_rows(SQUAD, other, bpe, 400))
    assert np.array_equal(one.predictions, two.predictions)
    for row, said in zip(ROWS_OF_SQUAD, one.predictions, strict=True):
        wanted = alone(model, bpe, row, 32)
        assert [i for i in said.tolist() if i not in (-100, bpe.pad_token_id)] == wanted
    assert one.metrics["test_loss"] != two.metrics["test_loss"]


def test_evaluate_compares_with_the_best_of_several_references(bpe, tmp_path):
    model = tiny("llama", bpe)
    model.__class__ = Parrot
    # Exactly the second reference; one word of two; nothing right.
    said = [" The city of Paris!\n", " a great film\n", " terrible\n"]
    prompts = [tuple(bpe(SQUAD.prompt(row))["input_ids"]) for row in ROWS_OF_SQUAD]
    model.heard, model.says = [], {p: bpe(s)["input_ids"] for p, s in zip(prompts, said, strict=True)}
    metrics = trainer_for(model, bpe, tmp_path).evaluate()
    assert model.heard == prompts
    assert metrics["eval_exact_match"] == pytest.approx(1 / 3)
    assert metrics["eval_f1"] == pytest.approx((1 + 2 * 1 / (2 + 1) + 0) / 3)


def test_train_then_evaluate(bpe, tmp_path):
    model = tiny("gpt2", bpe)
    trainer = trainer_for(model, bpe, tmp_path)
    batch = batch_of(bpe, ROWS_OF_SQUAD[:1])
    before = trainer.evaluate()
    assert trainer.train().global_step == 2
    after = trainer.evaluate()
    assert after["eval_loss"] != before["eval_loss"]
    assert {"eval_exact_match", "eval_f1", "eval_loss"} <= set(after)
    with torch.no_grad():
        loss = float(model(**batch).loss)
    one = trainer.evaluate(encode_rows(SQUAD, ROWS_OF_SQUAD[:1], bpe, 400))
    assert one["eval_loss"] == pytest.approx(loss, abs=1e-5)  # the loss is that of the reference answer


def test_without_metrics_nothing_is_generated(bpe, tmp_path):
    model = tiny("llama", bpe)
    trainer = trainer_for(model, bpe, tmp_path)
    loss, predictions, labels = trainer.prediction_step(model, dict(batch_of(bpe)), prediction_loss_only=True)
    assert loss > 0
    assert predictions is None
    assert labels is None
