"""The HTTP service: what it answers, refuses and survives, and how it ends."""

import asyncio
import base64
import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bkd_fast.inference.detector import Detector

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(package, reason="the extras serve and examples are not installed")
import httpx  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
SECONDS = 120.0
PNG = {"Content-Type": "image/png"}
MAX_BYTES, MAX_PIXELS = 300_000, 1_000_000
SHORT = ["--header-seconds", "1", "--body-seconds", "1", "--max-bytes", MAX_BYTES, "--max-pixels", MAX_PIXELS]


def module(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded  # dataclasses look up their module
    spec.loader.exec_module(loaded)
    return loaded


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment():
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


class Served:
    """The service in a process of its own."""

    def __init__(self, log, *arguments):
        self.port, self.log = free_port(), log
        command = [sys.executable, EXAMPLES / "serve.py", *arguments, "--port", self.port]
        with log.open("w") as file:
            self.process = subprocess.Popen(list(map(str, command)), env=environment(), stdout=file, stderr=file)
        self.url = f"http://127.0.0.1:{self.port}"

    def until_ready(self):
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if httpx.get(f"{self.url}/healthz").status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def post(self, path, **options):
        return httpx.post(self.url + path, timeout=SECONDS, **options)

    def metric(self, name):
        rows = (line.rpartition(" ") for line in httpx.get(f"{self.url}/metrics").text.splitlines())
        return sum(float(value) for key, _, value in rows if key == name or key.startswith(name + "{"))

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)

    def end(self):
        self.process.terminate()
        return self.process.wait(SECONDS)


@pytest.fixture(scope="module")
def picture(tiny_data):
    return sorted((tiny_data / "test").rglob("*.png"))[0]


@pytest.fixture(scope="module")
def served(tiny_run, tiny_default_run, tmp_path_factory):
    service = Served(tmp_path_factory.mktemp("serve") / "log", f"line1={tiny_run}", f"line2={tiny_default_run}", *SHORT)
    yield service.until_ready()
    service.end()


def test_predictions_are_those_of_the_detector(served, picture, tiny_run, tiny_default_run):
    for name, run in (("line1", tiny_run), ("line2", tiny_default_run)):
        detector = Detector.load(run)
        expected = detector(picture)
        answer = served.post(f"/predict/{name}", content=picture.read_bytes(), headers=PNG, params={"map": True})
        assert answer.status_code == 200, answer.text
        body = answer.json()
        marked = np.asarray(Image.open(io.BytesIO(base64.b64decode(body.pop("map")))))
        assert marked.shape == expected.mask.shape == (72, 80)
        assert ((marked >= 128) == expected.mask).mean() > 0.999
        assert body.pop("run") == name
        assert body.pop("label") is bool(expected.label)
        numbers = {key: getattr(expected, key) for key in ("score", "normalized_score", "p_value")}
        assert body == pytest.approx({**numbers, "threshold": detector.threshold}, abs=1e-3)
    assert served.post("/predict/line1", content=picture.read_bytes()).json()["map"] is None


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, format=kind)
    return file.getvalue()


REFUSED = {
    "no such run": ("/predict/line3", b"x", PNG, 404, "no such run: expected one of line1, line2"),
    "which run": ("/predict", b"x", PNG, 404, "several runs"),
    "no such page": ("/admin", b"x", PNG, 404, "Not Found"),
    "type": ("/predict/line1", b"x", {"Content-Type": "text/html"}, 415, "expected one of application/octet-stream"),
    "empty": ("/predict/line1", b"", PNG, 422, "the body is empty"),
    "garbage": ("/predict/line1", bytes(range(256)) * 9, PNG, 422, "expected one of PNG, JPEG"),
    "eps": ("/predict/line1", encoded(Image.new("RGB", (9, 9)), "EPS"), PNG, 422, "expected one of PNG, JPEG"),
    "gif": ("/predict/line1", encoded(Image.new("RGB", (9, 9)), "GIF"), PNG, 422, "expected one of PNG, JPEG"),
    "bytes": ("/predict/line1", b"x" * (MAX_BYTES + 1), PNG, 413, f"at most {MAX_BYTES} are accepted"),
    "pixels": ("/predict/line1", encoded(Image.new("1", (1001, 1000))), PNG, 413, "the image has 1001 x 1000 pixels"),
    "bomb": ("/predict/line1", encoded(Image.new("1", (20_000, 10_000))), PNG, 413, "too large"),
    "query": ("/predict/line1?map=perhaps", b"x", PNG, 422, "query.map"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_requests_are_refused_in_a_sentence(served, case):
    path, body, headers, status, words = REFUSED[case]
    answer = served.post(path, content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    assert words in answer.json()["error"]
    assert "Traceback" not in answer.text


def test_damaged_images_are_refused(served, picture):
    whole = picture.read_bytes()
    for length in (30, len(whole) // 3, len(whole) - 40):
        answer = served.post("/predict/line1", content=whole[:length], headers=PNG)
        assert answer.status_code == 422, (length, answer.text)
    tiff = bytearray(encoded(Image.new("RGB", (64, 64)), "TIFF"))
    for place in range(0, len(tiff), len(tiff) // 20):  # whatever comes of it is an answer
        damaged = bytes([*tiff[:place], *b"\xff" * 9, *tiff[place + 9 :]])
        assert served.post("/predict/line1", content=damaged).status_code in (200, 413, 422)


def test_a_huge_body_is_refused_while_it_is_sent(served):
    with served.connect() as connection:
        connection.sendall(b"POST /predict/line1 HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\nabc")
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")
    with served.connect() as connection:
        connection.sendall(b"POST /predict/line1 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(MAX_BYTES // 50_000 + 1):  # which does not end
            connection.sendall(b"%x\r\n%b\r\n" % (50_000, b"x" * 50_000))
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


def test_slow_clients_are_dropped(served):
    silent, headers, body = (served.connect() for _ in range(3))
    headers.sendall(b"POST /predict/line1 HTTP/1.1\r\nHost: ")
    body.sendall(b"POST /predict/line1 HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
    assert body.recv(4096).startswith(b"HTTP/1.1 408")
    for connection in (silent, headers, body):
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(4096):
                pass
    # Answers that are not taken: the sockets' buffers fill up.
    not_taken = 'bkd_dropped_connections_total{reason="answer not taken"}'
    before, end = served.metric(not_taken), time.monotonic() + SECONDS
    reader = served.connect()
    reader.setblocking(False)
    requests = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 5000
    while served.metric(not_taken) == before:
        assert time.monotonic() < end
        with contextlib.suppress(BlockingIOError, ConnectionError):
            requests = requests[reader.send(requests) :]
        time.sleep(0.05)
    for connection in (silent, headers, body, reader):
        connection.close()
    assert served.metric("bkd_buffered_bytes") == served.metric("bkd_queue_length") == 0


def test_metrics_count_requests_and_scores(served, picture):
    before = served.metric('bkd_requests_total{run="line2",status="200"}')
    served.post("/predict/line2", content=picture.read_bytes())
    served.post("/predict/nobody-counts-this-name", content=b"x")
    assert served.metric('bkd_requests_total{run="line2",status="200"}') == before + 1
    text = httpx.get(f"{served.url}/metrics").text
    assert "nobody-counts" not in text
    assert 'bkd_shift{run="line2",statistic="level 1 offset"}' in text
    assert httpx.get(f"{served.url}/healthz").json()["runs"]["line2"]["drift"] is None
    assert served.metric("bkd_request_seconds_count") == served.metric("bkd_normalized_score_count") > before


def load(url, picture, requests):
    command = [sys.executable, EXAMPLES / "load.py", url, "line1", picture, "--requests", requests]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=5 * SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["wrong"] == {}
    assert report["good"]["answers"]["200"] == requests - round(requests / 3)
    assert sum(report["hostile"].values()) == round(requests / 3)
    assert len({kind.partition(":")[0] for kind in report["hostile"]}) == 14
    (before, after), (threads, threads_after), (files, files_after) = (
        report[name] for name in ("peak_memory_mb", "threads", "open_files")
    )
    assert after < before + 150  # bodies of 300 kB, images of a million pixels
    assert threads_after <= threads
    assert files_after <= files


def test_a_third_of_hostile_requests_does_no_harm(served, picture):
    load(served.url, picture, 60)
    assert "Traceback" not in served.log.read_text()


@pytest.mark.slow
def test_five_hundred_requests(served, picture):
    load(served.url, picture, 500)


def test_connections_are_limited_and_what_was_accepted_is_answered_before_the_end(tiny_run, picture, tmp_path):
    service = Served(tmp_path / "log", tiny_run, "--connections", 3).until_ready()
    connections = [service.connect() for _ in range(6)]
    closed = 0
    for connection in connections:
        connection.settimeout(1)
        with contextlib.suppress(TimeoutError):  # still open
            try:
                closed += connection.recv(1) == b""
            except ConnectionResetError:
                closed += 1
    assert closed >= 3
    for connection in connections:
        connection.close()
    time.sleep(0.5)
    body = picture.read_bytes()
    with service.connect() as connection:
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        connection.sendall(head + body[:100])
        time.sleep(0.3)
        service.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises(ConnectionRefusedError):
            service.connect()
        connection.sendall(body[100:])
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    assert service.process.wait(SECONDS) in (0, -signal.SIGTERM)
    assert "Traceback" not in service.log.read_text()


def refusal(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        module("serve").main()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a=none"], "there is no run folder none"),
        (["a=x", "a=y"], "two runs have the name a"),
        (["../a b"], "'a b' is no name"),
        (["a", "--queue", "0"], "above 0"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(arguments, words, monkeypatch, capsys):
    assert words in refusal(arguments, monkeypatch, capsys)


class Stub:
    """In place of a detector: predicts what it is let to, and keeps the sizes of the batches."""

    batch, threshold, pixel_threshold, sample = 4, 1.0, 1.0, torch.zeros(1, 3, 2, 2)

    def __init__(self):
        self.free, self.sizes, self.error = threading.Event(), [], None

    def predictor(self):
        return self

    def score(self, images):
        return images

    def preprocess(self, image):
        return image.getpixel((0, 0))

    def predict(self, batch):
        assert self.free.wait(SECONDS)
        self.sizes.append(len(batch))
        if self.error is not None:
            raise self.error
        return batch

    def postprocess(self, raw):
        return SimpleNamespace(score=float(raw), label=False, normalized_score=0.5, p_value=1.0, category=None)

    def for_category(self, category):
        return self


async def with_stub(check, **limits):
    """Run a check with a stub, and a client of the service that has it."""
    serve = module("serve")
    stub, metrics = Stub(), serve.Metrics()
    service = serve.Service({"a": stub}, serve.Limits(**limits), metrics, {})
    app = serve.create_app(service)
    async with app.router.lifespan_context(app):
        while service.state != "ready":
            await asyncio.sleep(0.01)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                await check(stub, service, client)
        finally:
            stub.free.set()


def grey(value):
    return encoded(Image.new("L", (2, 2), value))


def test_a_full_queue_refuses_at_once_and_batches_are_formed():
    async def check(stub, service, client):
        waiting = [asyncio.create_task(client.post("/predict", content=grey(value))) for value in range(10)]
        while service.pending < 10:
            await asyncio.sleep(0.01)
        refused = await client.post("/predict", content=grey(9))
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert "10 images are waiting" in refused.json()["error"]
        stub.free.set()
        answers = await asyncio.gather(*waiting)
        assert [answer.json()["score"] for answer in answers] == list(range(10))  # each its own
        assert sum(stub.sizes) == 10
        assert max(stub.sizes) == 4
        assert service.pending == service.buffered == 0

    asyncio.run(with_stub(check, queue=10, batch_wait=1.0))


def test_bodies_in_memory_are_limited_together():
    async def check(stub, service, client):
        waiting = asyncio.create_task(client.post("/predict", content=grey(1) + b"0" * 700))
        while not service.pending:
            await asyncio.sleep(0.01)
        refused = await client.post("/predict", content=grey(1) + b"0" * 700)
        assert refused.status_code == 503
        assert "bytes of images are in memory" in refused.json()["error"]
        stub.free.set()
        assert (await waiting).status_code == 200
        assert service.buffered == 0

    asyncio.run(with_stub(check, max_buffer=1000))


def test_an_error_in_the_network_is_one_batch_s_and_no_traceback_leaves():
    async def check(stub, service, client):
        stub.free.set()
        stub.error = RuntimeError("secret detail")
        failed = await client.post("/predict", content=grey(1))
        assert failed.status_code == 500
        assert "secret" not in failed.text
        stub.error = None
        assert (await client.post("/predict", content=grey(7))).json()["score"] == 7
        assert (await client.get("/healthz")).status_code == 200

    asyncio.run(with_stub(check))


def test_an_answer_that_takes_too_long_is_given_up():
    async def check(stub, service, client):
        late = await client.post("/predict", content=grey(1))
        assert late.status_code == 504
        assert "no answer within 0.2 seconds" in late.json()["error"]
        assert (await client.post("/predict", content=grey(2))).status_code == 504  # it waits behind the first
        stub.free.set()
        assert (await client.post("/predict", content=grey(7))).json()["score"] == 7
        assert sum(stub.sizes) == 2  # the second was not predicted for nobody

    asyncio.run(with_stub(check, answer_seconds=0.2))


def test_the_service_is_not_ready_while_it_starts():
    async def check(stub, service, client):
        service.state = "warming up"
        assert (await client.get("/healthz")).status_code == 503
        refused = await client.post("/predict", content=grey(1))
        assert refused.status_code == 503
        assert refused.json() == {"error": "the service is warming up"}

    asyncio.run(with_stub(check))


def test_the_documented_commands_work(tiny_run, picture, tmp_path):
    page = (ROOT / "docs" / "deploy.md").read_text()
    section = page.partition("\n## A service\n")[2].partition("\n## ")[0]
    block = next(block for block in re.findall(r"```sh\n(.*?)```", section, re.S) if "serve.py" in block)
    port = str(free_port())
    lines = [line.replace("8000", port) for line in block.splitlines() if not line.startswith("pip install")]
    (tmp_path / "runs").mkdir()
    for name in ("parts", "lids"):
        (tmp_path / "runs" / name).symlink_to(tiny_run)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    shutil.copy(picture, tmp_path / "part.png")
    script = "\n".join(["set -eo pipefail", "trap 'kill %1; wait || true' EXIT", *lines])
    done = subprocess.run(
        ["bash", "-c", f"set -m\n{script}"], cwd=tmp_path, env=environment(), capture_output=True, text=True,
        timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"score":' in done.stdout
    assert "bkd_requests_total" in done.stdout


def test_the_container_s_files_and_options_exist(monkeypatch, capsys):
    text = (EXAMPLES / "Dockerfile").read_text()
    ignored = (EXAMPLES / "Dockerfile.dockerignore").read_text().split()
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M):
        assert all((ROOT / source).exists() and f"!{source}" in ignored for source in sources.split()), sources
    entry = json.loads(re.search(r"^ENTRYPOINT (\[.+\])$", text, re.M)[1])
    assert entry[:2] == ["python", "/opt/serve.py"]
    assert "there is no run folder none" in refusal([*entry[2:], "a=none"], monkeypatch, capsys)
