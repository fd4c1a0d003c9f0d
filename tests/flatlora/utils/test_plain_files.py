"""Files of folders that somebody else filled: nothing but plain files of that folder is read."""

import os
import socket

import pytest

from flatlora.utils.plain_files import irregular_files, open_plain, place_inside, read_plain


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "given"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(b"a")
    (folder / "sub" / "b.png").write_bytes(b"b")
    (tmp_path / "private.png").write_bytes(b"private")
    os.mkfifo(folder / "pipe")
    (folder / "endless").symlink_to("/dev/zero")
    (folder / "circle").symlink_to("circle")
    (folder / "nothing").symlink_to("nowhere")
    (folder / "out").symlink_to("../private.png")
    (folder / "in").symlink_to("sub/b.png")
    return folder


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pipe", "a pipe"),
        ("endless", "a device"),
        ("sub", "Is a directory"),
        ("circle", "Too many levels"),
        ("gone", "No such"),
    ],
)
def test_only_plain_files_are_read(folder, name, reason):
    with pytest.raises(OSError, match=reason):
        open_plain(folder / name)


def test_a_file_that_is_too_large_is_not_read(folder):
    with open(folder / "sparse", "wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(OSError, match="16,384 MiB, and at most 1 are read"):
        read_plain(folder / "sparse", 1 << 20)
    assert read_plain(folder / "a.png", 1) == b"a"


@pytest.mark.parametrize("name", ["../private.png", "out", "/etc/hostname", "sub/../../private.png", "endless", ".."])
def test_a_file_outside_is_rejected(folder, name):
    with pytest.raises(OSError, match="is outside"):
        place_inside(folder, name)


def test_what_lies_inside_is_found_also_by_links_and_whole_names(folder):
    for name in ("a.png", "sub/b.png", "in", "sub/../a.png", str(folder / "a.png")):
        assert place_inside(folder, name).is_file()
    assert place_inside(folder, "../private.png", folder.parent).read_bytes() == b"private"


def test_a_snapshot_of_the_hub_links_to_its_store(tmp_path):
    repository = tmp_path / "datasets--me--pictures"
    snapshot = repository / "snapshots" / "abc"
    for place in (snapshot, repository / "blobs", tmp_path / "blobs"):
        place.mkdir(parents=True)
        (place / "file").write_bytes(b"p")
    (snapshot / "a.png").symlink_to("../../blobs/file")
    (snapshot / "b.png").symlink_to("../../../blobs/file")
    assert place_inside(snapshot, "a.png").read_bytes() == b"p"
    with pytest.raises(OSError, match="is outside"):
        place_inside(snapshot, "b.png")


def test_irregular_files_are_named(folder):
    os.mkfifo(folder / "sub" / "config.json")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(folder)  # names of sockets are short
        server.bind("socket")
    reported = {os.path.relpath(one.partition(" (")[0], folder) for one in irregular_files(folder)}
    assert reported == {"pipe", "endless", "circle", "socket", "sub/config.json"}
    assert irregular_files(folder / "nowhere") == []
