"""Reads and writes Hugging Face folders: config.json with *.safetensors, as transformers has them.

    model = hf.load("Qwen3-0.6B")   the GPT of model_baseline.py with these weights, in eval mode
    hf.save(model, "out/mine")      transformers.AutoModelForCausalLM.from_pretrained("out/mine") opens it

Each architecture is one table at the end of this file: what it calls our weights and the fields of our GPTConfig, and
what one of the two sides cannot compute. Both directions read the same table. Pickled weights (*.bin) are not read.
What a folder says is checked before anything is built of it: the kinds of its values, and its sizes by its weights.
A model is saved for what its source computes, whatever its file is called: PROVED says what was tested.
"""

import ast
import hashlib
import importlib
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import safetensors
import safetensors.torch
import torch


@torch.no_grad()
def load(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Returns the model of a folder in eval mode; the model_type in its config.json says which file computes it."""
    folder = Path(folder)
    model, architecture, header = empty_model(folder)
    model = model.to(dtype).to_empty(device=device)
    places = places_of(header, model, architecture)
    for file in weight_files(folder):
        for name, tensor in read_safetensors(file):
            if name in places:
                places[name].to_ours(tensor)
    return model.eval()


@torch.no_grad()
def weights_of(folder: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) of our model's parameters as load would fill them; holds those of one block at a time."""
    model, architecture, header = empty_model(Path(folder))
    groups = {}
    for name, parameter in model.named_parameters():
        group = name
        if name.startswith("blocks."):
            group = name.split(".")[1]  # the number of its block
        groups.setdefault(group, []).append((name, torch.Size(parameter.shape)))
    for shapes in groups.values():
        filled = {name: torch.empty(shape) for name, shape in shapes}
        part = SimpleNamespace(config=model.config, named_parameters=filled.items)
        for name, weight in stored_weights(part, architecture).items():
            weight.to_ours(read_tensor(header, name_in(header, name, architecture)))
        yield from filled.items()


def config_of(folder: str | Path) -> tuple[str, dict]:
    """Returns the variant that reads a folder, and the fields of its GPTConfig."""
    architecture, fields, _ = read_folder(Path(folder))
    return architecture.variant, fields


def end_ids(folder: str | Path) -> list[int]:
    """Returns the ids that end a text in a folder: those of generation_config.json, or else those of config.json."""
    ids = token_ids(Path(folder), "eos_token_id")
    if ids is None:
        return []
    if isinstance(ids, int):
        return [ids]
    return ids


def token_ids(folder, key):
    """Returns what a folder says for bos_token_id or eos_token_id: None, an id, or a list of ids."""
    config = read_config(folder)
    defaults = READABLE[config["model_type"]].defaults
    found = (defaults | config).get(key)
    file = folder / "generation_config.json"
    if file.exists():
        said = read_json(file)
        check_kinds(said, file)
        if said.get(key) is not None:
            found = said[key]
    return found


# ---- a folder --------------------------------------------------------------------------------------------------------


def empty_model(folder):
    """Returns a folder's model without memory for its weights, which fit it; its architecture, and their header."""
    architecture, fields, header = read_folder(folder)
    variant = importlib.import_module(f"model_{architecture.variant}")
    try:
        config = variant.GPTConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from None
    with torch.device("meta"):  # draws no initial weights, which would all be overwritten
        model = variant.GPT(config)
    places_of(header, model, architecture)  # raises where a weight is missing or does not fit
    return model, architecture, header


def read_folder(folder):
    """Returns the architecture of a folder's model, the fields of our GPTConfig, and the header of its weights."""
    # 1. what config.json says
    hf = read_config(folder)
    architecture = READABLE[hf["model_type"]]
    try:
        if has_window(architecture.defaults | hf, architecture):
            architecture = WINDOWED.get(hf["model_type"], architecture)
        fields = config_from_hf(hf, architecture)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None

    # 2. whether the weights have so many layers and experts: to build a model of 10**9 layers would never end
    header = read_header(folder)
    last = [architecture.names["blocks.{}.attn_norm"].format(fields["n_layer"] - 1)]
    if "moe_layers" in fields:
        layer = fields["moe_layers"][-1]
        last.append(architecture.names["blocks.{}.mlp.w_up.{}"].format(layer, fields["n_expert"] - 1))
    for name in last:
        if name_in(header, name + ".weight", architecture) is None:
            sizes = ", ".join(f"{key}={fields[key]}" for key in ("n_layer", "n_expert") if key in fields)
            raise ValueError(f"{folder}: config.json says {sizes}, and its weights have no {name}.weight")

    # 3. a head of its own, whatever config.json says
    if fields.get("tie_embeddings", True) and has_own_head(header, architecture):
        if "lm_head" not in architecture.names:
            raise ValueError(f"{folder}: lm_head.weight is not the embedding, and model_{architecture.variant}.py ties")
        said = "config.json ties head and embedding, but two different ones are stored"
        warnings.warn(f"{folder}: {said}: both are read, as in transformers", stacklevel=3)
        fields["tie_embeddings"] = False
    return architecture, fields, header


def read_config(folder):
    """Returns the contents of config.json, whose values are of the kinds that they must be."""
    file = folder / "config.json"
    hf = read_json(file)
    check_kinds(hf, file)
    model_type = hf.get("model_type")
    if model_type not in READABLE:
        known = ", ".join(READABLE)
        raise ValueError(f"{folder}: no model file reads model_type={model_type!r}; these can be read: {known}")
    return hf


def read_json(file):
    """Returns the object that a file holds."""
    try:
        contents = json.loads(file.read_text(encoding="utf-8-sig"))  # an editor may put a mark before it
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged or no JSON ({error}): fetch it again") from None
    if not isinstance(contents, dict):
        raise ValueError(f"{file} is damaged: it holds {str(contents)[:20]!r} and no object: fetch it again")
    return contents


def name_in(header, name, architecture):
    """Returns the name by which a file has a weight, with the prefix or without it; None if it has none."""
    spellings = [name, name.removeprefix(architecture.prefix)]
    if name == architecture.names["embed"] + ".weight":
        spellings.append("lm_head.weight")  # of two names for one tensor safetensors' save_model keeps the first
    for spelled in spellings:
        if spelled in header:
            return spelled
    return None


def has_own_head(header, architecture):
    """Returns whether a head is stored that differs from the embedding."""
    head = name_in(header, "lm_head.weight", architecture)
    embed = name_in(header, architecture.names["embed"] + ".weight", architecture)
    if head is None or embed is None:
        return False
    head = read_tensor(header, head)
    embed = read_tensor(header, embed)
    return not torch.equal(head, embed.to(head.dtype))


def places_of(header, model, architecture):
    """Returns {name in the file: StoredWeight}; raises unless each weight of a folder has exactly one place."""
    missing = stored_weights(model, architecture)
    embed = architecture.names["embed"] + ".weight"
    places = {}
    for name, (file, shape, dtype) in header.items():
        key = name
        if key not in missing and name == name_in(header, embed, architecture):
            key = embed
        elif key not in missing:
            key = architecture.prefix + name
        if key in missing:
            places[name] = missing.pop(key)
            wanted = list(places[name].shape())
            if shape != wanted:
                raise ValueError(f"{file}: {name} is {shape}, not {wanted}, as config.json says")
            if dtype not in ("F64", "F32", "F16", "BF16"):
                raise ValueError(f"{file}: {name} is {dtype}: quantized weights are not read here")
        elif not name.endswith(architecture.ignored):
            raise ValueError(f"{file}: {name} is {shape}, and not in this model")
    if missing:
        names = ", ".join(list(missing)[:5])
        raise ValueError(f"{file.parent}: its safetensors lack {len(missing)} weights: {names}")
    return places


def weight_files(folder):
    """Returns the files with a folder's weights, as transformers chooses: model.safetensors, or what its index lists.

    Adapters, consolidated copies and shards of an older save may lie beside them.
    """
    whole = folder / "model.safetensors"
    if whole.exists():
        return [whole]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index} has no weight_map from weights to files: fetch it again")
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(f"{index} lists {outside[0]!r}, which leads out of its folder: refused")
        absent = [name for name in names if not (folder / name).exists()]
        if absent:
            raise ValueError(f"{folder} lacks {', '.join(absent[:3])}, which its index lists: fetch it again")
        return [folder / name for name in names]
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if pickled:
        convert = f"AutoModelForCausalLM as M; M.from_pretrained('{folder}').save_pretrained('{folder}')"
        raise ValueError(
            f"{folder} has its weights in {pickled[0].name} alone, which is a pickle and never read here: it can run "
            f'anything. Where you trust it, convert it:  python -c "from transformers import {convert}"'
        )
    raise ValueError(f"{folder} has neither model.safetensors nor an index of its parts: fetch them")


def read_header(folder):
    """Returns {name: (file, shape, dtype)} of the weights of a folder, of which none is read."""
    header = {}
    for file in weight_files(folder):
        with opened(file) as tensors:
            for name in tensors.keys():
                tensor = tensors.get_slice(name)
                if name in header:
                    raise ValueError(f"{file}: {name} stands in {header[name][0].name} too: fetch both again")
                header[name] = (file, tensor.get_shape(), tensor.get_dtype())
    return header


def read_safetensors(file):
    """Yields the names and tensors of a file, one in memory at a time."""
    with opened(file) as tensors:
        for name in tensors.keys():
            yield name, tensors.get_tensor(name)


def read_tensor(header, name):
    file = header[name][0]
    with opened(file) as tensors:
        return tensors.get_tensor(name)


@contextmanager
def opened(file):
    try:
        with safetensors.safe_open(file, "pt") as tensors:
            yield tensors
    except safetensors.SafetensorError as error:
        if file.read_bytes()[:40].startswith(b"version https://git-lfs"):
            raise ValueError(f"{file} is a pointer of git LFS and not the weights: git lfs pull") from None
        raise ValueError(f"{file} is damaged or cut short ({error}): fetch it again") from None


@torch.no_grad()
def save(model: torch.nn.Module, folder: str | Path, tokenizer: dict[str, dict] | str | Path | None = None) -> None:
    """Writes a model, and its tokenizer where one is given, into a new folder, which transformers opens.

    tokenizer: {file name: contents} with tokenizer.json, tokenizer_config.json and generation_config.json, as
    Tokenizer.to_hf() in data/tokenizers.py returns it; or the folder that the model came from, whose tokenizer, chat
    template and end tokens are kept. Raises, and writes nothing, if transformers has no such model.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: give a new folder")
    architecture = architecture_of(model)
    weights = {name: stored.from_ours() for name, stored in stored_weights(model, architecture).items()}

    # 1. the texts; transformers looks for the ids of begin and end in both configs
    if tokenizer is None:
        end = None  # written also where there is none: an absent key means 50,256 for GPT-2
        if model.config.eot_id >= 0:
            end = model.config.eot_id
        tokenizer = {"generation_config.json": dict(bos_token_id=end, eos_token_id=end)}
    elif isinstance(tokenizer, dict):
        check_vocabulary(tokenizer, model.config.vocab_size)
    else:
        tokenizer = tokenizer_in(Path(tokenizer))
    config = config_to_hf(model.config, architecture)
    for key in ("bos_token_id", "eos_token_id"):
        config[key] = tokenizer["generation_config.json"].get(key)

    # 2. the files
    folder.mkdir(parents=True, exist_ok=True)
    for name, contents in {**tokenizer, "config.json": config}.items():
        if not isinstance(contents, bytes):
            contents = (json.dumps(contents, indent=2, ensure_ascii=False) + "\n").encode()
        (folder / name).write_bytes(contents)
    file = folder / "model.safetensors"
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    # safetensors lets only the owner read its file: it gets the mode of the others, which is what the umask says.
    file.chmod((folder / "config.json").stat().st_mode)


def tokenizer_in(folder):
    """Returns {file name: contents} of a folder's tokenizer, as bytes, and of its generation_config.json."""
    names = "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.model"
    names += " vocab.json merges.txt chat_template.jinja"
    found = {}
    for name in names.split():
        if (folder / name).exists():
            found[name] = (folder / name).read_bytes()
    generation = {}
    if (folder / "generation_config.json").exists():
        generation = read_json(folder / "generation_config.json")
    for key in ("bos_token_id", "eos_token_id"):
        generation[key] = token_ids(folder, key)
    return found | {"generation_config.json": generation}


def check_vocabulary(tokenizer, vocab_size):
    largest = max(tokenizer["tokenizer.json"]["model"]["vocab"].values())
    if largest >= vocab_size:
        sizes = f"ids up to {largest}, and the model {vocab_size} tokens"
        raise ValueError(f"the tokenizer has {sizes}: they do not belong together")


def architecture_of(model):
    """Returns the first architecture that computes what the model does; raises with what each of them lacks."""
    variant = variant_of(model)
    complaints = []
    for architecture in [QWEN3_WINDOW, *ARCHITECTURES.values()]:
        if architecture.variant == variant:
            lacking = what_it_lacks(architecture, model)
            if not lacking:
                return architecture
            complaints.append(f"{architecture.model_type} has no {lacking}")
    raise ValueError(f"this model cannot be saved: {'; '.join(complaints)}")


def what_it_lacks(architecture, model):
    """Returns what the model computes and the architecture does not, for example `qk_norm=False`, or an empty text."""
    for ours, value in architecture.needs.items():
        if getattr(model.config, ours) != value:
            return f"{ours}={getattr(model.config, ours)}"
    for name, buffer in model.named_buffers():
        if name.endswith(architecture.zero_buffers) and buffer.any():
            return f"{name}, and it is not 0 here"
    return ""


# ---- what a model computes -------------------------------------------------------------------------------------------


def variant_of(model):
    """Returns the variant that computes the model's logits, whatever its file is called; raises if none does."""
    # 1. its file
    home = sys.modules.get(type(model).__module__)
    file = getattr(home, "__file__", None)
    if file is None or type(model) is not getattr(home, "GPT", None):
        raise ValueError(f"this model cannot be saved: its class {type(model).__name__} is not the GPT of a model file")

    # 2. its parts; kernels.py and others put methods onto instances, which compute what those of the class do
    with torch.device("meta"):
        made = {name: type(part) for name, part in home.GPT(model.config).named_modules()}
    present = {name: type(part) for name, part in model.named_modules()}
    exchanged = [name for name in made | present if made.get(name) != present.get(name)]
    if exchanged:
        names = ", ".join(exchanged[:5])
        raise ValueError(f"this model cannot be saved: {names} are not as GPT makes them of this config")

    # 3. the variant with the same definitions, or else the nearest
    found = digests(Path(file).read_text(encoding="utf-8"))
    differing = {}
    for variant, proved in PROVED.items():
        differing[variant] = [name for name in proved | found if proved.get(name) != found.get(name)]
    nearest = min(differing, key=lambda variant: len(differing[variant]))
    if differing[nearest]:
        names = ", ".join(differing[nearest])
        tested = f"those that hf.py was tested with (model_{nearest}.py, the nearest of {', '.join(PROVED)})"
        raise ValueError(f"{Path(file).name} cannot be saved: {names} differ from {tested}")
    return nearest


# What these do shows in no logits.
NOT_BEHIND_LOGITS = {"GPT.init_weights", "GPT.lm_loss", "GPT.token_losses", "GPT.auxiliary_loss"}


def digests(source):
    """Returns {name: digest} of the definitions of a model file that GPT's __init__ and forward lead to.

    Any mention of a name leads to it: `MLP` to the class, `self.logits` to GPT.logits. The digest is that of the syntax
    tree without docstrings, so that comments, layout and Python's version do not matter.
    """
    # 1. the definitions; of two with one name the last counts, as in Python
    definitions = {}
    for node in ast.parse(source).body:
        definitions |= dict.fromkeys(names_bound(node), node)
        if isinstance(node, ast.ClassDef) and node.name in ("GPT", "GPTConfig"):
            for item in node.body:
                definitions |= {f"{node.name}.{name}": item for name in names_bound(item)}
            node.body = []  # its methods count one by one

    # 2. those that count
    waiting = [name for name in definitions if name == "GPT" or name.startswith("GPT.__") or name == "GPT.forward"]
    reached = set()
    while waiting:
        name = waiting.pop()
        if name not in definitions or name in reached or name in NOT_BEHIND_LOGITS:
            continue
        reached.add(name)
        for node in ast.walk(definitions[name]):
            if isinstance(node, ast.Name):
                waiting.append(node.id)
            elif isinstance(node, ast.Attribute):
                waiting += [f"GPT.{node.attr}", f"GPTConfig.{node.attr}"]

    # 3. their digests, in the file's order
    return {name: digest(node) for name, node in definitions.items() if name in reached}


def names_bound(node):
    """Returns the names that a statement of a module or class gives a meaning, imports left out."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def digest(node):
    return hashlib.sha256(repr(plain(node)).encode()).hexdigest()[:8]


def plain(node):
    """Returns a syntax tree as lists of lists; empty fields, some of which only newer Pythons have, are left out."""
    if isinstance(node, list):
        return [plain(item) for item in node]
    if not isinstance(node, ast.AST):
        return node
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
        fields["body"] = node.body[1:]
    return [type(node).__name__, [(name, plain(value)) for name, value in fields.items() if value not in (None, [])]]


# ---- weights ---------------------------------------------------------------------------------------------------------


@dataclass
class StoredWeight:
    """A weight in a folder's file, made of the rows of one or several weights of ours.

    parts: our weights, whose rows follow each other head by head. Parts q (4 rows) and g (2 rows) with heads=2 become
        q0 q1 g0 q2 q3 g1
    rope: so many rows at the end of each head hold pairs for RoPE, which ours turns as (x_i, x_{i + rope/2}), and
        DeepSeek as neighbours. With rope=4:
        n0 n1 x0 x1 x2 x3  ->  n0 n1 x0 x2 x1 x3
    transposed: the file has it as (in, out).
    """

    parts: list
    heads: int = 1
    rope: int = 0
    transposed: bool = False

    def shape(self):
        rows = sum(len(part) for part in self.parts)
        shape = torch.Size((rows, *self.parts[0].shape[1:]))
        return shape[::-1] if self.transposed else shape

    def from_ours(self):
        """Returns the weight as the file has it."""
        tensor = self.arrange(self.parts)
        if self.transposed:
            tensor = tensor.t()
        return tensor.contiguous()

    def to_ours(self, tensor):
        """Copies the file's weight into ours."""
        if self.transposed:
            tensor = tensor.t()
        sizes = [len(part) for part in self.parts]
        # Arranged like weights, the numbers of our rows say where each row of the file belongs: above 0 1 4 2 3 5.
        numbers = torch.arange(sum(sizes)).split(sizes)
        ours = torch.empty_like(tensor)
        ours[self.arrange(numbers)] = tensor
        for part, rows in zip(self.parts, ours.split(sizes)):
            part.copy_(rows)

    def arrange(self, parts):
        """Returns the rows of all parts in the file's order."""
        if len(parts) == 1 and not self.rope:
            return parts[0]
        by_head = [part.unflatten(0, (self.heads, -1)) for part in parts]
        rows = torch.cat(by_head, dim=1)  # (heads, rows of a head, ...)
        if self.rope:
            rest, pairs = rows.tensor_split([rows.size(1) - self.rope], dim=1)
            neighbours = pairs.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
            rows = torch.cat((rest, neighbours), dim=1)
        return rows.flatten(0, 1)


def stored_weights(model, architecture):
    """Returns {name in the file: StoredWeight} for all parameters of the model."""
    names = dict(architecture.names)
    for ours, changed in architecture.names_where_zero.items():
        if getattr(model.config, ours) == 0:
            names |= changed
    left = weights_by_line(model, names)
    stored = {}
    for line, theirs in names.items():  # in the table's order, in which parts of one weight follow each other
        for numbers, suffix, weight in left.pop(line, []):
            name = theirs.format(*numbers) + suffix
            if name not in stored:
                stored[name] = StoredWeight([], **row_order(theirs, model.config, architecture))
            stored[name].parts.append(weight)
    if left:
        raise ValueError(f"{architecture.model_type} has no weight for our {', '.join(left)}: give hf.py its name")
    return stored


def weights_by_line(model, names):
    """Returns {`blocks.{}.attn.wq`: [(numbers, suffix, weight), ...]}: a line of the table has one for each layer.

    Weights of experts (E, in, out) become those of the line `blocks.{}.mlp.w_up.{}`, one (out, in) for each expert.
    """
    lines = {}
    for name, parameter in model.named_parameters():
        line, numbers, suffix = take_apart(name)
        weight = parameter.detach()
        if weight.ndim == 3 and line + ".{}" in names:
            for expert, matrix in enumerate(weight):
                lines.setdefault(line + ".{}", []).append(([*numbers, expert], suffix, matrix.t()))
        else:
            lines.setdefault(line, []).append((numbers, suffix, weight))
    return lines


def take_apart(name):
    """Returns `blocks.{}.attn.wq`, ["3"] and `.weight` for the name `blocks.3.attn.wq.weight`."""
    suffix = ""
    for ending in (".weight", ".bias"):
        if name.endswith(ending):
            name = name.removesuffix(ending)
            suffix = ending
    numbers = re.findall(r"\.(\d+)\.", name)
    return re.sub(r"\.\d+\.", ".{}.", name), numbers, suffix


def row_order(theirs, config, architecture):
    """Returns StoredWeight's arguments for a name of the table's right side."""
    last = theirs.split(".")[-1]  # q_proj
    order = {}
    for argument, ours in architecture.row_order.get(last, {}).items():
        order[argument] = getattr(config, ours)
    return order | dict(transposed=last in architecture.transposed)


# ---- config.json -----------------------------------------------------------------------------------------------------


def check_kinds(contents, file):
    """Raises unless the values of an object of a file, and those of the objects in it, are of the kinds of KINDS."""
    for kind, (fits, keys) in KINDS.items():
        for key in keys.split():
            value = contents.get(key)
            if value is not None and not fits(value):
                raise ValueError(f"{file}: {key}={str(value)[:40]} must be {kind}")
    for key in ("rope_parameters", "rope_scaling"):
        if contents.get(key) is not None:
            check_kinds(contents[key], file)


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value, low, high):
    return isinstance(value, int) and is_number(value) and low <= value <= high


def is_id(value):
    return is_whole(value, 0, 2**31 - 1)


KINDS = {  # what a value must be: its test, and its keys; null is as good as nothing
    "a whole number from 1 to 2^18": (
        lambda value: is_whole(value, 1, 2**18),
        "num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_size intermediate_size n_layer "
        "n_head n_embd n_inner kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim num_experts "
        "num_local_experts num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size "
        "decoder_sparse_step full_attention_interval linear_num_key_heads linear_num_value_heads linear_key_head_dim "
        "linear_value_head_dim linear_conv_kernel_dim no_rope_layer_interval",
    ),
    "a whole number from 1 to 2^31": (
        lambda value: is_whole(value, 1, 2**31),
        "vocab_size max_position_embeddings n_positions original_max_position_embeddings",
    ),
    "a whole number from 0": (is_id, "first_k_dense_replace sliding_window max_window_layers"),
    "a number above 0 and up to 10^12": (
        lambda value: is_number(value) and 0 < value <= 1e12,
        "factor rms_norm_eps layer_norm_epsilon partial_rotary_factor",
    ),
    "a number above 1 and up to 10^12": (
        lambda value: is_number(value) and 1 < value <= 1e12,
        "rope_theta",
    ),
    "true or false": (
        lambda value: isinstance(value, bool),
        "tie_word_embeddings norm_topk_prob use_sliding_window",
    ),
    "a text": (lambda value: isinstance(value, str), "model_type rope_type type"),
    "a list of texts": (
        lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
        "layer_types",
    ),
    "a list of whole numbers": (
        lambda value: isinstance(value, list) and all(is_id(item) for item in value),
        "mlp_only_layers no_rope_layers",
    ),
    "a token's id or a list of them": (
        lambda value: is_id(value) or isinstance(value, list) and all(is_id(item) for item in value),
        "bos_token_id eos_token_id",
    ),
    "an object": (lambda value: isinstance(value, dict), "rope_parameters rope_scaling"),
}

FIXED = {"quantization_config": None, "partial_rotary_factor": 1.0}  # in every architecture that has no field of it


def config_from_hf(hf, architecture):
    """Returns the fields of our GPTConfig for a config.json; raises where that asks for what ours does not compute."""
    hf = architecture.defaults | hf
    older = hf.get("rope_scaling") or {}  # of transformers 4
    newer = hf.get("rope_parameters") or {}  # of transformers 5
    if older and newer and older != newer:
        raise ValueError("config.json has rope_scaling, and rope_parameters that differ from it: leave one of them")
    rope = older or newer
    if hf.get("num_key_value_heads") is None:
        hf["num_key_value_heads"] = hf.get("num_attention_heads")
    if hf.get("head_dim") is None and hf.get("hidden_size") is not None:
        hf["head_dim"] = hf["hidden_size"] // needed(hf, "num_attention_heads")
    if hf.get("sliding_window") is not None and not has_window(hf, architecture):
        hf |= dict(sliding_window=None, use_sliding_window=False)
    hf |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    for theirs, value in (FIXED | architecture.fixed).items():
        if theirs not in architecture.fields.values():
            refuse_all_but(value, theirs, hf.get(theirs, value))
    fields = dict(architecture.needs)
    for ours, theirs in architecture.fields.items():
        fields[ours] = needed(hf, theirs)
    if "rope_theta" in architecture.fields:
        fields |= rope_from_hf(rope, hf, architecture)
    return fields | architecture.fields_from_hf(hf)


def has_window(hf, architecture):
    """Returns whether a config.json has a window that hides something of the longest text."""
    window = hf.get("sliding_window")
    if window is None:
        return False
    if "use_sliding_window" in architecture.defaults and not hf["use_sliding_window"]:  # Mistral has no such key
        return False
    return window < needed(hf, "max_position_embeddings")


def config_to_hf(config, architecture):
    """Returns the contents of config.json."""
    hf = dict(architecture.fixed)
    hf |= dict(model_type=architecture.model_type, architectures=[architecture.class_name])
    for ours, theirs in architecture.fields.items():
        hf[theirs] = getattr(config, ours)
    if "rope_theta" in architecture.fields:
        hf |= rope_to_hf(config, architecture)
    return hf | architecture.fields_to_hf(config)


def refuse_all_but(value, key, found):
    if found != value:
        raise ValueError(f"config.json: {key}={found!r} is not supported, only {value!r}")


def needed(hf, key):
    if hf.get(key) is None:
        raise ValueError(f"config.json has no {key}")
    return hf[key]


# How RoPE's positions are stretched: {rope_type: {their key: the only value that ours computes}}. Beside these stand
# factor and, but for linear, original_max_position_embeddings.
ROPE = {
    "linear": {},
    "yarn": dict(beta_fast=32, beta_slow=1, truncate=True, attention_factor=None, mscale=None, mscale_all_dim=None),
    "llama3": dict(low_freq_factor=1, high_freq_factor=4),
}
ABSENT = dict(beta_fast=32, beta_slow=1, truncate=True)  # what transformers takes for a key that is not there
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"}


def rope_from_hf(rope, hf, architecture):
    """Returns our fields of how RoPE's positions are stretched, for the object rope of a config.json."""
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling == "default":
        check_keys(rope, ROPE_KEYS)
        return {}
    if scaling not in architecture.rope:
        known = ", ".join(["default", *architecture.rope])
        raise ValueError(f"config.json: rope_type={scaling!r} is not supported, only {known}")
    only = architecture.rope[scaling]
    check_keys(rope, ROPE_KEYS | only.keys())
    for key, value in only.items():
        refuse_all_but(value, key, rope.get(key, ABSENT.get(key)))
    fields = dict(rope_scaling=scaling, rope_factor=needed(rope, "factor"))
    if scaling != "linear":
        lengths = [contents.get("original_max_position_embeddings") for contents in (hf, rope)]
        lengths.append(hf["max_position_embeddings"])
        fields["rope_original"] = next(length for length in lengths if length is not None)
    return fields


def check_keys(rope, known):
    unknown = sorted(rope.keys() - known)
    if unknown:
        raise ValueError(f"config.json: {', '.join(unknown)} of RoPE is not supported")


def rope_to_hf(config, architecture):
    scaling = config.rope_scaling
    if scaling == "none":
        return {}
    rope = dict(rope_type=scaling, factor=config.rope_factor) | architecture.rope[scaling]
    if scaling != "linear":
        rope["original_max_position_embeddings"] = config.rope_original
    return dict(rope_scaling=rope)


# ---- architectures ---------------------------------------------------------------------------------------------------


@dataclass
class Architecture:
    """One of transformers' model types, and the model file that computes it. Ours stands left, theirs right."""

    model_type: str
    class_name: str
    variant: str  # model_<variant>.py
    names: dict  # our weight: theirs, without .weight and .bias; {} is the number of a layer, then that of an expert
    fields: dict  # our field of GPTConfig: their key in config.json
    fixed: dict  # their key: the only value that our file computes
    needs: dict  # our field: the only value that transformers computes
    defaults: dict = field(default_factory=dict)  # their key: what transformers takes where config.json has none
    prefix: str = "model."  # missing from the names where the model was saved without its head
    ignored: tuple = ("lm_head.weight", "inv_freq")  # ends of names of copies of what the model has otherwise
    row_order: dict = field(default_factory=dict)  # last part of their name: how its rows stand (see StoredWeight)
    transposed: tuple = ()  # last parts of names of weights that the file has as (in, out)
    names_where_zero: dict = field(default_factory=dict)  # our field: names that are others where it is 0
    zero_buffers: tuple = ()  # ends of names of our buffers that theirs lacks
    rope: dict = field(default_factory=lambda: ROPE)  # how ours stretches positions
    fields_from_hf: Callable = lambda hf: {}  # returns our fields that are not one key of config.json
    fields_to_hf: Callable = lambda config: {}  # returns keys of config.json that are not one field of ours


# What transformers takes for keys that a config.json leaves out, as those of its older versions do. Sizes that show in
# a weight's shape are in all of them, and needed.
DEFAULTS = {
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}

QWEN3 = Architecture(
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    variant="baseline",
    names={
        "embed": "model.embed_tokens",
        "blocks.{}.attn_norm": "model.layers.{}.input_layernorm",
        "blocks.{}.attn.wq": "model.layers.{}.self_attn.q_proj",
        "blocks.{}.attn.wk": "model.layers.{}.self_attn.k_proj",
        "blocks.{}.attn.wv": "model.layers.{}.self_attn.v_proj",
        "blocks.{}.attn.wo": "model.layers.{}.self_attn.o_proj",
        "blocks.{}.attn.q_norm": "model.layers.{}.self_attn.q_norm",
        "blocks.{}.attn.k_norm": "model.layers.{}.self_attn.k_norm",
        "blocks.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
        "blocks.{}.mlp.w_gate": "model.layers.{}.mlp.gate_proj",
        "blocks.{}.mlp.w_up": "model.layers.{}.mlp.up_proj",
        "blocks.{}.mlp.w_down": "model.layers.{}.mlp.down_proj",
        "norm": "model.norm",
        "lm_head": "lm_head",
    },
    fields={
        "vocab_size": "vocab_size",
        "block_size": "max_position_embeddings",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads",
        "head_dim": "head_dim",
        "n_embd": "hidden_size",
        "n_inner": "intermediate_size",
        "rope_theta": "rope_theta",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
    },
    fixed={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    needs={"qk_norm": True, "scale_embeddings": False, "logit_softcap": 0.0},
    defaults=DEFAULTS | {"num_key_value_heads": 32, "head_dim": 128, "use_sliding_window": False},
)


LLAMA = replace(  # Llama 1 and 2, TinyLlama, SmolLM: Qwen3 without norms on queries and keys
    QWEN3,
    model_type="llama",
    class_name="LlamaForCausalLM",
    names={ours: theirs for ours, theirs in QWEN3.names.items() if not ours.endswith(("q_norm", "k_norm"))},
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    needs=QWEN3.needs | {"qk_norm": False},
    defaults=DEFAULTS | {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
)

MISTRAL = replace(  # without a window, as from version 0.2 on, it computes what Llama does, and is saved as that
    LLAMA,
    model_type="mistral",
    class_name="MistralForCausalLM",
    fixed={"hidden_act": "silu", "sliding_window": None},
    defaults=LLAMA.defaults | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
)


def inner_width_from_hf(hf):
    width = 4 * needed(hf, "n_embd")
    if hf.get("n_inner") not in (None, width):
        raise ValueError(f"config.json: n_inner={hf['n_inner']} is not supported, only null or {width}")
    return {}


GPT2 = Architecture(
    model_type="gpt2",
    class_name="GPT2LMHeadModel",
    variant="gpt2",
    names={
        "embed": "transformer.wte",
        "pos_embed": "transformer.wpe",
        "blocks.{}.attn_norm": "transformer.h.{}.ln_1",
        "blocks.{}.attn.wq": "transformer.h.{}.attn.c_attn",
        "blocks.{}.attn.wk": "transformer.h.{}.attn.c_attn",
        "blocks.{}.attn.wv": "transformer.h.{}.attn.c_attn",
        "blocks.{}.attn.wo": "transformer.h.{}.attn.c_proj",
        "blocks.{}.mlp_norm": "transformer.h.{}.ln_2",
        "blocks.{}.mlp.w_up": "transformer.h.{}.mlp.c_fc",
        "blocks.{}.mlp.w_down": "transformer.h.{}.mlp.c_proj",
        "norm": "transformer.ln_f",
    },
    fields={
        "vocab_size": "vocab_size",
        "block_size": "n_positions",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "norm_eps": "layer_norm_epsilon",
    },
    fixed={
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    },
    needs={"bias": True},
    defaults={"n_positions": 1024, "layer_norm_epsilon": 1e-5, "bos_token_id": 50256, "eos_token_id": 50256},
    prefix="transformer.",
    ignored=("lm_head.weight", ".attn.bias", ".attn.masked_bias"),  # a copy of wte, and causal masks
    transposed=("c_attn", "c_proj", "c_fc"),
    fields_from_hf=inner_width_from_hf,
    fields_to_hf=lambda config: dict(n_inner=None),
)


def deepseek_v3_from_hf(hf):
    n_layer = hf["num_hidden_layers"]
    n_dense = needed(hf, "first_k_dense_replace")
    if n_dense < n_layer:
        dense = f"first_k_dense_replace={n_dense} of {n_layer} layers are dense"
        raise ValueError(f"config.json: {dense}, the others mixtures of experts: model_mla.py has dense layers only")
    q_rank = hf["q_lora_rank"]
    return dict(q_rank=0 if q_rank is None else q_rank)


def deepseek_v3_to_hf(config):
    return dict(
        q_lora_rank=None if config.q_rank == 0 else config.q_rank,
        num_key_value_heads=config.n_head,
        first_k_dense_replace=config.n_layer,
        num_nextn_predict_layers=0,  # left out, it would be 1
    )


DEEPSEEK_V3 = Architecture(
    model_type="deepseek_v3",
    class_name="DeepseekV3ForCausalLM",
    variant="mla",
    names={
        **QWEN3.names,
        "blocks.{}.attn.wq_down": "model.layers.{}.self_attn.q_a_proj",
        "blocks.{}.attn.q_norm": "model.layers.{}.self_attn.q_a_layernorm",
        "blocks.{}.attn.wq": "model.layers.{}.self_attn.q_b_proj",
        "blocks.{}.attn.wkv_down": "model.layers.{}.self_attn.kv_a_proj_with_mqa",
        "blocks.{}.attn.wk_rope": "model.layers.{}.self_attn.kv_a_proj_with_mqa",
        "blocks.{}.attn.kv_norm": "model.layers.{}.self_attn.kv_a_layernorm",
        "blocks.{}.attn.wk": "model.layers.{}.self_attn.kv_b_proj",
        "blocks.{}.attn.wv": "model.layers.{}.self_attn.kv_b_proj",
    },
    names_where_zero={"q_rank": {"blocks.{}.attn.wq": "model.layers.{}.self_attn.q_proj"}},
    row_order={
        "q_b_proj": {"heads": "n_head", "rope": "rope_dim"},
        "q_proj": {"heads": "n_head", "rope": "rope_dim"},
        "kv_a_proj_with_mqa": {"rope": "rope_dim"},
        "kv_b_proj": {"heads": "n_head"},
    },
    fields={
        "vocab_size": "vocab_size",
        "block_size": "max_position_embeddings",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "kv_rank": "kv_lora_rank",
        "nope_dim": "qk_nope_head_dim",
        "rope_dim": "qk_rope_head_dim",
        "v_dim": "v_head_dim",
        "n_embd": "hidden_size",
        "n_inner": "intermediate_size",
        "rope_theta": "rope_theta",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
    },
    fixed={"hidden_act": "silu", "attention_bias": False, "rope_interleave": True},
    needs={"scale_embeddings": False, "logit_softcap": 0.0},
    defaults=DEFAULTS
    | {
        "max_position_embeddings": 4096,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    rope={  # mscale_all_dim sharpens all of a score, under any rope_type; YaRN without it only the part with position
        "linear": dict(mscale_all_dim=None),
        "yarn": ROPE["yarn"] | dict(mscale=1.0, mscale_all_dim=1.0),
        "llama3": ROPE["llama3"] | dict(mscale_all_dim=None),
    },
    fields_from_hf=deepseek_v3_from_hf,
    fields_to_hf=deepseek_v3_to_hf,
)


def layers_with_experts(hf):
    """Returns the layers that transformers gives experts: every decoder_sparse_step-th one but for mlp_only_layers."""
    step = needed({"decoder_sparse_step": 1} | hf, "decoder_sparse_step")
    dense = set()
    if hf.get("mlp_only_layers") is not None:
        dense = set(hf["mlp_only_layers"])
    return [layer for layer in range(hf["num_hidden_layers"]) if (layer + 1) % step == 0 and layer not in dense]


def experts_from_hf(hf):
    key = "num_experts"
    if "num_local_experts" in hf:  # as transformers 5 calls it for Qwen3-MoE
        key = "num_local_experts"
    layers = layers_with_experts(hf)
    if not layers:
        raise ValueError("config.json: mlp_only_layers and decoder_sparse_step leave no layer with experts")
    return dict(n_expert=needed(hf, key), moe_layers=layers)


def experts_to_hf(config):
    dense = [layer for layer in range(config.n_layer) if layer not in config.moe_layers]
    return dict(num_experts=config.n_expert, decoder_sparse_step=1, mlp_only_layers=dense)


QWEN3_MOE = Architecture(
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    variant="moe",
    names={
        **QWEN3.names,
        "blocks.{}.mlp.router": "model.layers.{}.mlp.gate",
        "blocks.{}.mlp.w_gate.{}": "model.layers.{}.mlp.experts.{}.gate_proj",
        "blocks.{}.mlp.w_up.{}": "model.layers.{}.mlp.experts.{}.up_proj",
        "blocks.{}.mlp.w_down.{}": "model.layers.{}.mlp.experts.{}.down_proj",
    },
    fields={
        **QWEN3.fields,
        "n_expert_per_token": "num_experts_per_tok",
        "n_expert_inner": "moe_intermediate_size",
        "normalize_gates": "norm_topk_prob",
    },
    fixed={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    needs={
        **QWEN3.needs,
        "n_shared_expert": 0,
        "router_score": "softmax",
        "gate_scale": 1.0,
        "n_group": 1,
    },
    defaults=DEFAULTS
    | {
        "num_key_value_heads": 4,
        "use_sliding_window": False,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    zero_buffers=("router.bias",),
    fields_from_hf=experts_from_hf,
    fields_to_hf=experts_to_hf,
)


def shared_experts_from_hf(hf):
    width = needed(hf, "shared_expert_intermediate_size")
    expert_width = hf["moe_intermediate_size"]
    if width % expert_width:
        sizes = f"shared_expert_intermediate_size={width}, and moe_intermediate_size={expert_width}"
        raise ValueError(f"config.json: {sizes}: the shared expert must be a multiple of the others' width")
    return experts_from_hf(hf) | dict(n_shared_expert=width // expert_width)


def shared_experts_to_hf(config):
    if config.n_shared_expert == 0:
        raise ValueError("this model cannot be saved: qwen2_moe has no n_shared_expert=0")
    width = config.n_shared_expert * config.n_expert_inner
    return experts_to_hf(config) | dict(shared_expert_intermediate_size=width)


QWEN2_MOE = Architecture(
    model_type="qwen2_moe",
    class_name="Qwen2MoeForCausalLM",
    variant="moe",
    names={
        **QWEN3_MOE.names,
        "blocks.{}.mlp.shared_router": "model.layers.{}.mlp.shared_expert_gate",
        "blocks.{}.mlp.shared.w_gate": "model.layers.{}.mlp.shared_expert.gate_proj",
        "blocks.{}.mlp.shared.w_up": "model.layers.{}.mlp.shared_expert.up_proj",
        "blocks.{}.mlp.shared.w_down": "model.layers.{}.mlp.shared_expert.down_proj",
    },
    fields=QWEN3_MOE.fields,
    fixed={"hidden_act": "silu", "qkv_bias": False, "use_sliding_window": False},
    needs={
        **QWEN3.needs,
        "qk_norm": False,
        "shared_gate": True,
        "router_score": "softmax",
        "gate_scale": 1.0,
        "n_group": 1,
    },
    defaults=QWEN3_MOE.defaults | {"num_key_value_heads": 16, "num_experts_per_tok": 4, "qkv_bias": True},
    zero_buffers=("router.bias",),
    fields_from_hf=shared_experts_from_hf,
    fields_to_hf=shared_experts_to_hf,
)


def letters_of(kinds, letters, n_layer):
    """Returns our layer_pattern for layer_types: {their kind: our letter}."""
    unknown = set(kinds) - letters.keys()
    if unknown or len(kinds) != n_layer:
        known = " or ".join(letters)
        raise ValueError(f"config.json: layer_types={str(kinds)[:60]} does not say {known} of each of {n_layer} layers")
    return "".join(letters[kind] for kind in kinds)


def qwen3_next_from_hf(hf):
    n_layer = hf["num_hidden_layers"]
    if layers_with_experts(hf):
        refuse_all_but(list(range(n_layer)), "mlp_only_layers", hf.get("mlp_only_layers"))
    kinds = hf.get("layer_types")
    if kinds is None:
        interval = needed({"full_attention_interval": 4} | hf, "full_attention_interval")
        return dict(layer_pattern="d" * min(interval - 1, n_layer) + "a")
    return dict(layer_pattern=letters_of(kinds, {"full_attention": "a", "linear_attention": "d"}, n_layer))


def qwen3_next_to_hf(config):
    kinds = []
    for layer in range(config.n_layer):
        letter = config.layer_pattern[layer % len(config.layer_pattern)]
        kinds.append("full_attention" if letter == "a" else "linear_attention")
    return dict(layer_types=kinds, mlp_only_layers=list(range(config.n_layer)))


QWEN3_NEXT = Architecture(
    model_type="qwen3_next",
    class_name="Qwen3NextForCausalLM",
    variant="hybrid",
    names={
        **QWEN3.names,
        "blocks.{}.attn.wo_gate": "model.layers.{}.self_attn.q_proj",
        "blocks.{}.delta.wq": "model.layers.{}.linear_attn.in_proj_qkvz",
        "blocks.{}.delta.wk": "model.layers.{}.linear_attn.in_proj_qkvz",
        "blocks.{}.delta.wv": "model.layers.{}.linear_attn.in_proj_qkvz",
        "blocks.{}.delta.wz": "model.layers.{}.linear_attn.in_proj_qkvz",
        "blocks.{}.delta.wb": "model.layers.{}.linear_attn.in_proj_ba",
        "blocks.{}.delta.wa": "model.layers.{}.linear_attn.in_proj_ba",
        "blocks.{}.delta.conv": "model.layers.{}.linear_attn.conv1d",
        "blocks.{}.delta.A_log": "model.layers.{}.linear_attn.A_log",
        "blocks.{}.delta.dt_bias": "model.layers.{}.linear_attn.dt_bias",
        "blocks.{}.delta.o_norm": "model.layers.{}.linear_attn.norm.weight",
        "blocks.{}.delta.wo": "model.layers.{}.linear_attn.out_proj",
    },
    row_order={
        "q_proj": {"heads": "n_head"},
        "in_proj_qkvz": {"heads": "n_key_head"},
        "in_proj_ba": {"heads": "n_key_head"},
    },
    fields={
        **QWEN3.fields,
        "n_key_head": "linear_num_key_heads",
        "n_value_head": "linear_num_value_heads",
        "key_dim": "linear_key_head_dim",
        "value_dim": "linear_value_head_dim",
        "conv_kernel": "linear_conv_kernel_dim",
        "rotary_fraction": "partial_rotary_factor",
    },
    fixed={"hidden_act": "silu", "attention_bias": False},
    needs={**QWEN3.needs, "output_gate": "element", "qkv_gates": ""},
    defaults=DEFAULTS | {"num_key_value_heads": 2, "head_dim": 256, "partial_rotary_factor": 0.25},
    fields_from_hf=qwen3_next_from_hf,
    fields_to_hf=qwen3_next_to_hf,
)


def window_from_hf(hf):
    """Returns our fields of local layers, those that layer_types names, or else all from max_window_layers on."""
    n_layer = hf["num_hidden_layers"]
    kinds = hf.get("layer_types")
    if kinds is None:
        n_full = min(needed({"max_window_layers": 28} | hf, "max_window_layers"), n_layer)
        kinds = ["full_attention"] * n_full + ["sliding_attention"] * (n_layer - n_full)
    pattern = letters_of(kinds, {"full_attention": "a", "sliding_attention": "l"}, n_layer)
    return dict(layer_pattern=pattern, window=hf["sliding_window"], local_rope_theta=hf["rope_theta"])


def window_to_hf(config):
    kinds = ["sliding_attention" if letter in "lm" else "full_attention" for letter in config.layer_pattern]
    if "l" in config.layer_pattern and config.local_rope_theta != config.rope_theta:
        thetas = f"local_rope_theta={config.local_rope_theta} beside rope_theta={config.rope_theta}"
        raise ValueError(f"this model cannot be saved: qwen3 and smollm3 have no {thetas}")
    return dict(layer_types=kinds, sliding_window=config.window)


def qwen3_window_to_hf(config):
    if config.layer_pattern.strip("al"):
        raise ValueError(
            f"this model cannot be saved: qwen3 has no layer_pattern={config.layer_pattern}: a and l alone"
        )
    return window_to_hf(config)


WINDOW_NEEDS = {"n_global_token": 0, "attention_sink": False, "attention_softcap": 0.0, "rope_scaling": "none"}

QWEN3_WINDOW = replace(
    QWEN3,
    variant="sliding",
    fixed=QWEN3.fixed | {"use_sliding_window": True},
    needs=QWEN3.needs | WINDOW_NEEDS,
    rope={},  # theirs would stretch local layers too
    fields_from_hf=window_from_hf,
    fields_to_hf=qwen3_window_to_hf,
)

MISTRAL_WINDOW = replace(  # every layer is local; it is saved as the SmolLM3 that computes the same
    MISTRAL,
    variant="sliding",
    fixed={"hidden_act": "silu"},
    needs=MISTRAL.needs | WINDOW_NEEDS,
    rope={},
    fields_from_hf=lambda hf: window_from_hf(hf | dict(layer_types=None, max_window_layers=0)),
)


def smollm3_from_hf(hf):
    n_layer = hf["num_hidden_layers"]
    # 1. which layers have positions: those with a 1, or where nothing is said all but every fourth one
    positions = hf.get("no_rope_layers")
    if positions is None:
        interval = needed({"no_rope_layer_interval": 4} | hf, "no_rope_layer_interval")
        positions = [min((layer + 1) % interval, 1) for layer in range(n_layer)]
    if len(positions) != n_layer or set(positions) - {0, 1}:
        raise ValueError(f"config.json: no_rope_layers={positions} does not say 1 or 0 of each of {n_layer} layers")

    # 2. which are local: where nothing is said, those without positions
    kinds = hf.get("layer_types")
    if hf["sliding_window"] is not None:
        if kinds is None:
            kinds = ["full_attention" if one else "sliding_attention" for one in positions]
        fields = window_from_hf(hf | dict(layer_types=kinds))
    else:
        if kinds is None:
            kinds = ["full_attention"] * n_layer
        fields = dict(layer_pattern=letters_of(kinds, {"full_attention": "a"}, n_layer))

    # 3. both in one letter
    without_positions = {"a": "n", "l": "m"}
    letters = []
    for letter, one in zip(fields["layer_pattern"], positions):
        letters.append(letter if one else without_positions[letter])
    return fields | dict(layer_pattern="".join(letters))


def smollm3_to_hf(config):
    hf = window_to_hf(config)
    if "sliding_attention" not in hf["layer_types"]:
        hf["sliding_window"] = None
    positions = [int(letter in "al") for letter in config.layer_pattern]
    hf["use_sliding_window"] = hf["sliding_window"] is not None
    return hf | dict(no_rope_layers=positions, pad_token_id=None)  # left out, it would be 128,004


SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    class_name="SmolLM3ForCausalLM",
    variant="sliding",
    needs=LLAMA.needs | WINDOW_NEEDS,
    rope={},
    defaults=DEFAULTS
    | {
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_theta": 2000000.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    fields_from_hf=smollm3_from_hf,
    fields_to_hf=smollm3_to_hf,
)

ARCHITECTURES = {a.model_type: a for a in (QWEN3, LLAMA, GPT2, DEEPSEEK_V3, QWEN3_MOE, QWEN2_MOE, QWEN3_NEXT, SMOLLM3)}
READABLE = ARCHITECTURES | {MISTRAL.model_type: MISTRAL}
WINDOWED = {a.model_type: a for a in (QWEN3_WINDOW, MISTRAL_WINDOW)}  # read in place of those where a window hides keys

# What the tests compared with transformers: digests() of the variants. After a change of one, and with
# tests/test_parity.py green, `python -m tests.proved` writes this table.
# fmt: off
PROVED = {
    "baseline": {
        "RMSNorm": "085bf01a", "rope_cos_sin": "b3103f9a", "yarn": "9d35e18a", "llama3": "e180a3c7",
        "apply_rope": "3e7688fa", "Attention": "17aff4d6", "MLP": "0a66f93c", "Block": "e7decd53", "GPT": "4acd9451",
        "GPT.__init__": "d3993ff1", "GPT.forward": "cfdec045", "GPT.positions_and_mask": "885d3e81",
        "GPT.logits": "7bf98985",
    },
    "gpt2": {
        "Attention": "0b787748", "MLP": "7114e7ff", "Block": "ffff0349", "GPT": "4acd9451", "GPT.__init__": "fe086aad",
        "GPT.forward": "c729011f", "GPT.positions_and_mask": "885d3e81", "GPT.logits": "2896e0b7",
    },
    "mla": {
        "RMSNorm": "085bf01a", "rope_cos_sin": "00b815b4", "yarn": "9d35e18a", "llama3": "e180a3c7",
        "apply_rope": "3e7688fa", "Attention": "4a9fe988", "MLP": "0a66f93c", "Block": "e7decd53", "GPT": "4acd9451",
        "GPT.__init__": "d3993ff1", "GPT.forward": "cfdec045", "GPT.positions_and_mask": "885d3e81",
        "GPT.logits": "7bf98985",
    },
    "moe": {
        "RMSNorm": "085bf01a", "rope_cos_sin": "b3103f9a", "yarn": "9d35e18a", "llama3": "e180a3c7",
        "apply_rope": "3e7688fa", "Attention": "17aff4d6", "MLP": "0a66f93c", "Router": "b115b1c1",
        "has_grouped_mm": "d2acf5ae", "grouped_matmul": "1c4afea0", "ExpertLinear": "a80b6ddc", "MoE": "37489911",
        "Block": "161b27fd", "GPT": "4acd9451", "GPT.__init__": "3f5a8680", "GPT.forward": "24810dc6",
        "GPT.positions_and_mask": "885d3e81", "GPT.logits": "7bf98985", "GPT.padding": "fbef2115",
    },
    "hybrid": {
        "RMSNorm": "1e4ee690", "rope_cos_sin": "37e2e754", "yarn": "9d35e18a", "llama3": "e180a3c7",
        "apply_rope": "b12c079b", "Attention": "8b8d03cc", "recurrent_delta_rule": "b40bb6ce",
        "chunked_delta_rule": "2694dc38", "GatedDelta": "7fe6d1cf", "unit": "1d84f0a6", "MLP": "0a66f93c",
        "Block": "15a28f55", "GPT": "4acd9451", "GPT.__init__": "d3993ff1", "GPT.forward": "310d397b",
        "GPT.positions_and_mask": "885d3e81", "GPT.logits": "7bf98985",
    },
    "sliding": {
        "RMSNorm": "085bf01a", "rope_cos_sin": "f74705c1", "yarn": "9d35e18a", "llama3": "e180a3c7",
        "apply_rope": "3e7688fa", "near_or_global": "5df5cbf7", "Attention": "ec30f574", "MLP": "0a66f93c",
        "Block": "e7decd53", "mask_of_each_letter": "c36d7035", "GPT": "4acd9451", "GPT.__init__": "d3993ff1",
        "GPT.forward": "a9fa2b56", "GPT.positions_and_mask": "55ef6350", "GPT.logits": "7bf98985",
    },
}
# fmt: on
