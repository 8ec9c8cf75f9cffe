# Conversations about sums, of which a quarter think: 338,736 parameters, 1 minute on one CPU core. The model learns to
# answer at once, which is mostly wrong; where it is made to think it is mostly right.
# The data: python data/arithmetic.py, and then
#   python data/prepare.py data/arithmetic/sft.jsonl --chat --out data/arithmetic/sft \
#       --tokenizer data/arithmetic/tokenizer.json
init_from = "out/posttrain/pretrain"
data = "data/arithmetic/sft"
out_dir = "out/posttrain/sft"

document_mask = True
pack = "documents"
block_size = 128
batch_tokens = 2560  # 20 * 128: about 64 conversations
micro_batch = 20
max_steps = 400  # 12 epochs
optimizer = "adamw"  # Muon at 3e-3 learns to answer at once as well, 59 % rightly: less is left for GRPO to find
learning_rate = 1e-3
warmup_steps = 20
weight_decay = 0.0
eval_every = 100
eval_tokens = 0
