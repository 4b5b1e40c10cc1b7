"""What is trained: the settings that are compared."""

from dataclasses import dataclass

#: lambda makes the plain run's move of K cost so many times what tuning gains (the ratio rule).
RATIO = 10_000


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
    "block_lam1000": Blocking(ratio=1000),
    # other options; with the layers above frozen a large lambda leaves nothing of the task to be learned
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
    "random_k_lam1000": Blocking("random", ratio=1000),
    "shuffled_signs_lam1000": Blocking("shuffled_signs", ratio=1000),
    "flipped_signs_lam1000": Blocking("flipped_signs", ratio=1000),
    "block_k5_lam1000": Blocking("chosen_5", ratio=1000),
    "random_k5_lam1000": Blocking("random_5", ratio=1000),
    "shuffled_signs_k5_lam1000": Blocking("shuffled_signs_5", ratio=1000),
    "flipped_signs_k5_lam1000": Blocking("flipped_signs_5", ratio=1000),
}
#: What is trained far on.
LONG: dict[str, Blocking | None] = {
    PLAIN: None,
    BLOCK: Blocking(),
    "block_watch": Blocking(watched=True),
    # less of lambda, and a K that is too small for it: does the watch see it, and mend it?
    "block_lam1000": Blocking(ratio=1000),
    "block_lam1000_watch": Blocking(ratio=1000, watched=True),
    "block_k5_lam100": Blocking("chosen_5", ratio=100),
    "block_k5_lam100_watch": Blocking("chosen_5", ratio=100, watched=True),
}
#: Trained only where they are named, so that a seed stays below a quarter of an hour.
ON_REQUEST = {
    "flipped_signs", "random_k_lam1000", "shuffled_signs_lam1000", "flipped_signs_lam1000",
    "shuffled_signs_k5_lam1000",
}  # fmt: skip
LONG_ON_REQUEST = {"block_lam1000", "block_lam1000_watch"}
