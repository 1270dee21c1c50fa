"""Items, summaries and images for the tests of the report."""

import io
from typing import Any

import numpy as np
from PIL import Image

from vr_jax.evaluation.report import HeatMap, ReportItem, heat_png

HOSTILE = '<script>document.title="hurt"</script><img src=x onerror=\'document.title="hurt"\'><!--items-->'
UNTEXT = "nul\x00 escape\x1b[31m half\udc80 turned\u202e right \u0645\u0631\u062d\u0628\u0627 \ufffe"


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def plain(width: int, height: int) -> bytes:
    return encoded(np.full((height, width, 3), (200, 30, 30), np.uint8))


def noise(seed: int, side: int) -> bytes:
    return encoded(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def heat(seed: int, shape: tuple[int, int] = (6, 8)) -> bytes:
    return heat_png(np.random.default_rng(seed).gamma(2.0, 0.5, shape))


def estimate(score: float, items: int, **more: Any) -> dict[str, Any]:
    return {"score": score, "interval": [score - 2, score + 3], "items": items, **more}


def summary() -> dict[str, Any]:
    """Two of the eleven benchmarks and one that belongs to no group."""
    return {
        "average": None,
        "groups": {"General": None, "Knowledge": None, "OCR&Chart": None},
        "benchmarks": {
            "chartqa": {
                "title": "ChartQA",
                "group": "OCR&Chart",
                **estimate(40.1, 2500),
                "unscored": {"count": 3, "by_reason": {"broken_image": 3}},
                "categories": {"human_test": estimate(30.0, 1250), "augmented_test": estimate(50.2, 1250)},
            },
            "mmmu_val": {
                "title": "MMMU",
                "group": "Knowledge",
                **estimate(33.3, 900),
                "categories": {f"Subject_{n}": estimate(3.0 * n, 30) for n in range(30)},
            },
            "own": {
                "title": "Own <b>",
                "group": None,
                **estimate(12.5, 4),
                "categories": {'say "x"': estimate(12.5, 4)},
            },
        },
    }


def items() -> list[ReportItem]:
    shared = plain(320, 240)
    maps = (HeatMap("after layer 1", heat(1), "up to 3 times"), HeatMap("after layer 4", heat(2)))
    return [
        ReportItem("c-0", "human_test", "How many <b>bars</b>?", ("3",), "3", 1.0, (shared,), "chartqa", maps=maps),
        ReportItem("c-1", "human_test", "Which?", ("red", "crimson"), HOSTILE, 0.0, (shared,), "chartqa", maps=maps),
        ReportItem("c-2", "augmented_test", "Which shade?", ("x",), UNTEXT, 0.5, (plain(8, 8),), "chartqa"),
        ReportItem(
            "m-0", "Subject_1", "Several", ("A",), "", 0.0, tuple(plain(40 + n, 30) for n in range(9)), "mmmu_val"
        ),
        ReportItem("m-1", "Subject_2", "Not asked", ("B",), None, 0.0, benchmark="mmmu_val", error="broken_image: cut"),
        ReportItem("m-2", "human_test", "Long", (), "word " * 100_000, 0.0, (b"none",), "mmmu_val", cut_off=True),
        ReportItem("o-0", 'say "x"', "Own", ("1",), "1", 1.0, benchmark="own"),
    ]
