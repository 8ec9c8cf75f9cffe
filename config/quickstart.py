# A small model on the Python standard library: 4.0M parameters in about 3 minutes on 2 CPU cores,
# 40M in a few minutes on a GPU. `make quickstart` runs it; the data: python data/prepare.py stdlib --tokenizer bpe:4096
import torch

data = "data/stdlib"
out_dir = "out/quickstart"

n_head = 4
n_kv_head = 2
head_dim = 64
block_size = 256
learning_rate = 6e-3
warmup_steps = 20
eval_every = 50
eval_tokens = 32768
save_every = 100
if torch.cuda.is_available():
    n_layer = 12
    n_head = 8
    n_embd = 512
    n_inner = 1408
    batch_tokens = 65536  # 256 * 256
    micro_batch = 256
    max_steps = 600  # 39M tokens: 17 epochs
    dropout = 0.1
else:
    n_layer = 4
    n_embd = 256
    n_inner = 704
    batch_tokens = 3072  # 12 * 256
    micro_batch = 12
    max_steps = 300  # 0.9M tokens
    if torch.cpu._is_avx512_bf16_supported():
        dtype = "bfloat16"  # 1.3 times as fast there
