# Mixture of block attention (MoBA) at GPT-2's size on 2.5B tokens of FineWeb-Edu: 1.8e18 FLOPs, not timed yet; one node
# of 8 GPUs (torchrun --standalone --nproc_per_node=8 train.py config/train_sparse.py), or one GPU with patience. In a
# window of 1,024 tokens a query sees 3 of its 16 blocks, 148.5 keys on average, where the baseline's sees 512.5.
# The data: python data/prepare.py fineweb-edu --tokenizer gpt2 --max_tokens 2500000000
model = "sparse"
data = "data/fineweb-edu"
out_dir = "out/sparse"

n_layer = 12
n_head = 12
n_kv_head = 4
n_embd = 768
n_inner = 2048
block_size = 1024
key_block = 64
top_k_block = 3

batch_tokens = 524288  # 512 * 1024
micro_batch = 32
max_steps = 4768  # 4,768 * 524,288 = 2.5B tokens
learning_rate = 3e-3
warmup_steps = 100
schedule = "wsd"
eval_tokens = 10485760
