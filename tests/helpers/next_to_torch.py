"""Our optimizer and torch's on equal parameters, and whether they agree."""

import torch
from training import parameters, results

from fused_adam import FusedAdam

BACKENDS = ["reference", "triton"]
FLATTEN = [False, True]


def close(optimizer, reference, atol=1e-6):
    for ours, theirs in zip(results(optimizer), results(reference), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=atol)


def pair(shapes=((5,), (3, 4)), ours=FusedAdam, theirs=torch.optim.Adam, **options):
    """Our optimizer and torch's on equal parameters."""
    extra = {key: options.pop(key) for key in ("flatten", "backend") if key in options}
    a = ours(parameters(torch.float32, shapes), **options, **extra)
    return a, theirs(parameters(torch.float32, shapes), **options)
