# The quickstart with linear attention in three of four layers, each channel of whose states has a decay of its own:
# 3,473,904 parameters, and as many steps as fit into 2 3/4 minutes on a CPU. A linear layer keeps 4 * 48 * 48 = 9,216
# numbers at any length, an attention layer 2 * 4 * 48 = 384 for each token: as many after 24 tokens.
# The data: python data/prepare.py stdlib --tokenizer bpe:4096
import torch

model = "linear"
data = "data/stdlib"
out_dir = "out/quick_linear"

n_layer = 4
n_head = n_kv_head = 4
head_dim = 48
n_embd = 192
n_inner = 512
block_size = 256
layer_pattern = "kkka"
decay = "channel"
rope_theta = 1000.0
tie_embeddings = False
zero_init_residual = True

batch_tokens = 2048  # 8 * 256
micro_batch = 8
minutes = 2.75
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
