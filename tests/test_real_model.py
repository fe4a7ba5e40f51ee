"""The packaged 135M-parameter language model: written, read, and stepped with real sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import Recorder, digest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_zo import ZOTrainer, ZOTrainingArguments, cli
from hf_zo.packing import Packing
from hf_zo.tasks import (
    OptionCollator,
    encode_rows,
    get_task,
    load_rows,
    metrics_for,
    option_loss,
    option_predictions,
)

pytestmark = pytest.mark.slow
SENTENCES = Path(__file__).parents[1] / "examples" / "demo_data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    there = tmp_path_factory.mktemp("demo-model")
    assert cli.main(["demo-model", str(there)]) == 0
    return there


def test_demo_model_is_an_ordinary_folder(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = model(**inputs).logits[0, -1].argmax()
    assert tokenizer.decode(best).strip() == "Paris"


def test_packed_and_padded_sentences_have_one_loss(folder: Path) -> None:
    task = get_task("sst2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = encode_rows(task, load_rows(task, "train", SENTENCES, max_samples=16), tokenizer, 128)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    packing = Packing(model)

    def loss(batch: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad(), packing.reading(dict(batch)) as inputs:
            labels = inputs.pop("labels")
            return option_loss(model(**inputs), labels)

    padded = OptionCollator(tokenizer, model)(encoded.examples)
    losses = [float(loss(padded)), float(loss(packing(padded, loss)))]
    assert packing.form == "packed"
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_full_parameter_step_on_real_sentences(folder: Path, tmp_path: Path) -> None:
    """Transient weights reach every tensor and restore bitwise in bf16."""
    task = get_task("sst2")
    rows = load_rows(task, "train", SENTENCES, max_samples=4)  # few: some processors have no 16-bit products
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    arguments = ZOTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    encoded = encode_rows(task, rows, tokenizer, 128)
    trainer = ZOTrainer(
        model,
        arguments,
        train_dataset=encoded,
        eval_dataset=encoded,
        data_collator=OptionCollator(tokenizer, model),
        compute_loss_func=option_loss,
        preprocess_logits_for_metrics=option_predictions,
        compute_metrics=metrics_for(task, rows),
    )
    seen: dict[str, list[str]] = {"on_step_begin": [], "on_pre_optimizer_step": [], "on_step_end": []}
    trainer.add_callback(Recorder(lambda hook, step, kwargs: seen[hook].append(digest(model)) if hook in seen else None))
    trainer.train()
    assert seen["on_step_begin"] == seen["on_pre_optimizer_step"]
    assert seen["on_step_end"][0] != seen["on_step_begin"][0]
    assert trainer._runtime.restore == "transient"
    assert not trainer._runtime._transient.whole
    assert not trainer._runtime._transient.copied
    assert 0.0 <= trainer.evaluate()["eval_accuracy"] <= 1.0
