# Recall: 8 pairs of a key and a value, then 7 of the keys, whose values are to be told. Full attention learns it in 600
# steps; 65,984 parameters, 20 s on one CPU core. Guessing has a loss of ln(8) = 2.08.
# The data: python data/prepare.py mqar
# Other mixers with --model=hybrid: layer_pattern "da" is a delta rule layer, then attention, "d" delta rule alone.
data = "data/mqar"
out_dir = "out/mqar"

n_layer = 2  # the first brings a key to its value's place, the second finds it there
n_head = 2
n_kv_head = 2
head_dim = 32
n_embd = 64
n_inner = 64
tie_embeddings = False
rope_theta = 1e5  # most pairs hardly turn within a window: keys then match by content, at any distance
init_std = 0.1  # about 1 / sqrt(n_embd)
block_size = 31  # a document: eot, 8 * 2 of pairs, 7 * 2 of queries and answers
if model == "hybrid":
    layer_pattern = "da"
    n_key_head = 1
    n_value_head = 1
    key_dim = 3  # fewer than there are keys to remember
    value_dim = 16

batch_tokens = 992  # 32 * 31
micro_batch = 32
max_steps = 600  # 0.6M tokens, 0.2 epochs
learning_rate = 5e-3
warmup_steps = 50
schedule = "wsd"
weight_decay = 0.0
beta2 = 0.99
muon_steps = 3
eval_every = 100
eval_tokens = 0  # the whole validation split: 1,000 documents, 7,000 answers
save_every = 600
