# config/train_mla.py with queries from a latent and an indexer that chooses 256 of 1,024 tokens: 59M parameters, 1.8M
# of them the indexers', on 0.6B tokens of FineWeb-Edu: 2.8e17 FLOPs, not timed yet; one GPU (python train.py
# config/train_indexer.py). A token leaves 10 * (128 + 32 + 48) = 2,080 numbers in the cache.
# DeepSeek's three stages: --index_topk=1024 is dense attention; from its run (--init_from=out/dense) --max_steps=200
# --indexer_stage=dense trains the indexers alone; from that run the default stage goes on with chosen tokens.
# The data: python data/prepare.py fineweb-edu --tokenizer gpt2 --max_tokens 600000000
model = "indexer"
data = "data/fineweb-edu"
out_dir = "out/indexer"

n_layer = 10
n_head = 8
kv_rank = 128
q_rank = 384
nope_dim = 64
rope_dim = 32
v_dim = 64
n_index_head = 8
index_dim = 48
index_topk = 256
n_embd = 512
n_inner = 1408
block_size = 1024

batch_tokens = 131072  # 128 * 1024
micro_batch = 16
max_steps = 4577  # 4,577 * 131,072 = 0.6B tokens
learning_rate = 3e-3
warmup_steps = 100
schedule = "wsd"
eval_tokens = 10485760
