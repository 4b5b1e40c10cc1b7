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
    "block_lam10000": Blocking(ratio=10_000),
    # other options; with the layers above frozen a large lambda leaves nothing of the task to be learned
    "block_k5": Blocking("chosen_5"),
    "block_k10": Blocking("chosen_10"),
    "block_frozen_above": Blocking(ratio=100, freeze_above=True),
    "block_all_tokens": Blocking(tokens="all"),
    "block_dense_relu": Blocking(activation="dense_relu"),
    "block_preactivation": Blocking(activation="preactivation"),
    # controls
    "random_k": Blocking("random"),
    "shuffled_signs": Blocking("shuffled_signs"),
    "flipped_signs": Blocking("flipped_signs"),
    "one_side": Blocking("positive"),
    "top_delta": Blocking("top_delta"),
    # many latents or a large lambda hold so small a model whichever they are: these tell which matter
    "random_k_lam100": Blocking("random", ratio=100),
    "shuffled_signs_lam100": Blocking("shuffled_signs", ratio=100),
    "flipped_signs_lam100": Blocking("flipped_signs", ratio=100),
    "random_k5": Blocking("random_5"),
    "shuffled_signs_k5": Blocking("shuffled_signs_5"),
    "flipped_signs_k5": Blocking("flipped_signs_5"),
}
#: What is trained far on.
LONG: dict[str, Blocking | None] = {
    PLAIN: None,
    BLOCK: Blocking(),
    "block_watch": Blocking(watched=True),
    # a K that is too small, at a lambda that does not make up for it: does the watch see it, and mend it?
    "block_k5_lam100": Blocking("chosen_5", ratio=100),
    "block_k5_lam100_watch": Blocking("chosen_5", ratio=100, watched=True),
}
