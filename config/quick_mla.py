# The quickstart with latent attention: 3,192,768 parameters, 1.2M tokens, about 3 minutes on 2 CPU cores. The cache has
# 4 * (64 + 16) = 320 numbers of a token, in the quickstart 4 * 2 * 4 * 48 = 1,536.
# The data: python data/prepare.py stdlib --tokenizer bpe:4096
import torch

model = "mla"
data = "data/stdlib"
out_dir = "out/quick_mla"

n_layer = 4
n_head = 4
kv_rank = 64
nope_dim = 32
rope_dim = 16
v_dim = 48
n_embd = 192
n_inner = 512
block_size = 256
rope_theta = 1000.0
tie_embeddings = False
zero_init_residual = True

batch_tokens = 2048  # 8 * 256
micro_batch = 8
max_steps = 600  # 1.2M tokens
if torch.cpu._is_avx512_bf16_supported():
    dtype = muon_dtype = "bfloat16"

learning_rate = 5e-3
warmup_steps = 20
schedule = "wsd"
decay_fraction = 0.6
beta2 = 0.98  # few tokens a step: average over more steps
muon_momentum = 0.9
muon_steps = 3
eval_every = 100
eval_tokens = 16384
save_every = 300
