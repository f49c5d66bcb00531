"""A job on a Ray cluster of one worker, one unit of which takes more memory than Ray allows; prints how it ends."""

import sys
from pathlib import Path

import ray

from mmsae.errors import InputError
from mmsae.jobs.ray import RayWorkers
from mmsae.jobs.tally import Tally


def there(rank, tally, greedy, size):
    """Writes part files, and takes ``size`` bytes at one unit."""

    def work(share):
        (unit,) = share.units
        held = bytearray(size if unit == greedy else 1)
        for page in range(0, len(held), 4096):
            held[page] = 1
        (tally.folder / tally.files[unit]).write_text(str(len(held)))

    return work


if __name__ == "__main__":
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    tally = Tally(Path(sys.argv[1]), [f"{i}.tar" for i in range(4)], [f"{i}.part" for i in range(4)])
    tally.note()
    with RayWorkers(None, 0, retries=1, progress=False) as engine:
        engine.decoders(0)
        try:
            engine.run(tally, tally.missing(), None, there, tally, 1, int(sys.argv[2]))
        except InputError as e:
            print(e)
