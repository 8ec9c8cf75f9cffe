# The quickstart in three stages: windows of 128, then of 256, then of 512 tokens with RoPE that turns more slowly, over
# as many steps as fit into 2 3/4 minutes on a CPU. A step has 2,048 tokens in all of them.
# The data: python data/prepare.py stdlib --tokenizer bpe:4096
import torch

data = "data/stdlib"
out_dir = "out/quick_stages"

n_layer = 4
n_head = n_kv_head = 4
head_dim = 48
n_embd = 192
n_inner = 512
rope_theta = 1000.0
tie_embeddings = False
zero_init_residual = True

block_size = 128
batch_tokens = 2048  # 16 * 128
micro_batch = 16
stages = {
    0.4: dict(block_size=256, micro_batch=8),
    0.8: dict(block_size=512, micro_batch=4, rope_scaling="yarn", rope_factor=2.0, rope_original=256),
}
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
