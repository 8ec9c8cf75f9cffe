# The quickstart with 16 experts in a layer, of which a token takes 4: 6,895,680 parameters, as many of them at work on
# a token as in the quickstart; 0.6M tokens, about 3 minutes on 2 CPU cores.
# The data: python data/prepare.py stdlib --tokenizer bpe:4096
import torch

model = "moe"
data = "data/stdlib"
out_dir = "out/quick_moe"

n_layer = 4
n_head = n_kv_head = 4
head_dim = 48
n_embd = 192
n_expert = 16
n_expert_per_token = 4
n_expert_inner = 128  # 4 * 128 = 512, the width of the quickstart's MLP
block_size = 256
rope_theta = 1000.0
tie_embeddings = False
zero_init_residual = True

batch_tokens = 2048  # 8 * 256
micro_batch = 8
max_steps = 300  # 0.6M tokens
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
