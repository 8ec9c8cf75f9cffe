# Three stages of pretraining at the size of Qwen3-0.6B: web text, then mathematics and code with it, both in windows of
# 4,096 tokens, then books in windows of 32,768 with a raised rope_theta and YaRN. 31.5B tokens are 2.4e20 FLOPs; not
# timed yet.
# torchrun --standalone --nproc_per_node=8 train.py config/pretrain_3stage.py --parallel=fsdp
# The data, with the tokenizer of Qwen3 (or another one of at most 151,936 tokens):
#   for text in fineweb-edu openwebmath proof-pile pg19: python data/prepare.py $text --tokenizer qwen3/tokenizer.json
model = "baseline"
data = "data/fineweb-edu"
out_dir = "out/pretrain"
vocab_size = 151936

n_layer = 28
n_head = 16
n_kv_head = 8
head_dim = 128
n_embd = 1024
n_inner = 3072
rope_theta = 10000.0
tie_embeddings = True

block_size = 4096
batch_tokens = 524288  # 128 * 4096
micro_batch = 4
max_steps = 60000
stages = {
    40000: dict(data=["data/fineweb-edu:0.4", "data/openwebmath:0.4", "data/proof-pile:0.2"]),
    56000: dict(
        data=["data/pg19:0.7", "data/openwebmath:0.3"],
        block_size=32768,
        micro_batch=1,
        rope_theta=1e6,
        rope_scaling="yarn",
        rope_factor=8.0,  # 32,768 / 4,096
        rope_original=4096,
    ),
}
learning_rate = 1e-3
warmup_steps = 1000
schedule = "wsd"
eval_every = 1000
eval_tokens = 10485760
save_every = 1000
gradient_checkpointing = True
