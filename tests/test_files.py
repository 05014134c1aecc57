"""Files and folders that are there whole or not at all, whenever the process dies."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from limbeck import files
from limbeck.files import replacing, replacing_folder, sha256, write_text


class StopHereError(Exception):
    pass


def half_way(manager, write):
    with manager as temporary:
        write(temporary)
        raise StopHereError


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_write_text(tmp_path):
    write_text(tmp_path / "a.txt", "ein Schluck Öl")
    write_text(tmp_path / "a.txt", "zwei")
    assert contents(tmp_path) == {"a.txt": "zwei"}


def test_a_file_appears_at_the_end(tmp_path):
    path = tmp_path / "a.npy"
    with replacing(path) as temporary:
        assert temporary.suffix == ".npy"
        temporary.write_text("new")
        assert not path.exists()
    assert contents(tmp_path) == {"a.npy": "new"}


def test_a_file_that_fails_leaves_the_old_one(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(StopHereError):
        half_way(replacing(tmp_path / "a.txt"), lambda temporary: temporary.write_text("half"))
    assert contents(tmp_path) == {"a.txt": "old"}


def test_a_folder_appears_at_the_end(tmp_path):
    path = tmp_path / "deep" / "folder"
    for text in ("one", "two"):
        with replacing_folder(path) as temporary:
            assert not list(temporary.iterdir())
            (temporary / "inner").mkdir()
            (temporary / "inner" / "a.txt").write_text(text)
            assert not path.exists() or contents(path) == {"inner/a.txt": "one"}
        assert contents(tmp_path) == {"deep/folder/inner/a.txt": text}


def test_a_folder_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "folder"
    for name in ("first", "second"):
        with pytest.raises(StopHereError):
            half_way(replacing_folder(path), lambda temporary, name=name: (temporary / name).write_text("half"))
        assert not list(tmp_path.iterdir())
    with replacing_folder(path) as temporary:
        (temporary / "a.txt").write_text("whole")
    with pytest.raises(StopHereError):
        half_way(replacing_folder(path), lambda temporary: (temporary / "a.txt").write_text("half"))
    assert contents(tmp_path) == {"folder/a.txt": "whole"}


KILLED_WHILE_REPLACING = """
import os, signal, sys
from pathlib import Path
from limbeck_files import replacing_folder
count = int(sys.argv[2])
def kill(event, arguments):
    global count
    if event in ("os.rename", "shutil.rmtree", "os.mkdir", "open") and sys.argv[1] in str(arguments[0]):
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
with replacing_folder(Path(sys.argv[1]) / "folder") as work:
    (work / "a.txt").write_text("new")
    (work / "b.txt").write_text("new")
"""


def test_killed_at_any_moment_the_folder_is_old_or_new(tmp_path):
    program, script = tmp_path / "program", tmp_path / "program" / "kill.py"
    program.mkdir()
    (program / "limbeck_files.py").write_text(Path(files.__file__).read_text())  # by itself: no torch to wait for
    script.write_text(KILLED_WHILE_REPLACING)
    old, new = ({"folder/a.txt": text, "folder/b.txt": text} for text in ("old", "new"))
    for moment in range(1, 40):
        place = tmp_path / str(moment)
        (place / "folder").mkdir(parents=True)
        for name in ("a.txt", "b.txt"):
            (place / "folder" / name).write_text("old")
        killed = subprocess.run([sys.executable, script, place, str(moment)], check=False).returncode
        after = {name: text for name, text in contents(place).items() if not name.startswith(".writing-")}
        kept = {name.removeprefix(".old-"): text for name, text in after.items()}
        assert after in (old, new) or kept == old or new.items() <= after.items()
        with replacing_folder(place / "folder") as work:  # the next call puts everything right
            assert contents(place / "folder") in ({"a.txt": "old", "b.txt": "old"}, {"a.txt": "new", "b.txt": "new"})
            (work / "a.txt").write_text("next")
        assert contents(place) == {"folder/a.txt": "next"}
        if killed == 0:
            break
    assert killed == 0
    assert moment > 8


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"still")
    assert sha256(tmp_path / "a") == hashlib.sha256(b"still").hexdigest()
