"""Text into token files: the same bytes from any number of workers, after any kill, and nothing left of a mistake."""

import builtins
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.data import Corpus, MegatronDataset, Reading, corpus, encode_documents, prepare, read_documents
from limbeck.data import prepare as prepare_function
from limbeck.data.corpus import Piece
from limbeck.errors import LimbeckError

prepare_module = sys.modules[prepare_function.__module__]

WORDS = ["the", "old", "word", "for", "a", "still", "is", "limbeck", "a", "vessel", "to", "distil", "in"]


@pytest.fixture
def small_pieces(monkeypatch):
    """Cut so small that a few lines make many pieces."""
    monkeypatch.setattr(corpus, "PIECE_BYTES", 300)
    monkeypatch.setattr(corpus, "PIECE_ROWS", 3)


@pytest.fixture
def text(tmp_path):
    """A folder of every kind of text; its lines are of many lengths, some are empty."""
    folder = tmp_path / "text"
    (folder / "deep").mkdir(parents=True)
    for number in range(7):
        (folder / "deep" / f"{number}.txt").write_text(" ".join(WORDS * number))
    lines = [json.dumps({"text": " ".join(WORDS[number % 5 :] * (number % 3))}) for number in range(40)]
    (folder / "lines.jsonl").write_text("\n".join([*lines[:20], "", *lines[20:]]) + "\n")
    (folder / "z.md").write_text("漢字 😀\r\n")
    return folder


def expected_tokens(folder, tokenizer):
    return encode_documents(tokenizer, read_documents(folder), 0)


def contents(prefix):
    return [prefix.with_name(f"{prefix.name}{ending}").read_bytes() for ending in (".idx", ".bin", ".json")]


def test_it_is_the_text_one_sequence_to_a_document(text, tokenizer, tmp_path, small_pieces):
    told = []
    source = Corpus([text], Reading())
    prefix = prepare(
        source, tokenizer, tmp_path / "out" / "corpus.idx", eos_token_id=0, report=lambda *now: told.append(now)
    )
    samples = MegatronDataset(prefix, 16)
    expected = expected_tokens(text, tokenizer)
    assert prefix == tmp_path / "out" / "corpus"
    assert np.array_equal(np.fromfile(f"{prefix}.bin", "<u2"), expected)
    assert samples.index.sizes.tolist() == np.diff(np.flatnonzero(expected == 0), prepend=-1).tolist()
    assert samples.index.documents.tolist() == list(range(len(samples.index.sizes) + 1))
    assert told[-1] == (source.work(), len(expected))
    assert told == sorted(told)
    assert len(told) > 10
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["corpus.bin", "corpus.idx", "corpus.json"]


@pytest.mark.slow
def test_workers_change_nothing(text, tokenizer, tmp_path, small_pieces):
    for workers in (1, 2):
        prepare(Corpus([text], Reading()), tokenizer, tmp_path / f"by-{workers}", eos_token_id=0, workers=workers)
    assert contents(tmp_path / "by-1") == contents(tmp_path / "by-2")


def test_a_finished_file_is_left_alone(text, tokenizer, tmp_path):
    prefix = prepare(Corpus([text], Reading()), tokenizer, tmp_path / "corpus", eos_token_id=0)
    before = (tmp_path / "corpus.bin").stat().st_mtime_ns
    assert prepare(Corpus([text], Reading()), tokenizer, tmp_path / "corpus", eos_token_id=0) == prefix
    assert (tmp_path / "corpus.bin").stat().st_mtime_ns == before


@given(
    documents=st.lists(st.text(st.characters(codec="utf-8"), max_size=40), min_size=1),
    size=st.integers(1, 60),
    ends=st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_every_line_is_in_one_piece_wherever_files_are_cut(tmp_path_factory, documents, size, ends):
    path = tmp_path_factory.mktemp("cut") / "x.jsonl"
    path.write_bytes(ends.join(json.dumps({"text": text}, ensure_ascii=False) for text in documents).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE_BYTES", size)
        pieces = list(Corpus([path], Reading()).pieces())
    assert [document for piece in pieces for document in piece.documents()] == documents
    assert len(pieces) == -(-path.stat().st_size // size)


# --- interruptions ----------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """Stands for a kill: no `except Exception` catches it."""


@pytest.fixture
def stopped_after(monkeypatch):
    """Let the process end after so many file operations, each of which a kill may precede."""

    def stopped_after(count):
        left = [count]

        def counted(original):
            def operation(*arguments, **options):
                if left[0] == 0:
                    raise Stop
                left[0] -= 1
                return original(*arguments, **options)

            return operation

        patch = pytest.MonkeyPatch()
        for target, name in (
            (prepare_module, "replacing"),
            (prepare_module, "sync"),
            (prepare_module, "publish"),
            (prepare_module, "write_text"),
            (prepare_module.shutil, "rmtree"),
            (prepare_module.shutil, "copyfileobj"),
        ):
            patch.setattr(target, name, counted(getattr(target, name)))
        return patch

    return stopped_after


def test_stopped_anywhere_and_begun_again_it_is_the_same(text, tokenizer, tmp_path, monkeypatch, stopped_after):
    monkeypatch.setattr(corpus, "PIECE_BYTES", 1500)

    def make(name):
        return prepare(Corpus([text], Reading()), tokenizer, tmp_path / name / "corpus", eos_token_id=0)

    whole = contents(make("whole"))
    for count in range(1000):
        patch = stopped_after(count)
        with patch.context():
            try:
                make(str(count))
            except Stop:
                stopped = True
            else:
                stopped = False
            finally:
                patch.undo()
        make(str(count))
        assert contents(tmp_path / str(count) / "corpus") == whole, count
        assert len(list((tmp_path / str(count)).iterdir())) == 3
        if not stopped:
            break
    assert not stopped
    assert count > 20


@pytest.mark.slow
def test_killed_with_its_workers_and_begun_again(text, tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    program = (
        "import sys, time\n"
        "from tokenizers import Tokenizer\n"
        "from limbeck.data import Corpus, Reading, corpus, prepare\n"
        "if __name__ == '__main__':\n"
        "    corpus.PIECE_BYTES = 300\n"
        "    prepare(Corpus([sys.argv[1]], Reading()), Tokenizer.from_file(sys.argv[2]), sys.argv[3], eos_token_id=0,\n"
        "            workers=2, report=lambda *now: (print(now, flush=True), time.sleep(float(sys.argv[4]))))\n"
    )
    (tmp_path / "program.py").write_text(program)
    arguments = [sys.executable, tmp_path / "program.py", text, tmp_path / "tokenizer.json"]
    process = subprocess.Popen([*arguments, tmp_path / "killed", "60"], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    parts = tmp_path / "killed.parts"
    assert (parts / "plan.json").is_file()
    assert not (tmp_path / "killed.idx").exists()
    for _ in range(100):  # the workers end by themselves
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("workers outlive the process that started them")
    subprocess.run([*arguments, tmp_path / "killed", "0"], check=True, stdout=subprocess.DEVNULL)
    prepare(Corpus([text], Reading()), tokenizer, tmp_path / "whole", eos_token_id=0)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


class Deadly(Piece):
    """Stands for a piece that is too much for the memory."""

    def documents(self):
        os.kill(os.getpid(), signal.SIGKILL)


class DeadlyInTheEnd(Corpus):
    def pieces(self):
        *pieces, last = super().pieces()
        yield from pieces
        yield Deadly(last.kind, last.paths, last.start, last.stop)


@pytest.mark.slow
def test_a_worker_that_is_lost_leaves_what_was_done(text, tokenizer, tmp_path, small_pieces):
    deadly = DeadlyInTheEnd([text], Reading())
    with pytest.raises(LimbeckError, match="a worker ended"):
        prepare(deadly, tokenizer, tmp_path / "corpus", eos_token_id=0, workers=2)
    assert any(path.suffix == ".npy" for path in (tmp_path / "corpus.parts").iterdir())
    prepare(Corpus([text], Reading()), tokenizer, tmp_path / "corpus", eos_token_id=0)
    assert np.array_equal(np.fromfile(tmp_path / "corpus.bin", "<u2"), expected_tokens(text, tokenizer))


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_bad_line_is_named_and_leaves_nothing(text, tokenizer, tmp_path, small_pieces, workers):
    with (text / "lines.jsonl").open("a") as file:
        file.write("\n{no json}\n")
    out = tmp_path / "out"
    with pytest.raises(LimbeckError, match=r"lines\.jsonl:43 is no JSON"):
        prepare(Corpus([text], Reading()), tokenizer, out / "corpus", eos_token_id=0, workers=workers)
    assert list(out.iterdir()) == []


def test_a_mistake_does_not_remove_what_an_earlier_call_did(text, tokenizer, tmp_path, small_pieces, stopped_after):
    source = Corpus([text], Reading())
    patch = stopped_after(12)
    with patch.context(), pytest.raises(Stop):
        prepare(source, tokenizer, tmp_path / "corpus", eos_token_id=0)
    patch.undo()
    done = sorted((tmp_path / "corpus.parts").iterdir())
    with (text / "z.md").open("ab") as file:
        file.write(b"more")
    with pytest.raises(LimbeckError, match=r"corpus\.parts was made with other sources"):
        prepare(source, tokenizer, tmp_path / "corpus", eos_token_id=0)
    assert sorted((tmp_path / "corpus.parts").iterdir()) == done


def test_what_lies_there_is_not_touched(text, tokenizer, tmp_path):
    prefix = prepare(Corpus([text], Reading()), tokenizer, tmp_path / "corpus", eos_token_id=0)
    before = contents(prefix)
    with pytest.raises(LimbeckError, match="was made with other eos_token_id"):
        prepare(Corpus([text], Reading()), tokenizer, prefix, eos_token_id=None)
    with pytest.raises(LimbeckError, match="was made with other sources"):
        prepare(Corpus([text / "z.md"], Reading()), tokenizer, prefix, eos_token_id=0)
    assert contents(prefix) == before
    (tmp_path / "corpus.json").unlink()
    with pytest.raises(LimbeckError, match=r"corpus\.idx exists"):
        prepare(Corpus([text], Reading()), tokenizer, prefix, eos_token_id=0)


def test_one_process_at_a_time(text, tokenizer, tmp_path):
    def again(done, tokens):
        with pytest.raises(LimbeckError, match="another process is preparing"):
            prepare(Corpus([text], Reading()), tokenizer, tmp_path / "corpus", eos_token_id=0)

    prepare(Corpus([text], Reading()), tokenizer, tmp_path / "corpus", eos_token_id=0, report=again)
    assert (tmp_path / "corpus.idx").is_file()


def test_sources_that_cannot_be(text, tokenizer, tmp_path):
    with pytest.raises(LimbeckError, match="no source"):
        Corpus([], Reading())
    with pytest.raises(LimbeckError, match="no file or folder"):
        Corpus([tmp_path / "nowhere"], Reading())
    with pytest.raises(LimbeckError, match='no "content" that is a string'):
        prepare(Corpus([text / "lines.jsonl"], Reading("content")), tokenizer, tmp_path / "corpus", eos_token_id=0)
    with pytest.raises(LimbeckError, match="workers = 0"):
        prepare(Corpus([text], Reading()), tokenizer, tmp_path / "corpus", eos_token_id=0, workers=0)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(LimbeckError, match="no text in the sources"):
        prepare(Corpus([tmp_path / "empty.txt"], Reading()), tokenizer, tmp_path / "corpus", eos_token_id=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "text"]


def test_datasets_without_their_library(tokenizer, tmp_path, monkeypatch):
    original = builtins.__import__

    def absent(name, *arguments):
        if name == "datasets":
            raise ImportError(name)
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(LimbeckError, match=r"needs the library `datasets`\ntry: pip install \"limbeck\[hub\]\""):
        prepare(Corpus(["hub:old/words"], Reading()), tokenizer, tmp_path / "corpus", eos_token_id=0)
