"""Columns of the tables that host and kernels share: plain ints, importing neither torch nor
triton.
"""

# rows: int64, shape (P, ROW): one row per parameter. Addresses in bytes, 0 where there is none.
# NUMEL is what the update covers: the row's own elements, those of the neighbours it leads, or none
# if it is led. EXTRA is the master weight or remainder. SEED, ORDINAL and ORIGIN key the random
# bits: the parameter's place in the optimizer, and the first of its elements that is here, if it is
# spread over processes.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, EXTRA, EXP_AVG_SCALE, EXP_AVG_SQ_SCALE = range(8)
STEP, NUMEL, GROUP, GRAD_NUMEL, SEED, ORDINAL, ORIGIN = range(8, 15)
ROW = 15

# blocks: int32, shape (B, 2): which row, which BLOCK-sized chunk of it.

# hyper: float64, shape (G, HYPER): one row per param group, as the user set it.
# MAX_GRAD_NORM is negative where nothing is clipped; it and SKIP_NONFINITE are the same in every
# row.
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, DECOUPLED, MAXIMIZE, MAX_GRAD_NORM, SKIP_NONFINITE = range(9)
HYPER = 9

# scalars: float32 or float64, shape (P, SCALARS): this step's values for one parameter.
# STEP_NUMBER counts from 1, up to 2^24.
STEP_SIZE, RBC2, W1, W2, B2, EPSILON, COUPLED, DECAY, GRAD_MULTIPLIER, SKIP, STEP_NUMBER = range(11)
SCALARS = 11

# stats: float64, shape (STATS,): the last norm before clipping, and how many steps were skipped.
GRAD_NORM, SKIPPED_STEPS = range(2)
STATS = 2

# The order in which squares of gradients are added: lanes per piece, elements per chunk.
NORM_LANES = 1024
NORM_CHUNK = 64 * NORM_LANES
