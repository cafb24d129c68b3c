"""That it learns: the main job itself, cut short, on the embedded base model."""
from conftest import read_jsonl, run_script


def test_luffy_learns_what_the_base_model_almost_never_does(tmp_path):
    """25 steps: on six bases LUFFY passed 0.5 at step 10 or 15."""
    process = run_script("luffy.py", "--steps", "25", "--eval_every", "25", "--name", "short", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    first, *_, last = read_jsonl(tmp_path / "runs" / "short" / "metrics.jsonl")
    assert first["accuracy/hard"] < 0.1
    assert last["accuracy/hard"] >= first["accuracy/hard"] + 0.3  # luck moves it by 0.05
