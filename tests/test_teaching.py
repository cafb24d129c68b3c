"""What teaches: the picture of weights, plots of runs, the pages in docs/, and the links between them."""
import json
import re
import sys

import pytest
import torch
from conftest import ROOT, optional, run_script, write_jsonl
from test_scripts import changed_lines

import common

sys.path.append(str(ROOT / "bench"))
import curves  # noqa: E402
import plot  # noqa: E402
import weights  # noqa: E402

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "more" / "README.md", *(ROOT / "docs").glob("*.md")]


# ------------------------------------------------------------------------------------------- the weights
@pytest.mark.parametrize("name, weight", (
    ("SFT; ReLIFT's and CHORD-mu's", lambda p: torch.ones_like(p)),
    ("LUFFY", lambda p: 0.1 * p / (p + 0.1) ** 2),
    ("LUFFY, no shaping", lambda p: p),
    ("CHORD-phi", lambda p: p * (1 - p))))
def test_weights_of_demonstrations_are_those_of_the_papers(name, weight):
    torch.testing.assert_close(weights.demonstration_weight(name, weights.P), weight(weights.P))


@pytest.mark.parametrize("name, advantage, weight", (
    ("GRPO", 1, lambda r: r * (r < 1.2)), ("GRPO", -1, lambda r: -r * (r > 0.8)),
    ("LUFFY, ReLIFT: no clip", 1, lambda r: r), ("LUFFY, ReLIFT: no clip", -1, lambda r: -r),
    ("TOPR", 1, torch.ones_like), ("TOPR", -1, lambda r: -r.clamp(max=1)),
    ("plain REINFORCE", 1, torch.ones_like), ("plain REINFORCE", -1, lambda r: -torch.ones_like(r))))
def test_weights_of_rollouts_are_those_of_the_papers(name, advantage, weight):
    expected = weight(weights.P / weights.OLD)
    torch.testing.assert_close(weights.rollout_weight(name, weights.P, advantage), expected)


def test_every_curve_is_drawn(tmp_path):
    optional("matplotlib")
    weights.draw(tmp_path / "weights.png")
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")


# --------------------------------------------------------------------------------------------- the links
def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_this_repository_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text())
    for path, place in links:
        target = page.parent / path if path else page
        assert target.exists(), path
        if place:
            assert place in [anchor(line.lstrip("# ")) for line in target.read_text().splitlines()
                             if line.startswith("#")], place


def test_the_table_of_methods_names_the_functions_of_its_formulas_and_counts_lines():
    rows = re.findall(r"\| \[`(\w+\.py)`\]\(\1\)((?: `\w+\(\)`)+) \|.*\| *(\d*) *\|", (ROOT / "README.md").read_text())
    assert [script for script, _, _ in rows] == ["grpo.py", "luffy.py", "chord.py", "relift.py", "topr.py"]
    for script, functions, changed in rows:
        assert int(changed or 0) == len(changed_lines(script.removesuffix(".py")))
        for name in re.findall(r"`(\w+)\(\)`", functions):
            assert f"\ndef {name}(" in (ROOT / script).read_text(), name


# ---------------------------------------------------------------------------------------------- the plots
@pytest.fixture
def runs(tmp_path) -> list[str]:
    """Folders of two runs: of four steps, and one that was only evaluated."""
    full = [{"step": 0, "accuracy/easy": 0.2, "accuracy/hard": 0.0}]
    full += [{"step": step, "reward": step / 4, "entropy": 1 / step, "response/length": 20 * step,
              "sampler_gap": 1e-6 * step, "accuracy/easy": 0.5} for step in range(1, 5)]
    for name, lines in (("full", full), ("begun", full[:1])):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "metrics.jsonl", lines)
    return ["full", "begun"]


def test_a_panel_for_every_metric_and_a_curve_for_every_run(runs, tmp_path):
    optional("matplotlib")
    from matplotlib import pyplot
    pyplot.close("all")
    lines = {name: plot.read(tmp_path / name) for name in runs}
    figure = plot.draw(lines, tmp_path / "runs.png", smooth=3)
    axes = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert list(axes) == ["accuracy, easy", "accuracy, hard", *plot.MEANS.values()]
    easy, begun = axes["accuracy, easy"].lines
    assert easy.get_xydata().tolist() == [[0, 0.2], [1, 0.5], [2, 0.5], [3, 0.5], [4, 0.5]]
    assert begun.get_xydata().tolist() == [[0, 0.2]] and begun.get_color() != easy.get_color()
    raw, smooth = axes["reward of rollouts"].lines  # the run that was only evaluated has none
    assert raw.get_ydata().tolist() == [0.25, 0.5, 0.75, 1] and raw.get_alpha() < 1
    assert smooth.get_ydata().tolist() == plot.smoothed([0.25, 0.5, 0.75, 1], 3)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == runs


def test_moving_means_keep_a_straight_line_and_do_not_lag():
    assert plot.smoothed([0, 1, 2, 3, 4], 3) == [0, 1, 2, 3, 4]
    assert plot.smoothed([0, 0, 0, 3, 0, 0, 0], 3) == [0, 0, 1, 1, 1, 0, 0]
    assert plot.smoothed([5, 7, 1], 1) == [5, 7, 1]


def test_plots_from_the_command_line(runs, tmp_path):
    optional("matplotlib")
    process = run_script("bench/plot.py", *runs, "--out", "both.png", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags, named", (
    (["absent"], "absent/metrics.jsonl: no such file"), (["empty"], "empty/metrics.jsonl is empty"),
    (["broken"], "broken/metrics.jsonl, line 2: not JSON"), (["broken", "--smooth", "0"], "--smooth is 0")))
def test_what_cannot_be_drawn_is_one_line(flags, named, tmp_path):
    for name, text in (("empty", ""), ("broken", '{"step": 0}\n{"step":\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    process = run_script("bench/plot.py", *flags, cwd=tmp_path)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("plot.py: error: ") and named in process.stderr


# ---------------------------------------------------------------------------------------------- the figures
def test_bfloat16_weights_lose_the_update():
    """What docs/questions.md says of AdamW at lr 1e-6: 98% of the weights stay, 99% of the update is lost."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        start = (0.02 * torch.randn(50_000)).to(dtype)
        weights = torch.nn.Parameter(start.clone())
        direction, optimizer = torch.randn(50_000), torch.optim.AdamW([weights], lr=1e-6, weight_decay=0.0)
        for _ in range(200):
            weights.grad = (direction + torch.randn(50_000)).to(dtype)
            optimizer.step()
        moved[dtype] = (weights.detach() - start).float()
    full, rounded = moved.values()
    assert (rounded == 0).float().mean() == pytest.approx(0.98, abs=0.005)
    assert 1 - (full * rounded).sum() / full.square().sum() == pytest.approx(0.99, abs=0.005)


@pytest.mark.parametrize("name", curves.PAGES)
def test_the_table_of_a_methods_page_is_that_of_the_measured_curves(name):
    lines = [json.loads(line) for line in curves.RESULTS.read_text().splitlines()]
    page = (ROOT / "docs" / f"{name}.md").read_text()
    assert f"<!-- table -->\n{curves.make_table(lines, *curves.PAGES[name])}\n<!-- end -->\n" in page
    assert len(page.splitlines()) < 60


def test_the_table_of_a_methods_page_says_when_and_how_fast():
    def runs(method, seconds, *accuracies):
        return [{"method": method, "q": 0.02, "base_seed": 0, "seed": 0, "step": 5 * i, "seconds": seconds * i,
                 "accuracy/easy": 1.0, "accuracy/hard": accuracy, "accuracy/ood": 0.0}
                for i, accuracy in enumerate(accuracies)]

    lines = runs("GRPO", 1, 0, 0.2, 0.5) + runs("LUFFY", 2, 0, 0.4, 0.6) + runs("SFT", 0.5, 0, 0.7, 0.4)
    lines += runs("LUFFY, no shaping", 3, 0, 0.8, 0.9)
    rows = curves.make_table(lines, *curves.PAGES["luffy"]).splitlines()[2:]
    assert rows == ["| LUFFY | 1.00-1.00 | 0.60-0.60 | 0.00-0.00 | 10 | 2.00-2.00 |",
                    "| LUFFY, no shaping | 1.00-1.00 | 0.90-0.90 | 0.00-0.00 | 5 | 3.00-3.00 |",
                    "| GRPO | 1.00-1.00 | 0.50-0.50 | 0.00-0.00 | 1 never | 1 |",
                    "| SFT | 1.00-1.00 | 0.40-0.40 | 0.00-0.00 | 5 | 0.50-0.50 |"]


def test_every_run_of_the_curves_starts(command_line):
    """Its script takes the flags."""
    for script, flags, _ in curves.METHODS.values():
        module = command_line(script, *flags)
        common.parse(module.Args, module.__doc__)


@pytest.mark.parametrize("name", curves.PAGES)
def test_the_first_line_of_a_script_leads_to_its_page(name):
    first = (ROOT / f"{name}.py").read_text().splitlines()[0]
    assert first.startswith('"""') and first.endswith(f"See docs/{name}.md")
