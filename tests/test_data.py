"""Data sets: what is held out, what batches hold, and which mistakes are named."""
from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import signal
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from robustify import data as datasets
from robustify.data import Data, Lazy, Resident, Split, batches, chunks, from_tensors, load, subset
from robustify.errors import UserError
from robustify.splits import resized


def test_another_size_than_the_models_is_told():
    x, y = torch.rand(12, 3, 6, 8), torch.arange(12) % 2
    data = from_tensors((x, y), (x, y), (x, y))
    assert resized(data.test) is None
    assert resized(replace(data.test, size=(12, 12))) == "6 x 8, resized to 12 x 12"


def numbered(n: int = 40, classes: int = 4, side: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that tell their own number: pixel value i of n."""
    x = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, side, side).contiguous()
    return x, torch.arange(n) % classes


def numbers(split: Split) -> set[int]:
    """The numbers of the images that a split holds."""
    return set((split.batch(range(len(split)))[0][:, 0, 0, 0] * 255).round().int().tolist())


def write_pictures(folder: Path, classes: dict[str, int], size: tuple[int, int] = (8, 8), mode: str = "RGB",
                   start: int = 0) -> Path:
    """Write that many pictures per class; each is of one colour, its number."""
    value = start
    for name, count in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            colour = value if mode == "L" else (value, value, value)
            Image.new(mode, size, colour).save(folder / name / f"{i}.png")
            value += 1
    return folder


def npz(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return f"npz:{path}"


def refused(call, *words: str) -> UserError:
    with pytest.raises(UserError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    return caught.value


class Pairs(Dataset):
    """A Dataset of (image, label) pairs that only indexes."""

    def __init__(self, images: Any, labels: Any) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.images[index], self.labels[index]


# what is held out


def test_digits() -> None:
    data = load("digits")
    assert (len(data.train), len(data.val), len(data.test)) == (1213, 135, 449)
    assert (data.num_classes, data.input_size, data.augmentation) == (10, (1, 8, 8), "shift")
    assert data.digest == load("digits").digest == "89d41cf54381"
    x, y = data.train.batch([0, 5])
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert torch.equal(x * 16, (x * 16).round())


def test_the_seed_moves_validation_but_never_the_test_set() -> None:
    one, two = load("digits", seed=1), load("digits", seed=2)
    assert datasets.digest(one.test) == datasets.digest(two.test)
    assert datasets.digest(one.val) != datasets.digest(two.val)
    assert datasets.digest(load("digits", limit=100).test) == datasets.digest(one.test)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(30, 200), classes=st.integers(2, 6), fraction=st.floats(0.02, 0.5), seed=st.integers(0, 9))
def test_splits_are_disjoint_complete_and_balanced(n: int, classes: int, fraction: float, seed: int) -> None:
    x, y = numbered(n, classes, side=2)
    data = from_tensors((x, y), val_fraction=fraction, seed=seed)
    train, val, test = map(numbers, (data.train, data.val, data.test))
    assert len(train) + len(val) + len(test) == n
    assert train | val | test == set(range(n))
    for split in (data.val, data.test):
        counts = torch.bincount(split.labels, minlength=classes)
        assert int(counts.max() - counts.min()) <= 2  # the classes differ by one image, and so may their shares
    again = from_tensors((x, y), val_fraction=fraction, seed=seed)
    assert again.digest == data.digest
    assert torch.equal(again.val.labels, data.val.labels)


def test_given_splits_stay_whole() -> None:
    x, y = numbered(60)
    data = from_tensors((x[:40], y[:40]), val=(x[40:50], y[40:50]), test=(x[50:], y[50:]))
    assert [numbers(split) for split in (data.train, data.val, data.test)] == \
        [set(range(40)), set(range(40, 50)), set(range(50, 60))]
    held = from_tensors((x[:40], y[:40]), test=(x[50:], y[50:]))
    assert numbers(held.test) == set(range(50, 60))
    assert numbers(held.train) | numbers(held.val) == set(range(40))


def test_limit_is_spread_over_the_classes_and_holds_validation() -> None:
    x, y = numbered(200, 4, 2)
    data = from_tensors((x, y), limit=40)
    assert len(data.train) + len(data.val) == 40
    assert len(data.test) == 40
    assert torch.bincount(torch.cat([data.train.labels, data.val.labels])).tolist() == [10] * 4


def test_the_digest_tells_data_apart() -> None:
    x, y = numbered()
    texts = {from_tensors((x, y)).digest, from_tensors((255 - x, y)).digest, from_tensors((x, (y + 1) % 4)).digest}
    assert len(texts) == 3


def test_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    data = from_tensors(numbered())
    list(batches(data.train, chunks(8, 4), "cpu"))
    lazy = lazy_split()
    list(batches(lazy, chunks(8, 4), "cpu"))
    assert torch.equal(state, torch.get_rng_state())


# batches


def lazy_split(n: int = 20, side: int = 80) -> Split:
    x, y = numbered(n, 4, side)
    return from_tensors(Pairs(x, y), val=Pairs(x, y), test=Pairs(x, y)).train


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("lazy", [False, True])
def test_batches_come_in_order(lazy: bool, workers: int) -> None:
    split = lazy_split() if lazy else Resident(*numbered(20), (8, 8))
    assert isinstance(split, Lazy if lazy else Resident)
    lists = [[3, 1, 2], torch.tensor([19, 0]), range(4, 9), [7]]
    found = list(batches(split, lists, "cpu", workers))
    assert len(found) == len(lists)
    for indices, (x, y) in zip(lists, found, strict=True):
        places = torch.as_tensor(indices)
        assert torch.equal((x[:, 2, 0, 0] * 255).round().long(), places)
        assert torch.equal(y, split.labels[places])
        assert x.dtype == torch.float32
        assert x.shape[1:] == split.shape
        assert torch.equal(x, split.batch(indices)[0])


def test_a_broken_picture_in_a_worker_is_one_clear_message(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", {"cat": 40, "dog": 40}, (80, 80))
    write_pictures(tmp_path / "test", {"cat": 4, "dog": 4}, (80, 80))
    victim = tmp_path / "train/dog/7.png"
    victim.write_bytes(victim.read_bytes()[:50])
    split = load(f"folder:{tmp_path}", input_size=(3, 80, 80)).train
    error = refused(lambda: list(batches(split, chunks(len(split), 8), "cpu", workers=1)), str(victim), "cannot read")
    assert "Traceback" not in str(error)
    assert error.hint


def test_a_worker_reads_on_after_sigterm_and_ends_with_its_loader() -> None:
    """Clusters send it to every process; a step that is held still needs its batch."""
    split = Lazy([torch.full((3, 2, 2), i, dtype=torch.uint8) for i in range(64)], torch.arange(64), torch.arange(64),
                 (3, 2, 2), (2, 2))
    found = batches(split, chunks(64, 4), "cpu", workers=1)
    next(found)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)
    assert [y.tolist() for _, y in found] == [list(part) for part in chunks(64, 4)][1:]
    del found
    assert worker not in multiprocessing.active_children()


def test_subsets_and_chunks() -> None:
    assert [list(part) for part in chunks(5, 2)] == [[0, 1], [2, 3], [4]]
    assert list(chunks(0, 2)) == []
    for split in (Resident(*numbered(20), (8, 8)), lazy_split()):
        part = subset(subset(split, range(10, 20)), [5, 0])
        assert len(part) == 2
        assert (part.batch([0, 1])[0][:, 0, 0, 0] * 255).round().int().tolist() == [15, 10]
        assert torch.equal(part.labels, split.labels[[15, 10]])
        assert part.batch([])[0].shape == (0, *split.shape)


def test_batches_of_another_size_are_resized_and_stay_in_range() -> None:
    x = torch.rand(30, 3, 8, 8).round()
    data = from_tensors((x, torch.arange(30) % 2), input_size=(3, 20, 20))
    found, _ = data.train.batch(range(5))
    assert found.shape == (5, 3, 20, 20)
    assert data.input_size == data.train.shape == (3, 20, 20)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_small_pictures_grow_on_the_device(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"a": 20, "b": 20}, (8, 8))
    train = load(f"folder:{tmp_path}", input_size=(3, 96, 96)).train
    assert isinstance(train, Resident)
    assert train.images.shape[2:] == (8, 8)
    assert train.batch([0])[0].shape == (1, 3, 96, 96)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    data = from_tensors(numbered()).to("cuda")
    assert isinstance(data.train, Resident)
    assert data.train.images.is_cuda
    assert not data.train.labels.is_cuda
    for split in (data.train, lazy_split()):
        for x, y in batches(split, [[0, 1], [2]], "cuda"):
            assert x.is_cuda
            assert y.is_cuda


# arrays and Datasets


@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW", "grey NHWC"])
@pytest.mark.parametrize("kind", [np.uint8, np.float32, np.float64])
def test_array_layouts(layout: str, kind: type) -> None:
    rng = np.random.default_rng(0)
    bytes_ = rng.integers(0, 256, (24, 5, 6) + {"NHW": (), "NHWC": (3,), "NCHW": (3,), "grey NHWC": (1,)}[layout])
    given = bytes_.transpose(0, 3, 1, 2) if layout == "NCHW" else bytes_
    wanted = torch.from_numpy(bytes_ if bytes_.ndim == 4 else bytes_[..., None]).permute(0, 3, 1, 2) / 255
    x = given.astype(np.uint8) if kind is np.uint8 else (given / 255).astype(kind)
    y = np.arange(24) % 3
    data = from_tensors((x, y), val=(x, y), test=(x, y))
    assert data.input_size == tuple(wanted.shape[1:])
    assert torch.allclose(data.train.batch(range(24))[0], wanted.float(), atol=1e-6)
    assert data.augmentation == ("crop-flip" if wanted.shape[1] == 3 else "shift")


@pytest.mark.parametrize("shape", [(24, 3, 5, 3), (24, 1, 5, 3), (24, 3, 3, 3)])
def test_a_shape_that_could_be_either_layout_is_taken_as_channels_first(shape) -> None:
    x = torch.rand(*shape, generator=torch.Generator().manual_seed(0))
    assert from_tensors((x, torch.arange(24) % 3)).input_size == shape[1:]


def test_a_shape_that_is_no_layout_is_named() -> None:
    x = torch.rand(24, 5, 6, 4)
    refused(lambda: from_tensors((x, torch.arange(24) % 3)), "cannot read images of shape 24x5x6x4", "NCHW, NHWC or NHW")


def test_grey_becomes_colour_and_never_the_reverse() -> None:
    x, y = numbered()
    data = from_tensors((x[:, :1], y), input_size=(3, 8, 8))
    assert data.train.batch([0])[0].shape == (1, 3, 8, 8)
    assert data.augmentation == "shift"
    refused(lambda: from_tensors((x, y), input_size=(1, 8, 8)), "colour", "1 channel")


@pytest.mark.parametrize("form", ["tensors", "uint8", "pil", "array", "tensor dataset", "subset"])
def test_torch_datasets(form: str) -> None:
    x, y = numbered(30)
    forms: dict[str, Any] = {
        "tensors": lambda: Pairs(x.float() / 255, y.tolist()),
        "uint8": lambda: Pairs(x, y),
        "pil": lambda: Pairs([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in x], y.tolist()),
        "array": lambda: Pairs(x.permute(0, 2, 3, 1).numpy(), y.numpy()),
        "tensor dataset": lambda: TensorDataset(x.float() / 255, y),
        "subset": lambda: Subset(Pairs(torch.cat([x, x]), torch.cat([y, y])), list(range(30, 60))),
    }
    data = from_tensors(forms[form]())
    assert isinstance(data.train, Resident)
    assert numbers(data.train) | numbers(data.val) | numbers(data.test) == set(range(30))
    places = (data.train.batch(range(len(data.train)))[0][:, 0, 0, 0] * 255).round().long()
    assert torch.equal(places % 4, data.train.labels)


def test_large_datasets_stay_lazy_and_list_their_labels() -> None:
    class Listed(Pairs):
        reads = 0

        def __getitem__(self, index: int) -> tuple[Any, Any]:
            Listed.reads += 1
            return super().__getitem__(index)

    x, y = numbered(40, 4, 96)
    dataset = Listed(x, y)
    dataset.targets = y.tolist()  # pyright: ignore[reportAttributeAccessIssue]
    data = from_tensors(dataset, input_size=(3, 72, 72))
    assert isinstance(data.train, Lazy)
    assert Listed.reads <= 50  # the first, and the samples of three digests
    assert data.train.batch([0])[0].shape == (1, 3, 72, 72)


def test_a_data_loader_is_refused_with_the_remedy() -> None:
    refused(lambda: from_tensors(DataLoader(TensorDataset(*numbered()))), "DataLoader", ".dataset")


x8, y4 = numbered()
unit = x8.float() / 255


@pytest.mark.parametrize(("x", "y", "words"), [
    ((unit - 0.5) / 0.25, y4, ("[0,1]", "[-2, ", "normalised already")),
    (x8.float(), y4, ("[0, 39]", "divide by 255")),
    (torch.where(unit > 0.1, torch.nan, unit), y4, ("NaN",)),
    (unit * 1000, y4, ("[0,1]",)),
    (x8.long(), y4, ("int64", "uint8")),
    (x8[:, :2], y4, ("40x2x8x8", "1 or 3 channels")),
    (x8.flatten(1), y4, ("40x192",)),
    (x8, y4[:39], ("40 images but 39 labels",)),
    (x8, y4 - 1, ("label -1",)),
    (x8, y4.float(), ("float32", "integers")),
    (x8, np.array(["cat", "dog"] * 20), ("integers",)),
    (x8, torch.nn.functional.one_hot(y4), ("40x4", "argmax")),
    (x8, torch.zeros(40, dtype=torch.int64), ("belong to class 0", "two classes")),
    (x8[:0], y4[:0], ("no images",)),
    (x8[:6], y4[:6], ("6 images are too few to hold 4 of them out",)),
    (np.array([None] * 40), y4, ("object",)),
])
def test_mistakes_in_arrays(x: Any, y: Any, words: tuple[str, ...]) -> None:
    refused(lambda: from_tensors((x, y), name="mine"), "mine", *words)


def test_mistakes_in_calls() -> None:
    x, y = numbered()
    refused(lambda: from_tensors((x, y), num_classes=3), "label 3", "3 classes", "0..2")
    refused(lambda: from_tensors((x, y), test=(x, y + 1)), "tensors test", "label 4")
    refused(lambda: from_tensors((x, y), class_names=["a"] * 4, num_classes=5), "4 class names for 5")
    refused(lambda: from_tensors((x, y), test=(x[..., 1:], y)), "differ in image size")
    refused(lambda: from_tensors((x, y), val_fraction=0), "val_fraction", "0.1")
    refused(lambda: from_tensors((x, y), limit=0), "limit")
    refused(lambda: from_tensors(Pairs(x, y.float())), "integers")
    refused(lambda: from_tensors(Pairs(unit * 10, y)), "tensors train, image", "[0,1]")
    refused(lambda: from_tensors(7), "int")


@pytest.mark.parametrize(("name", "words"), [
    ("cifar11", ("cifar10", "folder:PATH")),
    ("folder", ("folder:PATH",)),
    ("digits:x", ("unknown data set 'digits:x'",)),
    ("npz:/nowhere/x.npz", ("no file /nowhere/x.npz",)),
    ("folder:/nowhere/x", ("no folder /nowhere/x",)),
])
def test_unknown_names(name: str, words: tuple[str, ...]) -> None:
    refused(lambda: load(name), *words)


def test_a_bare_folder_is_answered_with_its_spelling(tmp_path: Path) -> None:
    refused(lambda: load(str(tmp_path)), f"Did you mean folder:{tmp_path}?")


# npz


def test_npz(tmp_path: Path) -> None:
    x, y = (t.numpy() for t in numbered(60))
    given = load(npz(tmp_path / "mine.npz", x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:]))
    assert given.name == "npz:mine"
    assert numbers(given.test) == set(range(40, 60))
    mixed = load(npz(tmp_path / "mixed.npz", x=x[:40], y=y[:40], x_test=x[40:], y_test=y[40:]))
    assert numbers(mixed.test) == set(range(40, 60))
    whole = load(npz(tmp_path / "whole.npz", x=x, y=y))
    assert (len(whole.test), len(whole.val), len(whole.train)) == (12, 5, 43)


def test_mistakes_in_npz(tmp_path: Path) -> None:
    x, y = (t.numpy() for t in numbered())
    refused(lambda: load(npz(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x)), "no y_test", "it has x_train")
    refused(lambda: load(npz(tmp_path / "b.npz", images=x)), "no x_train, y_train", "it has images")
    refused(lambda: load(npz(tmp_path / "c.npz", x=np.array([None] * 3), y=y)), "c.npz", "no objects")
    (tmp_path / "d.npz").write_text("<html>")
    refused(lambda: load(f"npz:{tmp_path / 'd.npz'}"), "cannot read", "d.npz")
    np.save(tmp_path / "e.npy", x)
    refused(lambda: load(f"npz:{tmp_path / 'e.npy'}"), "one array alone")


# folders


def test_folder_of_classes(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pets", {"dog": 20, "cat": 30})
    calls = []
    data = load(f"folder:{tmp_path / 'pets'}", progress=lambda done, total: calls.append((done, total)))
    assert (data.name, data.class_names, data.num_classes, data.input_size) == ("folder:pets", ["cat", "dog"], 2, (3, 8, 8))
    (tmp_path / "linked").symlink_to(tmp_path / "pets")
    assert load(f"folder:{tmp_path / 'linked'}").name == "folder:linked"  # as a recipe names it
    assert (len(data.test), len(data.val), len(data.train)) == (10, 4, 36)
    assert isinstance(data.train, Resident)
    assert data.train.images.dtype == torch.uint8
    for split in (data.train, data.val, data.test):  # dogs were written first, numbers 0 to 19
        x, y = split.batch(range(len(split)))
        assert torch.equal(x[:, 0, 0, 0] * 255 < 19.5, y == 1)
    assert calls[0] == (36, 36)


@pytest.mark.parametrize("parts", [("train",), ("train", "test"), ("train", "val"), ("train", "valid", "test")])
def test_folder_with_splits(tmp_path: Path, parts: tuple[str, ...]) -> None:
    for i, part in enumerate(parts):
        write_pictures(tmp_path / part, {"a": 20, "b": 20}, start=50 * i)
    data = load(f"folder:{tmp_path}")
    train, val, test = map(numbers, (data.train, data.val, data.test))
    assert len(train) + len(val) + len(test) == len(train | val | test) == 40 * len(parts)
    own = [set(range(50 * i, 50 * i + 40)) for i in range(len(parts))]
    if len(parts) == 1:
        assert train | val | test == own[0]
    else:  # the last folder is the test set, and val is one only beside a test folder
        assert test == own[-1]
        assert (train, val) == (own[0], own[1]) if len(parts) == 3 else train | val == own[0]


def test_large_pictures_are_read_on_demand_around_their_middle(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(12):
            picture = np.zeros((90, 180, 3), np.uint8)
            picture[:, 45:135] = 200
            Image.fromarray(picture).save(tmp_path / name / f"{i}.png")
    (tmp_path / ".git").mkdir()
    data = load(f"folder:{tmp_path}", input_size=(3, 80, 80))
    assert isinstance(data.train, Lazy)
    x, _ = data.train.batch([0, 1])
    assert x.shape == (2, 3, 80, 80)
    assert float(x[:, :, :, 5:-5].min()) == pytest.approx(200 / 255)
    small = load(f"folder:{tmp_path}", input_size=(3, 16, 16))
    assert isinstance(small.train, Resident)


def test_grey_folders(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"a": 20, "b": 20}, mode="L")
    assert load(f"folder:{tmp_path}").input_size == (1, 8, 8)
    data = load(f"folder:{tmp_path}", input_size=(3, 8, 8))
    assert data.augmentation == "shift"
    x, _ = data.train.batch([0])
    assert torch.equal(x[:, 0], x[:, 2])
    write_pictures(tmp_path, {"c": 20})
    refused(lambda: load(f"folder:{tmp_path}", input_size=(1, 8, 8)), "colour")


def test_mistakes_in_folders(tmp_path: Path) -> None:
    refused(lambda: load(f"folder:{tmp_path}"), "no class folders", "train/<class>")
    write_pictures(tmp_path / "train", {"a": 20, "b": 20})
    write_pictures(tmp_path / "test", {"a": 5, "c": 5})
    refused(lambda: load(f"folder:{tmp_path}"), "differ in classes", "missing b", "extra c")
    (tmp_path / "train/c").mkdir()
    refused(lambda: load(f"folder:{tmp_path}"), "no pictures", str(tmp_path / "train/c"))
    (tmp_path / "train").rename(tmp_path / "val")
    refused(lambda: load(f"folder:{tmp_path}"), "val and test", "no train folder")


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>", "cut", "16 bit"])
def test_a_broken_file_is_named(tmp_path: Path, content: Any) -> None:
    write_pictures(tmp_path, {"a": 70, "b": 70}, (9, 9))
    victim = tmp_path / "b/33.png"
    if content == "16 bit":
        Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(victim)
    else:
        victim.write_bytes(victim.read_bytes()[:45] if content == "cut" else content)
    refused(lambda: load(f"folder:{tmp_path}"), str(victim))


# cifar


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small archive in CIFAR-10's layout at the address that torchvision downloads from."""
    from torchvision.datasets import CIFAR10

    source = tmp_path / "server"
    folder = source / CIFAR10.base_folder
    folder.mkdir(parents=True)
    names = [name for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list)]
    for k, name in enumerate(names):
        pixels = np.full((10, 3072), k, np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": list(range(10))}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))

    def md5(path: Path) -> str:
        return hashlib.md5(path.read_bytes()).hexdigest()

    path = source / CIFAR10.filename
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, CIFAR10.base_folder)
    sums = [[name, md5(folder / name)] for name in names]
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(folder / "batches.meta")})
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(path))
    monkeypatch.setattr(CIFAR10, "url", path.as_uri())
    return path


def check_cifar(data: Data) -> None:
    assert (len(data.train), len(data.val), len(data.test)) == (45, 5, 10)
    assert (data.input_size, data.augmentation, data.num_classes) == ((3, 32, 32), "crop-flip", 10)
    assert numbers(data.test) == {5}
    assert data.class_names == [f"class {i}" for i in range(10)]


def test_cifar_is_downloaded_and_mended(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    monkeypatch.setenv("ROBUSTIFY_DATA_DIR", str(root))
    check_cifar(load("cifar10"))
    assert sorted(path.name for path in root.iterdir()) == ["cifar-10-batches-py", archive.name]
    (root / "cifar-10-batches-py/data_batch_3").write_bytes(b"cut")
    archive.unlink()  # what is already here is enough
    check_cifar(load("cifar10"))
    assert len(list(root.iterdir())) == 2


def test_cifar_without_a_network_says_what_to_put_where(archive: Path, tmp_path: Path) -> None:
    saved = archive.read_bytes()
    archive.unlink()
    root = tmp_path / "root"
    refused(lambda: load("cifar10", root=root), archive.name, f"put it there as {root / archive.name}", "md5")
    assert list(root.iterdir()) == []
    (root / archive.name).write_bytes(saved)
    check_cifar(load("cifar10", root=root))


@pytest.mark.parametrize(("content", "word"), [(b"\n<!DOCTYPE html><p>sorry", "a web page"), (None, "incomplete")])
def test_what_is_not_the_archive_is_not_kept(archive: Path, tmp_path: Path, content: bytes | None, word: str) -> None:
    root = tmp_path / "root"
    archive.write_bytes(archive.read_bytes()[:100] if content is None else content)
    refused(lambda: load("cifar10", root=root), word, archive.as_uri())
    assert list(root.iterdir()) == []
    (root / archive.name).write_bytes(archive.read_bytes())  # the same, put there by hand
    refused(lambda: load("cifar10", root=root), word, str(root / archive.name))


def test_importing_data_stays_light() -> None:
    import subprocess
    import sys

    code = "import sys, robustify.data; print({'torchvision', 'sklearn', 'PIL', 'timm'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
