"""Reading documents and encoding them: exact bytes in, exact tokens out, and every bad input named with its line."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from limbeck.data import encode_batches, encode_documents, read_documents, text, text_files, tokenize_to_file
from limbeck.errors import LimbeckError


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def test_a_folder_stands_for_its_text_files_in_order(write, tmp_path):
    write("b.txt", "second")
    write("a/z.py", "first")
    write("c.jsonl", '{"text": "third"}\n\n{"text": ""}\n{"text": "fourth", "id": 7}\n')
    write("picture.png", b"\x89PNG")
    write("empty.md", "")
    documents = list(read_documents(tmp_path))
    assert documents == ["first", "second", "third", "fourth"]
    assert [d.source.removeprefix(f"{tmp_path}/") for d in documents] == ["a/z.py", "b.txt", "c.jsonl:1", "c.jsonl:4"]


def test_bytes_are_taken_as_they_are(write):
    written = "tab\tcarriage\r\nreturn\n\nnul\0 漢字 😀\n"
    assert list(read_documents(write("x.txt", written))) == [written]
    assert list(read_documents(write("bom.txt", b"\xef\xbb\xbfhello"))) == ["hello"]
    assert list(read_documents([str(write("x.jsonl", json.dumps({"text": written}) + "\r\n"))])) == [written]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("x.txt", b"one\ntwo\nthr\xffee", ["x.txt:3 is no UTF-8"]),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ["x.jsonl:2 is no UTF-8"]),
        ("x.jsonl", '{"text": "a"}\n{"text": \n', ["x.jsonl:2 is no JSON"]),
        ("x.jsonl", "[" * 200_000, ["x.jsonl:1 is no JSON"]),
        ("x.jsonl", '\n\n["a"]\n', ["x.jsonl:3 holds a list"]),
        ("x.jsonl", '{"txt": "a", "id": 1}\n', ["x.jsonl:1", 'no "text"', "txt, id"]),
        ("x.jsonl", '{"text": 3}\n', ["x.jsonl:1", 'no "text"']),
        ("x.jsonl", '{"text": "\\ud800"}\n', ["x.jsonl:1", "surrogate"]),
        ("x.txt", "", ["no text in", "x.txt"]),
        ("x.jsonl", '{"text": ""}\n\n', ["no text in", "x.jsonl"]),
        ("x.pdf", "text", ["x.pdf", ".jsonl, .md, .py, .txt"]),
    ],
)
def test_bad_files_are_named_with_their_line(write, name, content, parts):
    path = write(name, content)
    with pytest.raises(LimbeckError) as caught:
        list(read_documents(path))
    for part in parts:
        assert part in str(caught.value)


def test_paths_that_hold_nothing(tmp_path):
    with pytest.raises(LimbeckError, match="no file or folder"):
        text_files(tmp_path / "absent.txt")
    with pytest.raises(LimbeckError, match="no text in folder"):
        text_files([tmp_path])


def test_a_separator_follows_every_document(tokenizer):
    tokens = encode_documents(tokenizer, ["the still", "", "a vessel"], 0)
    assert tokens.dtype == np.uint16
    assert np.flatnonzero(tokens == 0).tolist() == [len(tokenizer.encode("the still")), len(tokens) - 1]
    assert tokenizer.decode(tokens, skip_special_tokens=False) == "the still<end>a vessel<end>"


@given(documents=st.lists(st.text(st.characters(codec="utf-8"))), size=st.integers(1, 50))
def test_the_size_of_batches_changes_nothing(tokenizer, documents, size):
    expected = [token for d in documents if d for token in (*tokenizer.encode(d).ids, 0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BATCH_CHARACTERS", size)
        chunks = list(encode_batches(tokenizer, documents, 0))
    assert [token for chunk in chunks for token in chunk.tolist()] == expected


def test_a_tokenizer_of_transformers_gives_the_same_and_is_left_as_it_was(tokenizer):
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    wrapped.backend_tokenizer.enable_truncation(3)
    wrapped.backend_tokenizer.enable_padding(length=50)
    documents = ["a still is an old word for a vessel", "to distil in"]
    assert np.array_equal(encode_documents(wrapped, documents, 0), encode_documents(tokenizer, documents, 0))
    assert len(wrapped.backend_tokenizer.encode(documents[0])) == 50


def test_no_separator_and_large_vocabularies(tokenizer):
    tokens = encode_documents(tokenizer, ["ab", "cd"], None, vocab_size=2**16 + 1)
    assert tokens.dtype == np.uint32
    assert 0 not in tokens


def test_tokens_on_disk_are_those_in_memory(tokenizer, tmp_path):
    documents = ["the still", "a vessel", "漢字"]
    tokens = tokenize_to_file(tmp_path / "deep" / "tokens.npy", tokenizer, iter(documents), 0)
    assert isinstance(tokens, np.memmap)
    assert np.array_equal(tokens, encode_documents(tokenizer, documents, 0))


def test_a_token_beyond_the_vocabulary_is_named_with_its_document(tokenizer, write):
    path = write("x.jsonl", '{"text": "!"}\n{"text": "the still"}\n')
    with pytest.raises(LimbeckError, match=r"x\.jsonl:2 has token \d+ \('.+'\), beyond the vocabulary"):
        encode_documents(tokenizer, read_documents(path), 0, vocab_size=257)
    with pytest.raises(LimbeckError, match="separator 300"):
        encode_documents(tokenizer, ["a"], 300)


def test_what_cannot_be_encoded(tokenizer, tmp_path):
    with pytest.raises(LimbeckError, match="no documents"):
        encode_documents(tokenizer, ["", ""], 0)
    with pytest.raises(LimbeckError, match="object cannot encode in batches"):
        encode_documents(object(), ["a"], 0)
    with pytest.raises(LimbeckError, match="no tokens to write"):
        tokenize_to_file(tmp_path / "tokens.npy", tokenizer, [], 0)
    assert list(tmp_path.iterdir()) == []
