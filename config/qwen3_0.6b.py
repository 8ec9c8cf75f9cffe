# Qwen3-0.6B's shape: 596,049,920 parameters. For from-scratch training on GPUs; its weights load with sample.py.
model = "baseline"
vocab_size = 151936
block_size = 4096  # Qwen3 itself: 40,960
n_layer = 28
n_head = 16
n_kv_head = 8
head_dim = 128
n_embd = 1024
n_inner = 3072
rope_theta = 1e6
tie_embeddings = True
