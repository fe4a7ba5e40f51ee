"""Supervised fine-tuning with TRL, without a backward pass: its trainer takes the step through the mixin.

    pip install trl
    hf-zo demo-model smollm2
    python examples/sft.py smollm2

The model learns to complete the prompts of `demo_data`. `SFTTrainer` prepares the texts, logs and saves as it always does.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_zo import ZOTrainerMixin, ZOTrainingArguments

ROWS = [json.loads(line) for line in (Path(__file__).parent / "demo_data" / "train.jsonl").open()]
STEPS = 40


class ZOSFTTrainer(ZOTrainerMixin, trl.SFTTrainer):
    """`SFTTrainer`, whose steps are made of forward passes."""


@dataclass
class ZOSFTConfig(ZOTrainingArguments, trl.SFTConfig):
    """Its arguments, and those of the method."""


def main(name: str) -> tuple[float, float]:
    """Train, and return the losses on rows that were kept back, before and after."""
    texts = [{"prompt": f"{row['sentence']} It was", "completion": [" terrible.", " great."][row["label"]]} for row in ROWS]
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    args = ZOSFTConfig(
        "runs/sft",
        learning_rate=3e-3,  # 30 times the published rate: best for short runs of a model this small
        max_steps=STEPS,
        per_device_train_batch_size=16,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    )
    trainer = ZOSFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_list(texts[:-100]),
        eval_dataset=Dataset.from_list(texts[-100:]),
        processing_class=AutoTokenizer.from_pretrained(name),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    print(f"loss on {len(texts[-100:])} rows: {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a language model: a folder, or its name on the Hub")
    main(parser.parse_args().model)
