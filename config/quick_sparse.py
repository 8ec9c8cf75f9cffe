# The quickstart with 4 of 16 blocks of keys a query: 3,344,448 parameters, and as many steps as fit into 2 3/4 minutes
# on a CPU. In a window of 256 tokens a query sees its own block of 16, the one before it and 2 more that each head
# chooses, 50.5 keys on average, in the quickstart 128.5.
# The data: python data/prepare.py stdlib --tokenizer bpe:4096
import torch

model = "sparse"
data = "data/stdlib"
out_dir = "out/quick_sparse"

n_layer = 4
n_head = n_kv_head = 4
head_dim = 48
n_embd = 192
n_inner = 512
block_size = 256
key_block = 16
n_local_block = 2
top_k_block = 3
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
