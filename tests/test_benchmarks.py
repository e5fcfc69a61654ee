"""The suite refuses to report what is wrong, finds its cases, and gives a complete record of what is right."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import benchmarks
import flowkernels as fk
from benchmarks import compare, core, growth, machine, plain, report, show, targets
from flowkernels.models import MAF

FAST = core.Options(seconds=0.01, skip=("torch.compile",))
RATES = {"copy_gbs": 10.0, "gemm_gflops": 100.0}


@pytest.fixture
def no_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ceilings", lambda: RATES)


def pick(op: str, what: str) -> core.Case:
    """The smallest quick case of that kind."""
    return min((c for c in core.all_cases(True, [op]) if c.what == what), key=lambda c: c.size.get("D", 0))


def test_every_operator_file_is_found() -> None:
    assert {"maf", "affine_coupling", "masked_linear", "growth"} <= set(core.modules())
    for quick in (True, False):
        ids = [case.id for case in core.all_cases(quick)]
        assert len(ids) == len(set(ids))


def test_an_unknown_operator_is_named() -> None:
    with pytest.raises(ValueError, match=r"op must be one of .*maf.*, got 'nothing'"):
        core.all_cases(True, ["nothing"])


@pytest.mark.parametrize(
    ("op", "what"),
    [
        ("affine_coupling", "forward"),
        ("affine_coupling", "forward+backward"),
        ("masked_linear", "forward+backward"),
        ("maf", "sampling"),
        ("maf", "log_prob"),
    ],
)
def test_a_right_case_gives_complete_figures(op: str, what: str) -> None:
    record = core.run_case(pick(op, what), FAST, RATES)
    assert record["status"] == "ok", record
    assert not [note for note in record["notes"] if "left out" in note]
    names = [v["name"] for v in record["variants"]]
    assert names[:2] == ["flowkernels", "PyTorch"]
    for v in record["variants"]:
        assert 0 < v["p20"] <= v["p50"] <= v["p80"]
        assert v["calls"] >= core.FEWEST
        assert v["error"] < 1e-4
        assert v["gbs"] > 0
        assert v["ceiling"] > 0
    json.dumps(record)


def _off_by_a_little(op: Any) -> Any:
    def wrong(*args: Any, **keywords: Any) -> Any:
        out = op(*args, **keywords)
        return out * 1.001 if isinstance(out, Tensor) else tuple(t * 1.001 for t in out)

    return wrong


@pytest.mark.parametrize(
    ("op", "what", "where", "name"),
    [
        ("affine_coupling", "forward", fk.ops, "affine_coupling"),
        ("affine_coupling", "forward+backward", fk.ops, "affine_coupling"),
        ("masked_linear", "forward", fk.ops, "masked_linear"),
        ("maf", "sampling", fk.models.autoregressive, "run_chain"),
        ("maf", "log_prob", fk.models.autoregressive, "run_chain"),
        ("maf", "training step", fk.models.autoregressive, "run_chain"),
        ("maf", "sampling+gradient", fk.models.autoregressive, "run_chain"),
    ],
)
def test_a_broken_operator_gets_no_figures(
    op: str, what: str, where: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = pick(op, what)
    monkeypatch.setattr(where, name, _off_by_a_little(getattr(where, name)))
    record = core.run_case(case, FAST, RATES)
    assert record["status"] == "wrong"
    assert record["message"].startswith("flowkernels: error ")
    assert record["variants"] == []


def test_a_broken_gradient_gets_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fk.ops.affine_coupling

    def wrong(x: Tensor, shift: Tensor, scale: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
        y, logdet = right(x, shift, scale, **keywords)
        return y + 0.01 * (shift - shift.detach()), logdet  # the value is right, the gradient of shift is not

    monkeypatch.setattr(fk.ops, "affine_coupling", wrong)
    assert core.run_case(pick("affine_coupling", "forward"), FAST, RATES)["status"] == "ok"
    assert core.run_case(pick("affine_coupling", "forward+backward"), FAST, RATES)["status"] == "wrong"


@pytest.mark.usefixtures("no_ceilings")
def test_the_command_fails_and_reports_nothing_for_a_broken_operator(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--quick", "--op", "affine_coupling", "--skip", "torch.compile", "--seconds", "0.01", "--json"]
    assert benchmarks.main([*arguments, str(tmp_path / "right.json")]) == 0
    monkeypatch.setattr(fk.ops, "affine_coupling", _off_by_a_little(fk.ops.affine_coupling))
    capsys.readouterr()
    assert benchmarks.main([*arguments, str(tmp_path / "wrong.json")]) == 1
    out = capsys.readouterr()
    assert "NO FIGURES for affine_coupling / forward" in out.err
    assert "µs" not in out.out
    document = json.loads((tmp_path / "wrong.json").read_text())
    assert all(record["variants"] == [] for record in document["results"])
    assert all(target["reached"] is None for target in document["targets"])


def test_an_operator_that_raises_fails_and_a_rival_that_raises_is_left_out() -> None:
    def raises() -> Tensor:
        raise RuntimeError("out of order")

    x = torch.ones(3)
    good = core.Variant("PyTorch", core.PLAIN, lambda: x * 2)

    def case(*variants: core.Variant) -> core.Case:
        return core.Case("test", "forward", {"N": 3}, lambda _: core.Problem(list(variants), lambda: [x.double() * 2]))

    failed = core.run_case(case(core.Variant("flowkernels", core.OURS, raises), good), FAST, RATES)
    assert failed["status"] == "failed"
    assert "RuntimeError: out of order" in failed["message"]
    ours = core.Variant("flowkernels", core.OURS, lambda: x * 2)
    record = core.run_case(case(ours, good, core.Variant("rival", core.RIVAL, raises)), FAST, RATES)
    assert record["status"] == "ok"
    assert [v["name"] for v in record["variants"]] == ["flowkernels", "PyTorch"]
    assert "rival left out: RuntimeError: out of order" in record["notes"][0]


@pytest.mark.parametrize(
    ("result", "truth", "expected"),
    [
        ([torch.ones(2)], [torch.ones(3)], math.inf),
        ([torch.ones(2)], [torch.ones(2), torch.ones(2)], math.inf),
        ([torch.tensor([1.0, math.nan])], [torch.ones(2)], math.inf),
        ([torch.tensor([4.0, 2.0])], [torch.tensor([4.0, 1.0])], 0.25),
        ([torch.empty(0)], [torch.empty(0)], 0.0),
    ],
)
def test_error_of(result: list[Tensor], truth: list[Tensor], expected: float) -> None:
    assert core.error_of(result, truth) == expected


def test_timing_is_in_turns_and_counts_every_call() -> None:
    log: list[str] = []
    times = core.interleaved({"a": lambda: log.append("a"), "b": lambda: log.append("b")}, 0.001)
    assert set(times) == {"a", "b"}
    assert min(len(t) for t in times.values()) >= core.FEWEST
    slow = {name: (lambda name=name: (log.append(name), torch.rand(300, 300) @ torch.rand(300, 300))) for name in "cd"}
    log.clear()
    core.interleaved(slow, 0.3)
    changes = sum(x != y for x, y in itertools.pairwise(log))
    assert changes >= 4, log


def test_quantile() -> None:
    assert core.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert core.quantile([1.0, 2.0], 0.2) == pytest.approx(1.2)


def test_peak_memory_sees_a_temporary() -> None:
    def run() -> Tensor:
        return torch.ones(2**24).sum()  # 64 MB that are gone when it returns

    peak = core.peak_memory(run)
    if peak is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert 60e6 < peak < 90e6
    assert core.peak_memory(lambda: torch.ones(1)) < 5e6  # type: ignore[operator]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_truth_for_samples_is_the_naive_loop(layers: int) -> None:
    torch.manual_seed(0)
    flow = MAF(11, (24,) * layers, 2).double()
    nets, z = plain.nets_of(flow), torch.randn(7, 11, dtype=torch.double)
    naive = plain.sample_naive(nets, z)
    samplers = [plain.Blocked(net.masked(), block=4) for net in nets]
    with torch.no_grad():
        assert core.error_of(plain.sample_blocked(samplers, z), naive) < 1e-13
    assert core.error_of(plain.sample_blocked_differentiable(samplers, z), naive) < 1e-13
    with torch.no_grad():
        back, logdet = plain.density(nets, naive[0])
    assert core.error_of([back, logdet], [z, -naive[1]]) < 1e-12


def test_the_truth_for_gradients_is_autograd_through_the_naive_loop() -> None:
    torch.manual_seed(0)
    nets, z = plain.nets_of(MAF(6, (16, 16), 1).double()), torch.randn(5, 6, dtype=torch.double)

    def gradients(sample: Any) -> list[Tensor]:
        leaves = [net.leaves() for net in nets]
        x, logdet = sample(leaves)
        wanted = [p for net in leaves for pair in zip(net.weights, net.biases, strict=True) for p in pair]
        return list(torch.autograd.grad(x.square().sum() + logdet.sum(), wanted))

    naive = gradients(lambda leaves: plain.sample_naive(leaves, z))
    blocked = gradients(
        lambda leaves: plain.sample_blocked_differentiable([plain.Blocked(net, block=4) for net in leaves], z)
    )
    assert core.error_of(blocked, naive) < 1e-12


def test_growth_finds_the_exponent() -> None:
    records = [
        {
            "sweep": "D",
            "status": "ok",
            "size": {"D": d},
            "variants": [{"name": "flowkernels", "p50": 1e-6 * d**1.5}],
        }
        for d in (10, 20, 40, 80, 160)
    ]
    (found,) = growth.fit([*records, {"sweep": "D", "status": "wrong", "size": {"D": 320}, "variants": []}])
    assert found["exponent"] == pytest.approx(1.5)
    assert len(found["points"]) == 5


def test_targets_name_cases_that_exist_or_are_to_come() -> None:
    ids = {case.id for case in core.all_cases(False)}
    ops = core.modules()
    for target in targets.TARGETS:
        op = target.case.split(" / ")[0]
        assert op not in ops or target.case in ids, target.case


def test_targets_compare_the_right_way_round() -> None:
    record = {
        "id": "op / forward / N=1",
        "status": "ok",
        "variants": [
            {"name": "flowkernels", "p50": 2.0, "peak_bytes": 30},
            {"name": "other", "p50": 6.0, "peak_bytes": 10},
        ],
    }
    faster = targets.Target("row", record["id"], "other", 2.5)
    assert faster.evaluate([record])["reached"] == 3.0
    assert faster.evaluate([record])["met"] is True
    share = targets.Target("row", record["id"], "other", 0.3, at_most=True)
    assert share.evaluate([record])["reached"] == pytest.approx(1 / 3)
    assert share.evaluate([record])["met"] is False
    memory = targets.Target("row", record["id"], "other", 3.0, at_most=True, figure="peak_bytes")
    assert memory.evaluate([record])["met"] is True
    assert faster.evaluate([record | {"status": "wrong"}])["met"] is None
    assert faster.evaluate([record | {"id": "op / forward / N=16"}])["met"] is None


@pytest.fixture
def document(no_ceilings: None, tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "run.json"
    arguments = ["--quick", "--op", "affine_coupling", "--op", "growth", "--skip", "torch.compile"]
    assert benchmarks.main([*arguments, "--seconds", "0.01", "--json", str(path)]) == 0
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def test_report_and_compare(document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert document["device"]["processor"]
    assert document["versions"]["torch"] == torch.__version__
    assert {g["sweep"] for g in document["growth"]} == {"D", "B"}

    text = report.figures(document, [tmp_path / "speedup.png"], tmp_path / "run.json", tmp_path / "run.md")
    assert "affine coupling, 65536×256, forward" in text
    assert str(tmp_path) not in text
    assert "affine_coupling: forward" in report.medians(document)
    begin, end = "<!-- figures:begin -->", "<!-- figures:end -->"
    readme = report.filled(f"before\n{begin}\nold\n{end}\nafter\n", "figures", text)
    assert readme.startswith("before\n")
    assert readme.endswith("\nafter\n")
    assert "\nold\n" not in readme
    assert report.filled(readme, "figures", text) == readme
    with pytest.raises(ValueError, match=r"README\.md must have"):
        report.filled("no marks", "figures", text)

    path = tmp_path / "run.json"
    capsys.readouterr()
    assert compare.compare(str(path), str(path)) == 0
    assert "1.00×" in capsys.readouterr().out
    with pytest.raises(ValueError, match="takes result files or commits, 'no such commit' is neither"):
        compare.load("no such commit")

    pytest.importorskip("matplotlib")
    pictures = report.draw(document, tmp_path / "pictures")
    assert [p.name for p in pictures] == ["speedup.png", "growth.png", "ceiling.png"]
    assert all(p.stat().st_size > 5000 for p in pictures)


def test_tables_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(show, "CONSOLE", None)
    show.table("title", ("", "p50"), [("flowkernels", "1.00 ms"), ("x", "10.0 ms")])
    assert capsys.readouterr().out == "title\n                 p50\nflowkernels  1.00 ms\nx            10.0 ms\n\n"


def test_before_and_after_acceleration_is_one_row_for_each_flow() -> None:
    def record(what: str, ours: float, before: float) -> dict[str, Any]:
        variants = [
            {"name": "flowkernels", "kind": "ours", "p50": ours},
            {"name": "nflows", "kind": "peer", "p50": before, "ours_faster": before / ours},
        ]
        return {"op": "accelerate", "what": what, "status": "ok", "size": {"D": 5, "B": 1}, "variants": variants}

    results = [record("nflows sampling", 1e-3, 1.0), record("nflows log_prob", 1e-3, 2e-3)]
    table = report.accelerated({"results": results}).splitlines()
    assert table[2:] == ["| nflows | D=5 B=1 | 1.00 s → 1.00 ms (1000×) | 2.00 ms → 1.00 ms (2.00×) |  |"]
    assert report.accelerated({"results": []}) == ""


def test_the_table_of_the_flows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")
    from benchmarks import flows

    monkeypatch.setattr(flows, "FLOWS", {"nice": "NICE", "realnvp": "RealNVP"})
    assert flows.main(["--quick", "--epochs", "1", "--json", str(tmp_path / "flows.json")]) == 0
    document = json.loads((tmp_path / "flows.json").read_text())
    assert [(one["flow"], one["noise"]) for one in document["results"]] == [
        (flow, noise) for flow in ("NICE", "RealNVP") for noise in ("uniform", "variational")
    ]
    assert all(len(one["valid_curve"]) == document["epochs"] == 1 for one in document["results"])
    assert 1 < document["gaussian"]["test_bits_per_dim"] < min(one["test_bits_per_dim"] for one in document["results"])
    text = flows.summary(document, tmp_path / "flows.json")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    worst = max(document["results"], key=lambda one: one["test_bits_per_dim"])["flow"]
    assert [line.split(" |")[0] for line in lines[1:3]] == ["| Gaussian, full covariance", f"| {worst}"]
    assert "Flow++ 3.08 < Glow 3.35 < RealNVP 3.49" in text
    readme = (machine.ROOT / "README.md").read_text()
    assert text in report.filled(readme, "flows", text)
