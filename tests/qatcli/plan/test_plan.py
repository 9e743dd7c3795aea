"""What a stage needs against what there is: predictions that move with their keys, and refusals that say what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qatcli.plan
from qatcli import machine
from qatcli.directory import CHAIN
from qatcli.errors import InputError, RecipeError, ResourceError
from qatcli.evaluation.perplexity import divergence_windows
from qatcli.models.gguf import cache_directory
from qatcli.plan import GIB, Need, need, require, setting
from qatcli.plan.model import PlannedModel, groups_of, packed_bytes
from qatcli.plan.needs import MEMORY, ZERO_SHOT, Phase, disk_bytes
from qatcli.plan.report import make_plan, render, runtimes
from qatcli.plan.timing import Rates, Work, work
from qatcli.plan.tracing import UntraceableError
from qatcli.recipe import Recipe
from qatcli.stages import STAGES

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def recipe(random_llama: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A function that makes a recipe for a random model: sections may be extended."""

    def make(**sections: dict[str, Any]) -> Recipe:
        content: dict[str, Any] = {
            "model": {"source": str(random_llama)},
            "quant": {"bits": 2, "group_size": 16},
            "calibrate": {"data": [{"source": str(tmp_path / "text.txt")}], "samples": 64, "seq_len": 64},
            "block_ap": {"amp": "float32"},
            "e2e_qp": {"amp": "float32", "seq_len": 64},
            "eval": {"perplexity": [{"name": "text", "source": str(tmp_path / "text.txt"), "seq_len": 64}]},
        }
        for name, section in sections.items():
            content[name] = {**content.get(name, {}), **section}
        (tmp_path / "text.txt").write_text("a few words")
        return Recipe.model_validate(content)

    return make


@pytest.fixture(autouse=True)
def _large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "host_memory", lambda: 100 * GIB)
    monkeypatch.setattr(machine, "device_memory", lambda _: 80 * GIB)
    monkeypatch.setattr(machine, "disk_space", lambda _: 100 * GIB)


def planned(recipe: Recipe, stage: str, device: torch.device = CPU) -> Need:
    return need(setting(recipe, device, Path("runs")), stage)


def test_every_stage_of_the_chain_is_planned() -> None:
    assert set(CHAIN) < set(MEMORY)
    assert set(MEMORY) == set(STAGES) - {"import"}


@pytest.mark.parametrize(
    ("stage", "section", "key", "less", "more"),
    [
        ("block-ap", "block_ap", "batch_size", 1, 64),
        ("block-ap", "calibrate", "samples", 64, 4096),
        ("calibrate", "calibrate", "moment_samples", 0, 64),
        ("e2e-qp", "e2e_qp", "micro_batch_size", 1, 32),
        ("e2e-qp", "e2e_qp", "seq_len", 64, 512),
        ("e2e-qp", "e2e_qp", "gradient_checkpointing", True, False),
        ("e2e-qp", "e2e_qp", "text_weight", 1, 0.5),
    ],
)
def test_memory_moves_with_its_keys(
    recipe: Callable[..., Recipe], stage: str, section: str, key: str, less: Any, more: Any
) -> None:
    sizes = [sum(phase_bytes(recipe(**{section: {key: value}}), stage)) for value in (less, more)]
    assert sizes[0] < sizes[1]


def phase_bytes(recipe: Recipe, stage: str) -> list[int]:
    s = setting(recipe, GPU, Path("runs"))
    return [sum(phase.parts(on_cpu=True).values()) for phase in MEMORY[stage](s)]


def test_what_is_kept_of_the_teacher_is_on_the_disk(recipe: Callable[..., Recipe]) -> None:
    def made(**section: Any) -> tuple[set[str], int]:
        s = setting(recipe(e2e_qp={"validation_samples": 16, "teacher_tokens": 8, **section}), GPU, Path("runs"))
        return {phase.name for phase in MEMORY["e2e-qp"](s)}, disk_bytes(s, "e2e-qp")

    (phases, disk), (text_alone, less) = made(), made(text_weight=1)
    assert phases - text_alone == {"first inputs", "full precision", "its head"}
    assert disk - less == (4096 + 16) * 64 * (8 * 6 + 4)


def test_the_stream_of_the_teacher_is_placed(recipe: Callable[..., Recipe]) -> None:
    cache = {"device_gb": 0, "host_gb": 0}
    (stream,) = planned(recipe(block_ap={"cache": cache}), "e2e-qp", GPU).streams
    assert stream.place == "file"
    assert stream.bytes == 256 * 64 * 32 * 4
    assert planned(recipe(e2e_qp={"text_weight": 1}), "e2e-qp", GPU).streams == ()


@pytest.mark.parametrize("fitting", [True, False])
def test_full_precision_that_does_not_fit_is_evaluated_by_blocks(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, fitting: bool
) -> None:
    monkeypatch.setattr(qatcli.plan.needs, "fits", lambda *_: fitting)
    asked = {"baselines": ["full_precision"], "speed": None}
    s = setting(recipe(eval=asked), GPU, Path("runs"))
    phases = {phase.name: phase for phase in MEMORY["eval"](s)}
    measured = phases["measuring"].compute["measured model"]
    assert set(phases) - {"measuring"} == (set() if fitting else {"first inputs", "full precision", "its head"})
    assert (measured == s.model.total * s.measured_itemsize) == fitting
    assert [stream.bytes for stream in s.streams("eval")] == ([] if fitting else [256 * 64 * 32 * 2])
    alone = recipe(eval={**asked, "baselines": ["block_ap"], "kl": False})
    assert not setting(alone, GPU, Path("runs")).measures_by_blocks


def test_a_gpu_takes_what_a_cpu_has_in_its_own_memory(recipe: Callable[..., Recipe]) -> None:
    on_cpu, on_gpu = (planned(recipe(), "block-ap", device) for device in (CPU, GPU))
    assert on_cpu.device is None
    assert on_gpu.device is not None
    assert on_gpu.device < sum(on_cpu.parts.values())
    assert {stream.place for stream in on_cpu.streams} == {"host"}


@pytest.mark.parametrize(
    ("cache", "places"),
    [
        ({"device_gb": 1, "host_gb": 1}, {"device"}),
        ({"device_gb": 0, "host_gb": 1}, {"host"}),
        ({"device_gb": 0, "host_gb": 0}, {"file"}),
        ({"device_gb": 0.0007, "host_gb": 0}, {"device", "file"}),
    ],
)
def test_streams_go_where_the_budget_lets_them(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, cache: dict[str, float], places: set[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = planned(recipe(block_ap={"cache": cache}), "block-ap", GPU)
    assert {stream.place for stream in found.streams} == places
    assert found.cache == sum(stream.bytes for stream in found.streams if stream.place == "file")


def check(recipe: Recipe, stage: str, tmp_path: Path) -> str | None:
    return require(recipe, stage, "", device=CPU, out=tmp_path / "run" / "stage.partial")


@pytest.mark.parametrize("stage", [*CHAIN, "export", "import"])
def test_a_large_machine_refuses_nothing(recipe: Callable[..., Recipe], tmp_path: Path, stage: str) -> None:
    assert check(recipe(), stage, tmp_path) is None


@pytest.mark.parametrize(
    ("stage", "knob"),
    [("block-ap", "block_ap.batch_size"), ("e2e-qp", "e2e_qp.micro_batch_size"), ("eval", "eval.kl")],
)
def test_too_little_memory_names_the_figures_and_the_knob(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, knob: str
) -> None:
    monkeypatch.setattr(machine, "host_memory", lambda: 2**20)
    with pytest.raises(
        ResourceError, match=rf"{stage} needs about \d\.\d GiB of host memory, and 0\.0 GiB are free; most of it: "
    ) as e:
        check(recipe(), stage, tmp_path)
    assert e.value.exit_code == 6
    assert e.value.hint is not None
    assert knob in e.value.hint
    assert not (tmp_path / "run").exists()


def test_within_the_margin_it_warns(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beyond = planned(recipe(), "block-ap")
    size = sum(beyond.parts.values())
    monkeypatch.setattr(machine, "host_memory", lambda: int(size * 0.9))
    found = check(recipe(block_ap={"cache": {"host_gb": 1}}), "block-ap", tmp_path)
    assert found is not None
    assert "if it fails" in found


def test_too_little_disk_counts_what_is_there_already(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = planned(recipe(), "block-ap").disk
    monkeypatch.setattr(machine, "disk_space", lambda _: size // 2)
    with pytest.raises(ResourceError, match="GiB of disk at") as caught:
        check(recipe(), "block-ap", tmp_path)
    assert "--run" in (caught.value.hint or "")
    out = tmp_path / "run" / "stage.partial"
    out.mkdir(parents=True)
    (out / "model-block-0000.safetensors").write_bytes(bytes(size - size // 2))
    assert check(recipe(), "block-ap", tmp_path) is None


def test_what_is_trained_already_does_without_the_full_precision_model(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any) -> None:
        raise InputError("owner/name could not be fetched from the hub")

    monkeypatch.setattr(qatcli.plan, "setting", unreachable)
    for stage, variant in (("pack", ""), ("export", "gguf")):
        doubt = require(recipe(), stage, variant, device=CPU, out=tmp_path)
        assert "could not be fetched" in (doubt or "")
    with pytest.raises(InputError, match="could not be fetched"):
        require(recipe(), "e2e-qp", "", device=CPU, out=tmp_path)


def test_files_of_streams_need_disk(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = recipe(block_ap={"cache": {"host_gb": 0, "dir": str(tmp_path / "cache")}})
    found = planned(chosen, "block-ap")
    assert found.cache > 0
    monkeypatch.setattr(machine, "disk_space", lambda _: found.disk + found.cache // 2)
    with pytest.raises(ResourceError, match="disk"):
        check(chosen, "block-ap", tmp_path)


def test_the_plan_as_json_and_as_a_table(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qatcli.plan.report, "measure_rates", lambda *_: Rates(1e9, 1e9))
    found = make_plan(recipe(export={"formats": ["native", "gptq"]}), CPU, Path("runs"))
    assert [row["stage"] for row in found["stages"]] == [*CHAIN, "export native", "export gptq"]
    assert json.loads(json.dumps(found)) == found
    assert found["short_of"] == []
    for row in found["stages"]:
        assert row["host"] > sum(row["parts"].values()) > 0
        assert row["device"] is None
    assert found["seconds"] == pytest.approx(sum(row["seconds"] or 0 for row in found["stages"]))
    assert {"native", "dense", "compressed-tensors"} == set(found["runtimes"])  # 48 columns, no multiple of 32
    assert list(found["refused"]) == ["gptq"]
    assert "multiples of 32" in found["refused"]["gptq"]
    text = "".join(str(cell) for table in render(found).renderables for c in table.columns for cell in c.cells)  # type: ignore[union-attr]
    assert "block-ap" in text
    assert "vLLM" in text
    assert "NO EXPORT to gptq: " in str(render(found).renderables[0].caption)  # type: ignore[union-attr]


ANY = {"native", "dense", "compressed-tensors"}


@pytest.mark.parametrize(
    ("quant", "export", "formats"),
    [
        ({"bits": 2, "group_size": 32}, {}, {"gptq", "bitblas", "gguf", "mlx"}),
        ({"bits": 2, "group_size": 16}, {}, {"gptq"}),
        ({"bits": 4, "group_size": 32}, {}, {"gptq", "bitblas", "gguf", "awq", "mlx"}),
        ({"bits": 4, "group_size": -1}, {}, {"gptq", "bitblas", "gguf"}),
        ({"bits": 4, "group_size": -1}, {"awq_promote": True}, {"gptq", "bitblas", "gguf", "awq"}),
        ({"bits": 2, "group_size": 32}, {"gguf_type": "Q4_0"}, {"gptq", "bitblas", "gguf", "mlx"}),
        ({"bits": 2, "group_size": 32}, {"gguf_type": "Q2_0"}, {"gptq", "bitblas", "mlx"}),  # in blocks of 64
        ({"bits": 8, "group_size": 32}, {}, {"gptq", "bitblas", "mlx"}),
    ],
)
def test_only_formats_that_will_be_written_are_promised(
    recipe: Callable[..., Recipe],
    save_random_model: Callable[..., Path],
    quant: dict[str, Any],
    export: dict[str, Any],
    formats: set[str],
) -> None:
    model = {"source": str(save_random_model("LlamaConfig", intermediate_size=64, head_dim=16))}
    s = setting(recipe(model=model, quant=quant, export=export), CPU, Path("runs"))
    assert set(runtimes(s)) == ANY | formats


def test_an_architecture_that_llama_cpp_lacks_has_no_gguf(
    recipe: Callable[..., Recipe], save_random_model: Callable[..., Path]
) -> None:
    model = {"source": str(save_random_model("OlmoConfig", intermediate_size=64, num_key_value_heads=4))}
    s = setting(recipe(model=model, quant={"group_size": 32}), CPU, Path("runs"))
    assert set(runtimes(s)) == ANY | {"gptq", "bitblas"}


def test_servers_that_merge_a_skipped_linear_are_not_promised(
    recipe: Callable[..., Recipe], save_random_model: Callable[..., Path]
) -> None:
    model = {"source": str(save_random_model("LlamaConfig", intermediate_size=64, head_dim=16))}
    quant = {"bits": 4, "group_size": 32, "skip": ["*v_proj"]}
    found = runtimes(setting(recipe(model=model, quant=quant), CPU, Path("runs")))
    for name in ("gptq", "awq", "compressed-tensors"):
        commands = {row.runtime: row.command for row in found[name]}
        assert (commands["vLLM"], commands["SGLang"]) == ("", "")


def test_outputs_that_fill_the_disk_together(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(qatcli.plan.report, "measure_rates", lambda *_: Rates(1e9, 1e9))
    chosen = recipe(export={"formats": ["native", "gptq"]})
    total = make_plan(chosen, CPU, tmp_path / "run")["disk"]
    monkeypatch.setattr(machine, "disk_space", lambda _: total - 1)
    (sentence,) = make_plan(chosen, CPU, tmp_path / "run")["short_of"]
    assert sentence.startswith(f"NOT ENOUGH: the whole chain needs {total / GIB:.2f} GiB of disk")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "done").write_bytes(b"1")
    assert make_plan(chosen, CPU, tmp_path / "run")["short_of"] == []


def test_what_this_process_holds_is_not_needed_again(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qatcli.plan.report, "measure_rates", lambda *_: Rates(1e9, 1e9))
    rows = make_plan(recipe(), CPU, Path("runs"))["stages"]
    most = max(sum(row["parts"].values()) for row in rows)
    assert most + GIB // 8 < max(row["host"] for row in rows)
    monkeypatch.setattr(machine, "host_memory", lambda: most + GIB // 8)
    assert make_plan(recipe(), CPU, Path("runs"))["short_of"] == []
    monkeypatch.setattr(machine, "host_memory", lambda: most // 2)
    assert make_plan(recipe(), CPU, Path("runs"))["short_of"]


def test_the_gptq_baseline_is_planned_before_the_evaluation(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qatcli.plan.report, "measure_rates", lambda *_: Rates(1e9, 1e9))
    found = make_plan(recipe(eval={"baselines": ["gptq"]}), CPU, Path("runs"))
    rows = {row["stage"]: row for row in found["stages"]}
    assert list(rows)[:6] == [*CHAIN[:-1], "block-ap gptq", "eval"]
    assert rows["block-ap gptq"]["disk"] == rows["block-ap"]["disk"]
    assert 0 < rows["block-ap gptq"]["operations"] < rows["block-ap"]["operations"]
    assert found["disk"] == sum(row["disk"] for row in rows.values())


def test_a_plan_for_a_gpu_that_is_elsewhere(recipe: Callable[..., Recipe]) -> None:
    found = make_plan(recipe(), GPU, Path("runs"))
    if not torch.cuda.is_available():
        assert found["seconds"] is None
        assert found["free"]["device"] is None
    assert all(row["device"] is not None for row in found["stages"])


def test_seconds_add_up() -> None:
    assert Work(10, 6).seconds(Rates(5, 2)) == 5


def test_a_model_that_cannot_be_traced_is_a_doubt_and_not_an_error(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operations that have no shapes without data: the plan says so, and the stage goes on."""

    def unknown(*_: object, **__: object) -> None:
        raise RuntimeError("no meta kernel for this")

    monkeypatch.setattr("qatcli.plan.model.trace", unknown)
    untraced = recipe(calibrate={"seq_len": 48})
    doubt = require(untraced, "calibrate", "", device=CPU, out=tmp_path / "calibrate.partial")
    assert doubt is not None
    assert "no meta kernel for this" in doubt
    with pytest.raises(UntraceableError, match="no meta kernel"):
        make_plan(untraced, CPU, tmp_path)


def test_what_does_not_suit_the_model_is_refused_by_the_plan_too(recipe: Callable[..., Recipe]) -> None:
    for sections, said in (
        ({"quant": {"group_size": 64}}, "group size 64 does not divide"),
        ({"quant": {"overrides": [{"pattern": "down_proj", "bits": 4}]}}, "matches no linear"),
        ({"calibrate": {"seq_len": 10**5}}, r"calibrate\.seq_len = 100000: the model has a context of"),
        ({"e2e_qp": {"seq_len": 10**5}}, r"e2e_qp\.seq_len = 100000: the model has a context of"),
    ):
        with pytest.raises(RecipeError, match=said):
            make_plan(recipe(**sections), CPU, Path("runs"))
    with pytest.raises(RecipeError, match="e2e_qp"):
        require(recipe(e2e_qp={"seq_len": 10**5}), "e2e-qp", "", device=CPU, out=Path("runs"))
    require(recipe(e2e_qp={"seq_len": 10**5}), "calibrate", "", device=CPU, out=Path("runs"))


def test_all_that_an_evaluation_does_takes_time(recipe: Callable[..., Recipe]) -> None:
    def evaluation(**section: Any) -> Work:
        return work(setting(recipe(eval={"kl": False, "speed": None, **section}), CPU, Path("runs")))["eval"]

    least = evaluation()
    for section in ({"kl": True}, {"zero_shot": {"tasks": ["piqa"]}}, {"speed": {}}):
        assert evaluation(**section).operations > least.operations, section
    assert evaluation(zero_shot={"tasks": ["piqa"], "limit": 10}).operations < evaluation(zero_shot={}).operations
    for section in ({"speed": {}}, {"prompts": ["a"]}):
        assert evaluation(**section).bytes > least.bytes, section


def test_what_adam_and_the_best_iterate_keep(recipe: Callable[..., Recipe]) -> None:
    s = setting(recipe(), GPU, Path("runs"))
    (training,) = [phase for phase in MEMORY["block-ap"](s) if phase.name == "training"]
    trained = s.model.block_sizes[s.model.largest] + 2 * groups_of(s.model.quants[s.model.largest].values())
    assert training.compute["optimizer"] == 2 * 4 * trained
    assert training.compute["best iterate"] == 4 * trained


def test_a_new_state_of_e2e_qp_is_written_beside_the_old_one(recipe: Callable[..., Recipe]) -> None:
    s = setting(recipe(e2e_qp={"text_weight": 1}), GPU, Path("runs"))
    windows = (s.recipe.e2e_qp.samples + s.recipe.e2e_qp.validation_samples) * s.recipe.e2e_qp.seq_len
    states = disk_bytes(s, "e2e-qp") - disk_bytes(s, "block-ap") - 4 * windows
    assert states == 2 * 16 * groups_of(s.model.linears.values())
    assert disk_bytes(s, "export", "dense") == 2 * s.model.total


def test_decoding_on_a_gpu_keeps_a_second_copy_of_the_codes(recipe: Callable[..., Recipe]) -> None:
    sizes = []
    for speed in ({}, None):
        s = setting(recipe(eval={"speed": speed, "baselines": [], "kl": False}), GPU, Path("runs"))
        (measuring,) = MEMORY["eval"](s)
        sizes.append(measuring.compute["measured model"])
    assert sizes[0] - sizes[1] == sum(packed_bytes(quant, scale=0) for quant in s.model.linears.values())


def test_full_precision_is_not_beside_what_a_gpu_measures(recipe: Callable[..., Recipe]) -> None:
    def measuring(device: torch.device, **section: Any) -> Phase:
        (phase,) = MEMORY["eval"](setting(recipe(eval={"speed": None, **section}), device, Path("runs")))
        return phase

    on_cpu, on_gpu = (measuring(device, kl=True) for device in (CPU, GPU))
    text, model = recipe().eval.perplexity[0], setting(recipe(), GPU, Path("runs")).model
    assert on_cpu.compute["full precision"] > 0 == on_gpu.compute["full precision"]
    windows = min(divergence_windows(text.seq_len), text.windows or 10**9)
    assert on_gpu.host["full-precision logits"] == windows * text.seq_len * model.vocabulary * 2
    assert on_gpu.host["reading"] > 0
    none = measuring(GPU, kl=False, baselines=["block_ap"])
    assert none.host["full-precision logits"] == 0 < none.host["reading"] < on_gpu.host["reading"]


def test_logits_that_are_not_compared_take_no_memory(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    s = setting(recipe(), CPU, Path("runs"))
    comparing = [phase.host["dense model"] for phase in MEMORY["export"](s) if phase.name == "comparing"]
    assert comparing == [4 * s.model.total]
    monkeypatch.setattr(machine, "host_memory", lambda: 4 * s.model.total)
    comparing = [phase.host["dense model"] for phase in MEMORY["export"](s) if phase.name == "comparing"]
    assert comparing == [0]


def test_questions_take_memory_for_a_row_of_them_and_for_the_harness(recipe: Callable[..., Recipe]) -> None:
    def measuring(**section: Any) -> Phase:
        quiet = {"perplexity": [], "kl": False, "speed": None}
        (phase,) = MEMORY["eval"](setting(recipe(eval={**quiet, **section}), CPU, Path("runs")))
        return phase

    none, short, long = (measuring(zero_shot=z) for z in (None, {"batch_tokens": 256}, {"batch_tokens": 512}))
    assert sum(short.host.values()) - sum(none.host.values()) == ZERO_SHOT
    assert none.work["work"] == 0 < 1.9 * short.work["work"] < long.work["work"]


def test_files_of_streams_need_a_disk_of_their_own(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    chosen = recipe(block_ap={"cache": {"host_gb": 0, "dir": str(cache)}})
    found = planned(chosen, "block-ap")
    monkeypatch.setattr(machine, "existing", lambda path: Path("/proc" if path == cache else "/"))
    monkeypatch.setattr(machine, "disk_space", lambda path: found.cache // 2 if path == cache else 2**50)
    with pytest.raises(ResourceError, match=r"disk at .*/cache"):
        check(chosen, "block-ap", tmp_path)


def test_converting_a_gguf_file_takes_the_whole_model_in_fp32(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    s = setting(recipe(), CPU, Path("runs"))
    before = need(s, "calibrate").host
    with monkeypatch.context() as patch:  # the model is kept for other tests
        patch.setattr(PlannedModel, "to_convert", True)
        assert need(s, "calibrate").host >= 4 * s.model.total
        assert "converting" in {phase.name for phase in MEMORY["calibrate"](s)}
    assert need(s, "calibrate").host == before


def test_a_converted_gguf_file_needs_disk_beside_what_the_stage_writes(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = setting(recipe(), CPU, tmp_path).model
    both = 4 * model.total + planned(recipe(), "calibrate").disk
    monkeypatch.setattr(machine, "disk_space", lambda _: both * 3 // 4)
    assert check(recipe(), "calibrate", tmp_path) is None
    monkeypatch.setattr(PlannedModel, "to_convert", True)
    with pytest.raises(ResourceError, match=f"disk at {tmp_path}/run"):
        check(recipe(), "calibrate", tmp_path)
    assert check(recipe(), "block-ap", tmp_path) is None


def test_a_converted_gguf_file_needs_the_disk_of_the_cache(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kept = setting(recipe(), CPU, tmp_path).model, cache_directory()
    monkeypatch.setattr(PlannedModel, "to_convert", True)
    monkeypatch.setattr(machine, "existing", lambda path: Path("/proc" if path == kept else "/"))
    monkeypatch.setattr(machine, "disk_space", lambda path: 3 * model.total if path == kept else 2**50)
    with pytest.raises(ResourceError, match=f"disk at {kept}") as caught:
        check(recipe(), "calibrate", tmp_path)
    assert "XDG_CACHE_HOME" in (caught.value.hint or "")


def test_a_folder_of_texts_is_as_large_as_its_files(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, name in enumerate(("a.jsonl", "b.jsonl.gz")):
        with open(folder / name, "wb") as file:
            file.truncate(10**6 * (number + 1))

    def read(source: str) -> int:
        (phase,) = [
            p for p in MEMORY["calibrate"](setting(with_data(source), CPU, Path("runs"))) if p.name == "reading text"
        ]
        return phase.host["text"]

    def with_data(source: str) -> Recipe:
        return recipe(calibrate={"data": [{"source": source}]})

    plain, packed, both = (read(str(place)) for place in (folder / "a.jsonl", folder / "b.jsonl.gz", folder))
    assert packed - plain == 2 * 7 * 10**6, "gzip makes a quarter of a text"
    assert both - packed == 2 * 10**6


@pytest.mark.parametrize(
    ("text", "windows"),
    [({}, 1000), ({"windows": 7}, 7), ({"source": "c4"}, 256), ({"source": "wikitext2"}, 1_290_000 // 4 // 64)],
)
def test_a_whole_text_has_as_many_windows_as_its_size_says(
    recipe: Callable[..., Recipe], tmp_path: Path, text: dict[str, Any], windows: int
) -> None:
    (tmp_path / "long.txt").write_bytes(bytes(4 * 64 * 1000))
    section = {"name": "text", "source": str(tmp_path / "long.txt"), "seq_len": 64, **text}
    quiet = {"kl": False, "speed": None}
    counted = work(setting(recipe(eval={"perplexity": [section], **quiet}), CPU, Path("runs")))["eval"].operations
    one = work(setting(recipe(eval={"perplexity": [{**section, "windows": 1}], **quiet}), CPU, Path("runs")))["eval"]
    none = work(setting(recipe(eval={"perplexity": [], **quiet}), CPU, Path("runs")))["eval"].operations
    assert (counted - none) / (one.operations - none) == pytest.approx(windows)
