"""Send good and hostile requests to examples/serve.py: python examples/load.py URL RUN IMAGE… [--requests 500].

A third of the requests are hostile: huge, half-sent or slow bodies, slow headers, wrong types and names, damaged images
and decompression bombs. Prints JSON: times of the good requests, answers by kind, and what the server kept of memory,
threads and files. Fails if a good request is not answered, or a hostile one is not refused as it should be.
Needs `pip install httpx`.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import httpx
import numpy as np
from PIL import Image

GIVE_UP = 60.0  # seconds; longer than the server's limits
DROPPED = "dropped"  # the server closed the connection


def bomb() -> bytes:
    """A PNG of a few KB that is an image of 400 million pixels."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((20_000, 20_000), bool)).save(file, format="PNG")
    return file.getvalue()


class Attacker:
    """Sends one kind of hostile request a method, and returns the status of the answer or DROPPED.

    ``EXPECTED``: which of these are right.
    """

    EXPECTED: ClassVar = {
        "declared_huge": {413},
        "streamed_huge": {413},
        "half_sent": {408, DROPPED},
        "half_sent_and_gone": {DROPPED},
        "slow_headers": {DROPPED},
        "slow_body": {408, DROPPED},
        "not_http": {400},
        "wrong_type": {415},
        "wrong_run": {404},
        "empty": {422},
        "garbage": {422},
        "eps_named_png": {422},
        "truncated": {422},
        "bomb": {413},
    }

    def __init__(self, url: str, run: str, image: bytes) -> None:
        parts = urlsplit(url)
        self.host, self.port, self.path, self.image = parts.hostname, parts.port or 80, f"/predict/{run}", image
        self.bomb_png = bomb()

    async def declared_huge(self) -> int | str:
        return await self.raw([self.head(10**12), b"0" * 100_000])

    async def streamed_huge(self) -> int | str:
        chunk = b"%x\r\n%b\r\n" % (2**20, b"0" * 2**20)
        return await self.raw([self.head("chunked"), *[chunk] * 64])

    async def half_sent(self) -> int | str:
        return await self.raw([self.head(len(self.image)), self.image[: len(self.image) // 2]])

    async def half_sent_and_gone(self) -> int | str:
        _, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(self.head(len(self.image)) + self.image[: len(self.image) // 2])
        await writer.drain()
        writer.close()
        return DROPPED

    async def slow_headers(self) -> int | str:
        return await self.raw([bytes([byte]) for byte in self.head(len(self.image))], pause=1)

    async def slow_body(self) -> int | str:
        return await self.raw([self.head(len(self.image)), *(bytes([byte]) for byte in self.image)], pause=0.5)

    async def not_http(self) -> int | str:
        return await self.raw([b"\x16\x03\x01\x02\x00\x01\x00 not HTTP\r\n\r\n"])

    async def wrong_type(self) -> int | str:
        return await self.whole(self.image, kind="text/html")

    async def wrong_run(self) -> int | str:
        return await self.raw([self.head(len(self.image), path="/predict/../../etc/passwd"), self.image])

    async def empty(self) -> int | str:
        return await self.whole(b"")

    async def garbage(self) -> int | str:
        return await self.whole(random.randbytes(50_000))

    async def eps_named_png(self) -> int | str:
        return await self.whole(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")

    async def truncated(self) -> int | str:
        return await self.whole(self.image[: len(self.image) * 2 // 3])

    async def bomb(self) -> int | str:
        return await self.whole(self.bomb_png)

    def head(self, length: int | str, kind: str = "image/png", path: str | None = None) -> bytes:
        size = "Transfer-Encoding: chunked" if length == "chunked" else f"Content-Length: {length}"
        return (
            f"POST {path or self.path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: {kind}\r\n{size}\r\n\r\n"
        ).encode()

    async def whole(self, body: bytes, kind: str = "image/png") -> int | str:
        return await self.raw([self.head(len(body), kind), body])

    async def raw(self, pieces: list[bytes], pause: float = 0) -> int | str:
        """Send pieces until they end or the server answers; return the status of its answer."""
        reader, writer = await asyncio.open_connection(self.host, self.port)

        async def send() -> None:
            try:
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(pause)
            except ConnectionError:
                pass  # the answer may be there all the same

        sending = asyncio.create_task(send())
        try:
            line = await asyncio.wait_for(reader.readline(), GIVE_UP)
        except ConnectionError:
            line = b""
        finally:
            sending.cancel()
            writer.close()
        return int(line.split()[1]) if line else DROPPED


class Client:
    """Sends good requests, each again after a 503 as the server says, and keeps their times in seconds."""

    def __init__(self, client: httpx.AsyncClient, run: str, images: list[bytes]) -> None:
        self.client, self.run, self.images = client, run, images
        self.seconds: list[float] = []
        self.statuses: Counter[int | str] = Counter()

    async def predict(self, number: int) -> int | str:
        body = self.images[number % len(self.images)]
        while True:
            begin = time.perf_counter()
            answer = await self.client.post(
                f"/predict/{self.run}", content=body, headers={"Content-Type": "application/octet-stream"}
            )
            self.statuses[answer.status_code] += 1
            if answer.status_code != 503:
                self.seconds.append(time.perf_counter() - begin)
                return answer.status_code
            await asyncio.sleep(float(answer.headers["Retry-After"]))

    async def process(self) -> dict[str, float]:
        """What the server says of its process."""
        text = (await self.client.get("/metrics")).text
        rows = (line.split() for line in text.splitlines() if line.startswith("process_"))
        return {name.removeprefix("process_"): float(value) for name, value in rows}


async def concurrently(calls: list[Callable[[], Awaitable[None]]], workers: int) -> None:
    """Run calls, at most ``workers`` at a time."""
    waiting = iter(calls)

    async def work() -> None:
        for call in waiting:
            await call()

    await asyncio.gather(*(work() for _ in range(workers)))


async def load(arguments: argparse.Namespace) -> dict[str, object]:
    """Send everything; return the report."""
    images = [path.read_bytes() for path in arguments.images]
    attacker = Attacker(arguments.url, arguments.run, images[0])
    kinds = list(Attacker.EXPECTED)
    hostile = round(arguments.requests * arguments.hostile)
    answers: Counter[tuple[str, int | str]] = Counter()
    async with httpx.AsyncClient(base_url=arguments.url, timeout=GIVE_UP) as http:
        client = Client(http, arguments.run, images)
        await concurrently([lambda n=n: client.predict(n) for n in range(arguments.workers)], arguments.workers)
        before = await client.process()
        client.seconds.clear()
        client.statuses.clear()

        async def attack(number: int) -> None:
            kind = kinds[number % len(kinds)]
            answers[kind, await getattr(attacker, kind)()] += 1

        begin = time.perf_counter()
        # Hostile requests come from workers of their own: those that wait for a time-out must not hold up the good.
        await asyncio.gather(
            concurrently([lambda n=n: attack(n) for n in range(hostile)], arguments.hostile_workers),
            concurrently(
                [lambda n=n: client.predict(n) for n in range(arguments.requests - hostile)], arguments.workers
            ),
        )
        seconds = time.perf_counter() - begin
        after = await client.process()
        for _ in range(40):  # connections that were left open time out
            if after["open_fds"] <= before["open_fds"]:
                break
            await asyncio.sleep(0.5)
            after = await client.process()
    wrong = {f"{kind}: {answer}": n for (kind, answer), n in answers.items() if answer not in Attacker.EXPECTED[kind]}
    p50, p99, longest = np.percentile(client.seconds, [50, 99, 100])
    return {
        "seconds": round(seconds, 1),
        "good": {
            "answers": dict(client.statuses),
            "p50_ms": round(1000 * p50, 1),
            "p99_ms": round(1000 * p99, 1),
            "max_ms": round(1000 * longest, 1),
        },
        "hostile": {f"{kind}: {answer}": count for (kind, answer), count in sorted(answers.items(), key=str)},
        "wrong": wrong | {f"good: {status}": n for status, n in client.statuses.items() if status not in (200, 503)},
        "peak_memory_mb": [round(each["peak_memory_bytes"] / 1e6) for each in (before, after)],
        "threads": [int(each["threads"]) for each in (before, after)],
        "open_files": [int(each["open_fds"]) for each in (before, after)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("url", help="of the service, such as http://localhost:8000")
    parser.add_argument("run", help="name of a run")
    parser.add_argument("images", type=Path, nargs="+", help="images to send, in turn")
    parser.add_argument("--requests", type=int, default=500, help="good and hostile (default: %(default)s)")
    parser.add_argument("--hostile", type=float, default=1 / 3, help="share of hostile ones (default: a third)")
    parser.add_argument("--workers", type=int, default=4, help="good requests at a time (default: %(default)s)")
    parser.add_argument("--hostile-workers", type=int, default=16, help="hostile ones (default: %(default)s)")
    report = asyncio.run(load(parser.parse_args()))
    print(json.dumps(report, indent=2))
    if report["wrong"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
