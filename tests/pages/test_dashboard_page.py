"""`pipeline.dashboard` without a browser: numbers and curves by hand, what is escaped, what is served, what is refused."""

import base64
import hashlib
import json
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from pipeline import dashboard
from pipeline.pages.dashboard_charts import Series, chart, short, thinned, ticks, vertical_range
from pipeline.pages.dashboard_page import content, page
from pipeline.pages.dashboard_server import make_server, read_runs
from pipeline.pages.escaping import words
from pipeline.runs.live_files import LOG, SAMPLES


ROOT = Path(__file__).parents[2]
HOSTILE = "</td><script>document.title = 'owned'</script>\"'&\x1b[31m\x00\ud800 \u202eolleH"
CHECK = {"name": "first KL", "measured": 0.25, "bound": "at most 0.1", "result": "warning", "why": "It must be 0."}


def write(path: Path, *rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder: Path, steps=(4, 8, 12), *, more=(), **started) -> Path:
    """A log of PPO with these steps."""
    about = {
        "stage": "ppo",
        "max_steps": 20,
        "options": {"kl_target": 9.0, "beta": 0.2},
        "preflight": [CHECK],
        **started,
    }
    rows = [
        {"step": step, "time": 1e9 + step, "epoch": 0.1, "score": 0.1 * step, "eval_score": 0.05 * step, "kl": 0.5 * step,
         "completions/mean_length": 20.0, "entropy": 4.0, "grad_norm": 1.0, "mine": 2.0 * step}
        for step in steps
    ]  # fmt: skip
    write(folder / LOG, {"step": 0, "time": 1e9, "started": about}, *rows, *more)
    return folder


# ------------------------------------------------------------------------------------------ numbers and curves
@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2, "2"), (-0.1163, "−0.116"), (13.468, "13.5"), (0.00291, "0.00291"), (4.6e-6, "4.6e−6"), (5e-4, "5e−4"),
     (39686, "39,686"), (1234.5, "1,234"), (2.3e9, "2.3e9"), (99.96, "100"), (1.0, "1"), (0.9995, "1.00")],
)  # fmt: skip
def test_a_number_in_three_figures(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [(0, 10, 5, [0, 2.5, 5, 7.5, 10]), (0, 144, 5, [0, 50, 100]), (-0.2, 1.5, 5, [0, 0.5, 1, 1.5]), (3, 3, 5, [3]),
     (0, 1, 5, [0, 0.25, 0.5, 0.75, 1]),
     (0, 3e-4, 4, [0, 1e-4, 2e-4, 3e-4])],
)  # fmt: skip
def test_ticks_are_round(low, high, most, expected):
    assert ticks(low, high, most) == pytest.approx(expected)


@pytest.mark.parametrize(("low", "high"), [(0.1234, 0.1237), (-5e6, 3e7), (0, 1), (1, 1 + 1e-6), (-3, -1)])
def test_there_are_ticks_and_not_too_many(low, high):
    assert 2 <= len(ticks(low, high, 5)) <= 5


def test_a_long_line_keeps_its_peaks():
    values = [0.0] * 10_000
    values[1234], values[7001] = 9.0, -9.0
    points = thinned(range(10_000), values)
    assert len(points) <= 400 and (1234, 9.0) in points and (7001, -9.0) in points
    assert points == sorted(points)
    assert thinned([1, 2], [3.0, 4.0]) == [(1, 3.0), (2, 4.0)]


def test_bounds_that_are_near_are_shown_and_a_first_jump_is_not():
    line = Series("training", "training", range(5), [0.0, 2.0, 4.0, 6.0, 10.0])
    assert vertical_range([line], (13.5, -80.0)) == (pytest.approx(-0.81), pytest.approx(14.31), [])
    jump = Series("training", "training", range(4), [-300.0, 0.0, 0.5, 1.0])
    low, high, left_out = vertical_range([jump], (), settles=1)
    assert low > -1 and high < 2 and left_out == [-300.0]
    flat = Series("training", "training", [1], [3.0])
    low, high, _ = vertical_range([flat], ())
    assert low < 3 < high


def test_a_chart_by_hand():
    """Values 0 to 10 at steps 0 to 100, with a band from 2 to 4: the range is -0.6 to 10.6, and 1,000 units high."""
    line = Series("training", "training", [0, 50, 100], [0.0, 10.0, 5.0])
    html = chart([line], last_step=100, label="x <1>", band=(2.0, 4.0), target=5.0, resumed=[25])
    assert 'd="M0.0 946.4L500.0 53.6L1000.0 500.0"' in html
    assert '<rect class="band" x="0" y="589.3" width="1000" height="178.6"/>' in html
    assert '<path class="target" d="M0 500.0H1000"/>' in html and 'class="resumed" d="M250.0 0V1000"' in html
    assert 'aria-label="x &lt;1&gt;"' in html


@pytest.mark.parametrize("band", [(None, 4.0), (2.0, None), (None, -9.0), (20.0, None)])
def test_a_band_with_one_bound(band):
    html = chart([Series("training", "training", [0, 1], [0.0, 10.0])], last_step=1, label="x", band=band)
    assert ('class="band"' in html) == (band not in ((None, -9.0), (20.0, None)))


def test_one_value_is_a_dot():
    html = chart([Series("held out", "held-out", [4], [1.0])], last_step=8, label="x")
    assert '<path class="dot held-out" d="M500.0 500.0h.01"/>' in html and "line" not in html


# ------------------------------------------------------------------------------------------ the page
def test_what_somebody_else_wrote_is_escaped(tmp_path):
    folder = make_run(
        tmp_path / "<img src=x>", more=[{"step": 12, "warning": HOSTILE}, {"step": 12, "ended": HOSTILE}],
        preflight=[{**CHECK, "name": HOSTILE, "why": HOSTILE}], options={HOSTILE: HOSTILE},
    )  # fmt: skip
    with (folder / LOG).open("a") as file:
        file.write(json.dumps({"step": 13, HOSTILE: 1.0, f"{HOSTILE}2": 2.0}) + "\n")
    turns = [{"role": HOSTILE, "content": HOSTILE}]
    write(folder / SAMPLES, *({"step": step, "prompt": prompt, "completion": HOSTILE, "kl": 1.0}
                              for step in (0, 4) for prompt in (HOSTILE, turns)))  # fmt: skip
    html = page(read_runs(folder), str(folder), live=True)
    assert html.count("owned") > 10
    assert html.count("<script") == 1 and "<img" not in html and "\x1b" not in html and "\x00" not in html
    assert "\\x1b[31m\\x00\\xd800" in html
    html.encode("utf-8")


def test_texts_keep_what_is_no_code():
    assert words("A\n\tfilm é \u200c \U0001f468\u200d\U0001f469") == "A\n\tfilm é \u200c \U0001f468\u200d\U0001f469"
    assert words("<b>&\"'\r") == "&lt;b&gt;&amp;&quot;&#x27;\\x0d"


def test_the_policy_allows_the_one_script_and_nothing_from_elsewhere(tmp_path):
    html = page(read_runs(make_run(tmp_path)), "x", live=True)
    script = re.search(r"<script>(.*)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#x27;sha256-{digest}&#x27;" in html and "default-src &#x27;none&#x27;" in html
    assert not re.findall(r"(?:https?:)?//[a-z]", html.replace("// ", ""))


def test_what_is_outside_of_its_range_comes_with_advice(tmp_path):
    healthy = content(read_runs(make_run(tmp_path / "a", preflight=[])))
    assert (
        "No warnings. Every figure that has a healthy range is inside of it." in healthy and "look here" not in healthy
    )
    odd = content(read_runs(make_run(tmp_path / "b", steps=(40, 44, 48))))  # a KL of 24 nats
    assert "<b>KL to the reference is 24</b> (nats a sequence). Healthy: rises to kl_target" in odd
    assert "Too high: raise beta" in odd and odd.count("look here") == 1
    assert "<b>Preflight: first KL.</b> It must be 0." in odd and "0 of 1 checks passed" in odd


def test_every_figure_is_somewhere(tmp_path):
    html = content(read_runs(make_run(tmp_path)))
    for name in ("score", "kl", "entropy", "grad_norm", "mine", "epoch"):
        assert f"<code>{name}</code>" in html or f"{name} <b>" in html, name
    assert "target 9" in html and "held-out" in html and "your own" in html


def test_samples_of_the_first_the_last_and_two_updates_between(tmp_path):
    make_run(tmp_path)
    rows = [
        {"step": step, "prompt": prompt, "completion": f" says {step}", "score": 1.5, "kl": 0.0}
        for step in range(0, 40, 4)
        for prompt in ("The film", "A")
    ]
    write(tmp_path / SAMPLES, *rows)
    html = content(read_runs(tmp_path))
    first = html[html.index("The film") : html.index("<details", html.index("The film"))]
    assert re.findall(r">says (\d+)", first) == ["0", "12", "24", "36"] and "6 more updates" in html
    assert html.count(">says 8<") == 2 and "score <b>1.5</b>" not in html and "score <b>1.50</b>" in html


def test_without_samples_it_says_how(tmp_path):
    assert "--sample_updates 4" in content(read_runs(make_run(tmp_path)))


def test_a_run_that_cannot_be_read_hides_no_other(tmp_path):
    make_run(tmp_path / "ppo")
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / LOG).write_text("mine\n")
    html = content(read_runs(tmp_path))
    assert "line 1: not valid JSON" in html and "KL to the reference" in html


# ------------------------------------------------------------------------------------------ what is served
@pytest.fixture
def served(tmp_path):
    """Serves a folder with one run; gives a function that asks for a path."""
    make_run(tmp_path / "run")
    server = make_server(tmp_path / "run", "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def ask(path="/", host=None):
        request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}{path}")
        if host:
            request.add_header("Host", host)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    yield ask
    server.shutdown()
    server.server_close()
    thread.join()


def test_news_come_once(served, tmp_path):
    status, html = served()
    version = re.search(r'data-version="(\w+)"', html)[1]
    assert status == 200 and "Step 12 of 20" in html
    assert served(f"/state?version={version}") == (204, "")
    make_run(tmp_path / "run", steps=(4, 8, 12, 16))
    status, news = served(f"/state?version={version}")
    assert status == 200 and "Step 16 of 20" in json.loads(news)["html"] and "16/20" in json.loads(news)["title"]
    assert served(f"/state?version={json.loads(news)['version']}") == (204, "")


@pytest.mark.parametrize("path", ["/run", "/../../etc/passwd", "//etc/passwd", "/training_log.jsonl", "/state/x"])
def test_no_other_path_is_served(path, served):
    assert served(path) == (404, "There is one page, at /.\n")


@pytest.mark.parametrize(
    ("host", "status"), [("evil.example", 403), ("127.0.0.1:9", 200), ("localhost", 200), ("[::1]:80", 200)]
)
def test_a_name_that_leads_here_is_refused(host, status, served):
    assert served(host=host)[0] == status


def test_a_folder_that_has_gone_is_a_message(served, tmp_path):
    (tmp_path / "run").rename(tmp_path / "moved")
    assert "no such folder" in served()[1]


# ------------------------------------------------------------------------------------------ the command
def test_a_file_that_can_be_sent(tmp_path, capsys):
    make_run(tmp_path / "run")
    file = tmp_path / "report.html"
    for _ in range(2):  # it replaces its own
        dashboard.main([str(tmp_path / "run"), "--write", str(file)])
        assert capsys.readouterr().out == f"{file}: {file.stat().st_size / 1000:,.0f} kB.\n"
    html = file.read_text()
    assert (
        html.startswith("<!doctype html>")
        and "follows the run</span>" not in html
        and "python -m pipeline.dashboard</code>" in html
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]


WRONG = {
    "no folder": (["nothing"], r"nothing: no such folder. Name the output_dir"),
    "a file": (["file.txt"], r"file.txt: a file. Name the output_dir of a stage"),
    "no run": (["empty"], r"empty: no run is here. A stage writes"),
    "a damaged log": (["damaged"], r"training_log.jsonl line 1: not valid JSON"),
    "somebody's file": (
        ["run", "--write", "file.txt"],
        r"--write \S+file.txt: this is no page that the dashboard has written",
    ),
    "a folder to write": (["run", "--write", "empty"], r"--write \S+empty: this is no page"),
    "no folder to write in": (
        ["run", "--write", "nothing/a.html"],
        r"cannot be written \(No such file or directory\)",
    ),
    "a port that is no port": (["run", "--port", "99999"], r"--host 127.0.0.1 --port 99999: cannot be opened"),
    "a host of somebody else": (["run", "--host", "192.0.2.1"], r"--host 192.0.2.1 --port 8060: cannot be opened"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_error(words, message, tmp_path, capsys):
    make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / LOG).write_text("mine\n")
    (tmp_path / "file.txt").write_text("mine")
    paths = [word if word.startswith("--") or words[at - 1] in ("--port", "--host") else str(tmp_path / word)
             for at, word in enumerate(words)]  # fmt: skip
    with pytest.raises((ValueError, OSError), match=message):
        dashboard.main(paths)
    assert (tmp_path / "file.txt").read_text() == "mine" and not list(tmp_path.glob("*.part"))


def test_a_port_that_is_taken(tmp_path):
    first = make_server(make_run(tmp_path), "127.0.0.1", 0)
    try:
        with pytest.raises(
            ValueError, match=r"cannot be opened \(Address already in use\). Name another port, or --port 0"
        ):
            make_server(tmp_path, "127.0.0.1", first.server_port)
    finally:
        first.server_close()


def test_it_starts_at_once_and_an_error_is_one_line(tmp_path):
    """Neither torch nor transformers is imported, nor gradio."""
    code = (
        "import sys, runpy; sys.argv = ['dashboard', 'nothing']\n"
        "try: runpy.run_module('pipeline.dashboard', run_name='__main__')\n"
        "finally: print([name for name in ('torch', 'transformers', 'gradio', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "[]\n")
    assert done.stderr == "nothing: no such folder. Name the output_dir of a stage, or a folder of several.\n"
