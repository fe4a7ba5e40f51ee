"""A run against `hf-zo vllm-serve` with its engine: a process of its own, on loopback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import Sentences, ServerProcess, arguments_of, assert_same_weights, collate, weights_of
from transformers import LlamaConfig, LlamaForCausalLM

from hf_zo import Trajectory, ZOTrainer, replay


def base() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        use_cache=False,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("base")
    base().save_pretrained(folder)
    process = ServerProcess(folder, 0)
    yield process.url
    process.kill()


@pytest.mark.parametrize("case", ["mezo", "zo_act"])
def test_the_servers_engine_measures_the_run(case: str, server: str, tmp_path: Path) -> None:
    """Losses are the torch runtime's up to rounding; both sides end at the same bits, and so does a replay."""
    ends = {}
    for where in ({}, {"zo_runtime": "vllm", "zo_server": server}):
        trainer = ZOTrainer(
            base(), arguments_of(tmp_path / str(len(where)), case, **where), train_dataset=Sentences(), data_collator=collate
        )
        trainer.train()
        trainer.save_model()  # compares the weights of both sides
        ends[len(where)] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(ends[2]) == 4
    assert ends[2] == pytest.approx(ends[0], rel=1e-4)
    assert trainer._server._get()["runtime"] == "vllm"
    if case == "mezo":
        again = replay(base(), Trajectory.read(tmp_path / "2"))
        assert_same_weights(weights_of(trainer.model), weights_of(again))
