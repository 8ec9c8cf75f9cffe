# The quickstart with windows of 64 tokens, of which each that has ended is pooled to 4 slots: 3,346,496 parameters, and
# as many steps as fit into 2 3/4 minutes on a CPU. At 256 tokens the cache has 64 + 5 * 4 = 84 keys and values of a
# head in each layer, in the quickstart 256.
# The data: python data/prepare.py stdlib --tokenizer bpe:4096
import torch

model = "linformer"
data = "data/stdlib"
out_dir = "out/quick_linformer"

n_layer = 4
n_head = n_kv_head = 4
head_dim = 48
n_embd = 192
n_inner = 512
block_size = 256
window = 64
n_slot = 4
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
