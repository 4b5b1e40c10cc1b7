"""Where the sites of SAEs are in a model: modules whose input or output is read and written."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .. import _ffi
from .._library import fail
from .._site import BOUNDARIES, Site, block_in, block_output

#: What modules are called in the blocks of Hugging Face's models.
ATTENTION = ("self_attn", "attn", "attention", "self_attention", "multi_head_attention")
MLP = ("mlp", "feed_forward", "ffn", "mlp_block", "block_sparse_moe")
#: What some blocks of a hybrid have in the place of attention.
MIXERS = ("linear_attn", "mamba", "conv", "temporal_block")
#: The projections at the end of attention and of an MLP, and that at the MLP's beginning where the
#: block itself has both.
ATTENTION_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo")
MLP_PROJECTIONS = ("down_proj", "dense_4h_to_h")
BARE_MLP = ("fc1", "fc2")
#: Norms of what attention and MLP put out. The last of the first group is the MLP's input norm,
#: unless the MLP has a norm of its output.
ATTENTION_NORMS = ("post_self_attn_layernorm", "post_attention_layernorm")
MLP_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")

#: Sites that are the input of the module that a hook names, where it does not say.
_INPUTS = ("attention_z", "mlp_input", "attention_input", "linear_input", "block_middle")


@dataclass(frozen=True)
class Place:
    """A site in a model: the input or the output of one of its modules."""

    site: Site
    #: of the module, from the decoder
    path: str
    of_input: bool
    #: the decoder block that has it; None outside of the blocks
    block: int | None
    #: columns, where the model tells them
    width: int | None = None
    #: it is said to be what is added to the residual stream, which the first pass looks at
    added: bool = False

    @property
    def is_boundary(self) -> bool:
        """It is the residual stream between two blocks."""
        return self.site.kind in BOUNDARIES

    def expect_width(self, name: str, d_in: int) -> None:
        if self.width not in (None, d_in):
            fail(
                _ffi.STATUS_SHAPE,
                f"{name} reads hidden states [..., {d_in}], and {self} has [..., {self.width}]: it "
                "is an SAE of another site or model",
            )

    def read(
        self, decoder: nn.Module, keep: Callable[[torch.Tensor], object], *, apart: bool = False
    ) -> RemovableHandle:
        """Calls keep with the hidden states of each forward.

        apart: the model goes on with a copy, so that what it does in place does not reach them.
        """

        def kept(hidden: torch.Tensor) -> torch.Tensor | None:
            keep(hidden)
            return hidden.clone() if apart and not self.of_input else None

        return self.change(decoder, kept)

    def change(
        self, decoder: nn.Module, changed: Callable[[torch.Tensor], torch.Tensor | None]
    ) -> RemovableHandle:
        """The model goes on with what changed returns for the hidden states, unless it is None."""
        module = decoder.get_submodule(self.path)
        if self.of_input:
            first = _first_parameter(module)

            def on_input(module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
                new = changed(hidden_of(args[0] if args else kwargs.get(first)))
                if new is None:
                    return None
                return ((new, *args[1:]), kwargs) if args else (args, kwargs | {first: new})

            # Before hooks that were there: what a wrapper does to its module's input comes later.
            return module.register_forward_pre_hook(on_input, with_kwargs=True, prepend=True)

        def on_output(module: nn.Module, args: tuple, output: Any) -> Any:
            hidden = hidden_of(output)
            new = changed(hidden)
            if new is None or output is hidden:
                return new
            return type(output)((new, *output[1:]))

        return module.register_forward_hook(on_output)

    def __str__(self) -> str:
        if self.is_boundary:
            return str(self.site)
        return f"the {'input' if self.of_input else 'output'} of {self.path}"


def input_of(place: Place) -> Place:
    """The input of the block that has it."""
    path = ".".join(place.path.split(".")[:2])
    return Place(Site("block_input", place.block), path, True, place.block)


def block_of(place: Place) -> Place:
    """The output of the block that has it."""
    path = ".".join(place.path.split(".")[:2])
    return Place(block_output(place.block), path, False, place.block)


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in what a module is given or puts out: itself, or the first of a tuple."""
    hidden = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(hidden, torch.Tensor):
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"a module was given or put out a {type(output).__name__}; expected a tensor or a "
            "tuple that begins with one",
        )
    return hidden


def _first_parameter(module: nn.Module) -> str:
    return next(iter(inspect.signature(module.forward).parameters), "")


# Where it is in a model.


def place_of(site: Site, decoder: nn.Module, name: str, layers: nn.ModuleList) -> Place:
    """The site in a decoder, whose list of layers has this dotted name in its model."""
    attribute, width = name.rpartition(".")[2], _width(decoder)
    if site.kind == "embedding":
        module = _outside(site, decoder, name)
        if module is not None:
            return module
        _expect_only_tokens(site, decoder)
        return Place(site, f"{attribute}.0", True, 0, width)
    named = block_in(site.hook)
    if site.layer is None and named is None:
        module = _outside(site, decoder, name)
        return module or _refuse(site, decoder, decoder)
    layer = named[0] if site.layer is None else site.layer
    if not 0 <= layer < len(layers):
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"layer {layer} does not exist: {name} has the blocks 0 to {len(layers) - 1} (0-based)",
        )
    block, path = layers[layer], f"{attribute}.{layer}"
    if site.kind == "block_output":
        return Place(site, path, False, layer, width)
    exact = _exact(site, block)
    if exact is not None:
        within, of_input = exact
        width = _ends(block.get_submodule(within))[0 if of_input else 1]
        return Place(site, f"{path}.{within}", of_input, layer, width)
    within, of_input, added = _within(site, block, decoder)
    if site.kind == "attention_z":
        width = _ends(block.get_submodule(within))[0]
    return Place(site, f"{path}.{within}", of_input, layer, width, added)


def _exact(site: Site, block: nn.Module) -> tuple[str, bool] | None:
    """The module of the block that the hook names, and whether it is its input that is read."""
    parts = block_in(site.hook)
    if parts is None:
        return None
    _, within, end = parts
    if within and _has(block, within):
        return within, end == "input" if end else not site.exact and site.kind in _INPUTS
    if site.exact:
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"site is {site.hook!r}, and decoder block {site.layer} ({type(block).__name__}) has no "
            f"such module: it has {_children(block)}",
        )
    return None


def _within(site: Site, block: nn.Module, decoder: nn.Module) -> tuple[str, bool, bool]:
    """The module of a block that has a site of this kind, whether it is its input, and whether it is
    what is added to the residual stream."""
    kind = site.kind
    if kind == "attention_output":
        attention = _one_of(block, ATTENTION)
        if attention is None:
            _refuse(site, block, decoder)
        return _contribution(block, attention), False, True
    if kind == "mlp_output":
        mlp = _mlp_of(block)
        if mlp is None:
            _refuse(site, block, decoder)
        return _contribution(block, mlp), False, True
    if kind == "mlp_input":
        mlp = _mlp_of(block)
        if mlp is None:
            _refuse(site, block, decoder)
        return BARE_MLP[0] if mlp == BARE_MLP[1] else mlp, True, False
    if kind == "attention_z":
        attention = _one_of(block, ATTENTION)
        last = None if attention is None else _projection(block, attention, ATTENTION_PROJECTIONS)
        # What a norm makes of the heads' values is not the values.
        if last is None or _has_output_norm(block.get_submodule(attention)):
            _refuse(site, block, decoder)
        return last, True, False
    _refuse(site, block, decoder)


def _contribution(block: nn.Module, name: str) -> str:
    """Of attention or an MLP, the module whose output is added to the residual stream."""
    norms = MLP_NORMS
    if name != _mlp_of(block):
        # Where the MLP has no norm of its output, the last of these is the norm of its input.
        norms = ATTENTION_NORMS if _one_of(block, MLP_NORMS[:1]) else ATTENTION_NORMS[:1]
    norm = _one_of(block, norms)
    if norm is not None:
        return norm
    if "residual" in inspect.signature(type(block.get_submodule(name)).forward).parameters:
        # The module adds the residual stream itself.
        last = _projection(block, name, (*ATTENTION_PROJECTIONS, *MLP_PROJECTIONS))
        return name if last is None else last
    return name


def contributions(block: nn.Module) -> tuple[str, str] | None:
    """What are said to be a block's two additions to the residual stream; None where they cannot be
    told."""
    mixer, mlp = _one_of(block, (*ATTENTION, *MIXERS)), _mlp_of(block)
    if mixer is None or mlp is None:
        return None
    return _contribution(block, mixer), _contribution(block, mlp)


def _mlp_of(block: nn.Module) -> str | None:
    if all(hasattr(block, name) for name in BARE_MLP):
        return BARE_MLP[1]
    return _one_of(block, MLP)


def _projection(block: nn.Module, name: str, names: tuple[str, ...]) -> str | None:
    found = [
        path
        for path, _ in block.get_submodule(name).named_modules()
        if path.rpartition(".")[2] in names
    ]
    return f"{name}.{found[0]}" if len(found) == 1 else None


def _one_of(block: nn.Module, names: tuple[str, ...]) -> str | None:
    found = [name for name in names if isinstance(getattr(block, name, None), nn.Module)]
    return found[0] if len(found) == 1 else None


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


def _has_output_norm(attention: nn.Module) -> bool:
    names = [name for name, _ in attention.named_children()]
    return any("norm" in name and not re.match(r"(q|k|v|query|key|kv)_", name) for name in names)


def _refuse(site: Site, block: nn.Module, decoder: nn.Module) -> Any:
    hook = "" if site.hook is None else f" (hook {site.hook!r})"
    fail(
        _ffi.STATUS_UNSUPPORTED,
        f"the SAE reads {site}{hook}, which {type(decoder).__name__} does not show as far as is "
        f"known here: its block ({type(block).__name__}) has {_children(block)}. If the input or "
        'output of one of them is it, name that, like site="model.layers.5.mlp.output"',
    )


def _children(block: nn.Module) -> str:
    return ", ".join(name for name, _ in block.named_children())


def _outside(site: Site, decoder: nn.Module, name: str) -> Place | None:
    """The module of the decoder, in none of its layers, that the hook names."""
    path, end = re.fullmatch(r"(.*?)(?:\.(input|output))?", site.hook or "").groups()
    prefix = name.rpartition(".")[0]
    within = path.removeprefix(f"{prefix}.") if prefix else path
    found = bool(within) and _has(decoder, within)
    return Place(site, within, end == "input", None) if found else None


def _expect_only_tokens(site: Site, decoder: nn.Module) -> None:
    """An SAE of the tokens' embeddings reads block 0's input where nothing comes in between."""
    if site.hook is None or "embed" not in site.hook:
        return
    own = decoder.get_input_embeddings() if hasattr(decoder, "get_input_embeddings") else None
    between = [
        name
        for name, module in decoder.named_children()
        if module is not own
        and re.search("emb|wpe", name)
        and not re.search("rotary|drop|per_layer", name)
    ]
    if between:
        fail(
            _ffi.STATUS_UNSUPPORTED,
            f"the SAE reads {site.hook!r}, the tokens' embeddings, and {type(decoder).__name__} has "
            f"also {', '.join(between)} before its first block: name the module that it reads in the "
            'recipe, like {"hook_name": "transformer.wte"}',
        )


def _width(decoder: nn.Module) -> int | None:
    width = getattr(getattr(decoder, "config", None), "hidden_size", None)
    return width if isinstance(width, int) else None


def _ends(module: nn.Module) -> tuple[int | None, int | None]:
    """Columns of a linear module's input and output."""
    if type(module).__name__ == "Conv1D":
        return tuple(module.weight.shape)
    ends = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return tuple(end if isinstance(end, int) else None for end in ends)


# Whether it is what it is said to be.


class SumCheck:
    """Compares, in one forward of a decoder, what a block puts out with the sum of its input and of
    what are said to be its additions to the residual stream."""

    def __init__(self, place: Place, decoder: nn.Module, block: nn.Module) -> None:
        self.place, self.block, self.decoder = place, block, decoder
        names = contributions(block)
        if names is None:
            _refuse(place.site, block, decoder)
        self._output = block_of(place)
        path = self._output.path
        self._places = [input_of(place), *(Place(place.site, f"{path}.{n}", False, place.block) for n in names)]
        self._terms: dict[Place, torch.Tensor] = {}

    @contextlib.contextmanager
    def hooked(self, done: Callable[[], object]) -> Iterator[None]:
        """done is called after the block."""
        with contextlib.ExitStack() as stack:
            for part in self._places:
                hook = part.read(self.decoder, lambda x, part=part: self._keep(part, x))
                stack.callback(hook.remove)

            def end(hidden: torch.Tensor) -> None:
                self._compare(hidden)
                done()

            stack.callback(self._output.read(self.decoder, end).remove)
            yield

    def _keep(self, part: Place, hidden: torch.Tensor) -> None:
        # Some blocks add in place.
        self._terms[part] = hidden.detach().clone()

    def _compare(self, output: torch.Tensor) -> None:
        terms = [self._terms.get(part) for part in self._places]
        if any(term is None for term in terms):
            self._fail("does not call all of its modules")
        everything = [output.detach(), *terms]
        if any(hasattr(x, "full_tensor") for x in everything):
            everything = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in everything]
        if any(x.numel() != everything[0].numel() for x in everything):
            # Ranks hold parts of some of them.
            return
        # Each of the two sums is rounded once, in the narrowest dtype at worst.
        unit = max(torch.finfo(x.dtype).eps for x in everything)
        self._terms.clear()
        whole, *terms = (x.double().reshape(everything[0].shape) for x in everything)
        bound = 2 * unit * sum(term.abs() for term in terms)
        if not bool(((whole - sum(terms)).abs() <= bound).all()):
            self._fail("puts out something else than the sum of its input and of these")

    def _fail(self, what: str) -> None:
        names = ", ".join(part.path for part in self._places[1:])
        fail(
            _ffi.STATUS_UNSUPPORTED,
            f"the SAE reads {self.place.site}, which should be {self.place}; but "
            f"{type(self.block).__name__} {what} ({names}), so what it adds to the residual stream "
            f"is not known here: name the module that the SAE reads, like "
            f'site="{self.place.path}.output"',
        )
