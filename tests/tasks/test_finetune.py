import json
import logging
import sys

import pytest
import torch
from peft import PeftModel
from tasks.test_scoring import option_loss_of
from tasks.tiny import ROWS, make_bpe, make_wordpiece, tiny
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertForMaskedLM, RobertaForMaskedLM

from hf_zo import ZOTrainingArguments
from hf_zo.tasks import TASKS
from hf_zo.tasks.finetune import DataArguments, ModelArguments, _context_length, build_trainer, load_model, main
from hf_zo.tasks.generation import MAX_NEW_TOKENS
from hf_zo.tasks.templates import get_task

TEXTS = ["The film was bad.", "a fine film", "It was so", "great"]
SENTENCES = [{"sentence": text, "label": i % 2} for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of saved models, by class."""
    folder = tmp_path_factory.mktemp("models")
    bpe, wordpiece = make_bpe(), make_wordpiece()
    for model, tokenizer in (
        (tiny("llama", bpe), bpe),
        (tiny("mlm", wordpiece), wordpiece),
    ):
        model.save_pretrained(folder / type(model).__name__)
        tokenizer.save_pretrained(folder / type(model).__name__)
    return folder


@pytest.fixture
def run(models, tmp_path, monkeypatch):
    """Run ``main`` with a command line on rows of a task; returns its metrics and the output folder."""

    def run(task, rows, *flags, model="LlamaForCausalLM"):
        data, out = tmp_path / "data", tmp_path / "out"
        data.mkdir(exist_ok=True)
        for split in ("train", "validation"):
            (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings = {
            "model_name_or_path": models / model,
            "task_name": task,
            "dataset_dir": data,
            "output_dir": out,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 3,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "dtype": "float32",
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
        }
        argv = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["run.py", *argv, "--do_train", "--do_eval", *flags])
        return main(TASKS[task].family if task in TASKS else "glue"), out

    return run


def results_of(out):
    return json.loads((out / "all_results.json").read_text())


@pytest.mark.parametrize("peft", ["none", "lora", "prefix"])
def test_options_of_a_causal_lm(run, models, peft, bpe):
    flags = ("--peft", peft, "--lora_r", "2", "--num_virtual_tokens", "3")
    metrics, out = run("sst2", SENTENCES, *flags)
    results = results_of(out)
    assert 0 <= results["eval_accuracy"] <= 1
    assert results["eval_loss"] == metrics["eval_loss"]
    assert (results["train_samples"], results["eval_samples"]) == (4, 4)
    assert (results["train_shortened"], results["eval_shortened"]) == (0, 0)
    assert results["train_loss"] > 0
    # What was saved is what was evaluated, and it is not what it began with.
    begun = AutoModelForCausalLM.from_pretrained(models / "LlamaForCausalLM").eval()
    saved = AutoModelForCausalLM.from_pretrained(out) if peft == "none" else PeftModel.from_pretrained(begun, out)
    assert option_loss_of(saved.eval(), bpe, "sst2", SENTENCES) == pytest.approx(results["eval_loss"], abs=1e-4)
    untrained, _ = run("sst2", SENTENCES, *flags, "--learning_rate", "0")
    assert results["eval_loss"] != pytest.approx(untrained["eval_loss"], abs=1e-4)


def test_a_verbalizer_of_a_masked_lm(run):
    _, out = run("sst2", SENTENCES, "--head", "mlm", model="BertForMaskedLM")
    assert results_of(out)["eval_accuracy"] in (0, 0.25, 0.5, 0.75, 1)


def test_lora_on_a_masked_lm(run):
    _, out = run(
        "sst2", SENTENCES, "--head", "mlm", "--peft", "lora", "--lora_target_modules", "query", model="BertForMaskedLM"
    )
    assert (out / "adapter_model.safetensors").is_file()
    assert "eval_accuracy" in results_of(out)


def test_lora_on_all_linear_layers(models):
    arguments = ModelArguments(
        str(models / "LlamaForCausalLM"), peft="lora", lora_target_modules=["all-linear"], dtype="float32"
    )
    model, _ = load_model(arguments, TASKS["sst2"])
    adapted = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_classification_head(run, wordpiece):
    rows = [{**ROWS["mnli"][0], "label": label} for label in (0, 1, 2)]
    _, out = run("mnli", rows, "--head", "classification", model="BertForMaskedLM")
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert model.config.num_labels == 3
    pair = wordpiece(rows[0]["premise"], rows[0]["hypothesis"], return_tensors="pt")
    assert set(pair["token_type_ids"].tolist()[0]) == {0, 1}
    with torch.no_grad():
        logits = model(**pair).logits.expand(3, -1)
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(3))
    results = results_of(out)
    assert results["eval_loss"] == pytest.approx(float(loss), abs=1e-5)
    assert results["eval_accuracy"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("peft", ["none", "prefix"])
def test_generated_answers(run, peft):
    rows = [ROWS["squad"][0], {**ROWS["squad"][0], "context": "Great.", "answers": {"text": ["No"], "answer_start": [0]}}]
    _, out = run("squad", rows, "--peft", peft, "--num_virtual_tokens", "3")
    results = results_of(out)
    assert {"eval_exact_match", "eval_f1", "eval_loss"} <= set(results)
    assert results["eval_samples"] == 2


def test_numbers_of_samples_and_shortened_rows_are_reported(run, caplog):
    rows = [*SENTENCES, {"sentence": "The film was terrible. " * 30, "label": 1}]
    with caplog.at_level(logging.WARNING, logger="hf_zo.tasks.finetune"):
        _, out = run("sst2", rows, "--max_train_samples", "3", "--max_seq_length", "24")
    results = results_of(out)
    assert (results["train_samples"], results["eval_samples"], results["eval_shortened"]) == (3, 5, 1)
    assert "1 of 5 evaluation rows of sst2 were shortened to 24 tokens by cutting their sentence." in caplog.messages


def test_metrics_get_the_rows_in_the_order_of_evaluation(run, monkeypatch):
    """Rows are evaluated by length; groups, entities and references must follow."""
    rows = [{"sentence": "great " * n, "label": label} for n, label in ((9, 1), (2, 0), (30, 1), (1, 0), (5, 1))]
    seen = []

    def spy(task, rows, tokenizer):
        def compute(prediction):
            seen.append((rows, prediction.label_ids["target"].tolist()))
            return {}

        return compute

    monkeypatch.setattr("hf_zo.tasks.finetune.metrics_for", spy)
    run("sst2", rows)
    ((told, evaluated),) = seen
    assert [len(row["sentence"]) for row in told] == [6, 12, 30, 54, 180]
    assert evaluated == [row["label"] for row in told] == [0, 0, 1, 1, 1]


def test_an_unknown_task_ends_with_the_tasks_there_are(run, capsys):
    with pytest.raises(SystemExit) as ended:
        run("sst3", SENTENCES)
    assert ended.value.code == 2
    assert (
        "task_name='sst3' does not exist; choose one of sst2, cola, mrpc, qqp, mnli, qnli, rte, sst5."
        in capsys.readouterr().err
    )


def test_a_task_of_another_script_is_unknown(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--model_name_or_path", "x", "--task_name", "sst2", "--output_dir", "x"])
    with pytest.raises(SystemExit) as ended:
        main("squad")
    assert ended.value.code == 2
    assert "choose one of squad, drop." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "nothing to do: give --do_train, --do_eval or both"),
        (["--do_train", "--resume_from_checkpoint", "True"], "x has no checkpoint; leave it out to begin"),
    ],
)
def test_a_run_that_cannot_begin_ends_with_a_message(flags, said, monkeypatch, capsys):
    told = ["--model_name_or_path", "x", "--task_name", "squad", "--output_dir", "x", "--use_cpu", *flags]
    monkeypatch.setattr(sys, "argv", ["run.py", *told])
    with pytest.raises(SystemExit) as ended:
        main("squad")
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_setting_that_cannot_work_ends_with_its_message(run, capsys):
    with pytest.raises(SystemExit) as ended:
        run("sst2", SENTENCES, "--max_grad_norm", "1")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: max_grad_norm=1.0: there is no gradient to clip")


def test_bad_data_speaks_up_before_a_model_is_loaded(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"sentence": "x"}\n')
    training = ZOTrainingArguments(output_dir=str(tmp_path), do_train=True, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1: field 'label' is missing"):
        build_trainer(ModelArguments("no/model"), DataArguments("sst2", str(tmp_path)), training, get_task("sst2"))


def test_there_is_nothing_to_predict(tmp_path):
    training = ZOTrainingArguments(output_dir=str(tmp_path), do_predict=True, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="do_predict=True wants a test split"):
        build_trainer(ModelArguments("no/model"), DataArguments("sst2", str(tmp_path)), training, get_task("sst2"))


def test_bad_data_ends_with_its_place(monkeypatch, capsys, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"sentence": "x", "label": 7}\n')
    command = f"run_glue.py --model_name_or_path no/model --task_name sst2 --dataset_dir {tmp_path} --do_train --use_cpu"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--report_to", "none", "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main("glue")
    assert ended.value.code == 2
    assert "train.jsonl, line 1: field 'label' gives 7" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["/no/model", "no/model"])
def test_a_model_that_does_not_exist_ends_with_a_message(run, capsys, model):
    with pytest.raises(SystemExit) as ended:
        run("sst2", SENTENCES, "--model_name_or_path", model)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("settings", "task", "message"),
    [
        ({"head": "seq"}, "sst2", "head='seq' does not exist; choose one of lm, mlm, classification"),
        ({"dtype": "int8"}, "sst2", "dtype='int8' does not exist; choose bfloat16, float32, float16 or auto"),
        (
            {"quantization": "int3"},
            "sst2",
            "quantization='int3' does not exist; choose 'nf4', 'int8', 'torchao-int8' or 'none'",
        ),
        ({"peft": "ia3"}, "sst2", "peft='ia3' does not exist; choose 'lora', 'prefix' or 'none'"),
        ({"head": "classification"}, "copa", "copa has no plain text form for head='classification'"),
        ({"head": "classification"}, "squad", "squad has no plain text form for head='classification'"),
        ({"head": "mlm"}, "squad", "head='mlm' with task squad and peft='none': a masked LM generates no answers"),
        ({"head": "mlm", "peft": "prefix"}, "sst2", "PEFT has no prefix for it"),
    ],
)
def test_settings_that_do_not_go_together(models, settings, task, message):
    arguments = ModelArguments(str(models / "LlamaForCausalLM"), **{"dtype": "float32", **settings})
    with pytest.raises(ValueError, match=message):
        load_model(arguments, TASKS[task])


@pytest.mark.parametrize(
    ("capability", "dtype"), [("AVX2", torch.float32), ("DEFAULT", torch.float32), ("AVX512", torch.bfloat16)]
)
def test_auto_dtype_is_what_the_processor_multiplies(models, capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model, _ = load_model(ModelArguments(str(models / "LlamaForCausalLM")), TASKS["sst2"])
    assert {p.dtype for p in model.parameters()} == {dtype}


def save_without_padding(folder):
    """A model whose tokenizer has no token to pad with, while its configuration names one."""
    tokenizer = make_bpe()
    tiny("llama", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
    save_without_padding(tmp_path)
    model, loaded = load_model(ModelArguments(str(tmp_path), dtype="float32"), TASKS["sst2"])
    assert loaded.pad_token == loaded.eos_token == "</s>"
    assert model.config.pad_token_id == loaded.eos_token_id
    assert model.config.use_cache is False


def test_a_classifier_reads_the_last_token_before_the_padding(tmp_path):
    save_without_padding(tmp_path)
    model, tokenizer = load_model(ModelArguments(str(tmp_path), head="classification", dtype="float32"), TASKS["sst2"])
    alone, padded = (tokenizer(texts, padding=True, return_tensors="pt") for texts in (["great"], ["great", TEXTS[0]]))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**padded).logits[:1], model(**alone).logits)


@pytest.mark.parametrize(("peft", "virtual"), [("none", 0), ("prefix", 5)])
@pytest.mark.parametrize("task", ["boolq", "squad"])
def test_prefix_and_answer_fit_into_the_positions_too(run, tmp_path, models, task, peft, virtual):
    """A model with learned positions has no place beyond them."""
    kind = f"gpt2-{task}-{peft}"
    tokenizer = make_bpe()
    tiny("gpt2", tokenizer, positions=160).save_pretrained(models / kind)
    tokenizer.save_pretrained(models / kind)
    context = TASKS[task].context
    row = {**ROWS[task][0], context: "It rained in Paris. " * 60}
    _, out = run(task, [row, row], "--peft", peft, model=kind)
    results = results_of(out)
    assert results["eval_shortened"] == 2
    assert 160 - virtual - MAX_NEW_TOKENS > 100


@pytest.mark.parametrize(("kind", "places"), [(RobertaForMaskedLM, 18), (BertForMaskedLM, 20)])
def test_positions_that_are_counted_from_after_paddings_are_fewer(kind, places, bpe):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    model = kind(kind.config_class(**sizes, max_position_embeddings=20, pad_token_id=1))
    assert _context_length(model, bpe, TASKS["sst2"]) == places
    model(input_ids=torch.full((1, places), 5))
    with pytest.raises(Exception, match=r"out of (bounds|range)|must match"):
        model(input_ids=torch.full((1, places + 1), 5))
