"""A report is one file that loads nothing, and says what the run's folder says."""

import base64
import html
import io
import json
import re
import shutil
import time

import pytest
from PIL import Image

from contrastive_core.run_log import read_metrics
from cpc.pretrain import pretrain
from cpc.report import flat, main, page, papers_recipe, read_runs
from cpc.report_charts import Line, line_chart, number, share_table, thinned, ticks

TINY = ["batch_size=8", "encoder.width=4", "steps=4", "threads=1", "probe_every=2", "probe_images=50", "log_every=1"]
CPC = ["method=cpc", "method.context.width=8", "method.context.layers=1"]

pytestmark = pytest.mark.usefixtures("as_a_new_process")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of CPC and one of SimCLR."""
    import hydra

    from cpc.configs import config_folder

    folder = tmp_path_factory.mktemp("reported")
    for name, options in {"cpc": CPC, "simclr": ["method=simclr"]}.items():
        with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
            pretrain(hydra.compose("pretrain", [*options, *TINY, f"run_dir={folder / name}"]))
    return folder


def lines_of(text):
    """What the charts carry: {title: {line: [(x, y), ...]}}."""
    charts = re.findall(r"data-lines='(.*?)'><figcaption>(.*?) <small>", text)
    return {
        title: {line["name"]: list(zip(line["x"], line["y"], strict=True)) for line in json.loads(html.unescape(data))}
        for data, title in charts
    }


def assert_loads_nothing(text):
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?!data:)[^\"' >]+", text)
    assert not re.findall(r"url\(|@import|https?://|fetch\(|XMLHttpRequest", text)
    assert len(text) < 3_000_000


def test_a_finished_run(made):
    text = page(read_runs([made / "cpc"]), None)
    assert_loads_nothing(text)
    rows = [row for row in read_metrics(made / "cpc") if "loss" in row]
    charts = lines_of(text)
    assert charts["Loss against chance"]["loss"] == [(row["step"], row["loss"]) for row in rows]
    assert charts["Loss against chance"]["chance"] == [(row["step"], row["chance_loss"]) for row in rows]
    assert [x for x, _ in charts["kNN among training images"]["kNN"]] == [2, 4]
    assert "<td>4 of 4</td>" in text
    assert f"{100 * rows[-1]['accuracy/down_2']:.1f}</td>" in text.partition("<th>down</th>")[2]
    pictures = re.findall(r"data:image/png;base64,([\w+/=]+)", text)
    assert len(pictures) == 2  # neighbours, predictions
    assert all(Image.open(io.BytesIO(base64.b64decode(each))).width > 300 for each in pictures)
    assert "experiment=imagenet_cpc_v2" in text
    assert "<tr class=marked><td>batch_size</td><td>8</td><td>512</td></tr>" in text
    assert "warning" not in text.partition("<body>")[2]


def test_several_runs_share_their_axes(made):
    charts = lines_of(page(read_runs([made / "cpc", made / "simclr"]), None, with_pictures=False))
    assert list(charts["Loss against chance"]) == ["cpc loss", "simclr loss", "cpc chance", "simclr chance"]


def test_a_killed_run_and_one_of_one_step(made, tmp_path):
    shutil.copytree(made / "cpc", tmp_path / "killed")
    (tmp_path / "killed/encoder.json").unlink()
    rows = read_metrics(made / "cpc")
    (tmp_path / "killed/metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    text = page(read_runs([tmp_path / "killed"]), None)
    assert_loads_nothing(text)
    assert "killed was stopped before its end: the same command with resume=auto goes on." in text
    assert "killed: no encoder is exported yet" in text
    assert lines_of(text)["Loss against chance"]["loss"] == [(1, rows[0]["loss"])]
    (tmp_path / "killed/metrics.jsonl").unlink()
    assert "has no rows in metrics.jsonl yet" in page(read_runs([tmp_path / "killed"]), None)


def test_a_collapsed_run_says_so(made, tmp_path):
    shutil.copytree(made / "simclr", tmp_path / "flat")
    card = json.loads((made / "simclr/encoder.json").read_text())
    card["collapsed"] = "collapsed: the projections' spread is 0.001"
    (tmp_path / "flat/encoder.json").write_text(json.dumps(card))
    text = html.unescape(page(read_runs([tmp_path / "flat"]), None, with_pictures=False))
    assert "flat has collapsed: the projections' spread is 0.001. It gives every image much the same vector" in text


def test_data_that_is_gone_is_a_note(made, tmp_path):
    shutil.copytree(made / "cpc", tmp_path / "moved")
    config = (tmp_path / "moved/config.yaml").read_text()
    (tmp_path / "moved/config.yaml").write_text(config.replace("data.mnist5k", "data.elsewhere"))
    assert "no pictures, since its data or weights cannot be read" in page(read_runs([tmp_path / "moved"]), None)


def test_names_from_a_folder_stay_words(made, tmp_path):
    shutil.copytree(made / "simclr", tmp_path / "<script>alert(1)<script>")
    text = page(read_runs([tmp_path / "<script>alert(1)<script>"]), None, with_pictures=False)
    assert "<script>alert" not in text


def test_a_label_curve(made, tmp_path):
    accuracies = [
        {"method": "CPC", "protocol": "linear", "labels": n, "accuracy": a} for n, a in ((20, 0.5), (100, 0.75))
    ]
    saving = {"method": "CPC", "protocol": "linear", "labels": 20, "against": "best", "saving": "> 2.0"}
    found = {"accuracies": accuracies, "savings": [{**saving, "low": "1.5", "high": "3.0"}]}
    (tmp_path / "summary.json").write_text(json.dumps(found))
    text = page(read_runs([made / "cpc"]), tmp_path, with_pictures=False)
    assert lines_of(text)["Accuracy against labels"] == {"CPC, linear": [(20, 0.5), (100, 0.75)]}
    assert "<td>&gt; 2.0</td><td>1.5 to 3.0</td>" in text


def test_the_tool(made, call_tool, capsys, tmp_path):
    call_tool(main, str(made / "simclr"), "--no-pictures", "--out", str(tmp_path / "deep/page.html"))
    assert capsys.readouterr().out == f"{tmp_path / 'deep/page.html'}\n"
    assert_loads_nothing((tmp_path / "deep/page.html").read_text())
    for arguments, line in (
        ([str(tmp_path)], f"error: {tmp_path} holds no run: pass a folder with config.yaml and metrics.jsonl\n"),
        ([str(made / "cpc"), "--labels", str(tmp_path)], f"error: no summary.json in {tmp_path}: pass --labels with"),
    ):
        with pytest.raises(SystemExit) as ended:
            call_tool(main, *arguments)
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (0, 10, [0, 2.5, 5, 7.5, 10]), (1, 150, [50, 100, 150]), (3, 3, [3])],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == expected


def test_numbers_and_lines():
    assert [number(value) for value in (7.049254, 0.000066, 1500.0, 0.0)] == ["7.049", "6.6e-05", "1,500", "0"]
    many = [(float(x), 0.0) for x in range(5000)]
    assert len(thinned(many)) <= 602
    assert thinned(many)[-1] == many[-1]
    assert line_chart("none", "", [Line("a", [])]) == ""
    assert share_table("none", {}, "") == ""
    assert flat({"a": {"b": [1], "c": None}}) == {"a.b": "[1]", "a.c": "None"}
    assert papers_recipe("Classifier") == {}


@pytest.mark.slow
def test_in_a_browser_it_reads_values_off(made, tmp_path):
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    file = tmp_path / "page.html"
    file.write_text(page(read_runs([made / "cpc", made / "simclr"]), None))
    rows = [row for row in read_metrics(made / "cpc") if "loss" in row]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        view = browser.new_page(viewport={"width": 1200, "height": 900})
        errors, asked = [], []
        view.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        view.on("pageerror", lambda error: errors.append(str(error)))
        view.on("request", lambda request: asked.append(request.url))
        view.goto(file.as_uri())
        began = time.perf_counter()
        view.reload(wait_until="load")
        assert time.perf_counter() - began < 1
        figure = view.locator("figure.chart").first
        box = figure.locator("svg").bounding_box()
        view.mouse.move(box["x"] + box["width"] - 15, box["y"] + box["height"] / 2)
        read = figure.locator("output").inner_text()
        assert read.startswith("step 4: ")
        shown = float(re.search(r"cpc loss ([\d.]+)", read)[1])
        assert shown == pytest.approx(rows[-1]["loss"], rel=1e-3)
        figure.locator("button").first.click()
        assert figure.locator("polyline").first.evaluate("line => line.style.display") == "none"
        view.mouse.move(box["x"] + 60, box["y"] + box["height"] / 2)
        assert "cpc loss" not in figure.locator("output").inner_text()
        browser.close()
    assert not errors
    assert set(asked) <= {file.as_uri(), *(url for url in asked if url.startswith("data:"))}
