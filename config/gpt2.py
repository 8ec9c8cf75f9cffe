# GPT-2 124M's shape: 124,439,808 parameters. Needs data made with --tokenizer gpt2.
model = "gpt2"
vocab_size = 50257  # 50304 is faster, and not the released shape
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
