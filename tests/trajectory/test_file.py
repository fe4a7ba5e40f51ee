"""The file: both forms give back what was written, and what tears or is foreign is told."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hf_zo import Trajectory, TrajectoryError
from hf_zo.trajectory import LOG_NAME, SEALED_NAME, Step, TrajectoryLog

NUMBER = st.floats(allow_nan=True, allow_infinity=True)
STEPS = st.lists(
    st.builds(Step, st.lists(NUMBER, max_size=7).map(tuple), st.tuples(st.floats(0, 1)), st.booleans()), max_size=12
)


def bits(steps: list[Step]) -> list[Any]:
    """Comparable also where losses are NaN."""
    return [(struct.pack(f"<{len(s.losses)}d", *s.losses), s.learning_rates, s.skipped) for s in steps]


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


def test_the_header_is_readable_json_in_the_metadata(run: Path) -> None:
    raw = (run / "out" / SEALED_NAME).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["hf_zo"])
    assert header["method"] == "lozo"
    assert header["settings"]["momentum"] == 0.7
    assert header["steps"] == 9
    assert header["base"]["class"] == "LlamaForCausalLM"
    assert "lr" not in header["groups"][0]


@pytest.mark.parametrize("step", [Step((0.5,) * 2**15, (1e-3,)), Step((0.5,), tuple(i / 1e6 for i in range(256)))])
def test_a_step_that_does_not_fit_is_refused_by_name(step, tmp_path):
    log = TrajectoryLog(tmp_path / LOG_NAME, Trajectory({"format": 1}, []))
    with pytest.raises(TrajectoryError, match="zo_trajectory=False"):
        log.append(step)
    log.append(Step((0.5,) * (2**15 - 1), (1e-3,)))
    log.seal(tmp_path / SEALED_NAME, "")
    assert len(Trajectory.read(tmp_path / SEALED_NAME).steps[0].losses) == 2**15 - 1
