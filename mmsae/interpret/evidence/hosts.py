"""The hosts that a folder of evidence names, found again where they are now, and known by their fingerprints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mmsae.interpret.evidence.folder import Evidence
from mmsae.types import InputError

if TYPE_CHECKING:
    from mmsae.hosts import Host


class NamedHost(NamedTuple):
    """A host that some evidence is of, or whose embeddings it keeps."""

    folder: Path  #: The evidence
    option: str  #: What it is for the evidence, and the option that says where it is now: ``host`` or ``embedder``
    name: str  #: What the evidence calls it
    fingerprint: str  #: What the evidence knows it by; empty: nothing
    given: str  #: Its name now; empty: still the same
    precision: str  #: What it computed in: the weights of hosts that generate, and so their fingerprints, are of it

    @classmethod
    def of(cls, evidence: Evidence) -> NamedHost:
        """The host that the SAE reads."""
        job = evidence.about["job"]
        return cls(evidence.folder, "host", job["hint"], job["host"], evidence.where.host, job.get("precision", "fp32"))

    @classmethod
    def embedder_of(cls, evidence: Evidence, modality: str) -> NamedHost | None:
        """The host of the embeddings of a modality; None where there are none."""
        name, job, where = (evidence.about.get("embedder") or {}).get(modality), evidence.about["job"], evidence.where
        if not name or evidence.embeddings(modality) is None:
            return None
        own = job.get("embedder", "")
        given = where.embedder or (where.host if own == job["host"] else "")
        option = "host" if own == job["host"] else "embedder"
        return cls(evidence.folder, option, name, own, given, job.get("precision", "fp32"))

    @property
    def now(self) -> str:
        """The name that it is loaded by."""
        return self.given or self.name

    def load(self, device: Any = "cpu", precision: str = "") -> Host:
        """Load it, in its own precision where none is asked for.

        Raises:
            InputError: It cannot be loaded, or is not the host that the evidence knows; the sentence names both.
        """
        from mmsae.hosts import load_host

        try:
            host = load_host(self.now, device, precision or self.precision)
        except InputError as e:
            if self.given:
                raise
            said = f"{self.folder} names this host: say with --{self.option} where it is now"
            raise InputError(f"{str(e).rstrip('.')}; {said}") from e
        if self.fingerprint and host.fingerprint != self.fingerprint:
            found = f"{self.now} is host {host.fingerprint[:12]}"
            raise InputError(f"{found}, and {self.folder} is of {self.name}, which is {self.fingerprint[:12]}")
        return host
