"""Under torchrun, whoever is killed or told to go: the run ends with the parameters of an undisturbed one."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.dist]

FAULTY = str(Path(__file__).with_name("faulty.py"))
SECONDS = 240  # a node's death is seen after 15


@pytest.fixture
def undisturbed(recipe, common):
    """The parameters that one process trains: with two micro-batches, those of two processes too."""
    assert recipe(*common) == 0
    return {name: recipe.checkpoint(name)["model"] for name in ("torch.adamw", "soap")}


@pytest.fixture
def common():
    settings = ["--optimizer.name=torch.adamw", "--compare=soap", "--train.microbatches=2", "--train.steps=20"]
    return [*settings, "--log.checkpoint_every=5", "--log.diagnostics=brief"]


@pytest.fixture
def launch(tiny_arguments, common, subprocess_env, tmp_path):
    """Start torchrun's agents; returns them."""

    def start(kills, *more, agents, step=12):
        rendezvous, port = ["--standalone", "--nproc-per-node=2"], free_port()
        if agents > 1:
            rendezvous = [f"--nnodes=1:{agents}", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=job"]
            rendezvous += [f"--rdzv-endpoint=localhost:{port}", "--rdzv-conf=last_call_timeout=15"]
        script = [FAULTY, kills, str(step), str(tmp_path / "mark"), *tiny_arguments, *common, *more]
        command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--max-restarts=3", *script]
        started = []
        for number in range(agents):
            if number:
                listens(port)  # the first agent keeps the store, and is not the one that dies
            with (tmp_path / f"agent{number}.log").open("w") as log:
                started.append(subprocess.Popen(command, env=subprocess_env, stdout=log, stderr=log))
        return started

    return start


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def listens(port):
    """Wait until somebody does."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        try:
            return socket.create_connection(("localhost", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(f"nobody listens at port {port}")


def finish(agents, tmp_path):
    """Wait for all; their exit codes, sorted, and what they said."""
    codes = sorted(agent.wait(timeout=SECONDS) for agent in agents)
    return codes, "".join((tmp_path / f"agent{number}.log").read_text() for number in range(len(agents)))


def assert_equal(recipe, folder, expected):
    for name, parameters in expected.items():
        got = recipe.checkpoint(name, folder)["model"]
        assert [key for key in parameters if not torch.equal(got[key], parameters[key])] == [], name


def only_folder(recipe, before):
    """The one run folder that all restarts have shared."""
    (folder,) = set(recipe.folders()) - before
    return folder


def test_a_killed_worker_is_replaced(recipe, launch, undisturbed, tmp_path):
    before = set(recipe.folders())
    codes, said = finish(launch("self:SIGKILL", agents=1), tmp_path)
    assert codes == [0], said
    assert (tmp_path / "mark").exists()
    assert_equal(recipe, only_folder(recipe, before), undisturbed)


@pytest.mark.parametrize("kills", ["parent:SIGKILL,self:SIGKILL", "parent:SIGKILL", "parent:SIGTERM"])
def test_the_others_go_on_when_a_node_dies_or_loses_its_agent_or_is_told_to_go(
    recipe, launch, undisturbed, tmp_path, kills
):
    before = set(recipe.folders())
    codes, said = finish(launch(kills, agents=2), tmp_path)
    assert codes == ([0, 1] if kills == "parent:SIGTERM" else [-9, 0]), said
    assert_equal(recipe, only_folder(recipe, before), undisturbed)


@pytest.mark.parametrize("kills, code", [("parent:SIGTERM", 1), ("self:SIGUSR1", 0)])
def test_who_is_told_to_stop_goes_on_with_the_same_command(recipe, launch, common, undisturbed, tmp_path, kills, code):
    folder = tmp_path / "runs" / "lm" / "stopped"
    codes, said = finish(launch(kills, f"--folder={folder}", agents=1), tmp_path)
    assert codes == [code], "torchrun itself ends with 1 after SIGTERM"
    assert "asked to stop after step" in said
    assert not (folder / "results.txt").exists()
    assert recipe(*common, "--resume", str(folder)) == 0
    assert_equal(recipe, folder, undisturbed)
