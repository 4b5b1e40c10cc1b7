"""What is trained: the settings that are compared."""

from dataclasses import dataclass

#: lambda makes the plain run's move of K cost so many times what tuning gains (the ratio rule).
RATIO = 1000


@dataclass(frozen=True)
class Blocking:
    """Of one variant."""

    #: as of discovery.Found.latents
    choice: str = "chosen"
    ratio: float = RATIO
    tokens: str = "labels"
    freeze_above: bool = False
    activation: str = "native"
    #: with the watch and adaptive blocking
    watched: bool = False


PLAIN, BLOCK = "plain", "block"
VARIANTS: dict[str, Blocking | None] = {
    PLAIN: None,
    BLOCK: Blocking(),
    # lambda
    "block_lam10": Blocking(ratio=10),
    "block_lam100": Blocking(ratio=100),
    "block_lam300": Blocking(ratio=300),
    "block_lam3000": Blocking(ratio=3000),
    # size of K
    "block_k10": Blocking("chosen_10"),
    "block_k40": Blocking("chosen_40"),
    # other options
    "block_frozen_above": Blocking(freeze_above=True),
    "block_frozen_above_lam100": Blocking(ratio=100, freeze_above=True),
    "block_all_tokens": Blocking(tokens="all"),
    "block_dense_relu": Blocking(activation="dense_relu"),
    "block_preactivation": Blocking(activation="preactivation"),
    # controls
    "random_k": Blocking("random"),
    "shuffled_signs": Blocking("shuffled_signs"),
    "one_side": Blocking("positive"),
    "top_delta": Blocking("top_delta"),
    # any twenty latents hold so small a model if lambda is large: these tell whether it matters which
    "random_k_lam10": Blocking("random", ratio=10),
    "random_k_lam100": Blocking("random", ratio=100),
    "shuffled_signs_lam10": Blocking("shuffled_signs", ratio=10),
    "shuffled_signs_lam100": Blocking("shuffled_signs", ratio=100),
}
#: What is trained far on.
LONG: dict[str, Blocking | None] = {
    PLAIN: None,
    BLOCK: Blocking(),
    "block_watch": Blocking(watched=True),
}
