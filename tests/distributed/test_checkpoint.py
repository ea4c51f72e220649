"""Checkpoints of sharded training: the same bits on any number of ranks, or an error on all and nothing changed."""

import json
import re
import runpy
import shutil
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

from distributed import checkpoint_ranks as ranks
from distributed import pool
from secondorder import checkpoint

distributed = pytest.mark.dist
TIMEOUT = 60.0
WORLDS = (1, 2, 3, 4)


def same_on_all(told):
    assert all(other == told[0] for other in told)
    return told[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same state, saved by 1, 2, 3 and 4 ranks; and which tiles each rank had."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, {world: pool.run(world, ranks.save_with_owners, str(folder), timeout=TIMEOUT) for world in WORLDS}


@distributed
class TestRanks:
    def test_every_tile_has_one_owner(self, saved):
        """What the tests below rely on."""
        everything = saved[1][1][0]
        assert len(everything) > 50
        for world in WORLDS:
            assert all(saved[1][world])
            assert sorted(key for keys in saved[1][world] for key in keys) == everything

    @pytest.mark.parametrize("world", WORLDS)
    def test_any_number_of_ranks_loads_what_any_number_saved(self, saved, world):
        pool.run(world, ranks.load_with_other_owners, str(saved[0]), WORLDS, timeout=TIMEOUT)

    @pytest.mark.parametrize("flat", ranks.FLAT)
    @pytest.mark.parametrize("world", WORLDS)
    def test_a_process_without_a_group_trains_on_with_the_same_bits(self, saved, world, flat):
        model, optimizer = ranks.network()
        model_state, optimizer_state = ranks.state_dicts(model, optimizer, flat)
        state = {"model": model_state, "optimizer": optimizer_state, "rows": torch.zeros(5, 3), "step": 0}
        checkpoint.load(saved[0] / f"{world}-{flat}", state)
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        set_state_dict(
            model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=options
        )
        ranks.train(model, optimizer, range(state["step"], 9))
        straight, other = ranks.trained(9)
        ranks.assert_same(model.state_dict(), straight.state_dict())
        ranks.assert_same(optimizer.state_dict(), other.state_dict())
        assert torch.equal(state["rows"], torch.arange(15.0).reshape(5, 3))

    def test_part_of_the_ranks(self, tmp_path):
        outside, *inside = pool.run(3, ranks.part_of_the_ranks, str(tmp_path), timeout=TIMEOUT)
        assert outside.startswith("process_group must be a group of this process")
        for together, alone in inside:
            assert "key:rows invalid fill" in together
            assert alone.endswith("'rows' has parts on ranks that are not in the group")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]
        assert checkpoint.verify(tmp_path / "step-1") == checkpoint.verify(tmp_path / "step-2") == []


DAMAGED = {
    "truncated": r"rank 2: __1_0\.distcp: \d+ bytes, \d+ were saved; it held .*'optim\.state\.w\.tile_1\.basis'",
    "flipped": r"rank 2: __1_0\.distcp: other content than was saved .*; it held .*'optim\.state\.w\.tile_1\.basis'",
    "missing": r"rank 2: __1_0\.distcp: missing; it held .*'optim\.state\.w\.tile_1\.basis'",
    "swapped": r"rank 1: __0_0\.distcp: .*; it held .*; rank 2: __1_0\.distcp: .*; it held .*",
    "of another step": r"rank 2: __1_0\.distcp: other content than was saved .*",
    "no manifest": r"rank 0: manifest\.json: cannot be read \(No such file or directory\); .* was not saved by .*",
    "half a manifest": r"rank 0: manifest\.json: damaged \(JSONDecodeError: .*\)",
    "future manifest": r"rank 0: manifest\.json: format 9, this version reads 1",
    "manifest of another step": r"rank 0: \.metadata: .*; __2_0\.distcp: .*; rank 1: __0_0\.distcp: .*; rank 2: .*",
    "no metadata": r"rank 0: \.metadata: missing",
    "metadata flipped": r"rank 0: \.metadata: other content than was saved \(SHA-256 differs\)",
    "foreign": r"rank 0: manifest\.json: cannot be read .* was not saved by secondorder\.checkpoint, or not to the end",
    "absent": r"rank 0: manifest\.json: cannot be read .*",
}
UNFIT = {
    "dtype": r"rank 1: 'model\.w' is torch\.float32 in the checkpoint, expected torch\.bfloat16",
    "shape": r"rank 1: 'model\.w' has shape \(6,\) in the checkpoint, expected \(2, 3\)",
    "meta": r"rank 1: 'model\.w' is on the meta device and cannot take what is loaded",
    "extra": r"rank 1: the checkpoint has no 'model\.bias'",
    "key of the model missing": r"rank 1: does not ask for 'model\.w', others do; see strict=False",
    "tile that nobody asks for": r"no rank asks for 'optim\.state\.w\.tile_1\.basis', which the checkpoint has; .*",
    "number": r"rank 1: 'model\.w' is a tensor in the checkpoint, expected float",
    "tensor": r"rank 1: 'optim\.lr' is no tensor in the checkpoint, expected Tensor",
    "object": r"rank 1: TypeError: state must hold state dicts, 'model\.w' is a Linear itself",
    "reading": r"rank 1: OSError: \[Errno 5\] Input/output error",
    "allocating": r"rank 1: MemoryError: no memory",
}


@pytest.fixture(scope="module")
def failed_loads(tmp_path_factory):
    return pool.run(3, ranks.faulty_loads, str(tmp_path_factory.mktemp("loads")), timeout=TIMEOUT)


@pytest.fixture(scope="module", params=["save", "async_save"])
def failed_saves(request, tmp_path_factory):
    return pool.run(2, ranks.faulty_saves, str(tmp_path_factory.mktemp("saves")), request.param, timeout=TIMEOUT)


@distributed
class TestLoadsThatFail:
    @pytest.mark.parametrize("fault", [*ranks.DAMAGES, *ranks.ON_RANK_1, *ranks.FAILURES])
    def test_all_ranks_say_the_same_and_nothing_has_changed(self, failed_loads, fault):
        """That nothing has changed each rank has looked at itself."""
        message = same_on_all([rank[fault] for rank in failed_loads])
        assert re.fullmatch(rf"loading \S+: {({**DAMAGED, **UNFIT})[fault]}", message), message

    def test_rank_that_is_killed_stops_the_others_before_anything_has_changed(self, tmp_path):
        with pytest.raises(AssertionError) as failure:
            pool.run(2, ranks.killed_while_loading, str(tmp_path), timeout=TIMEOUT)
        assert "rank 1 of 2 died by SIGKILL" in str(failure.value)
        assert "nothing has changed after" in str(failure.value)


UNSAVED = {
    "exists": r"FileExistsError: \[Errno 17\] a checkpoint is never written over: '\S+/step-1'",
    "paths": r"CheckpointError: saving a checkpoint: ranks must give one path, got '\S+/step-2', '\S+/step-3'",
    "no folder": r"CheckpointError: saving \S+: rank 0: (NotADirectory|FileExists)Error: .*",
    "object": r"CheckpointError: saving \S+: rank 1: TypeError: state must hold .*, 'model' is a Linear itself",
    "does not pickle": r"CheckpointError: saving \S+: rank 1: .*pickle.*",
    "disk full": r"CheckpointError: saving \S+: rank 1: .*",
    "read-only": r"CheckpointError: saving \S+: rank 0: OSError: \[Errno 30\] Read-only file system",
}


@distributed
class TestSavesThatFail:
    @pytest.mark.parametrize("fault", UNSAVED)
    def test_all_ranks_say_the_same_and_older_checkpoints_are_left_alone(self, failed_saves, fault):
        """What is in the folder each rank has looked at itself."""
        message = same_on_all([rank[fault] for rank in failed_saves])
        assert re.fullmatch(UNSAVED[fault], message), message

    @pytest.mark.parametrize(("victim", "moment"), [(1, "writing"), (0, "writing"), (0, "publishing")])
    def test_rank_that_is_killed_leaves_no_checkpoint(self, tmp_path, victim, moment):
        with pytest.raises(AssertionError, match=f"rank {victim} of 2 died by SIGKILL"):
            pool.run(2, ranks.killed_while_saving, str(tmp_path), victim, moment, timeout=TIMEOUT)
        assert not (tmp_path / "step-2").exists()
        assert checkpoint.latest(tmp_path) == tmp_path / "step-1"
        assert checkpoint.verify(tmp_path / "step-1") == []
        left = [path for path in tmp_path.iterdir() if path.name != "step-1"]
        assert len(left) <= (victim == 0)  # rank 0 is the one that cleans up


@distributed
def test_save_in_the_background_is_of_the_moment_of_its_call(tmp_path):
    for names in pool.run(2, ranks.background, str(tmp_path), timeout=TIMEOUT):
        assert names == ["step-1", "step-2"]


@distributed
class TestFullStateDict:
    @pytest.mark.parametrize(("world", "group"), [(2, [0, 1]), (3, [0, 1, 2]), (3, [1, 2])])
    def test_one_process_trains_on_with_the_same_bits(self, world, group):
        results = pool.run(world, ranks.gathered, group, timeout=TIMEOUT)
        found = results[group[0]]
        assert [results[rank] for rank in group[1:]] == [{}] * (len(group) - 1)
        straight, other = ranks.trained()
        ranks.assert_same(found, other.state_dict())
        model, optimizer = ranks.network()
        model.load_state_dict(straight.state_dict())
        optimizer.load_state_dict(found)
        for pair in ((model, optimizer), (straight, other)):
            ranks.train(*pair, range(4, 9))
        ranks.assert_same(model.state_dict(), straight.state_dict())

    def test_failure_of_one_rank_is_everybodys(self):
        told = same_on_all(pool.run(2, ranks.cannot_be_gathered, timeout=TIMEOUT))
        assert told == "gathering the optimizer's state: rank 1: RuntimeError: half a step"

    def test_one_process_gets_copies(self):
        _, optimizer = ranks.trained()
        before = ranks.copied(optimizer.state_dict())
        full = checkpoint.full_state_dict(optimizer)
        full["state"][0]["tile_r0_c0"]["basis_0"].zero_()
        ranks.assert_same(optimizer.state_dict(), before)


class TestOneProcess:
    def test_values_come_back_into_the_places_they_came_from(self, tmp_path):
        """Also below integer keys, of which torch makes strings, and in lists."""

        def state(n):
            entry = {"step": n, "moment": torch.full((2,), float(n))}
            return {"state": {0: entry, "none": None}, "groups": [{"lr": 0.1 * n, "t": torch.tensor(n)}], "n": [n, 2]}

        checkpoint.save(tmp_path / "one", state(1))
        found = state(2)
        moment = found["state"][0]["moment"]
        checkpoint.load(tmp_path / "one", found)
        ranks.assert_same(found, state(1))
        assert found["state"][0]["moment"] is moment

    def test_views_and_parameters_are_written_in_place(self, tmp_path):
        checkpoint.save(tmp_path / "one", {"p": torch.ones(2, 3), "row": torch.arange(3.0)})
        stack, p = torch.zeros(4, 3), torch.nn.Parameter(torch.zeros(3, 2))
        checkpoint.load(tmp_path / "one", {"p": p.T, "row": stack[1]})
        assert p.tolist() == [[1.0, 1.0]] * 3
        assert stack.tolist() == [[0.0] * 3, [0.0, 1.0, 2.0], [0.0] * 3, [0.0] * 3]

    def test_without_a_warning(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            checkpoint.save(tmp_path / "one", {"x": torch.ones(2)})
            checkpoint.load(tmp_path / "one", {"x": torch.zeros(2)})

    def test_latest_is_the_complete_one_of_the_highest_step(self, tmp_path):
        assert checkpoint.latest(tmp_path) is checkpoint.latest(tmp_path / "absent") is None
        for name in ("step-9", "step-000010", "run-step-8", "step-11", "step-12", "other-13", "step-14-old"):
            checkpoint.save(tmp_path / name, {"x": torch.ones(2)})
        (tmp_path / "step-11" / "manifest.json").unlink()
        with (tmp_path / "step-12" / "__0_0.distcp").open("r+b") as file:
            file.truncate(10)
        (tmp_path / "step-15").write_text("no folder")
        (tmp_path / ".step-16.0123abcd.tmp").mkdir()
        assert checkpoint.latest(tmp_path) == tmp_path / "step-000010"
        shutil.rmtree(tmp_path / "step-000010")
        assert checkpoint.latest(str(tmp_path)) == tmp_path / "step-9"

    @pytest.mark.filterwarnings("ignore:.*found in sys.modules")
    def test_command_names_what_is_wrong(self, tmp_path, monkeypatch, capsys):
        checkpoint.save(tmp_path / "one", {"x": torch.ones(2)})
        monkeypatch.setattr("sys.argv", ["checkpoint", str(tmp_path / "one")])

        def run():
            with pytest.raises(SystemExit) as end:
                runpy.run_module("secondorder.checkpoint", run_name="__main__")
            return end.value.code, capsys.readouterr().out

        assert run() == (0, "the checkpoint is complete and as it was saved\n")
        (tmp_path / "one" / "__0_0.distcp").unlink()
        (tmp_path / "one" / ".metadata").write_text("")
        code, printed = run()
        assert code == 1
        assert [line.split(":")[0] for line in printed.splitlines()] == [".metadata", "__0_0.distcp"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A checkpoint of one process, and the bytes of its files."""
    folder = tmp_path_factory.mktemp("sound") / "one"
    checkpoint.save(folder, {"x": torch.arange(5.0), "y": {"z": torch.ones(2, dtype=torch.int64), "n": 3}})
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_byte_that_differs_and_any_that_is_missing_is_found(sound, data):
    folder, contents = sound
    assert set(contents) == {"manifest.json", ".metadata", "__0_0.distcp"}
    assert json.loads(contents["manifest.json"])["world_size"] == 1
    name = data.draw(st.sampled_from([".metadata", "__0_0.distcp"]))
    at = data.draw(st.integers(0, len(contents[name]) - 1))
    changed = bytearray(contents[name])
    if data.draw(st.booleans()):
        changed[at] ^= data.draw(st.integers(1, 255))
    else:
        del changed[at:]
    try:
        (folder / name).write_bytes(changed)
        (line,) = checkpoint.verify(folder)
        assert line.startswith(f"{name}: ")
    finally:
        (folder / name).write_bytes(contents[name])
    assert checkpoint.verify(folder) == []
