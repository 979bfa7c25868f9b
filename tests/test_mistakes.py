"""Every mistake in `mistakes.yaml` ends in one line that says what came and what to pass, with nothing left behind."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

import cpc.distill
import cpc.evaluate
import cpc.finetune
import cpc.pretrain
import cpc.simclr_v2
import cpc.sweep_labels

MAINS = {
    "pretrain_cpc": cpc.pretrain.main,
    "pretrain": cpc.pretrain.main_of_any_method,
    "evaluate": cpc.evaluate.main,
    "finetune": cpc.finetune.main,
    "distill": cpc.distill.main,
    "sweep_labels": cpc.sweep_labels.main,
    "simclr_v2": cpc.simclr_v2.main,
}
MISTAKES = yaml.safe_load(Path(__file__).with_name("mistakes.yaml").read_text())
TABLE = [(tool, given, said) for tool, rows in MISTAKES.items() for given, said in rows]
SMALL = {"steps": "steps=1", "batch_size": "batch_size=4", "run_dir": "run_dir={out}"}


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_tables(folder: Path) -> None:
    images = [png(i) for i in range(40)]
    tables = {
        "good": {"image": images, "label": [i % 4 for i in range(40)]},
        "unlabelled": {"image": images},
        "noimage": {"img": images},
        "textlabel": {"image": images, "label": ["a"] * 40},
        "floatlabel": {"image": images, "label": [0.5] * 40},
        "neglabel": {"image": images, "label": [-3] * 40},
        "intimage": {"image": list(range(40))},
        "allbad": {"image": [b"x"] * 40, "label": [0] * 40},
        "norows": {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())},
    }
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    (folder / "text.parquet").write_text("hello")
    (folder / "empty.parquet").write_bytes(b"")
    (folder / "truncated.parquet").write_bytes((folder / "good.parquet").read_bytes()[:500])


def write_folders(folder: Path) -> None:
    (folder / "emptyfolder").mkdir()
    (folder / "noimages").mkdir()
    (folder / "noimages" / "a.txt").write_text("x")
    for name in ("train/a/1.png", "train/b/1.png", "test/c/1.png"):
        (folder / "split" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "split" / name).write_bytes(png(1))
    write_tar(folder / "wordlabel.tar", {"a.png": png(1), "a.cls": b"cat"})
    write_tar(folder / "noimage.tar", {"a.txt": b"x"})
    write_tar(folder / "good.tar", {f"{i}.png": png(i) for i in range(20)})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(20)], "label": list(range(20))}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder / "hf")


def write_runs(folder: Path) -> None:
    """A run of two steps, and copies of it that are damaged or hostile."""
    with pytest.MonkeyPatch.context() as patch:
        small = ["encoder.width=4", "method.context.layers=1", "method.context.width=4", "threads=1"]
        options = ["steps=2", "batch_size=4", "probe_every=0", f"run_dir={folder / 'run'}", *small]
        patch.setattr("sys.argv", ["tool.py", *options])
        cpc.pretrain.main()
    for name in ("damaged", "badcard", "badweights", "hostile"):
        shutil.copytree(folder / "run", folder / name)
    for file in (folder / "damaged" / "checkpoints").glob("*/*"):
        file.write_bytes(file.read_bytes()[:20])
    (folder / "badcard" / "encoder.json").write_text("{")
    (folder / "badweights" / "encoder.safetensors").write_bytes(b"12345")
    card = json.loads((folder / "hostile" / "encoder.json").read_text())
    card["architecture"] = {"name": "os.system", "arguments": {"command": "touch ran"}}
    (folder / "hostile" / "encoder.json").write_text(json.dumps(card))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_tables(folder)
    write_folders(folder)
    write_runs(folder)
    return folder


def test_the_list_is_long():
    assert len(TABLE) >= 200
    assert len({(tool, str(given)) for tool, given, _ in TABLE}) == len(TABLE)


@pytest.mark.usefixtures("as_a_new_process")
@pytest.mark.parametrize(("tool", "given", "said"), TABLE, ids=[f"{tool} {given}" for tool, given, _ in TABLE])
def test_one_clear_line(tool, given, said, data, tmp_path, call_tool, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = given.split(" ") if isinstance(given, str) else given
    options = [option for option in options if option]
    if tool.startswith("pretrain"):
        keys = {option.partition("=")[0].lstrip("+~") for option in options}
        options += [usual for key, usual in SMALL.items() if key not in keys and "run_dir" not in keys]
    options = [option.replace("{data}", str(data)).replace("{out}", str(tmp_path / "out")) for option in options]
    before = sorted(data.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        call_tool(MAINS[tool.partition(",")[0]], *options)
    assert ended.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert lines[-1].startswith("error: ")
    assert said.replace("{data}", str(data)) in lines[-1]
    assert "Traceback" not in "".join(lines)
    if "first step" not in tool:
        assert not list(tmp_path.iterdir())
    assert sorted(data.rglob("*")) == before
