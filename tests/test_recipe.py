from __future__ import annotations

import json

import pytest
import yaml
from safetensors import safe_open

from robustify import shelf
from robustify.errors import UserError
from robustify.recipe import Recipe, TrainSettings, build
from robustify.resolve import resolve
from robustify.schedules import Accelat
from robustify.sources import embedded


def test_flags_win_over_the_recipe_and_origins_are_told(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: a\ntrain: {lr: 0.5, epochs: 3}\n")
    resolved = resolve(str(file), {"model.source": None, "threat": "W2-L2:0.5"}, ["train.lr=1e-3"])
    recipe = resolved.recipe
    assert (recipe.model.source, recipe.train.lr, recipe.train.epochs, recipe.threat.spec) == (
        "a",
        1e-3,
        3,
        "W2-L2:0.5",
    )
    assert resolved.origins["train.lr"] == "command line"
    assert resolved.origins["train.epochs"] == f"recipe {file}"
    assert resolved.origins["train.momentum"] == "default"


def test_data_threat_and_method_of_the_models_run_stand_where_nothing_else_is_said():
    run = build({"model": "a", "data": {"name": "digits", "limit": 300}, "threat": "Linf:0.1", "method": "trades"})
    same = resolve(None, {"model.source": "runs/a"}, run=run)
    assert (same.recipe.data, same.recipe.threat, same.recipe.method.name) == (run.data, run.threat, "trades")
    assert same.recipe.model.source == "runs/a"
    assert same.origins["data.limit"] == same.origins["threat"] == "the model's run"
    assert same.note is None
    changed = resolve(None, {"model.source": "runs/a", "method.name": "wasserstein"}, run=run)
    assert changed.note == "the threat is W2-Linf:0.1 instead of Linf:0.1: wasserstein trains against a distributional one"
    assert changed.origins["threat"] == "the method"
    other = changed.recipe
    assert (other.threat.spec, other.data.name) == ("W2-Linf:0.1", "digits")
    moved = resolve(None, {"model.source": "runs/a", "data.name": "cifar10"}, run=run).recipe
    assert (moved.data.name, moved.data.limit, moved.threat.spec) == ("cifar10", None, "Linf:0.1")


def test_a_recipe_survives_yaml_and_its_digest_sees_every_change():
    recipe = resolve(None, {"model.source": "a", "threat": "W2-Linf:8/255"}).recipe
    again = build(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe
    assert again.digest == recipe.digest
    assert resolve(None, {"model.source": "a"}, ["train.seed=1"]).recipe.digest != recipe.digest


def test_the_digest_is_of_what_the_result_depends_on():
    flags = {"model.source": "a", "data.name": "digits", "method.name": "wasserstein"}
    recipe = resolve(None, flags).recipe
    here = ["model.models_dir=/m", "model.allow_pickle=true", "model.verify=false", "model.license=mit", "data.root=/d"]
    here += ["data.workers=2", "train.tracker=wandb", "train.checkpoint_steps=5"]
    assert resolve(None, flags, here).recipe.digest == recipe.digest
    others = ["model.pretrained=false", "data.limit=99", "method.beta=5", "train.lr=0.02", "eval.n=99", "threat=W2-L2:0.5"]
    others += [f"method.adversary={name}" for name in ("dual", "knapsack", "random-radius")]
    assert len({recipe.digest, *(resolve(None, flags, [one]).recipe.digest for one in others)}) == 1 + len(others)


def test_a_new_setting_at_its_default_changes_no_digest():
    class Later(TrainSettings):
        another: int = 3
        nested: Accelat = Accelat()

    class LaterRecipe(Recipe):
        train: Later = Later()  # pyright: ignore[reportIncompatibleVariableOverride]

    values = {"model": "a", "train": {"epochs": 3, "accelat": {"window": 7}}}
    assert LaterRecipe.model_validate(values).digest == build(values).digest
    other = {**values, "train": {**values["train"], "another": 4}}
    assert LaterRecipe.model_validate(other).digest != build(values).digest


@pytest.mark.parametrize("folder", embedded().values(), ids=lambda folder: folder.name)
def test_the_models_that_come_along_carry_the_digest_of_their_recipe(folder):
    digest = resolve(str(folder / "recipe.yaml")).recipe.digest
    assert json.loads((folder / "config.json").read_text())["robustness"]["recipe"] == digest
    assert f"The full recipe (`{digest}`)" in (folder / "README.md").read_text()
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert weights.metadata()["recipe"] == digest


@pytest.mark.parametrize(
    ("method", "threat"), [("wasserstein", "W2-Linf:8/255"), ("trades", "Linf:8/255"), ("fast-at", "Linf:8/255")]
)
def test_the_threat_follows_the_method(method, threat):
    assert resolve(None, {"model.source": "a", "method.name": method}).recipe.threat.spec == threat


def test_another_method_over_a_recipe_takes_its_own_defaults_and_the_same_radius(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: a\nthreat: W2-Linf:4/255\nmethod: {name: wasserstein, beta: 2}\n")
    recipe = resolve(str(file), {"method.name": "trades"}).recipe
    assert (recipe.method.name, recipe.threat.spec) == ("trades", "Linf:4/255")
    assert resolve(str(file), {"method.name": "wasserstein"}).recipe.method.beta == 2


def test_all_errors_at_once():
    with pytest.raises(UserError) as error:
        resolve(
            None,
            {"model.source": "a", "threat": "Linf:8"},
            ["method.bta=3", "train.lr=-1", "train.epoch=3", "eval.attacks=[pdg]"],
        )
    text = str(error.value)
    for said in (
        "5 settings",
        "did you mean Linf:8/255?",
        "method.bta",
        "Did you mean beta?",
        "train.lr = -1",
        "Did you mean epochs?",
        "Did you mean pgd?",
    ):
        assert said in text


@pytest.mark.parametrize(
    ("flags", "settings", "said"),
    [
        ({}, [], "no model"),
        ({"model.source": "a", "method.name": "trads"}, [], "Did you mean trades?"),
        ({"model.source": "a", "threat": "Linf:8/255"}, [], "write threat: W2-Linf:8/255"),
        ({"model.source": "a", "method.name": "trades", "threat": "W2-Linf:8/255"}, [], "write threat: Linf:8/255"),
        ({"model.source": "a", "threat": "W2-L1:1"}, [], "does not train in the norm L1"),
        ({"model.source": "a"}, ["train.batch_size=10", "train.accumulate=3"], "not divisible"),
        ({"model.source": "a"}, ["train.lr"], "key=value"),
        ({"model.source": "a"}, ["train.schedule=accelat", "train.warmup_epochs=2"], "accelat takes no warmup_epochs"),
        ({"model.source": "a"}, ["train.accelat.windw=2"], "Did you mean window?"),
        ({"model.source": "a", "method.name": "trades"}, ["train.on_collapse=n-fgsm"], "for method trades: take stop"),
        ({"model.source": "a", "method.name": "gaat"}, ["train.on_collapse=smaller-alpha"], "take pgd-2"),
        ({"model.source": "a"}, ["train.warmup_epochs=50"], "leaves nothing"),
        ({"model.source": "a", "method.name": "fast-at"}, ["method.alpha=3"], "take at most 2, usually 1.25"),
        ({"model.source": "a", "method.name": "fast-at", "threat": "L1:12"}, [], "In L1 there is pgd-at"),
        ({"model.source": "a", "method.name": "fast-at"}, ["method.noise=uniform-radius"], "in Linf take noise: uniform"),
        (
            {"model.source": "a", "method.name": "fast-at", "train.precision": "bf16"},
            ["method.grad_align=0.2"],
            "noise: n-fgsm",
        ),
        (
            {"model.source": "a", "method.name": "gaat", "train.precision": "fp16"},
            ["method.gradient=exact"],
            "gradient: hessian-free",
        ),
        ({"model.source": "a", "method.name": "gaat", "train.precision": "bf16"}, ["method.h=0.1"], "take h 0.25 or more"),
        ({"model.source": "a", "method.name": "gaat", "train.precision": "bf16"}, ["method.order=2"], "take h 1 or more"),
        ({"model.source": "a", "method.name": "free-at"}, ["train.awp=0.005"], "Take awp with"),
        ({"model.source": "a", "method.name": "free-at"}, ["train.accumulate=2"], "take accumulate 1 and batch_size 64"),
        ({"model.source": "a", "method.name": "gaat"}, ["train.compress=qsgd"], "gaat takes several backward passes"),
        ({"model.source": "a"}, ["train.compress=fp16", "train.awp=0.005"], "awp takes several backward passes"),
        ({"model.source": "a", "train.precision": "fp16"}, ["train.awp=0.005"], "take precision bf16 or no"),
        ({"model.source": "a"}, ["eval.attacks=['pgd:steps=0']"], "positive"),
        ({"model.source": "a"}, ["eval.attacks=['pgd:loss=mse']"], "ce, dlr, redlr"),
        ({"model.source": "a"}, ["nonsense.key=1"], "unknown key nonsense"),
        ({"model.source": "a", "method.name": "pgd-at", "threat": "L1:1"}, [], "w-pgd does not know the norm L1"),
    ],
)
def test_each_mistake_has_its_message(flags, settings, said):
    with pytest.raises(UserError) as error:
        resolve(None, flags, settings)
    assert said in str(error.value)


def test_unknown_recipes_and_broken_files(tmp_path):
    with pytest.raises(UserError, match=r"Did you mean quickstart\?"):
        resolve("quikstart")
    with pytest.raises(UserError, match="no recipe file"):
        resolve("missing.yaml")
    (tmp_path / "bad.yaml").write_text("model: [")
    with pytest.raises(UserError, match="not valid YAML"):
        resolve(str(tmp_path / "bad.yaml"))


@pytest.mark.parametrize("name", shelf.names())
def test_every_recipe_that_ships_is_valid_and_says_how_to_run_it(name):
    assert resolve(name).recipe.to_yaml()
    head = [line for line in shelf.text(name).splitlines() if line.startswith("#")]
    assert any(f"robustify finetune {name}" in line for line in head)


def test_text_that_is_no_yaml_is_itself():
    assert resolve(None, {"model.source": "a"}, ["train.layers=*fc*"]).recipe.train.layers == "*fc*"


def test_a_section_of_the_wrong_kind_is_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: a\ntrain: 3\n")
    with pytest.raises(UserError, match="train = 3"):
        resolve(str(file), {}, ["train.lr=0.1"])
    file.write_text("model: a\nmethod: [a]\n")
    with pytest.raises(UserError, match="not valid"):
        resolve(str(file), {})
    assert resolve(str(file), {"method.name": "trades"}).recipe.method.name == "trades"


@pytest.mark.parametrize(
    "model", ["mynets:make", "{source: w.pt, allow_pickle: true}", "'w.pt:arch=mynets:make'", "'mynets:make:depth=2'"]
)
def test_a_recipes_file_cannot_have_code_run(tmp_path, model):
    file = tmp_path / "mine.yaml"
    file.write_text(f"model: {model}\n")
    pickle = "allow_pickle" in model
    with pytest.raises(UserError, match="sets model.allow_pickle" if pickle else "names code to run") as error:
        resolve(str(file))
    assert ("--allow-pickle" if pickle else "--model") in str(error.value.hint)
    source = "w.pt" if pickle else "mynets:make"
    flags = {"model.allow_pickle": True} if pickle else {"model.source": source}
    recipe = resolve(str(file), flags).recipe
    assert (recipe.model.source, recipe.model.allow_pickle) == (source, pickle)
    # the recipe that the run writes down is continued by the same command, whose flags say so again
    file.write_text(recipe.to_yaml())
    assert resolve(str(file), flags).recipe.digest == recipe.digest


@pytest.mark.parametrize("source", ["timm:resnet18", "torchvision:resnet50", "robustbench:Zhang2019", "runs/mine", "digits"])
def test_a_recipes_file_names_a_model(tmp_path, source):
    (tmp_path / "mine.yaml").write_text(f"model: {source}\n")
    assert resolve(str(tmp_path / "mine.yaml")).recipe.model.source == source


def test_the_digits_network_is_hardened_on_digits():
    assert resolve(None, {"model.source": "digits"}).recipe.data.name == "digits"
    assert resolve(None, {"model.source": "digits", "data.name": "npz:a.npz"}).recipe.data.name == "npz:a.npz"
    assert resolve(None, {"model.source": "Zhang2019"}).recipe.data.name == "cifar10"
