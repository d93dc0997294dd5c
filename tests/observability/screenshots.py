"""Takes pictures of the status page of a server under load: ``python -m tests.observability.screenshots DIR``.

The one in docs/ is ``desktop.png``.
"""

from __future__ import annotations

import sys
import time
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from encoder_svc.models.synthetic import make_checkpoint
from tests.browser import chromium
from tests.ports import free_port
from tests.serving import ServerProcess
from tests.traffic import MAX_INFLIGHT_IMAGES, Traffic

WATCHED_S = 70
DESKTOP = {"width": 1180, "height": 800}
LOOKS = {
    "desktop": {"viewport": DESKTOP},
    "dark": {"viewport": DESKTOP, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "device_scale_factor": 2},
}


def main(folder: Path) -> None:
    port = free_port()
    with TemporaryDirectory() as temporary:
        model = Path(temporary) / "tiny-qwen2_5_vl"
        make_checkpoint(model, family="qwen2_5_vl", vision_only=True)
        server = ServerProcess(
            *("--model", model, "--metrics-port", str(port), "--max-inflight-images", str(MAX_INFLIGHT_IMAGES))
        )
        with server, Traffic(server.target), chromium() as browser:
            pages = {name: browser.new_context(**look).new_page() for name, look in LOOKS.items()}
            for page in pages.values():
                page.goto(f"http://127.0.0.1:{port}/")
            time.sleep(WATCHED_S)
            for name, page in pages.items():
                picture = Image.open(BytesIO(page.screenshot(full_page=True)))
                # The page has few colours; so has the file, which a repository holds.
                few = picture.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
                few.save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
