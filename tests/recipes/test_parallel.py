"""Copies of the model, shards, copies of shards: each trains what one process trains, and continues what another began.

With two micro-batches, whoever takes them, every sum has two terms: all bits agree. (A gradient's norm is summed in
another order on shards, so nothing is clipped here.)
"""

import json
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

import rendezvous
import runfolder
from errors import RecipeError

MANY_RUNS = Path(__file__).with_name("many_runs.py")
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.slow
@pytest.mark.dist
def test_every_layout_and_every_change_of_it_ends_with_the_bits_of_one_process(
    recipe, tiny_arguments, subprocess_env, tmp_path
):
    names = ("soap", "torch.adamw")
    common = ["--model.layers=2", "--model.dropout=0.2", "--train.microbatches=2", "--train.clip=0"]
    common += ["--schedule.kind=constant", "--eval.every=6", "--log.checkpoint_every=1", "--log.diagnostics=brief"]
    common += [f"--optimizer.name={names[0]}", f"--compare={names[1]}"]

    def arguments(folder, steps, parallel="ddp"):
        own = [f"--train.steps={steps}", f"--parallel={parallel}", f"--folder={tmp_path / folder}"]
        return [*tiny_arguments, *common, *own]

    assert recipe(*arguments("one", 6)) == 0
    assert recipe(*arguments("one-fsdp2-one", 2)) == 0
    runs = [arguments("one-fsdp2-one", 4, "fsdp2"), arguments("ddp-hsdp", 3), arguments("ddp-hsdp", 6, "hsdp")]
    (tmp_path / "runs.txt").write_text("".join(json.dumps(run) + "\n" for run in runs))
    command = [*LAUNCH, str(MANY_RUNS), str(tmp_path / "runs.txt")]
    done = subprocess.run(command, env=subprocess_env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert recipe(*arguments("one-fsdp2-one", 6)) == 0
    for name in names:
        expected = recipe.checkpoint(name, tmp_path / "one")["model"]
        for folder in ("one-fsdp2-one", "ddp-hsdp"):
            got = recipe.checkpoint(name, tmp_path / folder)["model"]
            assert got.keys() == expected.keys()
            assert [key for key in got if not torch.equal(got[key], expected[key])] == [], (name, folder)
    assert len(list((tmp_path / "ddp-hsdp" / names[0]).glob("*step-*"))) == 2, "older ones are removed"
    assert not list((tmp_path / "one-fsdp2-one").rglob("*step-*"))


def test_ranks_agree_on_a_name_in_a_store_full_of_what_the_dead_have_left():
    store, names = HashStore(), {}
    store.set("hello/1", "of a dead process")
    store.set("hello/2", "of another")
    store.set("answer/of a dead process", "its name")
    store.set("heard/its name/1", "yes")

    def join(rank):
        names[rank] = rendezvous.agree(store, rank, 3, timedelta(seconds=20))

    for _ in range(3):  # restarts
        threads = [threading.Thread(target=join, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(names.values())) == 1
        assert names[0] not in ("its name", store.get("seen").decode() if store.check(["seen"]) else "")
        store.set("seen", names[0])


def test_a_rank_that_does_not_come_is_named():
    with pytest.raises(RecipeError, match=r"no sign of ranks \[1\]"):
        rendezvous.agree(HashStore(), 0, 2, timedelta(seconds=0.1))


@pytest.mark.parametrize(
    "run_id, name", [("none", ""), ("job 7/a", "job 7/a"), ("12345678" + "-1234" * 4 + "5678abcd", "12345678")]
)
def test_a_launch_keeps_its_folder_over_restarts(monkeypatch, tmp_path, run_id, name):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    assert rendezvous.launch() == name
    first, second = (runfolder.of_launch(str(tmp_path), "lm", "tiny", rendezvous.launch()) for _ in range(2))
    assert (first == second) is bool(name)
    other = runfolder.of_launch(str(tmp_path), "lm", "tiny", "other")
    assert other != first


def test_what_does_not_divide_is_refused(recipe, capsys, monkeypatch):
    assert recipe("--train.microbatches=3") == 2
    assert "train.microbatches must be 0 or a power of two, got 3" in capsys.readouterr().err
    assert recipe("--train.microbatches=2", "--train.accumulation=2") == 2
    assert "give one" in capsys.readouterr().err
    assert recipe("--train.microbatches=8") == 2
    assert "train.batch_size=4 is not divisible by 8 micro-batches" in capsys.readouterr().err


def test_who_can_be_joined_by_other_nodes_is_told_what_to_set(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in rendezvous.warning()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert rendezvous.warning() == ""
