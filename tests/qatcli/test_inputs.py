"""Files that this process did not write: believed only as far as they can be checked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qatcli import inputs
from qatcli.errors import InputError
from qatcli.inputs import content_digest, file_inside, read_json


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, "\\u00e9"]}')
    assert read_json(tmp_path / "a.json") == {"a": [1, "\u00e9"]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "malformed"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"{", "malformed"),
        (b"\xff", "malformed"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "malformed"),
        (b'{"a": 1}' + b" " * 100, "more than any such file needs"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, said: str) -> None:
    monkeypatch.setattr(inputs, "JSON_LIMIT", 100 if said.startswith("more") else 2**20)
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        read_json(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in caught.value.message


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("pipe", "not a regular file"), (".", "not a regular file"), ("missing", "does not exist")):
        with pytest.raises(InputError, match=said):
            read_json(tmp_path / name)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "..", "a\0b", 3, None, ["a"]])
def test_a_name_cannot_leave_its_directory(tmp_path: Path, name: object) -> None:
    (tmp_path / "x").touch()
    (tmp_path / "in" / "a").mkdir(parents=True)
    with pytest.raises(InputError, match="outside of itself"):
        file_inside(tmp_path / "in", name)


def test_a_link_may_stay_inside_but_not_leave(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a").touch()
    (folder / "b").symlink_to("sub/a")
    assert file_inside(folder, "b") == folder / "b"
    (tmp_path / "c").touch()
    (folder / "c").symlink_to("../c")
    (folder / "d").symlink_to("nowhere")
    (folder / "e").symlink_to("..")
    for name, said in (("c", "leads out"), ("d", "missing"), ("e/c", "leads out"), ("sub", "missing")):
        with pytest.raises(InputError, match=said):
            file_inside(folder, name)
    (tmp_path / "alias").symlink_to(folder)
    assert file_inside(tmp_path / "alias", "sub/a").is_file()


def test_a_hub_snapshot_links_into_its_own_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "x").touch()
    (snapshot / "config.json").symlink_to("../../blobs/x")
    assert file_inside(snapshot, "config.json").is_file()
    (tmp_path / "y").touch()
    (snapshot / "y").symlink_to(tmp_path / "y")
    with pytest.raises(InputError, match="leads out"):
        file_inside(snapshot, "y")


def test_a_file_that_may_not_be_read_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").touch()
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root
    with pytest.raises(InputError, match="cannot be read"):
        file_inside(tmp_path, "a")


def test_what_is_not_read_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    before = content_digest(str(tmp_path))
    for place in (".git/index", "runs/x/calibrate.lock", ".notes"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("x")
        assert content_digest(str(tmp_path)) == before, place
    with open(os.fsencode(tmp_path) + b"/na\xefve.txt", "w"):
        assert content_digest(str(tmp_path)) != before
    (tmp_path / "folders" / "train").mkdir(parents=True)
    assert content_digest(str(tmp_path / "folders")) is None
    (tmp_path / "folders" / "train" / "b.txt").write_text("b")
    (tmp_path / "folders" / "README.md").write_text("a card")
    (tmp_path / "folders" / "dataset_dict.json").write_text("{}")
    before = content_digest(str(tmp_path / "folders"))
    (tmp_path / "folders" / "train" / "b.txt").write_text("c")
    assert content_digest(str(tmp_path / "folders")) != before


def test_what_is_in_files_is_told_by_their_names_and_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "PIECES", 4)
    monkeypatch.setattr(inputs, "PIECE", 8)
    monkeypatch.setattr(inputs, "FEWEST_PIECES", 2)
    assert content_digest("owner/name") is None
    folder = tmp_path / "data"
    folder.mkdir()
    assert content_digest(str(folder)) is None
    (folder / "a.txt").write_bytes(bytes(range(30)))
    small = content_digest(str(folder / "a.txt"))
    assert small == content_digest(str(folder)) == content_digest(str(folder / "*.txt"))
    for position in range(30):  # no piece is left out of a file that is no longer than all of them
        (folder / "a.txt").write_bytes(bytes(range(position)) + b"x" + bytes(range(position + 1, 30)))
        assert content_digest(str(folder / "a.txt")) != small or position == ord("x")
    (folder / "b.txt").touch()
    assert content_digest(str(folder)) not in (None, small)
    (folder / "b.txt").write_bytes(bytes(1000))
    long = content_digest(str(folder / "b.txt"))
    for change in (b"x" + bytes(999), bytes(999) + b"x", bytes(500) + b"x" * 500, bytes(1001)):
        (folder / "b.txt").write_bytes(change)
        assert content_digest(str(folder / "b.txt")) != long
    (folder / "a.txt").write_bytes(bytes(range(30)))
    many = content_digest(str(folder))  # two files share the pieces: of the first, 30 bytes, both ends are read
    assert (folder / "b.txt").stat().st_size + 30 > 4 * 8
    for position, seen in ((0, True), (15, False), (29, True)):
        (folder / "a.txt").write_bytes(bytes(range(position)) + b"!" + bytes(range(position + 1, 30)))
        assert (content_digest(str(folder)) != many) == seen
    (folder / "a.txt").write_bytes(bytes(range(20)))
    (folder / "b.txt").write_bytes(b"b")
    few = content_digest(str(folder))  # both fit into the pieces together
    (folder / "a.txt").write_bytes(bytes(range(10)) + b"!" + bytes(range(11, 20)))
    assert content_digest(str(folder)) != few
