"""Draw the texts of the language-model loss (PTX; Ouyang et al. 2022, arXiv 2203.02155, eq. 2)."""

import torch


def drawn_texts(texts: list[list[int]], first: int, count: int, seed: int) -> list[list[int]]:
    """Return `count` token rows, from place `first` on, of an endless sequence of the texts.

    Each pass over the texts shuffles them again. The sequence depends on the seed alone, so that a resumed run continues
    at the same place.
    """
    orders: dict[int, torch.Tensor] = {}
    rows = []
    for place in range(first, first + count):
        epoch, index = divmod(place, len(texts))
        if epoch not in orders:
            orders[epoch] = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed + epoch))
        rows.append(texts[orders[epoch][index]])
    return rows
