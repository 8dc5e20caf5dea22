"""The benchmark's statistics, its files, its charts, and what it makes of them."""

import csv
import json
import math
from pathlib import Path

import numpy
import pytest

from bench import compare, plot, readme, report
from bench.refusal import Refusal
from bench.results import INPLACE, OURS, Case, Entry, Results, load, summary

ROOT = Path(__file__).parents[1]
DTYPES = ["float32", "bfloat16"]


def entry(peer, forward, both, memory=None):
    seconds = {"forward": [forward * x for x in (0.9, 1.0, 1.2)], "both": [both * x for x in (0.9, 1.0, 1.2)]}
    return Entry(peer, errors={"loss": 1e-8, "gradient": 2e-8}, seconds=seconds, memory={"both": memory or 2**20})


def results(threads=(1,)):
    """Ours, torch at three times, and a peer that fails at the larger shape; 1 GB/s is the ceiling's rate."""
    cases = []
    for count in threads:
        for dtype in DTYPES:
            for shape in ((1000, 250), (100, 5000)):
                case = Case("cpu", shape, dtype, count)
                unit = case.logits_bytes / 1e9
                case.ceilings = {"read": [unit] * 3, "copy": [2 * unit] * 3}
                case.entries = [
                    entry(OURS, 2 * unit, 3 * unit, case.logits_bytes),
                    entry(INPLACE, 2 * unit, 2.5 * unit),
                    entry("torch", 6 * unit, 12 * unit, 3 * case.logits_bytes),
                    entry("jax", 3 * unit, 4 * unit) if shape[0] == 1000 else Entry("jax", "failed", "no more"),
                ]
                cases.append(case)
    made = {"cpu": "A processor", "cores": 2, "instructions": "avx2", "torch": "2.13.0", "commit": "0123456789"}
    return Results(
        "run", made | {"date": "today", "command": "python -m bench run", "versions": {"jax": "1"}}, {}, cases
    )


def step_results():
    case = Case("cpu", (8, 50257), "float32", 2, "gpt2", hidden=768)
    case.entries = [
        Entry(OURS, seconds={"step": [0.5]}, memory={"step": 2**21}),
        Entry("torch", seconds={"step": [1.0]}, memory={"step": 2**22}),
    ]
    made = {"gpu": "A device", "driver": "1.2", "instructions": "avx2", "torch": "2.13.0", "commit": "0123456789"}
    return Results("train", made | {"date": "today", "command": "python -m bench train"}, {}, [case])


@pytest.mark.parametrize("size", [2, 3, 4, 5, 10, 51])
def test_summary(size):
    samples = numpy.random.default_rng(size).lognormal(size=size)
    low, middle, high = numpy.percentile(samples, [25, 50, 75])
    assert summary(list(samples)) == pytest.approx((middle, low, high))
    assert summary(list(samples)).spread == pytest.approx((high - low) / 2 / middle)


def test_summary_of_one_sample():
    assert summary([3.0]) == (3, 3, 3)


def test_figures_of_a_case():
    case = results().cases[0]
    assert case.logits_bytes == 1000 * 250 * 4
    assert case.ceiling("read") == pytest.approx(1e9)
    assert case.ceiling("copy") == pytest.approx(1e9)
    # Half of the read ceiling's rate; two passes in three times the time of one.
    assert case.bandwidth(OURS, "forward") == pytest.approx(0.5e9)
    assert case.share(OURS, "forward") == pytest.approx(0.5)
    assert case.share(OURS, "both") == pytest.approx(2 / 3)
    assert case.ratio("torch", "both") == pytest.approx(4)
    assert case.ratio("torch", "both", base=INPLACE) == pytest.approx(4.8)
    assert case.ratio("torch", "backward") is None
    assert case.median("nobody", "forward") is None


def test_files_keep_everything(tmp_path):
    for written in (results(threads=(1, 2)), step_results()):
        path = tmp_path / "new" / "results.json"
        written.save(path)
        assert load(path) == written
        assert list(path.parent.iterdir()) == [path]


def broken(change):
    content = json.loads(json.dumps({"kind": "run", "provenance": {}, "cases": []}))
    content["cases"] = [{"device": "cpu", "shape": [2, 3], "dtype": "float32", "threads": 1, "entries": []}]
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "JSON: Invalid JSON"),
        ("[1]", "is not a file of benchmark results"),
        (broken(lambda content: content.update(kind="walk")), "kind: "),
        (broken(lambda content: content.update(schema=2)), "schema: "),
        (broken(lambda content: content.pop("provenance")), "provenance: "),
        (broken(lambda content: content["cases"][0].update(shape="wide")), "cases.0.shape: "),
        (broken(lambda content: content["cases"][0].update(unknown=1)), "cases.0.unknown: "),
        (broken(lambda content: content["cases"][0].update(entries=[{"peer": 3}])), "cases.0.entries.0.peer: "),
    ],
)
def test_bad_files(tmp_path, text, said):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(Refusal) as refusal:
        load(path)
    assert said in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_good_file_with_the_least(tmp_path):
    path = tmp_path / "least.json"
    path.write_text(broken(lambda content: None))
    assert load(path).cases[0].shape == (2, 3)


def test_table_of_medians(tmp_path):
    path = tmp_path / "results.csv"
    written = results()
    written.save_csv(path)
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == 2 * (4 * 2) + 2 * (3 * 2 + 1)  # the peer that failed has one line
    (row,) = [
        r for r in rows if (r["shape"], r["dtype"], r["peer"], r["operation"]) == ("1000x250", "float32", OURS, "both")
    ]
    case = written.cases[0]
    assert float(row["median_s"]) == case.median(OURS, "both")
    assert float(row["of_ceiling"]) == pytest.approx(2 / 3)
    assert int(row["memory_bytes"]) == case.logits_bytes
    assert [r["message"] for r in rows if r["status"] == "failed"] == ["no more"] * 2


def changed(factor, spread=0.01):
    """The same results with other times of ours."""
    found = results()
    for case in found.cases:
        samples = [case.entries[0].seconds["both"][1] * factor * (1 + spread * x) for x in (-1, 0, 1)]
        case.entries[0].seconds["both"] = samples
    return found


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (changed(1), changed(1.2), "slower"),
        (changed(1), changed(1 / 1.2), "faster"),
        (changed(1), changed(1.04), ""),  # within the threshold
        (changed(1, spread=0.3), changed(1.2, spread=0.3), ""),  # within the noise
        (changed(1), changed(1), ""),
    ],
)
@pytest.mark.parametrize("base", [None, "torch"])
def test_verdicts(before, after, verdict, base):
    found = compare.changes(before, after, base)
    verdicts = {(c.peer, c.operation): c.verdict(0.05) for c in found}
    assert verdicts.pop((OURS, "both")) == verdict
    assert set(verdicts.values()) == {""}
    assert ("torch", "both") not in verdicts or base is None


def test_a_faster_machine_is_not_a_faster_loss():
    slow, fast = results(), results()
    for case in fast.cases:
        for one in case.entries:
            one.seconds = {name: [x / 2 for x in samples] for name, samples in one.seconds.items()}
    absolute = [c for c in compare.changes(slow, fast) if c.peer == OURS]
    assert {c.verdict(0.05) for c in absolute} == {"faster"}
    assert compare.drift(compare.changes(slow, fast), OURS) == pytest.approx(0.5)
    relative = compare.changes(slow, fast, base="torch")
    assert {c.verdict(0.05) for c in relative} == {""}


def test_what_fails_now_is_lost():
    before, after = results(), results()
    after.cases[1].entries[0] = Entry(OURS, "failed", "out of memory")
    assert compare.lost(before, after, OURS) == ["(100, 5000) float32, 1 thread: failed: out of memory"]
    assert compare.lost(before, before, OURS) == []
    assert compare.lost(before, before, "jax") == []  # has failed before


def test_nothing_in_common():
    other = results()
    for case in other.cases:
        case.threads = 7
    with pytest.raises(Refusal, match="nothing in common"):
        compare.changes(results(), other)


def test_bandwidth_chart():
    found = results()
    figure = plot.bandwidth(found, found.cases)
    axes = figure.axes
    assert [axis.get_title() for axis in axes] == [
        f"{what}, {dtype}" for what in ("forward", "forward + backward") for dtype in DTYPES
    ]
    for axis in axes:
        lines = {line.get_label(): line for line in axis.get_lines()}
        ceiling = "ceiling: read" if axis.get_title().startswith("forward,") else "ceiling: copy"
        assert set(lines) == {OURS, INPLACE, "torch", "jax", ceiling}
        rate = 0.5 if ceiling == "ceiling: read" else 2 / 3
        assert list(lines[OURS].get_xdata()) == [250, 5000]
        assert list(lines[OURS].get_ydata()) == pytest.approx([rate, rate])
        assert list(lines[ceiling].get_ydata()) == pytest.approx([1, 1])
        assert list(lines["jax"].get_xdata()) == [250]
    assert axes[0].get_ylabel() == "GB/s"
    assert axes[-1].get_xlabel() == "classes"
    assert OURS in [text.get_text() for text in figure.legends[0].get_texts()]


def bars(axis):
    """The lengths of each label's bars."""
    return {container.get_label(): [bar.get_width() for bar in container] for container in axis.containers}


@pytest.mark.parametrize(
    ("chart", "found", "lengths", "said"),
    [
        (plot.speedup, results(), {OURS: 1, INPLACE: 2.5 / 3, "torch": 4}, ["4×", "jax: failed"]),
        (plot.memory, results(), {OURS: 1, "torch": 3}, ["3 MiB"]),
        (plot.step_time, step_results(), {OURS: 0.5, "torch": 1.0}, ["500 ms", "1 s"]),
        (plot.step_memory, step_results(), {OURS: 2, "torch": 4}, ["4 MiB"]),
    ],
)
def test_bar_charts(chart, found, lengths, said):
    figure = chart(found, found.cases)
    axis = figure.axes[0]
    assert {name: bars(axis)[name] for name in lengths} == {
        name: pytest.approx([length]) for name, length in lengths.items()
    }
    texts = " ".join(text.get_text() for text in axis.texts)
    for text in said:
        assert text in texts
    assert len(axis.get_yticklabels()) == len({case.shape for case in found.cases})
    assert axis.get_xlabel()
    assert figure.get_suptitle().splitlines()[0]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(lengths) <= set(labels)
    right = axis.get_xlim()[1]
    assert all(length <= right for values in bars(axis).values() for length in values)


def test_chart_files(tmp_path):
    written = plot.draw(results(threads=(1, 2)), "name", tmp_path, ["png", "svg"])
    names = {f"name-{chart}{suffix}" for chart in ("bandwidth", "speedup") for suffix in ("", "-2-threads")}
    names.add("name-memory")
    assert {path.name for path in written} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert (tmp_path / "name-speedup.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "name-speedup.svg").read_text()
    for text in (OURS, "torch", "(1000, 250)", "float32", "A processor, torch 2.13.0"):
        assert text in drawn
    again = plot.draw(results(threads=(1, 2)), "again", tmp_path, ["svg"])
    assert (tmp_path / "again-speedup.svg").read_text() == drawn, f"{again} differs from run to run"


def test_nothing_to_draw(tmp_path):
    empty = results()
    empty.cases.clear()
    with pytest.raises(Refusal, match="nothing to draw"):
        plot.draw(empty, "name", tmp_path, ["png"])


def test_readme_blocks(tmp_path):
    (tmp_path / "bench/results").mkdir(parents=True)
    results().save(tmp_path / "bench/results/one.json")
    step_results().save(tmp_path / "bench/results/two.json")
    text = "before\n"
    for what, name in (("provenance", "one"), ("ratios", "one"), ("chart-speedup", "one"), ("steps", "two")):
        text += f"<!-- {what} bench/results/{name}.json -->\nold\n<!-- end -->\nbetween\n"
    (tmp_path / "README.md").write_text(text)
    written = readme.update(tmp_path)
    assert tmp_path / "bench/results/one-speedup.svg" in written
    made = (tmp_path / "README.md").read_text()
    assert "old" not in made
    assert made.count("between") == 4
    assert "A processor, 2 cores (avx2); torch 2.13.0, jax 1; commit 0123456, today" in made
    assert "| (1000, 250) | float32 | 1 | 2 ms | 50% | 3 ms | 67% | 1, **0.83** | 3, 4 | 1.5, 1.3 |" in made
    assert "| failed |" in made
    assert "![speedup](bench/results/one-speedup.svg)" in made
    assert "| gpt2 (8, 50257) | float32 | torch | 1 s | 1.00 | 4 MiB |" in made
    assert "| gpt2 (8, 50257) | float32 | cross_entropy | 500 ms | 0.50 | 2 MiB |" in made
    assert readme.render(made, tmp_path) == made


def operators_file():
    """A file of bench.gpu_check."""
    seconds = {"copy": 2.0, "forward": 1.25, "forward with gradient": 2.5, "backward": 4.0}
    seconds |= {"torch forward": 5.0, "torch forward + backward": 10.0}
    made = {"provenance": results().provenance, "results": []}
    for classes in (256, 128):
        for dtype, factor in (("bfloat16", 1), ("float16", 3), ("float32", 2)):
            slower = seconds | {"forward": factor * seconds["forward"]}
            made["results"].append({"rows": 8, "classes": classes, "dtype": dtype, "seconds": slower})
    return made


def test_readme_of_the_operators(tmp_path):
    (tmp_path / "bench/results").mkdir(parents=True)
    (tmp_path / "bench/results/gpu.json").write_text(json.dumps(operators_file()))
    blocks = [f"<!-- {what} bench/results/gpu.json -->\n<!-- end -->" for what in ("operators", "chart-operators")]
    (tmp_path / "README.md").write_text("\n".join(blocks))
    assert tmp_path / "bench/results/gpu-operators.svg" in readme.update(tmp_path)
    lines = (tmp_path / "README.md").read_text().splitlines()
    row = "80% | 80% | 50% | 4.0 | 4.0 | 40% | 80% | 50% | 2.0 | 4.0 |"
    assert lines[-6:-4] == [f"| 8 | {classes} | {row}" for classes in (128, 256)]
    assert lines[-2] == "![operators](bench/results/gpu-operators.svg)"
    drawn = (tmp_path / "bench/results/gpu-operators.svg").read_text()
    for text in ("A processor, torch 2.13.0", "forward with gradient", "torch forward", "bfloat16", "float16"):
        assert text in drawn


def test_chart_of_the_operators():
    figure = plot.operators(operators_file())
    assert [axis.get_title() for axis in figure.axes] == ["bfloat16", "float16", "float32"]
    curves = {line.get_label(): line for line in figure.axes[2].get_lines()}
    shares = {f"{OURS} forward": 40, f"{OURS} forward with gradient": 80, f"{OURS} backward": 50}
    shares |= {"torch forward": 20, "torch forward + backward": 20}
    for name, percent in shares.items():
        assert list(curves[name].get_xdata()) == [128, 256]
        assert list(curves[name].get_ydata()) == pytest.approx([percent, percent])
    assert set(curves) == {*shares, "copy on the device"} == {text.get_text() for text in figure.legends[0].get_texts()}


def test_readme_table_of_the_options(tmp_path):
    seconds = {OURS: 1.0, OURS + " in torch": 3.0, "softcap": 1.5, "softcap in torch": 12.0}
    found = results()
    found.kind = "options"
    found.cases = [
        Case("cpu", (2, 10), dtype, 1, entries=[
            Entry(name, seconds={"forward": [time], "both": [factor * time]}) for name, time in seconds.items()
        ])
        for dtype, factor in (("float32", 2), ("bfloat16", 1))
    ]  # fmt: skip
    found.cases[1].entries[3].seconds = {"forward": [1.2]}
    (tmp_path / "bench/results").mkdir(parents=True)
    found.save(tmp_path / "bench/results/options.json")
    made = readme.render("<!-- options bench/results/options.json -->\n<!-- end -->", tmp_path).splitlines()
    assert made[1] == "| option | (2, 10) float32 | (2, 10) bfloat16 |"
    assert made[3:5] == [
        "| none | 1, 1; 3, 3 | 1, 1; 3, 3 |",
        "| softcap | 1.5, 1.5; 8, 8 | 1.5, 1.5; **0.8**, – |",
    ]


def test_readme_is_made_from_the_results():
    text = (ROOT / "README.md").read_text()
    assert readme.render(text, ROOT) == text, "run: make readme-figures"


def test_texts():
    assert [report.time_text(x) for x in (2.0, 0.0123456, 4.5e-6)] == ["2 s", "12.3 ms", "4.5 µs"]
    assert [report.bytes_text(x) for x in (0, 3 * 2**10, 5 * 2**20)] == ["0 KiB", "3 KiB", "5 MiB"]
    assert not math.isnan(report.summary([1.0]).median)
