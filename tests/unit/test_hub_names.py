"""Names of models on the Hugging Face hub, and which files they mean."""

import pytest

from shared.errors import ModelError
from shared.gguf_files import group_models
from shared.hub.name import HubName, parse_hub_name
from shared.model_names import served_name


@pytest.mark.parametrize(
    ("model", "meant"),
    [
        ("hf:o/r", HubName("o/r")),
        ("hf:o-1/r.2_GGUF", HubName("o-1/r.2_GGUF")),
        ("hf:o/r:Q4_K_M", HubName("o/r", quantization="Q4_K_M")),
        ("hf:o/r/m.gguf", HubName("o/r", "m.gguf")),
        ("hf:o/r/a folder/m Q4.GGUF", HubName("o/r", "a folder/m Q4.GGUF")),
    ],
)
def test_each_form_is_read(model: str, meant: HubName) -> None:
    """The model is served under its name without the prefix."""
    assert parse_hub_name(model) == meant
    assert served_name(model) == model.removeprefix("hf:")


@pytest.mark.parametrize(
    "model",
    [
        *(
            "hf:",
            "hf:r",
            "hf:o/",
            "hf:/r",
            "hf:o/r/",
            "hf:o/r/m.bin",
            "hf:o/r:",
            "hf:o/r:Q4/x.gguf",
        ),
        *("hf:../../etc", "hf:o/r//m.gguf", "hf:o/r@main", "hf:o/r\n", "hf:o/r:Q4*", "hf://o/r"),
    ],
)
def test_anything_else_is_refused(model: str) -> None:
    """With the forms that there are."""
    with pytest.raises(ModelError, match=r"give hf:owner/repo/file\.gguf"):
        parse_hub_name(model)


@pytest.mark.parametrize(
    ("quantization", "file", "is_meant"),
    [
        ("Q4_K_M", "m-Q4_K_M.gguf", True),
        ("q4_k_m", "m.Q4_K_M.gguf", True),
        ("Q4_0", "m_q4_0.gguf", True),
        ("Q4_K_M", "Q4_K_M/m-Q4_K_M-00001-of-00002.gguf", True),
        ("Q4_K_XL", "m-UD-Q4_K_XL.gguf", True),
        ("UD-Q4_K_XL", "m-Q4_K_XL.gguf", False),
        ("Q4_K", "m-Q4_K_M.gguf", False),
        ("Q4_XS", "m-IQ4_XS.gguf", False),
        ("Q4_0", "m-Q4_0_4_4.gguf", False),
        ("F16", "m-BF16.gguf", False),
        ("F16", "mmproj-m-F16.gguf", False),
        ("", "mmproj-m-F16.gguf", False),
        ("", "m.gguf", True),
        (".", "m.gguf", False),
        ("Q4.0", "m-Q4_0.gguf", False),
    ],
)
def test_a_quantization_is_a_word_of_a_files_name(
    quantization: str, file: str, is_meant: bool
) -> None:
    """Whatever its case; and neither a projector nor a matrix of importance is a model."""
    assert HubName("o/r", quantization=quantization).matches([file]) == is_meant


def test_a_file_is_meant_by_its_whole_name() -> None:
    """Of a split model by the name of any part; also if it would not be chosen otherwise."""
    assert HubName("o/r", "a/b.gguf").matches(["a/b.gguf"])
    assert not HubName("o/r", "b.gguf").matches(["a/b.gguf"])
    assert HubName("o/r", "p2").matches(["p1", "p2"])
    assert HubName("o/r", "mmproj.gguf").matches(["mmproj.gguf"])


def test_parts_are_one_model() -> None:
    """In order, if all are there; other files are left out."""
    parts = [f"d/m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert group_models(["b.GGUF", *reversed(parts), "a.gguf", "readme.md", "gguf"]) == [
        ["a.gguf"],
        ["b.GGUF"],
        parts,
    ]
    assert group_models(parts[1:]) == []
    assert group_models(["m-00001-of-99999.gguf", "m-00001-of-00000.gguf"]) == []
    assert group_models(["m-00001-of-00001.gguf"]) == [["m-00001-of-00001.gguf"]]
