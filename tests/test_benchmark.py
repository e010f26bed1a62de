"""The benchmark measures what it says: the lengths, one loss in all systems, and what becomes of a result."""

import contextlib
import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import benchmark
from benchmarking import attention_check, models, pairs, report, systems
from orpo_jax import attention, flops, packing, standin
from orpo_jax.families import architecture, read_config


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A tiny model and the 16 pairs of one step."""
    folder = tmp_path_factory.mktemp("benchmark")
    model = models.write_model("tiny", folder / "model")
    made = standin.make_pairs(standin.lengths("ultrafeedback", 16, 0.06), models.SHAPES["tiny"]["vocab_size"])
    pairs.save(made, folder / "pairs.npz")
    return systems.Settings(str(model), str(folder / "pairs.npz"), "cpu", "float32", pairs=16, micro=4, warmup=0,
                            steps=1)


def one_round(name, settings):
    """Returns what one round of a system in this process finds."""
    with contextlib.closing(benchmark.run_here(name, settings)) as results:
        return next(results) | next(results)


@pytest.fixture(scope="module")
def ours(settings):
    return one_round("orpo_jax packed+shared", settings)


@pytest.mark.parametrize(("name", "drawn"), [
    ("ultrafeedback", (180, 330, 280)), ("hh", (149, 42, 52)), ("long_prompt", (1000, 200, 200))])
def test_lengths_have_their_means_and_cuts(name, drawn):
    sizes = standin.SETS[name](np.random.default_rng(0), 100_000)
    assert sizes.mean(axis=0) == pytest.approx(drawn, rel=0.02)
    cut = standin.lengths(name, 20_000)
    assert (cut[:, 0] + cut[:, 1:].max(axis=1)).max() <= standin.CUTS[name][0]
    assert (cut[:, 0] >= 2).all()
    assert standin.lengths(name, 20_000, scale=0.5).mean() == pytest.approx(cut.mean() / 2, rel=0.01)
    assert (standin.lengths(name, 50) == standin.lengths(name, 50)).all()


def test_responses_correlate():
    logs = np.log(standin.SETS["ultrafeedback"](np.random.default_rng(0), 100_000))
    assert np.corrcoef(logs.T) == pytest.approx(np.array([[1, 0, 0], [0, 1, 0.6], [0, 0.6, 1]]), abs=0.02)


def test_pairs_survive_their_file(tmp_path):
    made = standin.make_pairs(standin.lengths("hh", 20), 100)
    pairs.save(made, tmp_path / "pairs.npz")
    for before, after in zip(made, pairs.load(tmp_path / "pairs.npz"), strict=True):
        assert all((a == b).all() for a, b in zip(before[:2], after[:2], strict=True)) and before[2:] == after[2:]
        assert (before.chosen_ids[:before.shared] == before.rejected_ids[:before.shared]).all()
        assert before.chosen_ids[before.shared] != before.rejected_ids[before.shared]
    assert pairs.Pair._fields == packing.Pair._fields


def test_useful_flops_are_those_of_the_rows(settings):
    """Tokens and visible keys, counted in the rows that the trainer would make."""
    some = pairs.load(settings.pairs_file)[:6]
    rows = packing.build_rows([packing.Pair(*pair) for pair in some], [[*range(6)]], num_rows=1, row_length=1024,
                              max_pairs=6, share_prompt=True, nll_scope="sequence", nll_reduction="token")
    end = int(rows.bounds[..., 3].max())
    branches = benchmark.branches(some)
    assert (branches @ (-1, 1, 1)).sum() == end
    k, q = np.mgrid[:end, :end]
    assert flops.visible_keys(branches, None) == ((k <= q) & (q < rows.q_end[0, :end, None])).sum()
    arch = architecture(read_config(pathlib.Path(settings.model)), 64)
    spec = arch.spec
    by_hand = spec.num_layers * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 512 * 32
    assert flops.matmul_weights(arch) == by_hand


def test_trls_layout_in_jax_has_the_same_loss(settings, ours):
    """test_step.py holds the project's own layouts to one another."""
    got = one_round("JAX, TRL's layout", settings)
    assert (got["loss"], got["grad_norm"]) == pytest.approx((ours["loss"], ours["grad_norm"]), rel=1e-5)
    assert got["computed_tokens"] > ours["computed_tokens"]
    assert got["compiler_flops"] > ours["compiler_flops"]


@pytest.mark.parametrize("name", ["torch TRL", "torch TRL, grouped", "torch TRL, recompute", "torch Liger"])
def test_torch_has_the_same_loss(settings, ours, name):
    pytest.importorskip("torch", reason="torch is not installed")
    if "Liger" in name:
        pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    got = one_round(name, dataclasses.replace(settings, count_flops=False))
    assert (got["loss"], got["grad_norm"]) == pytest.approx((ours["loss"], ours["grad_norm"]), rel=1e-5)
    assert "compiler_flops" not in got


@pytest.mark.parametrize("name", ["torch TRL", "torch TRL, grouped", "torch TRL, recompute", "torch Liger"])
def test_torchs_flops_are_those_of_its_step(settings, name):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if "Liger" in name:
        pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    from benchmarking import torch_side

    settings = dataclasses.replace(settings, pairs=8, warmup=1)
    steps = torch_side.make_steps(systems.SYSTEMS[name], settings, pairs.load(settings.pairs_file),
                                  torch.device("cpu"))
    with torch_side.FlopCounterMode(display=False, custom_mapping=torch_side.ATTENTION) as counter:
        steps.step(1)
    assert steps.flops() == pytest.approx(counter.get_total_flops() / 8, rel=1e-6)


def test_heads_that_share_keys_are_counted_once_each():
    pytest.importorskip("torch", reason="torch is not installed")
    from benchmarking import torch_side

    q, k = (2, 14, 32, 64), (2, 2, 32, 64)
    assert torch_side.attention_flops(q, k, k, None, True) == 4 * 2 * 14 * 32**2 * 64
    assert torch_side.attention_backward_flops(q, q, k, k) == torch_side.attention_backward_flops(q, q, q, q) > 0


def test_all_rows_of_the_timed_steps_are_counted(settings, monkeypatch):
    """With one FLOP to a position, the FLOPs are the positions."""
    from benchmarking import jax_side

    monkeypatch.setattr(jax_side, "row_flops", lambda model, arch, row_length: float(row_length))
    got = one_round("orpo_jax concatenated", dataclasses.replace(settings, pairs=8, warmup=1))
    assert got["compiler_flops"] == sum(got["computed_tokens"]) / 8


def test_trl_loss_written_again_is_trls(settings):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("trl", reason="TRL is not installed")
    from benchmarking import torch_side

    device = torch.device("cpu")
    model = torch_side.load_model(systems.SYSTEMS["torch TRL"], settings, device)
    batch = torch_side.collate(pairs.load(settings.pairs_file)[:8], device)
    values = []
    for loss_of in (torch_side.trls_own_loss(0.3, device), torch_side.trl_loss(0.3)):
        model.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        values.append([loss.item(), *(p.grad.norm().item() for p in model.parameters())])
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_a_run_is_timed_and_counted(settings, ours):
    assert len(ours["seconds"]) == len(ours["computed_tokens"]) == settings.steps
    assert ours["compile_seconds"] > 0 and ours["peak_bytes"] > 2**20
    step = pairs.load(settings.pairs_file)
    assert (benchmark.branches(step) @ (-1, 1, 1)).sum() <= ours["computed_tokens"][0]


def test_a_process_lives_for_as_many_rounds_as_are_asked_for(settings, ours, tmp_path):
    process = benchmark.Process("orpo_jax packed+shared", dataclasses.replace(settings, alive=True), tmp_path)
    first, second = process.round(), process.round()
    process.close()
    assert first["loss"] == second["loss"] == pytest.approx(ours["loss"], rel=1e-6)
    assert first["computed_tokens"] == second["computed_tokens"] == ours["computed_tokens"]
    assert first["seconds"] != second["seconds"]
    assert "compiler_flops" in first and "compiler_flops" not in second
    assert process.process.returncode == 0


def test_a_process_that_fails_says_why(settings, tmp_path, capsys):
    result = benchmark.run_apart("orpo_jax packed", dataclasses.replace(settings, model="nowhere"), tmp_path)
    assert list(result) == ["error"] and "nowhere" in result["error"]
    assert "nowhere" in capsys.readouterr().err


WORK = report.Work(pairs=10, tokens=[100, 300], flops_per_pair=5.0, peak_flops=100.0)
RUN = {"loss": 2.0, "grad_norm": 3.0, "compile_seconds": 9.0, "computed_tokens": [50, 150], "peak_bytes": 2**30,
       "compiler_flops": 7e9}


def test_figures_compare_each_step_with_itself():
    later = {key: value for key, value in RUN.items() if key != "compiler_flops"}
    row = report.figures([RUN | {"seconds": [1.0, 4.0]}, later | {"seconds": [3.0, 2.0]}], WORK)
    assert row["pairs_per_second"] == pytest.approx(20 / 3)
    assert row["median_pairs_per_second"] == pytest.approx(20 / 5)
    assert row["tokens_per_second"] == pytest.approx(400 / 3)
    assert row["computed_tokens_per_second"] == pytest.approx(200 / 3)
    assert row["mfu"] == pytest.approx(20 / 3 * 5 / 100)
    assert row["compiler_flops_per_pair"] == 7e9


@pytest.mark.parametrize("wrong", [dict(loss=2.004), dict(grad_norm=3.01), dict(loss=float("nan"))], ids=str)
def test_a_row_of_other_work_is_void(wrong):
    run = RUN | {"seconds": [1.0, 1.0]}
    rows = {name: report.figures([run | more], WORK) for name, more in {
        "orpo_jax packed": wrong, "torch TRL": {}, "torch Liger": {"loss": 2.0001}}.items()}
    rows["torch TRL, compiled"] = {"error": "out of memory"}
    assert report.mark_void(rows, "float32") == "torch TRL"
    lines = report.table(rows).splitlines()
    assert "VOID" in lines[2] and not any("VOID" in line for line in lines[3:])
    assert "out of memory" in lines[5]
    assert len({len(line) for line in lines}) == 1


def test_results_are_written_between_marks_only(tmp_path):
    row = report.figures([RUN | {"seconds": [1.0, 1.0]}], WORK) | {"void": False}
    ours = row | {"pairs_per_second": 3 * row["pairs_per_second"], "peak_gib": row["peak_gib"] / 4}
    run = {"machine": {"name": "A CPU, 2 cores", "jax": "1.2"}, "kind": "compare", "what": "Some pairs.",
           "systems": {"torch TRL": row, "torch Liger": row | {"void": True}, report.OURS: ours}}
    assert report.save(tmp_path, "cpu-small", run).name == "a-cpu-2-cores.json"
    report.save(tmp_path, "cpu-large", run | {"systems": {"torch TRL": row, report.OURS: {"error": "out of memory"}}})
    assert list(json.loads((tmp_path / "a-cpu-2-cores.json").read_text())) == ["cpu-small", "cpu-large"]
    (readme, details), (start, end) = (tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"), report.MARKS
    details.parent.mkdir()
    for file in (readme, details):
        file.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    for _ in range(2):  # a second time changes nothing
        benchmark.main(["--readme", str(tmp_path), "--results", str(tmp_path)])
        text = details.read_text()
        assert text.startswith(f"before\n{start}\n**cpu-small**") and text.endswith(f"{end}\nafter\n")
        assert "\nold\n" not in text and text.count("| torch TRL ") == 2 == text.count("| out of memory ") * 2
        # A void peer and a run without us are left out.
        assert readme.read_text().split("\n") == [
            "before", start, "| run       | machine        | pairs/s | torch TRL     |",
            "|-----------|----------------|---------|---------------|",
            "| cpu-small | A CPU, 2 cores | 30.00   | 3.0 x in 0.25 |", end, "after", ""]
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="must hold each of these lines once"):
        benchmark.main(["--readme", str(tmp_path), "--results", str(tmp_path)])


@pytest.mark.parametrize(("file", "written"), [("README.md", report.summary), ("docs/benchmarks.md", report.markdown)])
def test_what_is_written_is_what_the_results_say(file, written):
    text = (benchmark.ROOT / file).read_text(encoding="utf-8")
    block = text.split(report.MARKS[0])[1].split(report.MARKS[1])[0]
    assert block.strip() == written(benchmark.ROOT / "tools" / "results")


def test_arguments_given_go_before_a_presets():
    args = benchmark.parse(["--preset", "cpu-small", "--steps", "7"])
    assert (args.model, args.steps, args.scale, args.title) == ("small", 7, 0.35, "cpu-small")
    for preset, values in benchmark.PRESETS.items():
        beside = [f"--{name}=given" for name, value in values.items() if value == ""]
        args = benchmark.parse(["--preset", preset, *beside])
        assert args.dtype == ("bfloat16" if args.device == "gpu" else "float32")
        assert set(benchmark.choose_systems(args)) <= set(systems.SYSTEMS)
    with pytest.raises(ValueError, match="--systems"):
        benchmark.choose_systems(benchmark.parse(["--systems", "torch", "--device", "cpu"]))


def test_what_needs_a_gpu_does_not_run_without_one(settings):
    args = benchmark.parse(["--preset", "cpu-small", "--systems", "all", "--device", "cpu"])
    left_out = set(systems.SYSTEMS) - set(benchmark.choose_systems(args))
    assert {"orpo_jax packed+shared, cudnn_mask", "torch Liger, grouped, kernels"} <= left_out
    for name in left_out:
        with pytest.raises(ValueError, match="needs a GPU"):
            benchmark.choose_systems(benchmark.parse(["--preset", "cpu-small", "--systems", name, "--device", "cpu"]))
    with pytest.raises(ValueError, match="'cudnn_mask' does not run here"):
        one_round("orpo_jax packed+shared, cudnn_mask", settings)


def test_a_preset_says_what_it_needs(capsys):
    with pytest.raises(SystemExit):
        benchmark.parse(["--preset", "smollm2-4"])
    assert "--preset smollm2-4 needs --model and --data beside it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        benchmark.parse(["--preset", "smollm2-32", "--model", "folder"])
    assert "--preset smollm2-32 needs --data beside it" in capsys.readouterr().err


def test_largest_climbs_until_nothing_fits(monkeypatch, capsys):
    """`fits` fails on the second model and on the third micro-batch; `never` fails at once."""
    monkeypatch.setattr(models, "SHAPES", {name: models.SHAPES["tiny"] for name in ("tiny", "mid", "big")})
    seen = []

    def run_apart(name, settings, folder):
        assert pathlib.Path(settings.pairs_file).is_file() and (pathlib.Path(settings.model) / "config.json").is_file()
        seen.append(name)
        fails = name == "never" or seen.count("fits") == 2 or settings.micro > 4
        return {"error": "out of memory"} if fails else {"peak_bytes": 2**31}

    monkeypatch.setattr(benchmark, "run_apart", run_apart)
    monkeypatch.setattr(benchmark, "choose_systems", lambda args: ["fits", "never"])
    benchmark.main(["--device", "cpu", "--model", "tiny", "--largest", "--micro", "2", "--pairs", "16", "--steps", "1"])
    assert seen == ["fits", "never", "fits", "fits", "never", "fits", "fits"]
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines == [
        "| fits, 2 pairs at a time | tiny | 2.0 | mid: out of memory |",
        "| never, 2 pairs at a time | none | 0.0 | tiny: out of memory |",
        "| fits, micro-batch | tiny, 4 pairs at a time | 2.0 | tiny, 8 pairs at a time: out of memory |",
        "| never, micro-batch | none | 0.0 | tiny, 2 pairs at a time: out of memory |"]


def test_no_torch_process_imports_jax():
    pytest.importorskip("torch", reason="torch is not installed")
    code = "import sys; from benchmarking import pairs, systems, torch_side; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code],
                                    cwd=benchmark.ROOT / "tools").returncode == 0


def test_attention_check_knows_right_from_wrong(capsys):
    rows = attention_check.sample_rows(128, 0.05)
    qkv = tuple(np.random.default_rng(seed).standard_normal((*rows.ids.shape, 2, 8), np.float32) for seed in range(3))
    attend = lambda q_end: lambda q, k, v: attention.row_attention(rows.positions, q_end)(
        q, k, v, None, None)[0]
    weight = np.ones_like(qkv[0])
    expected = attention_check.outputs(attend(rows.q_end), qkv, weight)
    assert attention_check.report_one("same", attend(rows.q_end), expected, qkv, weight)
    assert not attention_check.report_one("other mask", attend(np.full_like(rows.q_end, 128)), expected, qkv, weight)
    assert not attention_check.report_one("broken", lambda *_: 1 / 0, expected, qkv, weight)
    lines = capsys.readouterr().out.splitlines()
    assert ["right" in lines[0], "WRONG" in lines[1], "can't run" in lines[2]] == [True] * 3
