"""The weight tables of the model families: where each weight lies in HF's files, and its axes.

A table row says where a weight lives here, its name in HF's files and, as an einops pattern from HF's layout to ours,
its axes. Import, export, shapes, initialisation, sharding and the weight-decay mask all follow from the rows.
Axis letters: v vocabulary, d model, n query heads, k key/value heads, h head size, f mlp, l layers, p learned
positions, x experts, e an expert's mlp; s the parts of a fused tensor, of which a weight is one. Of an encoder-decoder,
l are the encoder's layers, m the decoder's, and b the buckets of distances.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Weight:
    path: str  # ours; weights under layers/ have a leading axis l
    hf: str  # HF's name, with {l} for the layer and {x} for the expert
    layout: str  # einops pattern, HF's layout -> ours
    # Where HF's tensor is several weights in one: the letter along which it holds them, and the letters whose sizes
    # add up to what comes before this one, and to the whole.
    fused: str = ""
    before: str = ""
    whole: str = ""
    # Other names under which a model's files may hold the same tensor once more.
    copies: tuple[str, ...] = ()

    @property
    def stacked(self) -> tuple[str, ...]:
        """The leading axes, along which HF's files have a tensor each."""
        return tuple(axis for axis in ("l", "m", "x") if f"{{{axis}}}" in self.hf)

    @property
    def axes(self) -> tuple[str, ...]:
        return self.stacked + tuple(self.layout.split(" -> ")[1].split())

    def hf_name(self, place: Sequence[int]) -> str:
        """Returns the name of HF's tensor at a place of the stacked axes."""
        return self.hf.format(**dict(zip(self.stacked, place, strict=True)))

    @property
    def decays(self) -> bool:
        """Weight decay leaves out norms and biases, as HF's Trainer does."""
        return not self.path.endswith(("scale", "bias"))

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(sizes[axis] for axis in self.axes)


Table = tuple[Weight, ...]
TableOf = Callable[[Config], Table]

# Layouts of linear maps: PyTorch's Linear has the output first, GPT-2's Conv1D the input.
Q, K, O, UP, DOWN = "(n h) d -> d n h", "(k h) d -> d k h", "d (n h) -> n h d", "f d -> d f", "d f -> d f"


def linear(path: str, hf: str, layout: str, bias: bool = False) -> Table:
    """Returns the rows of a linear map and, where it has one, of its bias."""
    weight = Weight(f"{path}/weight", f"{hf}.weight", layout)
    return (weight, Weight(f"{path}/bias", f"{hf}.bias", bias_layout(path, layout))) if bias else (weight,)


def bias_layout(path: str, layout: str) -> str:
    """Returns the layout of a linear map's bias: what the map makes is d at the end of a block, else what is not d."""
    if path.endswith(("/o", "/down")):
        return "d -> d"
    made = layout.split(" -> ")[0].removeprefix("d ").removesuffix(" d")
    return f"{made} -> {' '.join(letter for letter in made.strip('()').split() if letter != 's')}"


def fused(hf: str, parts: Mapping[str, str], letters: str, bias: bool = False) -> Table:
    """Returns the rows of linear maps that HF keeps in one tensor: {path: layout}, and the letter each is cut along."""
    rows: list[Weight] = []
    for i, (path, layout) in enumerate(parts.items()):
        cut = {"fused": letters[i], "before": letters[:i], "whole": letters}
        rows += [dataclasses.replace(row, **cut) for row in linear(path, hf, layout, bias)]
    return tuple(rows)


def norm(path: str, hf: str, bias: bool = False, layout: str = "d -> d") -> Table:
    scale = Weight(f"{path}/scale", f"{hf}.weight", layout)
    return (scale, Weight(f"{path}/bias", f"{hf}.bias", layout)) if bias else (scale,)


def attention(qkv_bias: bool, o_bias: bool, o: str = "o_proj", hf: str = "self_attn") -> Table:
    return (*linear("attn/q", f"{hf}.q_proj", Q, qkv_bias), *linear("attn/k", f"{hf}.k_proj", K, qkv_bias),
            *linear("attn/v", f"{hf}.v_proj", K, qkv_bias), *linear("attn/o", f"{hf}.{o}", O, o_bias))


def gated_mlp(bias: bool = False, path: str = "mlp", hf: str = "mlp") -> Table:
    return (*linear(f"{path}/gate", f"{hf}.gate_proj", UP, bias), *linear(f"{path}/up", f"{hf}.up_proj", UP, bias),
            *linear(f"{path}/down", f"{hf}.down_proj", DOWN, bias))


def plain_mlp(up: str, down: str, bias: bool, layouts: tuple[str, str] = (UP, DOWN)) -> Table:
    return *linear("mlp/up", up, layouts[0], bias), *linear("mlp/down", down, layouts[1], bias)


FUSED_GATED_MLP = (*fused("mlp.gate_up_proj", {"mlp/gate": UP, "mlp/up": UP}, "ff"),
                   *linear("mlp/down", "mlp.down_proj", DOWN))


def norms(hf_names: Mapping[str, str], bias: bool = False) -> Table:
    """Returns the rows of a layer's norms: {path: HF's name}."""
    return tuple(row for path, hf in hf_names.items() for row in norm(path, hf, bias))


# A layer's norms: before attention and mlp; after them; both; one for both.
PRE = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
POST = {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
BOTH = {"attn_norm": "input_layernorm", "mlp_norm": "pre_feedforward_layernorm", **POST}
ONE = {"attn_norm": "input_layernorm"}
GLM4 = {"attn_norm": "input_layernorm", "attn_post_norm": "post_self_attn_layernorm",
        "mlp_norm": "post_attention_layernorm", "mlp_post_norm": "post_mlp_layernorm"}
QK_NORMS = (*norm("attn/q_norm", "self_attn.q_norm", layout="h -> h"),
            *norm("attn/k_norm", "self_attn.k_norm", layout="h -> h"))
# Over all heads together.
WIDE_QK_NORMS = (*norm("attn/q_norm", "self_attn.q_norm", layout="(n h) -> n h"),
                 *norm("attn/k_norm", "self_attn.k_norm", layout="(k h) -> k h"))


def decoder(config: Config, *layer: Weight, final: Table, prefix: str = "model", layers: str = "layers",
            embed: str = "embed_tokens", positions: str | None = None, head: str = "lm_head",
            head_bias: bool = False) -> Table:
    """Returns the table of a decoder from its layer's rows, whose names are those within a layer."""
    tied = config["tie_word_embeddings"]
    return (
        Weight("embed", f"{prefix}.{embed}.weight", "v d -> v d", copies=(f"{head}.weight",) if tied else ()),
        *((Weight("positions", f"{prefix}.{positions}.weight", "p d -> p d"),) if positions else ()),
        *(dataclasses.replace(row, path=f"layers/{row.path}", hf=f"{prefix}.{layers}.{{l}}.{row.hf}")
          for row in layer),
        *(dataclasses.replace(row, hf=f"{prefix}.{row.hf}") for row in final),
        *(() if tied else (Weight("unembed", f"{head}.weight", "v d -> v d"),)),
        *((Weight("unembed_bias", f"{head}.bias", "v -> v"),) if head_bias else ()),
    )


FINAL = norm("final_norm", "norm")


def llama_like(*, qkv_bias: bool | str = False, o_bias: bool | str = False, mlp_bias: bool | str = False,
               block: Mapping[str, str] = PRE, mlp: Table | None = None, extra: Table = ()) -> TableOf:
    """Returns the table, as a function of the config, of families with Llama's names; a bias may be a field's name."""
    def table(config: Config) -> Table:
        has = lambda bias: config[bias] if isinstance(bias, str) else bias
        return decoder(config, *norms(block), *attention(has(qkv_bias), has(o_bias)), *extra,
                       *(gated_mlp(has(mlp_bias)) if mlp is None else mlp), final=FINAL)

    return table


llama_with_biases = partial(llama_like, qkv_bias="attention_bias", o_bias="attention_bias")


def experts(config: Config, router: str, names: str, gate: str, up: str, down: str) -> Table:
    """Returns the rows of a mixture of experts, and of the shared one where the config gives it a size."""
    shared = (*gated_mlp(path="mlp/shared", hf="mlp.shared_expert"),
              Weight("mlp/shared_gate", "mlp.shared_expert_gate.weight", "s d -> d"))
    return (Weight("mlp/router", f"{router}.weight", "x d -> d x"),
            *(Weight(f"mlp/{path}", f"{names}.{{x}}.{hf}.weight", layout)
              for path, hf, layout in (("gate", gate, "e d -> d e"), ("up", up, "e d -> d e"),
                                       ("down", down, "d e -> d e"))),
            *(shared if "shared_expert_intermediate_size" in config else ()))


def mixtral_table(config: Config) -> Table:
    block = "block_sparse_moe"
    return decoder(config, *norms(PRE), *attention(False, False),
                   *experts(config, f"{block}.gate", f"{block}.experts", "w1", "w3", "w2"), final=FINAL)


def qwen_moe_table(config: Config) -> Table:
    qwen3 = "qkv_bias" not in config
    bias, o_bias = (config["attention_bias"],) * 2 if qwen3 else (config["qkv_bias"], False)
    return decoder(config, *norms(PRE), *attention(bias, o_bias), *(QK_NORMS if qwen3 else ()),
                   *experts(config, "mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"), final=FINAL)


def opt_table(config: Config) -> Table:
    bias = config["enable_bias"]
    return decoder(config, *norms({"attn_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"}, bias=True),
                   *attention(bias, bias, "out_proj"), *plain_mlp("fc1", "fc2", bias),
                   final=norm("final_norm", "final_layer_norm", bias=True), prefix="model.decoder",
                   positions="embed_positions")


def gpt2_table(config: Config) -> Table:
    qkv = {"attn/q": "d (n h) -> d n h", "attn/k": "d (k h) -> d k h", "attn/v": "d (k h) -> d k h"}
    return decoder(config, *norms({"attn_norm": "ln_1", "mlp_norm": "ln_2"}, bias=True),
                   *fused("attn.c_attn", qkv, "nkk", bias=True),
                   *linear("attn/o", "attn.c_proj", "(n h) d -> n h d", bias=True),
                   *plain_mlp("mlp.c_fc", "mlp.c_proj", True, ("d f -> d f", "f d -> d f")),
                   final=norm("final_norm", "ln_f", bias=True), prefix="transformer", layers="h", embed="wte",
                   positions="wpe")


def gptj_table(config: Config) -> Table:
    return decoder(config, *norms({"attn_norm": "ln_1"}, bias=True), *attention(False, False, "out_proj", "attn"),
                   *plain_mlp("mlp.fc_in", "mlp.fc_out", True), final=norm("final_norm", "ln_f", bias=True),
                   prefix="transformer", layers="h", embed="wte", head_bias=True)


def gpt_neox_table(config: Config) -> Table:
    qkv = {"attn/q": "(n s h) d -> d n h", "attn/k": "(k s h) d -> d k h", "attn/v": "(k s h) d -> d k h"}
    bias = config["attention_bias"]
    return decoder(config, *norms(PRE, bias=True), *fused("attention.query_key_value", qkv, "sss", bias),
                   *linear("attn/o", "attention.dense", O, bias),
                   *plain_mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", True),
                   final=norm("final_norm", "final_layer_norm", bias=True), prefix="gpt_neox", embed="embed_in",
                   head="embed_out")


def phi_table(config: Config) -> Table:
    return decoder(config, *norms(ONE, bias=True), *attention(True, True, "dense"),
                   *plain_mlp("mlp.fc1", "mlp.fc2", True), final=norm("final_norm", "final_layernorm", bias=True),
                   head_bias=True)


def phi3_table(config: Config) -> Table:
    return decoder(config, *norms(PRE), *fused("self_attn.qkv_proj", {"attn/q": Q, "attn/k": K, "attn/v": K}, "nkk"),
                   *linear("attn/o", "self_attn.o_proj", O), *FUSED_GATED_MLP, final=FINAL)


def starcoder2_table(config: Config) -> Table:
    bias = config["use_bias"]
    return decoder(config, *norms(PRE, bias=True), *attention(bias, bias), *plain_mlp("mlp.c_fc", "mlp.c_proj", bias),
                   final=norm("final_norm", "norm", bias=True))


def stablelm_table(config: Config) -> Table:
    return decoder(config, *norms(ONE if config["use_parallel_residual"] else PRE, bias=True),
                   *attention(config["use_qkv_bias"], False), *gated_mlp(),
                   final=norm("final_norm", "norm", bias=True))


def t5_table(config: Config) -> Table:
    def stack(ours: str, theirs: str, letter: str, parts: Table) -> Table:
        return (*(dataclasses.replace(row, path=f"{ours}_layers/{row.path}",
                                      hf=f"{theirs}.block.{{{letter}}}.layer.{row.hf}") for row in parts),
                Weight(f"{ours}_distance_bias",
                       f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "b n -> b n"),
                *norm(f"{ours}_norm", f"{theirs}.final_layer_norm"))

    def attend(path: str, hf: str) -> Table:
        return tuple(row for name, layout in (("q", Q), ("k", Q), ("v", Q), ("o", O))
                     for row in linear(f"{path}/{name}", f"{hf}.{name}", layout))

    def mlp(place: int) -> Table:
        hf, gated = f"{place}.DenseReluDense", config["is_gated_act"]
        return (*norm("mlp_norm", f"{place}.layer_norm"),
                *(linear("mlp/gate", f"{hf}.wi_0", UP) if gated else ()),
                *linear("mlp/up", f"{hf}.wi_1" if gated else f"{hf}.wi", UP), *linear("mlp/down", f"{hf}.wo", DOWN))

    attn = (*norm("attn_norm", "0.layer_norm"), *attend("attn", "0.SelfAttention"))
    cross = (*norm("cross_norm", "1.layer_norm"), *attend("cross", "1.EncDecAttention"))
    # Of old: a config that ties scales the outputs. Newer transformers say so in every file, and tie what files lack.
    tied = config["scale_decoder_outputs"]
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", *(("lm_head.weight",) if tied else ()))
    return (Weight("embed", "shared.weight", "v d -> v d", copies=copies),
            *stack("encoder", "encoder", "l", (*attn, *mlp(1))),
            *stack("decoder", "decoder", "m", (*attn, *cross, *mlp(2))),
            *(() if tied else (Weight("unembed", "lm_head.weight", "v d -> v d"),)))
