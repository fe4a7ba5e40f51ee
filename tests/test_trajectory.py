"""Trajectories: what tears and how it is told, what does not fit and how it is named, and the commands around them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from support import Sentences, assert_same_weights, collate, tiny_llama, trained_of, trainer_of, weights_of
from transformers import BertConfig, BertForSequenceClassification, BertModel

from hf_zo import Trajectory, TrajectoryError, ZOTrainer, ZOTrainingArguments, cli, replay
from hf_zo.adapters import draw_adapter
from hf_zo.trajectory import LOG_NAME, SEALED_NAME, Step, TrajectoryLog, projected_gradients

NUMBER = st.floats(allow_nan=True, allow_infinity=True)
STEPS = st.lists(
    st.builds(Step, st.lists(NUMBER, max_size=7).map(tuple), st.tuples(st.floats(0, 1)), st.booleans()), max_size=12
)


def bits(steps: list[Step]) -> list[Any]:
    """Comparable also where losses are NaN."""
    return [(struct.pack(f"<{len(s.losses)}d", *s.losses), s.learning_rates, s.skipped) for s in steps]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished full-parameter run over a saved base model: folder with ``base``, ``out``."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny_llama()
    model.save_pretrained(folder / "base")
    trainer = ZOTrainer(
        type(model).from_pretrained(folder / "base"),
        trainer_of(folder / "out", "lozo-momentum", max_steps=9, warmup_steps=2).args,
        train_dataset=Sentences(),
        data_collator=collate,
    )
    trainer.train()
    trainer.save_model()
    return folder


# ---- the file ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(steps=STEPS)
def test_both_forms_give_back_what_was_written(steps: list[Step], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("forms")
    start = Trajectory({"format": 1, "note": "ä"}, [], {"w": torch.arange(6.0).view(2, 3)})
    log = TrajectoryLog(folder / LOG_NAME, start)
    for step in steps:
        log.append(step)
    log.seal(folder / SEALED_NAME, "hash")
    for name in (LOG_NAME, SEALED_NAME):
        found = Trajectory.read(folder / name)
        assert bits(found.steps) == bits(steps)
        assert found.header["note"] == "ä"
        assert torch.equal(found.initial["w"], start.initial["w"])
    assert Trajectory.read(folder).header["final_hash"] == "hash"  # of a folder, the sealed form


def test_a_torn_log_is_told_at_every_byte(run: Path, tmp_path: Path) -> None:
    """Cut anywhere, the log is read up to its last complete step or refused; it never yields a wrong step."""
    whole = (run / "out" / LOG_NAME).read_bytes()
    steps = Trajectory.read(run / "out" / LOG_NAME).steps
    record = 8 + 8 * 3
    assert len(steps) == 9
    file = tmp_path / LOG_NAME
    for lost in range(1, 3 * record + 1):
        file.write_bytes(whole[: len(whole) - lost])
        good = 9 - -(-lost // record)
        if lost % record:
            with pytest.raises(TrajectoryError, match=rf"torn: it has {good} good steps.*--until {good}"):
                Trajectory.read(file)
        assert Trajectory.read(file, cut_torn_end=True).steps == steps[:good]
    for kept in (30, 500):
        file.write_bytes(whole[:kept])
        with pytest.raises(TrajectoryError, match="torn within its header"):
            Trajectory.read(file, cut_torn_end=True)


def test_a_damaged_record_is_told(run: Path, tmp_path: Path) -> None:
    whole = bytearray((run / "out" / LOG_NAME).read_bytes())
    whole[-40] ^= 1  # in the last but one of the records of 32 bytes
    (tmp_path / LOG_NAME).write_bytes(whole)
    with pytest.raises(TrajectoryError, match="7 good steps"):
        Trajectory.read(tmp_path / LOG_NAME)


def test_foreign_and_newer_files(run: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(TrajectoryError, match="no trajectory"):
        Trajectory.read(tmp_path / "text")
    save_file({"w": torch.ones(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(TrajectoryError, match="no trajectory of hf_zo"):
        Trajectory.read(tmp_path / "weights.safetensors")
    sealed = (run / "out" / SEALED_NAME).read_bytes()
    (tmp_path / SEALED_NAME).write_bytes(sealed[:-5])
    with pytest.raises(TrajectoryError, match="complete safetensors file"):
        Trajectory.read(tmp_path / SEALED_NAME)
    for write in (lambda t: t.write(tmp_path / "new"), lambda t: TrajectoryLog(tmp_path / "new", t)):
        write(Trajectory({"format": 2, "hf_zo": "9.9"}, []))
        with pytest.raises(TrajectoryError, match=r"format 2, written by hf_zo 9\.9.*Update hf_zo"):
            Trajectory.read(tmp_path / "new")
    with pytest.raises(FileNotFoundError):
        Trajectory.read(tmp_path / "nothing")


# ---- replay --------------------------------------------------------------------------------------------------------


def load(run: Path, **kwargs: Any) -> Any:
    return type(tiny_llama()).from_pretrained(run / "base", **kwargs)


def test_replay_does_not_depend_on_threads(run: Path) -> None:
    final = weights_of(load(run).from_pretrained(run / "out"))
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        assert_same_weights(weights_of(replay(load(run), Trajectory.read(run / "out"))), final)


def test_until(run: Path) -> None:
    """The weights after k steps are those of a run that is stopped there, schedule included."""
    trajectory = Trajectory.read(run / "out")
    walked: list[int] = []
    short = replay(load(run), trajectory, until=4, on_step=walked.append)
    assert walked == [0, 1, 2, 3]
    header = {key: value for key, value in trajectory.header.items() if key != "final_hash"}
    again = replay(load(run), Trajectory(header, trajectory.steps[:4]))
    assert_same_weights(weights_of(short), weights_of(again))
    with pytest.raises(AssertionError, match="differ"):
        assert_same_weights(weights_of(short), weights_of(replay(load(run), trajectory)))


def test_the_wrong_model_is_named(run: Path) -> None:
    trajectory = Trajectory.read(run / "out")
    other = load(run)
    with torch.no_grad():
        other.model.norm.weight[3] += 1e-6
    with pytest.raises(TrajectoryError, match=r"not those the run started from, .*base.*content hash"):
        replay(other, trajectory)
    with pytest.raises(TrajectoryError, match=r"dtype bfloat16, the run had float32.*--approximate"):
        replay(load(run, dtype=torch.bfloat16), trajectory)
    with pytest.raises(TrajectoryError, match=r"model.embed_tokens.weight is missing"):
        replay(torch.nn.Linear(2, 2), trajectory)
    close = replay(load(run, dtype=torch.bfloat16), trajectory, approximate=True)
    final = load(run).from_pretrained(run / "out")
    start = weights_of(load(run))
    for name, p in close.named_parameters():
        moved = (dict(final.named_parameters())[name] - start[name]).norm()
        assert (p.float() - dict(final.named_parameters())[name]).norm() < 0.05 * moved + 0.01 * start[name].norm()


def test_a_damaged_loss_does_not_pass_for_the_run(run: Path) -> None:
    trajectory = Trajectory.read(run / "out")
    step = trajectory.steps[5]
    trajectory.steps[5] = Step((step.losses[0] + 1e-7, *step.losses[1:]), step.learning_rates)
    with pytest.raises(TrajectoryError, match="differ from those of the run"):
        replay(load(run), trajectory)
    trajectory.steps[5] = Step(step.losses[:1], step.learning_rates)
    with pytest.raises(TrajectoryError, match=r"Step 5 .* too few losses"):
        replay(load(run), trajectory)
    trajectory.steps[5] = Step((*step.losses, 1.0), step.learning_rates)
    with pytest.raises(TrajectoryError, match=r"Step 5 .* more losses"):
        replay(load(run), trajectory)


def test_a_log_does_not_choose_what_is_imported(run: Path) -> None:
    trajectory = Trajectory.read(run / "out")
    trajectory.header["optimizer"] = "os.system"
    with pytest.raises(TrajectoryError, match=r"os\.system, which replay does not rebuild"):
        replay(load(run), trajectory)


def test_projected_gradients_are_those_that_were_logged(run: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "curvzo", max_steps=5)
    trainer.train()
    logged = [e["zo/projected_gradient"] for e in trainer.state.log_history if "zo/projected_gradient" in e]
    found = projected_gradients(Trajectory.read(tmp_path / LOG_NAME))
    assert [values[-1] for values in found] == pytest.approx(logged, rel=1e-12)


def test_skipped_steps_are_replayed_as_skipped(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "mezo", zo_nonfinite="skip", max_steps=5)
    compute_loss = trainer.compute_loss

    def spoiled(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = compute_loss(*args, **kwargs)
        return loss * torch.nan if trainer.state.global_step == 2 else loss

    trainer.compute_loss = spoiled
    trainer.train()
    trainer.save_model()
    trajectory = Trajectory.read(tmp_path)
    assert [step.skipped for step in trajectory.steps] == [False, False, True, False, False]
    assert projected_gradients(trajectory)[2] == ()
    assert_same_weights(weights_of(replay(tiny_llama(), trajectory)), weights_of(trainer.model))


def test_a_drawn_adapter_is_a_key_and_a_foreign_one_is_stored(tmp_path: Path) -> None:
    def adapted(draw: bool) -> Any:
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        return draw_adapter(model, 42) if draw else model

    for draw in (True, False):
        args = trainer_of(tmp_path / str(draw), "mezo").args
        trainer = ZOTrainer(adapted(draw), args, train_dataset=Sentences(), data_collator=collate)
        trainer.train()
        trainer.save_model()
        trajectory = Trajectory.read(tmp_path / str(draw))
        assert bool(trajectory.initial) is not draw
        assert all("lora_A" in name for name in trajectory.initial)
        torch.manual_seed(7)
        other = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        assert_same_weights(weights_of(replay(other, trajectory)), weights_of(trainer.model))


def test_no_trajectory_on_request(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "mezo", zo_trajectory=False)
    trainer.train()
    trainer.save_model()
    assert not list(tmp_path.glob("trajectory*"))


def test_resuming_a_run_without_trajectory_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(tmp_path, "mezo", zo_trajectory=False, **options).train()
    trainer_of(tmp_path, "mezo", **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "has no trajectory, so this run writes none" in caplog.text
    assert not (tmp_path / LOG_NAME).exists()


# ---- commands ------------------------------------------------------------------------------------------------------


def test_replay_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", str(run / "base"), str(run / "out"), "-o", str(tmp_path / "new")]) == 0
    assert "9 steps replayed" in (out := capsys.readouterr().out)
    assert "bit for bit" in out
    assert_same_weights(
        weights_of(load(run).from_pretrained(tmp_path / "new")), weights_of(load(run).from_pretrained(run / "out"))
    )
    (tmp_path / "torn.log").write_bytes((run / "out" / LOG_NAME).read_bytes()[:-5])
    arguments = ["replay", str(run / "base"), str(tmp_path / "torn.log"), "-o", str(tmp_path / "part")]
    assert cli.main(arguments) == 2
    assert "8 good steps" in capsys.readouterr().err
    assert cli.main([*arguments, "--until", "8"]) == 0
    assert "bit for bit" not in capsys.readouterr().out


@pytest.mark.parametrize("case", ["mezo", "zo_act"])
def test_replay_command_for_adapters(case: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load(run)
    if case == "mezo":
        model = draw_adapter(get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")), 42)
    args = trainer_of(tmp_path / "out", case).args
    trainer = ZOTrainer(model, args, train_dataset=Sentences(), data_collator=collate)
    trainer.train()
    trainer.save_model()
    assert cli.main(["replay", str(run / "base"), str(tmp_path / "out"), "-o", str(tmp_path / "new")]) == 0, (
        capsys.readouterr().err
    )
    for name in ("adapter_model.safetensors",):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_replay_command_names_what_is_wrong(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["-o", str(tmp_path / "new")]
    assert cli.main(["replay", str(run / "base"), str(tmp_path / "nothing"), *output]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert cli.main(["replay", str(tmp_path / "nothing"), str(run / "out"), *output]) == 2
    assert "cannot be loaded as LlamaForCausalLM" in capsys.readouterr().err
    assert cli.main(["replay", str(run / "out"), str(run / "out"), *output]) == 2
    assert "not those the run started from" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_passes_that_measure_every_example_are_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_of(tmp_path, "mezo-per-example", "lora", max_steps=3)
    trainer.train()
    trainer.save_model()
    assert cli.main(["trajectory", "show", str(tmp_path)]) == 0
    assert f"3, {trainer._zo_optimizer.forward_passes} forward passes" in capsys.readouterr().out


def test_show_and_diff(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "run.png"
    assert cli.main(["trajectory", "show", str(run / "out"), "--plot", str(png)]) == 0
    out = capsys.readouterr().out
    assert all(
        word in out for word in ("lozo", "9, 18 forward passes, 0 skipped", "projected gradient", "learning rate", "▁", "█")
    )
    assert png.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["trajectory", "diff", str(run / "out"), str(run / "out" / LOG_NAME)]) == 0
    assert "equal in all 9 steps" in capsys.readouterr().out
    other = Trajectory.read(run / "out")
    other.steps[3] = Step((other.steps[3].losses[0], other.steps[3].losses[1] + 0.25), other.steps[3].learning_rates)
    other.write(tmp_path / SEALED_NAME)
    assert cli.main(["trajectory", "diff", str(run / "out"), str(tmp_path)]) == 1
    assert "step 3: losses differ by up to 0.25" in capsys.readouterr().out
    Trajectory(other.header, Trajectory.read(run / "out").steps[:5]).write(tmp_path / SEALED_NAME)
    assert cli.main(["trajectory", "diff", str(run / "out"), str(tmp_path)]) == 1
    assert "equal for 5 steps" in capsys.readouterr().out


def test_the_header_is_readable_json_in_the_metadata(run: Path) -> None:
    raw = (run / "out" / SEALED_NAME).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["hf_zo"])
    assert header["method"] == "lozo"
    assert header["settings"]["momentum"] == 0.7
    assert header["steps"] == 9
    assert header["base"]["class"] == "LlamaForCausalLM"
    assert "lr" not in header["groups"][0]


@pytest.mark.parametrize("adapted", [False, True], ids=["all weights", "lora"])
def test_a_head_that_is_drawn_at_every_load_is_stored(adapted: bool, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "base")
    rows = [{"input_ids": torch.tensor([1, 2 + i % 3]), "attention_mask": torch.ones(2), "labels": i % 3} for i in range(9)]
    ends = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model: Any = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)  # not the default
        if adapted:
            config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
            model = draw_adapter(get_peft_model(model, config), 42)
        ends.append(model)
    trained, other = ends
    arguments = ZOTrainingArguments(str(tmp_path / "run"), max_steps=3, learning_rate=1e-3, use_cpu=True, report_to="none")
    ZOTrainer(trained, arguments, train_dataset=rows).train()
    trajectory = Trajectory.read(tmp_path / "run" / LOG_NAME)
    assert_same_weights(trained_of(replay(other, trajectory)), trained_of(trained))
    command = ["replay", str(tmp_path / "base"), str(tmp_path / "run"), "-o", str(tmp_path / "rebuilt")]
    assert cli.main(command) == 0
