"""Kernels on many tensors against torch.optim and formulas in float64; and the tables by which they find them."""

import itertools
import math

import pytest
import torch

pytest.importorskip("triton")
import draws  # noqa: E402
from laid import DEVICE, LAYOUTS, Laid, far_apart  # noqa: E402
from secondorder_kernels import addresses, explain, use_kernels  # noqa: E402
from secondorder_kernels.adamw import adamw_  # noqa: E402
from secondorder_kernels.reference.rounding import stochastic_round  # noqa: E402
from secondorder_kernels.updates import apply_update_  # noqa: E402

SHAPES = [(7, 9), (), (130,), (0, 3), (2, 3, 5), (64,)]
OPTIONS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1, "maximize": False}
HALVES = [torch.bfloat16, torch.float16]
CONFIG = {"block": 64, "num_warps": 1}
pytestmark = pytest.mark.usefixtures("triton_mode")


def randn(shape, seed=0, dtype=torch.float32):
    return draws.randn(*shape, seed=seed, dtype=dtype, device=DEVICE)


def many(seed, dtype=torch.float32):
    return [randn(shape, seed + i, dtype) for i, shape in enumerate(SHAPES)]


def tensor(x):
    return torch.tensor(float(x), device=DEVICE)


def double(tensors):
    return [t.double().cpu() for t in tensors]


class Lists:
    """Arguments of `adamw_`."""

    def __init__(self, dtype=torch.float32):
        self.params, self.grads = many(0, dtype), many(10, dtype)
        self.exp_avgs = [0.1 * m for m in many(20, dtype)]
        self.exp_avg_sqs = [v.square() for v in many(30, dtype)]
        self.counts = [tensor(t) for t in (1, 2, 3, 40, 1000, 10**6)]

    def step(self, refused=0, **options):
        lists = self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.counts
        adamw_(*lists, **(OPTIONS | options), refused=tensor(refused))

    def changed(self):
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs]

    def expected(self, lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.1, maximize=False):
        """What a step must leave, in float64."""
        params, m, v = [], [], []
        lists = (double(x) for x in (self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.counts))
        for p, g, exp_avg, exp_avg_sq, t in zip(*lists, strict=True):
            g = -g if maximize else g
            m.append(beta1 * exp_avg + (1 - beta1) * g)
            v.append(beta2 * exp_avg_sq + (1 - beta2) * g * g)
            root = (v[-1] / (1 - beta2**t)).sqrt() + eps
            params.append((1 - lr * weight_decay) * p - lr * m[-1] / (1 - beta1**t) / root)
        return [*params, *m, *v]


def close(found, expected, rtol=1e-6, atol=1e-6):
    torch.testing.assert_close(double(found), expected, rtol=rtol, atol=atol)


# adamw_


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.0, "beta1": 0.0},
        {"maximize": True, "beta2": 0.9999},
        {"lr": 1, "eps": 1, "weight_decay": 0},
    ],
    ids=str,
)
def test_adamw_is_its_formula_with_a_count_for_each_tensor(options):
    lists = Lists()
    expected = lists.expected(**options)
    lists.step(**options)
    close(lists.changed(), expected)


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2, dtype=torch.float64)], ids=["float", "tensor"])
def test_adamw_takes_the_steps_of_torch_optim_adamw(lr):
    lists = Lists()
    lists.exp_avgs, lists.exp_avg_sqs = ([torch.zeros_like(p) for p in lists.params] for _ in range(2))
    lists.counts = [tensor(0) for _ in lists.params]
    theirs = [torch.nn.Parameter(p) for p in double(lists.params)]
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, foreach=False)
    for t in range(1, 9):
        lists.grads = many(100 * t)
        for p, g, count in zip(theirs, double(lists.grads), lists.counts, strict=True):
            p.grad = g
            count += 1
        optimizer.step()
        lists.step(lr=lr.to(DEVICE) if isinstance(lr, torch.Tensor) else lr)
    close(lists.params, [p.detach() for p in theirs])


@pytest.mark.parametrize("dtype", HALVES)
def test_adamw_in_half_precision_rounds_once(dtype):
    lists = Lists(dtype)
    expected = lists.expected()
    lists.step()
    close(lists.changed(), expected, 0.51 * torch.finfo(dtype).eps, 1e-7)


@pytest.mark.parametrize("bad", [1.0, math.nan, math.inf])
def test_a_refused_step_of_adamw_changes_nothing(bad):
    lists = Lists()
    lists.counts = [tensor(t) for t in (0, 0, 0, 0, 3, 3)]
    lists.grads = [bad * g for g in lists.grads]
    before = [t.clone() for t in lists.changed()]
    lists.step(refused=1)
    assert all(torch.equal(a, b) for a, b in zip(lists.changed(), before, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_of_adamw_may_have_any_strides_and_nothing_around_them_is_touched(layout):
    lists, names = Lists(), ("params", "grads", "exp_avgs", "exp_avg_sqs")
    for name in names:
        chosen = [t for t in getattr(lists, name) if t.ndim == 2 and t.numel()]
        setattr(lists, name, [*chosen, chosen[0][:3], randn((3, 70), 5).square()])
    lists.counts = lists.counts[:3]
    expected = lists.expected()
    held = {}
    for name, other in zip(names, (layout, "rows", layout, "sliced"), strict=True):
        held[name] = [Laid(t, other, math.nan if name == "grads" else 7.0) for t in getattr(lists, name)]
        setattr(lists, name, [x.t for x in held[name]])
    lists.step()
    close(lists.changed(), expected)
    assert all(x.untouched() for x in itertools.chain(*held.values()))


def test_gradients_of_adamw_may_be_expanded():
    lists = Lists()
    lists.grads = [g.flatten()[:1].sum().expand(g.shape) for g in lists.grads]
    expected = lists.expected()
    lists.step()
    close(lists.changed(), expected)


def test_tensors_of_adamw_may_lie_at_any_address():
    lists = Lists()
    lists.params = [torch.cat([p.new_zeros(1), p.flatten()])[1:].view(p.shape) for p in lists.params]
    assert not addresses.table((lists.params,)).aligned and addresses.table((lists.exp_avgs,)).aligned
    expected = lists.expected()
    lists.step()
    close(lists.changed(), expected)


def test_adamw_counts_elements_in_64_bits_where_32_do_not_suffice(monkeypatch):
    lists = Lists()
    expected = lists.expected()
    table = addresses._made((lists.params, lists.grads, lists.exp_avgs, lists.exp_avg_sqs), lists.counts)
    assert not table.wide and addresses.Table(table.lines, (2**31,), flat=True, aligned=True).wide
    table.wide = True
    monkeypatch.setattr("secondorder_kernels.triton.multi_tensor.table", lambda *args: table)
    lists.step()
    close(lists.changed(), expected)


# apply_update_


def updated(params, updates, keep, decay_after, lr):
    pairs = zip(double(params), double(updates), strict=True)
    return [keep * (p - lr * u) if decay_after else keep * p - lr * u for p, u in pairs]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("keep", "decay_after"), [(None, False), (0.9, False), (0.9, True)])
def test_apply_update_is_its_formula(dtype, keep, decay_after):
    params, updates = many(0, dtype), many(10)
    expected = updated(params, updates, 1.0 if keep is None else keep, decay_after, 0.1)
    options = {"keep": None if keep is None else tensor(keep), "decay_after": decay_after}
    apply_update_(params, updates, lr=0.1 if decay_after else tensor(0.1), **options)
    rtol = 1e-6 if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps
    close(params, expected, rtol, 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decay_after", [False, True])
def test_apply_update_rounds_stochastically_by_places_in_parameters_of_any_layout(layout, decay_after):
    shapes = [(7, 9), (33, 5), (3, 4)]
    params = [Laid(randn(shape, i, torch.bfloat16), layout, 7.0) for i, shape in enumerate(shapes)]
    updates = [Laid(randn(shape, 10 + i), "sliced" if layout == "rows" else "rows") for i, shape in enumerate(shapes)]
    keys = torch.tensor([1, 2**32 - 1, 77], device=DEVICE)
    wide = updated([p.t for p in params], [u.t for u in updates], 0.75, decay_after, 0.5)  # only sums are rounded
    expected = [
        stochastic_round(x.float().to(DEVICE)[None], key)[0] for x, key in zip(wide, keys.split(1), strict=True)
    ]
    apply_update_(
        [p.t for p in params], [u.t for u in updates], lr=0.5, keep=tensor(0.75), decay_after=decay_after, keys=keys
    )
    if decay_after:
        close([p.t for p in params], wide, 2**-7, 1e-6)
    else:
        assert all(torch.equal(p.t, x) for p, x in zip(params, expected, strict=True))
    assert all(x.untouched() for x in (*params, *updates))


def test_both_paths_of_apply_update_round_stochastically_alike():
    results = []
    for mode in ("reference", "triton"):
        params = many(0, torch.bfloat16)
        with use_kernels(mode):
            for decay_after in (False, True):
                keys = torch.arange(len(params), device=DEVICE)
                apply_update_(params, many(10), lr=0.5, keep=tensor(0.75), decay_after=decay_after, keys=keys)
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_tiles_of_one_parameter_are_written_in_place():
    whole, tiles = randn((60, 50)), [(slice(0, 30), slice(0, 20)), (slice(30, 60), slice(20, 50))]
    expected = whole.double().cpu()
    updates = [randn((30, 20), 1), randn((30, 30), 2)]
    for tile, update in zip(tiles, updates, strict=True):
        expected[tile] = 0.9 * expected[tile] - 0.1 * update.double().cpu()
    apply_update_([whole[tile] for tile in tiles], updates, lr=0.1, keep=tensor(0.9))
    close([whole], [expected])


@pytest.mark.parametrize("step", ["adamw_", "apply_update_"])
def test_autograd_knows_that_parameters_were_written(step):
    lists = Lists()
    w = lists.params[0].requires_grad_()
    saved = (w * w).sum()
    with torch.no_grad():
        lists.step() if step == "adamw_" else apply_update_([w[2:, 3:]], [randn((5, 6))], lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_offsets_of_apply_update_beyond_32_bits(tmp_path):
    far, update = far_apart(tmp_path, (4, 9), (2**30, 1), torch.bfloat16), randn((4, 9))
    apply_update_([far], [update], lr=-1.0)
    assert torch.equal(far, update.bfloat16())


def test_strides_that_are_not_those_of_rows_and_columns_are_refused():
    p = randn((4, 5, 6))[1:, 1:, 1:]
    path, reason = explain("apply_update_", [p], [randn(p.shape)])
    assert path == "none" and "strides (30, 6, 1), (20, 5, 1) are not those of rows and columns" in reason
    path, reason = explain("apply_update_", [p.double()], [randn(p.shape)])
    assert path == "none" and "no kernel for torch.float64" in reason


# tables


def test_a_table_is_made_once_for_addresses_and_pieces_once_for_shapes():
    params, grads = many(0), many(10)
    found = addresses.table((params, grads))
    assert addresses.table((params, grads)) is found
    other = addresses.table((params, many(20)))
    assert other is not found and other.chunks(64) is found.chunks(64) is not found.chunks(32)
    assert addresses.table((params, grads), [tensor(0)] * len(params)) is not found
    a, b = torch.zeros(6, 4, device=DEVICE)[:, :2], torch.zeros(12, device=DEVICE)
    assert addresses.table(([a],)).lines.tolist()[0][:5] == [12, 2, a.data_ptr(), 4, 1]
    assert addresses.table(([b],)).lines.tolist()[0][:5] == [12, 12, b.data_ptr(), 0, 1]
    assert addresses.table(([b.view(6, 2)],)) is addresses.table(([b],))  # the same elements in the same order


def test_pieces_cover_every_element_once():
    table = addresses.table((many(0),))
    pieces = table.chunks(64).tolist()
    assert pieces == [[k, j] for k, shape in enumerate(SHAPES) for j in range(-(-math.prod(shape) // 64))]
    assert addresses.table(([torch.zeros(0, device=DEVICE)],)).chunks(64).shape == (0, 2)


def test_few_tables_are_held():
    first = [torch.zeros(2, device=DEVICE)]
    table = addresses.table((first,))
    kept = [[torch.zeros(2, device=DEVICE)] for _ in range(addresses._MOST)]
    for tensors in kept:
        addresses.table((tensors,))
    assert len(addresses._tables._held) == addresses._MOST
    assert addresses.table((first,)) is not table


def test_a_graph_captures_what_is_on_the_device_and_it_stays_there(monkeypatch):
    params, updates = many(0), many(10)
    with monkeypatch.context() as capture:
        capture.setattr(addresses, "_capturing", lambda device: True)
        path, reason = explain("apply_update_", params, updates)
        assert path == "none" and "a CUDA graph is captured" in reason
        with pytest.raises(RuntimeError, match="cannot be made while a CUDA graph is captured"):
            addresses.table((params, updates))
    table = addresses.table((params, updates))
    with monkeypatch.context() as capture:
        capture.setattr(addresses, "_capturing", lambda device: True)
        assert explain("apply_update_", params, updates)[0] == "triton"
        assert addresses.table((params, updates)) is table
    assert table in addresses._tables._captured.values()


# registration


@pytest.mark.parametrize("mode", ["auto", "triton"])
def test_the_registered_operations(mode):
    lists = Lists()
    chosen = [[ts[0], ts[2]] for ts in (lists.params, lists.grads, lists.exp_avgs, lists.exp_avg_sqs, lists.counts)]
    options = {name: value for name, value in OPTIONS.items() if name != "lr"}
    halves = [p.bfloat16() for p in chosen[0]]
    with use_kernels(mode):
        torch.library.opcheck(
            torch.ops.secondorder.adamw_.default, (*chosen, tensor(0)), {**options, "lr_tensor": tensor(0.1)}
        )
        torch.library.opcheck(
            torch.ops.secondorder.apply_update_.default,
            (halves, chosen[1]),
            {"lr": 0.1, "keep": tensor(0.9), "keys": torch.arange(2, device=DEVICE)},
        )
