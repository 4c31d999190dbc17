"""Tiny random models of transformers, and their weights by the names of a sharded checkpoint."""

import torch
import torch.nn.functional as F

DEFAULTS = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def make_model(family: str, **changes):
    """Return a ``transformers.<family>ForCausalLM`` in fp32 with random weights.

    Weights that usually start as ones or zeros are random too.
    """
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**DEFAULTS, **changes})
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def exit_logits(model, tokens_bs: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return {depth: logits [b, s, v]} of the same model with ``depth`` layers."""
    layers, logits = model.model.layers, {}
    for depth in range(1, len(layers) + 1):
        model.model.layers, model.config.num_hidden_layers = layers[:depth], depth
        with torch.no_grad():
            logits[depth] = model(tokens_bs, use_cache=False).logits
    model.model.layers, model.config.num_hidden_layers = layers, len(layers)
    return logits


def gradients(
    model, tokens_bs: torch.Tensor, labels_bs: torch.Tensor, coefficients: dict[int, float]
) -> dict[str, torch.Tensor]:
    """Return the gradients of the sum over exits of coefficient x mean cross entropy.

    They have the names of a sharded checkpoint.
    """
    layers, loss = model.model.layers, torch.zeros(())
    for depth, coefficient in coefficients.items():
        model.model.layers, model.config.num_hidden_layers = layers[:depth], depth
        loss = loss + coefficient * F.cross_entropy(
            model(tokens_bs, use_cache=False).logits.flatten(0, 1), labels_bs.flatten()
        )
    model.model.layers, model.config.num_hidden_layers = layers, len(layers)
    loss.backward()
    return global_weights(
        model, {name: parameter.grad for name, parameter in model.named_parameters()}
    )


def global_weights(model, given: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Return whole tensors by the names of a sharded checkpoint.

    They are the weights, or the tensors ``given`` for each parameter.
    """
    config = model.config
    given = given or {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    groups = config.num_key_value_heads
    result = {
        "embedding.word_embeddings.weight": given["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": given["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        result["output_layer.weight"] = given["lm_head.weight"]
    for i in range(config.num_hidden_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        for kind in ("weight", "bias"):
            if theirs + f"self_attn.q_proj.{kind}" in given:
                parts = [given[theirs + f"self_attn.{p}_proj.{kind}"] for p in "qkv"]
                # each group holds its queries, its key, its value
                by_group = [part.view(groups, -1, *part.shape[1:]) for part in parts]
                result[ours + f"self_attention.linear_qkv.{kind}"] = torch.cat(by_group, 1).flatten(
                    0, 1
                )
        for norm in "qk":
            if theirs + f"self_attn.{norm}_norm.weight" in given:
                result[ours + f"self_attention.{norm}_layernorm.weight"] = given[
                    theirs + f"self_attn.{norm}_norm.weight"
                ]
        result |= {
            ours + "self_attention.linear_qkv.layer_norm_weight": given[
                theirs + "input_layernorm.weight"
            ],
            ours + "self_attention.linear_proj.weight": given[theirs + "self_attn.o_proj.weight"],
            ours + "mlp.linear_fc1.layer_norm_weight": given[
                theirs + "post_attention_layernorm.weight"
            ],
            ours + "mlp.linear_fc1.weight": torch.cat(
                (given[theirs + "mlp.gate_proj.weight"], given[theirs + "mlp.up_proj.weight"])
            ),
            ours + "mlp.linear_fc2.weight": given[theirs + "mlp.down_proj.weight"],
        }
    return result
