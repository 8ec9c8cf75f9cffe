# Trains a character-level 0.8M-parameter model on tiny Shakespeare: 200 steps, about 20 s on one CPU core, to 1.85.
# Data: python data/prepare.py shakespeare. For 1.54 after 2,000 steps (3 minutes) add --max_steps=2000.
# The batch, depth and width are nanoGPT's CPU setting (train_shakespeare_char_nanogpt.py): bench.py compares the two.
data = "data/shakespeare"
out_dir = "out/shakespeare_char_cpu"
device = "cpu"
dtype = "float32"

max_steps = 200
block_size = 64
batch_tokens = 768  # 12 * 64
micro_batch = 12
eval_every = 100
eval_tokens = 0  # the whole validation split, 111,540 targets
save_every = 2000

# 4 * (4 * 128 * 128 + 3 * 128 * 344) in blocks + 2 * 66 * 128 in embedding and head + norms = 808,832 parameters
model = "baseline"
vocab_size = 66  # 65 characters and eot
n_layer = 4
n_head = 4
n_kv_head = 4
head_dim = 32
n_embd = 128
n_inner = 344  # 8 / 3 * 128, rounded up to a multiple of 8
rope_theta = 100.0  # wavelengths of 6 to 470 tokens: the slow pairs of 10,000 hardly turn within 64
tie_embeddings = False  # 0.03 better than tied after 250 steps, for 66 * 128 = 8,448 weights more
zero_init_residual = True
logit_softcap = 15.0

optimizer = "muon"
learning_rate = 5e-3
warmup_steps = 10
schedule = "wsd"
decay_fraction = 0.6
beta2 = 0.99  # few tokens a step: average over more steps
muon_momentum = 0.8  # old gradients mislead a short run: 0.9 is 0.02 worse after 200 steps
muon_steps = 3  # no worse than 5, and cheaper
muon_dtype = "bfloat16"
