"""The command line: the same records without a running service, one line for a mistake, exit codes."""

import json
import signal
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from command import polyclip, process
from serving import Server, clip, wait_for

from adapters_store import pack
from backbone import AdapterShape, load_backbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good videos, one broken one, a file that is none, and captions."""
    folder = tmp_path_factory.mktemp("videos")
    lines = []
    for i in range(3):
        (folder / f"clip-{i}.mp4").write_bytes(clip(200 + i))
        lines.append(json.dumps({"file": f"clip-{i}.mp4", "captions": [f"number {i}", f"hue {i}"]}))
    (folder / "broken.mp4").write_bytes(b"this is no video")
    (folder / "notes.txt").write_text("not a video either")
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def indexed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    data = str(tmp_path_factory.mktemp("cli") / "data")
    captions = str(folder / "captions.jsonl")
    done = polyclip("index", str(folder), "--collection", "films", "--captions", captions, "--data", data, "--json")
    report = json.loads(done.stdout)
    assert report["ready"] == 3 and done.returncode == 1
    assert [f["file"] for f in report["failed"]] == ["broken.mp4"]
    return data


def test_indexing_again_adds_nothing(indexed: str, folder: Path) -> None:
    good = [str(path) for path in sorted(folder.glob("clip-*.mp4"))]
    done = polyclip("index", *good, "--collection", "films", "--data", indexed, "--json")
    assert done.returncode == 0
    told = json.loads(done.stdout)
    assert (told["ready"], told["duplicates"], told["updated"], told["failed"]) == (0, 3, 0, [])
    assert "--backbone ViT-B-32" in told["warning"]


def test_a_search_finds_what_was_indexed(indexed: str) -> None:
    done = polyclip("search", "a red ball", "--collection", "films", "--data", indexed, "--json")
    hits = json.loads(done.stdout)["data"]
    assert {hit["filename"] for hit in hits} == {f"clip-{i}.mp4" for i in range(3)}
    assert all(0 <= hit["start"] < hit["end"] <= 1.1 for hit in hits)
    table = polyclip("search", "a red ball", "--collection", "films", "--data", indexed).stdout
    assert "clip-1.mp4" in table


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("search", "x", "--collection", "nothing"), "there is no collection 'nothing'"),
        (("search", " ", "--collection", "films"), "the text is empty"),
        (("search", "x", "--collection", "films", "--tenant", "nobody"), "there is no tenant 'nobody'"),
        (("index", "/no/such/folder", "--collection", "films"), "no such file"),
        (("train", "--collection", "films"), "at least 10 ready videos with captions, there are 3"),
        (("train", "--collection", "films", "--recipe", '{"rnak": 1}'), "at least 10"),
        (("adapters", "show", "adp_none", "--collection", "films"), "there is no adapter 'adp_none'"),
        (("index", ".", "--collection", "films", "--backbone", "ViT-Q-1"), "no backbone named 'ViT-Q-1'"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(indexed: str, arguments: tuple[str, ...], words: str) -> None:
    done = polyclip(*arguments, "--data", indexed)
    assert done.returncode == 1
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_service_that_cannot_start_says_so_in_one_line_and_ends_with_status_1(tmp_path: Path) -> None:
    done = process("serve", "--port", "0", "--backbone", "ViT-B-32", "--data", str(tmp_path / "data"))
    assert done.returncode == 1
    assert "needs --pretrained" in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [("search",), ("serve", "--port", "x"), ("nonsense",), ("encode", "--out", "x.npy")])
def test_wrong_usage_is_status_2(arguments: tuple[str, ...]) -> None:
    assert polyclip(*arguments).returncode == 2


def test_a_data_folder_stays_with_its_backbone(indexed: str, folder: Path) -> None:
    other = ("--backbone", "ViT-S-32-alt", "--pretrained", "random")
    done = polyclip("index", str(folder / "clip-0.mp4"), "--collection", "x", "--data", indexed, *other)
    assert done.returncode == 1
    assert "was made with backbone builtin" in done.stderr


def test_a_bad_setting_is_named() -> None:
    done = polyclip("settings", POLYCLIP_DECODERS="none")
    assert done.returncode == 1
    assert "POLYCLIP_DECODERS" in done.stderr


def test_settings_are_printed_without_the_key() -> None:
    done = polyclip("settings", "--json", POLYCLIP_ROOT_KEY="secret-of-the-operator", POLYCLIP_DECODERS="3")
    shown = json.loads(done.stdout)
    assert shown["POLYCLIP_DECODERS"] == "3"
    assert "secret-of-the-operator" not in done.stdout


def test_encode_writes_unnormalised_vectors(tmp_path: Path) -> None:
    texts = polyclip("encode", "--text", "a red ball", "--text", "snow", "--out", str(tmp_path / "t.npy"))
    assert texts.returncode == 0, texts.stderr
    vectors = np.load(tmp_path / "t.npy")
    assert vectors.shape == (2, 128) and vectors.dtype == np.float32
    assert abs(np.linalg.norm(vectors[0]) - 1) > 1e-3
    np.save(tmp_path / "f.npy", np.zeros((3, 3, 64, 64), np.float32))
    assert polyclip("encode", "--frames", str(tmp_path / "f.npy"), "--out", str(tmp_path / "v.npy")).returncode == 0
    assert np.load(tmp_path / "v.npy").shape == (3, 128)


def test_help_loads_no_torch() -> None:
    code = "import sys, service.cli; assert not {'torch', 'open_clip', 'faiss', 'dbos'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert process("--help").returncode == 0


def test_the_doctor_finds_a_healthy_house(tmp_path: Path) -> None:
    done = polyclip("doctor", "--data", str(tmp_path / "data"), "--json")
    findings = {finding["what"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 0, [f for f in findings.values() if not f["ok"]]
    assert {"faiss", "database", "blobs", "decoders", "backbone"} <= set(findings)


def test_an_evaluation_tells_recall_with_intervals_and_writes_a_report(indexed: str, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    done = polyclip("evaluate", "--collection", "films", "--data", indexed, "--report", str(report), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["frozen backbone"]["text_to_video"]
    low, high = found["intervals"]["R@1"]
    assert found["queries"] == 6 and low <= found["R@1"] <= high
    page = report.read_text()
    assert page.count("data:image/jpeg;base64,") >= 3, "thumbnails of the worst queries"
    assert json.loads(report.with_suffix(".json").read_text())["results"]["frozen backbone"]["text_to_video"] == found


def test_an_evaluation_of_a_data_set_sets_an_adapter_against_the_frozen_backbone(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    lines = []
    for i in range(12):
        (tmp_path / "videos" / f"{i}.mp4").write_bytes(clip(220 + i))
        lines.append(json.dumps({"video": f"{i}.mp4", "caption": f"number {i}", "split": "test" if i > 7 else "train"}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    backbone = load_backbone()
    shape = AdapterShape(backbone.dims, 2, 0)
    (tmp_path / "a.safetensors").write_bytes(pack(shape, backbone.fingerprint, shape.initial(0)))
    where = ("--data-set", "jsonl", "--root", str(tmp_path), "--adapter", str(tmp_path / "a.safetensors"))
    done = polyclip("evaluate", *where, "--split", "test", "--query-bank", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [name.split(" ")[0] for name in found] == ["frozen", "frozen", "adapter", "adapter"]
    assert all(system["text_to_video"]["gallery"] == 4 for system in found.values())
    assert found["frozen backbone, query bank"]["bank_queries"] == 6, "what is left of 8 for training"
    (tmp_path / "videos" / "11.mp4").unlink()
    refused = polyclip("evaluate", *where, "--split", "test")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1 and "11.mp4" in refused.stderr
    assert polyclip("evaluate", "--collection", "films", *where).returncode == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("search", "x", "--collection", "films"),
        ("evaluate", "--collection", "films"),
        ("adapters", "list", "--collection", "films"),
        ("export", "films", "films.tar"),
        ("fsck",),
    ],
)
@pytest.mark.parametrize("held", [(), ("notes.txt",)], ids=["not there", "of other things"])
def test_a_command_that_reads_makes_no_data_folder(tmp_path: Path, arguments: tuple[str, ...], held: tuple[str, ...]) -> None:
    data = tmp_path if held else tmp_path / "typo"
    for name in held:
        (data / name).touch()
    done = polyclip(*arguments, "--data", str(data))
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no data folder at") and len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == list(held)


def test_the_doctor_makes_no_data_folder(tmp_path: Path) -> None:
    done = polyclip("doctor", "--data", str(tmp_path / "a" / "typo"), "--json")
    assert done.returncode == 0 and "not made yet" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_an_address_in_use_names_its_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = process("serve", "--port", port, "--data", str(tmp_path / "data"))
    assert done.returncode == 1 and done.stderr == f"error: Address already in use: 127.0.0.1:{port}\n"


def test_a_second_service_on_a_data_folder_says_so_and_ends(server: Server) -> None:
    done = process("serve", "--port", "0", "--no-worker", "--data", str(server.data))
    assert done.returncode == 1 and "another `polyclip serve` runs on" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert server.client.get("/healthz").status_code == 200


def test_ctrl_c_ends_indexing_and_the_next_run_goes_on(tmp_path: Path, folder: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    small = clip(300)
    for number in range(150):  # more than are done before the signal comes, however slow this process is
        (videos / f"{number}.mp4").write_bytes(small + b"\0\0\0\x0cfree" + number.to_bytes(4))
    command = ["index", str(videos), "--collection", "films", "--data", str(tmp_path / "data")]
    running = subprocess.Popen(
        [sys.executable, "-m", "service.cli", *command],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's background job ignores it
    )
    database = tmp_path / "data" / "polyclip.sqlite"

    def statuses() -> list[str]:
        if not database.exists():
            return []
        try:
            with closing(sqlite3.connect(database)) as connection:
                return [status for (status,) in connection.execute("SELECT status FROM videos")]
        except sqlite3.OperationalError:  # the table is not made yet
            return []

    wait_for("a video under way", lambda: "validating" in statuses())
    running.send_signal(signal.SIGINT)
    told = running.communicate(timeout=60)[1]
    assert running.returncode == 130 and "Traceback" not in told
    assert "failed" not in statuses()
    assert not [line for pid in Path("/proc").iterdir() if pid.name.isdigit() and str(tmp_path) in (line := _command(pid))]
    done = polyclip(*command, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["failed"] == [] and statuses() == ["ready"] * 150


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:  # it has ended
        return ""
