"""Hugging Face datasets as sources, with the library itself and a hub that is a function."""

import numpy as np
import pytest

from limbeck.data import Corpus, Reading, corpus, encode_documents, prepare
from limbeck.errors import LimbeckError

datasets = pytest.importorskip("datasets")

TEXTS = [f"{number}. the old word for a still" * (number % 4) for number in range(25)]


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.setattr(corpus, "PIECE_ROWS", 4)
    return datasets.Dataset.from_dict({"text": TEXTS, "other": [text[::-1] for text in TEXTS], "id": range(25)})


@pytest.fixture
def hub(rows, monkeypatch):
    """A hub with one dataset; what it was asked for."""
    asked = []

    def load(name, config=None, *, split, streaming=False, **more):
        asked.append((name, config, split, streaming))
        if name == "parquet":
            return original(name, split=split, **more)
        if name != "old/words":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset {name!r} doesn't exist on the Hub")
        return rows.to_iterable_dataset() if streaming else rows

    original = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def tokens_of(source, reading, tokenizer, folder, workers=1):
    prefix = prepare(Corpus([source], reading), tokenizer, folder / "corpus", eos_token_id=0, workers=workers)
    return np.fromfile(f"{prefix}.bin", "<u2")


def test_files_and_folders_of_datasets(rows, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "saved")
    expected = encode_documents(tokenizer, TEXTS, 0)
    for name in ("rows.parquet", "saved"):
        assert np.array_equal(tokens_of(str(tmp_path / name), Reading(), tokenizer, tmp_path / f"{name}.out"), expected)
        source = Corpus([str(tmp_path / name)], Reading())
        assert (source.work(), len(list(source.pieces()))) == (25, 7)
    others = tokens_of(str(tmp_path / "saved"), Reading(field="other"), tokenizer, tmp_path / "others")
    assert np.array_equal(others, encode_documents(tokenizer, [text[::-1] for text in TEXTS], 0))


@pytest.mark.slow
def test_workers_read_their_own_rows(rows, tokenizer, tmp_path):
    rows.save_to_disk(tmp_path / "saved")
    found = tokens_of(str(tmp_path / "saved"), Reading(), tokenizer, tmp_path / "out", workers=2)
    assert np.array_equal(found, encode_documents(tokenizer, TEXTS, 0))


@pytest.mark.parametrize("streaming", [False, True])
def test_the_hub(hub, tokenizer, tmp_path, streaming):
    reading = Reading(split="validation", config="en", streaming=streaming)
    found = tokens_of("hub:old/words", reading, tokenizer, tmp_path / "out")
    assert np.array_equal(found, encode_documents(tokenizer, TEXTS, 0))
    assert set(hub) == {("old/words", "en", "validation", streaming)}
    assert Corpus(["hub:old/words"], reading).work() == (None if streaming else 25)


def test_what_a_dataset_lacks(rows, hub, tokenizer, tmp_path):
    rows.save_to_disk(tmp_path / "saved")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    for source, reading, words in (
        (str(tmp_path / "saved"), Reading(field="body"), "has no column 'body'; its columns: text, other, id"),
        (str(tmp_path / "saved"), Reading(field="id"), "row 0: 'id' holds a int"),
        ("hub:old/words", Reading(field="body", streaming=True), "row 0: 'body' holds a NoneType"),
        ("hub:old/swords", Reading(), "cannot be opened: Dataset 'old/swords' doesn't exist"),
        (str(tmp_path / "torn.parquet"), Reading(), "torn.parquet cannot be opened"),
    ):
        with pytest.raises(LimbeckError, match=words):
            tokens_of(source, reading, tokenizer, tmp_path / "out")
        assert not list((tmp_path / "out").glob("*"))
