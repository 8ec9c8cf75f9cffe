# Trains nanoGPT's CPU setting on tiny Shakespeare, to compare with: 2,000 steps, about 2 minutes on one core, to 1.9.
# Data: python data/prepare.py shakespeare
data = "data/shakespeare"
out_dir = "out/shakespeare_char_nanogpt"
device = "cpu"
dtype = "float32"

max_steps = 2000
block_size = 64
batch_tokens = 768  # 12 * 64
micro_batch = 12
eval_every = 250
eval_tokens = 0  # the whole validation split, 111,540 targets
save_every = 2000

# 4 * 12 * 128 * 128 in blocks + (66 + 64) * 128 in embeddings + norms = 804,224 parameters
model = "gpt2"
vocab_size = 66  # 65 characters and eot
n_layer = 4
n_head = 4
n_embd = 128
bias = False

optimizer = "adamw"
learning_rate = 1e-3
min_lr = 1e-4
warmup_steps = 100
schedule = "cosine"
beta2 = 0.99
weight_decay = 0.1
grad_clip = 1.0
