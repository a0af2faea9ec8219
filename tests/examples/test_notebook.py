"""`examples/demo.ipynb`: it has no outputs of some earlier run, and all its cells run, on a two-layer GPT-2."""

import pytest
from conftest import ROOT


nbformat = pytest.importorskip("nbformat", reason="nbclient, of the extra [test], is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient, of the extra [test], is not installed")
NOTEBOOK = ROOT / "examples" / "demo.ipynb"
SHORT = {
    "sft": ["--max_steps", "2"],
    "reward": ["--max_steps", "2", "--max_completion_length", "6", "--sft_completions", "16"],
    "ppo": ["--max_steps", "4", "--max_completion_length", "6", "--min_reward_accuracy", "0"],
    "evaluation": ["--max_prompts", "64", "--max_completion_length", "6"],
}


def test_the_notebook_is_kept_without_outputs():
    """An output that nobody has made again may be that of other code."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.mark.slow
def test_the_notebook_runs(tiny, tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    short = {stage: [*options, "--model_name_or_path", tiny] for stage, options in SHORT.items()}
    lines = {'OUT = Path("runs/notebook")': f"OUT = Path({str(tmp_path)!r})", "MORE = {}": f"MORE = {short!r}"}
    for old, new in lines.items():
        assert first.source.count(old) == 1
        first.source = first.source.replace(old, new)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    text = "".join(output.get("text", "") for output in outputs)
    assert "of the held-out pairs as people do" in text and "judge: " in text and "gain " in text
