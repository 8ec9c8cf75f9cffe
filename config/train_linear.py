# Linear attention in three of four layers, at GPT-2's size on 2.5B tokens of FineWeb-Edu: 2.0e18 FLOPs, not timed yet;
# one node of 8 GPUs (torchrun --standalone --nproc_per_node=8 train.py config/train_linear.py), or one GPU with
# patience. Beside the 3 * 2 * 4 * 64 = 1,536 numbers a token of its attention layers the cache has 9 * 12 * 64 * 64 =
# 442,368 at any length; the baseline's 12 * 2 * 4 * 64 = 6,144 a token come to more from 97 tokens on.
# The data: python data/prepare.py fineweb-edu --tokenizer gpt2 --max_tokens 2500000000
model = "linear"
data = "data/fineweb-edu"
out_dir = "out/linear"

n_layer = 12
n_head = 12
n_kv_head = 4
n_embd = 768
n_inner = 2048
block_size = 1024
layer_pattern = "kkka"
decay = "channel"

batch_tokens = 524288  # 512 * 1024
micro_batch = 32
max_steps = 4768  # 4,768 * 524,288 = 2.5B tokens
learning_rate = 3e-3
warmup_steps = 100
schedule = "wsd"
eval_tokens = 10485760
