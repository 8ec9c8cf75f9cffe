# Sums as plain text: 338,736 parameters, 2.0M tokens, 1.5 minutes on one CPU core. The first stage of `make posttrain`.
# The data: python data/arithmetic.py, and then
#   python data/prepare.py data/arithmetic/pretrain.jsonl --out data/arithmetic/pretrain \
#       --tokenizer data/arithmetic/tokenizer.json
data = "data/arithmetic/pretrain"
out_dir = "out/posttrain/pretrain"

n_layer = 3
n_head = n_kv_head = 4
head_dim = 24
n_embd = 96
n_inner = 256
rope_theta = 1000.0
zero_init_residual = True

document_mask = True  # a document is one sum
block_size = 128
batch_tokens = 4096  # 32 * 128
micro_batch = 32
max_steps = 500
learning_rate = 5e-3
schedule = "wsd"
decay_fraction = 0.6
weight_decay = 0.0
muon_steps = 3
eval_every = 200
eval_tokens = 32768
