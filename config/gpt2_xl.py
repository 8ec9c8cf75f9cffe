# GPT-2 1.5B's shape: 1,557,611,200 parameters. Needs data made with --tokenizer gpt2.
model = "gpt2"
vocab_size = 50257  # 50304 is faster, and not the released shape
block_size = 1024
n_layer = 48
n_head = 25
n_embd = 1600
