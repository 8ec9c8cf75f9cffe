# Latent attention at 56M parameters, 30M of them beside the embedding, on 0.6B tokens of FineWeb-Edu:
# 2.5e17 FLOPs, not timed yet; one GPU (python train.py config/train_mla.py). A token leaves 10 * (128 + 32) = 1,600
# numbers in the cache, where keys and values of as many heads would be 10 * 2 * 8 * 64 = 10,240.
# The data: python data/prepare.py fineweb-edu --tokenizer gpt2 --max_tokens 600000000
model = "mla"
data = "data/fineweb-edu"
out_dir = "out/mla"

n_layer = 10
n_head = 8
kv_rank = 128
nope_dim = 64
rope_dim = 32
v_dim = 64
n_embd = 512
n_inner = 1408
block_size = 1024

batch_tokens = 131072  # 128 * 1024
micro_batch = 32
max_steps = 4577  # 4,577 * 131,072 = 0.6B tokens
learning_rate = 3e-3
warmup_steps = 100
schedule = "wsd"
eval_tokens = 10485760
