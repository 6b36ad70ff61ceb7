"""report.html: a well-formed page that needs nothing else, and what a browser makes of it; sweep.csv; environment/."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from launch import environment, report
from launch.sweep import collate

ROWS = [
    {"step": 0, "held_out_loss": 5.5},
    *(
        {"step": step, "loss": 5.5 - step / 10, "tokens_per_s": 1e4, "grad_norm": 1.0, "memory_gb": 2.0,
         "memory_gb_by_rank": [1.5, 2.0]}
        for step in range(1, 41)
    ),
    {"step": 40, "held_out_loss": 1.6},
]  # fmt: skip


class Outline(HTMLParser):
    """The elements of a page; what is open at its end, or closed out of turn, is an error."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.linked: list[str] = []
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.linked += [value for name, value in attrs if name in ("src", "href")]
        # the only one that is never closed here
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page(rows: list[dict] = ROWS, state: str = "ended", layers: str = "2 x rms_norm", **documents: str) -> str:
    return report.page("/runs/a", state, rows, layers, documents)


def test_the_page_is_well_formed_and_needs_nothing_else():
    outline = Outline(page(run="train: {steps: 40}"))
    # training, held out, tokens/s, two ranks, gradient norm
    assert outline.seen.count("svg") == 4 and outline.seen.count("polyline") == 6
    assert not outline.linked and "script" not in outline.seen


def test_what_it_shows_is_text_whatever_it_is():
    shown = page(layers="<script>alert(1)</script>", run="a: <b>")
    assert "<script>" not in shown and "a: &lt;b&gt;" in shown


def test_a_page_without_numbers_and_one_with_odd_ones():
    Outline(page(rows=[]))
    rows = [{"step": 1, "loss": float("nan"), "tokens_per_s": 5.0}, {"step": 2, "loss": float("inf"), "grad_norm": 0.0}]
    outline = Outline(page(rows=rows))
    # one point of tokens/s, one of gradient norm
    assert outline.seen.count("polyline") == 2
    assert "nan" not in page(rows=rows) and "inf," not in page(rows=rows)


def test_a_loss_that_is_no_number_any_more_says_so_and_since_when():
    values = [5.0, float("nan"), 4.0, float("nan"), float("inf"), float("nan")]
    rows = [{"step": 2 * i, "loss": value, "held_out_loss": value} for i, value in enumerate(values)]
    assert dict(report.facts(rows))["loss"] == "NaN from step 6 on"
    assert dict(report.facts(rows))["held-out loss"] == "5.0000 → NaN from step 6 on"
    assert dict(report.facts(rows[:5]))["loss"] == "inf from step 6 on"
    assert dict(report.facts(rows[:3]))["loss"] == "4.0000"
    assert "NaN from step 6 on" in page(rows=rows)


def test_it_reloads_itself_only_while_the_run_goes():
    assert 'http-equiv="refresh"' in page(state="running")
    assert 'http-equiv="refresh"' not in page(state="ended")


# of a machine that is gone nobody writes how the run ended
def test_it_says_how_long_ago_a_running_run_may_have_been_heard_of(tmp_path, monkeypatch):
    folder = written_run(tmp_path / "run", 3, ROWS)
    dashboard = report.Dashboard(folder, object())
    for now, seconds in ((0.0, 10), (10.0, 10), (35.5, 26), (45.5, 26)):
        monkeypatch.setattr(report.time, "monotonic", lambda now=now: now)
        dashboard.update()
        assert f", until now every {seconds} s or sooner;" in (folder / "report.html").read_text()
    report.write(folder, "ended")
    assert "sooner" not in (folder / "report.html").read_text()


def test_many_ranks_are_shown_by_the_least_and_the_most():
    rows = [{"step": 1, "memory_gb_by_rank": [float(rank) for rank in range(1024)]}]
    assert report.memory_by_rank(rows) == {"most": [(1, 1023.0)], "least": [(1, 0.0)]}


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    thinned = report.thinned([(float(i), 0.0) for i in range(100_000)])
    assert len(thinned) <= report.POINTS + 1 and (thinned[0][0], thinned[-1][0]) == (0.0, 99_999.0)


@pytest.mark.parametrize(
    ("low", "high", "ticks"), [(0, 10, [0, 2, 4, 6, 8, 10]), (5.37, 5.56, [5.4, 5.45, 5.5, 5.55]), (3, 3, [3])]
)
def test_ticks_are_round_numbers(low, high, ticks):
    assert report.ticks(low, high, 5) == pytest.approx(ticks)


def written_run(folder: Path, seed: int, rows: list[dict]) -> Path:
    folder.mkdir()
    (folder / "run.yaml").write_text(f"train:\n  seed: {seed}\nfolder: {folder}\n")
    # the last line is in the midst of being written
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99')
    return folder


def test_it_is_made_of_what_the_folder_holds(tmp_path):
    folder = written_run(tmp_path / "run", 3, ROWS)
    report.write(folder, state="ended")
    shown = (folder / "report.html").read_text()
    assert "5.5000 → 1.6000" in shown and "seed: 3" in shown and ">2.00 GB<" in shown
    assert not (folder / ".report.html").exists()


# what is left of a run whose rank 0 was killed: a page that says it is running
def test_the_last_word_is_said_where_no_rank_could(tmp_path):
    folder = written_run(tmp_path / "run", 3, ROWS)
    for before in ("starting", "running", "ended", "failed"):
        report.write(folder, before)
        report.finish(folder, "failed: a")
        after = before if before in ("ended", "failed") else "failed: a"
        assert f'<p class="quiet">{after}, ' in (folder / "report.html").read_text(), before
        report.write(folder, before)
        report.finish(folder, "interrupted", over="failed")
        after = before if before == "ended" else "interrupted"
        assert f'<p class="quiet">{after}, ' in (folder / "report.html").read_text(), before
    (folder / "report.html").unlink()
    assert subprocess.run([sys.executable, report.__file__, folder, "137"]).returncode == 0
    shown = (folder / "report.html").read_text()
    assert '<p class="quiet">failed: SIGKILL (exit status 137), ' in shown and "http-equiv" not in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "the following arguments are required: FOLDER"),
        (["/no/run"], "/no/run: no such folder"),
        ([str(Path(__file__).parent), "failed"], "argument STATUS: invalid int value: 'failed'"),
    ],
)
def test_a_page_of_no_run_is_not_written(words, says):
    ended = subprocess.run([sys.executable, report.__file__, *words], capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.endswith(f"error: {says}\n"), ended.stderr


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (-9, "failed: SIGKILL (exit status -9)"),  # the command itself
        (247, "failed: SIGKILL (exit status 247)"),  # DeepSpeed's launcher
        (143, "failed: SIGTERM (exit status 143)"),  # a shell
        (255, "failed: exit status 255"),  # ssh's own
        (1, "failed: exit status 1"),
        (128, "failed: exit status 128"),
    ],
)
def test_an_exit_status_in_words(status, words):
    assert report.failed(status) == words


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.mark.skipif(not BROWSER, reason=f"needs a browser: one of {', '.join(BROWSERS)}")
def test_a_browser_draws_it(tmp_path):
    folder = written_run(tmp_path / "run", 3, ROWS)
    (folder / "layers.txt").write_text("2 x rms_norm")
    report.write(folder, state="ended")
    # measured by the browser: each line's extent, in its own units; what can be read while parts are folded up
    measure = """<script>
    document.title = [...document.querySelectorAll('polyline')].map(p => p.getBBox().width)
    document.body.append(Object.assign(document.createElement('output'), {textContent: document.body.innerText}))
    </script>"""
    page = folder / "measured.html"
    page.write_text((folder / "report.html").read_text().replace("</body>", f"{measure}</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    drawn = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=60)
    widths = re.search("<title>([0-9.,]+)</title>", drawn.stdout)
    assert widths and all(float(width) > 400 for width in widths[1].split(",")), drawn.stdout[-2000:]
    seen = drawn.stdout.partition("<output>")[2]
    for words in ("5.5000 → 1.6000", "rank 1", "Tokens per second", "2 x rms_norm", "run.yaml"):
        assert words in seen, seen
    assert "seed: 3" not in seen


def test_a_sweeps_table_has_the_keys_that_differ_and_how_each_point_ended(tmp_path):
    end = {"step": 40, "held_out_before": 5.5, "held_out_after": 1.6, "seconds": 9.0, "memory_gb": 2.0}
    written_run(tmp_path / "0", 1, [*ROWS, end])
    written_run(tmp_path / "1", 2, [])
    # beyond ten points the folders' names don't sort as words
    written_run(tmp_path / "10", 3, [])
    assert collate(tmp_path).read_text().splitlines() == [
        "point,train.seed,step,loss,held_out_before,held_out_after,tokens_per_s,memory_gb,seconds",
        "0,1,40,1.5,5.5,1.6,10000.0,2.0,9.0",
        "1,2,,,,,,,",
        "10,3,,,,,,,",
    ]


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "GITHUB_PAT", "NCCL_AUTH", "DS_CREDENTIALS",
     "SSH_PASSPHRASE", "accessToken", "apiKey"],
)  # fmt: skip
def test_a_secret_is_never_captured(name):
    assert environment.is_secret(name)
    assert environment.settings({name: "x", "HF_HOME": "/hf"}, [name, "HF_"]) == {"HF_HOME": "/hf"}


def test_settings_are_the_variables_that_matter():
    env = {"NCCL_DEBUG": "INFO", "EDITOR": "vi", "TOKENIZERS_PARALLELISM": "false", "HF_ENDPOINT": "https://me:pw@hub"}
    assert environment.settings(env) == {"NCCL_DEBUG": "INFO"}


@pytest.mark.parametrize(
    "name",
    ["TOKENIZERS_PARALLELISM", "MAX_TOKENS", "max_new_tokens", "HF_TOKEN_PATH", "SSH_AUTH_SOCK", "monkey", "author"],
)
def test_what_only_sounds_like_a_secret(name):
    assert not environment.is_secret(name, "4096")


def test_a_switch_is_no_secret_and_a_token_by_any_name_is():
    assert not environment.is_secret("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    assert environment.is_secret("HF_TOKEN", "hf_x")
    for value in (f"glpat-{'x' * 20}", f"AIza{'x' * 35}", f"eyJ{'x' * 20}.eyJ{'x' * 20}.sig"):
        assert environment.is_secret("NOTE", value)
