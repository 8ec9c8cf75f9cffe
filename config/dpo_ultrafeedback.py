# Preferences of UltraFeedback for a fine-tuned Qwen3-0.6B (config/sft.py), on one GPU of 80 GB.
init_from = "out/sft"
data = "ultrafeedback"
out_dir = "out/dpo"
block_size = 2048

beta = 0.1
nll_coef = 0.2  # the chosen answers stay likely
max_steps = 900  # one epoch
pairs_per_step = 64
micro_batch = 4
learning_rate = 5e-7
warmup_steps = 90
schedule = "cosine"
eval_every = 300
