"""A run against a server on loopback, in a process of its own, that computes with torch (with vLLM: tests/vllm/)."""

from __future__ import annotations

import os
import signal
import socket
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save
from support import (
    SERVED,
    Recorder,
    Sentences,
    ServerProcess,
    arguments_of,
    assert_same_weights,
    collate,
    tiny_llama,
    trainer_of,
    weights_of,
)
from tasks.tiny import ROWS, make_bpe, tiny

from hf_zo import Trajectory, ZOTrainer
from hf_zo.cli import main
from hf_zo.runtimes.remote import Server, description, packed, unpacked, window_of, window_tensors
from hf_zo.runtimes.vllm import EngineError
from hf_zo.tasks import OptionCollator, encode_rows, get_task, option_loss

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    process = ServerProcess(folder, 0, "--runtime", "torch")
    yield process.url
    process.kill()


@pytest.fixture(scope="module")
def mortal(folder: Path) -> Iterator[list[ServerProcess]]:
    """A server that tests kill and start again: the last of the list is alive."""
    processes = [ServerProcess(folder, 0, "--runtime", "torch")]
    yield processes
    processes[-1].kill()


def served(output_dir: Path, case: str, form: str, url: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    return trainer_of(output_dir, case, form, dtype, zo_runtime="vllm", zo_server=url, **more)


@pytest.mark.parametrize(("case", "form"), SERVED)
def test_equals_the_run_in_one_process(case: str, form: str, server: str, tmp_path: Path) -> None:
    """Bitwise, in losses and weights; saving compares the hashes of both sides."""
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    alone = trainer_of(tmp_path / "alone", case, form, warmup_steps=2, **options)
    alone.train()
    trainer = served(tmp_path / "served", case, form, server, warmup_steps=2, **options)
    forwards = []
    trainer.model.register_forward_hook(lambda *args: forwards.append(1))
    if case != "zo_act":  # whose calibration needs forward passes
        trainer.add_callback(Recorder(lambda hook, step, kwargs: None if not forwards else pytest.fail("ran here")))
    trainer.train()
    trainer.save_model()
    logs = [Trajectory.read(tmp_path / run / "trajectory.log").steps for run in ("alone", "served")]
    assert len(logs[0]) == 5
    assert logs[0] == logs[1]
    assert_same_weights(weights_of(alone.model), weights_of(trainer.model))


def test_options_and_accuracy(tmp_path: Path) -> None:
    tokenizer = make_bpe()
    model = tiny("llama", tokenizer)
    model.save_pretrained(tmp_path / "base")
    row = ROWS["sst2"][0]
    rows = [row, {"sentence": "the story was terrible ", "label": 0}] * 4
    examples = encode_rows(get_task("sst2"), rows, tokenizer, 512).examples
    process = ServerProcess(tmp_path / "base", 0, "--runtime", "torch")
    try:
        for objective in ("loss", "accuracy"):
            logs = []
            for where in ({}, {"zo_runtime": "vllm", "zo_server": process.url}):
                base = tiny("llama", tokenizer)
                arguments = arguments_of(
                    tmp_path / "run", "mezo", zo_objective=objective, remove_unused_columns=False, zo_eps=0.3, **where
                )
                ZOTrainer(
                    base,
                    arguments,
                    train_dataset=examples,
                    data_collator=OptionCollator(tokenizer, base),
                    compute_loss_func=option_loss,
                ).train()
                logs.append(Trajectory.read(tmp_path / "run" / "trajectory.log").steps)
            assert logs[0] == logs[1]
            assert len({loss for step in logs[0] for loss in step.losses}) > 1
    finally:
        process.kill()


def test_steps_without_a_finite_loss_are_skipped_on_both_sides(server: str, tmp_path: Path) -> None:
    trainer = served(tmp_path, "bszo", "full", server, zo_eps=1e38, zo_nonfinite="skip")
    start = weights_of(trainer.model)
    trainer.train()
    trainer.save_model()  # compares hashes
    assert trainer._zo_optimizer.skipped_steps == 4
    assert_same_weights(start, weights_of(trainer.model))


@pytest.mark.parametrize(
    ("case", "form", "weights"),
    [("lozo-momentum", "full", True), ("mezo-adamw", "lora", False), ("zo_act", "full", True)],  # False: trajectory only
)
def test_the_server_dies_and_comes_back(
    case: str, form: str, weights: bool, folder: Path, mortal: list[ServerProcess], tmp_path: Path
) -> None:
    """A clear error; started again on its port, the resumed run ends bitwise where the uninterrupted one ends."""
    options: dict[str, Any] = {"max_steps": 7, "save_strategy": "steps", "save_steps": 2, "zo_save_weights": weights}
    whole = trainer_of(tmp_path / "whole", case, form, **options)
    whole.train()
    process = mortal[-1]
    port = process.url.rpartition(":")[2]
    trainer = served(tmp_path / "run", case, form, process.url, **options)

    def see(hook: str, step: int, kwargs: Any) -> None:
        if hook == "on_step_begin" and step == 5:
            os.kill(process.process.pid, signal.SIGKILL)

    trainer.add_callback(Recorder(see))
    with pytest.raises(EngineError, match=rf"zo_server='http://127.0.0.1:{port}' does not answer.*resume_from_checkpoint"):
        trainer.train()
    process.kill()
    mortal.append(ServerProcess(folder, int(port), "--runtime", "torch"))
    resumed = served(tmp_path / "run", case, form, process.url, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights_of(whole.model), weights_of(resumed.model))
    assert resumed.state.global_step == 7


def test_an_adapter_of_the_servers(folder: Path, tmp_path: Path) -> None:
    """--peft gives the server an adapter; the trainer starts from the same."""
    start = trainer_of(tmp_path, "mezo", "lora").model
    start.save_pretrained(tmp_path / "adapter")
    process = ServerProcess(folder, 0, "--runtime", "torch", "--peft", str(tmp_path / "adapter"))
    try:
        trainer = served(tmp_path / "run", "mezo", "lora", process.url)
        trainer.train()
        alone = trainer_of(tmp_path / "alone", "mezo", "lora")
        alone.train()
        assert_same_weights(weights_of(alone.model), weights_of(trainer.model))
    finally:
        process.kill()


def test_an_adapter_of_another_name(server: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]), "second")
    arguments = arguments_of(tmp_path, "mezo", zo_runtime="vllm", zo_server=server)
    trainer = ZOTrainer(model, arguments, train_dataset=Sentences(), data_collator=collate)
    trainer.train()
    trainer.save_model()  # compares hashes


def test_one_run_at_a_time(server: str, tmp_path: Path) -> None:
    first = served(tmp_path / "first", "mezo", "full", server)

    def see(hook: str, step: int, kwargs: Any) -> None:
        if hook == "on_step_begin" and step == 2:
            served(tmp_path / "second", "mezo", "full", server, max_steps=1).train()

    first.add_callback(Recorder(see))
    with pytest.raises(EngineError, match="another run has been started"):
        first.train()


def test_health(server: str) -> None:
    request = urllib.request.Request(f"{server}/health", headers={"Accept": "application/json"})
    with urllib.request.urlopen(request) as answer:
        told = answer.read().decode()
    assert '"class": "LlamaForCausalLM"' in told
    assert '"step"' in told


def test_another_model_of_the_same_shape(server: str, tmp_path: Path) -> None:
    trainer = ZOTrainer(
        tiny_llama(seed=1),
        arguments_of(tmp_path, "mezo", zo_runtime="vllm", zo_server=server),
        train_dataset=Sentences(),
        data_collator=collate,
    )
    with pytest.raises(EngineError, match="weights of this model are not those the run started from"):
        trainer.train()


def test_another_dtype_or_size_is_told_at_construction(server: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="its dtype is float32, here it is bfloat16"):
        served(tmp_path, "mezo", "full", server, torch.bfloat16)
    assert description(tiny_llama())["sizes"]["num_hidden_layers"] == 2


def test_nobody_there(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EngineError, match=rf"zo_server='http://127.0.0.1:{port}' does not answer.*hf-zo vllm-serve"):
        served(tmp_path, "mezo", "full", f"http://127.0.0.1:{port}")
    with pytest.raises(EngineError, match="no address of a server"):
        served(tmp_path, "mezo", "full", "127.0.0.1:8123")


def test_tensors_that_are_one_are_sent_as_two() -> None:
    ids = torch.arange(6).view(2, 3)
    _, tensors = unpacked(packed({}, window_tensors([{"input_ids": ids, "labels": ids}])))
    (inputs,) = window_of(tensors, torch.device("cpu"))
    assert inputs.keys() == {"input_ids", "labels"}
    assert all(torch.equal(t, ids) for t in inputs.values())


@pytest.mark.parametrize("body", [b"", b"<!doctype html>", save({"x": torch.zeros(1)})], ids=["empty", "a page", "tensors"])
def test_another_server_there(body: bytes) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(EngineError, match=rf"zo_server='http://127.0.0.1:{other.server_port}' is no `hf-zo vllm-serve`"):
            Server(f"http://127.0.0.1:{other.server_port}", tiny_llama())
        other.shutdown()


@pytest.mark.parametrize("port", ["abc", "99999"])
def test_a_port_that_is_none(port: str) -> None:
    with pytest.raises(EngineError, match=f"zo_server='http://host:{port}' is no address of a server"):
        Server(f"http://host:{port}", tiny_llama())


def test_a_port_that_cannot_be_bound(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vllm-serve", str(folder), "--port", "99999", "--runtime", "torch"]) == 2
    assert "--port 99999 at 127.0.0.1 cannot be used" in capsys.readouterr().err


def test_port_in_use(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["vllm-serve", str(folder), "--port", str(port), "--runtime", "torch"]) == 2
    assert f"--port {port} at 127.0.0.1 cannot be used" in capsys.readouterr().err


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vllm-serve", str(tmp_path / "none"), "--port", "0", "--runtime", "torch"]) == 2
    assert "cannot be served" in capsys.readouterr().err


class OwnLoss(ZOTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"zo_objective": "f1"}, "zo_objective='f1'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"trainer_kwargs": {"objective_fn": lambda model, inputs: 0.0}}, "objective_fn"),
        ({"trainer_kwargs": {"compute_loss_func": lambda *args, **kwargs: 0.0}}, "compute_loss_func"),
        ({"trainer_class": OwnLoss}, "OwnLoss.compute_loss"),
    ],
)
def test_code_of_this_process_is_refused(changes: dict[str, Any], named: str, server: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"zo_server=.*does not work with {named}.*Unset zo_server"):
        served(tmp_path, "mezo", "full", server, **changes)


def test_a_run_that_no_trajectory_leads_to(server: str, tmp_path: Path) -> None:
    """train() again goes on with the method's state, of which a new trajectory knows nothing."""
    trainer = served(tmp_path, "mezo-adamw", "full", server)
    trainer.train()
    with pytest.raises(EngineError, match="this one writes none"):
        trainer.train()


def test_a_run_by_another_rule(server: str, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1}
    served(tmp_path, "mezo", "full", server, **{**options, "max_steps": 1}).train()
    other = served(tmp_path, "mezo", "full", server, zo_clip=0.5, **options)
    with pytest.raises(EngineError, match="this one writes none"):
        other.train(resume_from_checkpoint=True)


def test_batches_of_other_things_are_refused(server: str, tmp_path: Path) -> None:
    trainer = served(tmp_path, "mezo", "full", server)
    trainer.data_collator = lambda rows: {**collate(rows), "names": ["a"] * len(rows)}
    with pytest.raises(EngineError, match="'names' is a list"):
        trainer.train()


def test_an_unknown_optimizer_is_not_imported(server: str, tmp_path: Path) -> None:
    """What a header names is not run: the server rebuilds the optimizers that a replay rebuilds."""
    trainer = served(tmp_path, "mezo-adamw", "full", server)
    trainer.create_optimizer()
    trainer._log.trajectory.header["optimizer"] = "os.system"
    with pytest.raises(EngineError, match=r"os\.system, which replay does not rebuild"):
        trainer._start_server()
