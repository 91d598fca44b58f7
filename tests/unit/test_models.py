"""From what the user wrote to a GGUF file and the name it is served under."""

from pathlib import Path

import pytest

from shared.errors import ModelError, SettingsError
from shared.model_files import locate
from shared.model_names import served_name


def test_a_path_to_a_gguf_is_taken(tiny_model: Path) -> None:
    """A file is found as it is given."""
    assert locate(str(tiny_model)) == tiny_model


def test_a_tilde_is_the_home_folder(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`~` is the home folder, also where no shell has replaced it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.gguf").symlink_to(tiny_model)
    assert locate("~/m.gguf") == tmp_path / "m.gguf"


@pytest.mark.parametrize("alias", ["smollm2", "gemma3-270m"])
def test_bundled_models_are_found_by_their_names(alias: str) -> None:
    """Each alias is a real GGUF, served under that alias."""
    with locate(alias).open("rb") as file:
        assert file.read(4) == b"GGUF"
    assert served_name(alias) == alias


def test_a_missing_file_names_it_and_what_there_is(tmp_path: Path) -> None:
    """The sentence distinguishes a typo in a path from one in an alias."""
    missing = tmp_path / "absent.gguf"
    with pytest.raises(ModelError, match=r"absent\.gguf does not exist.*gemma3-270m, smollm2"):
        locate(str(missing))


@pytest.mark.parametrize("model", ["a" * 5000, "~nobody-here/m.gguf", ""])
def test_what_cannot_be_a_path_is_refused(model: str) -> None:
    """Like any other path where nothing is."""
    with pytest.raises(ModelError):
        locate(model)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    """A folder of Hugging Face files is a frequent mistake."""
    with pytest.raises(ModelError, match="is a folder"):
        locate(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04 model"])
def test_a_file_that_is_not_a_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    """It is reported before llama.cpp reads it."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors is not a GGUF file"):
        locate(str(file))


@pytest.mark.parametrize(
    ("model", "alias"),
    [
        ("/models/tiny.gguf", "tiny"),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct-q4_1"),
        ("/models/My Model (new).GGUF", "my-model-new"),
        ("/models/_x.gguf", "x"),
        ("/models/noending", "noending"),
        ("a" * 80 + ".gguf", "a" * 64),
    ],
)
def test_a_name_is_made_from_the_file_name(model: str, alias: str) -> None:
    """Every file name with a letter or digit gives a name that fits into a subject."""
    assert served_name(model) == alias


def test_the_wanted_name_wins() -> None:
    """Over a file's name and over a bundled alias."""
    assert served_name("/models/tiny.gguf", "fast") == "fast"
    assert served_name("smollm2", "fast") == "fast"


@pytest.mark.parametrize("wanted", [" a", "a\t", "a\nb", "a\x1b", "a" * 129, "\u202ea", "\ud800"])
def test_a_bad_alias_is_refused(wanted: str) -> None:
    """With the variable's name, what stood there, and what may."""
    with pytest.raises(SettingsError, match=r"INFERER_ALIAS=.*128 characters") as raised:
        served_name("/models/tiny.gguf", wanted)
    assert repr(wanted) in str(raised.value)


def test_a_file_name_that_gives_no_name_is_refused() -> None:
    """Nothing is left of it: the user has to choose."""
    with pytest.raises(SettingsError, match="INFERER_ALIAS"):
        served_name("/models/模型.gguf")
