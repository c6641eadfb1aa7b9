"""Serve predictions of one or several runs over HTTP: python examples/serve.py line1=runs/a line2=runs/b [--port 8000].

    curl -H 'Content-Type: image/png' --data-binary @part.png 'localhost:8000/predict/line1?map=true'

GET /healthz says whether the service is ready, GET /metrics is for Prometheus, GET /openapi.json describes the API.
Needs `pip install 'bkd_fast[serve]'`. docs/deploy.md says what is limited and how.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import anyio
import h11
import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from PIL import Image, UnidentifiedImageError
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from threadpoolctl import threadpool_limits
from uvicorn.protocols.http.h11_impl import H11Protocol

from bkd_fast import BKDError, Detector, Prediction
from bkd_fast.inference.drift import DriftMonitor, watch

log = logging.getLogger("uvicorn.error")
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
TYPES = {*(f"image/{name.lower()}" for name in FORMATS), "image/jpg", "image/x-ms-bmp", "application/octet-stream"}
PROCESS = Path("/proc/self/status")
CLIENT_CLOSED = 499  # nobody receives it; it is counted


def option(default: float, text: str) -> Any:
    return field(default=default, metadata={"text": text})


@dataclass(frozen=True)
class Limits:
    """What the service accepts; each field is a command-line option."""

    max_bytes: int = option(20_000_000, "largest body of a request")
    max_buffer: int = option(200_000_000, "bytes of all bodies in memory; beyond it the answer is 503")
    max_pixels: int = option(25_000_000, "largest image, checked before it is decoded")
    queue: int = option(32, "images that wait or are in work; beyond it the answer is 503")
    batch: int = option(0, "images that go through the network together (default: 1 on a CPU, else 8)")
    batch_wait: float = option(0.005, "seconds for which a batch that is not full waits for more images")
    header_seconds: float = option(5.0, "seconds until a request's headers must be there")
    body_seconds: float = option(
        10.0, "seconds until a request's body must be there, and until an answer must be taken"
    )
    answer_seconds: float = option(30.0, "seconds from the body to the answer; beyond it the answer is 504")
    connections: int = option(256, "open connections; further ones are closed")


class Answer(BaseModel):
    """A prediction. ``map``: base64 of a grey PNG of the image's size, where 128 and above is marked as anomalous."""

    run: str
    score: float
    normalized_score: float
    p_value: float
    label: bool
    threshold: float
    map: str | None = None


class Metrics:
    """What /metrics shows."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("bkd_requests", "Requests by answer", ["run", "status"], registry=registry)
        self.dropped = Counter("bkd_dropped_connections", "Connections that were closed", ["reason"], registry=registry)
        self.seconds = Histogram(
            "bkd_request_seconds", "From a request's headers to its prediction", ["run"], registry=registry
        )
        self.queue = Gauge("bkd_queue_length", "Images that wait or are in work", registry=registry)
        self.buffer = Gauge("bkd_buffered_bytes", "Bodies in memory", registry=registry)
        self.batch = Histogram("bkd_batch_size", "Images in a batch", buckets=(1, 2, 4, 8, 16, 32), registry=registry)
        self.scores = Histogram(
            "bkd_normalized_score",
            "Scores from 0 to 1, the threshold at 0.5",
            ["run"],
            buckets=[step / 20 for step in range(1, 21)],
            registry=registry,
        )
        self.drift = Gauge("bkd_drift", "1 since drift has been seen", ["run"], registry=registry)
        self.shift = Gauge("bkd_shift", "How far the last images have moved", ["run", "statistic"], registry=registry)
        if PROCESS.exists():
            peak = Gauge("process_peak_memory_bytes", "Largest resident memory so far", registry=registry)
            peak.set_function(lambda: 1024 * process_status("VmHWM"))
            threads = Gauge("process_threads", "Threads of the process", registry=registry)
            threads.set_function(lambda: process_status("Threads"))


def process_status(name: str) -> int:
    """Return a value of this process as Linux gives it, sizes in KiB."""
    return int(re.search(rf"^{name}:\s*(\d+)", PROCESS.read_text(), re.M)[1])


@dataclass
class Job:
    """An image on its way: ``prepared`` once it is decoded, ``raw`` once the network has seen it."""

    run: str
    prepared: Any = None
    raw: Future[Any] = field(default_factory=Future)


class Service:
    """Predicts for all runs: two threads decode, one runs the network on batches, two finish.

    Bodies wait encoded. At most ``batch`` decoded images wait for the network besides those in the decoding threads.
    """

    def __init__(
        self, detectors: dict[str, Detector], limits: Limits, metrics: Metrics, monitors: dict[str, DriftMonitor]
    ) -> None:
        self.detectors, self.limits, self.metrics, self.monitors = detectors, limits, metrics, monitors
        self.predictors = {
            name: watch(detector, detector.predictor(), monitors[name]) if name in monitors else detector.predictor()
            for name, detector in detectors.items()
        }
        self.batch = limits.batch or max(detector.batch for detector in detectors.values())
        self.jobs: queue.Queue[Job | None] = queue.Queue(self.batch)
        self.pending = self.buffered = 0
        self.seconds_an_image = 0.1
        self.state = "warming up"
        metrics.queue.set_function(lambda: self.pending)
        metrics.buffer.set_function(lambda: self.buffered)

    def start(self) -> None:
        """Start the threads; the service is ready when the network's first predictions are made."""
        self.decoders, self.finishers = (
            ThreadPoolExecutor(2, thread_name_prefix=name, initializer=lambda: threadpool_limits(1, user_api="openmp"))
            for name in ("decode", "finish")
        )
        both = threading.Barrier(2)
        for pool in (self.decoders, self.finishers):  # all threads now: their number is then constant
            list(pool.map(lambda _: both.wait(), range(2)))
        self.thread = threading.Thread(target=self._work, name="network")
        self.thread.start()

    def stop(self) -> None:
        """Finish what was accepted, and end the threads."""
        self.state = "shutting down"
        self.decoders.shutdown()
        self.jobs.put(None)
        self.thread.join()
        self.finishers.shutdown()

    async def predict(self, name: str, request: Request, with_map: bool) -> Answer:
        """Read, decode and predict the body of a request.

        Raises:
            HTTPException: the body or the moment is not acceptable; the message says why.
        """
        body = bytearray()
        try:
            if self.pending >= self.limits.queue:
                raise self._busy(f"{self.pending} images are waiting")
            await self._read(request, body)
            if self.pending >= self.limits.queue:
                raise self._busy(f"{self.pending} images are waiting")
            self.pending += 1
            try:
                with anyio.fail_after(self.limits.answer_seconds):
                    return await self._answer(name, body, with_map)
            except TimeoutError as error:
                raise HTTPException(504, f"no answer within {self.limits.answer_seconds:g} seconds") from error
            finally:
                self.pending -= 1
        finally:
            self.buffered -= len(body)

    async def _read(self, request: Request, body: bytearray) -> None:
        most, declared = self.limits.max_bytes, request.headers.get("content-length", "0")
        try:
            with anyio.fail_after(self.limits.body_seconds):
                if int(declared) > most:
                    raise HTTPException(413, f"the body has {declared} bytes: at most {most} are accepted")
                async for chunk in request.stream():
                    body += chunk
                    self.buffered += len(chunk)
                    if len(body) > most:
                        raise HTTPException(413, f"the body has more than {most} bytes, which is what is accepted")
                    if self.buffered > self.limits.max_buffer:
                        raise self._busy(f"{self.buffered} bytes of images are in memory")
        except TimeoutError as error:
            raise HTTPException(408, f"the body was not complete after {self.limits.body_seconds:g} seconds") from error
        except ClientDisconnect as error:
            raise HTTPException(CLIENT_CLOSED, "the client closed the connection") from error
        if not body:
            raise HTTPException(422, "the body is empty: expected an encoded image")

    async def _answer(self, name: str, body: bytearray, with_map: bool) -> Answer:
        loop, job = asyncio.get_running_loop(), Job(name)
        try:
            await loop.run_in_executor(self.decoders, self._decode, job, body)
            raw = await asyncio.wrap_future(job.raw)
            return await loop.run_in_executor(self.finishers, self._finish, name, raw, with_map)
        finally:
            job.raw.cancel()  # after a time-out: no more work for nobody

    def _decode(self, job: Job, body: bytearray) -> None:
        if job.raw.cancelled():
            return
        image = open_image(body, self.limits.max_pixels)
        try:
            job.prepared = self.predictors[job.run].preprocess(image)
        except BKDError as error:
            raise HTTPException(422, str(error)) from error
        except MemoryError:
            raise
        except Exception as error:  # decoders of damaged images raise anything
            raise HTTPException(422, f"the image cannot be decoded, it may be damaged ({error})") from error
        self.jobs.put(job)

    def _finish(self, name: str, raw: Any, with_map: bool) -> Answer:
        prediction = self.predictors[name].postprocess(raw)
        self.metrics.scores.labels(name).observe(prediction.normalized_score)
        detector = self.detectors[name].for_category(prediction.category)
        return Answer(
            run=name,
            score=prediction.score,
            normalized_score=prediction.normalized_score,
            p_value=prediction.p_value,
            label=prediction.label,
            threshold=detector.threshold,
            map=png_map(prediction, detector.pixel_threshold) if with_map else None,
        )

    def _work(self) -> None:
        for name, detector in self.detectors.items():
            for size in range(1, self.batch + 1):  # a GPU records a graph for each size
                detector.score(detector.sample.expand(size, -1, -1, -1))
            log.info("run %s is ready, its threshold is %.4g", name, detector.threshold)
        if self.state == "warming up":
            self.state = "ready"
        ended = False
        while not ended:
            group, ended = self._collect()
            for name in dict.fromkeys(job.run for job in group):
                self._predict(name, [job for job in group if job.run == name])

    def _collect(self) -> tuple[list[Job], bool]:
        """Return what waits, at least one image unless the service ends, and whether it does."""
        group: list[Job] = []
        until = math.inf
        while len(group) < self.batch:
            try:
                job = self.jobs.get(timeout=None if math.isinf(until) else max(0, until - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                return group, True
            if job.raw.set_running_or_notify_cancel():  # False: nobody waits for it any more
                group.append(job)
                until = min(until, time.monotonic() + self.limits.batch_wait)
        return group, False

    def _predict(self, name: str, group: list[Job]) -> None:
        begin = time.perf_counter()
        try:
            results = self.predictors[name].predict([job.prepared for job in group])
        except Exception as error:  # of these images alone: the next batch is predicted
            for job in group:
                job.raw.set_exception(error)
            return
        for job, raw in zip(group, results, strict=True):
            job.raw.set_result(raw)
        self.metrics.batch.observe(len(group))
        self.seconds_an_image += 0.1 * ((time.perf_counter() - begin) / len(group) - self.seconds_an_image)

    def _busy(self, why: str) -> HTTPException:
        wait = max(1, math.ceil(self.pending * self.seconds_an_image))
        return HTTPException(503, f"{why}: try again in {wait} s", {"Retry-After": str(wait)})


def open_image(body: bytearray, max_pixels: int) -> Image.Image:
    """Return an image whose header alone has been read.

    Raises:
        HTTPException: not an image of FORMATS, or one with too many pixels.
    """
    try:
        image = Image.open(io.BytesIO(body), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise HTTPException(413, f"the image is too large: at most {max_pixels} pixels are accepted") from error
    except UnidentifiedImageError as error:
        raise HTTPException(422, f"the body is not an image: expected one of {', '.join(FORMATS)}") from error
    except MemoryError:
        raise
    except Exception as error:
        raise HTTPException(422, f"the image cannot be decoded, it may be damaged ({error})") from error
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height}"
        raise HTTPException(413, f"the image has {size} pixels: at most {max_pixels} are accepted")
    return image


def png_map(prediction: Prediction, pixel_threshold: float) -> str:
    """Return the anomaly map as base64 of a grey PNG; 128 and above is what the mask marks."""
    grey = np.clip(127.5 / pixel_threshold * prediction.anomaly_map, 0, 255).astype(np.uint8)
    grey = np.where(prediction.mask, np.maximum(grey, 128), np.minimum(grey, 127))
    file = io.BytesIO()
    Image.fromarray(grey).save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")


def create_app(service: Service) -> FastAPI:
    """Return the HTTP side of a service: routes, and errors as one sentence of JSON."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(title="bkd_fast", lifespan=lifespan, docs_url=None, redoc_url=None)  # their pages need the Internet
    names = sorted(service.detectors)

    @app.post("/predict")
    async def predict_only_run(request: Request, map: bool = False) -> Answer:
        if len(names) != 1:
            raise HTTPException(404, f"there are several runs: post to /predict/RUN, RUN one of {', '.join(names)}")
        return await predict(names[0], request, map)

    @app.post("/predict/{run}")
    async def predict(run: str, request: Request, map: bool = False) -> Answer:
        if run not in service.detectors:
            raise HTTPException(404, f"there is no such run: expected one of {', '.join(names)}")
        request.scope["run"] = run  # for the count of requests
        kind = request.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
        if kind not in TYPES:
            raise HTTPException(
                415, f"this type of content is not accepted: expected one of {', '.join(sorted(TYPES))}"
            )
        if service.state != "ready":
            raise HTTPException(503, f"the service is {service.state}", {"Retry-After": "5"})
        begin = time.perf_counter()
        answer = await service.predict(run, request, map)
        service.metrics.seconds.labels(run).observe(time.perf_counter() - begin)
        return answer

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        state = service.state if service.thread.is_alive() else "broken: its network thread has ended"
        runs: dict[str, dict[str, Any]] = {
            name: {"threshold": detector.threshold} for name, detector in service.detectors.items()
        }
        for name, monitor in service.monitors.items():
            runs[name]["drift"] = monitor.drift and monitor.drift.sentence()
        return JSONResponse({"status": state, "runs": runs}, 200 if state == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        for name, monitor in service.monitors.items():
            service.metrics.drift.labels(name).set(monitor.drift is not None)
            for shift in monitor.shifts():
                service.metrics.shift.labels(name, shift.statistic).set(shift.value)
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"error": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"}, 422)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": "the image could not be predicted; the service's log says why"}, 500)

    return app


class Counted:
    """An ASGI application whose answers are counted by run and status."""

    def __init__(self, app: FastAPI, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counting(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(scope.get("run", ""), message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counting if scope["type"] == "http" else send)


def impatient(limits: Limits, metrics: Metrics) -> type[H11Protocol]:
    """Return uvicorn's HTTP protocol with time limits for what a client sends and takes.

    After an error that is sent before the body was read, the rest of the body is discarded for ``body_seconds``: a
    connection that is closed at once may lose the answer.
    """

    class Impatient(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            self.timer: asyncio.TimerHandle | None = None
            self.write_timer: asyncio.TimerHandle | None = None
            self.awaited = ""
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                self._drop("too many connections")
            self._expect()

        def connection_lost(self, exc: Exception | None) -> None:
            self._set_timer("", 0)
            self.resume_writing()
            super().connection_lost(exc)

        def handle_events(self) -> None:
            super().handle_events()
            self._expect()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._expect()

        def pause_writing(self) -> None:
            super().pause_writing()
            self.write_timer = self.loop.call_later(limits.body_seconds, self._drop, "answer not taken")

        def resume_writing(self) -> None:
            super().resume_writing()
            if self.write_timer is not None:
                self.write_timer.cancel()

        def send_400_response(self, msg: str) -> None:
            body = json.dumps({"error": msg}).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            events = h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()
            try:
                self.transport.write(b"".join(self.conn.send(event) for event in events))
                self.transport.close()
            except h11.LocalProtocolError:  # an answer is under way
                self.transport.abort()
            metrics.requests.labels("", 400).inc()

        def _expect(self) -> None:
            """Limit the time for what the client does next. A body that is read has a limit in :class:`Service`."""
            if self.transport.is_closing():  # once what is written has been taken
                self._set_timer("answer not taken", limits.body_seconds)
            elif self.conn.their_state is h11.IDLE:
                self._set_timer("headers not sent", limits.header_seconds)
            elif self.cycle is not None and self.cycle.response_complete:
                self._set_timer("refused body not ended", limits.body_seconds)
            else:
                self._set_timer("", 0)

        def _set_timer(self, awaited: str, seconds: float) -> None:
            if awaited == self.awaited:  # further bytes do not extend it
                return
            if self.timer is not None:
                self.timer.cancel()
            self.awaited = awaited
            self.timer = self.loop.call_later(seconds, self._drop, awaited) if awaited else None

        def _drop(self, reason: str) -> None:
            metrics.dropped.labels(reason).inc()
            self.transport.abort()

    return Impatient


def server(
    runs: dict[str, str], limits: Limits, load: Callable[[str], Detector], drift: bool, **options: Any
) -> uvicorn.Server:
    """Return a server of runs, to be started by its ``run``; ``drift``: follow their images.

    Raises:
        BKDError: a folder that is not a run.
    """
    metrics = Metrics()
    detectors = {name: load(folder) for name, folder in runs.items()}
    monitors = {name: DriftMonitor(detector.calibration) for name, detector in detectors.items()} if drift else {}
    service = Service(detectors, limits, metrics, monitors)
    return uvicorn.Server(
        uvicorn.Config(
            Counted(create_app(service), metrics),
            http=impatient(limits, metrics),
            ws="none",
            timeout_keep_alive=math.ceil(limits.header_seconds),
            timeout_graceful_shutdown=math.ceil(limits.body_seconds + limits.answer_seconds),
            server_header=False,
            **options,
        )
    )


def named(arguments: list[str]) -> dict[str, str]:
    """Return the run folder of each name: ``line1=runs/a``, or ``runs/a``, whose name is ``a``."""
    runs: dict[str, str] = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not equals:
            name, folder = os.path.basename(os.path.abspath(argument)), argument
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
            raise BKDError(f"{name!r} is no name for a run: expected NAME=FOLDER, the name of letters, digits, . _ -")
        if name in runs:
            raise BKDError(f"two runs have the name {name}: name them by NAME=FOLDER")
        runs[name] = folder
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="folders of trained runs, each with a name")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    parser.add_argument("--precision", default="32", help="32, bf16 or (GPUs) fp16 (default: %(default)s)")
    parser.add_argument("--no-drift", dest="drift", action="store_false", help="do not watch images for drift")
    parser.add_argument("--access-log", action="store_true", help="log every request")
    for each in fields(Limits):
        text = each.metadata["text"] + ("" if "default" in each.metadata["text"] else " (default: %(default)s)")
        parser.add_argument(
            f"--{each.name.replace('_', '-')}", type=type(each.default), default=each.default, help=text
        )
    arguments = vars(parser.parse_args())
    limits = Limits(**{each.name: arguments[each.name] for each in fields(Limits)})
    if min(vars(limits).values()) < 0 or any(vars(limits)[each.name] == 0 for each in fields(Limits) if each.default):
        parser.error("limits must be above 0")
    try:
        made = server(
            named(arguments["runs"]),
            limits,
            lambda folder: Detector.load(
                folder, device=arguments["device"], precision=arguments["precision"], max_pixels=limits.max_pixels
            ),
            drift=arguments["drift"],
            host=arguments["host"],
            port=arguments["port"],
            access_log=arguments["access_log"],
        )
    except BKDError as error:
        parser.error(str(error))
    logging.getLogger("bkd_fast").parent = log  # drift is said where the service's own messages are
    made.run()
    if not made.started:
        raise SystemExit(3)


if __name__ == "__main__":
    main()
