"""Columns of the tables that host and kernels share: plain ints, importing neither torch nor triton."""

# rows: int64, shape (P, ROW): one row per parameter. Addresses in bytes, 0 where there is none.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, STEP, NUMEL, GROUP = range(8)
ROW = 8

# blocks: int32, shape (B, 2): which row, which BLOCK-sized chunk of it.

# hyper: float64, shape (G, HYPER): one row per param group, as the user set it.
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, DECOUPLED, MAXIMIZE = range(7)
HYPER = 7

# scalars: float32 or float64, shape (P, SCALARS): this step's values for one parameter.
STEP_SIZE, RBC2, W1, W2, B2, EPSILON, COUPLED, DECAY, GRAD_MULTIPLIER, SKIP = range(10)
SCALARS = 10
