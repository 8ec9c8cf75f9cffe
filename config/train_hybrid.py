# Three gated delta rule layers to one of gated attention, 33M parameters, on 0.66B tokens of FineWeb-Edu: not timed
# yet; one GPU (python train.py config/train_hybrid.py).
# The data: python data/prepare.py fineweb-edu --tokenizer gpt2 --max_tokens 2500000000
model = "hybrid"
data = "data/fineweb-edu"
out_dir = "out/hybrid"

n_layer = 8
n_head = 6
n_kv_head = 2
n_embd = 384
n_inner = 1024
layer_pattern = "ddda"
n_key_head = 3
n_value_head = 6
key_dim = 64
value_dim = 64
block_size = 1024

batch_tokens = 524288  # 512 * 1024
micro_batch = 32
max_steps = 1250  # 1,250 * 524,288 = 0.66B tokens
learning_rate = 3e-3
warmup_steps = 100
schedule = "wsd"
eval_tokens = 10485760
