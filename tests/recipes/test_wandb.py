"""The real wandb in offline mode: what it wrote is decoded from its own file, with its own protobuf."""

import json
import struct
import time

import pytest
import yaml

import command
import tracking
from config import Log

wandb = pytest.importorskip("wandb", reason="wandb is an extra")

BLOCK = 32768  # the run file is a LevelDB log: blocks of this size, records split over them
HEADER = 7  # of a piece: crc32 (4 bytes), length (2), kind (1): 1 whole, 2 first, 3 middle, 4 last


def records(path):
    """All protobuf records of a run file."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, pieces = path.read_bytes(), HEADER, []
    while position < len(content):
        left_in_block = BLOCK - position % BLOCK
        if left_in_block < HEADER:
            position += left_in_block
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        if kind == 0:
            break
        pieces.append(content[position + HEADER : position + HEADER + length])
        position += HEADER + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(b"".join(pieces))
            pieces = []
            yield record


def written(folder, kind):
    """All records of one kind of the one run in a folder."""
    wandb.teardown()  # its service process writes the file, some time after finish() has returned
    (path,) = folder.rglob("offline-run-*/run-*.wandb")
    return [getattr(record, kind) for record in records(path) if record.WhichOneof("record_type") == kind]


def history(folder):
    """The rows that were logged, as dictionaries."""
    rows = written(folder, "history")
    return [{".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row.item} for row in rows]


@pytest.fixture(autouse=True)
def _no_service_left(tmp_path, monkeypatch):
    for variable in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    yield
    wandb.teardown()


def test_an_offline_run_file_holds_the_metrics(recipe):
    assert recipe("--log.wandb=offline", "--optimizer.name=soap") == 0
    rows = history(recipe.folder)
    ours = recipe.metrics("soap")
    assert [row["step"] for row in rows] == [record["step"] for record in ours]
    for key in ("train/loss", "train/lr", "train/grad_norm", "val/loss", "optimizer/refused_steps"):
        assert [row[key] for row in rows if key in row] == [record[key] for record in ours if key in record], key
        assert any(key in row for row in rows), key
    for phase in ("data", "forward_backward", "optimizer"):
        assert rows[-1][f"time/{phase}_ms"] > 0
    losses = [row["val/loss"] for row in rows if "val/loss" in row]
    lowest = [row["val/lowest_loss"] for row in rows if "val/loss" in row]
    assert lowest == [min(losses[: number + 1]) for number in range(len(losses))]
    assert {key.split("/")[0] for key in rows[-1] if "/" in key} == {"train", "val", "optimizer", "time", "memory"}
    metrics = {metric.name or metric.glob_name: metric for metric in written(recipe.folder, "metric")}
    assert metrics["val/loss"].summary.min
    assert metrics["val/loss"].summary.last
    assert metrics["time/*"].summary.mean
    assert metrics["memory/*"].summary.max
    assert metrics["seconds"].options.hidden


def test_the_lowest_loss_outlives_a_resume(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "val/loss": 0.5}\n{"step": 2, "val/loss": 0.7}\n')
    assert tracking.Tracker(Log(wandb="disabled"), tmp_path, "name", {}).lowest == 0.5


def test_the_shipped_sweep_makes_command_lines_that_train_accepts(monkeypatch):
    """With the code by which wandb's own agent makes them."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    path = command.CONFIGS / "wandb_sweep.yaml"
    text = path.read_text()
    assert [line[:2] for line in text.splitlines()[:3]] == ["# "] * 3
    sweep = yaml.safe_load(text)
    assert sweep["program"] == "recipes/train.py"
    assert (command.CONFIGS.parent / sweep["program"]).is_file()
    assert sweep["metric"] == {"name": tracking.LOWEST, "goal": "minimize"}
    monkeypatch.chdir(command.CONFIGS.parent)
    for pick in (min, max):
        chosen = {}
        for key, space in sweep["parameters"].items():
            values = space.get("values") or [space[name] for name in ("value", "min", "max") if name in space]
            chosen[key] = {"value": pick(values)}
        words = []
        for word in create_sweep_command(list(sweep["command"])):
            words += create_sweep_command_args({"args": chosen})["args"] if word == "${args}" else [word]
        assert words[:3] == ["${env}", "${interpreter}", "${program}"]
        config = command.resolve(command.parse(words[3:]))
        assert config.optimizer.name == "soap"
        assert config.optimizer.arguments["lr"] == chosen["optimizer.lr"]["value"]
        assert config.compare == ()


def test_auto_without_credentials_is_offline_and_says_how_to_upload(recipe, capsys):
    assert recipe("--log.wandb=auto", "--train.steps=2") == 0
    assert "wandb: offline; to upload: wandb sync" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["online", "offline", "auto"])
def test_the_environment_wins_over_the_config(recipe, monkeypatch, setting):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert recipe(f"--log.wandb={setting}", "--train.steps=2") == 0
    assert not list(recipe.folder.rglob("*wandb*"))


def test_online_without_an_answer_falls_back_to_offline_in_seconds(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(tracking, "INIT_SECONDS", 2.0)
    monkeypatch.setattr(tracking.Tracker, "unreachable", "")
    for name in ("soap", "adamw"):
        began = time.monotonic()
        folder = tmp_path / "run" / name
        folder.mkdir(parents=True)
        tracker = tracking.Tracker(Log(wandb="online"), folder, "name", {})
        tracker.log({"step": 1, "train/loss": 0.5})
        tracker.finish()
        assert time.monotonic() - began < (60 if name == "soap" else 5), "the second one does not wait again"
        assert "wandb: offline (" in capsys.readouterr().err
        assert [row["train/loss"] for row in history(folder)] == [0.5]
