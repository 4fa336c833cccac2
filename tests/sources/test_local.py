"""Folders in timm's layout: what is in them is used, what is wrong with them is named."""
from __future__ import annotations

import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from source_folders import Runs, write_folder

from robustify import sources
from robustify.errors import UserError
from robustify.sources import transformers


def edit(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_loads_exactly(digits_folder):
    edit(digits_folder, robustness={"base_model": "someone/net", "dataset": "digits", "threat": "Linf:8/255"})
    checkpoint = sources.load(str(digits_folder))
    net = timm.create_model("robustify_digits_cnn").eval()
    net.load_state_dict(load_file(digits_folder / "model.safetensors"))
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(checkpoint.model(x), net((x - 0.5) / 0.25))
    assert (checkpoint.input_size, checkpoint.num_classes, checkpoint.license) == ((1, 8, 8), 10, None)
    assert (checkpoint.base_id, checkpoint.dataset, checkpoint.threat) == (digits_folder.name, "digits", "Linf:8/255")
    again = timm.create_model(checkpoint.arch, num_classes=10, **checkpoint.arch_args)
    again.load_state_dict(checkpoint.model.net.state_dict())


def test_prefix_run_folder_and_new_classes(digits_folder, tmp_path):
    shutil.copytree(digits_folder, tmp_path / "run" / "model")
    assert sources.load(f"local-dir:{digits_folder}").base_id == "digits-cnn"
    assert sources.load(str(tmp_path / "run")).num_classes == 10
    checkpoint = sources.load(str(digits_folder), num_classes=3)
    assert checkpoint.model(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    assert (checkpoint.num_classes, checkpoint.pretrained) == (3, False)


def test_model_args_and_license(tmp_path):
    cfg = {"input_size": [1, 32, 32], "mean": [0.4], "std": [0.2], "license": "mit"}
    folder = write_folder(tmp_path / "net", "resnet10t", 5, {"input_size": [3, 32, 32]})
    net = timm.create_model("resnet10t", num_classes=5, in_chans=1)
    save_file(net.state_dict(), folder / "model.safetensors")
    edit(folder, model_args={"in_chans": 1}, pretrained_cfg=cfg)
    checkpoint = sources.load(str(folder))
    assert (checkpoint.arch_args, checkpoint.license, checkpoint.input_size) == ({"in_chans": 1}, "mit", (1, 32, 32))
    assert checkpoint.model(torch.rand(2, 1, 32, 32)).shape == (2, 5)
    edit(folder, model_args={"nonsense": 1})
    with pytest.raises(UserError, match="cannot be built with the arguments"):
        sources.load(str(folder))


def test_without_a_description_the_architectures_own_holds(digits_folder):
    edit(digits_folder, pretrained_cfg=None)
    checkpoint = sources.load(str(digits_folder))
    assert (checkpoint.input_size, checkpoint.model.normalises) == ((1, 8, 8), False)


@pytest.mark.parametrize(("changes", "said"), [
    ({"architecture": "custom"}, "class of your own"),
    ({"architecture": "robustify_digit_cnn"}, "Did you mean robustify_digits_cnn"),
    ({"architecture": None}, "names no architecture"),
    ({"num_classes": "ten"}, "how many classes"),
    ({"num_classes": 7}, "another shape .fc.weight: .10, 64. instead of .7, 64."),
    ({"pretrained_cfg": 3}, "must be objects"),
    ({"model_args": [1]}, r"config.json: model_args=\[1\] must be an object"),
    ({"pretrained_cfg": {"input_size": "x"}}, r'config.json: input_size="x" must be channels, height and width'),
    ({"pretrained_cfg": {"input_size": [1, 8]}}, r"config.json: input_size=\[1, 8\] must be channels"),
    ({"pretrained_cfg": {"mean": "abc"}}, 'config.json: mean="abc" must be a list of numbers'),
    ({"pretrained_cfg": {"mean": [0.5, 0.5]}}, r"config.json: mean=\[0.5, 0.5\] must have one number a channel, and images"),
    ({"pretrained_cfg": {"std": [0]}}, r"config.json: std=\[0\] must be above 0"),
    ({"pretrained_cfg": {"std": []}}, r"config.json: std=\[\] must have one number a channel"),
    ({"pretrained_cfg": {"std": [float("nan")]}}, "config.json: std=.NaN. must be a list of numbers"),
])
def test_config_mistakes(digits_folder, changes, said):
    edit(digits_folder, **changes)
    with pytest.raises(UserError, match=said):
        sources.load(str(digits_folder))


def test_words_behind_the_name_correct_a_description(digits_folder):
    x, expected = torch.rand(2, 1, 8, 8), sources.load(f"{digits_folder}:mean=0.4,std=0.2").model
    edit(digits_folder, pretrained_cfg={"input_size": [1, 8, 8], "mean": [0.4] * 3, "std": [0]})
    assert torch.equal(sources.load(f"{digits_folder}:mean=0.4,std=0.2").model(x), expected(x))
    with pytest.raises(UserError, match=r"config.json: mean=\[0.4, 0.4, 0.4\] must have one number a channel") as error:
        sources.load(f"{digits_folder}:std=0.2")
    assert error.value.hint == "such as [0.5], there or behind the name: mean=[0.5]"
    with pytest.raises(UserError, match=r"config.json: std=\[0\] must be above 0"):
        sources.load(f"{digits_folder}:mean=0.4")
    edit(digits_folder, pretrained_cfg={"input_size": 8, "mean": [0.4], "std": [0.2]})
    assert torch.equal(sources.load(f"{digits_folder}:size=[1,8,8]").model(x), expected(x))


def test_what_a_description_leaves_out_is_not_quoted_from_it(tmp_path):
    folder = write_folder(tmp_path / "net", "resnet10t", 5, {"input_size": [1, 32, 32]})
    for key, words in (("mean", ""), ("std", ":mean=0.5")):
        with pytest.raises(UserError, match=f"config.json does not say the {key} of its images, which have 1") as error:
            sources.load(f"{folder}{words}", pretrained=False)
        assert f"behind the name: {key}=[0.5]" in error.value.hint
    assert sources.load(f"{folder}:mean=0.5,std=0.5", pretrained=False).model(torch.rand(2, 1, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("source", ["3", "null", "nets.py:make:size=x", "'nets:make:a={'"])
def test_a_recipe_that_tells_nothing_is_no_hindrance(digits_folder, source):
    edit(digits_folder, architecture="custom")
    (digits_folder / "recipe.yaml").write_text(f"model: {{source: {source}}}\n")
    with pytest.raises(UserError, match="class of your own"):
        sources.load(str(digits_folder))


@pytest.mark.parametrize(("name", "content", "said"), [
    ("config.json", b"<html>404</html>", "is a web page"),
    ("config.json", b"{", "is not JSON"),
    ("model.safetensors", b"<html>404</html>", "is a web page"),
    ("model.safetensors", None, "model.safetensors does not exist"),
    ("config.json", None, "no model folder"),
])
def test_broken_folders(digits_folder, name, content, said):
    if content is None:
        (digits_folder / name).unlink()
    else:
        (digits_folder / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        sources.load(str(digits_folder))


def test_weights_in_several_files(digits_folder):
    path = digits_folder / "model.safetensors"
    expected, x = sources.load(str(digits_folder)).model, torch.rand(2, 1, 8, 8)
    state, parts = load_file(path), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    places = {name: parts[i % 2] for i, name in enumerate(state)}
    for part in parts:
        save_file({name: state[name] for name in state if places[name] == part}, digits_folder / part)
    path.unlink()
    index = digits_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert torch.equal(sources.load(str(digits_folder)).model(x), expected(x))
    (digits_folder / parts[1]).unlink()
    with pytest.raises(UserError, match=f"index.json lists what is not beside it: {parts[1]}"):
        sources.load(str(digits_folder))
    for content in ('{"weight_map": {"a": "../elsewhere.safetensors"}}', '{"weight_map": {}}', "[1]", "{"):
        index.write_text(content)
        with pytest.raises(UserError, match="lists no weight files beside it"):
            sources.load(str(digits_folder))


def test_truncated_weights(digits_folder):
    path = digits_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated or damaged"):
        sources.load(str(digits_folder))


def test_missing_key(digits_folder):
    state = load_file(digits_folder / "model.safetensors")
    del state["fc.bias"]
    save_file(state, digits_folder / "model.safetensors")
    with pytest.raises(UserError, match=r"missing \(fc.bias\)"):
        sources.load(str(digits_folder))


@pytest.mark.parametrize("where", ["model_args", "pretrained", "cfg", "words", "timm", "bare"])
def test_a_description_runs_no_pickle(tmp_path, where):
    folder = write_folder(tmp_path / "net", "resnet10t", 5, {"input_size": [3, 32, 32]})
    save_file(timm.create_model("resnet10t", num_classes=5).state_dict(), folder / "model.safetensors")
    trace, bad = tmp_path / "trace", tmp_path / "bad.pth"
    torch.save({"state_dict": Runs(trace)}, bad)
    source = str(folder)
    if where == "model_args":
        edit(folder, model_args={"checkpoint_path": str(bad)})
    elif where == "pretrained":
        edit(folder, model_args={"pretrained": True}, pretrained_cfg={"file": str(bad), "input_size": [3, 32, 32]})
    elif where == "cfg":
        edit(folder, pretrained_cfg={"file": str(bad), "url": bad.as_uri(), "source": "file", "custom_load": True})
        assert sources.load(source).num_classes == 5
        assert not trace.exists()
        return
    else:
        before = {"words": source, "timm": "timm:resnet10t", "bare": f"{folder / 'model.safetensors'}:arch=resnet10t"}
        source = f"{before[where]}{',' if where == 'bare' else ':'}checkpoint_path={bad}"
    with pytest.raises(UserError, match=r"(checkpoint_path|pretrained) is no argument"):
        sources.load(source, pretrained=where != "timm")
    assert not trace.exists()


def test_a_description_of_transformers_names_no_other_weights():
    args = {"config": {"model_type": "timm_wrapper", "model_args": {"checkpoint_path": "bad.pth"}}}
    with pytest.raises(UserError, match="asks for other weights: checkpoint_path"):
        transformers._refuse_loading(args)
