import inspect
import json.decoder
import re

import pytest

from mup_jax.data import Document, split_documents, standard_library


@pytest.fixture(scope="module")
def library():
    return standard_library()


def numbered(count):
    return [Document(f"document {i}", "text") for i in range(count)]


def test_standard_library_is_plain_source_text(library):
    names = [document.name for document in library]
    assert names == sorted(set(names))
    assert {"argparse.py", "json/decoder.py", "typing.py"} < set(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert not any("_sysconfigdata" in name for name in names)
    assert not any(re.search(r"[^\n -~]", document.text) for document in library)
    assert sum(len(document.text) for document in library) > 5_000_000


def test_text_is_cleaned_not_changed(library):
    decoder = next(document for document in library if document.name == "json/decoder.py")
    assert decoder.text == inspect.getsource(json.decoder)


def test_cleaning(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    (tmp_path / "package" / "tests").mkdir(parents=True)
    (tmp_path / "package" / "tests" / "left_out.py").write_text("x")
    (tmp_path / "_sysconfigdata_linux.py").write_text("x")
    (tmp_path / "package" / "b.py").write_bytes("if é:\r\n\tx = '\x0c'\r".encode())
    (tmp_path / "a.py").write_text("a\n")
    assert standard_library() == [("a.py", "a\n"), ("package/b.py", "if :\n        x = ''\n")]


def test_split_is_disjoint_and_complete(library):
    train, validation = split_documents(library)
    names = {document.name for document in train}, {document.name for document in validation}
    assert not names[0] & names[1]
    assert sorted(train + validation) == library
    assert not {document.text for document in train if len(document.text) > 1000} & {
        document.text for document in validation
    }


def test_split_fraction():
    _, validation = split_documents(numbered(10_000), validation_fraction=0.2)
    assert len(validation) == pytest.approx(2000, abs=120)


def test_a_document_never_changes_sides():
    documents = numbered(200)
    _, validation = split_documents(documents)
    _, of_reversed = split_documents(documents[::-1])
    _, of_half = split_documents(documents[:100])
    assert set(of_reversed) == set(validation)
    assert of_half == [document for document in documents[:100] if document in validation]


@pytest.mark.parametrize("documents", [[], [Document("a", ""), Document("b", "")]])
def test_empty_corpus(documents):
    with pytest.raises(ValueError, match="no text: add documents"):
        split_documents(documents)


@pytest.mark.parametrize(("fraction", "side"), [(1e-9, "validation"), (1 - 1e-9, "training")])
def test_empty_side(fraction, side):
    with pytest.raises(ValueError, match=f"no {side} text in 5 documents"):
        split_documents(numbered(5), validation_fraction=fraction)


def test_a_side_of_empty_documents_is_empty():
    train, validation = split_documents(numbered(200))
    blanked = train + [Document(document.name, "") for document in validation]
    with pytest.raises(ValueError, match="no validation text"):
        split_documents(blanked)


@pytest.mark.parametrize("fraction", [0, 1, -0.5, float("nan")])
def test_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match="validation_fraction="):
        split_documents(numbered(5), validation_fraction=fraction)
