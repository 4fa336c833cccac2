from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_net, toy_data
from safetensors.torch import load_file

import robustify
from robustify import pipeline, runs, stages
from robustify.blend import Point
from robustify.data import from_tensors
from robustify.distributed import busy_cores
from robustify.errors import UserError
from robustify.events import EpochEnd, Exported, Measured, Planned, StepEnd
from robustify.memory import memory_explained
from robustify.pipeline import finetune, harden
from robustify.pixels import PixelModel
from robustify.plan import plan
from robustify.report import load_pair
from robustify.resolve import resolve

QUICK = ["train.epochs=2", "eval.n=100", "eval.attacks=[clean, fgsm]", "train.probe_images=32", "method.steps=2"]


def quick(*more, **flags):
    return resolve("quickstart", flags, [*QUICK, *more]).recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, events = tmp_path_factory.mktemp("run") / "out", []
    result = finetune(quick(), folder, command="robustify finetune quickstart", listener=events.append)
    return folder, events, result


def test_a_run_leaves_everything_one_needs(run):
    folder, events, result = run
    assert {p.name for p in folder.iterdir()} == {
        "recipe.yaml",
        "metrics.jsonl",
        "environment.json",
        "report.json",
        "report.npz",
        "model",
    }
    figures = {"accuracy.png", "training.png", "gradients.png"}
    assert {p.name for p in (folder / "model").iterdir()} == {"config.json", "model.safetensors", "README.md", *figures}
    card = (folder / "model" / "README.md").read_text()
    assert all(f"]({name})" in card for name in figures)
    kinds = [type(e) for e in events]
    for kind in (Planned, StepEnd, EpochEnd, Measured, Exported):
        assert kind in kinds
    before, after = load_pair(folder / "report.json")
    assert (before.digest(), after.digest()) == tuple(r.digest() for r in result.report)
    assert before.data == after.data


def test_what_was_exported_is_what_was_measured(run):
    folder, _, result = run
    checkpoint = robustify.load(str(folder / "model"))
    x = torch.rand(8, 1, 8, 8)
    assert torch.equal(checkpoint.model(x), result.pixel_model(x))
    assert torch.equal(robustify.load(str(folder)).model(x), result.pixel_model(x))
    # plain timm, after import robustify
    code = (
        "import robustify, timm, torch, sys\n"
        "kw = dict(pretrained=True) if sys.argv[3] == 'dir' else dict(checkpoint_path=sys.argv[1] + '/model.safetensors')\n"
        "net = timm.create_model('local-dir:' + sys.argv[1] if sys.argv[3] == 'dir' else 'robustify_digits_cnn', **kw).eval()\n"
        "print(torch.equal(net(torch.load(sys.argv[2])), torch.load(sys.argv[2] + '.y')))"
    )
    import timm

    kind = "dir" if tuple(map(int, timm.__version__.split(".")[:3])) >= (1, 0, 15) else "file"
    torch.save(x, folder.parent / "x")
    torch.save(result.pixel_model(x), folder.parent / "x.y")
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder / "model"), str(folder.parent / "x"), kind]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True
    )
    assert done.stdout.strip() == "True"


def test_every_figure_on_the_card_is_in_the_report(run):
    folder, _, result = run
    card = (folder / "model" / "README.md").read_text()
    for row in result.report[1].rows:
        assert f"{100 * row.accuracy:.2f} %" in card
    assert "robustify finetune quickstart" in card


def test_a_run_with_a_setting_more_is_another_recipe(tmp_path):
    """No value of the new recipe differs from the run's, which has one that the new one has not."""
    (tmp_path / "recipe.yaml").write_text(quick().to_yaml())
    other = SimpleNamespace(digest="another", to_dict=dict)
    with pytest.raises(UserError, match="unfinished run of another recipe"):
        runs._same_recipe(tmp_path, other)


def test_a_finished_or_foreign_folder_is_never_overwritten(run, tmp_path):
    folder, _, _ = run
    weights = (folder / "model" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="not empty: it holds a finished run of this recipe"):
        finetune(quick(), folder)
    with pytest.raises(UserError, match="not empty: it holds a finished run of another recipe"):
        finetune(quick("train.lr=0.02"), folder)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "love.txt").write_text("dear")
    with pytest.raises(UserError, match="not empty"):
        finetune(quick(), tmp_path / "letters")
    assert (folder / "model" / "model.safetensors").read_bytes() == weights
    assert os.listdir(tmp_path / "letters") == ["love.txt"]


def test_an_unfinished_run_of_another_recipe_is_not_continued(tmp_path):
    def stop(event):
        if isinstance(event, StepEnd) and event.step == 20:  # past the first epoch's checkpoint
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(quick(), tmp_path / "r", listener=stop)
    with pytest.raises(UserError, match=r"train.lr: 0.05 -> 0.01"):
        finetune(quick("train.lr=0.01"), tmp_path / "r")
    with pytest.raises(UserError, match="no checkpoint"):
        finetune(quick(), tmp_path / "x", resume=str(tmp_path / "nowhere"))


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from robustify.resolve import resolve
from robustify.pixels import PixelModel
from robustify.pipeline import finetune
finetune(resolve("quickstart", {}, sys.argv[2:]).recipe, sys.argv[1])
"""


def test_a_run_killed_at_any_moment_ends_bit_identical(tmp_path):
    """SIGKILL three times, at moments that fall where they fall; the weights and every figure are those of a quiet run."""
    settings = [*QUICK, "train.epochs=4", "train.checkpoint_steps=5", "train.ema=0.9"]
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "quiet"), *settings], env=environment, check=True, timeout=200)
    killed = tmp_path / "killed"
    metrics = killed / "metrics.jsonl"
    for lines in (7, 30, 55):
        process = subprocess.Popen([*command, str(killed), *settings], env=environment)
        deadline = time.monotonic() + 100
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.read_text().count("\n") >= lines:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        assert process.wait() == -signal.SIGKILL
    subprocess.run([*command, str(killed), *settings], env=environment, check=True, timeout=200)
    quiet, resumed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("quiet", "killed"))
    assert all(torch.equal(quiet[key], resumed[key]) for key in quiet)
    assert (tmp_path / "quiet" / "metrics.jsonl").read_text() == metrics.read_text()
    a, b = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("quiet", "killed"))
    assert [a[when]["digest"] for when in ("before", "after")] == [b[when]["digest"] for when in ("before", "after")]


def test_harden_gives_back_the_same_class_and_leaves_the_original(tmp_path):
    net = tiny_net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    result = harden(
        net,
        toy_data(96),
        test_data=toy_data(64, seed=2),
        threat="W2-Linf:8/255",
        method={"name": "wasserstein", "steps": 2},
        epochs=2,
        batch_size=32,
        lr=0.05,
        probe_images=16,
        init="reinit",
        verify=False,
        attacks=["clean", "fgsm"],
        out=tmp_path / "run",
    )
    assert type(result.model) is type(net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not torch.equal(result.model[0].weight, net[0].weight)
    assert [r.rows[0].n for r in result.report] == [64, 64]
    again = tiny_net()
    again.load_state_dict(load_file(tmp_path / "run" / "model" / "model.safetensors"))
    x = torch.rand(3, 3, 8, 8)
    assert torch.equal(again.eval()(x), result.model.eval()(x))


def test_harden_takes_normalised_models_and_datasets():
    x, y = toy_data(96)
    data = torch.utils.data.TensorDataset(x, y)
    result = harden(
        tiny_net(),
        data,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        method="fast-at",
        threat="L2:0.5",
        epochs=1,
        batch_size=16,
        probe_images=16,
        attacks=["clean"],
        layers="last",
        verify=False,
    )
    assert result.folder is None
    assert result.pixel_model.normalises


def test_the_command_that_continues_a_run_says_again_which_code_may_run(tmp_path):
    flags = {"model.source": "mynets:make:width=5", "data.name": "digits", "model.allow_pickle": True}
    (tmp_path / "recipe.yaml").write_text(resolve(None, flags).recipe.to_yaml())
    with pytest.raises(UserError) as told:
        runs._same_recipe(tmp_path, quick())
    command = f"robustify finetune {tmp_path}/recipe.yaml --model mynets:make:width=5 --allow-pickle -o {tmp_path};"
    assert command in told.value.hint


def test_a_model_that_does_not_fit_the_data_is_refused():
    with pytest.raises(UserError, match="does not take images of shape"):
        harden(tiny_net(channels=1), toy_data(96), epochs=1)
    with pytest.raises(UserError, match="verify=False"):
        harden(tiny_net(), toy_data(96), epochs=1, batch_size=16)
    with pytest.raises(UserError, match=r"classes"):
        harden(tiny_net(classes=3), toy_data(96), epochs=1, batch_size=16)


def test_a_network_that_expects_another_normalisation_is_refused_with_the_one_it_expects():
    """Its accuracy is above chance as it is, so that alone would let it pass."""
    x, _ = toy_data(2000)
    net = tiny_net()
    deviation, mean = torch.std_mean(x, (0, 2, 3))
    right = PixelModel(net, mean.tolist(), deviation.tolist()).eval()
    with torch.no_grad():
        net[6].bias.sub_(right(x).mean(0))  # else it calls nearly all of them the same
        y = right(x).argmax(1)
        alike = net.eval()(x).argmax(1) == y
    settings = {"epochs": 1, "batch_size": 16, "attacks": ["clean"], "method": "standard", "n": 16}

    def of_200(share):
        chosen = torch.cat([alike.nonzero()[: int(200 * share), 0], (~alike).nonzero()[: 200 - int(200 * share), 0]])
        chosen = chosen[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
        return x[chosen], y[chosen]

    for share in (0.1, 0.4):  # below chance, and above it
        with pytest.raises(UserError, match=r"seems to expect that") as error:
            harden(net, of_200(share), test_data=of_200(share), **settings)
        assert "mean=[" in error.value.hint
    with pytest.warns(UserWarning, match="or these images are unlike those it was trained on"):
        harden(net, of_200(0.7), test_data=of_200(0.7), **settings)
    harden(net, of_200(0.4), test_data=of_200(0.4), mean=mean.tolist(), std=deviation.tolist(), **settings)


def test_the_class_counts_must_agree():
    recipe = resolve(
        None,
        {"model.source": "robustify_digits_cnn", "data.name": "digits"},
        ["model.num_classes=4", "model.pretrained=false"],
    ).recipe
    with pytest.raises(UserError, match="--num-classes 4, but digits has 10 classes"):
        plan(recipe)


def test_a_model_that_is_not_what_it_claims_is_refused_before_anything_is_spent(tmp_path):
    """Random weights under the headline's name: the clean-accuracy gate must say so, and --no-verify must let it pass."""
    from robustify.sources import published, robustbench

    folder = tmp_path / "models" / "cifar10" / "Linf"
    folder.mkdir(parents=True)
    row = next(r for r in published.rows() if r["id"] == "Sehwag2021Proxy_R18" and r["threat"] == "Linf")
    torch.manual_seed(0)
    torch.save(robustbench.build(row, 10, 3).state_dict(), folder / "Sehwag2021Proxy_R18.pt")
    import numpy as np

    x, y = toy_data(120, classes=10, side=32)
    pixels = (x * 255).byte().permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "cifar10.npz", x_train=pixels, y_train=y.numpy(), x_test=pixels[:40], y_test=y[:40].numpy())
    flags = {
        "model.source": "Sehwag2021Proxy_R18",
        "model.models_dir": str(tmp_path / "models"),
        "data.name": f"npz:{tmp_path}/cifar10.npz",
    }
    with pytest.raises(UserError) as error:
        finetune(resolve(None, flags, ["train.batch_size=8"]).recipe, tmp_path / "out")
    assert "--no-verify" in str(error.value)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    facts = plan(resolve(None, flags, ["model.verify=false", "train.batch_size=8", "method.steps=1"]).recipe)
    assert facts["model"].endswith("Sehwag2021Proxy_R18")


@pytest.mark.parametrize("method", ["wasserstein", "trades"])
def test_the_plans_step_is_the_first_of_the_training(tmp_path, method):
    """With as few images as the plan takes on a CPU, its loss is the one that the run logs first."""
    recipe = quick("data.limit=20", "train.batch_size=16", "train.epochs=1", "eval.n=8", **{"method.name": method})
    said = plan(recipe)["one step"]
    events = []
    finetune(recipe, tmp_path / "run", listener=events.append)
    first = next(event for event in events if isinstance(event, StepEnd))
    assert said.endswith("on them")
    assert float(said.rpartition("loss ")[2].split()[0]) == pytest.approx(first.losses["total"], rel=1e-3)


def test_too_little_memory_names_a_smaller_batch():
    with pytest.raises(UserError, match=r"train.batch_size=32"), memory_explained(quick()):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
    with pytest.raises(RuntimeError, match="something else"), memory_explained(quick()):
        raise RuntimeError("something else")


def test_the_quickstart_hardens_by_more_than_chance_explains(tmp_path):
    """The promise of the README: intervals before and after do not overlap, for every attack that trains or measures."""
    recipe = resolve("quickstart").recipe
    result = finetune(recipe, tmp_path / "run")
    before, after = result.report
    for old, new in zip(before.rows, after.rows, strict=True):
        if old.attack == "clean":
            assert new.accuracy > old.accuracy - 0.04
        else:
            assert new.interval[0] > old.interval[1], old.attack


def test_data_objects_pass_through():
    data = from_tensors(toy_data(64), toy_data(32, seed=1), toy_data(32, seed=2))
    result = harden(
        tiny_net(), data, method="standard", epochs=1, batch_size=32, probe_images=16, attacks=["clean"], verify=False
    )
    assert result.outcome.steps == 2


def test_a_caller_who_listens_to_nothing_is_warned_when_nothing_was_gained():
    with pytest.warns(UserWarning, match="no epoch was better") as told:
        result = harden(
            tiny_net(),
            toy_data(96),
            method="fast-at",
            threat="Linf:0.3",
            epochs=1,
            batch_size=32,
            lr=1e-9,
            probe_images=16,
            attacks=["clean"],
            verify=False,
            augment="none",
            max_clean_drop=2,
        )
    said = [str(warning.message) for warning in told]
    assert any("held-out images choose the best epoch" in text and "standard error of up to 1" in text for text in said)
    assert any("max_clean_drop has nothing to go back from" in text for text in said)
    assert any("train for more epochs" in text and "lr, keep='last' in robustify.harden" in text for text in said)
    assert result.outcome.best_epoch == 0
    assert any("beat the start" in note for note in result.report[1].notes)
    assert {report.split for report in result.report} == {"held-out"}  # no test images were given


def test_a_clean_drop_that_leaves_nothing_of_the_training_is_told_with_its_price(monkeypatch):
    monkeypatch.setattr(stages, "curve", lambda *_, **__: [Point(0.0, 0.9, 0.5), Point(1.0, 0.8, 0.6)])
    settings = {"method": "fast-at", "threat": "Linf:8/255", "epochs": 1, "batch_size": 32, "keep": "last"}
    with pytest.warns(UserWarning, match="from max_clean_drop 10 on a point of the line is more robust; a smaller radius"):
        result = harden(tiny_net(), toy_data(96), verify=False, attacks=["clean"], max_clean_drop=2, **settings)
    assert not result.hardened


def test_a_caller_who_gives_no_listener_hears_a_line_an_epoch_and_a_measurement(capsys):
    def hardened(**more):
        data = from_tensors(toy_data(96), toy_data(64, seed=1), toy_data(64, seed=2))
        settings = {"method": "fast-at", "threat": "Linf:8/255", "epochs": 2, "batch_size": 32, "probe_images": 64}
        harden(tiny_net(), data, verify=False, attacks=["clean", "fgsm"], keep="last", **settings, **more)
        return capsys.readouterr()

    with pytest.warns(UserWarning, match="only 64 held-out images"):  # warnings stay Python's
        out, err = hardened()
    assert out == ""
    kinds = [line.partition(":")[0] for line in err.splitlines() if "no better than chance" not in line]
    assert kinds == ["verify is off", "before", "before training", "epoch 1/2", "epoch 2/2", "after"]
    assert hardened(listener=lambda event: None) == ("", "")


def test_of_several_processes_only_the_main_one_speaks(capsys):
    event = EpochEnd(1, 2, 0.5, 0.25, "pgd:steps=10 Linf:8/255", True)
    for main, listener in ((False, None), (True, None), (False, lambda event: print("heard"))):
        pipeline.heard(listener, SimpleNamespace(is_main=main))(event)
    assert capsys.readouterr() == ("", "epoch 1/2: clean 50.00 %, robust 25.00 %, best so far\n")


def test_a_callers_mistakes_are_told_by_the_names_that_he_typed():
    with pytest.raises(UserError) as told:
        harden(tiny_net(), toy_data(96), epochs=0, learning_rate=0.1, attacks=["pdg"], augment="crop", lr="data.lr")
    lines = str(told.value).splitlines()
    assert any(line.startswith("  - epochs = 0: ") for line in lines)
    assert any(line.startswith("  - unknown key learning_rate = 0.1.") for line in lines)
    assert any(line.startswith("  - attacks: unknown attack 'pdg'. Did you mean pgd?") for line in lines)
    assert any(line.startswith("  - augment = 'crop': ") for line in lines)
    assert any(line.startswith("  - lr = 'data.lr': ") for line in lines)  # what he gave stays as it is


@pytest.mark.parametrize(("threads", "advice"), [(1, "nothing here can help"), (2, "OMP_NUM_THREADS=1 fits")])
def test_busy_cores_are_told_with_advice_that_can_be_followed(monkeypatch, threads, advice):
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 100.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert advice in str(busy_cores())
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 0.0)
    monkeypatch.setattr("os.cpu_count", lambda: threads)
    assert busy_cores() is None
