# Both ways of answering: half of the conversations answer at once, after /no_think, and half think, after /think or
# without a switch. GRPO had destroyed the way that it does not reward. 1 minute on one CPU core.
# The data: python data/arithmetic.py, and then
#   python data/prepare.py data/arithmetic/fusion.jsonl --chat --out data/arithmetic/fusion \
#       --tokenizer data/arithmetic/tokenizer.json
init_from = "out/posttrain/grpo"
data = "data/arithmetic/fusion"
out_dir = "out/posttrain/fusion"

document_mask = True
pack = "documents"
block_size = 128
batch_tokens = 2560  # 20 * 128
micro_batch = 20
max_steps = 450  # 1.5 epochs
learning_rate = 2e-3
warmup_steps = 20
weight_decay = 0.0
muon_steps = 3
eval_every = 100
eval_tokens = 0
