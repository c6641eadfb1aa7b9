"""Predicts images over HTTP: BKD_RUN=runs/parts uvicorn --app-dir examples serve:app, then

    curl --data-binary @part.png localhost:8000/predict

Needs FastAPI and uvicorn (pip install fastapi uvicorn).
"""

import io
import os
import threading

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from PIL import Image, UnidentifiedImageError

from bkd_fast import BKDError, Detector

app = FastAPI(title="bkd_fast")
detector = Detector.load(os.environ["BKD_RUN"])
turn = threading.Lock()  # the network uses all cores: one image at a time is fastest
MOST_BYTES = 50_000_000


def predict(data: bytes) -> dict[str, float | bool]:
    """Score, decision and the share of marked pixels of an encoded image."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise HTTPException(422, f"the body is not an image that can be decoded ({error})") from error
    try:
        with turn:
            found = detector(image)
    except BKDError as error:
        raise HTTPException(422, str(error)) from error
    return {
        "score": found.score,
        "anomalous": found.label,
        "threshold": detector.threshold,
        "normalized_score": found.normalized_score,
        "p_value": found.p_value,
        "marked": float(found.mask.mean()),
    }


@app.post("/predict")
async def predict_body(request: Request) -> dict[str, float | bool]:
    data = await request.body()
    if not data or len(data) > MOST_BYTES:
        raise HTTPException(413 if data else 422, f"{len(data)} bytes: expected an image of 1 to {MOST_BYTES} bytes")
    return await run_in_threadpool(predict, data)
