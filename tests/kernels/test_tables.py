"""Tables of configurations: the nearest entry, in the right order of folders, and a digest of what may be read."""

import json

import pytest
import torch

from secondorder_kernels import tables

CPU = torch.device("cpu")
MEASURED = "interpreter.json"  # a CPU's table; a GPU's is named after it


def entry(sizes, config, kind="float32/k", op="ema_syrk_", **numbers):
    return {"op": op, "kind": kind, "sizes": list(sizes), "config": config, **numbers}


def write(path, *entries):
    path.write_text(json.dumps({"device": "any", "entries": entries}))


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """The user's folder and the package's, empty but for a family's table."""
    user, shipped = tmp_path / "user", tmp_path / "shipped"
    user.mkdir()
    shipped.mkdir()
    monkeypatch.setenv("SECONDORDER_KERNELS_CONFIG_DIR", str(user))
    monkeypatch.setattr(tables, "_SHIPPED", shipped)
    write(shipped / MEASURED, entry((8, 64), {"block": 16}, kind="*"))
    tables.forget()
    yield user, shipped
    tables.forget()


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def nearest(*sizes, kind="float32/k"):
    return tables.nearest("ema_syrk_", kind, sizes, CPU)


def config(*sizes, kind="float32/k"):
    return tables.config("ema_syrk_", kind, sizes, CPU)


def test_of_several_entries_the_one_with_the_nearest_sizes_is_taken(folders):
    sizes = [(8, 64), (8, 1024), (64, 64)]
    write(folders[0] / MEASURED, *(entry(size, {"block": i}, ratio=1.5) for i, size in enumerate(sizes)))
    for size in sizes:
        assert nearest(*size) == tables.Entry(size, {"block": sizes.index(size)}, 1.5)
    assert nearest(8, 255).sizes == (8, 64) and nearest(8, 257).sizes == (8, 1024)  # by ratios, not by differences
    assert nearest(40, 64).sizes == (64, 64)
    assert nearest(0, 64).sizes == (8, 64)


def test_a_measurement_far_away_says_nothing(folders):
    write(folders[0] / MEASURED, entry((8, 64), {"block": 1}, ratio=1.5))
    assert nearest(8 * 16, 64) is not None and nearest(8 * 4, 64 // 4) is not None
    assert nearest(8 * 16 + 1, 64) is None and nearest(8 * 4, 64 * 5) is None
    assert config(10**6, 10**6) == {"block": 16}  # where nothing was measured, the family's serve all sizes


def test_entries_of_other_kinds_and_operations_are_none(folders):
    write(
        folders[0] / MEASURED,
        entry((8, 64), {"block": 1}, kind="bfloat16/k", ratio=2.0),
        entry((8, 64), {"block": 2}, op="gram", ratio=2.0),
    )
    assert nearest(8, 64) is None
    assert nearest(8, 64, kind="bfloat16/k").config == {"block": 1}
    assert config(8, 64) == {"block": 16}


def test_the_users_folder_goes_before_the_package_and_that_before_the_family(folders, monkeypatch):
    user, shipped = folders
    monkeypatch.setattr(tables, "family", lambda device: "sm90")
    write(shipped / "sm90.json", entry((8, 64), {"from": "family"}))
    assert config(8, 64) == {"from": "family"} and nearest(8, 64) is None
    write(shipped / MEASURED, entry((8, 64), {"from": "package"}, ratio=1.2))
    tables.forget()
    assert config(8, 64) == {"from": "package"}
    write(user / MEASURED, entry((8, 64), {"from": "user"}, ratio=1.1))
    assert config(8, 64) == {"from": "package"}  # remembered
    tables.forget()
    assert config(8, 64) == {"from": "user"}


def test_where_torch_was_as_fast_the_family_configures_who_insists(folders):
    write(folders[0] / MEASURED, entry((8, 64), None, ratio=0.8))
    assert nearest(8, 64) == tables.Entry((8, 64), None, 0.8)
    assert config(8, 64) == {"block": 16}


def test_deterministic_algorithms_pin_the_packages_tables(folders, deterministic):
    write(folders[0] / MEASURED, entry((8, 64), {"block": 1}, ratio=1.5))
    before = tables.fingerprint()
    assert nearest(8, 64) is None and config(8, 64) == {"block": 16}
    (folders[0] / MEASURED).unlink()
    assert tables.fingerprint() == before
    torch.use_deterministic_algorithms(False)
    write(folders[0] / MEASURED, entry((8, 64), {"block": 1}, ratio=1.5))
    assert config(8, 64) == {"block": 1}


def test_a_familys_own_kind_goes_before_all_kinds(folders):
    write(
        folders[1] / "sm80.json",
        entry((8, 64), {"block": 1}, kind="*"),
        entry((8, 4096), {"block": 2}, kind="bfloat16/k"),
        entry((8, 4096), {"block": 3}, kind="*"),
    )
    assert tables.family_config("ema_syrk_", "bfloat16/k", (8, 64), "sm80") == {"block": 2}
    assert tables.family_config("ema_syrk_", "float32/k", (8, 64), "sm80") == {"block": 1}
    assert tables.family_config("ema_syrk_", "float32/k", (8, 2048), "sm80") == {"block": 3}


def test_a_family_without_an_entry_is_a_mistake_that_is_named(folders):
    with pytest.raises(LookupError, match="interpreter.json has no configuration of gram for float32/k"):
        tables.config("gram", "float32/k", (8, 64), CPU)


def test_without_a_folder_by_name_the_users_cache_is_read(monkeypatch, tmp_path):
    monkeypatch.delenv("SECONDORDER_KERNELS_CONFIG_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tables.user_folder() == tmp_path / "cache" / "secondorder_kernels"
    assert config(8, 64) == {"block": 16}  # a folder that is not there is no error
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tables.user_folder().parts[-2:] == (".cache", "secondorder_kernels")


@pytest.mark.parametrize(
    ("hip", "capability", "family"),
    [
        (None, (8, 0), "sm80"),
        (None, (8, 9), "sm80"),
        (None, (9, 0), "sm90"),
        (None, (10, 0), "sm100"),
        (None, (10, 3), "sm100"),
        (None, (12, 0), "sm80"),
        ("6.4", (9, 4), "gfx942"),
    ],
)
def test_every_gpu_has_a_family(monkeypatch, hip, capability, family):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert tables.family(torch.device("cuda", 0)) == family
    assert tables.family(CPU) == "interpreter"


def test_a_gpus_table_is_named_after_it_as_any_file_system_likes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB/HBM3 (PCIe)")
    tables.file_name.cache_clear()
    try:
        assert tables.file_name(torch.device("cuda", 0)) == "NVIDIA_H100_80GB_HBM3__PCIe_.json"
    finally:
        tables.file_name.cache_clear()


def test_fingerprints_tell_any_two_sets_of_tables_apart(folders):
    user, shipped = folders
    seen = [tables.fingerprint()]
    for path, config in [(user / MEASURED, 1), (user / MEASURED, 2), (shipped / "sm90.json", 1), (user / "x.json", 2)]:
        write(path, entry((8, 64), {"block": config}))
        seen.append(tables.fingerprint())
    assert len(set(seen)) == len(seen)
    (user / "x.json").unlink()
    (user / "notes.txt").write_text("not a table")
    assert tables.fingerprint() == seen[-2]
