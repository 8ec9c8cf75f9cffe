# A reward model on UltraFeedback: 64,000 questions with four answers each, of which the best and the worst by score are
# a pair. For a fine-tuned Qwen3-0.6B (config/sft.py), on one GPU of 80 GB.
init_from = "out/sft"
data = "ultrafeedback"
out_dir = "out/reward"
block_size = 2048

max_steps = 900  # one epoch
pairs_per_step = 64
micro_batch = 8
learning_rate = 1e-5
eval_every = 300
