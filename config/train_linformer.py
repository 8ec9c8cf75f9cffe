# Windows of 256 tokens, of which each that has ended is pooled to 4 slots, at GPT-2's size on 2.5B tokens of
# FineWeb-Edu: 1.9e18 FLOPs, not timed yet; one node of 8 GPUs (torchrun --standalone --nproc_per_node=8 train.py
# config/train_linformer.py), or one GPU with patience. At 1,024 tokens the cache has 256 + 5 * 4 = 276 keys and values
# of a head in each layer, where the baseline has 1,024.
# The data: python data/prepare.py fineweb-edu --tokenizer gpt2 --max_tokens 2500000000
model = "linformer"
data = "data/fineweb-edu"
out_dir = "out/linformer"

n_layer = 12
n_head = 12
n_kv_head = 4
n_embd = 768
n_inner = 2048
block_size = 1024
window = 256
n_slot = 4

batch_tokens = 524288  # 512 * 1024
micro_batch = 32
max_steps = 4768  # 4,768 * 524,288 = 2.5B tokens
learning_rate = 3e-3
warmup_steps = 100
schedule = "wsd"
eval_tokens = 10485760
