"""Settings for GPUs, on machines with any number of them."""

import pytest

from services.inferer.engine.model import ALL_LAYERS, _require_gpus
from services.inferer.settings import SplitMode
from shared.errors import SettingsError


@pytest.mark.parametrize(
    ("gpus", "layers", "split_mode", "main_gpu", "why"),
    [
        (0, 5, "layer", 0, "INFERER_GPU_LAYERS=5: llama.cpp finds no GPU"),
        (0, ALL_LAYERS, "layer", 1, "INFERER_MAIN_GPU=1: llama.cpp finds no GPU"),
        (0, 0, "none", 0, "INFERER_SPLIT_MODE=none: llama.cpp finds no GPU"),
        (2, ALL_LAYERS, "none", 2, "INFERER_MAIN_GPU=2: .*; choose 0 to 1"),
        (2, ALL_LAYERS, "layer", 1, "INFERER_MAIN_GPU=1 .* set INFERER_SPLIT_MODE=none"),
    ],
)
def test_what_this_machine_does_not_have_is_refused(
    gpus: int, layers: int, split_mode: SplitMode, main_gpu: int, why: str
) -> None:
    """llama.cpp would ignore most of it, and compute where nobody expects it."""
    with pytest.raises(SettingsError, match=f"^{why}"):
        _require_gpus(gpus, layers, split_mode, main_gpu)


@pytest.mark.parametrize(
    ("gpus", "layers", "split_mode", "main_gpu"),
    [
        (0, ALL_LAYERS, "layer", 0),
        (0, 0, "layer", 0),
        (1, 5, "layer", 0),
        (1, 999, "none", 0),
        (2, ALL_LAYERS, "row", 0),
        (2, ALL_LAYERS, "none", 1),
    ],
)
def test_what_is_possible_is_accepted(
    gpus: int, layers: int, split_mode: SplitMode, main_gpu: int
) -> None:
    """The defaults on every machine, and more layers than a model has: all of them."""
    _require_gpus(gpus, layers, split_mode, main_gpu)
