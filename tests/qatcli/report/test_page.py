"""The page: what it says about a run, and that nothing in a run directory becomes markup."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qatcli.report.collect import collect
from qatcli.report.page import date, figure, percent, render, size

Run = Callable[..., Path]
HOSTILE = """</p></style></title><script>alert(1)</script><img src=x onerror=alert(2)>"'&{{ 7 * 7 }}"""
VOID = {"meta", "br", "img", "link", "input", "hr"}
ACTIVE = {"script", "iframe", "object", "embed", "form", "link", "img", "base", "foreignobject"}


class Page(HTMLParser):
    """Text of a page by its elements; fails where elements are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + " "

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def page(run: Path, **options: Any) -> Page:
    return Page(render(collect(run), **options))


def test_the_results(make_run: Run) -> None:
    words = page(make_run()).words
    for said in ("model/w2g64", "2 bits, groups of 64", "20.25", "912,346", "0.3100", "71.0 %", "62.0 %", "2 MiB"):
        assert said in words, said
    assert "0.3100 \N{PLUS-MINUS SIGN} 0.01250" in words
    for said in ("1 of 1 expected figures reached", "at most 20.5", "The capital of France is", "London.", "piqa"):
        assert said in words, said
    assert "wiki: source wiki.test.raw, context 64, windows 8" in words
    assert "independent reader" in words
    assert "2 bits, groups of 64, zero points at the central two levels, first grid by weighted" in words
    assert "owner/text" in words
    assert "7 MiB 2.280 4.900 512.0 31.00 3 MiB 5 MiB" in words
    assert "speed: computed in bfloat16" in words
    assert "model.layers.3.mlp.down_proj 5.00 % 10.00 %" in words.replace("\N{NO-BREAK SPACE}", " ")


def test_only_accuracies_are_per_cent_and_the_mean_is_of_those_asked_for(
    make_run: Run, metrics: dict[str, Any]
) -> None:
    zero_shot = metrics["models"]["quantized"]["zero_shot"]
    for name in ("mmlu", "mmlu_law", "mmlu_physics"):
        zero_shot["tasks"][name] = {"metric": "acc", "value": 0.25, "stderr": None}
    zero_shot["tasks"]["wikitext"] = {"metric": "bits_per_byte", "value": 0.93, "stderr": 0.05}
    zero_shot["average"]["tasks"] = 2
    words = page(make_run(metrics)).words
    assert "mean of 2 tasks" in words
    assert "25.0 % 0.9300 ± 0.05000 62.0 % ± 1.1" in words


def test_every_plot_is_there(make_run: Run) -> None:
    html = render(collect(make_run()))
    # scale, ranges, curves, e2e, layers as rounded and as trained, seconds; sparklines in two tables
    assert html.count("<svg") == 7 + 4 + 4
    assert len(re.findall(r'class="mark (?:before|after)"', html)) == 8
    assert len(re.findall(r'class="cell"', html)) == 2 * 8


def test_a_missed_expectation(make_run: Run, metrics: dict[str, Any]) -> None:
    metrics["models"]["quantized"]["perplexity"]["wiki"] = 33.0
    words = page(make_run(metrics)).words
    assert "0 of 1 expected figures reached" in words
    assert "missed" in words


def test_a_run_under_way_says_how_far_it_is(make_run: Run) -> None:
    run = make_run(blocks=3, at_work=True)
    words = page(run).words
    assert "At work: block-ap, 2 of 4, about 0:30 left" in words
    assert "Nothing is measured yet." in words
    assert '<meta http-equiv="refresh" content="5">' in render(collect(run), refresh=5)


def test_a_stopped_run_says_why(make_run: Run) -> None:
    run = make_run(blocks=3)
    with open(run / "block-ap.partial" / "log.jsonl", "a") as log:
        log.write(json.dumps({"time": 3760, "event": "stopped", "error": "ResourceError: disk full"}) + "\n")
    words = page(run).words
    assert "Stopped: block-ap, 2 of 4" in words
    assert "ResourceError: disk full" in words


def test_a_stopped_export_says_why(make_run: Run) -> None:
    run = make_run()
    partial = run / "export" / "gguf.partial"
    partial.mkdir()
    events = [{"time": 5000, "event": "start"}, {"time": 5001, "event": "stopped", "error": "ResourceError: disk full"}]
    (partial / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    words = page(run).words
    assert "Stopped: export/gguf" in words
    assert "ResourceError: disk full" in words


def test_a_run_that_only_began(make_run: Run, tmp_path: Path) -> None:
    partial = tmp_path / "run" / "calibrate.partial"
    partial.mkdir(parents=True)
    assert "Nothing is trained yet." in page(tmp_path / "run").words


def hostile(value: Any) -> Any:
    """Every text in `value` with markup behind it, and a key of markup in every mapping."""
    if isinstance(value, dict):
        kept = {key: value[key] for key in ("event", "title") if key in value}
        return {HOSTILE: HOSTILE} | {key: hostile(inner) for key, inner in value.items()} | kept
    if isinstance(value, list):
        return [hostile(inner) for inner in value]
    return value + HOSTILE if isinstance(value, str) else value


@pytest.mark.parametrize("status", ["finished", "stopped"])
def test_nothing_in_a_run_becomes_markup(make_run: Run, status: str) -> None:
    run = make_run() if status == "finished" else make_run(blocks=3)
    clean = page(run)
    for file in run.rglob("*.json*"):
        values = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(hostile(value)) + "\n" for value in values))
    (run / "export" / HOSTILE.replace("/", "|")).mkdir(parents=True)
    html = render(collect(run))
    found = Page(html)
    assert ACTIVE & set(found.tags) == set()
    assert [name for name, _ in found.attributes if name.startswith("on")] == []
    assert "alert(1)" in found.text, "the reader sees what is there"
    assert "{{ 7 * 7 }}" in found.text, "a template in a file is not run"
    assert found.text.count("alert(1)") > 30
    assert set(found.tags) - set(clean.tags) <= {"br", "small"}


def test_the_page_asks_nobody(make_run: Run) -> None:
    html = render(collect(make_run()))
    assert "default-src 'none'" in html
    found = Page(html)
    assert ACTIVE & set(found.tags) == set()
    links = [value for name, value in found.attributes if name in ("href", "src", "action", "xlink:href")]
    assert links and all(str(link).startswith("#") for link in links)
    assert "url(" not in html and "@import" not in html
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")


def test_light_and_dark_have_the_same_colours(make_run: Run) -> None:
    css = (Path(__file__).parents[3] / "qatcli" / "report" / "page.css").read_text(encoding="utf-8")
    light, dark = (set(re.findall(r"(--[a-z_-]+): #", part)) for part in css.split("@media", 2)[:2])
    assert len(light) > 10
    assert light == dark
    assert set(re.findall(r"var\((--[a-z_-]+)\)", css)) - {"--columns"} <= light


@pytest.mark.parametrize("seed", range(25))
def test_values_of_another_type_do_not_break_the_page(make_run: Run, metrics: dict[str, Any], seed: int) -> None:
    """A figure in eval.json that is not what it should be: the rest of the page is still there."""
    choose = random.Random(seed)

    def spoil(value: Any) -> Any:
        if choose.random() < 0.25:
            return choose.choice([None, "text", -1, 1e308, True])
        if isinstance(value, dict):
            return {key: spoil(inner) for key, inner in value.items()}
        return value

    found = page(make_run({**metrics, "models": {name: spoil(model) for name, model in metrics["models"].items()}}))
    assert "Provenance" in found.words


def test_texts() -> None:
    assert (figure(None), figure(1.5), figure("x")) == ("not finite", "1.500", "x")
    assert percent(0.12345).replace("\N{NO-BREAK SPACE}", " ") == "12.3 %"
    assert (size(512), size(2**20), size(3 * 2**30), size(None)) == ("512 B", "1 MiB", "3.00 GiB", "")
    assert (size(95.9 * 2**20), size(1003 * 2**20)) == ("95.9 MiB", "1003 MiB")
    assert date(0) == "1970-01-01 00:00:00 UTC"
    assert date(1e300) == "1e+300"
