"""What every part of an SAE is: something that can be named in a file, sized, fitted, stepped and stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from mmsae.types import InputError


def refuse_unpaired(name: str, counts: Mapping[str, int], two: bool = True) -> None:
    """Refuse ``{modality: rows}`` that are no pairs (or, without ``two``, no tuples) for what is called ``name``.

    Raises:
        InputError: Fewer modalities than two, more with ``two``, or unequal counts.
    """
    if len(counts) < 2 or (two and len(counts) > 2) or len(set(counts.values())) != 1:
        what = "pairs: two modalities" if two else "pairs: two modalities or more"
        raise InputError(f"{name} needs {what} with equal counts, not {dict(counts)}")


class Part(nn.Module):
    """Base of normalisers, encoders, selectors and dictionaries.

    A part takes no sizes in its constructor; its ``build`` allocates. Everything that changes results is a parameter or
    a buffer, so that it is stored and resumed with the model.
    """

    name: str  #: Name in the registry and in files.
    #: ``{parameter: (its name in the file, whether the file holds it transposed)}``; others keep their own name.
    file_names: ClassVar[Mapping[str, tuple[str, bool]]] = {}

    def config(self) -> dict[str, Any]:
        """Arguments that rebuild this part; what was added in later versions only where it is not the default."""
        return {}

    def check(self, sae: Any) -> None:
        """Refuse an SAE in which this part has no meaning; asked when the SAE is composed.

        Raises:
            InputError: It names the two parts that do not go together.
        """

    def fit_(self, rows: Mapping[str, Tensor]) -> None:
        """Learn from ``{modality: (N, d) normalised rows}`` before the first step of a training."""

    def after_step_(self) -> None:
        """Act after an optimiser step: constraints and controllers."""

    def loaded_(self) -> None:
        """Bring what is derived from buffers up to date after they were read from a file."""

    def cut_(self) -> None:
        """Bring what counts latents up to date after every tensor was cut to some of them, or put in another order."""

    def weights(self) -> dict[str, tuple[nn.Parameter, bool]]:
        """``{name in the file: (parameter, whether the file holds it transposed)}``."""
        named = ((self.file_names.get(name, (name, False)), p) for name, p in self.named_parameters(recurse=False))
        return {name: (p, turned) for (name, turned), p in named}
