"""finetune: the plan, the result, the refusals."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from robustify import launch, pipeline
from robustify.cli.finetune import _instead, default_name
from robustify.cli.options import count, without
from robustify.errors import UserError
from robustify.report import Report
from robustify.resolve import resolve


def test_a_run_ends_with_json_on_stdout_and_progress_on_stderr(finished):
    folder, done = finished
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["folder"] == str(folder)
    lines = result["comparison"]["differences"]
    assert [line["attack"] for line in lines] == ["clean", "fgsm", "pgd", "w-pgd", "worst case"]
    assert result["comparison"]["n"] == 64
    for line in lines:
        assert line["difference"] == pytest.approx(line["after"] - line["before"])
        if line["attack"] == "w-pgd":  # its images share one budget
            assert line["interval"] is None
            continue
        low, high = line["interval"]
        assert low <= high
    assert result["next"].endswith(f"-o {folder} --json --epochs 2 --force")  # so short a run gains nothing
    assert "before training: clean" in done.stderr
    assert "exported" in done.stderr
    assert "Warning" not in done.stderr
    written = {path.name for path in (folder / "model").iterdir() if path.suffix != ".png"}  # pictures need matplotlib
    assert written == {"config.json", "model.safetensors", "README.md"}
    assert (folder / "recipe.yaml").read_text().startswith("# robustify finetune --model timm:robustify_digits_cnn")


def test_a_run_that_gains_nothing_cannot_be_taken_for_one_that_did(robustify, tiny, finished):
    """A learning rate of 1e-9 changes no verdict, so the start is kept; the exit code says that the run went well."""
    ran = robustify("finetune", *tiny, "--set", "train.lr=1e-9", "-o", "run")
    assert ran.code == 0, ran.err
    said, model, following = ran.out.splitlines()[-3:]
    assert said == "not hardened: no epoch beat the start on the held-out images, so these are the weights that were loaded"
    assert model == "model: run/model"
    assert following.startswith("next: robustify finetune --model timm:robustify_digits_cnn")
    assert following.endswith("-o run --epochs 2 --force")
    value = json.loads(finished[1].stdout)
    assert (value["hardened"], value["best_epoch"]) == (False, 0)
    value = json.loads(robustify("finetune", *tiny, "--set", "train.keep=last", "-o", "last", "--json").out)
    assert (value["hardened"], value["best_epoch"]) == (True, 1)
    assert value["next"] == "robustify evaluate last --attack pgd:steps=50,restarts=5"


@pytest.mark.parametrize(
    ("best_epoch", "robust", "said"),
    [
        (0, 0.6, "--set train.lr=0.02 --max-clean-drop=1 --epochs 6 --force"),
        (3, 0.6, "--set train.lr=0.02 --epochs 3 --max-clean-drop 3.2 --force"),  # what robustness costs on that line
        (3, 0.5, "--max-clean-drop=1 --epochs 3 --set train.lr=0.0067 --force"),  # nothing of it is more robust
    ],
)
def test_a_run_that_gained_nothing_advises_what_may_help(tmp_path, best_epoch, robust, said):
    recipe = resolve("quickstart", {"train.max_clean_drop": 1, "train.epochs": 3, "train.lr": 0.02}).recipe
    points = [{"alpha": 0, "clean": 0.9, "robust": 0.5}, {"alpha": 1, "clean": 0.8, "robust": robust}]
    points.append({"alpha": 0.5, "clean": 0.8684, "robust": robust})
    (tmp_path / "blend.json").write_text(json.dumps({"points": points}))
    result = SimpleNamespace(recipe=recipe, outcome=SimpleNamespace(best_epoch=best_epoch))
    typed = ["finetune", "--set", "train.lr=0.02", "--max-clean-drop=1", "--epochs", "3", "--force"]
    assert _instead(result, tmp_path, typed) == f"robustify finetune {said}"


def test_another_machine_ends_well_without_the_runs_folder(robustify, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(pipeline, "finetune", lambda *given, **options: SimpleNamespace(folder=None))
    ran = robustify("finetune", "quickstart", "-o", "elsewhere")
    assert (ran.code, ran.out) == (0, "")


def test_the_next_command_of_a_class_of_ones_own_works_as_it_is_shown(robustify, tmp_path):
    net = "nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, num_classes))"
    (tmp_path / "ownnets.py").write_text(f"from torch import nn\n\ndef make(width, num_classes=5):\n    return {net}\n")
    model = ["--model", "ownnets:make:size=[1,8,8],width=20", "--num-classes", "10", "--no-verify"]
    quick = ["--method", "fast-at", "--threat", "Linf:0.1", "--epochs", "1"]
    small = [f"--set={value}" for value in ("data.limit=200", "train.probe_images=20", "eval.n=20", "train.keep=last")]
    ran = robustify("finetune", *model, "--data", "digits", *quick, *small, "--set=eval.attacks=[clean]", "-o", "my run")
    assert ran.code == 0, ran.err
    shown = ran.out.splitlines()[-1].removeprefix("next: ")
    assert shown == "robustify evaluate 'my run:arch=ownnets:make,width=20,num_classes=10' --attack pgd:steps=50,restarts=5"
    ran = robustify(*shlex.split(shown)[1:], "--n", "10", "-o", "report.json")
    assert ran.code == 0, ran.err
    assert Report.load(tmp_path / "report.json").model_id == "my run"
    ran = robustify("export", "my run:arch=ownnets:make,width=20,num_classes=10", "out")
    assert ran.out.splitlines()[-1] == "next: robustify evaluate out:arch=ownnets:make,width=20,num_classes=10"
    ran = robustify("blend", *["my run:arch=ownnets:make,width=20,num_classes=10"] * 2, "--points=2", "--n=5", "-o", "line")
    assert ran.out.splitlines()[-1] == "next: robustify evaluate line:arch=ownnets:make,width=20,num_classes=10"


def test_a_finished_run_is_not_overwritten(robustify, finished, tiny):
    folder, _ = finished
    ran = robustify("finetune", *tiny, "-o", folder)
    assert ran.code == 2
    assert "is not empty" in ran.err
    assert "--force" in ran.err


def test_an_occupied_folder_hides_no_other_mistake(robustify, finished, tiny):
    folder, _ = finished
    wrong = ["--model", "digist", "--data", "folder:nowhere", "--unlabelled", "cifra10"]
    ran = robustify("finetune", *tiny, *wrong, "-o", folder)
    assert (ran.code, ran.out) == (2, "")
    for said in ("4 mistakes:", "is not empty", "no model is called 'digist'. Did you mean digits?", "no folder nowhere",
                 "unknown data set 'cifra10'"):  # fmt: skip
        assert said in ran.err
    ran = robustify("finetune", *tiny, *wrong[:4], "-o", "new")
    assert "2 mistakes:" in ran.err


def test_what_a_person_wrote_outlives_a_run_made_anew(robustify, finished, tiny, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    card = tmp_path / "run" / "model" / "README.md"
    card.write_text(card.read_text() + "\nSeen in the wild.\n")
    (tmp_path / "run" / "model" / "LICENSE").write_text("mine")
    again = [part.replace("Linf:0.1", "Linf:0.25") for part in tiny]
    ran = robustify("finetune", *again, "-o", "run", "--force")
    assert ran.code == 0, ran.err
    assert card.read_text().endswith("\nSeen in the wild.\n")
    assert "Linf 0.25" in card.read_text()
    assert "Linf 0.1" not in card.read_text()
    assert (tmp_path / "run" / "model" / "LICENSE").read_text() == "mine"


def test_dry_run_prints_each_value_with_its_origin_and_writes_nothing(robustify, tmp_path):
    model = "{source: timm:robustify_digits_cnn, pretrained: false}"
    (tmp_path / "mine.yaml").write_text(f"model: {model}\ndata: {{name: digits, limit: 300}}\nmethod: trades\n")
    ran = robustify(
        "finetune",
        "mine.yaml",
        "--threat",
        "Linf:0.1",
        "--unlabelled",
        "rest",
        "--dry-run",
        "--set",
        "train.lr=1e-3",
        "--set",
        "method.steps=1",
    )
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert "data.limit\t300\trecipe mine.yaml" in lines
    assert "train.lr\t0.001\tcommand line" in lines
    assert "train.momentum\t0.9\tdefault" in lines
    assert any(line.startswith("trains\tfull: ") for line in lines)
    assert any(line.startswith("unlabelled\t") and line.split("\t")[1][0].isdigit() for line in lines)
    assert lines[-1].startswith("next: robustify finetune mine.yaml --threat Linf:0.1")
    assert "--dry-run" not in lines[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--threat", "Linf:8"], "did you mean Linf:8/255?"),
        (["--set", "train.learning_rate=0.1"], "unknown key train.learning_rate = 0.1"),
        (["--set", "trian.lr=0.1"], "unknown key trian"),
        (["--set", "lr"], "'lr' is not of the form key=value"),
        (["--method", "trade"], "unknown method 'trade'. Did you mean trades?"),
        (["--epochs", "0"], "train.epochs = 0"),
        (["--precision", "half"], "train.precision = 'half'"),
        (["--set", "eval.attacks=[pdg]"], "Did you mean pgd?"),
    ],
)
def test_mistakes_are_named_with_their_correction(robustify, arguments, said, tiny):
    ran = robustify("finetune", *tiny, *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err
    assert "Traceback" not in ran.err


def test_without_a_model_the_hint_names_one(robustify):
    ran = robustify("finetune")
    assert ran.code == 2
    assert "--model Zhang2019" in ran.err


def test_flags_become_settings_and_the_folder_has_a_name(robustify, monkeypatch, tiny):
    seen = {}

    def record(recipe, out, **options):
        seen.update(recipe=recipe, out=out, **options)
        raise UserError("enough")

    monkeypatch.setattr(pipeline, "finetune", record)
    robustify(
        "finetune",
        *tiny,
        "--layers",
        "last",
        "--seed",
        "3",
        "--precision",
        "bf16",
        "--num-classes",
        "10",
        "--allow-pickle",
        "--models-dir",
        "weights",
        "--resume",
        "never",
        "--force",
        "--tracker",
        "tensorboard",
    )
    recipe = seen["recipe"]
    assert (recipe.model.num_classes, recipe.model.allow_pickle, recipe.model.models_dir) == (10, True, "weights")
    assert not recipe.model.verify
    assert (recipe.train.layers, recipe.train.seed, recipe.train.precision) == ("last", 3, "bf16")
    assert recipe.train.tracker == "tensorboard"
    assert (seen["resume"], seen["force"]) == ("never", True)
    assert seen["out"] == Path("runs/robustify_digits_cnn-trades")
    assert seen["command"].startswith("robustify finetune --model timm:robustify_digits_cnn")


def test_an_interrupted_run_says_how_it_continues(robustify, monkeypatch, tiny):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "finetune", interrupt)
    ran = robustify("finetune", *tiny, "-o", "my run", "--force", "--resume", "never")
    assert ran.code == 130
    assert ran.err == f"interrupted; this continues the run: robustify finetune {' '.join(tiny)} -o 'my run'\n"


def test_several_processes_get_the_same_arguments(robustify, monkeypatch, tiny):
    asked = []
    monkeypatch.setattr(launch, "relaunch", lambda layout, arguments: asked.append((layout.processes, arguments)) or 7)
    assert robustify("finetune", *tiny, "--processes", "2").code == 7
    assert robustify("evaluate", "digits", "--processes=2", "--n", "10").code == 7
    assert asked == [
        (2, ["finetune", *tiny, "--processes", "2"]),
        (2, ["evaluate", "digits", "--processes=2", "--n", "10"]),
    ]


@pytest.mark.parametrize(
    ("here", "typed", "said"),
    [
        ("2", [], "eval.n=64 --processes 2"),  # under torchrun, say
        ("2", ["--processes", "2"], "eval.n=64 --processes 2"),
        ("1", [], "eval.n=64"),  # on each of two machines
        ("1", ["--accelerate-config", "two.yaml"], "eval.n=64 --accelerate-config two.yaml"),
    ],
)
def test_one_of_several_processes_knows_the_command_of_all(robustify, monkeypatch, tiny, here, typed, said):
    def interrupt(*_, command, **__):
        assert command.endswith(said)
        raise KeyboardInterrupt

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    monkeypatch.setattr(pipeline, "finetune", interrupt)
    ran = robustify("finetune", *tiny, *typed)
    where = ", typed on every machine" if here == "1" else ""
    assert ran.err.startswith(f"interrupted; this continues the run{where}: robustify finetune ")
    assert ran.err.endswith(f"{said}\n")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("Zhang2019", "Zhang2019-trades"),
        ("robustbench:cifar10/Linf/Wang2023Better_WRN-28-10", "Wang2023Better_WRN-28-10-trades"),
        ("hf-hub:timm/resnet18.a1_in1k", "resnet18.a1_in1k-trades"),
        ("runs/old/model/", "old-trades"),
        ("../some model", "some-model-trades"),
    ],
)
def test_default_names(source, name):
    assert default_name(source, "trades") == name


def test_options_are_taken_out_with_their_values():
    assert without(["a", "--n", "2", "--m=3", "--n=4", "b"], "--n") == ["a", "--m=3", "b"]
    typed = ["a", "--set", "x.y=1", "--set", "x.z=2", "--set=x.y=3"]
    assert without(typed, "--n", "x.y") == ["a", "--set", "x.z=2"]
    assert (count(None, 50), count("all", 50), count("7", 50)) == (50, None, 7)
    with pytest.raises(UserError, match="--n ten"):
        count("ten", 50)
