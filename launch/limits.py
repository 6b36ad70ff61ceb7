"""What the numbers of the groups data and train may be, as keys of `conf/` and as options of train.py."""

# the least that makes sense
LEAST = {
    "data.block": 2,  # the first token of a block has no loss
    "data.eval_blocks": 1,
    "train.steps": 1,
    "train.seed": 0,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.save_every": 0,
    "train.timeout_s": 1,
}
# and the most
MOST = {
    "train.seed": 2**32 - 1,  # NumPy's
    "train.timeout_s": 10**6,  # twice as many milliseconds still are an int of 32 bits
}
