"""Draw assets/report.png: the top of the demo's report, in headless Chromium.

Run `make demo` first, then `.venv/bin/python assets/draw_report.py`.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
REPORT = HERE.parent / "build" / "demo" / "why.html"
WIDTH, HEIGHT = 1200, 1560


def main() -> None:
    """Take the picture and shrink its palette, which keeps it small."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=1.5)
        page.goto(REPORT.resolve().as_uri())
        top = page.locator("h2").first.bounding_box()
        picture = page.screenshot(clip={"x": 0, "y": top["y"] - 24, "width": WIDTH, "height": HEIGHT}, full_page=True)
        browser.close()
    image = Image.open(io.BytesIO(picture)).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(HERE / "report.png", optimize=True)
    print(
        f"{HERE / 'report.png'}: {image.size[0]} x {image.size[1]}, {(HERE / 'report.png').stat().st_size // 1024} KiB"
    )


if __name__ == "__main__":
    main()
