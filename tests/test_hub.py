"""Encoders saved, read, published and fetched through huggingface_hub: the same features, and no code from outside."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
import yaml
from export_runs import OURS, images, write_cpc_run, write_run

import cpc
from cpc.hub import PretrainedEncoder
from cpc.model_card import about_run


@pytest.fixture(scope="module")
def cpc_run(tmp_path_factory):
    return write_cpc_run(tmp_path_factory.mktemp("cpc") / "run")


@pytest.fixture
def saved(cpc_run, tmp_path):
    PretrainedEncoder.from_run(cpc_run).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def front_matter(page):
    return yaml.safe_load(page.split("---\n")[1])


@pytest.mark.parametrize("readout", ["mean", "grid", "context"])
def test_what_is_saved_is_what_is_read(readout, cpc_run, saved):
    expected = cpc.load_encoder(cpc_run, readout=readout)(images(4, 20))
    assert torch.equal(PretrainedEncoder.from_pretrained(saved, readout=readout)(images(4, 20)), expected)
    assert torch.equal(cpc.load_encoder(saved, readout=readout)(images(4, 20)), expected)
    assert sorted(file.name for file in saved.iterdir()) == [
        "README.md",
        "context.safetensors",
        "encoder.json",
        "encoder.safetensors",
    ]


def test_it_is_frozen_and_saved_again_the_same(saved, tmp_path):
    encoder = PretrainedEncoder.from_pretrained(saved)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(module.training for module in encoder.modules())
    encoder.save_pretrained(tmp_path / "again")
    for file in saved.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_batch_norm_and_whole_images(tmp_path):
    run = write_run(tmp_path / "run", f"{OURS}SmallCNN", {"widths": [4, 8]})
    PretrainedEncoder.from_run(run).save_pretrained(tmp_path / "saved")
    expected = cpc.load_encoder(run)(images())
    assert torch.equal(PretrainedEncoder.from_pretrained(tmp_path / "saved")(images()), expected)
    page = (tmp_path / "saved" / "README.md").read_text()
    assert "Unknown: the run does not say." in page
    assert "Not measured" in page


def test_the_page_says_what_the_run_does(cpc_run, tmp_path):
    encoder = PretrainedEncoder.from_run(cpc_run)
    encoder.save_pretrained(tmp_path / "saved", model_card_kwargs={"licence": "mit"})
    page = (tmp_path / "saved" / "README.md").read_text()
    assert front_matter(page) == {
        "library_name": "cpc-images",
        "license": "mit",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["self-supervised-learning", "cpc-images", "cpc", "arxiv:1905.09272"],
    }
    for said in (
        "| train | cats.parquet |",
        "| steps | 120 |",
        "| optimizer | name Adam, lr 0.001 |",
        "| trained | patches | mean | kNN | 40 | 0.625 |",
        "Pre-training ended with step 120, loss 2.5, chance\\_loss 4",
        'PretrainedEncoder.from_pretrained(".")',
    ):
        assert said in page
    assert "somebody" not in page + (tmp_path / "saved" / "encoder.json").read_text()
    assert huggingface_hub.ModelCard.load(tmp_path / "saved" / "README.md").data.license == "mit"
    assert "license" not in front_matter(str(encoder.generate_model_card()))
    assert "Not stated." in str(encoder.generate_model_card())
    with pytest.raises(ValueError, match=r"model_card_kwargs=\{'license': 'mit'\}: pass licence only"):
        encoder.generate_model_card(license="mit")


def test_words_of_a_run_stay_words(cpc_run, tmp_path):
    run = shutil.copytree(cpc_run, tmp_path / "run")
    hostile = "x | y |\n\n# [a](http://b)\n---\n<script>`"
    (run / "config.yaml").write_text(yaml.safe_dump({"steps": hostile, "data": {"_target_": "a.b", "train": hostile}}))
    rows = [{"encoder": hostile, "accuracy": 0.5}, {"accuracy": "high"}, 3]
    (run / "evaluation.json").write_text(json.dumps({"rows": rows}))
    (run / "metrics.jsonl").write_text("[" * 3000)
    page = str(PretrainedEncoder.from_run(run).generate_model_card())
    assert front_matter(page)["tags"][0] == "self-supervised-learning"
    assert [line for line in page.splitlines() if line.startswith(("# A", "# [", "##"))] == [
        "# An image encoder pre-trained with CPC",
        "## Load it",
        "## Trained on",
        "## Recipe",
        "## Measured",
        "## Licence",
    ]
    assert "| steps | `x / y / # [a](http://b) --- <script>'` |" in page
    assert about_run(run)["last_step"] == {}


@pytest.mark.parametrize("after", ['{"step": 7, "knn": 0.5}\n', '{"step": 7, "knn": 0.5}\n{"step": 8, "lo'])
def test_what_training_ended_with_is_not_the_probe_after_it(after, cpc_run, tmp_path):
    run = shutil.copytree(cpc_run, tmp_path / "run")
    ended = {"step": 7, "loss": 1.25, "chance_loss": 5.5, "accuracy": 0.75}
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n' + json.dumps(ended) + "\n" + after)
    assert about_run(run)["last_step"] == ended


@pytest.mark.parametrize(
    "about", [3, {"data": 3, "recipe": [1], "measured": {"a": 1}}, {"measured": [1], "last_step": 3}]
)
def test_a_strange_card_of_a_card_is_no_traceback(about, saved):
    card = json.loads((saved / "encoder.json").read_text())
    (saved / "encoder.json").write_text(json.dumps(card | {"about": about}))
    assert "Not measured" in str(PretrainedEncoder.from_pretrained(saved).generate_model_card())


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ({"name": "os.system", "arguments": {"command": "touch ran"}}, "encoder 'os.system' is not one of"),
        ({"name": f"{OURS}TimmTrunk", "arguments": {"name": "hf-hub:a/b"}}, "names the trunk 'hf-hub:a/b'"),
        ({"name": f"{OURS}TimmTrunk", "arguments": {"name": "local-dir:/tmp"}}, "names the trunk 'local-dir:/tmp'"),
        ({"name": "cpc.encoders.resnet_small", "arguments": {"_target_": "os.system"}}, "only numbers, words"),
        (
            {"name": "cpc.encoders.resnet_small", "arguments": {"width": 8, "blocks": [1, 1]}},
            "are not those of the encoder",
        ),
    ],
)
def test_a_folder_from_anyone_runs_no_code(architecture, said, saved, monkeypatch):
    monkeypatch.chdir(saved)
    card = json.loads((saved / "encoder.json").read_text())
    (saved / "encoder.json").write_text(json.dumps(card | {"architecture": architecture}))
    (saved / "config.json").write_text(json.dumps({"card": {"architecture": architecture}}))
    with pytest.raises(ValueError, match=said):
        PretrainedEncoder.from_pretrained(saved)
    assert not (saved / "ran").exists()


def test_the_mixins_own_configuration_is_not_read(saved):
    (saved / "config.json").write_text("[" * 100_000)
    assert PretrainedEncoder.from_pretrained(saved).readout == "mean"
    (saved / "encoder.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"encoder\.json cannot be read: it is nested deeper"):
        PretrainedEncoder.from_pretrained(saved)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*typo/typo/typo, and no repository is called that"):
        PretrainedEncoder.from_pretrained(tmp_path / "typo/typo/typo")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as publishing and fetching a small repository takes."""

    files: dict[str, bytes]
    asked: list[str]

    def do_POST(self):
        body = self._body()
        if self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/main" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer({"commitUrl": self._url("/u/m/commit/1"), "commitOid": "1" * 40})
        elif self.path == "/api/repos/create":
            self._answer({"url": self._url("/u/m"), "name": "u/m"})
        else:  # of the front matter
            self._answer({"errors": [], "warnings": []})

    def do_GET(self):
        self.asked.append(self.path)
        if "/resolve/" not in self.path:
            siblings = [{"rfilename": name} for name in self.files]
            tree = [{"type": "file", "path": n, "size": len(c), "oid": n} for n, c in self.files.items()]
            self._answer(tree if "/tree/" in self.path else {"id": "u/m", "sha": "1" * 40, "siblings": siblings})
        else:
            self._send(self.files[self.path.rpartition("/")[2]])

    do_HEAD = do_GET

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _url(self, path):
        return f"http://{self.headers['Host']}{path}"

    def _answer(self, value):
        self._send(json.dumps(value).encode())

    def _send(self, content):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hash(content):x}"')
        self.send_header("X-Repo-Commit", "1" * 40)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A hub of our own on this machine, which huggingface_hub takes for its own."""
    handler = type("Handler", (Hub,), {"files": {}, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", endpoint, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        yield handler
        server.shutdown()
        thread.join()


def test_published_and_fetched(cpc_run, hub, tmp_path):
    encoder = PretrainedEncoder.from_run(cpc_run)
    encoder.push_to_hub("u/m", token="none", model_card_kwargs={"licence": "mit"})
    assert sorted(hub.files) == ["README.md", "context.safetensors", "encoder.json", "encoder.safetensors"]
    assert front_matter(hub.files["README.md"].decode())["license"] == "mit"
    hub.files["setup.py"] = b"raise SystemExit"
    fetched = PretrainedEncoder.from_pretrained("u/m", cache_dir=tmp_path, token=False)
    assert torch.equal(fetched(images(3, 16)), encoder(images(3, 16)))
    assert {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path} == {
        "context.safetensors",
        "encoder.json",
        "encoder.safetensors",
    }
    again = PretrainedEncoder.from_pretrained("u/m", cache_dir=tmp_path, token=False, local_files_only=True)
    assert torch.equal(again(images(3, 16)), encoder(images(3, 16)))
