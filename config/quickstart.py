# A small model on the Python standard library: 3.3M parameters, and as many steps as fit into 2 3/4 minutes on a CPU;
# 43M parameters and 39M tokens on a GPU. `make quickstart` runs it.
# The data: python data/prepare.py stdlib --tokenizer bpe:4096
import torch

data = "data/stdlib"
out_dir = "out/quickstart"

if torch.cuda.is_available():
    n_layer = 12
    n_head = n_kv_head = 8
    head_dim = 64
    n_embd = 512
    n_inner = 1408
    block_size = 512
    batch_tokens = 32768  # 64 * 512
    micro_batch = 64
    max_steps = 1200  # 39M tokens: 17 epochs
    dropout = 0.1
else:
    n_layer = 4
    n_head = n_kv_head = 4
    head_dim = 48
    n_embd = 192
    n_inner = 512
    block_size = 256
    batch_tokens = 2048  # 8 * 256: with so little time, many small steps learn more than few large ones
    micro_batch = 8
    minutes = 2.75  # 600 steps, 1.2M tokens, on 2 cores with AVX-512
    if torch.cpu._is_avx512_bf16_supported():
        dtype = muon_dtype = "bfloat16"

rope_theta = 1000.0
tie_embeddings = False
zero_init_residual = True

learning_rate = 5e-3
warmup_steps = 20
schedule = "wsd"
decay_fraction = 0.6
beta2 = 0.98  # few tokens a step: average over more steps
muon_momentum = 0.9
muon_steps = 3  # no worse than 5 here, and cheaper
eval_every = 100
eval_tokens = 16384
save_every = 300
