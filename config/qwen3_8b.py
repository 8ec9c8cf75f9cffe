# Qwen3-8B's shape: 8,190,735,360 parameters. For from-scratch training on GPUs; its weights load with sample.py.
model = "baseline"
vocab_size = 151936
block_size = 4096  # Qwen3 itself: 40,960
n_layer = 36
n_head = 32
n_kv_head = 8
head_dim = 128
n_embd = 4096
n_inner = 12288
rope_theta = 1e6
tie_embeddings = False
