"""A report is one file that loads nothing, and says what the run's folder says."""

import base64
import html
import io
import json
import math
import os
import re
import shlex
import shutil
import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from contrastive_core.data import ImageDataset, Splits, mnist5k
from contrastive_core.randomness import Randomness
from contrastive_core.run_log import read_metrics
from cpc.context import turn, turn_back
from cpc.features import load_contexts, load_encoder
from cpc.pretrain import main_of_any_method, pretrain
from cpc.report import by_position, flat, main, page, papers_recipe, read_runs, to_repeat
from cpc.report_charts import Line, heat_maps, line_chart, number, share_table, thinned, ticks
from cpc.report_pictures import DRAWS, augmented, positions, some
from cpc.trained_cpc import last_weights

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
    assert len(pictures) == 3  # neighbours, predictions, augmented patches
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


@pytest.mark.parametrize("found", [[], {"label_split": "a"}, {"accuracies": [], "savings": [{"method": "CPC"}]}])
def test_a_summary_of_another_tool_is_one_line(found, made, call_tool, capsys, tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(found))
    with pytest.raises(SystemExit) as ended:
        call_tool(main, str(made / "cpc"), "--no-pictures", "--labels", str(tmp_path), "--out", str(tmp_path / "page"))
    assert ended.value.code == 2
    told = f"error: {tmp_path / 'summary.json'} is not what tools/sweep_labels.py writes: "
    assert capsys.readouterr().err.startswith(told)


def test_a_folder_of_several_runs_is_none_itself(made, tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "config.yaml").write_text("fraction: 0.01\npretrain: {}\nfinetune: {}\ndistill: {}\n")  # simclr_v2's
    with pytest.raises(FileNotFoundError, match=r"is no run but holds some: pass .*pretrain"):
        read_runs([tmp_path])


@pytest.mark.parametrize("name", ["cpc", "simclr"])
def test_the_command_trains_the_same_again(name, made, call_tool, monkeypatch, tmp_path):
    folder = shutil.copytree(made / name, tmp_path / "a run")
    comment, command = to_repeat(*read_runs([folder])).splitlines()
    python, tool, *arguments = shlex.split(command)
    assert (comment[0], python, tool) == ("#", "python", "tools/pretrain.py")
    monkeypatch.chdir(tmp_path)
    call_tool(main_of_any_method, *arguments)
    (again,) = (tmp_path / "runs").iterdir()
    weights, same = (load_file(each / "encoder.safetensors") for each in (folder, again))
    assert all(weights[key].equal(same[key]) for key in weights)
    assert {each.name for each in tmp_path.iterdir()} == {"a run", "runs"}


def test_a_loss_without_chance_is_not_said_to_be_nats(made, tmp_path):
    shutil.copytree(made / "simclr", tmp_path / "byol")
    rows = [{k: v for k, v in row.items() if k != "chance_loss"} for row in read_metrics(made / "simclr")]
    (tmp_path / "byol/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page(read_runs([tmp_path / "byol"]), None, with_pictures=False)
    assert "<figcaption>Loss <small></small>" in text
    assert "nats" not in text


def test_of_a_run_that_does_not_look_down_the_rest_is_shown(compose, tmp_path):
    run = pretrain(compose(*CPC[1:], *TINY, "method.directions=[right,left]", f"run_dir={tmp_path / 'side'}"))
    text = page(read_runs([run]), None)
    assert "no pictures" not in text
    assert text.count("data:image/png") == 2  # neighbours, augmented patches
    assert re.findall(r"<b>(\w+)</b>", text) == ["right", "left"]


@pytest.mark.parametrize(("count", "said"), [(20, "20"), (33, "16 or 17"), (40, "20"), (64, "32")])
def test_it_says_how_many_images_are_compared(count, said, made):
    splits = mnist5k(size=28)
    few = Splits(splits.train, splits.test.subset(torch.arange(count)))
    text = by_position(*read_runs([made / "cpc"]), few)
    assert f"the share of {count} held-out images in which it is told from all patches of {said} of them" in text


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


def axis_of(chart):
    return re.findall(r'text-anchor="end">(.*?)</text>', chart)


@pytest.mark.parametrize(
    "values", [[5.6631, 5.6634, 5.6629], [1e-3, 0.9999e-3, 0.9998e-3], [1e-3, 0.999999e-3], [0.99991, 0.99993]]
)
def test_no_two_marks_of_an_axis_say_the_same(values):
    marks = axis_of(line_chart("", "", [Line("a", [*enumerate(values)])]))
    assert len(set(marks)) == len(marks) > 1


def test_the_axis_of_a_number_that_stays_is_about_it():
    marks = [float(mark) for mark in axis_of(line_chart("", "", [Line("a", [(1, 3e-4), (2, 3e-4)])]))]
    assert all(1e-4 < mark < 5e-4 for mark in marks)
    assert "0" in axis_of(line_chart("", "", [Line("a", [(1, 0.0)])]))


def test_numbers_and_lines():
    assert [number(value) for value in (7.049254, 0.000066, 1500.0, 0.0)] == ["7.049", "6.6e-05", "1,500", "0"]
    many = [(float(x), 0.0) for x in range(5000)]
    assert len(thinned(many)) <= 602
    assert thinned(many)[-1] == many[-1]
    assert line_chart("none", "", [Line("a", [])]) == ""
    assert share_table("none", {}, "") == ""
    assert flat({"a": {"b": [1], "c": None}}) == {"a.b": "[1]", "a.c": "None"}
    assert papers_recipe("Classifier") == {}


AHEAD = {"down": (1, 0), "up": (-1, 0), "right": (0, 1), "left": (0, -1)}


@torch.no_grad()
def found_slowly(run, images, direction, offset, scored):
    """Shares by the place of the target, "(row, col)", in float64, one prediction at a time, told by coordinates."""
    latents = load_encoder(run, readout="grid")(images.float() / 255).double()
    kept = {name: weight.double() for name, weight in last_weights(run).items()}
    contexts, head = load_contexts(run).double(), f"heads.{direction}.heads.{offset}"
    n, rows, cols, _ = latents.shape
    seen = turn_back(contexts.networks[contexts.context_of[direction]](turn(latents, direction)), direction)
    targets = latents @ kept["target_projection.weight"].T
    found = {}
    for row in range(rows):
        for col in range(cols):
            source = row - offset * AHEAD[direction][0], col - offset * AHEAD[direction][1]
            if 0 <= source[0] < rows and 0 <= source[1] < cols:
                predictions = seen[:, source[0], source[1]] @ kept[f"{head}.weight"].T + kept[f"{head}.bias"]
                scores = [scored(targets) @ scored(prediction) for prediction in predictions]
                # as high as it only itself: a digit's empty corners are all alike, and none is told from the others
                hits = [int((score >= score[image, row, col]).sum()) == 1 for image, score in enumerate(scores)]
                found[row, col] = sum(hits) / n
    return found


@pytest.mark.parametrize(("loss", "scored"), [
    ([], lambda rows: rows), (["loss=nt_xent"], partial(F.normalize, dim=-1)),
], ids=["dot product", "cosine"])  # fmt: skip
def test_accuracies_on_the_grid_are_those_of_one_prediction_at_a_time(compose, tmp_path, loss, scored):
    """Of a run of some steps more: where nothing is found there is nothing to compare."""
    options = ["batch_size=16", "encoder.width=8", "steps=60", "threads=1", "probe_every=0", "optimizer.lr=3e-3"]
    run = pretrain(compose(*CPC[1:], *options, *loss, f"run_dir={tmp_path / 'run'}"))
    images = some(mnist5k(size=28).test, 6)
    found = positions(run, images, [2, 3])
    told = [value for grid in found.values() for line in grid for value in line if value > 0]
    assert len(told) > 12
    assert len({*told}) > 1
    assert list(found) == list(AHEAD)
    for direction, grid in found.items():
        by_offset = [found_slowly(run, images, direction, offset, scored) for offset in (2, 3)]
        for row, line in enumerate(grid):
            for col, value in enumerate(line):
                shares = [shares[row, col] for shares in by_offset if (row, col) in shares]
                expected = sum(shares) / len(shares) if shares else math.nan
                assert value == pytest.approx(expected, abs=1e-6, nan_ok=True), (direction, row, col)
        values = [value for line in grid for value in line if not math.isnan(value)]
        assert len(values) == 24  # of 36: the two rows or columns that a direction starts with are blank
    for direction, blank in {"down": (0, 1), "up": (4, 5)}.items():
        assert [row for row in range(6) if all(map(math.isnan, found[direction][row]))] == list(blank)
    for direction, blank in {"right": (0, 1), "left": (4, 5)}.items():
        assert [col for col in range(6) if all(math.isnan(line[col]) for line in found[direction])] == list(blank)


def test_the_images_are_compared_in_groups(made):
    images = some(mnist5k(size=28).test, 12)
    whole = positions(made / "cpc", images, [2], together=4)
    parts = [positions(made / "cpc", part, [2]) for part in images.split(4)]
    for direction, grid in whole.items():
        mean = torch.tensor([part[direction] for part in parts]).mean(0)
        torch.testing.assert_close(torch.tensor(grid), mean, equal_nan=True)


def test_a_heat_map_leaves_blank_what_is_not_predicted(made):
    text = heat_maps("where", {"down": [[math.nan, math.nan], [0.5, 0.25]]}, "a note")
    assert text.count("<td></td>") == 2
    assert '<td style="--share:1.000">50</td><td style="--share:0.500">25</td>' in text
    assert "<b>down</b> <small>37.5</small>" in text
    assert heat_maps("none", {}, "") == ""
    whole = page(read_runs([made / "cpc"]), None)
    maps = re.findall(r"<b>(\w+)</b>[^<]*<small>[\d.]+</small><table>(.*?)</table>", whole)
    assert [(name, body.count("<td"), body.count("<td></td>")) for name, body in maps] == [
        (name, 36, 12) for name in ("down", "up", "right", "left")
    ]
    assert "told from all patches of 32 of them, the mean over offsets 2, 3, 4." in whole


def test_augmented_patches_are_one_patch_drawn_again(made, tmp_path):
    seen = []

    def augment(patches, randomness):
        seen.append((patches, randomness))
        return patches

    splits = mnist5k(size=28)
    augmented(made / "cpc", augment, splits, tmp_path / "strip.png")
    ((patches, randomness),) = seen
    assert patches.shape == (4, 1, DRAWS, 3, 8, 8)
    assert (patches == patches[:, :, :1]).all()
    assert all(patch.std() > 0.1 for patch in patches[:, 0, 0])  # not a digit's empty corner
    assert isinstance(randomness, Randomness)
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.width > 500


def test_what_is_cut_smaller_than_it_was_trained_on_is_enlarged_not_framed(made, tmp_path):
    shutil.copytree(made / "cpc", tmp_path / "enlarged")
    card = json.loads((tmp_path / "enlarged/encoder.json").read_text())
    card["input"] |= {"image_size": 56, "load_size": 28}
    (tmp_path / "enlarged/encoder.json").write_text(json.dumps(card))
    seen = []

    def augment(patches, randomness):
        seen.append(patches)
        return patches

    white = ImageDataset(np.full((4, 28, 28, 3), 255, np.uint8), size=28)
    augmented(tmp_path / "enlarged", augment, Splits(white, None), tmp_path / "strip.png")
    assert (seen[0] == 1).all()


def test_an_augmentation_that_is_not_ours_is_not_called(made, tmp_path):
    shutil.copytree(made / "cpc", tmp_path / "other")
    config = (tmp_path / "other/config.yaml").read_text()
    assert "cpc.patch_augment.patch_augment_digits" in config
    changed = config.replace("cpc.patch_augment.patch_augment_digits", "webbrowser.open")
    (tmp_path / "other/config.yaml").write_text(changed)
    text = html.unescape(page(read_runs([tmp_path / "other"]), None))
    assert "other: no augmented patches (" in text
    assert "augments patches by webbrowser.open, which is not ours" in text
    assert "<b>down</b>" in text


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
        view.mouse.move(0, 0)
        if folder := os.environ.get("REPORT_SCREENSHOTS"):
            view.screenshot(path=f"{folder}/report.png", full_page=True)
        browser.close()
    assert not errors
    assert set(asked) <= {file.as_uri(), *(url for url in asked if url.startswith("data:"))}
