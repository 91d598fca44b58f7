"""What is not the usual kind of model is served, or refused when it is loaded, in one sentence."""

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from services.inferer.engine import context
from services.inferer.engine.context import Context, ContextOptions
from services.inferer.engine.memory import MIB
from services.inferer.engine.model import Model
from services.inferer.engine.native_log import log_lines
from shared.errors import ModelError, OutOfMemory
from shared.model_files import locate
from tests.support.architectures import write_hybrid, write_mamba
from tests.support.processes import ROOT
from tests.support.tiny_model import write_tiny_model

N_CTX, N_BATCH = 4096, 128
MARGIN, LEAST = 0.1, 4 * MIB
"""How far the check may be off. llama.cpp's lists and graphs, which are not in a buffer and which
the check does not count, take up to 4 MiB: too much only beside contexts that are smaller than
40 MiB."""
MODELS: dict[str, Callable[[Path], Path]] = {
    "smollm2": lambda _: locate("smollm2"),
    "gemma3-270m": lambda _: locate("gemma3-270m"),
    "hybrid": lambda folder: write_hybrid(folder / "lfm2.gguf", width=512),
    "recurrent": lambda folder: write_mamba(folder / "mamba.gguf", width=256, states=4096),
    "longrope": lambda folder: write_tiny_model(
        folder / "longrope.gguf", width=512, longrope_from=4096
    ),
}
BUFFER = re.compile(r"buffer size = +([0-9.]+) MiB")
"""What llama.cpp logs of each buffer that it has made."""


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        ({"llama.attention.causal": False}, "choose one that does"),
        ({"llama.pooling_type": 9}, "pooling_type that Sluice does not know, 9"),
    ],
    ids=["diffusion", "unknown pooling"],
)
def test_a_model_that_does_nothing_known_is_refused(
    tmp_path: Path, metadata: dict[str, object], why: str
) -> None:
    """Its jobs would end with SUCCESS and nothing, or rubbish."""
    path = write_tiny_model(tmp_path / "model.gguf", metadata=metadata)
    with pytest.raises(ModelError, match=why):
        Model(path, gpu_layers=0)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """llama.cpp would abort the process at the first prompt."""
    metadata = {"tokenizer.ggml.model": "none", "llama.vocab_size": 49152}
    path = write_tiny_model(tmp_path / "model.gguf", tokenizer=False, metadata=metadata)
    with pytest.raises(ModelError, match="has no tokenizer"):
        Model(path, gpu_layers=0)


def test_a_model_that_pools_nothing_is_loaded(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", metadata={"llama.pooling_type": 0})
    Model(path, gpu_layers=0).close()


@pytest.mark.parametrize(("slots", "contexts"), [(1, 1), (4, 1), (4, 4)])
@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m", "mamba"])
def test_the_estimated_memory_is_what_llama_cpp_takes(
    tmp_path: Path, name: str, slots: int, contexts: int
) -> None:
    """As much as llama.cpp then sets aside, whatever the architecture: heads wider than the
    embedding divided by their number, sliding windows, no attention at all."""
    path = write_mamba(tmp_path / "mamba.gguf") if name == "mamba" else locate(name)
    model = Model(path, gpu_layers=0)
    options = ContextOptions(N_CTX, N_BATCH, 1)
    said = context.required_bytes(model, slots, options, are_separate=contexts > 1)
    with log_lines() as lines:
        for _ in range(contexts):
            _context(model, slots // contexts, N_CTX).close()
    model.close()
    taken = sum(float(size) for line in lines for size in BUFFER.findall(line)) * MIB
    assert abs(said - taken) < contexts * MIB


@pytest.mark.parametrize("name", MODELS)
def test_the_estimated_memory_is_what_the_process_takes(tmp_path: Path, name: str) -> None:
    """With one slot and four, and both types of keys and values: what is resident when the context
    has computed."""
    contexts = [(slots, kv_type) for slots in (1, 4) for kv_type in ("f16", "q8_0")]
    for context_, (said, taken) in _footprints(MODELS[name](tmp_path), contexts):
        assert abs(said - taken) < max(MARGIN * taken, LEAST), (name, context_, said, taken)


def test_gemma_takes_40_mib(tmp_path: Path) -> None:
    """Its windows keep only what they see."""
    ((_, (_, taken)),) = _footprints(locate("gemma3-270m"), [(1, "f16")])
    assert taken < 40 * MIB


def test_what_does_not_fit_is_refused_with_its_size(tiny_model: Path) -> None:
    """The kernel would promise it, and end the process when it is filled."""
    model = Model(tiny_model, gpu_layers=0)
    with pytest.raises(OutOfMemory, match=r"they take [1-9]\d+\.\d GiB"):
        _context(model, 64, 8_000_000)
    model.close()


def _context(model: Model, slots: int, n_ctx: int) -> Context:
    flag = ctypes.create_string_buffer(2)
    return Context(model, slots, ContextOptions(n_ctx, N_BATCH, threads=1), flag)


def _footprints(
    model: Path, contexts: Sequence[tuple[int, str]]
) -> list[tuple[tuple[int, str], tuple[int, int]]]:
    """For each context what the check says and what it takes, in bytes."""
    arguments = [str(model), str(N_CTX), str(N_BATCH), json.dumps(contexts)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.footprint", *arguments],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    return list(zip(contexts, json.loads(done.stdout), strict=True))
