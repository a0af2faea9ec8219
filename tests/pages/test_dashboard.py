"""`pipeline.dashboard` in a real browser: it follows a run, shows what a policy writes as text, and fits a phone."""

import threading
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from pipeline.pages.dashboard_server import make_server
from pipeline.rl.sample_table import SampleTable
from pipeline.runs.live_files import SAMPLES
from pipeline.runs.output_lock import claim, release_all
from tests.pages.test_dashboard_page import HOSTILE, make_run, write


pytestmark = pytest.mark.slow


@pytest.fixture
def serve(browser):
    """Serves a folder and opens it; gives a function that ends the server too."""
    servers = []

    def end():
        while servers:
            server, thread = servers.pop()
            server.shutdown()
            server.server_close()
            thread.join()

    def serve(folder: Path, hash=""):
        server = make_server(folder, "127.0.0.1", 0)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        browser.driver.get_log("browser")  # of pages before
        browser.open(f"http://127.0.0.1:{server.server_port}/{hash}")
        return end

    yield serve
    browser.open("about:blank")
    end()


def complaints(browser) -> list[str]:
    return [entry["message"] for entry in browser.driver.get_log("browser")]


def wider_than_window(browser) -> int:
    return browser.driver.execute_script("return document.documentElement.scrollWidth - innerWidth")


class Look(TrainerCallback):
    """Look at the page while the run is in the middle of its training."""

    def __init__(self, browser):
        self.browser, self.seen = browser, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            self.browser.wait_for("Step 4 of 8.")
            self.seen.append(self.browser.text)


def test_it_follows_a_run(browser, serve, make_trainer, tmp_path):
    """A run of PPO, from before its first step to its end, on one page that is never loaded again."""
    folder = tmp_path / "ppo"
    claim(folder)
    try:
        serve(folder)
        browser.wait_for("does not train yet")
        trainer = make_trainer(
            output_dir=str(folder), sample_updates=1, kl_target=6.0, kl_horizon=1000.0, logging_steps=2
        )
        trainer.add_callback(SampleTable(trainer, Dataset.from_dict({"prompt": ["The film", "It's a"]})))
        trainer.add_callback(look := Look(browser))
        trainer.train(preflight=[{"name": "n", "measured": 0.5, "bound": "b", "result": "passed", "why": "w"}])
        (during,) = look.seen
        for text in ("running", "left.", "Explained variance", "target 6", "The film", "1 of 1 checks passed"):
            assert text in during, text
        browser.wait_for("Step 8 of 8.")
        browser.wait_for("finished")
        assert "step 8" in browser.text and "Trained in" in browser.text
        assert browser.driver.title.startswith("8/8 PPO finished")
    finally:
        release_all()
    assert complaints(browser) == []


def test_news_change_nothing_that_somebody_has_opened(browser, serve, tmp_path):
    make_run(tmp_path / "ppo")
    make_run(tmp_path / "sft", stage="sft", options={})
    end = serve(tmp_path)
    browser.wait_for("Step 12 of 20.")
    assert [link.text for link in browser.driver.find_elements("css selector", "nav a")] == ["sft", "ppo"]
    browser.find("nav a[href='#sft']").click()
    browser.wait(lambda: browser.find("#sft").is_displayed() and not browser.find("#ppo").is_displayed())
    browser.find("#sft details.more summary").click()
    make_run(tmp_path / "sft", steps=(4, 8, 12, 16), stage="sft", options={})
    browser.wait_for("Step 16 of 20.")
    assert browser.find("#sft details.more").get_attribute("open") and not browser.find("#ppo").is_displayed()
    browser.driver.refresh()
    browser.wait(lambda: browser.find("#sft").is_displayed())  # the address names it
    assert complaints(browser) == []
    end()
    browser.wait_for("the dashboard has ended")


def test_what_a_policy_writes_is_text(browser, serve, tmp_path):
    make_run(tmp_path, more=[{"step": 12, "warning": HOSTILE}])
    image = "<img src=x onerror=\"document.title = 'owned'\">"
    write(tmp_path / SAMPLES, {"step": 0, "prompt": HOSTILE, "completion": image, "score": 1.0})
    serve(tmp_path)
    browser.wait_for(image)
    assert "owned" not in browser.driver.title and "<script>document.title = 'owned'</script>" in browser.text
    assert browser.driver.find_elements("css selector", "img") == [] and complaints(browser) == []


def test_values_under_the_pointer(browser, serve, tmp_path):
    make_run(tmp_path)
    serve(tmp_path)
    browser.wait_for("KL to the reference")
    from selenium.webdriver import ActionChains

    plot = browser.find(".plot")
    ActionChains(browser.driver).move_to_element_with_offset(plot, plot.size["width"] // 6, 0).perform()  # two thirds
    browser.wait_for("step 8: 0.800, held out 0.400")
    tips = [tip.text for tip in browser.driver.find_elements("css selector", ".tip")]
    assert "step 8: 4" in tips  # the KL, in its own chart
    ActionChains(browser.driver).move_to_element(browser.find("h1")).perform()
    browser.wait(lambda: not browser.driver.find_elements("css selector", ".tip"))


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_its_window(width, browser, serve, tmp_path):
    long = "word" * 60
    make_run(tmp_path / "runs" / "ppo", options={"kl_target": 9.0, "mine": long})
    make_run(tmp_path / "runs" / long[:80])
    rows = [{"step": 0, "prompt": [{"role": "user", "content": long}], "completion": long, "score": -1.25, "kl": 12.5}]
    write(tmp_path / "runs" / "ppo" / SAMPLES, *rows)
    browser.width(width)
    try:
        serve(tmp_path / "runs")
        browser.wait_for("KL to the reference")
        assert wider_than_window(browser) <= 0
        browser.driver.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true })")
        assert wider_than_window(browser) <= 0
        columns = browser.find("section:not([hidden]) .curves").value_of_css_property("grid-template-columns")
        assert len(columns.split()) == {1280: 3, 390: 1}[width]
    finally:
        browser.width(1280)


def test_a_page_that_was_written_needs_no_server(browser, tmp_path):
    from pipeline import dashboard

    make_run(tmp_path / "ppo")
    make_run(tmp_path / "sft", stage="sft")
    dashboard.main([str(tmp_path), "--write", str(tmp_path / "report.html")])
    browser.driver.get_log("browser")
    browser.open((tmp_path / "report.html").as_uri())
    browser.wait_for("Written ")
    browser.find("nav a[href='#sft']").click()
    browser.wait(lambda: browser.find("#sft").is_displayed())
    assert complaints(browser) == []
