"""Sites: the places of a model at which an SAE reads hidden states, as it says itself or its user."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from . import _ffi
from ._library import fail

#: Sites that are the residual stream between two blocks.
BOUNDARIES = ("block_output", "embedding")
#: Sites that may lie outside of the blocks.
_ANYWHERE = ("embedding", "module_output", "norm_output", "linear_input")


@dataclass(frozen=True)
class Site:
    """Where an SAE reads, as it says itself or its user does."""

    #: "block_output" and the like: the vocabulary of ``Sae.site``
    kind: str
    #: 0-based decoder block in which it lies; None for the embedding
    layer: int | None
    #: a name that may be that of the very module in Hugging Face's model
    hook: str | None = None
    #: hook was given to find the module: no other will do
    exact: bool = False

    @property
    def key(self) -> tuple[str, int | None, str | None]:
        """What tells it from other sites."""
        return self.kind, self.layer, self.hook if self.exact else None

    @property
    def label(self) -> str:
        """A name for logs, for each place of a model another."""
        if self.kind == "block_output":
            return f"layer{self.layer}"
        return self.kind if self.layer is None else f"layer{self.layer}.{self.kind}"

    def __str__(self) -> str:
        if self.kind == "block_output":
            return f"the output of decoder block {self.layer}"
        if self.kind == "embedding":
            return "the embedding (the input of decoder block 0)"
        block = "" if self.layer is None else f" of decoder block {self.layer}"
        return f"{self.hook if self.exact else self.kind}{block}"


def block_output(layer: int) -> Site:
    return Site("block_output", layer)


def site_of(source: Any, layer: int | None, site: str | None) -> Site:
    """Where a plan, statistics, a steering or an SAE reads; layer and site complete what its SAE says
    and may not contradict it."""
    sae = getattr(source, "_sae", source)
    says = sae.describe()
    kind, at, hook = says["site"], says["layer"], says["hook"]
    stated = None if site is None else _stated(site, at if layer is None else layer)
    if kind == "unknown" and stated is None and hook is not None:
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"the SAE's hook {hook!r} is not known: say what it reads, like "
            'site="mlp_output", and its layer',
        )
    if kind == "unknown":
        # A number alone means what leaves the block.
        own = stated or Site("block_output", layer if at is None else at)
    elif at is None:
        own = _normal(kind, layer, hook)
    else:
        own = Site(kind, at, hook)
    if stated is not None and stated.exact and kind not in BOUNDARIES:
        # The module's name says more than the kind.
        own = Site(own.kind, stated.layer, stated.hook, exact=True)
    elif stated is not None and (stated.kind, stated.layer) != (own.kind, own.layer):
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"site is {site!r}, but the SAE reads {own} (hook {hook!r}): leave site out",
        )
    elif stated is None and layer is not None and layer != own.layer and at is not None:
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"layer is {layer}, but the SAE reads {own}: leave layer out",
        )
    if own.kind == "embedding" and layer is not None and stated is None:
        fail(_ffi.STATUS_INVALID_ARGUMENT, f"layer is {layer}, but the SAE reads {own}")
    if own.layer is None and own.kind not in _ANYWHERE and not own.exact:
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            "the SAE does not say which layer it reads: give layer, the 0-based decoder block",
        )
    return own


def expect_same(name: str, source: Any, site: Site) -> None:
    """That the source's SAE reads this site, as far as it says so."""
    says = getattr(source, "_sae", source).describe()
    kind, layer = says["site"], says["layer"]
    if kind not in ("unknown", site.kind) or layer not in (None, site.layer):
        other = Site("block_output" if kind == "unknown" else kind, layer)
        fail(_ffi.STATUS_INVALID_ARGUMENT, f"the SAE of {name} reads {other}, not {site}")


def _normal(kind: str, layer: int | None, hook: str | None = None) -> Site:
    """What enters a block is what leaves the one before, or the embedding."""
    if kind == "block_input" and layer is not None:
        return block_output(layer - 1) if layer > 0 else Site("embedding", None)
    return Site(kind, None if kind == "embedding" else layer, hook)


def _stated(site: str, layer: int | None) -> Site:
    """What the user says: a kind of site, or the name of a module."""
    if "." in site:
        parts = block_in(site)
        at = None if parts is None else parts[0]
        if at is not None and layer is not None and at != layer:
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                f"site is {site!r}, of decoder block {at}, and the layer is {layer}",
            )
        return Site("module_output", at, site, exact=True)
    if site not in _ffi.SITES or site == "unknown":
        known = ", ".join(repr(name) for name in _ffi.SITES if name != "unknown")
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"site is {site!r}; expected one of {known}, or the name of a module like "
            '"model.layers.5.mlp.output"',
        )
    return _normal(site, layer)


def block_in(name: str | None) -> tuple[int, str, str] | None:
    """Of a dotted name: the number of its block, the module's path within the block, and "input",
    "output" or ""."""
    parts = re.sub(r"\[0\]$", "", name or "").split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return None
    path = parts[at + 1 :]
    end = path.pop() if path and path[-1] in ("input", "output") else ""
    return int(parts[at]), ".".join(path), end
