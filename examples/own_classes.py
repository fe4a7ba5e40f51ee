"""Classify your own texts: a language model, a prompt, and the recipe (`zo_method="auto"`).

    hf-zo demo-model smollm2
    python examples/own_classes.py smollm2

Takes the review sentences in `demo_data`; put your own files, columns, prompt and options in their place. Options that differ
in their last token alone let the recipe fit the output layer, and middle blocks, before its first step.
"""

import argparse
from pathlib import Path

from hf_zo import ZOTrainer, ZOTrainingArguments
from hf_zo.tasks import Task, load_rows
from hf_zo.tasks.finetune import ModelArguments, trainer_parts

TASK = Task(
    name="reviews",
    dataset="",  # of the Hub, where rows are not read from files
    config=None,
    fields=("sentence",),
    prompt=lambda row: f"{row['sentence']} It was",
    options=lambda row: [" terrible", " great"],  # what labels 0 and 1 stand for
    context="sentence",  # what is shortened when a prompt is too long
)
DATA = Path(__file__).parent / "demo_data"  # train.jsonl and validation.jsonl
STEPS = 40


def main(model: str) -> tuple[float, float]:
    """Train on one file, and return the accuracies on the other before and after."""
    train, validation = (load_rows(TASK, split, DATA) for split in ("train", "validation"))
    args = ZOTrainingArguments(
        "runs/own_classes",
        zo_method="auto",
        max_steps=STEPS,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,  # the collator reads what the prompts were made into
    )
    trainer = ZOTrainer(args=args, **trainer_parts(ModelArguments(model), TASK, train, validation))
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()  # an ordinary PEFT adapter, and the trajectory of its training
    print(f"accuracy on {len(validation)} rows: {before:.1%} before, {after:.1%} after")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a language model: a folder, or its name on the Hub")
    main(parser.parse_args().model)
