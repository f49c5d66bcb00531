"""``mmsae steer``: draw prompts with and without an intervention at several strengths, and measure what changed."""

from __future__ import annotations

from pathlib import Path

from mmsae.options import Drawing, OneProcessRun
from mmsae.steering.options import Edits, Gates, Sweep


def steer(
    host: str,
    sae: str,
    prompts: list[str],
    out: str = "runs/steer",
    edits: Edits = Edits(),
    gates: Gates = Gates(),
    sweep: Sweep = Sweep(),
    drawing: Drawing = Drawing(),
    run: OneProcessRun = OneProcessRun(batch_size=8),
) -> Path:
    """Steer a diffusion model with SAE features, over prompts, seeds and strengths, beside random features.

    The same prompts and noise are drawn without steering, at every strength, and with random live features at equal
    size of change. A killed run goes on where it stopped.

    Args:
        host: Diffusion pipeline, ``diffusers:FOLDER`` or ``diffusers:HUB_ID``.
        sae: SAE folder or hub id.
        prompts: Prompts, or text files (.txt) with one a line.
        out: Folder for the images, ``table.parquet``, ``table.csv``, ``results.json`` and ``report.html``.
        edits: How to steer.
        gates: Where it acts.
        sweep: What is compared and measured.
        drawing: How images are drawn.
        run: Where it is computed.

    Returns:
        The folder.

    Raises:
        InputError: Options that do not go together, or a folder that holds another run.
    """
    from mmsae.steering.job import SteeringJob
    from mmsae.steering.report import write_report

    job = SteeringJob(host, sae, prompts, Path(out), edits, gates, sweep, drawing, run)
    write_report(job.folder, job.run())
    return job.folder
