"""A stage's workers count the weights that they load, each in a file of its own, and the agent adds them up."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest

from potluck_node.engines.stage_count import BYTES_MAX, VARIABLE, counted_bytes
from potluck_node.engines.within_vllm import stage_weights


@dataclass(frozen=True)
class Parameter:
    """As much of a torch parameter as is asked."""

    count: int
    size_bytes: int

    def numel(self):
        return self.count

    def element_size(self):
        return self.size_bytes


class Model:
    """A stage's part of a model, before and after its weights are loaded."""

    def __init__(self):
        self.loaded = []

    def parameters(self):
        return iter(self.loaded)


def loader_class():
    """A new one each time, for it is changed."""

    class Loader:
        def load_weights(self, model, model_config):
            model.loaded += [Parameter(100, 2), Parameter(8, 4)]
            return model_config

    return Loader


def test_what_a_worker_loads_is_counted_and_loaded_as_before(tmp_path):
    loader = loader_class()
    stage_weights.count_what_is_loaded(loader, tmp_path)
    assert loader().load_weights(Model(), model_config="as given") == "as given"
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]
    assert counted_bytes(tmp_path) == 232


@pytest.mark.parametrize("folder", ["gone", "full"])
def test_a_count_that_cannot_be_written_costs_no_engine(tmp_path, capsys, folder):
    (tmp_path / "full").touch()  # no folder, so nothing can be written into it
    loader = loader_class()
    stage_weights.count_what_is_loaded(loader, tmp_path / folder)
    model = Model()
    assert loader().load_weights(model, model_config="as given") == "as given"
    assert len(model.loaded) == 2
    assert "the weights were not counted" in capsys.readouterr().err


def test_a_model_that_cannot_be_counted_is_loaded_as_before(tmp_path):
    loader = loader_class()
    loader.load_weights = lambda self, model: model
    stage_weights.count_what_is_loaded(loader, tmp_path)
    assert loader().load_weights("no module") == "no module"
    assert list(tmp_path.iterdir()) == []


def test_the_agent_and_the_workers_mean_the_same_folder():
    assert stage_weights.FOLDER_VARIABLE == VARIABLE


def test_the_workers_of_one_stage_are_added_up(tmp_path):
    for name, words in {"12": "100", "13": "20"}.items():
        (tmp_path / name).write_text(words)
    assert counted_bytes(tmp_path) == 120


@pytest.mark.parametrize(
    "files", [{}, {"12": ""}, {"12": "many"}, {"12": "0"}, {"12": "-5"}, {"12.draft": "7"}, {"12": str(BYTES_MAX + 1)}]
)
def test_what_is_no_count_is_none(tmp_path, files):
    for name, words in files.items():
        (tmp_path / name).write_text(words)
    assert counted_bytes(tmp_path) is None


def test_a_folder_that_is_gone_has_no_count(tmp_path):
    assert counted_bytes(tmp_path / "gone") is None
