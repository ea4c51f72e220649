"""The page about runs: what belongs together, what it is called, and a picture and an HTML file that say it."""

import base64
import json
import math
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
import yaml

import optimizer
import palette
import panels
import report
import series


def make_run(folder, names, seed=1, finals=None, data="digits", more=None, spec=None, diagnostics=None):
    """A run folder as train.py writes it: losses fall from 10 to the optimizer's final one in five evaluations."""
    specs = [{"name": name, "lr": 0.01, **(spec or {})} for name in names]
    config = {"task": "vision", "name": folder.name, "seed": seed, "out": str(folder.parent), "data": {"source": data}}
    config |= {"train": {"steps": 40, "batch_size": 8}, "log": {"every": 10}}
    config |= {"optimizer": specs[0], "compare": specs[1:], **(more or {})}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    facts = {"data": "digits: <few>", "device": "a machine", "versions": {"torch": "2.13.0"}}
    (folder / "run.json").write_text(json.dumps(facts))
    for number, name in enumerate(names):
        final = (finals or {}).get(name, 1.0)
        lines = []
        for step in range(0, 50, 10):
            loss = 10 * (final / 10) ** (step / 40)
            record = {"step": step, "seconds": step * (number + 1) / 10, "val/loss": loss, "val/accuracy": step / 40}
            if step:
                record |= {"train/loss": loss, "train/lr": 0.01, "train/grad_norm": 5.0 / step}
                record |= {"train/images": 8 * step, "optimizer/parameters": 7.0, "memory/state_bytes": 2_000_000}
                record |= {key: value * step for key, value in (diagnostics or {}).items()}
            lines.append(json.dumps(record))
        (folder / name).mkdir()
        (folder / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def sections(*patterns):
    return series.sections(series.find(map(str, patterns)))


def labels(*patterns):
    (section,) = sections(*patterns)
    return [one.label for one in section.series]


def test_seeds_are_one_series_and_the_best_comes_first(tmp_path):
    for seed in (2, 1):
        make_run(tmp_path / f"seed-{seed}", ["adamw", "soap"], seed, {"adamw": 2.0, "soap": 0.5 * seed})
    (section,) = sections(tmp_path)
    assert [one.label for one in section.series] == ["soap", "adamw"]
    assert [[run.seed for run in one.runs] for one in section.series] == [[1, 2], [1, 2]]
    curve = section.series[0].curve("val/loss")
    assert curve.steps == [0, 10, 20, 30, 40]
    assert (curve.low[-1], curve.middle[-1], curve.high[-1]) == pytest.approx((0.5, 0.75, 1.0))
    assert curve.seconds[-1] == 8.0
    assert section.units() == ("images", 8.0)


def test_labels_say_what_differs_and_nothing_else(tmp_path):
    make_run(tmp_path / "a", ["soap", "adamw"])
    make_run(tmp_path / "b", ["soap"], spec={"lr": 0.1})
    make_run(tmp_path / "c", ["soap"], spec={"lr": 0.1, "betas": [0.9, 0.95]})
    found = labels(tmp_path)
    assert sorted(found) == ["adamw", "soap lr=0.01", "soap lr=0.1", "soap lr=0.1 betas=0.9,0.95"]
    make_run(tmp_path / "d", ["adamw"], more={"train": {"steps": 40, "batch_size": 16}})
    assert sorted(labels(tmp_path)) == [
        "adamw batch_size=16",
        "adamw batch_size=8",
        "soap lr=0.01 batch_size=8",
        "soap lr=0.1 batch_size=8",
        "soap lr=0.1 betas=0.9,0.95 batch_size=8",
    ]


def test_the_same_run_made_twice_is_told_apart_by_its_folder(tmp_path):
    make_run(tmp_path / "old" / "seed-1", ["soap"])
    make_run(tmp_path / "new" / "seed-1", ["soap"])
    assert sorted(labels(tmp_path / "old", tmp_path / "new")) == ["soap (new)", "soap (old)"]
    assert sorted(labels(tmp_path)) == ["soap (new)", "soap (old)"]
    assert labels(tmp_path / "old", tmp_path / "old" / "seed-1") == ["soap"], "named twice is one run"


def test_other_data_is_another_section(tmp_path):
    make_run(tmp_path / "a", ["soap"])
    make_run(tmp_path / "b", ["soap"], data="mnist")
    titles = [section.title for section in sections(tmp_path)]
    assert titles == ["vision data.source=digits", "vision data.source=mnist"]


def test_runs_of_tuning_are_left_out_unless_asked_for(tmp_path):
    make_run(tmp_path / "tune-soap-0.01", ["soap"], more={"name": "tune-soap-0.01"})
    make_run(tmp_path / "seed-1", ["adamw"])
    assert labels(tmp_path) == ["adamw"]
    assert labels(tmp_path / "tune-*") == ["soap"]


def test_a_run_that_diverged_comes_last_and_one_without_records_is_left_out(tmp_path):
    make_run(tmp_path / "a", ["soap", "adamw", "kfac"])
    with (tmp_path / "a" / "soap" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 41, "seconds": 9.0, "val/loss": math.nan}) + "\n")
    (tmp_path / "a" / "kfac" / "metrics.jsonl").write_text("")
    assert labels(tmp_path) == ["adamw", "soap"]


def test_a_half_written_line_is_said_and_does_not_hide_the_others(tmp_path, capsys):
    make_run(tmp_path / "a", ["soap", "adamw"])
    with (tmp_path / "a" / "soap" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "sec')
    assert labels(tmp_path) == ["adamw", "soap"]  # the last line of a process that was killed
    with (tmp_path / "a" / "soap" / "metrics.jsonl").open("a") as file:
        file.write("\n")
    assert labels(tmp_path) == ["adamw"]
    assert "a line is incomplete" in capsys.readouterr().err


def test_an_optimizer_has_one_color_wherever_it_is_drawn():
    named = [name for name in optimizer.classes() if not name.startswith("torch.")] + ["torch.muon"]
    colors = [palette.color(name) for name in named]
    assert len(set(colors)) == min(len(named), len(palette.COLORS))
    for others in (["soap", "kfac"], ["kfac", "adamw", "soap", "x"]):
        assert palette.styles({name: name for name in others})["soap"].color == palette.color("soap")
    two = palette.styles({"soap_reference": "soap_reference", "soap": "soap", "kfac": "kfac"})
    assert two["soap"].color == two["soap_reference"].color != two["kfac"].color
    assert (two["soap"].dash, bool(two["soap_reference"].dash)) == ((), True)
    many = palette.styles({"adamw": "adamw"} | {f"soap lr={lr}": "soap" for lr in range(20)})
    assert len(set(many.values())) == 21
    alone = palette.styles({f"soap lr={lr}": "soap" for lr in range(20)})
    assert len({style.color for style in alone.values()}) == 20, "one optimizer alone: a ramp from best to worst"


def test_the_table_counts_to_adamws_worst_final_loss(tmp_path):
    for seed, final in ((1, 2.0), (2, 3.0)):
        make_run(tmp_path / f"seed-{seed}", ["soap", "adamw"], seed, {"soap": 1.0, "adamw": final})
    (section,) = sections(tmp_path)
    assert report.default_target(section) == pytest.approx(3.0)
    head, soap, adamw = report.rows(section, 3.0001)
    assert head[-3:] == ["steps to 3", "seconds to 3", "accuracy"]
    assert soap == [
        *("soap", "0.01", "1,2"),
        *(["1.000", "1.000"], ["1.000", "1.000"]),
        *("100.0", "2.00"),
        *(["30", "30"], ["3.0", "3.0"], ["100.0%", "100.0%"]),
    ]
    assert adamw[7] == ["30", "40"]
    assert report.rows(section, 0.1)[1][7] == ["-", "-"]


def test_many_seeds_are_a_median_and_a_range():
    cell = report._per_seed([1.0, 2.0, 3.0, 5.0, math.nan], lambda value: f"{value:.1f}")
    assert cell == "2.5 (1.0–5.0, 1 missed)"


def test_telling_metrics_are_chosen_and_constant_ones_are_not(tmp_path):
    values = {f"optimizer/condition_{n}": 1.0 + n for n in range(3)}
    values |= {"optimizer/update_ratio": 0.1, "optimizer/whatever": 2.0, "optimizer/deep/update_ratio": 3.0}
    values |= {f"optimizer/another_{n}": 1.0 for n in range(9)}
    make_run(tmp_path / "a", ["soap"], diagnostics=values)
    (section,) = sections(tmp_path)
    chosen = panels.choose(section, [])
    assert len(chosen) == panels.MOST
    assert chosen[:3] == ["val/accuracy", "optimizer/update_ratio", "optimizer/condition_0"]
    assert "optimizer/parameters" not in chosen
    assert panels.choose(section, ["condition*", "train/lr*"]) == [f"optimizer/condition_{n}" for n in range(3)]
    assert panels.choose(section, ["optimizer/deep/*"]) == ["optimizer/deep/update_ratio"]


class Page(HTMLParser):
    """What a page refers to, what it says, and whether its tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.references, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br", "img", "line"):
            self.open.append(tag)
        self.references += [value for key, value in attributes if key in ("src", "href", "data", "srcset", "poster")]

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_one_file_with_everything_in_it(tmp_path, capsys):
    for seed in (1, 2):
        make_run(tmp_path / f"seed-{seed}", ["adamw", "soap"], seed, diagnostics={"optimizer/condition_max": 3.0})
    assert report.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"page: {tmp_path}/report.html, {tmp_path}/report.png" in printed
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert not page.open
    assert len(page.references) == 2, "the losses and the diagnostics"
    for reference in page.references:
        kind, _, data = reference.partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")
    assert "url(" not in text
    assert "@import" not in text
    said = " ".join(page.texts)
    for word in ("soap", "adamw", "digits: <few>", "a machine, torch 2.13.0", "final loss", "100.0%"):
        assert word in said, word


def drawn(tmp_path, monkeypatch, count):
    """The page's picture with `count` optimizers, as a figure that is laid out."""
    names = ["adamw", *(f"soap_{n}" for n in range(count - 1))]
    finals = {name: 0.1 * (n + 1) for n, name in enumerate(names)}
    make_run(tmp_path / "a", names, finals=finals, diagnostics={"optimizer/condition_max": 3.0})
    figures = []
    monkeypatch.setattr(report._pyplot(), "close", figures.append)
    parts = [report.part(section, [], None, 20) for section in sections(tmp_path / "a")]
    report.write_png(parts, tmp_path / "page.png")
    monkeypatch.undo()
    return figures[0]


@pytest.mark.parametrize("count", [1, 20])
def test_nothing_overlaps(tmp_path, monkeypatch, count):
    page = drawn(tmp_path, monkeypatch, count)
    renderer = page.canvas.get_renderer()
    table, losses, diagnostics = page.subfigs
    boxes = [axis.get_tightbbox(renderer) for part in (losses, diagnostics) for axis in part.axes if axis.get_visible()]
    boxes += [legend.get_window_extent(renderer) for legend in losses.legends]
    cells = [text.get_window_extent(renderer) for text in table.axes[0].texts if text.get_text()]
    for number, box in enumerate(boxes):
        for other in boxes[number + 1 :]:
            assert not (box.overlaps(other) and min(box.x1, other.x1) - max(box.x0, other.x0) > 1), "panels or legend"
    for group in (boxes, cells):
        assert all(box.x0 >= 0 and box.x1 <= page.bbox.x1 + 1 and box.y0 >= -1 for box in group), "inside of the page"
    for number, cell in enumerate(cells):
        assert not any(cell.overlaps(other) for other in cells[number + 1 :]), "cells of the table"
    assert min(cell.y0 for cell in cells) >= max(box.y1 for box in boxes)
    report._pyplot().close(page)


def test_losses_that_span_a_decade_have_a_logarithmic_axis(tmp_path):
    make_run(tmp_path / "wide", ["soap"], finals={"soap": 0.1})
    make_run(tmp_path / "narrow", ["soap"], finals={"soap": 8.0})
    pyplot = report._pyplot()
    for name, scale in (("wide", "log"), ("narrow", "linear")):
        (section,) = sections(tmp_path / name)
        figure = pyplot.figure(layout="constrained")
        panels.losses(figure, section, palette.styles({"soap": "soap"}), None)
        assert [axis.get_yscale() for axis in figure.axes] == [scale] * 3
        assert [axis.get_xlabel() for axis in figure.axes] == ["steps", "seconds of training", "images"]
        pyplot.close(figure)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["absent"], "error: no file or folder 'absent'"),
        (["."], "error: no run with metrics in ."),
        ([".", "--best=0"], "error: --best must be >= 1, got 0"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(argv, message, capsys):
    assert report.main(argv) == 2
    assert capsys.readouterr().err == f"{message}\n"
