# GPT-2 355M's shape: 354,823,168 parameters. Needs data made with --tokenizer gpt2.
model = "gpt2"
vocab_size = 50257  # 50304 is faster, and not the released shape
block_size = 1024
n_layer = 24
n_head = 16
n_embd = 1024
