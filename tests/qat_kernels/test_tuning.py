"""Launch settings: which rule counts, which file a GPU gets, and the command that writes one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from qat_kernels import candidates, timing, tune, tuning

RULES: list[dict[str, Any]] = [
    {"up_to_m": 1, "n": 4096, "k": 4096, "use": {"rows": 4}},
    {"up_to_m": 1, "n": 8192, "k": 8192, "bits": [2], "use": {"rows": 8}},
    {"up_to_m": 4, "use": {"rows": 1}},
    {"use": {"rows": 2}},
]


def table(**changes: Any) -> tuning.Table:
    fields: dict[str, Any] = {"path": Path("x"), "devices": (), "timed": True, "routes": {}, "settings": {"k": RULES}}
    return tuning.Table(**{**fields, **changes})


@pytest.mark.parametrize(
    ("bits", "m", "n", "k", "rows"),
    [
        (2, 1, 4096, 4096, 4),
        (2, 1, 8192, 8192, 8),
        (2, 1, 28672, 8192, 8),  # the nearer shape
        (3, 1, 8192, 8192, 4),  # the rule for 8192 is for 2 bits
        (2, 2, 4096, 4096, 1),
        (2, 5, 4096, 4096, 2),
    ],
)
def test_the_closest_rule_counts(bits: int, m: int, n: int, k: int, rows: int) -> None:
    assert table().pick("k", bits=bits, m=m, n=n, k=k) == {"rows": rows}


def test_a_route_is_the_first_kernel_whose_limit_is_not_passed() -> None:
    routes = table(routes={"op": {"gemv": 4, "matmul": 64}})
    assert [routes.route("op", m) for m in (1, 4, 5, 64, 65)] == ["gemv", "gemv", "matmul", "matmul", "dense"]
    assert routes.route("op", 1, without="gemv") == "matmul"


def test_shipped_files_are_complete() -> None:
    files = sorted(tuning.CONFIGS.glob("*.json"))
    assert tuning.CONFIGS / "default.json" in files
    for path in files:
        shipped = tuning.load(path)
        assert bool(shipped.devices) == (path.stem != "default"), path
        assert set(shipped.settings) == set(tune.BATCHES)
        assert {name: tuple(limits) for name, limits in shipped.routes.items()} == tune.ROUTES
        for kernel in shipped.settings:
            for bits in (2, 3, 4, 8):
                for m in (1, 3, 16, 5000):
                    assert shipped.pick(kernel, bits=bits, m=m, n=576, k=1536)
    assert not tuning.default().timed


def test_an_unknown_gpu_gets_the_default_and_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.loads((tuning.CONFIGS / "default.json").read_text())
    for stem, devices in [("default", []), ("a", ["NVIDIA L4"]), ("b", ["NVIDIA H100"]), ("c", ["NVIDIA H100 80GB"])]:
        (tmp_path / f"{stem}.json").write_text(json.dumps({**text, "devices": devices}))
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    tuning.table_for_name.cache_clear()
    try:
        assert tuning.table_for_name("NVIDIA H100 80GB HBM3").path.stem == "c", "the longest of two"
        assert tuning.table_for_name("NVIDIA H100").path.stem == "b"
        assert tuning.table_for_name("NVIDIA L4").path.stem == "a"
        assert tuning.table_for_name("NVIDIA H100-SXM5-80GB").path.stem == "b"
        for other in ("NVIDIA L40S", "NVIDIA H1000"):  # their names only begin alike
            with pytest.warns(UserWarning, match=f"no kernel settings for {other}"):
                assert tuning.table_for_name(other).path.stem == "default"
        with pytest.warns(UserWarning, match=r"no kernel settings for Other GPU.*python -m qat_kernels\.tune"):
            assert tuning.table_for_name("Other GPU").path.stem == "default"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tuning.table_for_name("Other GPU")
    finally:
        tuning.table_for_name.cache_clear()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"format_version": 7}', r"format_version must be 1\. Got: 7"),
        ('{"format_version": 1, "devices": [', "JSONDecodeError"),
        ('{"format_version": 1, "devices": []}', "timed"),
        ("[]", "TypeError"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused_by_name(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"x\.json is not a file of kernel settings: .*{why}"):
        tuning.load(path)


def test_a_batch_without_a_rule_is_named() -> None:
    with pytest.raises(ValueError, match="x: no settings of k for 4 bits and 5 rows"):
        table(settings={"k": RULES[:3]}).pick("k", bits=4, m=5, n=64, k=64)


@pytest.mark.parametrize("kernel", list(tune.BATCHES))
def test_there_are_candidates_for_every_shape_and_few_for_each(kernel: str) -> None:
    for bits in (2, 3, 4, 8):
        for m in (1, 2, 16, 64, 4096):
            for n, k in ((64, 128), (576, 1536), (4096, 11008), (16384, 16384)):
                found = candidates.candidates(kernel, bits=bits, m=m, n=n, k=k)
                assert 1 <= len(found) <= 24, (kernel, bits, m, n, k)
                assert all(value > 0 for use in found for value in use.values())


@pytest.mark.slow
def test_the_command_writes_a_file_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times come from a clock of the test's own: the second candidate of each kernel is the fastest."""
    asked: list[int] = []

    def seconds(device: object, calls: list[timing.Call], *, repeats: int) -> float:
        asked.append(len(calls))
        return 1.0 if len(asked) % 2 else 0.5

    def two(kernel: str, **shape: int) -> list[dict[str, int]]:
        return candidates.candidates(kernel, **shape)[:2]

    monkeypatch.setattr(timing, "seconds", seconds)
    monkeypatch.setattr(tune, "candidates", two)
    monkeypatch.setattr(tune, "BATCHES", dict.fromkeys(tune.BATCHES, (16,)) | {"gemv": (1, 2)})
    monkeypatch.setattr(tune, "CROSSOVERS", (1, 2))
    path = tmp_path / "some-gpu.json"
    tune.main(["--shape", "64x128", "--bits", "2", "--out", str(path)])
    written = tuning.load(path)
    assert written.timed
    assert set(written.settings) == set(tune.BATCHES)
    for kernel, rules in written.settings.items():
        measured = [rule for rule in rules if "us" in rule]
        others = [rule for rule in rules if "us" not in rule]
        assert measured
        assert all(rule["bits"] == [3, 4, 8] for rule in others)
        assert bool(others) == ("fake_quant" not in kernel)
        for rule in measured:
            assert rule["us"] == 500_000.0
            expected = two(kernel, bits=2, m=rule.get("up_to_m", 2 if kernel == "gemv" else 16), n=64, k=128)
            assert rule["use"] == expected[1]
    gemv = [rule for rule in written.settings["gemv"] if "us" in rule]
    assert [rule.get("up_to_m") for rule in gemv] == [1, None]
    assert written.pick("gemv", bits=2, m=1, n=64, k=128) == gemv[0]["use"]
    assert max(map(len, path.read_text().splitlines())) < 250
    assert len(path.read_text().splitlines()) < 70


def test_what_was_measured_before_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run for another width, and one that measures a single kernel, add to the file."""
    times = iter(range(1, 10_000))
    monkeypatch.setattr(timing, "seconds", lambda *_, **__: float(next(times)))
    monkeypatch.setattr(tune, "candidates", lambda kernel, **shape: candidates.candidates(kernel, **shape)[:1])
    monkeypatch.setattr(tune, "BATCHES", {"fake_quant": (0,), "gemv": (1,)})
    path = tmp_path / "gpu.json"
    for bits in ("2", "4"):
        tune.main(["--shape", "64x128", "--kernel", "gemv", "--bits", bits, "--out", str(path)])
    written = tuning.load(path)
    assert sorted(rule["bits"] for rule in written.settings["gemv"] if "us" in rule) == [[2], [4]]
    assert written.settings["matmul"] == tuning.default().settings["matmul"]
    assert written.routes == tuning.default().routes


def test_an_interrupted_tuning_leaves_a_file_for_every_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop_at_4_bits(device: object, bits: int, n: int, k: int) -> tune.Problem:
        if bits == 4:
            raise KeyboardInterrupt
        return problem(device, bits, n, k)

    problem = tune.Problem
    monkeypatch.setattr(tune, "Problem", stop_at_4_bits)
    monkeypatch.setattr(timing, "seconds", lambda *_, **__: 1.0)
    monkeypatch.setattr(tune, "candidates", lambda kernel, **shape: candidates.candidates(kernel, **shape)[:1])
    monkeypatch.setattr(tune, "BATCHES", {"gemv": (1,)})
    path = tmp_path / "gpu.json"
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--shape", "64x128", "--bits", "2", "--bits", "4", "--out", str(path)])
    written = tuning.load(path)
    assert [rule["bits"] for rule in written.settings["gemv"] if "us" in rule] == [[2]]
    assert all(written.pick("gemv", bits=bits, m=1, n=64, k=128) for bits in (2, 3, 4, 8))


def test_a_width_that_was_not_measured_to_the_last_batch_keeps_what_was_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else no rule would be left for larger batches."""
    calls = tune.Problem._call

    def fails(self: tune.Problem, kernel: str, x: torch.Tensor, *rest: Any) -> tune.Call:
        if self.bits == 3 and len(x) == 2:
            raise RuntimeError("out of resources")
        return calls(self, kernel, x, *rest)

    monkeypatch.setattr(tune.Problem, "_call", fails)
    monkeypatch.setattr(timing, "seconds", lambda *_, **__: 1.0)
    monkeypatch.setattr(tune, "candidates", lambda kernel, **shape: candidates.candidates(kernel, **shape)[:1])
    monkeypatch.setattr(tune, "BATCHES", {"gemv": (1, 2)})
    path = tmp_path / "gpu.json"
    with pytest.raises(SystemExit, match="1"):
        tune.main(["--shape", "64x128", "--kernel", "gemv", "--bits", "2", "--bits", "3", "--out", str(path)])
    written = tuning.load(path)
    assert {tuple(rule["bits"]) for rule in written.settings["gemv"] if "us" in rule} == {(2,)}
    assert written.pick("gemv", bits=3, m=4, n=64, k=128) == tuning.default().pick("gemv", bits=3, m=4, n=64, k=128)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "Problem", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="2"):
        tune.main(["--shape", "64x128", "--out", str(tmp_path / "missing" / "gpu.json")])
    assert "name a file elsewhere with --out" in capsys.readouterr().err


def test_a_wrong_result_is_reported_and_the_rest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gemv, results = tune.Problem._call, iter((1.0, -1.0))

    def wrong(self: tune.Problem, kernel: str, *rest: Any) -> tune.Call:
        call = gemv(self, kernel, *rest)
        return (lambda: call() * next(results)) if kernel == "gemv" else call

    monkeypatch.setattr(tune.Problem, "_call", wrong)
    monkeypatch.setattr(timing, "seconds", lambda *_, **__: 1.0)
    monkeypatch.setattr(tune, "candidates", lambda kernel, **shape: candidates.candidates(kernel, **shape)[:2])
    monkeypatch.setattr(tune, "BATCHES", {"gemv": (1,), "input_grad": (16,)})
    path = tmp_path / "gpu.json"
    with pytest.raises(SystemExit, match="1"):
        tune.main(["--shape", "64x128", "--bits", "2", "--out", str(path)])
    assert "gemv 2 bits 64x128, 1 rows: Tensor-likes are not close!" in capsys.readouterr().err
    assert any("us" in rule for rule in tuning.load(path).settings["input_grad"])
