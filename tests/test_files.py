"""Test files that users name: which are refused, and what remains at the path.

Use only FIFOs, sockets and symlinks in a temporary folder: faulty code could replace a device of the machine.
"""

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hardkv.files
from hardkv import Calibration
from hardkv.cache.record.trace import Trace
from hardkv.files import check_writable, replacing, write_text
from hardkv.viz.figures import save_figure
from hardkv.viz.html import Html


def save_plot(path):
    plt = pytest.importorskip("matplotlib.pyplot")
    figure = plt.figure(figsize=(1, 1))
    save_figure(figure, path)
    plt.close(figure)


def save_calibration(path):
    Calibration(torch.ones(1, 2), torch.zeros(1, 2)).save(path)


# All functions of the package that write to a user's path, each with a valid file name.
WRITERS = {
    "text": (lambda path: write_text(path, "new"), "x.json"),
    "calibration": (save_calibration, "x.safetensors"),
    "trace": (lambda path: Trace([0], {}).save(path), "x.npz"),
    "html": (lambda path: Html("new", "title").save(path), "x.html"),
    "figure": (save_plot, "x.png"),
}


@pytest.fixture(params=WRITERS)
def writer(request):
    return WRITERS[request.param]


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def make_socket(path, monkeypatch):
    monkeypatch.chdir(path.parent)  # socket names must be short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("kind", "message"),
    [("folder", "is a folder: name a file"), ("fifo", "is a FIFO"), ("socket", "is a socket")],
)
@pytest.mark.parametrize("linked", [False, True], ids=["itself", "by a link"])
def test_what_is_no_file_is_refused_and_left(writer, kind, message, linked, tmp_path, monkeypatch):
    save, name = writer
    real = tmp_path / "real"
    path = tmp_path / name if linked else real.with_suffix(Path(name).suffix)
    real = real if linked else path
    {"folder": Path.mkdir, "fifo": os.mkfifo, "socket": lambda path: make_socket(path, monkeypatch)}[kind](real)
    if linked:
        path.symlink_to(real)
    before = [(path.lstat().st_mode, path.lstat().st_ino) for path in (path, real)]
    for refuse in (check_writable, save):
        with pytest.raises(OSError, match=f"{path.name}' {message}"):
            refuse(path)
    assert [(path.lstat().st_mode, path.lstat().st_ino) for path in (path, real)] == before
    assert tree(tmp_path) == sorted({path.name, real.name})


def test_devices_are_called_so():
    """Recognise devices by their mode; no test touches a real one."""
    assert hardkv.files._special(stat.S_IFCHR | 0o666) == "a device"
    assert hardkv.files._special(stat.S_IFBLK | 0o660) == "a device"


def test_a_name_that_ends_like_a_folder(tmp_path):
    with pytest.raises(IsADirectoryError, match="new/' is a folder: name a file"):
        write_text(f"{tmp_path}/new/", "text")
    assert tree(tmp_path) == []


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(NotADirectoryError, match=r"'.*file/a/b' cannot be written, since '.*file' is no folder"):
        write_text(tmp_path / "file" / "a" / "b", "text")
    assert (tmp_path / "file").read_text() == "old"


def test_links_in_a_circle(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        write_text(tmp_path / "a", "text")
    assert tree(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("protected", ["file", "folder"])
def test_what_may_not_be_written_is_told_before(protected, tmp_path, monkeypatch):
    """Root may write everything, so replace the system's answer."""
    path = tmp_path / "x"
    path.write_text("old")
    closed = {"file": path, "folder": tmp_path}[protected]
    monkeypatch.setattr(hardkv.files.os, "access", lambda place, how: Path(place) != closed)
    with pytest.raises(PermissionError, match="x' (is there and may not be written|cannot be written, since nothing)"):
        check_writable(path)
    assert path.read_text() == "old"


def test_a_check_makes_nothing(tmp_path):
    assert check_writable(tmp_path / "new" / "folder" / "x") == tmp_path / "new" / "folder" / "x"
    assert tree(tmp_path) == []


# ---------------------------------------------------------------------- what is written


def test_a_link_stays_and_its_target_is_written(writer, tmp_path):
    save, name = writer
    (tmp_path / "real").mkdir()
    target, link, again = tmp_path / "real" / name, tmp_path / name, tmp_path / f"again-{name}"
    target.write_text("old")
    link.symlink_to(os.path.join("real", name))
    again.symlink_to(link)
    save(again)
    assert os.readlink(link) == os.path.join("real", name)
    assert again.is_symlink()
    assert not target.is_symlink()
    assert target.read_bytes() not in (b"old", b"")
    assert tree(tmp_path) == sorted([name, again.name, "real", f"real/{name}"])


def test_a_link_to_what_is_not_there_yet(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "new" / "x")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "new" / "x").read_text() == "text"


@pytest.mark.parametrize("old", [0o640, 0o600, 0o664, 0o755])
def test_an_old_file_keeps_its_mode(writer, old, umask, tmp_path):
    save, name = writer
    path = tmp_path / name
    path.write_text("old")
    path.chmod(old)
    save(path)
    assert mode(path) == old
    assert path.read_bytes() != b"old"


def test_a_new_file_has_the_mode_of_the_umask(writer, umask, tmp_path):
    save, name = writer
    save(tmp_path / name)
    assert mode(tmp_path / name) == 0o640


def test_an_old_file_keeps_its_owner(tmp_path, monkeypatch):
    path, given = tmp_path / "x", []
    path.write_text("old")
    monkeypatch.setattr(os, "chown", lambda new, *owner: given.append(owner))
    write_text(path, "text")
    assert given == [(path.stat().st_uid, path.stat().st_gid)]

    def refuse(new, owner, group):  # as for a user who is not root
        given.append((owner, group))
        if owner != -1:
            raise PermissionError

    monkeypatch.setattr(os, "chown", refuse)
    write_text(path, "again")
    assert given[1:] == [(path.stat().st_uid, path.stat().st_gid), (-1, path.stat().st_gid)]
    assert path.read_text() == "again"


def test_folders_are_made(writer, tmp_path):
    save, name = writer
    save(tmp_path / "new" / "folder" / name)
    assert tree(tmp_path) == ["new", "new/folder", f"new/folder/{name}"]


def test_the_longest_name_can_be_written(tmp_path):
    path = tmp_path / ("x" * 255)
    write_text(path, "text")
    assert path.read_text() == "text"


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("old", [False, True], ids=["new file", "old file"])
def test_half_a_file_is_never_seen(old, error, tmp_path):
    path = tmp_path / "x"
    if old:
        path.write_text("old")

    def fail():
        with replacing(path) as file:
            file.write(b"half")
            file.flush()
            assert (path.read_text() if path.exists() else None) == ("old" if old else None)
            raise error

    with pytest.raises(type(error)):
        fail()
    assert tree(tmp_path) == (["x"] if old else [])
    assert not old or path.read_text() == "old"


def test_two_writers_at_once_do_not_meet(tmp_path):
    path = tmp_path / "x"
    with replacing(path) as first:
        first.write(b"first, ")
        with replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
        first.write(b"longer")
    assert path.read_bytes() == b"first, longer"
    assert tree(tmp_path) == ["x"]


CHILD = """
import runpy, sys
write_text = runpy.run_path(sys.argv[1])["write_text"]  # without torch, which takes long to import
for _ in range(30):
    write_text(sys.argv[2], sys.argv[3] * 5000)
"""


def test_processes_at_once_leave_one_whole_file(tmp_path):
    path, module = tmp_path / "x", str(hardkv.files.__file__)
    children = [subprocess.Popen([sys.executable, "-c", CHILD, module, str(path), letter]) for letter in "ab"]
    seen = set()
    while any(child.poll() is None for child in children):
        seen.add(path.read_text() if path.exists() else "a" * 5000)
    assert [child.returncode for child in children] == [0, 0]
    assert seen | {path.read_text()} <= {"a" * 5000, "b" * 5000}
    assert tree(tmp_path) == ["x"]


@pytest.mark.parametrize("name", ["x.png", "x.svg", "x.pdf", "picture"])
def test_the_suffix_chooses_a_pictures_format(name, tmp_path):
    save_plot(tmp_path / name)
    begins = {"x.svg": b"<?xml", "x.pdf": b"%PDF"}.get(name, b"\x89PNG")
    (made,) = tmp_path.iterdir()
    assert made.name == (name if "." in name else "picture.png")
    assert made.read_bytes().startswith(begins)


def test_a_format_that_does_not_exist_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="docx"):
        save_plot(tmp_path / "x.docx")
    assert tree(tmp_path) == []
