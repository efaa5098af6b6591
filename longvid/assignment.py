"""Which noise goes with which clip of a batch: a linear assignment problem, solved exactly.

Written out here since nothing that training depends on solves it: torch, transformers and accelerate do not, and scipy,
which does, is no dependency of theirs.
"""

from typing import Annotated

import numpy as np
import torch

from longvid.types import Latents


def nearest_noise(clean: Latents, noise: Latents) -> Latents:
    """The batch's noise, permuted so that the sum of squared distances to its clips is least.

    Immiscible Diffusion (arXiv 2406.12303), section 3. Norms do not depend on the permutation, so the cost is minus
    the inner product. The noise of a batch stays the same set.
    """
    cost = -(clean.flatten(1).double() @ noise.flatten(1).double().T)
    return noise[torch.from_numpy(assign(cost.cpu().numpy())).to(noise.device)]


def assign(cost: Annotated[np.ndarray, "n n"]) -> Annotated[np.ndarray, "n"]:
    """The column of each row, a permutation of least total cost.

    The Hungarian algorithm by shortest augmenting paths (Jonker and Volgenant 1987): rows enter one by one, each by
    Dijkstra's search over costs less the duals `row` and `column`, which stay at least 0. O(n^3).
    """
    n = len(cost)
    row, column = np.zeros(n + 1), np.zeros(n + 1)
    owner = np.full(n + 1, n)  # the row that has a column; n: none. Column n is where each search begins
    for new in range(n):
        owner[n], here = new, n
        distance, previous = np.full(n, np.inf), np.full(n, n)
        is_settled = np.zeros(n + 1, dtype=bool)
        while owner[here] != n:
            is_settled[here] = True
            i = owner[here]
            is_open = ~is_settled[:n]
            reduced = cost[i] - row[i] - column[:n]
            is_nearer = is_open & (reduced < distance)
            distance[is_nearer], previous[is_nearer] = reduced[is_nearer], here
            nearest = int(np.where(is_open, distance, np.inf).argmin())
            step = distance[nearest]
            row[owner[is_settled]] += step
            column[is_settled] -= step
            distance[is_open] -= step
            here = nearest
        while here != n:
            owner[here] = owner[previous[here]]
            here = previous[here]
        owner[n] = n
    columns = np.empty(n, dtype=int)
    columns[owner[:n]] = np.arange(n)
    return columns
