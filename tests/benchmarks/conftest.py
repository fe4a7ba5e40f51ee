"""A tiny language model, a tiny encoder, a few rows and a grid, in folders of their own."""

import pytest
import yaml
from benchmarks.made_up import GRID, sentences, write_rows
from study.progress import Folders
from study.reading import read_grid
from tasks.tiny import make_bpe, make_wordpiece, tiny


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, kind, tokenizer in (("smollm2", "llama", make_bpe()), ("encoder", "classes", make_wordpiece())):
        model = tiny(kind, tokenizer)
        getattr(model, "bert", model).save_pretrained(folder / name)  # without a head where that is to be new
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def data(tmp_path):
    """Folder of data with SST-2 and SST-5."""
    folder = tmp_path / "data"
    for split, n in (("train", 40), ("validation", 12)):
        write_rows(folder / "sst2", split, sentences(split, n))
        write_rows(folder / "sst5", split, [{"text": r["sentence"], "label": i % 5} for i, r in enumerate(sentences(split, n))])
    return folder


@pytest.fixture
def study(tmp_path, data, models):
    """``study(**changes)``: a grid with these fields changed (None drops one) and its folders."""

    def make(**changes):
        told = {key: value for key, value in {**GRID, **changes}.items() if value is not None}
        file = tmp_path / "tiny.yaml"
        file.write_text(yaml.safe_dump(told), encoding="utf-8")
        grid = read_grid(file)
        return grid, Folders(tmp_path / "results", models / grid.model, data)

    return make
