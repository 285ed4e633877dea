"""The hashed training of `bench/verify.py` in other arrangements, and under precision recipes."""

import torch

from bench.verify import GROUPS, PARAMS
from fused_adam import FusedAdam

# Per precision recipe, over the bfloat16 parameters alone (float32 ones for native weights). The
# host takes 3 ms per parameter and step for the random bits and codes; the order of the parameters
# matters to those.
RECIPE_STEPS = 50
RECIPE_HASHES = {
    "split32": "20642616675d8d93e13e38afe1af1ca09e212295d946b8f617d24a5127e530b8",
    "split32-bf16": "691d5b79876a89218b88122b68e87bd2390d36438fc7dd6d8dc6a2633ccf4d23",
    "split24-bf16": "9ad3d5dcf3344e13de87e853857a4a1797aedf1cf593ee0127cd554111461f52",
    "sr-bf16": "a89ba37a2c76ac4483db4453466d3b15de7dfffa32a68b8ba1930b49cf809fe7",
    "split24-int8": "d3f7066931c2644a982ffe9290e854ab769f77e7708b3ffca43930a42a94583f",
    "master32": "0d954c8fda1c137d6eb45479d689d45c3b724e8321aa497f13ca3c1c4aa564eb",
    "native-bf16": "f55507509d2b3bf8d614a20e37f4d56b3ed7ac99ec2e5701a0e86cc8671e243d",
    "native-int8": "7f3295f11c7aa562cd2f6d3447369f4f5e7864d24f78c32de31a4b9dcd2ca6d0",
}

# The whole training, and 30 steps of it, with cautious weight decay.
CAUTIOUS_HASH = "52083735acadb838207a72a6bb60cdf562ed2b7e3054c735776967523f00c3ca"
CAUTIOUS_SHORT_HASH = "6b60c20f84cc1599ef4ba0f360cb6c99e84045d698687cdd284c8616ce3870be"

# The same with averages of the weights, which all but the first group keep.
EMA_HASH = "7ac2d37bef528d185ab6930ccd5d0ac4b5b9f61876e6614214d9043897cdcfa1"
EMA_SHORT_HASH = "d858825c94d74072bbe07912fedf19d5e5e757b6a0c358dbe0b7b29ff1175dc1"


def optimizer_of(
    params, split=False, permuted=False, halved=False, cautious=False, averaged=False, **arguments
):
    """The same parameters with the same options, in whatever order and grouping; `halved` keeps the
    order, `cautious` has every group whose decay can be so, and `averaged` all but the first.
    """
    names = list(PARAMS)
    if permuted:
        names = names[7:][::-1] + names[:7]
    groups = []
    for number, options in enumerate(GROUPS):
        members = [
            params[name] for name in names if name in params and PARAMS[name].group == number
        ]
        parts = (
            [members[::2], members[1::2]]
            if split
            else [members[:1], members[1:]]
            if halved
            else [members]
        )
        if cautious:
            options = {**options, "cautious": options.get("decoupled_weight_decay", True)}
        if averaged:
            options = {**options, "ema_decay": (None, 0.99, 0.9999)[number]}
        groups += [{"params": part, **options} for part in parts]
    if permuted:
        groups.reverse()
    return FusedAdam(groups, lr=1e-2, decoupled_weight_decay=True, **arguments)


def of_recipe(precision):
    return {
        "precision": precision,
        "only": torch.float32 if precision.startswith("native") else torch.bfloat16,
    }
