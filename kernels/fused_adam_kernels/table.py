"""Columns of the tables that host and kernels share.

Plain ints, and no import of torch or triton: the CPU reference reads these tables too.
"""

# rows: int64, shape (P, ROW). One row per parameter. Addresses in bytes, 0 where there is none.
# EXTRA is the master weight or the remainder, EMA the average of the weights.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, EXTRA, EXP_AVG_SCALE, EXP_AVG_SQ_SCALE = range(8)
# NUMEL is what the update covers: the row's own elements and those of the rows coalesced with it,
# or 0 if another row covers this one. GRAD_NUMEL is always the row's own.
# SEED, PARAM_INDEX and GLOBAL_OFFSET are the key of the random bits: the parameter's position in
# the optimizer, and where its local shard begins in the full parameter.
STEP, NUMEL, GROUP, GRAD_NUMEL, SEED, PARAM_INDEX, GLOBAL_OFFSET, EMA = range(8, 16)
ROW = 16

# blocks: int32, shape (B, 2). One row per program: a row of `rows`, and which BLOCK elements of it.

# hyper: float64, shape (G, HYPER). One row per param group, as the user set it.
# HYPER_MAX_GRAD_NORM is negative if nothing is clipped. HYPER_SKIP_GRAD_NORM is the norm above
# which a step is skipped: infinity if only what is not finite is skipped, 0 if nothing is. Both
# belong to the optimizer and are read in the first row. HYPER_EMA_DECAY is 0 without an average.
HYPER_LR, HYPER_BETA1, HYPER_BETA2, HYPER_EPS, HYPER_WEIGHT_DECAY, HYPER_DECOUPLED = range(6)
HYPER_MAXIMIZE, HYPER_EMA_DECAY, HYPER_MAX_GRAD_NORM, HYPER_SKIP_GRAD_NORM = range(6, 10)
HYPER = 10

# scalars: float32 or float64, shape (P, SCALARS). This step's values for one parameter; the first
# ten are `Scalars` in `formula.py`. ONE_MINUS_EMA_DECAY is written for launches that average alone.
# SKIP is not 0 if the step changes nothing. STEP_NUMBER counts from 1 and stops at 2^24.
STEP_SIZE, RSQRT_BC2, ONE_MINUS_BETA1, ONE_MINUS_BETA2, BETA2, EPS, L2, LR_WD = range(8)
GRAD_MULTIPLIER, ONE_MINUS_EMA_DECAY, SKIP, STEP_NUMBER = range(8, 12)
SCALARS = 12

# stats: float64, shape (STATS,). The last norm before clipping, how many steps were skipped, and
# the loss scale of the last step, which that norm's partial sums still have in them.
GRAD_NORM, SKIPPED_STEPS, GRAD_SCALE = range(3)
STATS = 3

# The order in which squares of gradients are added: lanes per piece, elements per chunk.
NORM_LANES = 1024
NORM_CHUNK = 64 * NORM_LANES

# Triton's cache of compiled kernels does not see the numbers above, only the text of a kernel. With
# this constant in every kernel that reads a table, a kernel compiled for other columns is not used.
LAYOUT = repr({name: value for name, value in dict(globals()).items() if name.isupper()})
