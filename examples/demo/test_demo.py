"""The parts of the demo that a wrong figure could hide in; the whole of it runs in `make demo`."""

import torch

from . import corpus, drift, finetune


def test_only_completion_tokens_are_supervised():
    rows = [list(range(10, 30)), list(range(10, 25))]
    batch = finetune.collate(rows, pad=0)
    assert batch.ids.shape == (2, 20)
    supervised = (batch.supervised.sum(1) + finetune.PROMPT_TOKENS).tolist()
    assert supervised == [20, 15]
    assert (batch.labels[batch.supervised] == batch.ids[batch.supervised]).all()


def test_drift_separates_directions_and_the_outside():
    moved = drift.Drift(
        shift=torch.tensor([1.0, -2.0, 3.0, -4.0]),
        toward=torch.tensor([1.0, 0.5, 9.0, 0.25]),
        away=torch.tensor([0.1, 4.0, 0.2, 16.0]),
        tokens=7,
    )
    ids, signs = drift.top_movers(moved, 2)
    assert (ids, signs) == ([2, 3], [1, -1])  # K_pos before K_neg
    inside = moved.blocked(torch.tensor(ids), torch.tensor([1.0, 1.0]))
    assert inside["penalty"] == 9.25
    assert (inside["bad_l2"], inside["free_l2"]) == (3.0, 4.0)
    assert moved.outside(torch.tensor(ids)).tolist() == [1.0, -2.0, 0.0, 0.0]


def test_no_general_text_speaks_of_licences():
    texts = corpus.gather()
    assert not any(corpus.LICENCE_WORDS.search(text) for text in texts.general_train)
    assert not set(texts.narrow_train) & set(texts.narrow_held)
