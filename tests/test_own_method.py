"""docs/your_own_method.md: its diff of grpo.py applies, runs, and minimises what it says; its table is whole."""
import doctest
import importlib.util
import re
import subprocess

import pytest
import torch
from conftest import ROOT, SCRIPTS, SMALL, read_jsonl

from common import Run

PAGE = (ROOT / "docs" / "your_own_method.md").read_text()


@pytest.fixture
def raft(tmp_path):
    """grpo.py with the page's diff, as a module."""
    diff = re.search(r"```diff\n(.*?)```", PAGE, re.DOTALL).group(1)
    (tmp_path / "grpo.py").write_text((ROOT / "grpo.py").read_text())
    (tmp_path / "raft.diff").write_text(diff)
    subprocess.run(["git", "apply", "raft.diff"], cwd=tmp_path, check=True)
    spec = importlib.util.spec_from_file_location("raft", tmp_path / "grpo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_steps_minimise_the_right_responses_negative_log_likelihood(
        raft, coin_model, coin_data, command_line, tmp_path, monkeypatch):
    scored, score = [], Run.score

    def watched_score(run, rows):
        score(run, rows)
        scored.append(rows)

    monkeypatch.setattr(Run, "score", watched_score)
    command_line("grpo", "--model", coin_model, "--data", coin_data, *SMALL, "--updates", "1", "--n", "16",
                 "--lr", "0.001", "--name", "raft")
    raft.main()
    lines = read_jsonl(tmp_path / "runs" / "raft" / "metrics.jsonl")[1:]
    assert len(lines) == len(scored) == 2
    for line, rows in zip(lines, scored):
        right = torch.cat([row.old_logp for row in rows if row.reward == 1])
        assert 0 < line["reward"] < 1
        assert line["loss"] == pytest.approx(-right.mean().item(), rel=1e-5)
        assert line["token_loss/rollouts"] == pytest.approx(line["loss"], rel=1e-6)


def test_its_loss_is_the_token_mean_of_the_cross_entropy(raft):
    torch.manual_seed(0)
    logits, tokens, mask = torch.randn(3, 5, 7), torch.randint(7, (3, 5)), torch.rand(3, 5) < 0.7
    logp = logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
    loss, metrics = raft.raft_loss(logp, mask, tokens=int(mask.sum()))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[mask], tokens[mask]))
    total, count = metrics["token_loss/rollouts"]
    torch.testing.assert_close(total / count, loss)
    example, = doctest.DocTestFinder().find(raft.raft_loss, globs={"torch": torch, "raft_loss": raft.raft_loss})
    results = doctest.DocTestRunner().run(example)
    assert results.attempted == 2 and not results.failed


def test_it_is_a_diff_of_thirty_lines():
    changed = re.findall(r"^[+-](?![+-]).*\S", re.search(r"```diff\n(.*?)```", PAGE, re.DOTALL).group(1), re.MULTILINE)
    assert len(changed) <= 30


def test_every_call_of_a_script_is_explained():
    used = {name for script in SCRIPTS for name in re.findall(r"\brun\.(\w+)", (ROOT / f"{script}.py").read_text())}
    assert used == set(re.findall(r"^\| `run\.(\w+)", PAGE, re.MULTILINE))
