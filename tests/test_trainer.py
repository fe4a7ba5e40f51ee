"""ZOTrainer on the Trainer's loop: schedules, saving, hooks, other trainers, refusals."""

from __future__ import annotations

import gc
import math
import sys
import tracemalloc
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from support import (
    Recorder,
    Sentences,
    arguments_of,
    assert_same_weights,
    collate,
    digest,
    model_of,
    tiny_llama,
    trainer_of,
    weights_of,
)
from torch import nn
from torch._dynamo.utils import counters
from transformers import (
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_zo import Trajectory, ZOTrainer, ZOTrainerMixin, ZOTrainingArguments, replay
from hf_zo.adapters import freeze_basis
from hf_zo.runtimes.vllm import Engine, EngineError
from hf_zo.training_args import RECOMMENDED


def test_applied_learning_rate_equals_logged_at_every_step(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=6, warmup_steps=2, weight_decay=0.0, learning_rate=0.05)
    before: list[dict[str, torch.Tensor]] = []
    applied: list[float] = []

    def see(hook: str, step: int, kwargs: Any) -> None:
        if hook == "on_pre_optimizer_step":
            before.append(weights_of(trainer.model))
            estimate = trainer._zo_optimizer._staged
            gradient = {name: estimate.gradient(name, p) for name, p in before[-1].items()}
            before[-1] = {name: (p, gradient[name]) for name, p in before[-1].items()}  # type: ignore[misc]
        if hook == "on_optimizer_step":
            moved = sum(
                float(((p.detach() - before[-1][n][0]).double() * before[-1][n][1]).sum())
                for n, p in trainer.model.named_parameters()
            )
            applied.append(-moved / sum(float(g.double().pow(2).sum()) for _, g in before[-1].values()))

    trainer.add_callback(Recorder(see))
    trainer.train()
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([0.0, 0.025, 0.05, 0.0375, 0.025, 0.0125])
    assert applied == pytest.approx(logged, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "polynomial", "constant_with_warmup", "inverse_sqrt"])
def test_schedules_of_the_trainer_work(schedule: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=4, learning_rate=0.05, lr_scheduler_type=schedule)
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["learning_rate"] == pytest.approx(0.05)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=100, learning_rate=0.02, logging_steps=50, zo_num_directions=4, weight_decay=0.0)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05


def test_logs_carry_the_step(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "mezo-n3-rademacher", max_steps=3)
    trainer.train()
    entry = trainer.state.log_history[-2]
    assert entry["zo/forward_passes"] == 18
    assert entry["zo/skipped_steps"] == 0
    assert entry["zo/effective_learning_rate"] == entry["learning_rate"]
    assert entry["grad_norm"] > 0
    assert "AdamW" not in str(trainer.args.optim)


def test_checkpoint_taken_before_the_update_resumes_to_the_same_end(tmp_path: Path) -> None:
    """A just-in-time checkpoint fires at on_pre_optimizer_step, while an estimate is staged."""
    whole = trainer_of(tmp_path / "a", "mezo-adamw", max_steps=6)
    whole.train()
    interrupted = trainer_of(tmp_path / "b", "mezo-adamw", max_steps=6)
    interrupted.add_callback(
        Recorder(
            lambda hook, step, kwargs: (
                interrupted._save_checkpoint(interrupted.model, None) if hook == "on_pre_optimizer_step" and step == 3 else None
            )
        )
    )
    interrupted.train()
    resumed = trainer_of(tmp_path / "b", "mezo-adamw", max_steps=6)
    started: list[int] = []
    resumed.add_callback(Recorder(lambda hook, step, kwargs: started.append(step) if hook == "on_step_begin" else None))
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert len(started) == 3
    assert_same_weights(weights_of(whole.model), weights_of(resumed.model))


def test_weights_are_clean_at_every_hook(tmp_path: Path) -> None:
    """They change between on_pre_optimizer_step and on_optimizer_step, and nowhere else."""
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=2, max_steps=2, zo_restore="transient")
    seen: list[tuple[str, str]] = []
    trainer.add_callback(Recorder(lambda hook, step, kwargs: seen.append((hook, digest(trainer.model)))))
    trainer.train()
    changes = [(a[0], b[0]) for a, b in pairwise(seen) if a[1] != b[1]]
    assert changes == [("on_pre_optimizer_step", "on_optimizer_step")] * 2


def test_a_window_calls_the_model_twice_per_micro_batch_after_the_first_look(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=3, max_steps=2, zo_restore="copy", zo_packing=False)
    calls = [0]
    trainer.model.register_forward_pre_hook(lambda module, args: calls.__setitem__(0, calls[0] + 1))
    trainer.train()
    assert calls[0] == 2 * 3 * 2 + 2  # the first batch has shown, with two calls, that the loss divides by its items


def test_the_model_keeps_its_storage(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, zo_restore="copy")
    before = {name: p.data_ptr() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert before == {name: p.data_ptr() for name, p in trainer.model.named_parameters()}


def test_norms_and_biases_are_not_decayed(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    optimizer = trainer.create_optimizer()
    decayed = {optimizer.names[p] for g in optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
    assert "model.norm.weight" not in decayed
    assert not any("layernorm" in name for name in decayed)
    assert "model.layers.0.self_attn.q_proj.weight" in decayed


def test_zero_learning_rate_changes_nothing(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, learning_rate=0.0)
    before = weights_of(trainer.model)
    trainer.train()
    assert_same_weights(before, weights_of(trainer.model))


def test_unset_settings_are_resolved_by_what_is_trained(tmp_path: Path) -> None:
    for form, kind in (("full", "full"), ("lora", "lora")):
        trainer = trainer_of(tmp_path, form=form, learning_rate=None, zo_eps=None)
        assert (trainer.args.learning_rate, trainer.args.zo_eps) == RECOMMENDED["mezo"][kind]  # type: ignore[index]


def test_any_torch_optimizer_can_be_given(tmp_path: Path) -> None:
    model = model_of("full")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    trainer = ZOTrainer(
        model,
        arguments_of(tmp_path, "mezo"),
        train_dataset=Sentences(),
        data_collator=collate,
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert trainer._zo_optimizer.inner is optimizer
    assert all("momentum_buffer" in state for state in optimizer.state.values())
    assert all(p.grad is None for p in model.parameters())


def test_a_given_optimizer_leaves_frozen_tensors_alone(tmp_path: Path) -> None:
    model = model_of("full")
    model.get_input_embeddings().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    settings: dict[str, Any] = {"train_dataset": Sentences(), "data_collator": collate, "optimizers": (optimizer, None)}
    before = weights_of(model)
    ZOTrainer(model, arguments_of(tmp_path, "mezo"), **settings).train()
    assert [name for name, p in weights_of(model).items() if torch.equal(p, before[name])] == ["model.embed_tokens.weight"]
    with pytest.raises(ValueError, match=r"holds 0 of the \d+ tensors that are trained"):
        ZOTrainer(tiny_llama(), arguments_of(tmp_path, "zo_act"), **settings).train()


def test_out_of_memory_retry_starts_from_clean_weights(tmp_path: Path) -> None:
    """auto_find_batch_size halves the batch after an out-of-memory error in the second probe."""
    trainer = trainer_of(tmp_path, auto_find_batch_size=True, zo_restore="copy", max_steps=3)
    compute_loss, calls = trainer.compute_loss, [0]

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = failing
    trainer.train()
    clean = trainer_of(tmp_path, zo_restore="copy", max_steps=3, per_device_train_batch_size=trainer._train_batch_size)
    clean.train()
    assert trainer._train_batch_size < 4
    assert_same_weights(weights_of(clean.model), weights_of(trainer.model))


def test_a_name_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'user/base'; load it first"):
        ZOTrainer("user/base", ZOTrainingArguments(str(tmp_path), zo_method="zo_act"))


def test_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        learning_rate=0.5,
        trainer_kwargs={"eval_dataset": Sentences(8, seed=1)},
    )
    trainer.train()
    best = min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)


def test_seq2seq_trainer(tmp_path: Path) -> None:
    class ZOSeq2SeqTrainer(ZOTrainerMixin, Seq2SeqTrainer):
        pass

    @dataclass
    class Arguments(ZOTrainingArguments, Seq2SeqTrainingArguments):
        pass

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
        )
    )
    rows = [{"input_ids": torch.arange(1, 7) + i, "labels": torch.arange(1, 5) + i} for i in range(8)]
    arguments = Arguments(
        output_dir=str(tmp_path),
        max_steps=3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        predict_with_generate=True,
        zo_restore="transient",
    )
    trainer = ZOSeq2SeqTrainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = weights_of(model)
    trainer.train()
    assert any(not torch.equal(before[name], p) for name, p in weights_of(model).items())
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def words_of_trl() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "the", "film", "was", "good", "bad", "very", "long", "and", "I", "liked", "it"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


TRL: dict[str, Any] = dict(
    max_steps=3,
    logging_steps=1,
    eval_strategy="steps",
    eval_steps=1,
    per_device_train_batch_size=2,
    report_to="none",
    save_strategy="no",
    use_cpu=True,
    disable_tqdm=True,
    max_length=32,
    zo_eps=1e-2,
    learning_rate=1e-2,
)


@pytest.mark.slow
def test_trl_sft_trainer_logs_probes_as_training(tmp_path: Path) -> None:
    """Also after evaluations, and for a model that comes in evaluation mode, as loaded ones do."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer):
        pass

    @dataclass
    class ZOSFTConfig(ZOTrainingArguments, SFTConfig):
        pass

    rows = datasets.Dataset.from_list([{"text": "the film was good and I liked it"}, {"text": "very long"}] * 4)
    model = tiny_llama().eval()
    arguments = ZOSFTConfig(output_dir=str(tmp_path), **TRL)
    trainer = ZOSFTTrainer(model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=words_of_trl())
    before = digest(model)
    trainer.train()
    assert digest(model) != before
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    assert all("mean_token_accuracy" in entry and "zo/projected_gradient" in entry for entry in logs)
    evaluated = trainer.evaluate()
    assert math.isfinite(evaluated["eval_loss"])


@pytest.mark.slow
def test_trl_dpo_trainer(tmp_path: Path) -> None:
    """Its second argument is not args. The reference model stays where it is while probes move the other."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    class ZODPOTrainer(ZOTrainerMixin, DPOTrainer):
        pass

    @dataclass
    class ZODPOConfig(ZOTrainingArguments, DPOConfig):
        pass

    tiny_llama().save_pretrained(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    rows = datasets.Dataset.from_list([{"prompt": "the film", "chosen": "was good", "rejected": "was very long"}] * 8)
    arguments = ZODPOConfig(output_dir=str(tmp_path), **{**TRL, "max_steps": 30, "eval_steps": 30, "learning_rate": 0.1})
    trainer = ZODPOTrainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, processing_class=words_of_trl())
    reference = digest(trainer.ref_model)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-2)  # both models are one
    assert logs[-1]["loss"] < 0.6
    assert all("rewards/margins" in entry for entry in logs)
    assert digest(trainer.ref_model) == reference


def test_a_loss_that_no_probe_changes_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once, and only if it has never changed."""

    def detached(model: nn.Module, inputs: Any) -> float:
        return 1.0

    turns = iter(range(10_000))
    for objective, warnings in ((detached, 1), (lambda model, inputs: 1.0 + (next(turns) % 7 == 6), 0), (None, 0)):
        caplog.clear()
        trainer_of(tmp_path, max_steps=25, trainer_kwargs={"objective_fn": objective}).train()
        assert sum("nothing is learnt" in record.message for record in caplog.records) == warnings


def test_inputs_of_a_step_are_prepared_by_a_subclass(tmp_path: Path) -> None:
    class Shortened(ZOTrainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            return {key: x[:, :6] for key, x in super()._prepare_inputs(inputs).items()}

    widths: set[int] = set()
    own = {"objective_fn": lambda model, inputs: widths.add(inputs["input_ids"].shape[1]) or 0.0}
    trainer_of(tmp_path, trainer_class=Shortened, trainer_kwargs=own, max_steps=1).train()
    assert widths == {6}


def test_a_tensor_that_is_frozen_in_mid_run_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)

    def freeze(hook: str, step: int, kwargs: Any) -> None:
        if hook == "on_step_begin" and step == 2:
            trainer.model.model.norm.requires_grad_(False)

    trainer.add_callback(Recorder(freeze))
    with pytest.raises(ValueError, match=r"^model\.norm\.weight was frozen.*before train\(\)"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="ZOTrainingArguments"):
        ZOTrainer(tiny_llama(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"))
    frozen = tiny_llama()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        ZOTrainer(frozen, arguments_of(tmp_path, "mezo"))
    with pytest.raises(ValueError, match="zo_objective"):
        ZOTrainer(tiny_llama(), arguments_of(tmp_path, "mezo", zo_objective="bleu"))
    with pytest.raises(ValueError, match="exclude each other"):
        ZOTrainer(tiny_llama(), arguments_of(tmp_path, "mezo", zo_objective="f1"), objective_fn=lambda model, inputs: 0.0)


def test_quantised_trainables_are_refused(tmp_path: Path) -> None:
    class Params4bit(nn.Parameter):
        """Stands for bitsandbytes' class of this name."""

    model = tiny_llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = Params4bit(weight.data)
    with pytest.raises(ValueError, match=r"up_proj\.weight is quantised"):
        ZOTrainer(model, arguments_of(tmp_path, "mezo"))


def test_resuming_a_first_order_run_is_refused(tmp_path: Path) -> None:
    first_order = Trainer(
        tiny_llama(),
        TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
        ),
        train_dataset=Sentences(),
        data_collator=collate,
    )
    first_order.train()
    with pytest.raises(ValueError, match="first-order run"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)


def test_a_run_that_resumes_from_its_end_takes_no_further_step(tmp_path: Path) -> None:
    """In the middle of an epoch, where the Trainer would take one more before it looks."""
    more = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    whole = trainer_of(tmp_path, "mezo", **more)
    whole.train()
    assert whole.state.epoch % 1
    again = trainer_of(tmp_path, "mezo", **more)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 3
    assert_same_weights(weights_of(whole.model), weights_of(again.model))


@pytest.mark.parametrize(
    ("case", "settings", "said"),
    [
        ("mezo", {}, "published one for models of billions"),
        ("mezo", {"optim": "adamw_torch"}, "which is for optim='sgd'"),
        ("zo_act", {"optim": "sgd"}, "which is for optim='adamw_torch'"),
        ("zo_act", {}, ""),
        ("mezo", {"learning_rate": 1e-3}, ""),
    ],
)
def test_a_default_rate_that_is_not_for_use_is_told(
    case: str, settings: dict[str, Any], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer_of(tmp_path, case, **{"learning_rate": None, **settings})
    told = [record.message for record in caplog.records if "by default" in record.message]
    assert len(told) == bool(said)
    assert said in "".join(told)


def test_resuming_from_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no complete checkpoint"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)


def test_one_vector_trains_and_replays(tmp_path: Path) -> None:
    """ZO-Act of rank 1 on one block, with examples displaced singly."""
    one_vector = {"zo_act_targets": "one-block", "zo_act_rank": 1, "zo_per_example": True, "zo_direction": "rademacher"}
    trainer = trainer_of(tmp_path, "zo_act", learning_rate=1.0, max_steps=60, zo_eps=0.1, weight_decay=0.0, **one_vector)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in trained] == [(16, 1)]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.02
    assert trainer._zo_optimizer.forward_passes == 3 * 2 + 2 * 60  # the basis, two batches in three sweeps, and the steps
    trainer.save_model()
    rebuilt = PeftModel.from_pretrained(model_of("full"), tmp_path, is_trainable=True)
    freeze_basis(rebuilt)
    for p in rebuilt.parameters():
        if p.requires_grad:
            p.data.zero_()
    replay(rebuilt, Trajectory.read(tmp_path))
    assert_same_weights(weights_of(trainer.model), weights_of(rebuilt))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mezo", "bszo", "zo_act"])
def test_no_allocation_grows_over_steps(case: str, tmp_path: Path) -> None:
    """Between step 50 and step 500 no tensor is added, and in the last 50 memory only for the log: a few numbers a step."""
    tensors: dict[int, int] = {}
    memory: dict[int, int] = {}

    def count(hook: str, step: int, kwargs: Any) -> None:
        if hook != "on_step_end" or step not in (50, 440, 450, 500):
            return
        gc.collect()
        tensors[step] = sum(type(x) is torch.Tensor for x in gc.get_objects())
        if step == 440:
            tracemalloc.start()  # slows every step down; by 450 what a step leaves for the next has been seen
        memory[step] = tracemalloc.get_traced_memory()[0]

    trainer = trainer_of(tmp_path, case, max_steps=501, logging_steps=10_000)
    trainer.add_callback(Recorder(count))
    try:
        trainer.train()
    finally:
        tracemalloc.stop()
    assert tensors[500] <= tensors[50]
    assert memory[450] > 0
    assert memory[500] - memory[450] < 50 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("form", ["full", "lora"])
@pytest.mark.parametrize("restore", ["auto", "in_place"])
def test_a_compiled_model_takes_the_same_steps_and_is_compiled_once(restore: str, form: str, tmp_path: Path) -> None:
    """Weights are mutated in place, so nothing is compiled again once every width of the padded batches has been met."""

    def padded(rows: list[Any]) -> dict[str, torch.Tensor]:
        width = -(-max(len(row["input_ids"]) for row in rows) // 4) * 4  # 8 or 12
        return {key: x[:, :width] for key, x in collate(rows).items()}

    def run(**more: Any) -> Any:
        trainer = trainer_of(
            tmp_path, form=form, zo_restore=restore, zo_packing=False, max_steps=20, per_device_train_batch_size=2, **more
        )
        trainer.data_collator = padded
        graphs: list[int] = []
        see = lambda hook, step, kwargs: graphs.append(counters["stats"]["unique_graphs"]) if hook == "on_step_end" else None  # noqa: E731
        trainer.add_callback(Recorder(see))
        trainer.train()
        return trainer, graphs

    torch._dynamo.reset()
    counters.clear()
    plain, _ = run()
    compiled, graphs = run(torch_compile=True, torch_compile_backend="aot_eager")
    assert graphs[-1] > 0
    assert graphs[-1] == graphs[9]
    losses = [[e["loss"] for e in trainer.state.log_history if "loss" in e] for trainer in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert_close = torch.testing.assert_close
    for name, p in weights_of(plain.model).items():
        assert_close(weights_of(compiled.model)[name], p, rtol=0, atol=1e-5)


def test_a_missing_engine_is_told_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    with pytest.raises(EngineError, match="pip install 'hf-zo"):
        trainer_of(tmp_path, zo_runtime="vllm")


def test_an_engine_has_no_virtual_tokens() -> None:
    prompted = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(EngineError, match="virtual tokens"):
        Engine(prompted)


def test_the_arguments_that_were_passed_stay_as_they_were(tmp_path):
    args = arguments_of(tmp_path, "mezo", learning_rate=None, zo_eps=None)
    run = ZOTrainer(tiny_llama(), args, train_dataset=Sentences(), data_collator=collate)
    assert (args.learning_rate, args.zo_eps) == (None, None)
    assert run.args.learning_rate == pytest.approx(1e-6)


def test_a_folder_that_is_no_checkpoint_is_passed_over(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    trainer_of(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    again = trainer_of(tmp_path, max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
