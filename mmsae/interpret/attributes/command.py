"""``mmsae attributes``: words for what features of a text-to-image host set in images."""

from __future__ import annotations

from pathlib import Path

from mmsae.interpret.attributes.options import Acting, Discovering
from mmsae.options import Drawing, OneProcessRun


def attributes(
    host: str,
    sae: str,
    judge: str,
    prompts: list[str],
    out: str = "runs/attributes",
    discovering: Discovering = Discovering(),
    acting: Acting = Acting(),
    drawing: Drawing = Drawing(),
    run: OneProcessRun = OneProcessRun(batch_size=8),
) -> Path:
    """Discover which attribute each feature sets in images, without anybody looking.

    The same prompts and noise are drawn without and with a feature. Words that images of every other prompt move
    towards, more than towards other words and more than under random live features at the same size of change, are
    confirmed on the remaining prompts, by a choice between the two images. Random directions are asked about in the
    same way, so that it is seen how much is found by chance. A killed run goes on where it stopped.

    Args:
        host: Diffusion pipeline, ``diffusers:FOLDER`` or ``diffusers:HUB_ID``.
        sae: SAE folder or hub id.
        judge: Host that embeds images and texts, as an open_clip one; another one than the pipeline's text encoder.
        prompts: Prompts, or text files (.txt) with one a line; half of them discover, half confirm.
        out: Folder for ``attributes.json``, which ``mmsae explore --attributes`` takes, and ``report.html``.
        discovering: Which features are asked about, and against what.
        acting: Where a feature acts.
        drawing: How images are drawn.
        run: Where it is computed.

    Returns:
        The path of ``attributes.json``.

    Raises:
        InputError: Options that do not go together, or a folder that holds another run.
    """
    from mmsae.interpret.attributes.job import AttributeJob
    from mmsae.interpret.attributes.report import write_report

    job = AttributeJob(host, sae, judge, prompts, Path(out), discovering, acting, drawing, run)
    if job.files.finished:
        if run.progress:
            print(f"{out}: finished before; nothing to do")
        return job.path
    with job.files.lead():
        found = job.run()
        write_report(job.folder, found, job.shown())
        return job.write(found)
