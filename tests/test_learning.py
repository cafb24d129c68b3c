"""That it learns: the main job itself, cut short, on the real toy, whose base model is made on first use."""
from conftest import read_jsonl, run_script


def test_luffy_learns_what_the_base_model_almost_never_does(base_model, tmp_path):
    """60 steps: on this machine's base 20 would do, but other hardware rounds to another base."""
    process = run_script("luffy.py", "--steps", "60", "--eval_every", "60", "--name", "short", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    first, *_, last = read_jsonl(tmp_path / "runs" / "short" / "metrics.jsonl")
    assert first["accuracy/hard"] < 0.1
    assert last["accuracy/hard"] >= first["accuracy/hard"] + 0.3  # luck moves it by 0.05
