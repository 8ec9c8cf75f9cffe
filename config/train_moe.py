# 32 experts of which a token takes 4, and one that all tokens take: 92,155,264 parameters, 34M of them at work on a
# token, on 655M tokens of FineWeb-Edu: 1.6e17 FLOPs, for one GPU; not timed yet.
# The data: python data/prepare.py fineweb-edu --tokenizer gpt2 --max_tokens 700000000
model = "moe"
data = "data/fineweb-edu"
out_dir = "out/moe"

n_layer = 8
n_head = 6
n_kv_head = 2
n_embd = 384
n_inner = 1280  # of the first layer: (4 + 1) * 256, as wide as what a token meets in the others
n_dense_layer = 1
n_expert = 32
n_expert_per_token = 4
n_expert_inner = 256
n_shared_expert = 1
block_size = 1024
vocab_size = 50304  # that of GPT-2, 50,257, rounded up to a multiple of 64

batch_tokens = 262144  # 256 * 1024
micro_batch = 32
max_steps = 2500  # 2,500 * 262,144 = 655M tokens
learning_rate = 3e-3
warmup_steps = 100
schedule = "wsd"
eval_tokens = 5242880
