# The quickstart with three gated delta rule layers to one of gated attention: 3,390,408 parameters, 0.9M tokens, about
# 3 minutes on 2 CPU cores.
# The data: python data/prepare.py stdlib --tokenizer bpe:4096
import torch

model = "hybrid"
data = "data/stdlib"
out_dir = "out/quick_hybrid"

n_layer = 4
n_head = n_kv_head = 4
head_dim = 48
n_embd = 192
n_inner = 512
layer_pattern = "ddda"
n_key_head = 2
n_value_head = 4
key_dim = 48
value_dim = 48
block_size = 256
rope_theta = 1000.0
tie_embeddings = False
zero_init_residual = True

batch_tokens = 2048  # 8 * 256
micro_batch = 8
max_steps = 450  # 0.9M tokens
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
