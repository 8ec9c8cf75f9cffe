"""The trained weights that a new run starts from: what its knobs become by them, and how they are copied.

The run may have more tokens than the weights: special ones that the tokenizer got since, such as those of a chat. A new
token's row starts at the mean of the old ones' rows, in the embedding and in the head. So its logit is that of an
average token, and neither too likely nor too unlikely.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import torch

import hf
from data.tokenizers import Tokenizer
from distributed import processes
from training import checkpoint
from training.run_folder import is_from_hugging_face
from training.stored import Stored, own_rows

# Fields that may differ from those of the weights: what a longer context, other data or another loss ask for.
MAY_DIFFER = (
    "block_size rope_theta rope_scaling rope_factor rope_original dropout eot_id init_std zero_init_residual "
    "balance_loss z_loss bias_rate router_jitter balance_over capacity_factor drop_by"
).split()
MAY_GROW = ("block_size", "vocab_size")
TABLES = ("embed.weight", "lm_head.weight")  # with a row for each token


# ---- the knobs -------------------------------------------------------------------------------------------------------
def config_of(path: str) -> dict:
    """Returns {"model": name, field: value} of the model in a run's, a checkpoint's or a Hugging Face folder."""
    folder = Path(path)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"init_from={path} has no config.json: give the folder of a run or a model")
    if is_from_hugging_face(folder):
        name, fields = hf.config_of(folder)
        return {"model": name, **fields}
    saved = checkpoint.load_config((checkpoint.folders(folder) or [folder])[0])  # a run's last stage counts
    return {"model": saved["model"], **saved["model_config"]}


def knobs_of(path: str) -> dict:
    """Returns config_of without the size of the vocabulary: how many tokens a run needs, its data says as well."""
    found = config_of(path)
    found.pop("vocab_size")
    return found


def choose_vocab_size(needed: int, init_from: str) -> int:
    """Returns that of the weights to start from, where it is enough; or else the next multiple of 64."""
    if init_from:
        there = config_of(init_from)["vocab_size"]
        if there >= needed:
            return there
    return math.ceil(needed / 64) * 64


# ---- the tokenizer ---------------------------------------------------------------------------------------------------
def check_tokenizer(path: str, old: Tokenizer | None, data: str, tokenizer: Tokenizer | None) -> None:
    """Raises ValueError where the data's tokenizer is neither that of the weights nor that with more special tokens.

    None stands for a tokenizer that is not known, with which nothing can be compared.
    """
    if old is None or tokenizer is None or old.fingerprint == tokenizer.fingerprint:
        return
    before = spellings(old)
    now = spellings(tokenizer)
    special = tokenizer.special_tokens.values()
    for i in sorted(before.keys() | now.keys()):
        is_new_special = i not in before and i in special
        if not is_new_special and before.get(i) != now.get(i):
            raise ValueError(
                f"init_from={path} has the tokenizer {old.name}, and {data} was made with {tokenizer.name}: id {i} is "
                f"{before.get(i)} in the first and {now.get(i)} in the second: prepare the data with the first"
            )


def spellings(tokenizer: Tokenizer) -> dict[int, bytes]:
    """Returns what each id stands for."""
    found = {}
    for i in range(tokenizer.vocab_size):
        try:
            found[i] = tokenizer.decode_bytes([i])
        except ValueError:  # nothing
            continue
    return found


# ---- the weights -----------------------------------------------------------------------------------------------------
def copy_weights(
    path: str, model: torch.nn.Module, tokenizer: Tokenizer | None = None, old: Tokenizer | None = None
) -> None:
    """Copies trained weights into a new model, or each process's share of them. ValueError says what does not fit.

    tokenizer, old: that of the data, and that of the weights, None where it is not known.
    """
    # 1. the configs
    before = config_of(path)
    name = type(model.config).__module__.removeprefix("model_")
    odd = []
    if before.pop("model") != name:
        odd.append(f"model={name}")
    for key, value in before.items():
        ours = getattr(model.config, key, None)
        if key in MAY_GROW and ours is not None:
            if ours < value:
                odd.append(f"{key}={ours}, which is less than {value}")
        elif key not in MAY_DIFFER and ours != value:
            odd.append(f"{key}={ours}, not {value}")
    if odd:
        raise ValueError(f"init_from={path} has other weights than this model: {'; '.join(odd)}")

    # 2. the rows that are there, each process its own
    ours = checkpoint.weights(model)
    if is_from_hugging_face(Path(path)):
        for name, tensor in hf.weights_of(path):
            check_shape(name, tensor, ours[name])
            rows, first = own_rows(ours[name])
            there = tensor[first : first + len(rows)]
            rows[: len(there)].copy_(there)
    else:
        folder = checkpoint.resolve(path)
        checkpoint.refuse_reward_model(folder)
        stored = Stored(folder, checkpoint.weights_to_use(folder))
        for name, tensor in ours.items():
            if name not in stored.parts:
                raise ValueError(f"init_from={path} has no {name}: it is of another version of the model's file")
            check_shape(name, stored.like(name), tensor)
            stored.copy_to(tensor, name)

    # 3. the rows that are new
    n_old = before["vocab_size"]
    known = set(range(n_old))
    new = set(range(n_old, model.config.vocab_size))
    if old and tokenizer:
        known = spellings(old).keys()
        new |= spellings(tokenizer).keys() - known
    for name in TABLES:
        if name in ours and new:
            put_at_mean(ours[name], new, known)


def check_shape(name: str, before: torch.Tensor, ours: torch.Tensor) -> None:
    """Raises ValueError where a weight has not the shape that it had, but for more rows of a table of tokens."""
    skipped = 1 if name in TABLES else 0
    if before.shape[skipped:] == ours.shape[skipped:]:
        return
    hint = ""
    if name.startswith("pos_embed"):
        hint = ": positions that are learned do not reach further than they were trained"
    raise ValueError(f"init_from: {name} is {[*before.shape]}, and would be {[*ours.shape]}{hint}")


@torch.no_grad()
def put_at_mean(table: torch.Tensor, new: Iterable[int], known: Iterable[int]) -> None:
    """Sets rows of a table, of which each process may hold a share, to the mean of others."""
    rows, first = own_rows(table)
    here = range(first, first + len(rows))
    known_here = torch.tensor([i - first for i in known if i in here], dtype=torch.long)
    new_here = torch.tensor([i - first for i in new if i in here], dtype=torch.long)
    sums = rows[known_here.to(rows.device)].cpu().double().sum(dim=0)  # (C,)
    counted = torch.cat((sums, torch.tensor([len(known_here)])))
    *total, count = processes.all_sum(counted, str(rows.device))  # where all hold all, both are as many times too large
    mean = torch.tensor(total, dtype=torch.float64) / count
    rows[new_here.to(rows.device)] = mean.to(rows)
