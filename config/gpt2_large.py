# GPT-2 774M's shape: 774,030,080 parameters. Needs data made with --tokenizer gpt2.
model = "gpt2"
vocab_size = 50257  # 50304 is faster, and not the released shape
block_size = 1024
n_layer = 36
n_head = 20
n_embd = 1280
