"""Atomic files, staged folders, outputs that are never overwritten."""
from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from robustify import files
from robustify.errors import UserError


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_writes_text_json_and_bytes(tmp_path):
    files.write_text(tmp_path / "a", "häkchen ✓")
    files.write_json(tmp_path / "b.json", {"x": [1, 2]})
    files.write_bytes(tmp_path / "c", b"\0\1")
    assert (tmp_path / "a").read_text(encoding="utf8") == "häkchen ✓"
    assert json.loads((tmp_path / "b.json").read_text()) == {"x": [1, 2]}
    assert (tmp_path / "c").read_bytes() == b"\0\1"
    assert names(tmp_path) == ["a", "b.json", "c"]


def test_json_refuses_what_json_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, error):
    files.write_text(tmp_path / "a", "old")

    def half(path):
        path.write_text("ne")
        raise error

    with pytest.raises(type(error)):
        files.save(tmp_path / "a", half)
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_full_disk_says_how_much_and_leaves_nothing(tmp_path, monkeypatch):
    files.write_text(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"full: 12,345 bytes are needed, [\d,]+ are free"):
        files.write_bytes(tmp_path / "a", b"x" * 12345)
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_other_system_errors_stay_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.write_text(tmp_path / "absent" / "a", "x")


def test_new_folder_refuses_what_holds_something(tmp_path):
    out = tmp_path / "out"
    assert files.new_folder(out) == out
    out.mkdir()
    assert files.new_folder(out) == out
    (out / "thesis.txt").touch()
    with pytest.raises(UserError, match="not empty") as caught:
        files.new_folder(out)
    assert "--force" in caught.value.hint
    assert "-o" in caught.value.hint
    assert files.new_folder(out, force=True) == out


def test_new_folder_refuses_files_current_folder_and_mounts(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        files.new_folder(tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        files.new_folder(tmp_path / "file" / "out")
    (tmp_path / "in" / "side").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in" / "side")
    for current in (".", ".."):
        with pytest.raises(UserError, match="in use"):
            files.new_folder(current, force=True)
    with pytest.raises(UserError, match="in use"):
        files.new_folder("/", force=True)


def test_new_folder_refuses_a_read_only_parent(tmp_path, monkeypatch):
    parent = tmp_path / "locked"
    parent.mkdir()
    parent.chmod(0o555)
    if os.access(parent, os.W_OK):  # root may write anywhere
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != parent)
    with pytest.raises(UserError, match=r"cannot write to .*locked"):
        files.new_folder(parent / "deep" / "out")


@pytest.mark.parametrize("exchange", [True, False])
def test_staged_folder_replaces_its_files_and_keeps_the_others(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    out = tmp_path / "out"
    for text in ("old", "new"):
        with files.staged_folder(out) as stage:
            assert list(stage.iterdir()) == []
            (stage / "a").write_text(text)
        if text == "old":
            (out / "mine").write_text("by hand")
            (out / "states" / "3").mkdir(parents=True)
            (out / "states" / "3" / "weights").write_text("w")
    assert names(tmp_path) == ["out/a", "out/mine", "out/states/3/weights"]
    assert (out / "a").read_text() == "new"
    assert (out / "mine").read_text() == "by hand"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_staged_folder_that_fails_leaves_the_older_one(tmp_path, older, error):
    out = tmp_path / "out"
    if older:
        out.mkdir()
        (out / "a").write_text("old")

    def half():
        with files.staged_folder(out) as stage:
            (stage / "a").write_text("new")
            raise error

    with pytest.raises(type(error)):
        half()
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if older else [])
    assert not older or (out / "a").read_text() == "old"


@pytest.mark.skipif(os.name == "nt", reason="no such locks there")
def test_staged_folder_leaves_another_living_one_of_its_number(tmp_path):
    """Processes of two containers may have one number; here two blocks of one process."""
    out = tmp_path / "out"
    with files.staged_folder(out) as living:
        (living / "a").write_text("living")
        with files.staged_folder(out) as stage:
            assert stage.name == f"{living.stem}-2.tmp"
        assert (living / "a").read_text() == "living"
    assert names(tmp_path) == ["out/a"]
    dead = tmp_path / living.name
    (dead / "half").mkdir(parents=True)
    with files.staged_folder(out) as stage:
        assert stage == dead
        assert list(stage.iterdir()) == []
    assert names(tmp_path) == ["out/a"]


@pytest.mark.skipif(os.name == "nt", reason="no such locks there")
@pytest.mark.parametrize("exchange", [True, False])
def test_staged_folder_in_its_place_is_not_locked(tmp_path, monkeypatch, exchange):
    import fcntl

    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    out, swap = tmp_path / "out", files._swap
    freed = []

    def swapped(stage, folder):
        swap(stage, folder)
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where it is held
        os.close(handle)
        freed.append(folder)

    monkeypatch.setattr(files, "_swap", swapped)
    for _ in range(2):
        with files.staged_folder(out) as stage:
            (stage / "a").write_text("a")
    assert freed == [out, out]


def test_staged_folder_when_the_second_rename_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    out = tmp_path / "out"
    with files.staged_folder(out) as stage:
        (stage / "a").write_text("old")
    rename = os.rename

    def fail_on_stage(source, target):
        if str(source).endswith(".tmp"):
            raise PermissionError(errno.EPERM, "no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_on_stage)
    with pytest.raises(PermissionError), files.staged_folder(out) as stage:
        (stage / "a").write_text("new")
    assert (out / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_staged_folder_on_a_full_disk(tmp_path):
    out = tmp_path / "out"

    def half():
        with files.staged_folder(out, needed=7) as stage:
            (stage / "half").write_text("ha")
            full()

    with pytest.raises(UserError, match=r"full: 7 bytes are needed"):
        half()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # of a library in Rust
    RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598"),  # of torch, with its cause
])  # fmt: skip
def test_a_full_disk_is_known_however_a_library_passes_it_on(tmp_path, error):
    if "enforce" in str(error):
        error.__context__ = OSError(errno.EFBIG, "File too large")
    found = files.no_room(error, tmp_path / "not" / "yet" / "there")
    assert found is not None
    assert str(tmp_path) in found.message
    assert found.hint == "free some space, or choose a folder on another disk"
    assert files.no_room(OSError(errno.EACCES, "Permission denied"), tmp_path) is None
    assert files.no_room(RuntimeError("something else"), None) is None


@pytest.mark.skipif(os.name == "nt", reason="no such limit there")
def test_a_limit_on_the_size_of_files(tmp_path):
    import resource

    import torch
    from safetensors.torch import save_file

    from robustify import checkpoints
    from robustify.metrics import Metrics

    state = {"a": torch.zeros(10_000)}
    metrics = Metrics(tmp_path / "metrics.jsonl", None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        for write in (
            lambda: files.save(tmp_path / "a", lambda path: checkpoints._write(path, state)),
            lambda: files.save(tmp_path / "a", lambda path: save_file(state, path)),
            lambda: [metrics.write(step=step, loss=0.5) for step in range(1000)],
        ):
            with pytest.raises(UserError, match=f"a file in {tmp_path} may not become so large"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["metrics.jsonl"]
    Metrics(tmp_path / "metrics.jsonl", resumed_step=3).close()  # half a line at its end is no hindrance
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_loads_without_torch():
    code = "import sys, robustify.files; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
