"""Weight files: the real ones are read, everything else is called by its name."""
from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from source_folders import Runs
from torch import nn

from robustify.errors import UserError
from robustify.sources import weights


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("wrap", [
    lambda s: s,
    lambda s: {"state_dict": s, "epoch": 3},
    lambda s: {"last": s, "best": {}},
    lambda s: {"last": {"state_dict": s}},
    lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    lambda s: {"net": {f"_orig_mod.{k}": v for k, v in s.items()}},
    lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    lambda s: {f"module._orig_mod.module.{k}": v for k, v in s.items()},
    lambda s: {"model_ema": s, "epoch": 3},
    lambda s: {"state_dict": {"weights": s}, "optimizer": {"state": {}, "param_groups": []}},
])
def test_unwraps(tmp_path, wrap):
    state = small().state_dict()
    torch.save(wrap(state), tmp_path / "a.pt")
    read = weights.read(tmp_path / "a.pt")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[k], state[k]) for k in state)


def test_old_format_and_safetensors(tmp_path):
    state = small().state_dict()
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "named-wrongly.pt")
    for name in ("old.pt", "named-wrongly.pt"):
        assert weights.read(tmp_path / name).keys() == state.keys()


@pytest.mark.parametrize(("content", "said"), [
    (b"<!DOCTYPE html><html>Google Drive - Virus scan warning", "web page"),
    (b"\n  <html>", "web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs"),
    (b"", "empty"),
    (b"hello, I am a text", "neither"),
    (b"hello\n", "neither"),
    (b"{}", "neither"),
    (b"\x28\x01\0\0", "4 bytes. is truncated"),
    (b"PK", "2 bytes. is truncated"),
    (b"\x80", "1 byte. is truncated"),
    (b"\0" * 1000, "begins with zeros alone"),
    (b"PK\x03\x04 and then nothing", "truncated"),
    (b"\x80\x02}q\x00(X\x01\x00\x00", "truncated or damaged"),
    (b"\x10\x00\x00\x00\x00\x00\x00\x00{" + b"x" * 40, "truncated or damaged"),
])
def test_not_a_weight_file(tmp_path, content, said):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        weights.read(path)
    assert str(path) in error.value.message
    assert ("delete it" in str(error.value.hint)) == (said != "neither")  # it may be a good file of another kind


@pytest.mark.parametrize("save", [
    lambda state, path: torch.save(state, path),
    lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    save_file,
])
@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_truncated(tmp_path, save, kept):
    path = tmp_path / "model.pt"
    save({"a": torch.rand(300, 40)}, path)
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * kept)])
    with pytest.raises(UserError, match="is truncated"):
        weights.read(path)


def test_a_changed_byte_is_found_by_the_checksum(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(state := {"a": torch.rand(300, 40)}, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"model.pt \(.* bytes\) is truncated or damaged: the checksum of \S+/data/0 ") as error:
        weights.read(path)
    assert "fetch it again" in error.value.hint
    with zipfile.ZipFile(path, "w") as archive:  # a zip that is none of torch's
        archive.writestr("hello.txt", "x")
    with pytest.raises(UserError, match="truncated or damaged"):
        weights.read(path)
    if hasattr(torch.serialization, "set_crc32_options"):
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(state, path)
        finally:
            torch.serialization.set_crc32_options(True)
        assert torch.equal(weights.read(path)["a"], state["a"])


def test_a_function_that_torch_blocks_by_name_is_code_too(tmp_path):
    class Shell:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    path, stored = tmp_path / "model.pt", {"state_dict": small().state_dict(), "args": Shell()}
    torch.save(stored, path)
    files = [path.read_bytes(), *(pickle.dumps({"system": 1, "args": Shell()}, protocol=n) for n in (2, 4, 5))]
    torch.save(stored, path, _use_new_zipfile_serialization=False)
    for content in (*files, path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"holds more than tensors \(\w+\.system\)") as error:
            weights.read(path)
        assert "--allow-pickle" in error.value.hint
        assert not (tmp_path / "ran").exists()


def test_code_is_not_run(tmp_path):
    path, trace = tmp_path / "model.pt", tmp_path / "ran"
    torch.save({"state_dict": Runs(trace)}, path)
    for content in (path.read_bytes(), pickle.dumps(Runs(trace)), pickle.dumps(Runs(trace), protocol=2)):
        path.write_bytes(content)
        with pytest.raises(UserError):
            weights.read(path)
        assert not trace.exists()
    torch.save({"state_dict": small().state_dict(), "args": Runs(trace)}, path)
    with pytest.raises(UserError, match="more than tensors") as error:
        weights.read(path)
    assert "--allow-pickle" in error.value.hint
    assert not trace.exists()
    assert weights.read(path, allow_pickle=True).keys() == small().state_dict().keys()
    assert trace.exists()


@pytest.mark.parametrize(("stored", "said"), [
    (small(), r"a whole network, which is more than tensors \(torch.nn.modules.container.Sequential, "),
    ({"a": nn.functional.relu}, r"more than tensors \(torch.nn.functional.relu\)"),
    ({"a": nn.Parameter(torch.rand(2)), "b": torch.float16, "c": {1}, "d": torch.load}, r"more than tensors \(\S+.load\)"),
])  # fmt: skip
def test_only_what_would_run_is_named(tmp_path, stored, said):
    for new in (True, False):
        torch.save(stored, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
        with pytest.raises(UserError, match=f"holds {said}"):
            weights.read(tmp_path / "a.pt")


def test_options_of_training_scripts_are_harmless(tmp_path):
    torch.save({"state_dict": small().state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pt")
    assert weights.read(tmp_path / "a.pt").keys() == small().state_dict().keys()


def test_holds_no_state_dict(tmp_path):
    torch.save({"optimizer": {"lr": 0.1}, "epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="entries optimizer, epoch"):
        weights.read(tmp_path / "a.pt")
    for stored, said in (({}, r"entries \(none\)"), ({"a": small().state_dict(), "b": small().state_dict()}, "entries a, b")):
        torch.save(stored, tmp_path / "a.pt")
        with pytest.raises(UserError, match=said):
            weights.read(tmp_path / "a.pt")


@pytest.mark.parametrize(("change", "said"), [
    (lambda w: w.to(torch.complex64), "3.weight is complex64, where the network has float32"),
    (lambda w: (w * 100).to(torch.int8), "3.weight is int8, where the network has float32"),
    (lambda w: w.to("meta"), r"holds 1 tensor without numbers \(3.weight\)"),
])  # fmt: skip
def test_numbers_that_would_be_cut_are_refused(tmp_path, change, said):
    state = small().state_dict()
    torch.save({**state, "3.weight": change(state["3.weight"])}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"a.pt:? {said}"):
        weights.fill(small(), weights.read(tmp_path / "a.pt"), tmp_path / "a.pt", "net")
    half = {name: value.half() for name, value in state.items()}  # the counter of BatchNorm too
    weights.fill(small(), half, tmp_path / "a.pt", "net")


def test_names_follow_the_network():
    core = small()
    wrapped = nn.Sequential()
    wrapped.add_module("normalize", nn.Identity())
    wrapped.add_module("model", core)
    state = core.state_dict()
    for before in ("", "model.", "backbone.", "encoder.backbone.", "model.backbone."):
        given = {f"{before}{k}": v for k, v in state.items()}
        assert weights.named_for(core, given).keys() == state.keys()
        assert weights.named_for(wrapped, given).keys() == wrapped.state_dict().keys()


def test_what_does_not_fit_is_named():
    path = Path("model.pt")
    state = small().state_dict()
    without = {k: v for k, v in state.items() if k != "0.weight"}
    with pytest.raises(UserError, match=r"1 tensor is missing \(0.weight\), 1 is too many \(extra\)"):
        weights.fill(small(), {**without, "extra": torch.zeros(1)}, path, "net")
    with pytest.raises(UserError, match=r"\(3.weight: \[5, 4\] instead of \[2, 4\]\)") as error:
        weights.fill(small(), {**state, "3.weight": torch.zeros(5, 4)}, path, "net")
    assert "number of classes" in error.value.hint
    many = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    given = many.state_dict()
    for change in ({"extra": torch.zeros(1)}, {"0.weight": torch.zeros(3)}):
        del given["4.bias"]
        with pytest.raises(UserError, match=r"1 tensor is missing \(4.bias\)") as error:
            weights.fill(many, given | change, path, "net")
        assert error.value.hint.startswith(("9 tensors fit: it was saved from a changed net", "8 tensors fit"))
        given = many.state_dict()
    with pytest.raises(UserError) as error:
        weights.fill(small(), {"other": torch.zeros(1)}, path, "net")
    assert "another architecture" in error.value.hint


def test_lenient_is_about_constants_only():
    net = small()
    net.register_buffer("mu", torch.full((1, 3, 1, 1), 0.5))
    state = small().state_dict()
    with pytest.raises(UserError, match="mu"):
        weights.fill(net, state, Path("a.pt"), "net")
    weights.fill(net, {**state, "leftover": torch.zeros(1)}, Path("a.pt"), "net", lenient=True)
    assert net.mu.mean() == 0.5
    del state["1.running_mean"]
    with pytest.raises(UserError, match="running_mean"):
        weights.fill(net, state, Path("a.pt"), "net", lenient=True)


def test_counters_of_old_files_may_be_missing():
    state = {k: v for k, v in small().state_dict().items() if "num_batches" not in k}
    weights.fill(small(), state, Path("a.pt"), "net")
