# The quickstart with latent attention to 64 chosen tokens of up to 256: 3,251,712 parameters, of which the indexers
# have 58,560, and as many steps as fit into 2 3/4 minutes on a CPU. The cache has 4 * (64 + 16 + 24) = 416 numbers of
# a token, in the quickstart 4 * 2 * 4 * 48 = 1,536.
# The data: python data/prepare.py stdlib --tokenizer bpe:4096
import torch

model = "indexer"
data = "data/stdlib"
out_dir = "out/quick_indexer"

n_layer = 4
n_head = 4
kv_rank = 64
q_rank = 96
nope_dim = 32
rope_dim = 16
v_dim = 48
n_index_head = 4
index_dim = 24
index_topk = 64
n_embd = 192
n_inner = 512
block_size = 256
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
