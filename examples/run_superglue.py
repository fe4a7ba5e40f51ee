"""Fine-tune a model on a SuperGLUE task with forward passes only (cb, boolq, wsc, wic, copa, multirc or record).

    python examples/run_superglue.py --model_name_or_path MODEL --task_name boolq --do_train --do_eval --peft lora \\
        --learning_rate 3e-3 --max_train_samples 1000 --max_steps 250 --per_device_train_batch_size 16 --output_dir runs/boolq

Takes the flags of the Trainer's own examples and every field of ZOTrainingArguments; `--dataset_dir` reads local JSON lines
instead of the Hub. Writes all_results.json, train_results.json, eval_results.json and the model to the output folder.
"""

from hf_zo.tasks.finetune import main

if __name__ == "__main__":
    main("superglue")
