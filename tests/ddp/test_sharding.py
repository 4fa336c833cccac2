"""FSDP2 on two real processes: the weights of one process, with half of what trains on each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from robustify import distributed
from robustify.cli import main
from robustify.distributed import asks_to_shard, make_accelerator
from robustify.errors import UserError
from robustify.launch import read_config
from robustify.nets import DigitsCNN, ResNet2B2
from robustify.recipe import build
from robustify.sharding import blocks, check_sharded

sys.path.insert(0, str(Path(__file__).parent))
from resume_worker import STOP, run
from sharded_worker import KINDS, Block, blocky_net, steps

READY = Path(__file__).parents[2] / "recipes" / "accelerate" / "fsdp2.yaml"
RUN = [
    *("finetune", "--model", "timm:robustify_digits_cnn", "--set", "model.pretrained=false", "--no-verify", "--data", "digits"),
    *("--set", "data.limit=150", "--threat", "Linf:0.1", "--method", "trades", "--set", "method.steps=2", "--epochs", "1"),
    *("--set", "train.probe_images=16", "--set", "eval.n=16", "--set", "eval.attacks=[clean]"),
    *("--set", "train.batchnorm=frozen", "--set", "train.ema=0.9"),
]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(on one process, on two with whole copies, on two split by FSDP2), by name."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sharding")
    one = {name: steps(folder, **settings) for name, settings in KINDS.items()}
    one["frozen"] = run(folder / "one", batchnorm="frozen")
    run(folder / "from one", stop=STOP, batchnorm="frozen")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    worker = str(Path(__file__).with_name("sharded_worker.py"))
    subprocess.run([*LAUNCH, worker, str(folder)], env=environment, check=True, timeout=300)
    one["from split"] = run(folder / "from split", resume=True, batchnorm="frozen")
    return one, *torch.load(folder / "results.pt")


def same(found, expected, rtol, atol):
    for name, weight in expected["weights"].items():
        assert torch.allclose(found["weights"][name].double(), weight.double(), rtol=rtol, atol=atol), name


@pytest.mark.parametrize("name", KINDS)
def test_the_weights_of_whole_copies_to_rounding(results, name):
    """Those of two processes, whose own statistics of BatchNorm, and whose rounding in bf16, one process has not."""
    one, whole, split = results
    same(split[name], whole[name], 1e-5, 1e-6)
    if name not in ("live", "bf16"):
        same(split[name], one[name], 1e-5, 1e-6)
    assert split[name]["asks for gradients"] == one[name]["asks for gradients"]


def test_each_process_has_half_of_what_trains(results):
    _, whole, split = results
    total = sum(weight.numel() for weight in blocky_net().parameters())
    assert whole["trades"]["split"] == 0
    assert split["trades"]["mine"] == split["trades"]["momentum"] == total // 2
    assert split["trades"]["units"] == 3  # each block, and the rest


def test_what_is_exchanged_in_a_step(results):
    """Trades trains on two forward passes, and one backward pass over both: each gathers each block; the rest stays gathered.
    Gradients are exchanged once."""
    gathers, scatters, weights, losses = 1 + 2 * 2 + 2 * 2, 3, len(list(blocky_net().parameters())), 1
    one, _, split = results
    assert one["trades"]["collectives"] == 0
    assert split["trades"]["collectives"] == 3 * (gathers + scatters + weights + losses)


@pytest.mark.parametrize("name", ["frozen", "frozen, stopped", "from one"])
def test_wasserstein_split_ends_as_on_one_process(results, name):
    """In fp64: through, stopped and resumed, and begun by a process alone."""
    one, _, split = results
    same(split[name], one["frozen"], 1e-9, 1e-11)
    assert split[name]["upsilon"] == pytest.approx(one["frozen"]["upsilon"], rel=1e-9)


def test_one_process_goes_on_with_what_was_split(results):
    same(results[0]["from split"], results[0]["frozen"], 1e-9, 1e-11)


def test_a_stop_changes_no_bit_with_live_statistics(results):
    _, _, split = results
    for name, weight in split["live run"]["weights"].items():
        assert torch.equal(split["live run, stopped"]["weights"][name], weight), name


def config(folder: Path, **values) -> Path:
    """The ready config for two processes on CPUs, and other values."""
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(READY.read_text()) | {"num_processes": 2, "use_cpu": True} | values))
    return path


def test_a_run_by_the_ready_config_exports_the_same_model(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with pytest.raises(SystemExit):
        main([*RUN, "-o", str(tmp_path / "one")])
    command = [sys.executable, "-m", "robustify", *RUN, "--accelerate-config", str(config(tmp_path)), "-o", "split"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, split = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "split"))
    for name, weight in one.items():
        assert torch.allclose(split[name], weight, rtol=1e-4, atol=1e-5), name


def test_a_run_that_does_not_go_with_fsdp2_is_refused_in_one_message(results):
    message = results[2]["refused"]
    assert "train.layers last" in message
    assert "train.compress bf16" in message


@pytest.mark.parametrize(("name", "said"), [("outside", "mixed torch.Tensor and DTensor"), ("list", "ModuleList")])
def test_where_a_network_cannot_be_split(results, name, said):
    """nn.MultiheadAttention reads the weights of a part of it, and a list has no forward pass of its own."""
    assert "cannot split this network" in results[2][name]
    assert said in results[2][name]


@pytest.mark.parametrize(
    ("train", "method", "said"),
    [
        ({"layers": "last"}, "trades", "layers last"),
        ({"compress": "qsgd"}, "trades", "compress qsgd"),
        ({"optimizer": "lamb"}, "trades", "optimizer lamb"),
        ({"precision": "fp16"}, "trades", "precision fp16"),
        ({}, {"name": "gaat", "gradient": "exact"}, "second derivatives"),
        ({}, {"name": "fast-at", "grad_align": 0.2}, "second derivatives"),
    ],
)
def test_what_does_not_go_with_fsdp2(train, method, said):
    recipe = build({"model": "digits", "data": "digits", "train": train, "method": method})
    with pytest.raises(UserError, match=said):
        check_sharded(recipe)


def test_the_rest_does():
    train = {"precision": "bf16", "accumulate": 2, "awp": 0.01, "ema": 0.9, "batchnorm": "sync", "clip_norm": 1, "layers": "f*"}
    check_sharded(build({"model": "digits", "data": "digits", "method": "wasserstein", "train": train}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"distributed_type": "DEEPSPEED"}, "distributed_type DEEPSPEED"),
        ({"distributed_type": "MEGATRON_LM"}, "distributed_type MEGATRON_LM"),
        ({"fsdp_config": {}}, "version 1"),
        ({"fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True}}, "fsdp_offload_params"),
        ({"fsdp_config": {"fsdp_version": 2, "fsdp_activation_checkpointing": True}}, "fsdp_activation_checkpointing"),
        ({"fsdp_config": {"fsdp_version": 2, "fsdp_ignored_modules": "fc"}}, "fsdp_ignored_modules"),
    ],
)
def test_configs_that_are_refused(tmp_path, values, said):
    with pytest.raises(UserError, match=said) as refused:
        read_config(config(tmp_path, **values))
    assert "robustify copy fsdp2" in (refused.value.hint or "")


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_what_accelerate_launch_was_asked_for_is_refused_too(kind):
    with pytest.raises(UserError, match="does not train with accelerate's"):
        asks_to_shard({f"ACCELERATE_USE_{kind}": "true"})


def test_one_process_has_nothing_to_split(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match="nothing to split over one process"):
        make_accelerator()


def test_an_accelerate_that_is_too_old(monkeypatch):
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "compare_versions", lambda library, *_: library == "accelerate")
    with pytest.raises(UserError, match=r"FSDP2 needs accelerate 1\.10"):
        make_accelerator()


def test_the_blocks_of_a_network():
    assert blocks(ResNet2B2(10)) == ["_Residual"]
    assert blocks(blocky_net()) == ["Block"]
    assert blocks(DigitsCNN()) == []
    stage = nn.Module()
    stage.a, stage.b = Block(), Block()
    assert blocks(stage) == ["Block"]
