"""What the options of `qat eval MODEL...` ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from qatcli.errors import UsageError
from qatcli.evaluation.options import ModelOptions, is_recipe, section


def test_a_recipe_is_told_by_its_suffix() -> None:
    assert is_recipe("recipes/smoke/w2g32.yaml")
    assert not is_recipe("runs/smoke/pack")
    assert not is_recipe("model.gguf")


def test_nothing_asked_is_wikitext2() -> None:
    found = section(ModelOptions())
    assert [(text.name, text.source, text.seq_len) for text in found.perplexity] == [("wikitext2", "wikitext2", 2048)]
    assert found.zero_shot is None
    assert not found.kl


def test_what_was_given_is_told_from_what_was_not() -> None:
    assert ModelOptions().given() == []
    assert ModelOptions(windows=0, limit=0, no_speed=True).given() == ["--windows", "--limit", "--no-speed"]


def test_options_are_the_keys_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "wiki.raw").write_text("text")
    texts = (str(tmp_path / "wiki.raw"), "c4")
    found = section(ModelOptions(texts, 128, 3, "piqa, arc_easy", data=str(tmp_path), limit=7, against="full"))
    assert [text.name for text in found.perplexity] == ["wiki", "c4"]
    assert {(text.seq_len, text.windows) for text in found.perplexity} == {(128, 3)}
    assert found.kl
    assert found.zero_shot is not None
    assert found.zero_shot.tasks == ("piqa", "arc_easy")
    assert (found.zero_shot.data, found.zero_shot.limit) == (str(tmp_path), 7)


def test_the_first_token_of_every_window(tmp_path: Path) -> None:
    (tmp_path / "wiki.raw").write_text("text")
    texts = (str(tmp_path / "wiki.raw"),)
    assert [section(ModelOptions(texts, bos=bos)).perplexity[0].bos for bos in (False, True)] == ["document", "window"]


def test_a_local_copy_of_a_built_in_text(tmp_path: Path) -> None:
    (tmp_path / "wiki.test.raw").write_text("text")
    copy = str(tmp_path / "wiki.test.raw")
    (text,) = section(ModelOptions((f"wikitext2={copy}",))).perplexity
    assert (text.name, text.source, text.file, text.seq_len) == ("wikitext2", "wikitext2", copy, 2048)


def test_tasks_alone_measure_no_text() -> None:
    found = section(ModelOptions(zero_shot="paper"))
    assert found.perplexity == ()
    assert found.speed is not None
    assert section(ModelOptions(zero_shot="paper", no_speed=True)).speed is None
    assert found.zero_shot is not None
    assert len(found.zero_shot.tasks) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ModelOptions(limit=3), "--limit needs --zero-shot"),
        (ModelOptions(limit=0), "--limit needs --zero-shot"),
        (ModelOptions(data="."), "--data needs --zero-shot"),
        (ModelOptions(text=("nowhere.txt",)), "--text nowhere.txt: no such file: /.*nowhere.txt$"),
        (ModelOptions(text=("",)), "--text : must not be empty"),
        (ModelOptions(text=("c4=nowhere.json",)), "--text nowhere.json: no such file"),
        (ModelOptions(text=("c4", "wikitext2"), seq_len=2), "^--seq-len 2: should be greater than or equal to 8$"),
        (ModelOptions(windows=0), "^--windows 0: should be greater"),
        (ModelOptions(zero_shot="paper", data="nowhere"), "--data nowhere: no such folder: /.*nowhere$"),
        (ModelOptions(zero_shot="paper", limit=-1), "--limit -1: should be greater"),
        (ModelOptions(zero_shot=","), "--zero-shot names no task"),
        (ModelOptions(zero_shot=""), "--zero-shot names no task"),
        (ModelOptions(text=("a/t.txt", "b/t.txt")), "--text b/t.txt: an earlier text is called t, too"),
        (ModelOptions(text=("c4", "c4=copy.json")), "--text c4=copy.json: an earlier text is called c4, too"),
    ],
)
def test_what_no_recipe_could_say_is_refused_in_the_words_of_the_command(options: ModelOptions, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        section(options)
    assert "recipe" not in caught.value.message
    assert caught.value.hint
