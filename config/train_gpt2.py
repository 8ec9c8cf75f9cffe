# GPT-2 124M as nanoGPT trains it, on 2.5B tokens of FineWeb-Edu: 2.1e18 FLOPs, not timed yet; one node of 8 GPUs
# (torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py), or one GPU with patience.
# The data: python data/prepare.py fineweb-edu --tokenizer gpt2 --max_tokens 2500000000
model = "gpt2"
data = "data/fineweb-edu"
out_dir = "out/gpt2"

n_layer = 12
n_head = 12
n_embd = 768
bias = False
block_size = 1024

batch_tokens = 524288  # 512 * 1024
micro_batch = 32
max_steps = 4768  # 4,768 * 524,288 = 2.5B tokens
optimizer = "adamw"
learning_rate = 6e-4
min_lr = 6e-5
warmup_steps = 700
eval_tokens = 10485760
